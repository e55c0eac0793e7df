"""Maps of attention against a second implementation, written naively, and on a planted square."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.interpreters.attention import attend, attention_relevance, find_tokens, rollout
from robusteval.interpreters.cam import gradcam, gradcam_plus_plus, hirescam
from robusteval.models.classifier import Classifier

HEADS, DEPTH, WIDTH = 2, 3, 8


class Transformer(nn.Module):
    """Three blocks over patches and tokens in front of them; attention in several spellings."""

    def __init__(self, spelling: str = "fused", prefix: int = 1, *, pooled: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, prefix, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(DEPTH)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 5)
        self.spelling, self.prefix, self.pooled = spelling, prefix, pooled

    def attend(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What attention adds to tokens ``(n, t, WIDTH)``, and its weights where they are spelt."""
        module = self.attentions[layer]
        assert isinstance(module, nn.MultiheadAttention)
        if self.spelling == "module":
            out: Tensor = module(x, x, x, need_weights=False)[0]
            return out, None
        packed = F.linear(x, module.in_proj_weight, module.in_proj_bias)
        shape = (len(x), -1, HEADS, WIDTH // HEADS)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in packed.chunk(3, 2))
        weights = None
        if self.spelling == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
            mixed = weights @ v
        return module.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Logits, and the weights of each layer."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1)
        found = []
        for layer in range(DEPTH):
            more, weights = self.attend(layer, self.norms[layer](tokens))
            tokens = tokens + more
            tokens = tokens + self.mlps[layer](tokens)
            found.append(weights)
        read = tokens[:, self.prefix :].mean(1) if self.pooled else tokens[:, 0]
        return self.head(read), found

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]


def make(spelling: str = "fused", prefix: int = 1, *, pooled: bool = False) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(spelling, prefix, pooled=pooled).eval()


X = torch.rand(4, 3, 12, 16, generator=torch.Generator().manual_seed(0))  # 3 x 4 patches
Y = torch.tensor([0, 1, 2, 3])
FORMS = [(1, False), (3, True), (0, True)]


def follow_naively(layers: list[Tensor], form: Callable[[Tensor], Tensor]) -> Tensor:
    """The product of matrices ``(t, t)``, entry by entry of rows and columns."""
    total = [[float(i == j) for j in range(len(layers[0]))] for i in range(len(layers[0]))]
    for layer in layers:
        step, size = form(layer).tolist(), len(total)
        total = [
            [sum(step[i][k] * total[k][j] for k in range(size)) for j in range(size)]
            for i in range(size)
        ]
    return torch.tensor(total)


def read_naively(total: Tensor, prefix: int, pooled: bool) -> Tensor:
    rows = range(prefix, len(total)) if pooled else [0]
    return torch.stack([total[row, prefix:] for row in rows]).mean(0).view(1, 3, 4)


@pytest.mark.parametrize("spelling", ["fused", "module", "matrices"])
@pytest.mark.parametrize(("prefix", "pooled"), FORMS)
def test_rollout_is_the_product_of_mean_attention_and_identity(
    prefix: int, pooled: bool, spelling: str
) -> None:
    with torch.no_grad():
        _, found = make("matrices", prefix, pooled=pooled).run(X)
    expected = []
    for i in range(len(X)):
        layers = [weights[i].mean(0) for weights in found if weights is not None]
        total = follow_naively(layers, lambda a: 0.5 * a + 0.5 * torch.eye(len(a)))
        expected.append(read_naively(total, prefix, pooled))

    actual = rollout(make(spelling, prefix, pooled=pooled), X, Y)

    assert not actual.requires_grad
    assert float((actual - torch.stack(expected)).abs().max()) <= 1e-5


