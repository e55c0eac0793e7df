"""How much of a perturbation lies where the network looks (arXiv:1904.02057), beside controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from robusteval.analysis.case import Case
from robusteval.analysis.summaries import OF_SHARES, average_images
from robusteval.runs.explanation_record import FocusFigures, ImageCount
from robusteval.search.balls import to_double
from robusteval.search.refinement import rank_pixels

DISCRIMINATIVE = 0.2  # share of a map that counts as the discriminative region
SAME = 1e-3  # of its highest value, up to which a map differs from another by rounding alone


def choose_top(maps: Tensor, share: float) -> Tensor:
    """The most important `share` of each map ``(n, 1, h, w)``, bool; ties by position."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share:g}")
    return rank_pixels(maps) >= 1 - share


class Focus(NamedTuple):
    """How much of a perturbation lies in the discriminative region, and what that is worth."""

    score: Tensor  # (n,), interpretability score: norm inside over norm; nan without a change
    area: Tensor  # (n,), share of the image the region covers
    chance: Tensor  # (n,), root of the area: what noise scores
    elsewhere: Tensor  # (n,), mean score against the regions of the other images
    shifted: Tensor  # (n,), 95 % of what the same perturbation scores elsewhere in the image

    @property
    def focused(self) -> Tensor:
        """Whether the score beats all three controls ``(n,)``."""
        beats = (self.score > self.chance) & (self.score > self.shifted)
        return beats & ((self.score > self.elsewhere) | self.elsewhere.isnan())


def score_focus(delta: Tensor, inside: Tensor) -> Focus:
    """The interpretability score of perturbations (arXiv:1904.02057), beside its controls.

    Parameters
    ----------
    delta : Tensor
        Perturbations ``(n, c, h, w)``.
    inside : Tensor
        Discriminative region of each image ``(n, 1, h, w)`` bool, see `choose_top`.
    """
    n = len(delta)
    energy = to_double(delta).square().sum(1)  # (n, h, w)
    region = inside[:, 0].to(energy)
    total = energy.flatten(1).sum(1)
    # (n, n): of image i in the region of image j
    share = energy.flatten(1) @ region.flatten(1).T / total[:, None]
    off = 1 - torch.eye(n).to(share)
    elsewhere = (share.sqrt() * off).sum(1) / (n - 1) if n > 1 else total * torch.nan

    # the perturbation at every other place, around the edges: one correlation
    spectrum = torch.fft.rfft2(energy).conj() * torch.fft.rfft2(region)
    moved = torch.fft.irfft2(spectrum, s=energy.shape[1:]).clamp_min(0) / total[:, None, None]
    area = region.flatten(1).mean(1)
    return Focus(
        score=share.diagonal().sqrt(),
        area=area,
        chance=area.sqrt(),
        elsewhere=elsewhere,
        shifted=torch.quantile(moved.flatten(1).sqrt(), 0.95, dim=1),
    )


def measure_focus(
    case: Case, maps: dict[str, dict[str, Tensor]], fooled: Tensor
) -> tuple[FocusFigures, ...]:
    """Measure how much of the perturbations lies where the network looks, and what chance gives."""
    rows = []
    delta = (case.x_adv - case.x)[fooled]
    for name, views in maps.items():
        for view in ("clean, label", "adversarial, predicted"):
            if not len(delta):
                continue
            found = score_focus(delta, choose_top(views[view][fooled], DISCRIMINATIVE))
            score, area, chance, elsewhere, shifted = (
                average_images(column.cpu().numpy(), OF_SHARES) for column in found
            )
            rows.append(
                FocusFigures(
                    map=name,
                    view=view,
                    score=score,
                    area=area,
                    chance=chance,
                    elsewhere=elsewhere,
                    shifted=shifted,
                    focused=ImageCount(int(found.focused.sum()), len(delta)),
                    scores=spread_over_images(found.score, fooled),
                    chances=spread_over_images(found.chance, fooled),
                    elsewheres=spread_over_images(found.elsewhere, fooled),
                    shifts=spread_over_images(found.shifted, fooled),
                )
            )
    return tuple(rows)


def spread_over_images(values: Tensor, fooled: Tensor) -> tuple[float, ...]:
    """A value for each image: those ``(m,)`` of the images that are fooled ``(n,)``, else nan."""
    every = torch.full((len(fooled),), math.nan, dtype=torch.float64)
    every[fooled.cpu()] = values.double().cpu()
    return tuple(every.tolist())


def remark_same_maps(maps: dict[str, dict[str, Tensor]]) -> Iterator[str]:
    """Say which interpreters give the same maps on all images, and so are one method."""
    for (one, first), (other, second) in combinations(maps.items(), 2):
        if all(is_same_map(first[view], second[view]) for view in first):
            yield (
                f"{one} and {other} are the same map on this network, as on all that end in average"
                " pooling and one linear layer: they count as one method."
            )


def is_same_map(one: Tensor, other: Tensor) -> bool:
    """Whether maps ``(n, 1, h, w)`` are equal where they are positive, but for their scale."""
    if one.shape != other.shape:
        return False
    parts = [each.clamp_min(0) for each in (one, other)]
    tops = [each.amax((1, 2, 3), keepdim=True) for each in parts]
    first, second = (each / top.clamp_min(1e-12) for each, top in zip(parts, tops, strict=True))
    return bool(((first - second).abs() < SAME).all())
