"""Whether maps say anything about the network: figures to stand next to every result on maps.

Maps are ``(n, 1, h', w')`` of any interpreter, larger where more important; they are resized to the
image where pixels are ranked by them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from robusteval.interpreters.gradient import select_scores
from robusteval.interpreters.resampling import blur
from robusteval.interpreters.scaling import resize
from robusteval.models.steps import stop_if_asked

Network = TypeVar("Network", bound=nn.Module)


def measure_insertion(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    maps: Tensor,
    *,
    steps: int = 32,
    start: Literal["blur", "black"] = "blur",
) -> Tensor:
    """How soon the class is seen when the image appears, most important pixels first.

    RISE, arXiv:1806.07421, section 3.3. Area under the curve of the class's probability over the
    share of pixels that are there, by the trapezoidal rule. Higher is better; compare it with that
    of a random map. It costs ``steps + 1`` forward passes.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits, in eval mode.
    x : Tensor
        Images ``(n, c, h, w)``.
    y : Tensor
        Classes ``(n,)``.
    maps : Tensor
        Their maps ``(n, 1, h', w')``. Of equal pixels those further up and left count as more
        important.
    steps : int
        Portions in which pixels appear.
    start : {"blur", "black"}
        What the image appears from. Blurred with a standard deviation of an eighth of its side, or
        all zeros.

    Returns
    -------
    Tensor
        ``(n,)``, in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range or a class does not exist.
    """
    return measure_area(model, y, iterate_path(empty_images(x, start), x, maps, steps))


def measure_deletion(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    maps: Tensor,
    *,
    steps: int = 32,
    end: Literal["blur", "black"] = "black",
) -> Tensor:
    """How long the class is seen when the image goes, most important pixels first.

    As `measure_insertion`, from the image to `end`. Lower is better.
    """
    return measure_area(model, y, iterate_path(x, empty_images(x, end), maps, steps))


def empty_images(x: Tensor, kind: Literal["blur", "black"]) -> Tensor:
    """Images ``(n, c, h, w)`` with nothing left to see."""
    if kind == "black":
        return torch.zeros_like(x)
    if kind != "blur":
        raise ValueError(f"an image is emptied to blur or black, not {kind!r}")
    return blur(x, min(x.shape[2:]) / 8)


def iterate_path(source: Tensor, target: Tensor, maps: Tensor, steps: int) -> Iterator[Tensor]:
    """Images on the way from one to the other, most important pixels first, both ends included."""
    n, _, h, w = source.shape
    if not 1 <= steps <= h * w:
        raise ValueError(f"steps must be between 1 and the {h * w} pixels, not {steps}")
    # map by map: a ramp's last digits may depend on the batch, and ranks with them
    values = torch.cat([resize(each, (h, w)) for each in torch.split(maps.detach(), 1)]).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(h * w, device=order.device).expand(n, -1)
    )
    rank = rank.view(n, 1, h, w)
    for step in range(steps + 1):
        stop_if_asked()
        yield torch.where(rank < round(step / steps * h * w), target, source)


def measure_area(model: nn.Module, y: Tensor, images: Iterator[Tensor]) -> Tensor:
    """Mean probability ``(n,)`` of class `y` along a path, its ends counted half.

    Portion by portion, so that the order of no sum depends on the batch.
    """
    with torch.no_grad():
        before, *rest = (select_scores(model(x).softmax(1), y) for x in images)
        area = torch.zeros_like(before)
        for after in rest:
            area += (before + after) / 2
            before = after
    return area / len(rest)


def shuffle_parameters(model: Network, seed: int) -> Network:
    """A copy of a model, the entries of each parameter in another order.

    Of the network that forgot everything it learnt, while the sizes of its parameters stay what
    they were: maps that hardly change show the image, not the network. Sanity Checks for Saliency
    Maps, arXiv:1810.03292, section 3.1.
    """
    draws = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=draws).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def correlate_ranks(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, of each pair of maps ``(n, 1, h, w)``: ``(n,)`` float64, ties at their mean."""
    a, b = (rank_cells(maps.detach().flatten(1)) for maps in (one, other))
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp_min(1e-12), 0.0)


def rank_cells(values: Tensor) -> Tensor:
    """Ranks of each row ``(n, cells)``, equal values sharing theirs, less their mean."""
    ordered = values.contiguous().sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to).double() / 2 - values.shape[1] / 2