@pytest.mark.parametrize("spelling", ["fused", "module", "matrices"])
@pytest.mark.parametrize(("prefix", "pooled"), FORMS)
def test_relevance_adds_positive_attention_times_slope(
    prefix: int, pooled: bool, spelling: str
) -> None:
    expected = []
    for image, y in zip(X, Y.tolist(), strict=True):
        logits, found = make("matrices", prefix, pooled=pooled).run(image[None])
        weights = [each for each in found if each is not None]
        slopes = autograd.grad(logits[0, y], weights, allow_unused=False)
        layers = [
            sum(((w * g)[0, head].clamp_min(0) for head in range(HEADS)), torch.zeros(())) / HEADS
            for w, g in zip(weights, slopes, strict=True)
        ]
        total = follow_naively(layers, lambda a: a + torch.eye(len(a)))
        expected.append(read_naively(total, prefix, pooled))

    actual = attention_relevance(make(spelling, prefix, pooled=pooled), X, Y)

    assert not actual.requires_grad
    assert float((actual - torch.stack(expected)).abs().max()) <= 1e-5


def test_attention_step_by_step_is_what_torch_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 6, generator=generator)
    seen = torch.rand(5, 5, generator=generator) < 0.7
    seen.fill_diagonal_(True)
    options: list[dict[str, Any]] = [{}, {"attn_mask": seen}, {"attn_mask": seen.float()}]
    for given in [*options, {"is_causal": True}]:
        expected = F.scaled_dot_product_attention(q, k, v, **given)
        assert torch.allclose(attend(q, k, v, **given)[0], expected, atol=1e-6)
    grouped = attend(q, k[:, :2], v[:, :2], scale=0.3, enable_gqa=True)[0]
    theirs = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], scale=0.3, enable_gqa=True)
    assert torch.allclose(grouped, theirs, atol=1e-6)
    masks = torch.rand(2, 5, 5, generator=generator) < 0.7
    options = [{}, {"attn_mask": masks | seen}]
    for given in options:  # one head without an axis
        output, weights = attend(q[:, 0], k[:, 0], v[:, 0], **given)
        expected = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], **given)
        assert weights.shape == (2, 1, 5, 5)
        assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("explain", [rollout, attention_relevance])
@pytest.mark.parametrize("spelling", ["fused", "module"])
def test_maps_of_attention_can_be_attacked(spelling: str, explain: Callable[..., Tensor]) -> None:
    network = make(spelling)
    network.requires_grad_(False)
    x = X.clone().requires_grad_()
    maps = explain(network, x, Y)
    (derivative,) = autograd.grad(maps.square().sum(), x)

    assert bool((derivative.flatten(1).abs().amax(1) > 0).all())
    assert torch.allclose(maps, explain(network, X, Y), atol=1e-6)


@pytest.mark.parametrize("explain", [rollout, attention_relevance])
def test_maps_of_attention_do_not_depend_on_the_batch(explain: Callable[..., Tensor]) -> None:
    model = Classifier(make(), num_classes=5, block=3)
    whole = explain(model, X, Y)
    single = torch.cat([explain(model, X[i : i + 1], Y[i : i + 1]) for i in range(4)])

    assert torch.equal(whole, single)
    assert explain(model, X[:0], Y[:0]).shape == (0, 1, 3, 4)


def test_tokens_are_known_before_a_network_is_trained() -> None:
    """What is found out is kept: it must be true after training, too."""
    untrained, trained = make(), make()
    nn.init.zeros_(untrained.head.weight)
    nn.init.zeros_(untrained.head.bias)

    assert find_tokens(untrained, (3, 12, 16)) == find_tokens(trained, (3, 12, 16))
    assert find_tokens(trained, (3, 12, 16)).read == (0,)


class Aside(Transformer):
    """A block of attention more, whose result is thrown away."""

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        self.attend(0, torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1))
        return super().run(x)


def test_attention_that_is_not_used_is_not_relevant() -> None:
    aside = Aside().eval()
    aside.load_state_dict(make().state_dict())

    assert torch.equal(attention_relevance(aside, X, Y), attention_relevance(make(), X, Y))


