"""Units that are switched off: which bits change, which must not, and what an attack sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.datasets.arrays import from_arrays
from robusteval.errors import UsageError
from robusteval.interpreters.cam import cam, gradcam
from robusteval.interpreters.heads import observe_head
from robusteval.interpreters.observing import observe_calls
from robusteval.models.checkpoint import collect_state, load, save
from robusteval.models.classifier import Classifier
from robusteval.models.identity import identify_model
from robusteval.models.masked import Masked, find_unit_axis, mask_units, measure_activations
from robusteval.models.networks import digits_cnn

LAYER = "10"  # the ReLU before the pooling of `digits_cnn`
UNITS = 64


class Pooled(nn.Module):
    """Six units that are averaged for four classes; the ReLU runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Conv2d(5, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.spare = nn.Linear(2, 2)
        self.rows = nn.Flatten(0, 1)
        self.tokens = nn.Flatten(2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.body(self.relu(self.stem(x))))
        self.tokens(x)
        self.rows(x.flatten(2))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture
def network() -> Pooled:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pooled().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def drawn() -> Tensor:
    """A mask of each of four classes, with units on which they agree."""
    masks = (torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    masks[:, 0], masks[:, 1] = 0, 1
    return masks


def classifier(network: nn.Module, **options: Any) -> Classifier:
    return Classifier(network, mean=(0.4,), std=(0.3,), num_classes=4, **options).eval()


@pytest.mark.parametrize("layer", ["stem", "body", "head"])
@pytest.mark.parametrize("per_class", [False, True])
def test_mask_of_ones_changes_no_bit(
    network: Pooled, x: Tensor, layer: str, per_class: bool
) -> None:
    units = network.get_submodule(layer).weight
    assert isinstance(units, Tensor)
    shape = (4, len(units)) if per_class else (len(units),)

    assert torch.equal(network(x), Masked(network, layer, torch.ones(shape))(x))


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_mask_of_zeros_leaves_the_bias(network: Pooled, x: Tensor, shape: tuple[int, ...]) -> None:
    """No rounding of the weights of classes may let anything through."""
    logits = Masked(network, "body", torch.zeros(shape))(x)

    assert torch.equal(network.head.bias.expand(len(x), -1), logits)


def test_static_mask_is_a_product_of_the_units(network: Pooled, x: Tensor, drawn: Tensor) -> None:
    units = F.relu(network.body(F.relu(network.stem(x))))
    expected = network.head((units * drawn[2].view(-1, 1, 1)).mean((2, 3)))

    assert torch.equal(expected, Masked(network, "body", drawn[2])(x))


def test_classes_weigh_their_masks_by_the_first_pass(
    network: Pooled, x: Tensor, drawn: Tensor
) -> None:
    """The two passes written out."""
    made = Masked(network, "body", drawn)
    units = F.relu(network.body(F.relu(network.stem(x))))
    weights = (100 * network.head(units.mean((2, 3)))).softmax(1)
    blended = torch.einsum("nc,ck->nk", weights, drawn)
    expected = network.head((units * blended[:, :, None, None]).mean((2, 3)))

    assert bool((weights.amax(1) < 0.999).any())  # something is blended
    torch.testing.assert_close(made(x), expected)
    shown = made.weigh_masks(network(x))
    assert bool((shown[:, 0] == 0).all())
    assert bool((shown[:, 1] == 1).all())


def test_class_masks_that_are_all_alike_are_a_static_mask(
    network: Pooled, x: Tensor, drawn: Tensor
) -> None:
    one = Masked(network, "body", drawn[1])
    other = Masked(network, "body", drawn[1].expand(4, -1))

    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("masks", ["static", "classes"])
def test_batches_change_no_bit(network: Pooled, x: Tensor, drawn: Tensor, masks: str) -> None:
    chosen = drawn if masks == "classes" else drawn[0]
    model = classifier(Masked(network, "body", chosen), block=4)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))

    whole = model(x)
    assert torch.equal(whole[order], model(x[order]))
    assert torch.equal(whole, torch.cat([model(row[None]) for row in x]))
    assert torch.equal(whole, torch.cat([model(part) for part in torch.split(x, 3)]))


