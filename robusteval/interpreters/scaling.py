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


def highest_cells(values: Tensor, share: float) -> Tensor:
    """The cells of each map that are among its highest.

    Parameters
    ----------
    values : Tensor
        Maps ``(n, cells)``, finite.
    share : float
        Of the cells, from 0 to 1; one cell at least. Cells as high as the lowest of them count
        too.

    Returns
    -------
    Tensor
        ``(n, cells)`` bool. No cell is in it that is as low as the lowest of all: an even map has
        no highest cells.
    """
    k = max(1, round(share * values.shape[1]))
    least = values.topk(k, 1).values[:, -1:]
    return (values >= least) & (values > values.amin(1, keepdim=True))
