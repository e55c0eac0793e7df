"""The least change that brings an image to a hyperplane without leaving the pixel box."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from robusteval.search.balls import to_double

PlaneNorm = Literal["linf", "l2", "l1"]


def project_to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: PlaneNorm) -> Tensor:
    """The change of least norm after which ``w · x`` is larger by `gap`, inside [0, 1].

    Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack,
    arXiv:1907.02044, Eq. 6 and section 2.3: exact, by sorting the values at which pixels reach
    the end of their range. Computed in float64 where the device has it, and without waiting for
    the device.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    w : Tensor
        Normals of the hyperplanes, of the same shape. A value whose entry is zero stays, so
        that a product with a mask keeps pixels as they are; entries that are not finite count
        as zero.
    gap : Tensor
        By how much ``w · x`` has to rise ``(n,)``; negative to fall.
    norm : {"linf", "l2", "l1"}
        What is smallest.

    Returns
    -------
    Tensor
        Changes ``(n, c, h, w)`` of the type of `x`. Where the hyperplane does not meet the box,
        all values go as far towards it as they can.

    Raises
    ------
    ValueError
        If `norm` is another word.
    """
    along, weight, room, least = _solve(x, w, gap, norm)
    if norm == "l1":
        change = least
    else:
        pace = torch.ones_like(weight) if norm == "linf" else weight
        change = torch.minimum(least.unsqueeze(1) * pace, room)
    return (along * change).to(x).view_as(x)


def measure_to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: PlaneNorm) -> Tensor:
    """The norm of that least change ``(n,)``, infinite where the hyperplane misses the box.

    Parameters and errors are those of `project_to_hyperplane`; in units of the [0, 1] pixel range.
    """
    change = project_to_hyperplane(x, w, gap, norm).flatten(1)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    _, weight, room = _measure_room(x, w, gap)
    missed = (weight * room).sum(1) < to_double(gap.abs())
    size: Tensor = torch.linalg.vector_norm(change, order, dim=1)
    return size.masked_fill(missed.to(x.device), torch.inf)


def _measure_room(x: Tensor, w: Tensor, gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The way of each value, its weight and how far it can go, float64 ``(n, d)`` each."""
    normal = to_double(w).flatten(1).nan_to_num(0.0, 0.0, 0.0)
    along = normal.sign() * to_double(gap).sign().unsqueeze(1)
    image = to_double(x).flatten(1)
    room = torch.where(along > 0, 1 - image, image) * along.abs()
    return along, normal.abs(), room


def _solve(
    x: Tensor, w: Tensor, gap: Tensor, norm: PlaneNorm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Way, weight and room of each value ``(n, d)``, and the solution.

    Of l1 the size of each value's change ``(n, d)``. Of the others the multiplier ``(n,)``: each
    value moves by as much (linf), or by as much times its weight (l2), until it has no room.
    """
    if norm not in get_args(PlaneNorm):
        raise ValueError(f"norm must be linf, l2 or l1, not {norm!r}")
    along, weight, room = _measure_room(x, w, gap)
    wanted = to_double(gap).abs().unsqueeze(1)  # (n, 1)
    if norm == "l1":
        # the heaviest values first, each to its end
        heavy, order = weight.sort(dim=1, descending=True, stable=True)
        ends = room.gather(1, order)
        gain = heavy * ends
        rest = (wanted - (gain.cumsum(1) - gain)).clamp_min(0)
        size = torch.minimum(rest / heavy.clamp_min(1e-300), ends)
        return along, weight, room, torch.zeros_like(size).scatter(1, order, size)

    # the multiplier at which each value has no room left, in rising order
    pace = torch.ones_like(weight) if norm == "linf" else weight
    end, order = (room / pace.clamp_min(1e-300)).sort(dim=1, stable=True)
    spent = (weight * room).gather(1, order).cumsum(1)
    slope = (weight * pace).gather(1, order)
    slope = slope.flip(1).cumsum(1).flip(1)  # of this value and all that end later
    before = torch.cat([torch.zeros_like(wanted), spent[:, :-1]], 1)
    reached = before + end * slope  # the rise of w · x at each end
    at = (reached < wanted).sum(1, keepdim=True).clamp_max(max(end.shape[1] - 1, 0))
    least = (wanted - before.gather(1, at)) / slope.gather(1, at).clamp_min(1e-300)
    return along, weight, room, least.squeeze(1)