def test_attack_sees_the_mask(network: Pooled, x: Tensor, drawn: Tensor) -> None:
    """The derivative with respect to a masked unit is zero, to others it is what it was."""
    slopes = {}
    for name, masks in (("plain", torch.ones(6)), ("masked", drawn[2])):
        seen: list[Tensor] = []
        handle = network.body.register_forward_hook(
            lambda _module, _args, units, seen=seen: seen.append(units)
        )
        z = x.clone().requires_grad_()
        score = Masked(network, "body", masks)(z)[:, 0].sum()
        handle.remove()
        (slopes[name],) = torch.autograd.grad(score, seen)

    gone = drawn[2] == 0
    assert bool((slopes["masked"][:, gone] == 0).all())
    assert torch.equal(slopes["plain"][:, ~gone], slopes["masked"][:, ~gone])
    assert bool((slopes["plain"][:, gone] != 0).any())


def test_attack_sees_both_passes(network: Pooled, x: Tensor, drawn: Tensor) -> None:
    """Against differences in float64, where the weights of the classes change along the way."""
    network.head.bias.zero_()
    model = Masked(network, "body", drawn).double()
    z = x[:3].double().requires_grad_()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(4)).double()

    def score(t: float) -> Tensor:
        logits: Tensor = model(z + t * direction)
        return logits[:, 1].sum()

    (slope,) = torch.autograd.grad(score(0.0), z)
    step = 1e-6
    with torch.no_grad():
        difference = (score(step) - score(-step)) / (2 * step)
        fixed = model.weigh_masks(network(z))
    with model.apply_mask(fixed, z):
        second = network(z)[:, 1].sum()
    (alone,) = torch.autograd.grad(second, z)

    expected = float((slope * direction).sum())
    assert float(difference) == pytest.approx(expected, rel=1e-5)
    assert float((alone * direction).sum()) != pytest.approx(expected, rel=0.1)


def test_masked_classifiers_are_told_apart(network: Pooled, x: Tensor, drawn: Tensor) -> None:
    """By what caches are named after, though as many units are masked."""
    plain = classifier(network, identity={"sha256": "of a file", "arch": "mine"})
    data = from_arrays(x.numpy(), np.arange(len(x)) % 4)
    hashes = {
        identify_model(model, data, np.arange(4))["sha256"]
        for model in (plain, *(mask_units(plain, "body", mask) for mask in torch.eye(6)))
    }

    assert len(hashes) == 7
    assert mask_units(plain, "body", drawn).identity["arch"] == "mine"
    assert plain.identity == {"sha256": "of a file", "arch": "mine"}


def test_predictions_do_not_draw(network: Pooled, x: Tensor, drawn: Tensor) -> None:
    model = Masked(network, "body", drawn)
    before = torch.random.get_rng_state()

    assert torch.equal(model(x), model(x))
    assert torch.equal(before, torch.random.get_rng_state())


def hooks(network: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_no_hook_survives(network: Pooled, x: Tensor, shape: tuple[int, ...]) -> None:
    model = Masked(network, "body", torch.ones(shape))
    model(x)
    assert hooks(model) == 0

    with pytest.raises(RuntimeError):
        model(x[:, :2])
    with pytest.raises(UsageError):
        Masked(network, "body", torch.ones(7))(x)
    with pytest.raises(RuntimeError):
        measure_activations(classifier(network), x[:, :2], "body")
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("layer", "masks", "said"),
    [
        ("bodi", torch.ones(6), r"no layer 'bodi' \(did you mean 'body'\?\): there are stem, body"),
        ("", torch.ones(6), "no layer ''"),
        ("body", torch.ones(5), "masks are for 5 units, layer 'body' has 6"),
        ("body", torch.ones(3, 6), "masks for 3 classes, the network has 4"),
        ("body", torch.ones(6) / 2, "zeros and ones"),
        ("body", torch.full((6,), torch.nan), "zeros and ones"),
        ("body", torch.ones(1, 2, 3), r"not \(1, 2, 3\)"),
        ("body", torch.ones(0), "at least one unit"),
        ("relu", torch.ones(5), "'relu' runs several times per image"),
        ("spare", torch.ones(2), "'spare' does not run in a forward pass"),
        ("rows", torch.ones(4, 64), "'rows' does not run image by image"),
    ],
)
def test_unfit_masks_are_errors(
    network: Pooled, x: Tensor, layer: str, masks: Tensor, said: str
) -> None:
    if layer == "relu":
        network.body = nn.Conv2d(5, 5, 1)
        network.head = nn.Linear(5, 4)
    with pytest.raises(UsageError, match=said):
        Masked(network, layer, masks)(x)


