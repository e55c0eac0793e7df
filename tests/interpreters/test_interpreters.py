"""Maps against closed forms, finite differences and other implementations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from toys import Bands

from robusteval.interpreters.cam import (
    cam,
    compute_class_maps,
    compute_features_and_slopes,
    gradcam,
    gradcam_plus_plus,
    hirescam,
)
from robusteval.interpreters.gradient import (
    compute_guided_gradient,
    compute_input_gradient,
    grad,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    smoothgrad,
)
from robusteval.interpreters.heads import observe_head
from robusteval.interpreters.rectifiers import smooth_relu
from robusteval.interpreters.scaling import min_max
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.steps import count_passes
from robusteval.registry import INTERPRETERS

# RTS needs a trained network, and is held to the same in its own tests
# and those of attention need a network that has some
ELSEWHERE = ("rts", "rollout", "attention_relevance")
EVERY = [name for name in INTERPRETERS.entries if name not in ELSEWHERE]
ON_GRAPH = [name for name in EVERY if INTERPRETERS.entries[name].differentiable]


class Pooled(nn.Module):
    """Convolutions, pooling over all places, one linear layer: the form that CAM was made for."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 8, 3, 2, padding=1)
        self.linear = nn.Linear(8, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.body(self.activation(self.stem(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Classwise(nn.Module):
    """One map per class, then pooling: the head of SqueezeNet."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(6, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class Deep(nn.Module):
    """A smooth network whose last features pass through a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.hidden = nn.Linear(3 * 4 * 4, 6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.conv2(torch.tanh(self.conv1(x))))
        logits: Tensor = self.linear(torch.tanh(self.hidden(x.flatten(1))))
        return logits


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pooled() -> Classifier:
    """`Pooled` as a classifier that calls its network on four images at a time."""
    network = seeded(Pooled)
    network.requires_grad_(False)
    return Classifier(network, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), num_classes=5, block=4)


X = images(7, 3, 8, 8)
Y = torch.tensor([0, 1, 2, 3, 4, 0, 2])


def interpreter(name: str) -> Callable[..., Tensor]:
    """A registered interpreter, quick and on the layer that every network here has."""
    function: Callable[..., Tensor] = INTERPRETERS.load(name)
    # all steps of a short search that ends inside the box have a derivative
    short = {"iterations": 4, "unroll": 4, "rate": 0.01} if name == "mask" else {}
    return partial(function, **short)


# What every interpreter keeps


@pytest.mark.parametrize("name", EVERY)
def test_a_map_is_one_plane_per_image_off_the_graph(name: str, pooled: Classifier) -> None:
    maps = interpreter(name)(pooled, X, Y)

    assert maps.shape[:2] == (7, 1)
    assert maps.ndim == 4
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert bool(maps.isfinite().all())


@pytest.mark.parametrize("name", EVERY)
def test_a_map_does_not_depend_on_the_batch(name: str, pooled: Classifier) -> None:
    explain = interpreter(name)
    order, seeds = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.arange(7) + 11

    whole = explain(pooled, X, Y, seeds=seeds)
    mixed = explain(pooled, X[order], Y[order], seeds=seeds[order])
    single = [explain(pooled, X[i : i + 1], Y[i : i + 1], seeds=seeds[i : i + 1]) for i in range(7)]

    assert torch.equal(mixed, whole[order])
    assert torch.equal(torch.cat(single), whole)


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch_has_no_maps(name: str, pooled: Classifier) -> None:
    explain = interpreter(name)

    assert explain(pooled, X[:0], Y[:0]).shape == (0, *explain(pooled, X, Y).shape[1:])


@pytest.mark.parametrize("name", EVERY)
def test_maps_can_be_had_without_gradients(name: str, pooled: Classifier) -> None:
    explain = interpreter(name)
    with torch.no_grad():
        maps = explain(pooled, X.clone().requires_grad_(), Y)

    assert torch.equal(maps, explain(pooled, X, Y))
    assert not maps.requires_grad


@pytest.mark.parametrize("name", EVERY)
def test_random_weights_give_other_maps(name: str, pooled: Classifier) -> None:
    """Sanity check of arXiv:1810.03292."""
    explain = interpreter(name)
    before = min_max(explain(pooled, X, Y))
    pooled.network = seeded(Pooled, seed=1)
    after = min_max(explain(pooled, X, Y))

    assert float((after - before).abs().mean()) > 0.05


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that an interpreter could leave changed."""
    return [
        *((n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()),
        *((n, len(m._forward_pre_hooks), id(m)) for n, m in model.named_modules()),
        *((n, p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()),
        *((n, b._version) for n, b in model.named_buffers()),
    ]


class Broken(RuntimeError):
    """Raised on purpose."""


@contextmanager
def breaking(model: nn.Module) -> Iterator[None]:
    """The last layer fails inside."""

    def fail(*_: object) -> None:
        raise Broken

    handle = model.get_submodule("network.linear").register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_the_model_is_left_as_it_was(name: str, trainable: bool, pooled: Classifier) -> None:
    explain = interpreter(name)
    pooled.requires_grad_(trainable)
    pooled.network.get_submodule("stem").train()
    for parameter in pooled.parameters():
        parameter.grad = torch.ones_like(parameter) if trainable else None
    before = state(pooled)

    explain(pooled, X, Y)
    after_success = state(pooled)
    with breaking(pooled), pytest.raises(Exception):  # noqa: B017, PT011
        explain(pooled, X, Y)

    assert after_success == before
    assert state(pooled) == before


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 5, 0, 2]), "classes must lie between 0 and 4"),
        (torch.tensor([0, 1, 2, 3, -1, 0, 2]), "classes must lie between 0 and 4"),
        (Y[:3], "one int64 class"),
        (Y.float(), "one int64 class"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_a_class_that_does_not_exist_is_refused(
    name: str, y: Tensor, message: str, pooled: Classifier
) -> None:
    with pytest.raises(ValueError, match=message):
        interpreter(name)(pooled, X, y)


@pytest.mark.parametrize("name", ON_GRAPH)
def test_the_graph_is_kept_exactly_when_the_images_ask(name: str, pooled: Classifier) -> None:
    x = X.clone().requires_grad_()
    maps = interpreter(name)(pooled, x, Y)
    (derivative,) = autograd.grad(maps.square().sum(), x)

    assert bool((derivative.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("name", ON_GRAPH)
def test_a_map_trains_parameters_when_the_images_ask(name: str, pooled: Classifier) -> None:
    pooled.requires_grad_(True)
    weight = pooled.network.get_submodule("stem").weight
    assert isinstance(weight, Tensor)
    maps = interpreter(name)(pooled, X.clone().requires_grad_(), Y)

    assert float(autograd.grad(maps.square().sum(), weight)[0].abs().sum()) > 0


SMOOTH: dict[str, dict[str, Any]] = {
    "grad": {"score": "logprob", "pool": 2},
    "smoothgrad": {"samples": 3},
    "integrated_gradients": {"steps": 3},
    "gradcam_plus_plus": {"floor": 0.0},
}


@pytest.mark.parametrize("name", ON_GRAPH)
def test_derivatives_of_a_map_match_finite_differences(name: str) -> None:
    network = seeded(Deep) if name != "cam" else seeded(lambda: Pooled(F.softplus))
    x = images(2, 2 if name != "cam" else 3, 4, 4).double().requires_grad_()
    y = torch.tensor([0, 2])
    parameters = SMOOTH.get(name, {})
    network.double().requires_grad_(False)

    maps = interpreter(name)(network, x, y, **parameters)

    assert maps.dtype == torch.float64
    assert bool((maps > 0).any())
    assert autograd.gradcheck(lambda x: interpreter(name)(network, x, y, **parameters), (x,))


# Gradient maps


@pytest.mark.parametrize("relu", ["smooth", "true"])
def test_grad_of_a_linear_model_is_its_weight(relu: str, linear: Classifier) -> None:
    x, y = images(3, 1, 6, 5), torch.tensor([0, 1, 1])
    weight = linear.get_parameter("network.weight").detach().abs()
    pooled_weight = F.avg_pool2d(weight.unsqueeze(0), 2)

    assert torch.equal(grad(linear, x, y, relu=relu), weight.expand(3, 1, 6, 5))  # type: ignore[arg-type]
    assert torch.allclose(grad(linear, x, y, pool=2), pooled_weight.expand(3, 1, 3, 2))


def test_grad_matches_finite_differences_of_the_logit() -> None:
    network = seeded(Deep).double()
    x, y, step = images(1, 2, 4, 4).double(), torch.tensor([1]), 1e-6
    numeric = torch.zeros_like(x).flatten()
    for i in range(x.numel()):
        move = torch.zeros_like(numeric).scatter(0, torch.tensor(i), step).view_as(x)
        with torch.no_grad():
            numeric[i] = (network(x + move) - network(x - move))[0, 1] / (2 * step)

    expected = numeric.view_as(x).abs().amax(1, keepdim=True)
    assert torch.allclose(grad(network, x, y), expected, atol=1e-8)


def test_the_log_probability_fades_where_the_network_is_sure(pooled: Classifier) -> None:
    with torch.no_grad():
        pooled.get_parameter("network.linear.weight").mul_(1e5)
        y = pooled(X).argmax(1)

    assert float(grad(pooled, X, y, score="logit").amax()) > 1
    assert float(grad(pooled, X, y, score="logprob").amax()) == 0


def test_smoothgrad_without_noise_is_grad(pooled: Classifier) -> None:
    maps = smoothgrad(pooled, X, Y, samples=2, sigma=0)

    assert torch.allclose(maps, grad(pooled, X, Y), rtol=1e-5)


def test_smoothgrad_is_the_same_for_the_same_seeds_only(pooled: Classifier) -> None:
    one, other = torch.arange(7), torch.arange(7) + 100
    first = smoothgrad(pooled, X, Y, seeds=one)

    assert torch.equal(smoothgrad(pooled, X, Y, seeds=one), first)
    assert not torch.equal(smoothgrad(pooled, X, Y, seeds=other), first)


def test_integrated_gradients_sum_to_the_gain_of_the_logit(pooled: Classifier) -> None:
    maps = integrated_gradients(pooled, X, Y, steps=300, baseline=0.2)
    with torch.no_grad():
        gain = (pooled(X) - pooled(torch.full_like(X, 0.2))).gather(1, Y.unsqueeze(1)).squeeze(1)

    assert torch.allclose(maps.sum((1, 2, 3)), gain, atol=2e-3)


class Dense(nn.Module):
    """Linear layers and ReLUs on the flat image."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        widths = [(12, 9), (9, 7), (7, 3)]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in widths)
        self.relus = nn.ModuleList(nn.ReLU() for _ in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, relu in list(zip(self.layers, self.relus, strict=True))[:-1]:
            x = relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits


def plain_relevance(network: nn.Module, image: Tensor, label: int) -> Tensor:
    """LRP-0 layer by layer, neuron by neuron: shares of what each neuron was given."""
    layers = [part for part in network.modules() if isinstance(part, nn.Linear)]
    inputs = [image.flatten()]
    for layer in layers[:-1]:
        inputs.append(torch.relu(layer(inputs[-1])))
    logits = layers[-1](inputs[-1])
    above = torch.zeros_like(logits)
    above[label] = logits[label]
    for layer, a in zip(reversed(layers), reversed(inputs), strict=True):
        below = torch.zeros_like(a)
        sums = layer(a)
        for k in range(len(above)):
            if above[k] == 0:
                continue
            for j in range(len(a)):
                below[j] += a[j] * layer.weight[k, j] / sums[k] * above[k]
        above = below
    return above.view_as(image).sum(0)


def test_input_x_gradient_is_relevance_propagation() -> None:
    network = seeded(Dense).double().requires_grad_(False)
    model = Classifier(network, mean=(0.3, 0.4, 0.5), std=(0.2,), num_classes=3)
    x, y = images(4, 3, 2, 2).double(), torch.tensor([0, 1, 2, 1])
    shown = (x - model.mean) / model.std

    maps = input_x_gradient(model, x, y)

    for i in range(4):
        expected = plain_relevance(network, shown[i], int(y[i]))
        assert torch.allclose(maps[i, 0], expected, rtol=0, atol=1e-9)


def test_input_x_gradient_is_the_epsilon_rule_of_zennit() -> None:
    attribution = pytest.importorskip(
        "zennit.attribution", exc_type=ImportError, reason="zennit is not installed"
    )
    composites = pytest.importorskip(
        "zennit.composites", exc_type=ImportError, reason="zennit is not installed"
    )
    rules = pytest.importorskip(
        "zennit.rules", exc_type=ImportError, reason="zennit is not installed"
    )
    network = seeded(Dense).double()
    x, y = images(4, 3, 2, 2).double(), torch.tensor([0, 1, 2, 1])
    rule = composites.LayerMapComposite(
        [(nn.Linear, rules.Epsilon(epsilon=1e-12)), (nn.ReLU, rules.Pass())]
    )

    with attribution.Gradient(model=network, composite=rule) as explain:
        logits = network(x).detach()
        start = logits * F.one_hot(y, 3)
        _, relevance = explain(x.clone().requires_grad_(), start)

    maps = input_x_gradient(network, x, y)
    assert torch.allclose(maps, relevance.sum(1, keepdim=True), rtol=0, atol=1e-9)


def test_relevance_is_conserved_without_biases() -> None:
    network = seeded(lambda: Dense(bias=False)).double()
    x, y = images(4, 3, 2, 2).double(), torch.tensor([0, 1, 2, 1])
    logit = network(x).detach().gather(1, y.unsqueeze(1)).squeeze(1)

    maps = input_x_gradient(network, x, y)

    assert torch.allclose(maps.sum((1, 2, 3)), logit, rtol=0, atol=1e-12)


def test_the_centre_is_the_value_that_counts_as_zero(pooled: Classifier) -> None:
    gradient = compute_input_gradient(pooled, X, Y)
    expected = ((X - 0.5) * gradient).sum(1, keepdim=True)

    assert torch.allclose(input_x_gradient(pooled, X, Y, centre=0.5), expected)


def test_guided_backprop_passes_on_only_what_raises_the_class() -> None:
    """One hidden layer: the derivative without the hidden units that lower the logit."""
    first, last = seeded(lambda: nn.Linear(12, 9)), seeded(lambda: nn.Linear(9, 3))
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(inplace=True), last)
    x, y = images(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        active = first(x.flatten(1)) > 0
        expected = ((last.weight[y].clamp_min(0) * active) @ first.weight).view_as(x)

    assert torch.allclose(compute_guided_gradient(network, x, y), expected, atol=1e-6)
    assert torch.allclose(
        guided_backprop(network, x, y), expected.abs().amax(1, keepdim=True), atol=1e-6
    )


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Identity()],
    ids=lambda a: type(a).__name__,
)
def test_guided_backprop_without_a_relu_is_refused(activation: nn.Module) -> None:
    with pytest.raises(ValueError, match="calls none"):
        guided_backprop(seeded(lambda: Pooled(activation)), X, Y)
    with pytest.raises(ValueError, match="calls none"):
        guided_backprop(seeded(lambda: Pooled(lambda z: z.clamp_min(0))), X, Y)


class Stepped(nn.Module):
    """Two hidden layers with an activation, as modules."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 6, 3), activation(), nn.Flatten()
        )
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def test_guided_backprop_is_that_of_captum_on_relu_and_guides_relu6_too() -> None:
    """Captum hooks modules of the class ReLU only and leaves ReLU6 its plain derivative."""
    captum = pytest.importorskip(
        "captum.attr", exc_type=ImportError, reason="captum is not installed"
    )
    network, six = seeded(lambda: Stepped(nn.ReLU)), seeded(lambda: Stepped(nn.ReLU6))
    network(X)
    six(X)
    six.load_state_dict(network.state_dict())  # activations stay far below 6

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        theirs = captum.GuidedBackprop(network).attribute(X.clone(), target=Y)
        theirs_six = captum.GuidedBackprop(six).attribute(X.clone(), target=Y)

    assert torch.allclose(compute_guided_gradient(network, X, Y), theirs, atol=1e-6)
    assert torch.allclose(compute_guided_gradient(six, X, Y), theirs, atol=1e-6)
    assert torch.allclose(compute_input_gradient(six, X, Y), theirs_six, atol=1e-6)


# Smooth ReLUs


class Rectified(nn.Module):
    """The rectifiers of a network, spelt in every way."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4, 2)
        self.module = nn.ReLU()
        self.in_place = nn.ReLU(inplace=True)
        self.six = nn.ReLU6(inplace=True)
        self.leaky = nn.LeakyReLU(0.1)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = 6 * self.conv(x)
        if self.spelling == "method in place, result unused":
            x.relu_()
        else:
            x = SPELLINGS[self.spelling](self, x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


SPELLINGS: dict[str, Callable[[Rectified, Tensor], Tensor]] = {
    "module": lambda self, x: self.module(x),
    "module in place": lambda self, x: self.in_place(x),
    "function": lambda self, x: F.relu(x),
    "function in place": lambda self, x: F.relu(x, inplace=True),
    "torch function": lambda self, x: torch.relu(x),
    "torch function in place": lambda self, x: torch.relu_(x),
    "method": lambda self, x: x.relu(),
    "relu6": lambda self, x: F.relu6(x),
    "relu6 in place": lambda self, x: self.six(x),
    "hardtanh": lambda self, x: F.hardtanh(x, -1, 2),
    "leaky": lambda self, x: self.leaky(x),
    "method in place, result unused": lambda self, x: x,
}


def curvature(network: nn.Module, x: Tensor) -> Tensor:
    (gradient,) = autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)
    (second,) = autograd.grad(gradient.square().sum(), x)
    return second


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_rectifier_becomes_smooth(spelling: str) -> None:
    network = seeded(lambda: Rectified(spelling))
    model = Classifier(network, num_classes=2, block=2)
    x = images(4, 1, 6, 6).requires_grad_()
    with torch.no_grad():
        plain = model(x)

    assert float(curvature(model, x).abs().max()) == 0
    with smooth_relu():
        assert torch.equal(model(x), plain)
        assert float(curvature(model, x).abs().max()) > 0
    assert float(curvature(model, x).abs().max()) == 0


@pytest.mark.parametrize("kind", ["smooth", "adv2"])
@pytest.mark.parametrize("spelling", ["relu", "relu6", "leaky"])
def test_the_slope_is_the_published_one(kind: Any, spelling: str) -> None:
    z = torch.linspace(-0.1, 6.1, 201, dtype=torch.float64).requires_grad_()
    tau = 1e-3
    cases: dict[str, tuple[Callable[[Tensor], Tensor], dict[float, float], float]] = {
        "relu": (F.relu, {0.0: 1.0}, 0.0),
        "relu6": (F.relu6, {0.0: 1.0, 6.0: -1.0}, 0.0),
        "leaky": (F.leaky_relu, {0.0: 0.99}, 0.01),
    }
    function, bends, start = cases[spelling]
    expected, bent = torch.full_like(z, start), torch.zeros_like(z)
    for place, jump in bends.items():
        ratio = (z - place) / ((z - place) ** 2 + tau).sqrt()
        step = (1 + ratio) / 2 if kind == "smooth" else ratio + (z < place)
        expected = expected + jump * step
        bent = (
            bent + jump * (0.5 if kind == "smooth" else 1) * tau / ((z - place) ** 2 + tau) ** 1.5
        )

    with smooth_relu(kind, tau):
        (slope,) = autograd.grad(function(z).sum(), z, create_graph=True)
    (second,) = autograd.grad(slope.sum(), z)

    assert torch.allclose(slope, expected.detach())
    assert torch.allclose(second, bent.detach())


def test_a_smooth_relu_is_gone_after_an_exception(pooled: Classifier) -> None:
    with pytest.raises(Broken), smooth_relu():
        raise Broken
    x = X.clone().requires_grad_()

    assert float(curvature(pooled, x).abs().max()) == 0


def test_one_hidden_layer_has_an_exact_second_derivative() -> None:
    """Its activations are linear in the image, so differences of the map see the same slope."""
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU()))
    model = nn.Sequential(network, seeded(lambda: nn.Linear(5, 2))).double()
    x, y = images(2, 1, 2, 2).double().requires_grad_(), torch.tensor([0, 1])

    assert autograd.gradcheck(lambda x: grad(model, x, y), (x,))


