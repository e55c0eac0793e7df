"""Which values of a layer belong to which place of the image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusteval.models.places import Places, find_places, survey_network


class Patches(nn.Module):
    """Tokens of patches behind others, blocks that let a little of each place to all, and a head.

    `order` is where each token's patch comes from; `pooled` whether the head reads all places, or
    the first token.
    """

    def __init__(
        self,
        prefix: int,
        *,
        pooled: bool = False,
        form: str = "tokens",
        order: Tensor | None = None,
        grid: tuple[int, int] = (3, 4),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, prefix, 8))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.shown = nn.Identity()
        self.head = nn.Linear(8, 5)
        self.prefix, self.pooled, self.form, self.order = prefix, pooled, form, order
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        patches = self.stem(x).flatten(2).transpose(1, 2)  # (n, places, 8)
        if self.order is not None:
            patches = patches[:, self.order]
        tokens = self.blocks(torch.cat([self.extra.expand(len(x), -1, -1), patches], 1))
        first, places = tokens[:, 0], tokens[:, self.prefix :]
        if self.form == "columns":
            tokens = tokens.transpose(1, 2)
        elif self.form != "tokens":
            tokens = places.reshape(len(x), *self.grid, 8)
            tokens = tokens.permute(0, 3, 1, 2) if self.form == "first" else tokens
        self.shown(tokens.clone())
        logits: Tensor = self.head(places.mean(1) if self.pooled else first)
        return logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = (y @ y.transpose(1, 2)).softmax(2) @ y
        out: Tensor = x + self.linear(mixed)
        return out


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


SHAPE = (3, 12, 16)


@pytest.mark.parametrize("form", ["tokens", "columns", "first", "last"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_form_prefix_and_grid_are_found(prefix: int, form: str) -> None:
    network = seeded(lambda: Patches(prefix, pooled=True, form=form))
    tokens = prefix if form in ("tokens", "columns") else 0

    assert find_places(network, "shown", SHAPE) == Places(form, 3, 4, tokens)  # type: ignore[arg-type]
    assert find_places(network, "stem", SHAPE) == Places("first", 3, 4)
    assert find_places(network, "head", SHAPE) is None


def test_as_many_channels_as_places_decide_nothing() -> None:
    """Eight channels and eight places: the shape says the same either way."""
    network = seeded(lambda: Patches(0, pooled=True, form="columns", grid=(2, 4)))

    assert find_places(network, "shown", (3, 8, 16)) == Places("columns", 2, 4)


def test_tokens_in_another_order_have_no_places() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    network = seeded(lambda: Patches(1, pooled=True, order=order))
    turned = seeded(
        lambda: Patches(0, pooled=True, order=torch.arange(12).view(3, 4).t().flatten())
    )

    assert find_places(network, "blocks", SHAPE) is None
    assert find_places(turned, "blocks", SHAPE) is None


def test_the_last_layer_is_the_one_whose_places_still_count() -> None:
    """A class token has gathered all that it will be given when the last block begins."""
    pooled = survey_network(seeded(lambda: Patches(1, pooled=True)), SHAPE)
    assert pooled.layer == "blocks"
    assert pooled.tokens
    by_class = survey_network(seeded(lambda: Patches(1)), SHAPE)
    assert by_class.layer == "blocks.1"
    untrained = seeded(lambda: Patches(1))
    nn.init.zeros_(untrained.get_parameter("head.weight"))
    assert survey_network(untrained, SHAPE) == by_class


class Resized(nn.Module):
    """Something that looks like maps of places, but has one size whatever the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.pool = nn.AdaptiveAvgPool2d((2, 4))
        self.turned = nn.Identity()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.turned(self.pool(self.stem(x)))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


def test_maps_of_one_size_for_all_images_keep_their_places() -> None:
    assert find_places(seeded(Resized), "turned", SHAPE) == Places("first", 2, 4)


def test_maps_are_read_from_every_form() -> None:
    maps = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 4)
    extra = torch.full((2, 2, 5), -1.0)
    tokens = torch.cat([extra, maps.flatten(2).transpose(1, 2)], 1)

    assert torch.equal(Places("first", 3, 4).read_maps(maps), maps)
    assert torch.equal(Places("last", 3, 4).read_maps(maps.permute(0, 2, 3, 1)), maps)
    assert torch.equal(Places("tokens", 3, 4, 2).read_maps(tokens), maps)
    assert torch.equal(Places("columns", 3, 4, 2).read_maps(tokens.transpose(1, 2)), maps)


def test_a_survey_leaves_the_network_and_the_random_state() -> None:
    network = nn.Sequential(Patches(1), nn.Dropout()).train()
    before = [p._version for p in network.parameters()], torch.random.get_rng_state()
    survey_network(network, SHAPE)

    assert all(part.training for part in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert [p._version for p in network.parameters()] == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert not any(part._forward_hooks for part in network.modules())


def test_finding_out_draws_nothing_from_global_state() -> None:
    """What a random network answers does not depend on whether it was looked into before."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten())
    network.register_forward_pre_hook(lambda _module, args: args[0] + torch.randn_like(args[0]))
    torch.manual_seed(0)
    survey_network(network, SHAPE)
    drawn = torch.rand(1)
    torch.manual_seed(0)

    assert torch.equal(drawn, torch.rand(1))
