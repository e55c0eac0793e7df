"""Which features maps are made of, and heads that normalise or read a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.interpreters import observing
from robusteval.interpreters.cam import cam, gradcam, gradcam_plus_plus, hirescam
from robusteval.interpreters.grad_cam_package import library
from robusteval.interpreters.gradient import grad, input_x_gradient
from robusteval.interpreters.heads import observe_head
from robusteval.interpreters.observing import describe_layer
from robusteval.models.places import Survey, survey_network


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


X = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0, 2])


class Normed(nn.Module):
    """A normalisation between pooling and the last layer, which may be a convolution."""

    def __init__(self, norm: Callable[[int], nn.Module], head: str = "linear") -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.norm = norm(8)
        self.linear = nn.Linear(8, 5) if head == "linear" else nn.Conv2d(8, 5, 1)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        means = torch.tanh(self.body(x)).mean((2, 3))
        if self.head == "convolution":
            return self.linear(means[:, :, None, None]).flatten(1)  # type: ignore[no-any-return]
        return self.linear(self.norm(means))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "head"),
    [(nn.LayerNorm, "linear"), (nn.BatchNorm1d, "linear"), (nn.Identity, "convolution")],
)
def test_cam_of_a_normalised_mean_is_complete(norm: Callable[[int], nn.Module], head: str) -> None:
    """Its mean is the logit, less what the head adds to every image alike."""
    network = seeded(lambda: Normed(norm, head))
    if norm is not nn.Identity:
        nn.init.normal_(network.get_parameter("norm.weight"))
        nn.init.normal_(network.get_parameter("norm.bias"))
        network(X)
    found = observe_head(network, X)
    means = torch.stack([cam(network, X, Y * 0 + k).mean((1, 2, 3)) for k in range(5)], 1)
    rest = network(X) - means  # (7, 5)

    assert means.std(0).min() > 1e-3
    assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-5)
    assert found.weight.shape == (5, 8)


def test_cam_of_a_normalisation_by_the_batch_is_refused() -> None:
    network = seeded(lambda: Normed(nn.BatchNorm1d)).train()
    with pytest.raises(ValueError, match="use gradcam"):
        cam(network, X, Y)


class ByToken(nn.Module):
    """The classes are read from a token that has looked at all places once."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.before = nn.LayerNorm(8)
        self.after = nn.Identity()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.before(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
        heads = tokens.unsqueeze(1)
        out = tokens + F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        logits: Tensor = self.linear(self.after(out)[:, 0])
        return logits


def test_cam_of_a_class_token_is_refused_and_gradcam_explains_what_it_looked_at() -> None:
    network = seeded(ByToken)
    with pytest.raises(ValueError, match=r"classes from a token, .*: use gradcam, rollout or"):
        cam(network, X, Y)

    for interpreter in (gradcam, gradcam_plus_plus, hirescam):
        named = interpreter(network, X, Y, layer="before")
        assert named.shape == (7, 1, 4, 4)
        assert torch.equal(interpreter(network, X, Y), named)
        assert interpreter(network, X[:0], Y[:0]).shape == (0, 1, 4, 4)
        assert interpreter(network, X[:0], Y[:0], layer="before").shape == (0, 1, 4, 4)
        for images in (X, X[:0]):  # also in the check before a run
            with pytest.raises(ValueError, match=r"nothing is read from the places .* 'after'"):
                interpreter(network, images, Y[: len(images)], layer="after")
            with pytest.raises(ValueError, match=r"nothing is read .* such as 'before', or none"):
                library(network, images, Y[: len(images)], layer="after", method="hirescam")
    assert float(library(network, X, Y, layer="after", method="eigencam").max()) > 0
    assert describe_layer(network, (3, 8, 8), None) == "before"
    assert describe_layer(network, (3, 8, 8), "patches") == "patches"


def test_maps_of_attention_have_derivatives_of_their_own() -> None:
    """The fused kernels of attention have none."""
    network = seeded(ByToken)
    for interpreter in (gradcam, hirescam, grad, input_x_gradient):
        x = X.clone().requires_grad_()
        maps = interpreter(network, x, Y)
        (derivative,) = autograd.grad(maps.square().sum(), x)

        assert bool((derivative != 0).any())
        assert torch.allclose(maps, interpreter(network, X, Y), atol=1e-5)


def test_the_check_before_a_run_sees_an_image_that_is_not_black() -> None:
    """On a black image a normalised mean can be the mean itself."""

    class Squared(Normed):
        def forward(self, x: Tensor) -> Tensor:
            means = torch.tanh(self.body(x)).mean((2, 3))
            return self.linear(means.square())  # type: ignore[no-any-return]

    squared = seeded(lambda: Squared(nn.Identity))
    squared.get_submodule("body").register_parameter("bias", None)
    with pytest.raises(ValueError, match="use gradcam"):
        cam(squared, X[:0], Y[:0])


def test_a_named_layer_of_convolutions_needs_no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the time of some twenty images, and is for what cannot be followed."""
    surveyed: list[nn.Module] = []

    def survey(network: nn.Module, shape: tuple[int, ...]) -> Survey:
        surveyed.append(network)
        return survey_network(network, shape)

    monkeypatch.setattr(observing, "survey_network", survey)
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    gradcam(nn.Sequential(body, nn.AvgPool2d(6), nn.Flatten()).eval(), X, Y, layer="0")

    assert not surveyed
    gradcam(seeded(ByToken), X, Y, layer="before")
    assert surveyed


def test_maps_of_oblong_images_are_of_the_places_they_show() -> None:
    """Of tokens as of convolutions: each place of a map is the place of its patch."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    options = {"patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    network = seeded(
        lambda: timm.create_model("vit_base_patch16_reg4_gap_256", img_size=(16, 32), **options)
    )
    x = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1])
    seen: list[Tensor] = []
    norm = network.get_submodule("norm")

    def keep(_module: nn.Module, _given: object, output: Tensor) -> None:
        seen.append(output)

    handle = norm.register_forward_hook(keep)
    logits = network(x)
    handle.remove()
    slope = autograd.grad(logits.gather(1, y[:, None]).sum(), seen[0])[0]
    expected = F.relu((slope * seen[0]).sum(2)[:, 4:].reshape(2, 1, 2, 4))  # behind four registers

    torch.testing.assert_close(hirescam(network, x, y, layer="norm"), expected)
    torch.testing.assert_close(hirescam(network, x, y), expected)