def test_only_maps_on_the_graph_have_the_smooth_slope(pooled: Classifier) -> None:
    x = X.clone().requires_grad_()

    assert torch.equal(grad(pooled, x, Y, relu="true").detach(), grad(pooled, X, Y))
    assert not torch.equal(grad(pooled, x, Y).detach(), grad(pooled, X, Y))
    assert torch.allclose(grad(pooled, x, Y).detach(), grad(pooled, X, Y), atol=0.05)


# Class activation maps


def biased(model: nn.Module, maps: Tensor, y: Tensor) -> Tensor:
    """The logits that maps of `Pooled` stand for."""
    return maps.mean((1, 2, 3)) + model.get_parameter("network.linear.bias")[y]


def test_cam_and_bias_make_the_logit(pooled: Classifier) -> None:
    maps = cam(pooled, X, Y)
    logits = pooled(X).gather(1, Y.unsqueeze(1)).squeeze(1)

    assert maps.shape == (7, 1, 4, 4)
    assert torch.allclose(biased(pooled, maps, Y), logits, atol=1e-6)


def test_cam_of_a_classwise_head_is_the_networks_own_class_map() -> None:
    network = seeded(Classwise)
    model = Classifier(network, num_classes=5, block=4)
    with torch.no_grad():
        own = network.get_submodule("classifier")[:-1](network.get_submodule("features")(X))  # type: ignore[index]

    maps = cam(model, X, Y)

    assert torch.allclose(maps[:, 0], own[torch.arange(7), Y])
    assert torch.allclose(maps.mean((1, 2, 3)), model(X)[torch.arange(7), Y], atol=1e-6)