class Seeker(nn.Module):
    """A class token that attends to bright patches, and answers how bright they are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.head = nn.Linear(1, 2)
        nn.init.constant_(self.head.weight, 1.0)
        self.token = nn.Parameter(torch.full((1, 1, 1), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        bright = F.avg_pool2d(x.mean(1, keepdim=True), 2).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([self.token.expand(len(x), -1, -1), bright], 1))
        heads = tokens.unsqueeze(1)
        for _ in range(2):
            heads = heads + F.scaled_dot_product_attention(heads, heads, heads, scale=4.0)
        logits: Tensor = self.head(heads[:, 0, 0])
        return logits


@pytest.mark.parametrize(
    "explain", [rollout, attention_relevance, gradcam, gradcam_plus_plus, hirescam]
)
def test_a_planted_square_is_found(explain: Callable[..., Tensor]) -> None:
    """It is a sixteenth of the image and holds at least four times that of the map."""
    x = 0.1 + 0.1 * torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        x[i, :, 4 * i : 4 * i + 4, 8:12] = 0.9
    maps = explain(Seeker().eval(), x, torch.zeros(3, dtype=torch.int64))

    assert maps.shape == (3, 1, 8, 8)
    for i in range(3):
        inside = maps[i, 0, 2 * i : 2 * i + 2, 4:6].sum() / maps[i].sum()
        assert float(inside) >= 4 / 16


class Windows(Transformer):
    """Attention inside of rows only."""

    def attend(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, 4, WIDTH)
        out = F.scaled_dot_product_attention(rows, rows, rows)
        return out.reshape_as(x), None


class Sequence(nn.Module):
    """A transformer of torch, whose tokens may stand in front of the images."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        if self.batch_first:
            read = self.encoder(tokens)[:, 0]
        else:
            read = self.encoder(tokens.transpose(0, 1))[0]
        logits: Tensor = self.head(read)
        return logits


@pytest.mark.parametrize("explain", [rollout, attention_relevance])
def test_tokens_may_stand_in_front_of_images(explain: Callable[..., Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual, turned = Sequence(True).eval(), Sequence(False).eval()
    turned.load_state_dict(usual.state_dict())
    maps = explain(turned, X, Y)

    assert maps.shape == (len(X), 1, 3, 4)
    assert torch.allclose(maps, explain(usual, X, Y), atol=1e-6)


class Ignoring(Transformer):
    """Has a softmax besides, of the same shape as attention, that weighs nothing."""

    def attend(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, weights = super().attend(layer, x)
        shown = (x @ x.transpose(1, 2)).unsqueeze(1).expand(-1, HEADS, -1, -1).softmax(3)
        return out + 0 * shown.mean((1, 2, 3), keepdim=True).squeeze(1), weights


class BetweenChannels(Transformer):
    """As many channels as tokens, and it is channels that attend to one another."""

    def attend(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = F.interpolate(x, 12).transpose(1, 2).unsqueeze(1)  # (n, 1, channels, t)
        mixed = (wide @ wide.transpose(2, 3)).softmax(3) @ wide
        return F.interpolate(mixed.squeeze(1).transpose(1, 2), WIDTH), None


def test_a_softmax_is_attention_where_it_weighs_tokens() -> None:
    made = []
    for kind in (Transformer, Ignoring, BetweenChannels):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made.append(kind("spelt", prefix=0, pooled=True).eval())
    usual, ignoring, channels = made

    assert torch.equal(rollout(ignoring, X, Y), rollout(usual, X, Y))
    with pytest.raises(ValueError, match=r"not between the tokens .*: use gradcam"):
        rollout(channels, X, Y)


def test_networks_without_such_attention_are_told_what_to_use() -> None:
    convolutional = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        windows = Windows(prefix=0, pooled=True).eval()
    for explain in (rollout, attention_relevance):
        for network, words in ((convolutional, "computes no attention"), (windows, "not between")):
            with pytest.raises(ValueError, match=f"{words}.*: use gradcam"):
                explain(network, X, Y)
        with pytest.raises(ValueError, match="classes must lie between 0 and 4"):
            explain(make(), X, Y + 2)
        blind = make()
        blind.forward = torch.no_grad()(blind.forward)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="no derivative with respect to attention"):
            explain(blind, X, Y)
