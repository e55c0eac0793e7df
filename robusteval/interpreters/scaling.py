"""What is done to maps ``(n, 1, h, w)`` after an interpreter has made them, always in the open."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def min_max(maps: Tensor, floor: float = 1e-8) -> Tensor:
    """Each map stretched to [0, 1].

    Parameters
    ----------
    maps : Tensor
        ``(n, 1, h, w)``.
    floor : float
        Least range that is divided by, so that a constant map gives zeros, not noise or NaN.

    Returns
    -------
    Tensor
        ``(n, 1, h, w)``.
    """
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(floor)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(n, 1, h, w)`` at another resolution ``(height, width)``, bilinear.

    The corners of the two grids are aligned, not the centres of their corner cells.
    """
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
