"""Planes at another resolution and with a blur, as products with matrices: bits by plane."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resample(planes: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Each plane of ``(n, c, h, w)`` between a matrix ``(h', h)`` and the other, transposed.

    Plane by plane: in a convolution or one large product, last digits depend on the batch.
    """
    rows, columns = matrices
    n, c, h, w = planes.shape
    flat = planes.reshape(n * c, h, w)
    left = torch.bmm(rows.expand(n * c, -1, -1), flat)  # (n * c, h', w)
    out = torch.bmm(left, columns.t().expand(n * c, -1, -1))  # (n * c, h', w')
    return out.view(n, c, len(rows), len(columns))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Images ``(n, c, h, w)`` with a Gaussian blur of `sigma` pixels, mirrored at the border."""
    weights = build_kernel(2 * round(2.5 * sigma) + 1, sigma)
    return resample(
        x, (build_blur(x.shape[2], weights).to(x), build_blur(x.shape[3], weights).to(x))
    )


def build_enlargement(cells: int, pixels: int) -> Tensor:
    """Bilinear interpolation from `cells` to `pixels` values, ``(pixels, cells)`` float64."""
    unit = torch.eye(cells, dtype=torch.float64).unsqueeze(0)
    return F.interpolate(unit, pixels, mode="linear", align_corners=False)[0].t()


def build_blur(pixels: int, weights: Tensor) -> Tensor:
    """Convolution with a kernel, mirrored at the border, ``(pixels, pixels)`` float64."""
    reach = len(weights) // 2
    period = max(2 * (pixels - 1), 1)
    place = torch.arange(pixels).unsqueeze(1) + torch.arange(-reach, reach + 1)
    place = place.remainder(period)
    place = torch.minimum(place, period - place)  # (pixels, taps)
    matrix = torch.zeros(pixels, pixels, dtype=torch.float64)
    return matrix.scatter_add_(1, place, weights.expand(pixels, -1))


def build_kernel(side: int, sigma: float | None = None) -> Tensor:
    """Gaussian weights ``(side,)`` float64 of sum 1.

    Without `sigma`, in pixels, as OpenCV has it: tables up to a side of 7, then a sigma that grows
    with the side.
    """
    tables = {1: [1.0], 3: [1.0, 2, 1], 5: [1.0, 4, 6, 4, 1], 7: [2.0, 7, 14, 18, 14, 7, 2]}
    if sigma is None and side in tables:
        weights = torch.tensor(tables[side], dtype=torch.float64)
    else:
        sigma = 0.3 * ((side - 1) / 2 - 1) + 0.8 if sigma is None else sigma
        distance = torch.arange(side, dtype=torch.float64) - side // 2
        weights = torch.exp(-distance.square() / (2 * sigma**2))
    return weights / weights.sum()