def test_the_head_gives_the_maps_of_any_class_and_the_logits(pooled: Classifier) -> None:
    parts = observe_head(pooled, X)

    assert torch.equal(parts.logits, pooled(X))
    assert torch.equal(compute_class_maps(parts, (Y + 1) % 5), cam(pooled, X, (Y + 1) % 5))


class Functional(Pooled):
    """Pooling and activation as DenseNet has them: functions, the activation in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(torch.relu(self.stem(x))), inplace=True)
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def test_the_head_is_found_however_it_is_spelt() -> None:
    one, other = seeded(Pooled), seeded(Functional)

    assert torch.equal(cam(one, X, Y), cam(other, X, Y))
    assert torch.equal(gradcam(one, X, Y), gradcam(other, X, Y))


@pytest.mark.parametrize("trainable", [True, False])
def test_gradcam_of_a_pooling_head_is_the_positive_part_of_cam(
    trainable: bool, pooled: Classifier
) -> None:
    pooled.requires_grad_(trainable)
    expected = F.relu(cam(pooled, X, Y)) / 16

    assert torch.allclose(gradcam(pooled, X, Y), expected, atol=1e-7)


def test_gradcam_plus_plus_of_a_pooling_head_in_closed_form(pooled: Classifier) -> None:
    parts = observe_head(pooled, X)
    slope = F.relu(parts.weight[Y] / 16)
    share = 16 * slope / (2 + parts.features.sum((2, 3)) * slope)
    expected = F.relu(torch.einsum("nkhw,nk->nhw", parts.features, share))

    maps = gradcam_plus_plus(pooled, X, Y, floor=0)

    assert torch.allclose(maps[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("method", ["gradcam", "gradcam_plus_plus"])
@pytest.mark.parametrize("layer", ["stem", "body"])
def test_maps_agree_with_the_package_grad_cam(method: str, layer: str, pooled: Classifier) -> None:
    library = interpreter("library")
    ours = min_max(interpreter(method)(pooled, X, Y, layer=layer))

    theirs = library(pooled, X, Y, method=method, layer=layer)

    assert theirs.shape == ours.shape
    assert float((ours - theirs).abs().max()) < 1e-4


def test_hirescam_of_a_pooling_head_is_gradcam() -> None:
    library = interpreter("library")
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Flat(), nn.Linear(6, 5)))

    theirs = library(network, X, Y, method="hirescam", layer="1")

    for ours in (gradcam, hirescam):
        assert torch.allclose(theirs, min_max(ours(network, X, Y, layer="1")), atol=1e-4)


@pytest.mark.parametrize(
    "method", ["ablationcam", "eigencam", "eigengradcam", "layercam", "scorecam", "xgradcam"]
)
def test_the_package_works_through_a_classifier_in_blocks(
    method: str, pooled: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = interpreter("library")(pooled, X[:2], Y[:2], method=method)

    assert maps.shape == (2, 1, 4, 4)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layer", ["body", "network.body"])
def test_a_layer_is_named_from_the_network_or_the_model(layer: str, pooled: Classifier) -> None:
    before_relu, _ = compute_features_and_slopes(pooled, X, Y, layer)
    last, _ = compute_features_and_slopes(pooled, X, Y, None)

    assert float(before_relu.min()) < 0
    assert torch.equal(F.relu(before_relu), last)


def test_features_are_kept_from_a_relu_in_place() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), Flat()))
    features, _ = compute_features_and_slopes(network, X, Y % 4, "0")

    assert float(features.min()) < 0


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Narrowing(nn.Module):
    """Feature maps of 1x1 at the end, and an average pool that widens them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 4, 4)
        self.conv2 = nn.Conv2d(4, 4, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.linear = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def test_the_last_features_with_an_extent_are_chosen() -> None:
    assert gradcam(seeded(Narrowing), X, Y).shape == (7, 1, 2, 2)


class Attentive(nn.Module):
    """Patches that attend to one another: no place stays its own."""

    def __init__(self, spelling: str = "function") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.module = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (n, places, 8)
        if self.spelling == "module":
            tokens = self.module(tokens, tokens, tokens)[0]
        elif self.spelling == "function":
            heads = tokens.unsqueeze(1)
            tokens = F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        else:
            tokens = (tokens @ tokens.mT).softmax(2).unsqueeze(1).squeeze(1) @ tokens
        logits: Tensor = self.linear(tokens.mean(1))
        return logits


@pytest.mark.parametrize("spelling", ["module", "function", "matrices"])
def test_the_last_features_of_places_are_those_before_attention_mixes_them(spelling: str) -> None:
    network = seeded(lambda: Attentive(spelling))

    assert torch.equal(gradcam(network, X, Y), gradcam(network, X, Y, layer="patches"))
    assert gradcam(network, X, Y).shape == (7, 1, 4, 4)


def test_a_network_without_feature_maps_says_to_name_a_layer() -> None:
    with pytest.raises(ValueError, match="name a layer"):
        gradcam(seeded(Dense), images(7, 3, 2, 2), Y % 3)


def test_cam_of_another_head_says_to_use_gradcam(bands: Classifier) -> None:
    for model, x in ((bands, images(2, 3, 12, 12)), (seeded(Attentive), X[:2])):
        with pytest.raises(ValueError, match="use gradcam"):
            cam(model, x, Y[:2])
    assert gradcam(bands, images(2, 3, 12, 12), Y[:2]).shape == (2, 1, 6, 6)


class ChannelsLast(nn.Module):
    """`Pooled` with its body computed as ``(n, h, w, channels)``, with as many of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = nn.Linear(8, 8)
        self.activation = nn.ReLU()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.activation(self.body(self.stem(x).permute(0, 2, 3, 1)))
        logits: Tensor = self.linear(features.mean((1, 2)))
        return logits


class ChannelsFirst(ChannelsLast):
    """The same function, spelt with a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight[..., None, None]
        features = self.activation(F.conv2d(self.stem(x), weight, self.body.bias))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize("layer", [None, "activation"])
@pytest.mark.parametrize("interpreter", [gradcam, gradcam_plus_plus, hirescam, cam])
def test_features_with_channels_last_give_the_map_of_their_places(
    interpreter: Callable[..., Tensor], layer: str | None
) -> None:
    """Also on images whose sides are the number of channels."""
    given = {} if interpreter is cam else {"layer": layer}
    x = images(3, 3, 8, 8)
    for image in (x, x[..., :6]):
        expected = interpreter(seeded(ChannelsFirst), image, Y[:3], **given)
        actual = interpreter(seeded(ChannelsLast), image, Y[:3], **given)

        assert actual.shape == (3, 1, *image.shape[2:])
        assert torch.allclose(expected, actual, atol=1e-6)


class Flipped(nn.Module):
    """Averages over an image and its mirror image, inside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.net(x) + self.net(x.flip(3))) / 2
        return logits


class Members(nn.Module):
    """Two networks, of which the last counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Pooled(), Pooled()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.first(x) + 1e-9 * self.last(x)
        return logits


class Skipping(Pooled):
    """An early layer speaks to the head as well."""

    def forward(self, x: Tensor) -> Tensor:
        early = self.activation(self.stem(x))
        late = self.activation(self.body(early))
        logits: Tensor = self.linear(late.mean((2, 3)) + early[:, :1].mean((2, 3)))
        return logits


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("made", [Flipped, Members, Skipping])
def test_maps_of_a_part_of_the_network_are_refused(
    made: Callable[[], nn.Module], graph: bool
) -> None:
    x = X.clone().requires_grad_(graph)
    for interpreter in (gradcam, gradcam_plus_plus):
        with pytest.raises(ValueError, match="do not depend on the last feature maps alone"):
            interpreter(seeded(made), x, Y)
    with pytest.raises(ValueError, match="use gradcam"):
        cam(seeded(made), x, Y)


def test_the_package_understands_layouts_and_refuses_parts() -> None:
    library = INTERPRETERS.load("library")
    x = images(2, 3, 8, 6)

    expected = library(seeded(ChannelsFirst), x, Y[:2], method="gradcam", layer="activation")
    actual = library(seeded(ChannelsLast), x, Y[:2], method="gradcam", layer="activation")
    assert torch.allclose(expected, actual, atol=1e-5)
    for made in (Flipped, Members):
        with pytest.raises(ValueError, match="several passes or branches"):
            library(seeded(made), X[:2], Y[:2], method="gradcam")
    attentive = seeded(lambda: Attentive("module"))
    theirs = library(attentive, X[:2], Y[:2], method="gradcam")
    assert torch.allclose(theirs, min_max(gradcam(attentive, X[:2], Y[:2])), atol=1e-4)


def test_a_layer_of_unknown_layout_is_refused() -> None:
    """Folded from a vector: nobody knows which axis is which."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 64), nn.Unflatten(1, (4, 4, 4)), nn.Flatten(), nn.Linear(64, 5)
    )
    with pytest.raises(ValueError, match="not known what are channels"):
        gradcam(network, images(2, 3, 4, 4), Y[:2], layer="2")


class Cooled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sigmoid()  # type: ignore[no-any-return]


class Twice(Cooled):
    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(3))) / 2  # type: ignore[no-any-return]


def test_cam_of_changed_logits_is_refused(pooled: Classifier) -> None:
    with pytest.raises(ValueError, match="changes the logits"):
        cam(Cooled(pooled), X, Y)
    assert gradcam(Cooled(pooled), X, Y).shape == (7, 1, 4, 4)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_several_passes_per_image_are_refused(n: int, pooled: Classifier) -> None:
    with pytest.raises(ValueError, match="one pass per image"):
        gradcam(Twice(pooled), X[:n], Y[:n])
    with pytest.raises(ValueError, match="several times per image"):
        gradcam(Twice(seeded(Pooled)), X[:n], Y[:n], layer="model.body")


def test_an_ensemble_is_refused(pooled: Classifier) -> None:
    both = nn.ModuleList([pooled, Classifier(Bands(), num_classes=3)])
    both.forward = pooled.forward
    with pytest.raises(ValueError, match="explain its members"):
        gradcam(both, X, Y)


def test_a_layer_that_does_not_exist_is_refused_with_what_there_is(pooled: Classifier) -> None:
    with pytest.raises(ValueError, match=r"'boddy' \(did you mean 'body'\?\).*stem, body"):
        gradcam(pooled, X, Y, layer="boddy")


def test_a_layer_without_feature_maps_is_refused(pooled: Classifier) -> None:
    with pytest.raises(ValueError, match="gives no feature maps"):
        gradcam(pooled, X, Y, layer="linear")


class Masked(nn.Module):
    """What comes before the network has no derivative."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x.detach() * 7).round() / 7)  # type: ignore[no-any-return]


def test_features_need_no_derivative_of_the_image(pooled: Classifier) -> None:
    rounded = (X * 7).round() / 7

    assert torch.equal(gradcam(Masked(pooled), X, Y), gradcam(pooled, rounded, Y))
    with pytest.raises(ValueError, match="no derivative"):
        grad(Masked(pooled), X, Y)


@pytest.mark.parametrize(
    ("explain", "parameters"),
    [
        (grad, {"pool": 0}),
        (grad, {"pool": 9}),
        (grad, {"score": "loss"}),
        (grad, {"relu": "soft"}),
        (smoothgrad, {"samples": 0}),
        (smoothgrad, {"sigma": -0.1}),
        (integrated_gradients, {"steps": 0}),
        (gradcam_plus_plus, {"floor": -1.0}),
    ],
)
def test_parameters_out_of_range_are_refused(
    explain: Callable[..., Tensor], parameters: dict[str, Any], pooled: Classifier
) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        explain(pooled, X, Y, **parameters)


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [("cam", 1, 0), ("gradcam", 1, 1), ("gradcam_plus_plus", 1, 1), ("grad", 1, 1)],
)
def test_a_batch_costs_one_pass(
    name: str, forwards: int, backwards: int, pooled: Classifier
) -> None:
    with frozen(pooled), count_passes(pooled, 7, X.device) as passes:
        interpreter(name)(pooled, X, Y)

    assert passes.forwards.tolist() == [forwards] * 7
    assert passes.backwards.tolist() == [backwards] * 7
