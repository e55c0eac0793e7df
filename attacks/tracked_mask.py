"""The mask of an image that is attacked, optimised along with it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from torch import Tensor, nn

from robusteval.interpreters.explainer import Interpreter, measure_squared_distance
from robusteval.interpreters.meaningful_perturbation import (
    Deletion,
    State,
    build_deletion,
    draw_offsets,
)
from robusteval.models.steps import book_rows
from robusteval.search.balls import quantise


class TrackedMask:
    """A mask that is optimised along with the image whose explanation it is.

    The one-step surrogate of ADV2 (arXiv:1812.00891, Eq. 9): the distance is that of masks a few
    steps of Adam further, which depend on the image, from a mask that is taken as given.

    Parameters
    ----------
    deletion : Deletion
        What the mask lowers.
    x : Tensor
        Images ``(n, c, h, w)``.
    seeds : Tensor
        One seed per image ``(n,)`` for the jitter.
    steps : int
        How often the distance will be asked for.
    rate : float
        Learning rate of the mask.
    """

    BLIND, SEEN = 4, 4  # steps of the mask without and with a derivative
    REFRESH = 50  # steps of the image from one mask made from the start to the next

    def __init__(
        self, deletion: Deletion, x: Tensor, seeds: Tensor, steps: int, rate: float
    ) -> None:
        self.deletion, self.seeds, self.rate = deletion, seeds, rate
        self.state = deletion.start_mask(x)
        self.shifts = draw_offsets(seeds, steps * (self.BLIND + self.SEEN), deletion.jitter)
        self.count = 0
        self.remade: tuple[Tensor, Tensor] | None = None  # last images with a mask of their own

    @classmethod
    def from_interpreters(
        cls, explainers: Sequence[Interpreter], x: Tensor, seeds: Tensor, steps: int, rate: float
    ) -> TrackedMask | None:
        """The mask of the interpreter `mask` among some, None if it is not among them."""
        for explainer in explainers:
            if explainer.spec.name == "mask":
                search = ("iterations", "rate", "unroll")
                game = {k: v for k, v in explainer.spec.parameters.items() if k not in search}
                deletion = build_deletion(x, **game)
                iterations = explainer.spec.parameters.get("iterations") or deletion.iterations
                return cls(replace(deletion, iterations=iterations), x, seeds, steps, rate)
        return None

    def measure_distance(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, benign: Tensor
    ) -> Tensor:
        """Squared distance ``(n,)`` of the map for classes `y` from the benign one, summed."""
        total = x_adv.new_zeros(len(x_adv))
        for maps in self.make_maps(model, x_adv, y):
            total = total + measure_squared_distance("mask", maps, benign)
        return total / self.SEEN

    def make_maps(self, model: nn.Module, x_adv: Tensor, y: Tensor) -> list[Tensor]:
        """Maps ``(n, 1, grid, grid)`` for classes `y` of the steps that have a derivative."""
        if self.count % self.REFRESH == 0:
            self.start_again(model, x_adv.detach(), y)
        at = self.count * (self.BLIND + self.SEEN)
        self.count += 1
        state = self.state
        scene = self.deletion.compose_scene(x_adv)
        for i in range(at, at + self.BLIND):
            state = self.deletion.step_mask(
                model, scene.detach(), y, state, self.shifts[:, i], self.rate
            )
        found = []
        for i in range(at + self.BLIND, at + self.BLIND + self.SEEN):
            state = state._replace(mask=state.mask.detach())
            state = self.deletion.step_mask(model, scene, y, state, self.shifts[:, i], self.rate)
            found.append(1 - state.mask)
        self.state = state.detach()
        return found

    def restrict(self, index: Tensor) -> TrackedMask:
        """The masks of some of the images."""
        part = copy(self)
        part.seeds, part.shifts = self.seeds[index.cpu()], self.shifts[index.to(self.shifts.device)]
        mask, mean, var, step = self.state
        part.state = State(mask[index], mean[index], var[index], step)
        if self.remade is not None:
            part.remade = self.remade[0][index], self.remade[1][index]
        return part

    def start_again(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Start from the mask of the image itself, with part of the momentum."""
        images = quantise(x)
        mask = self.deletion.optimise(model, images, y, self.seeds).mask
        self.remade = images, 1 - mask
        self.state = State(mask, 0.5 * self.state.mean, 0.25 * self.state.var, 100)

    def explain_images(
        self, explainer: Interpreter, model: nn.Module, x: Tensor, y: Tensor, index: Tensor
    ) -> Tensor:
        """Maps ``(m, 1, grid, grid)`` of images as they are, rows `index` ``(m,)`` of the batch.

        Those that the last start was made for have theirs already, to the bit.
        """
        if self.remade is None:
            return explainer.trace_maps(model, x, y, self.seeds[index.cpu()])[0]
        images, known = (each[index] for each in self.remade)
        maps = known.to(x.dtype).clone()
        new = (x != images).flatten(1).any(1)
        if bool(new.any()):
            rows = new.nonzero().flatten()
            with book_rows(rows):
                maps[new] = explainer.trace_maps(
                    model, x[new], y[new], self.seeds[index[rows].cpu()]
                )[0]
        return maps