class Tokens(nn.Module):
    """Units of tokens, and of maps with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.mlp = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.last(self.stem(x).permute(0, 2, 3, 1))
        tokens = torch.cat([self.token.expand(len(x), -1, -1), maps.flatten(1, 2)], 1)
        tokens = self.mlp(tokens)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        logits: Tensor = self.head(tokens[:, 0])
        return logits


@pytest.mark.parametrize(
    ("layer", "units", "axis"),
    [
        ("stem", 6, 1),
        ("last", 6, -1),
        ("mlp.1", 9, -1),
        ("mlp.2", 9, -1),
        ("mlp", 6, -1),
        ("attention", 6, -1),
        ("head", 4, -1),
    ],
)
def test_units_of_transformers_are_masked_along_their_axis(
    layer: str, units: int, axis: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tokens().eval().requires_grad_(False)
    x = torch.rand(
        5, 3, 24, 24, generator=torch.Generator().manual_seed(0)
    )  # 6x6 places: as many rows as there are units
    keep = torch.arange(units) % 2
    model = Masked(network, layer, keep.float())
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = network.get_submodule(layer).register_forward_hook(note)
    network(x)
    handle.remove()
    expected = seen[0].movedim(axis, 1)
    means = expected.flatten(2).mean(2) if expected.ndim > 2 else expected
    with model.apply_mask(model.masks, x):  # its hook comes first
        handle = network.get_submodule(layer).register_forward_hook(note)
        network(x)
        handle.remove()
    masked = seen[-1].movedim(axis, 1)

    assert torch.allclose(measure_activations(classifier_of(network), x, layer), means, atol=1e-5)
    assert bool((masked[:, keep == 0] == 0).all())
    assert torch.allclose(masked[:, keep == 1], expected[:, keep == 1])
    assert not torch.equal(model(x), network(x))


class Mixed(nn.Module):
    """A convolution behind a linear layer takes tokens for its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.linear = nn.Linear(6, 6)
        self.after = nn.ReLU()
        self.mix = nn.Conv1d(6, 6, 1)
        self.active = nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.after(self.linear(self.stem(x).flatten(2).transpose(1, 2)))
        units = self.active(self.mix(tokens))  # (n, units, channels)
        logits: Tensor = self.head(units.mean(1))
        return logits


def test_units_behind_a_convolution_over_tokens_are_its_channels() -> None:
    """Six units and six places: the shape says the same either way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mixed().eval().requires_grad_(False)
    x = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))

    axes = [find_unit_axis(network, layer, x) for layer in ("after", "mix", "active")]
    assert axes == [-1, 1, 1]


class TokensFirst(nn.Module):
    """Sixteen tokens along the first axis, as torch's transformers have them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.mix(self.stem(x).flatten(2).permute(2, 0, 1)).mean(0)
        return logits


def test_as_many_tokens_as_images_are_no_images() -> None:
    network = TokensFirst().eval().requires_grad_(False)
    x = torch.rand(16, 3, 8, 8)
    model = Classifier(network, num_classes=4, block=16).eval()
    refused = "'mix' does not run image by image"

    with pytest.raises(UsageError, match=refused):
        measure_activations(model, x, "mix")
    with pytest.raises(UsageError, match=refused):
        Masked(network, "mix", torch.ones(4, 4))(x)
    assert torch.equal(Masked(network, "mix", torch.ones(4))(x), network(x))


