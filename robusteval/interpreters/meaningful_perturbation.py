"""What may be blurred away without the network losing sight of the class: a map by search.

Follows the form of `robusteval.interpreters.gradient`, except that its values are shares in [0, 1]
that must not be stretched: of an empty mask that would make noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, autograd, nn

from robusteval.interpreters.gradient import is_differentiated, select_scores
from robusteval.interpreters.resampling import (
    build_blur,
    build_enlargement,
    build_kernel,
    resample,
)
from robusteval.models.forward_modes import twice_differentiable
from robusteval.models.seeds import per_image
from robusteval.models.steps import stop_if_asked
from robusteval.registry import INTERPRETERS

Flavour = Literal["v1", "v2"]

LARGE = 112  # pixels a side from which on the sizes published for 224 are used
MOMENTS = (0.9, 0.999)  # Adam's


class Published(NamedTuple):
    """Constants of one flavour for one size of images."""

    blur: int  # side in pixels of the kernel that blurs the image
    sigma: float | None  # its standard deviation in pixels; None: `usual_sigma`
    mask_blur: int  # side of the kernel that smooths the enlarged mask, 1: none
    sparsity: float  # weight of the cells that are blurred away
    averaged: bool  # their mean, otherwise their sum
    smoothness: float  # weight of the total variation
    jitter: int  # places in each direction where the image may lie, 0: none
    iterations: int


# those for small images are ADV2's for CIFAR-10; v1 has none, it gets a blur of the same side
PUBLISHED: dict[Flavour, tuple[Published, Published]] = {
    "v1": (
        Published(5, 10.0, 1, 1e-2, True, 1e-4, 0, 500),
        Published(11, 10.0, 1, 1e-2, True, 1e-4, 0, 500),
    ),
    "v2": (
        Published(5, None, 3, 1e-4, False, 1e-2, 2, 300),
        Published(21, None, 11, 1e-4, False, 1e-2, 4, 300),
    ),
}


@INTERPRETERS.add("mask", differentiable=True, seeded=True, cost="300 forwards, 300 backwards")
def mask(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    flavour: Flavour = "v2",
    iterations: int | None = None,
    rate: float = 0.1,
    grid: int | None = None,
    blur: int | None = None,
    jitter: int | None = None,
    sparsity: float | None = None,
    smoothness: float | None = None,
    tv_transposed: bool = False,
    unroll: int = 4,
) -> Tensor:
    """Smallest smooth region whose blurring hides the class, found by gradient descent (MASK).

    Interpretable Explanations of Black Boxes by Meaningful Perturbation, arXiv:1704.03296, Eq. 4,
    in the two flavours of the attack ADV2 (arXiv:1812.00891), whose sizes are reconstructed from
    its authors' code. `v2` is close to the original; `v1` weighs sparsity 8 times and smoothness
    100 times less, so its maps are noisier. The search follows the softmax probability: where
    rounding makes that exactly 1 it finds nothing. Each iteration costs one forward and one
    backward pass, and one more backward pass while it is unrolled.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for the jitter; zeros if not given. Maps of two seeds differ.
    flavour : {"v1", "v2"}
        Which published constants count wherever nothing is given.
    iterations : int, optional
        Steps of Adam: 500 for `v1`, 300 for `v2`.
    rate : float
        Their learning rate, in units of the mask.
    grid : int, optional
        Cells of the mask a side: a quarter of the image's shorter side, at most 28. Published: 28
        for images of 224 pixels, 8 for 32.
    blur : int, optional
        Side in pixels of the kernel that blurs the image, odd: 11 for `v1` and 21 for `v2`, below
        112 pixels 5. The image must lose its class by it, otherwise there is little to find: true
        of photographs of 32 pixels, while coarse drawings such as handwritten digits need 15.
    jitter : int, optional
        The image is enlarged by so many pixels and lies at one of as many places in each direction,
        drawn for each image and step: 0 for `v1`; 4 for `v2`, below 112 pixels 2.
    sparsity : float, optional
        Weight of what is blurred away: 1e-2 of the cells' mean for `v1`, 1e-4 of their sum for
        `v2`.
    smoothness : float, optional
        Weight of the total variation of the cells: 1e-4 for `v1`, 1e-2 for `v2`.
    tv_transposed : bool
        Transpose the horizontal differences before they meet the vertical ones, as the authors of
        ADV2 do by oversight.
    unroll : int
        Last iterations that are differentiated while the map stays on the graph; memory grows with
        them.

    Returns
    -------
    Tensor
        Maps ``(n, 1, grid, grid)`` in [0, 1], one where the image is to be blurred: the published
        mask taken from one.

    Raises
    ------
    ValueError
        If a parameter is out of range, the grid finer than the image, or a class does not exist.
    """
    deletion = build_deletion(
        x,
        flavour=flavour,
        grid=grid,
        blur=blur,
        jitter=jitter,
        sparsity=sparsity,
        smoothness=smoothness,
        tv_transposed=tv_transposed,
    )
    if iterations is None:
        iterations = deletion.iterations
    if iterations < 1 or unroll < 1 or not rate > 0:
        raise ValueError(
            f"iterations, unroll and rate must be positive, not {iterations}, {unroll} and {rate:g}"
        )
    drawn = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
    return (
        1
        - deletion.optimise(
            model, x, y, drawn, iterations=iterations, rate=rate, unroll=unroll
        ).mask
    )


class State(NamedTuple):
    """A mask on its way, with the moments of Adam, all ``(n, 1, grid, grid)``."""

    mask: Tensor  # share of each cell that is kept
    mean: Tensor  # of its derivatives
    var: Tensor  # of their squares
    step: int  # steps made

    def detach(self) -> State:
        """The state off the graph."""
        return State(self.mask.detach(), self.mean.detach(), self.var.detach(), self.step)


@dataclass(frozen=True)
class Deletion:
    """What a mask of images of one size has to do: keep all it can, but not the class."""

    grid: int
    jitter: int
    sparsity: float
    averaged: bool
    smoothness: float
    tv_transposed: bool
    iterations: int
    larger: tuple[Tensor, Tensor]  # (h, grid) and (w, grid): cells to pixels
    moved: tuple[Tensor, Tensor]  # (h + jitter, h) and (w + jitter, w): room for the jitter
    blurred: tuple[Tensor, Tensor]  # of the same shapes: and blurred

    def compose_scene(self, x: Tensor) -> Tensor:
        """Images beside their blurs, with room for the jitter: ``(n, 2c, h + j, w + j)``.

        Linear in `x`, and on the graph if `x` is.
        """
        return torch.cat([resample(x, self.moved), resample(x, self.blurred)], 1)

    def enlarge_mask(self, mask: Tensor) -> Tensor:
        """Masks at the images' size ``(n, 1, h, w)``, smoothed."""
        return resample(mask, self.larger)

    def compute_loss(
        self, model: nn.Module, scene: Tensor, y: Tensor, mask: Tensor, shift: Tensor
    ) -> Tensor:
        """What a mask lowers ``(n,)``: probability of the class, area, unevenness.

        Parameters
        ----------
        model : nn.Module
            Maps images to logits.
        scene : Tensor
            From `compose_scene`.
        y : Tensor
            Classes ``(n,)``.
        mask : Tensor
            ``(n, 1, grid, grid)``.
        shift : Tensor
            Where the images lie ``(n, 2)``, see `draw_offsets`.

        Raises
        ------
        ValueError
            If a class does not exist.
        """
        rows, columns = self.larger
        image, blurred = crop_windows(scene, shift, len(rows), len(columns)).chunk(2, 1)
        logits = model(mix_images(image, blurred, self.enlarge_mask(mask)))
        probability = select_scores(logits.softmax(1), y)
        gone = (1 - mask).flatten(1)
        area = gone.mean(1) if self.averaged else gone.sum(1)
        return (
            self.sparsity * area
            + self.smoothness * measure_variation(mask, self.tv_transposed)
            + probability
        )

    def start_mask(self, x: Tensor) -> State:
        """The state at the start: half of each cell is kept."""
        half = x.new_full((len(x), 1, self.grid, self.grid), 0.5)
        return State(half, torch.zeros_like(half), torch.zeros_like(half), 0)

    def step_mask(
        self,
        model: nn.Module,
        scene: Tensor,
        y: Tensor,
        state: State,
        shift: Tensor,
        rate: float = 0.1,
    ) -> State:
        """One step of Adam on the whole batch; on the graph exactly if `scene` asks for it.

        Then nothing in the state is detached, and a mask that comes on the graph stays on it.
        """
        keep = is_differentiated(scene)
        before = state.mask
        if not (keep and before.requires_grad):
            before = before.detach().requires_grad_()
        with torch.enable_grad(), twice_differentiable(scene):
            loss = self.compute_loss(model, scene if keep else scene.detach(), y, before, shift)
            (slope,) = autograd.grad(loss.sum(), before, create_graph=keep)
        with torch.set_grad_enabled(keep):
            first, second = MOMENTS
            step = state.step + 1
            mean = first * state.mean + (1 - first) * slope
            var = second * state.var + (1 - second) * slope.square()
            # the summand under the root, as the root has no slope at zero
            size = (var / (1 - second**step) + 1e-16).sqrt()
            after = before - rate * (mean / (1 - first**step)) / size
            return State(after.clamp(0, 1), mean, var, step)

    def optimise(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        seeds: Tensor,
        *,
        iterations: int | None = None,
        rate: float = 0.1,
        unroll: int = 4,
    ) -> State:
        """Masks of images ``(n, c, h, w)`` from the start; see `mask` for the parameters."""
        iterations = self.iterations if iterations is None else iterations
        if not len(x):
            iterations = 1  # for its checks
        unrolled = max(iterations - unroll, 0) if is_differentiated(x) else iterations
        shift = draw_offsets(seeds, iterations, self.jitter)  # (n, iterations, 2)
        scene, state = self.compose_scene(x.detach()), self.start_mask(x)
        for i in range(unrolled):
            stop_if_asked()
            state = self.step_mask(model, scene, y, state, shift[:, i], rate)
        if unrolled < iterations:
            scene = self.compose_scene(x)
        for i in range(unrolled, iterations):
            state = self.step_mask(model, scene, y, state, shift[:, i], rate)
        return state


