"""Whether maps say anything about the network: figures to stand next to every result on maps.

Maps are ``(n, 1, h', w')`` of any interpreter, larger where more important; they are resized to the
image where pixels are ranked by them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from robusteval.interpreters.explainer import mean_distance, scale_maps
from robusteval.interpreters.gradient import select_scores
from robusteval.interpreters.resampling import blur
from robusteval.interpreters.scaling import resize
from robusteval.models.seeds import per_image

Explain = Callable[..., Tensor]
Network = TypeVar("Network", bound=nn.Module)


def insertion_auc(
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
    return area_under(model, y, path(emptied(x, start), x, maps, steps))


def deletion_auc(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    maps: Tensor,
    *,
    steps: int = 32,
    end: Literal["blur", "black"] = "black",
) -> Tensor:
    """How long the class is seen when the image goes, most important pixels first.

    As `insertion_auc`, from the image to `end`. Lower is better.
    """
    return area_under(model, y, path(x, emptied(x, end), maps, steps))


def emptied(x: Tensor, kind: Literal["blur", "black"]) -> Tensor:
    """Images ``(n, c, h, w)`` with nothing left to see."""
    if kind == "black":
        return torch.zeros_like(x)
    if kind != "blur":
        raise ValueError(f"an image is emptied to blur or black, not {kind!r}")
    return blur(x, min(x.shape[2:]) / 8)


def path(source: Tensor, target: Tensor, maps: Tensor, steps: int) -> Iterator[Tensor]:
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
        yield torch.where(rank < round(step / steps * h * w), target, source)


def area_under(model: nn.Module, y: Tensor, images: Iterator[Tensor]) -> Tensor:
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


def randomised_similarity(
    explain: Explain,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """How much maps stay the same when the network forgets everything it learnt.

    Sanity Checks for Saliency Maps, arXiv:1810.03292, section 3.1: rank correlation of each map
    with that of a copy of the network whose parameters are shuffled, each tensor within itself,
    so that their sizes stay what they were. Near 1: the maps show the image, not the network.

    Parameters
    ----------
    explain : callable
        An interpreter ``(model, x, y, *, seeds)``. For `rts`, that of one mask network for both.
    model : nn.Module
        The network, not changed.
    x, y : Tensor
        Images ``(n, c, h, w)`` and classes ``(n,)``.
    seeds : Tensor, optional
        One seed per image ``(n,)``, the same for both maps.
    seed : int
        Of the shuffling.

    Returns
    -------
    Tensor
        Spearman's rank correlation ``(n,)``, in [-1, 1]; 0 where a map is constant.
    """
    learnt = explain(model, x, y, seeds=seeds)
    forgotten = explain(shuffled(model, seed), x, y, seeds=seeds)
    return rank_correlation(learnt, forgotten)


def shuffled(model: Network, seed: int) -> Network:
    """A copy of a model, the entries of each parameter in another order."""
    draws = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=draws).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, of each pair of maps ``(n, 1, h, w)``: ``(n,)`` float64, ties at their mean."""
    a, b = (centred_ranks(maps.detach().flatten(1)) for maps in (one, other))
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp_min(1e-12), 0.0)


def centred_ranks(values: Tensor) -> Tensor:
    """Ranks of each row ``(n, cells)``, equal values sharing theirs, less their mean."""
    ordered = values.contiguous().sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to).double() / 2 - values.shape[1] / 2


def noise_floor(
    name: str,
    explain: Explain,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    others: Tensor,
) -> Tensor:
    """Distance between maps of one image that differ in nothing but the seed.

    No distance between maps of two images means anything below it. Zero for interpreters without
    chance; for `rts` the chance lies in the training of the mask network.

    Parameters
    ----------
    name : str
        What the interpreter is registered as: decides how maps are scaled before.
    explain : callable
        The interpreter, its parameters bound.
    model, x, y
        As for the interpreter.
    seeds, others : Tensor
        Two seeds per image, ``(n,)`` each.

    Returns
    -------
    Tensor
        Mean absolute difference ``(n,)`` of the scaled maps, in [0, 1].
    """
    one, other = (scale_maps(name, explain(model, x, y, seeds=each)) for each in (seeds, others))
    return mean_distance(one.detach(), other.detach())


def pair_distance(maps: Tensor, seeds: Tensor) -> Tensor:
    """Distance of each scaled map from that of another image drawn at random.

    Parameters
    ----------
    maps : Tensor
        Scaled maps ``(n, 1, h, w)`` of at least two images.
    seeds : Tensor
        One seed per image ``(n,)`` for the draw.

    Returns
    -------
    Tensor
        Mean absolute difference ``(n,)``.

    Raises
    ------
    ValueError
        If there are fewer than two maps.
    """
    n = len(maps)
    if n < 2:
        raise ValueError("a distance between images needs at least two maps")
    uniform = per_image(seeds, torch.Size((1,)))[:, 0]
    step = 1 + (uniform * (n - 1)).long().clamp_max(n - 2)
    other = (torch.arange(n) + step) % n
    return mean_distance(maps, maps[other.to(maps.device)])


def normalised(distances: Tensor, maps: Tensor, seeds: Tensor) -> Tensor:
    """Distances ``(n,)`` in units of the mean distance between maps of random image pairs.

    Makes interpreters comparable, whose maps differ in resolution and spread: 1 is as far as the
    map of any other image. Parameters as of `pair_distance`; nan where all maps are the same.
    """
    unit = pair_distance(maps, seeds).mean()
    return distances / torch.where(unit > 0, unit, torch.nan)