def test_units_behind_a_normalisation_of_all_values_are_channels() -> None:
    """As wide as there are channels: only the axis tells them apart."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8]), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ).append(nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    keep = torch.arange(8) % 2

    for layer in ("1", "2"):
        logits = Masked(network.eval(), layer, keep.float())(x)
        assert torch.allclose(logits, network(x) * keep)


def classifier_of(network: nn.Module) -> Classifier:
    return Classifier(network, num_classes=4, block=3).eval()


def test_activations_are_means_in_any_batch(network: Pooled, x: Tensor) -> None:
    model = classifier(network, block=4)
    inside = (x - 0.4) / 0.3
    expected = network.body(F.relu(network.stem(inside))).mean((2, 3))
    units = measure_activations(model, x, "body")

    torch.testing.assert_close(units, expected)
    assert torch.equal(
        units, torch.cat([measure_activations(model, row[None], "body") for row in x])
    )
    torch.testing.assert_close(measure_activations(model, x, "head"), network(inside))
    with pytest.raises(UsageError, match="'rows' does not run image by image"):
        measure_activations(model, x, "rows")


@pytest.mark.parametrize("per_class", [False, True])
def test_maps_are_those_of_the_masked_network(
    network: Pooled, x: Tensor, drawn: Tensor, per_class: bool
) -> None:
    """Logits are made of masked features, and of those of the second pass."""
    layer = "spot"
    network.add_module(layer, nn.Identity())
    network.forward = lambda x: network.head(  # type: ignore[method-assign]
        network.get_submodule(layer)(F.relu(network.body(F.relu(network.stem(x))))).mean((2, 3))
    )
    model = mask_units(classifier(network, block=4), layer, drawn if per_class else drawn[2])
    y = torch.arange(len(x)) % 4
    found = observe_head(model, x)

    assert bool((found.features[:, 0] == 0).all())
    made = found.features.mean((2, 3)) @ found.weight.t() + network.head.bias
    torch.testing.assert_close(made, model(x))
    maps = cam(model, x, y).mean((1, 2, 3)) + network.head.bias[y]
    torch.testing.assert_close(maps, model(x).gather(1, y[:, None])[:, 0])
    # before and behind the mask: of the features before it only those count that are kept
    weights = network.head.weight[y] / 64
    _, calls = observe_calls(model, x, layer)
    features = torch.cat([c.features for c in calls if c.features is not None])[: len(x)]
    torch.testing.assert_close(
        features, F.relu(network.body(F.relu(network.stem((x - 0.4) / 0.3))))
    )
    mask = found.features.mean((2, 3)) / features.mean((2, 3))
    expected = F.relu(((weights * mask)[:, :, None, None] * features).sum(1, keepdim=True))
    torch.testing.assert_close(gradcam(model, x, y, layer=layer), expected)
    with pytest.raises(ValueError, match=r"did you mean 'body'.*stem, body"):
        gradcam(model, x, y, layer="bdy")


def test_maps_of_a_masked_network_that_never_ran() -> None:
    """Where its units are is found out before anybody watches it."""
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = Classifier(Masked(network, "0", torch.ones(8, 8)), num_classes=8).eval()
    x, y = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    maps = gradcam(model, x, y, layer="0")

    torch.testing.assert_close(maps, gradcam(network.eval(), x, y, layer="0"))


@pytest.fixture
def digits() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits_cnn().eval()


def stored(path: Path, network: nn.Module, **changed: Any) -> Path:
    """A checkpoint of this network; what is changed overrides tensors and facts."""
    state, facts = collect_state(network)
    state = {**state, **{k: v for k, v in changed.items() if isinstance(v, Tensor)}}
    facts |= {k: v for k, v in changed.items() if not isinstance(v, Tensor)}
    save(
        path,
        {name: tensor for name, tensor in state.items() if tensor.numel()},
        arch="robusteval:digits_cnn",
        num_classes=10,
        input_shape=(1, 32, 32),
        mean=[0.3],
        std=[0.2],
        **{name: fact for name, fact in facts.items() if fact is not None},
    )
    return path


@pytest.mark.parametrize("shape", [(UNITS,), (10, UNITS)])
def test_masked_network_is_a_checkpoint_like_any_other(
    tmp_path: Path, digits: nn.Module, shape: tuple[int, ...]
) -> None:
    draws = torch.Generator().manual_seed(5)
    masks = (torch.rand(shape, generator=draws) > 0.3).float()
    ids = np.array([1, 2**64 - 1], np.uint64)
    model = Classifier(Masked(digits, LAYER, masks, ids), mean=[0.3], std=[0.2], num_classes=10)
    found = load(stored(tmp_path / "net.safetensors", model.network))
    again = tmp_path / "again.safetensors"

    x = torch.rand(5, 1, 32, 32, generator=draws)
    assert torch.equal(model(x), found(x))
    assert isinstance(found.network, Masked)
    assert found.network.seen.tolist() == ids.tolist()
    assert found.identity["mask"]["layer"] == LAYER
    assert found.identity["mask"]["per_class"] == (len(shape) == 2)
    assert found.identity["mask"]["units"] == UNITS
    assert found.identity["mask"]["masked"] == float((1 - masks).sum(-1).mean())
    assert not found.training
    assert not found.network.training
    assert stored(again, found.network).read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_other_programs_do_not_overlook_the_masks(tmp_path: Path, digits: nn.Module) -> None:
    path = stored(tmp_path / "net.safetensors", Masked(digits, LAYER, torch.ones(UNITS)))

    with pytest.raises(RuntimeError, match="robusteval_masks"):
        digits_cnn().load_state_dict(safetensors.torch.load_file(path))


def test_unmasked_network_has_no_note_of_masks(tmp_path: Path, digits: nn.Module) -> None:
    found = load(stored(tmp_path / "net.safetensors", digits))

    assert "mask" not in found.identity
    assert not isinstance(found.network, Masked)


NOTE = {"layer": LAYER, "seen": ["01"]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mask": None}, "masks without the note"),
        ({"mask": "10"}, "masks without the note"),
        ({"mask": {"layer": LAYER}}, "masks without the note"),
        ({"robusteval_masks": torch.ones(0)}, "the note without masks"),
        ({"mask": {"layer": "99", "seen": []}}, "do not fit robusteval:digits_cnn: .*no layer"),
        ({"mask": {"layer": LAYER, "seen": ["x"]}}, "must list ids"),
        ({"mask": {"layer": LAYER, "seen": ["1" * 17]}}, "must list ids"),
        ({"mask": {"layer": LAYER, "seen": [3]}}, "must list ids"),
        ({"robusteval_masks": torch.ones(63)}, "63 units, layer '10' has 64"),
        ({"robusteval_masks": torch.ones(9, 64)}, "masks for 9 classes, the network has 10"),
        ({"robusteval_masks": torch.full((64,), 2)}, "zeros and ones"),
        ({"robusteval_masks": torch.ones(1, 1, 64)}, r"not \(1, 1, 64\)"),
    ],
)
def test_damaged_masks_are_errors(
    tmp_path: Path, digits: nn.Module, changed: dict[str, Any], said: str
) -> None:
    network = Masked(digits, LAYER, torch.ones(UNITS))
    path = stored(tmp_path / "net.safetensors", network, **changed)

    with pytest.raises(UsageError, match=said) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_masked_torch_file_is_an_error(tmp_path: Path, digits: nn.Module) -> None:
    torch.save(collect_state(Masked(digits, LAYER, torch.ones(UNITS)))[0], tmp_path / "net.pt")

    with pytest.raises(UsageError, match="masks without the note"):
        load(tmp_path / "net.pt", arch="robusteval:digits_cnn")