def build_deletion(
    x: Tensor,
    *,
    flavour: Flavour = "v2",
    grid: int | None = None,
    blur: int | None = None,
    jitter: int | None = None,
    sparsity: float | None = None,
    smoothness: float | None = None,
    tv_transposed: bool = False,
) -> Deletion:
    """The deletion for images like `x` ``(n, c, h, w)``; parameters and errors as of `mask`."""
    sides = x.shape[2:]
    used = PUBLISHED[flavour][min(sides) >= LARGE]
    grid = max(1, min(28, min(sides) // 4)) if grid is None else grid
    if not 1 <= grid <= min(sides):
        raise ValueError(
            f"the mask's grid must have from 1 to {min(sides)} cells a side, as the image is"
            f" {sides[1]}x{sides[0]} pixels, not {grid}"
        )
    if blur is None:
        weights = build_kernel(used.blur, used.sigma)
    elif blur >= 1 and blur % 2:
        weights = build_kernel(blur, used.sigma)
    else:
        raise ValueError(f"blur must be an odd number of pixels, not {blur}")
    jitter = used.jitter if jitter is None else jitter
    sparsity = used.sparsity if sparsity is None else sparsity
    smoothness = used.smoothness if smoothness is None else smoothness
    if not (jitter >= 0 and sparsity >= 0 and smoothness >= 0):
        raise ValueError(
            "jitter, sparsity and smoothness must be at least 0, not"
            f" {jitter}, {sparsity:g} and {smoothness:g}"
        )

    def pair(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rows, columns = (matrix.to(x) for matrix in matrices)
        return rows, columns

    smoothing = build_kernel(used.mask_blur)
    moved = [build_enlargement(side, side + jitter) for side in sides]
    return Deletion(
        grid=grid,
        jitter=jitter,
        sparsity=sparsity,
        averaged=used.averaged,
        smoothness=smoothness,
        tv_transposed=tv_transposed,
        iterations=used.iterations,
        larger=pair(
            [build_blur(side, smoothing) @ build_enlargement(grid, side) for side in sides]
        ),
        moved=pair(moved),
        blurred=pair([build_blur(len(matrix), weights) @ matrix for matrix in moved]),
    )


def draw_offsets(seeds: Tensor, steps: int, jitter: int) -> Tensor:
    """Rows and columns by which images are moved at each step, ``(n, steps, 2)`` int64."""
    uniform = per_image(seeds, torch.Size((steps, 2)))
    return (uniform * max(jitter, 1)).long()


def crop_windows(scene: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """From each image the window ``(height, width)`` whose corner is given ``(n, 2)``."""
    windows = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(scene.unbind(), shift.tolist(), strict=True)
    ]
    return torch.stack(windows) if windows else scene[:, :, :height, :width]


def mix_images(image: Tensor, other: Tensor, kept: Tensor) -> Tensor:
    """The image where a mask keeps it, the other one elsewhere."""
    return other + kept * (image - other)


def measure_variation(mask: Tensor, transposed: bool = False) -> Tensor:
    """Sum over the cells of the gradient's length to the power of three, ``(n,)``."""
    across = mask[..., :-1, 1:] - mask[..., :-1, :-1]
    down = mask[..., 1:, :-1] - mask[..., :-1, :-1]
    if transposed:
        across = across.transpose(-1, -2)
    squares = across.square() + down.square() + 1e-8
    # not as a power, which rounds the last values of a tensor differently
    return (squares * squares.sqrt()).flatten(1).sum(1)
