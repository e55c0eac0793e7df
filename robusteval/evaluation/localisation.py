"""Does a perturbation sit where a relevance map says the object is? Per image, with controls.

Two answers. That of arXiv:2106.12731, section 4: where local SSIM falls, compared with relevance
pixel by pixel. Local SSIM falls most where an image is flat, wherever the change is, so that
number means little without that of noise of equal length beside it, and of two attacks only at
equal area. And the share of the squared change that lies inside, over the share of the image that
does: 1 for a change that does not look.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.errors import UsageError
from robusteval.search.balls import bell, ssim_map, to_double

Window = Literal["gaussian", "block"]

NOISE = 0.11  # 1 - SSIM above which the paper counts a pixel as changed
RELEVANCE = 0.75  # relevance in [0, 1] above which it counts a pixel as relevant


class Overlap(NamedTuple):
    """How changed and relevant pixels overlap in each image, float64 ``(n,)``.

    nan where there is nothing to divide by: precision with no pixel changed, recall with none
    relevant.
    """

    precision: Tensor  # share of the changed that is relevant
    perturbed: Tensor  # share of all that is changed
    recall: Tensor  # share of the relevant that is changed
    iou: Tensor  # changed and relevant, over changed or relevant
    iou_outside: Tensor  # changed and not relevant, over changed or not relevant


class Energy(NamedTuple):
    """Where the squared change of each image lies, float64 ``(n,)``."""

    inside: Tensor  # its share on relevant pixels; nan without a change
    area: Tensor  # their share of the image
    ratio: Tensor  # the one over the other; nan where there is no relevant pixel


class Mean(NamedTuple):
    """The mean of a column over the images that have a value."""

    value: float  # nan if none has
    empty: int  # images without


def map_noise(x_adv: Tensor, x: Tensor, window: Window = "gaussian") -> Tensor:
    """One minus the local SSIM of images ``(n, c, h, w)``, mean over channels, ``(n, 1, h, w)``.

    `gaussian`: window of 11 pixels; `block`: mean of 8x8 pixels, moved pixel by pixel. At the
    edges the images are continued by reflection. float64.

    Raises
    ------
    UsageError
        For images smaller than the window.
    """
    if window not in get_args(Window):
        raise ValueError(f"window must be gaussian or block, not {window!r}")
    # in float32 variances are known to 1e-7, which of the smallest perturbations is too much
    x, x_adv = to_double(x), to_double(x_adv)
    weights = bell(11, x) if window == "gaussian" else x.new_full((8,), 1 / 8)
    size = len(weights)
    h, w = x.shape[2:]
    if min(h, w) < size:
        raise UsageError(
            f"images of {h}x{w} pixels are smaller than the {size}-pixel window of SSIM:"
            f" enlarge them to {size}x{size} at least"
        )
    before, after = size // 2, size - 1 - size // 2
    x, x_adv = (F.pad(z, [before, after, before, after], mode="reflect") for z in (x, x_adv))
    found: Tensor = 1 - ssim_map(x, x_adv, weights).mean(1, keepdim=True)
    return found


def measure_overlap(
    noise: Tensor, relevance: Tensor, *, changed: float = NOISE, relevant: float = RELEVANCE
) -> Overlap:
    """Compare changed with relevant pixels.

    Parameters
    ----------
    noise : Tensor
        Of `map_noise`, ``(n, 1, h, w)``.
    relevance : Tensor
        ``(n, 1, h, w)``, scaled to [0, 1].
    changed, relevant : float
        A pixel is where its value is larger.
    """
    return _overlap(noise > changed, _relevant(relevance, noise, relevant))


def measure_overlap_at(
    noise: Tensor, relevance: Tensor, share: float, *, relevant: float = RELEVANCE
) -> Overlap:
    """Compare changed with relevant pixels where a `share` of all counts as changed.

    They are those where the noise is largest.

    Perturbations can be compared at equal area only: one that changes every pixel has the share
    of relevant pixels as its precision. An image without noise has no pixel changed.
    """
    flat = noise.flatten(1)
    pixels = flat.shape[1]
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share:g}")
    # ranks, not a threshold: among equal values the count must come out all the same
    order = flat.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(share * pixels))]
    marked = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True)
    marked &= (flat > flat.amin(1, keepdim=True)).any(1, keepdim=True)
    return _overlap(marked.view_as(noise), _relevant(relevance, noise, relevant))


def measure_energy(
    x_adv: Tensor, x: Tensor, relevance: Tensor, *, relevant: float = RELEVANCE
) -> Energy:
    """Where the squared change from `x` to `x_adv` ``(n, c, h, w)`` lies; no threshold on it."""
    square = (to_double(x_adv) - to_double(x)).square().sum(1, keepdim=True)
    mask = _relevant(relevance, square, relevant).to(square)
    inside = (square * mask).flatten(1).sum(1) / square.flatten(1).sum(1)
    area = mask.flatten(1).mean(1)
    return Energy(inside, area, (inside / area).where(area > 0, torch.nan))


def average_known(column: Tensor) -> Mean:
    """The mean of a column ``(n,)``, images without a value left out and counted."""
    known = column[~column.isnan()]
    value = float(known.mean()) if len(known) else torch.nan
    return Mean(value, len(column) - len(known))


def _relevant(relevance: Tensor, noise: Tensor, threshold: float) -> Tensor:
    assert relevance.shape == noise.shape, "one relevance per pixel, (n, 1, h, w)"
    return (relevance > threshold).to(noise.device)


def _overlap(changed: Tensor, relevant: Tensor) -> Overlap:
    def count(mask: Tensor) -> Tensor:
        return mask.flatten(1).sum(1).cpu().double()

    both, outside = count(changed & relevant), count(changed & ~relevant)
    missed = count(~changed & relevant)
    pixels = changed.shape[1:].numel()
    return Overlap(
        precision=both / (both + outside),
        perturbed=(both + outside) / pixels,
        recall=both / (both + missed),
        iou=both / (both + outside + missed),
        iou_outside=outside / (pixels - missed),
    )
