"""What robust training lowers, and what the search for its images raises.

The interpretation terms are those of Proper Network Interpretability Helps Adversarial
Robustness in Classification, arXiv:2006.14748, called [1] here. Its authors' code leaves its maps
undivided by their number of positions, so that one and the same `gamma` weighs more the larger
the maps are. Here maps are divided: 0.01 there is 0.01 times the number of positions here, 0.49
for maps of 7x7 and 0.64 for maps of 8x8, and results do not change with the size of the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.interpreters.heads import Head, observe_head
from robusteval.models.classifier import frozen
from robusteval.models.seeds import per_image
from robusteval.search.abreast import descend_from_starts
from robusteval.search.balls import Ball
from robusteval.search.descent import Score
from robusteval.search.losses import cross_entropy, divergence

from .training_settings import OF_BOTH, OF_MAPS, Search, Term, Weighting, Weights

TINY = 1e-12  # probability whose logarithm is still taken
NOISE = 2.0  # reach of the noise of N-FGSM, in radii


class NetworkOutput(NamedTuple):
    """What a network makes of images."""

    logits: Tensor  # (n, k)
    maps: Tensor | None  # (n, k, h', w'), where the terms ask for them

    def select(self, rows: Tensor) -> NetworkOutput:
        """Of some of the images."""
        return NetworkOutput(self.logits[rows], None if self.maps is None else self.maps[rows])


def run_network(model: nn.Module, x: Tensor, terms: Iterable[Term]) -> NetworkOutput:
    """Run the network once; ValueError if maps are asked for and the network has none."""
    if OF_MAPS.isdisjoint(terms):
        return NetworkOutput(model(x), None)
    found = observe_head(model, x)
    return NetworkOutput(found.logits, compute_class_maps(found))


def compute_class_maps(found: Head) -> Tensor:
    """Compute class activation maps ``(n, k, h', w')`` of all classes, divided by their positions.

    Signed and never stretched: the sum of a map plus the class's bias is the logit.
    """
    positions = found.features.shape[2:].numel()
    return torch.einsum("kc,nchw->nkhw", found.weight, found.features) / positions


def measure_discrepancy(
    clean: Tensor, attacked: Tensor, logits: Tensor, y: Tensor, weighting: Weighting = "softmax"
) -> Tensor:
    """Measure how far the maps of all classes have moved, in l1: the discrepancy of [1].

    Parameters
    ----------
    clean, attacked : Tensor
        `compute_class_maps` ``(n, k, h', w')`` of images and of the attacked images.
    logits : Tensor
        ``(n, k)`` of the attacked images.
    y : Tensor
        Labels ``(n,)``.
    weighting : {"softmax", "runner_up"}
        How maps of wrong classes count, see `weigh_wrong_classes`.

    Returns
    -------
    Tensor
        ``(n,)``, in units of the logits; twice the discrepancy that `measure_map_bound` gives if
        all weight is on one wrong class.
    """
    moved = (clean - attacked).abs().sum((2, 3))  # (n, k)
    own = moved.gather(1, y.unsqueeze(1)).squeeze(1)
    return own + (weigh_wrong_classes(logits, y, weighting) * moved).sum(1)


def weigh_wrong_classes(logits: Tensor, y: Tensor, weighting: Weighting) -> Tensor:
    """Weigh the wrong classes ``(n, k)``: weights that sum to one, zero for `y` ``(n,)``.

    Their softmax, on the graph as in [1], or all for the likeliest.
    """
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    if weighting == "softmax":
        return others.softmax(1)
    return F.one_hot(others.argmax(1), logits.shape[1]).to(logits)


def compute_losses(
    weights: Weights,
    clean: NetworkOutput | None,
    attacked: NetworkOutput | None,
    y: Tensor,
    weighting: Weighting,
    *,
    search: bool = False,
) -> Tensor:
    """Compute the weighted sum of the terms ``(n,)``; a side that no term needs may be None.

    For a `search` the terms have the same values and, in the attacked logits alone, derivatives
    that keep their direction however sure the network is. Training is better off with those that
    vanish.
    """
    total = torch.zeros(len(y), device=y.device)
    for term, weight in weights.items():
        total = total + weight * _compute_term(term, clean, attacked, y, weighting, search=search)
    return total


def _compute_term(
    term: Term,
    clean: NetworkOutput | None,
    attacked: NetworkOutput | None,
    y: Tensor,
    weighting: Weighting,
    *,
    search: bool,
) -> Tensor:
    if term == "clean":
        assert clean is not None
        return F.cross_entropy(clean.logits, y, reduction="none")
    assert attacked is not None
    if term == "adversarial":
        if search:
            return cross_entropy(attacked.logits, y)
        return F.cross_entropy(attacked.logits, y, reduction="none")
    if term == "boosted":  # arXiv has no copy of MART: openreview.net/forum?id=rklOg6EFwS, Eq. 8
        p = attacked.logits.softmax(1)
        rival = p.scatter(1, y.unsqueeze(1), 0.0).amax(1)
        missed = (1 - rival).clamp_min(TINY).log()
        return F.cross_entropy(attacked.logits, y, reduction="none") - missed
    assert clean is not None
    if term == "doubtful":  # Eq. 11 there: the divergence counts where the clean image is unsure
        before, after = clean.logits.log_softmax(1), attacked.logits.log_softmax(1)
        own = before.gather(1, y.unsqueeze(1)).squeeze(1).exp()
        return (before.exp() * (before - after)).sum(1) * (1 - own)
    if term == "divergence":  # Theoretically Principled Trade-off (TRADES), arXiv:1901.08573
        if search:
            return divergence(clean.logits, attacked.logits)
        before, after = clean.logits.log_softmax(1), attacked.logits.log_softmax(1)
        return (before.exp() * (before - after)).sum(1)
    assert clean.maps is not None
    assert attacked.maps is not None
    if term == "maps":
        return measure_discrepancy(clean.maps, attacked.maps, attacked.logits, y, weighting)
    rows = torch.arange(len(y), device=y.device)
    return (clean.maps[rows, y] - attacked.maps[rows, y]).abs().sum((1, 2))


def compute_training_loss(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    weights: Weights,
    weighting: Weighting = "softmax",
) -> Tensor:
    """Compute the loss ``(n,)`` of images and attacked images, in one forward pass.

    In train mode batch normalisation sees what this pass sees: clean images, attacked images or,
    where terms need both, all together.
    """
    if weights.keys() == {"clean"}:
        return compute_losses(weights, run_network(model, x, weights), None, y, weighting)
    if weights.keys() == {"adversarial"}:
        return compute_losses(weights, None, run_network(model, x_adv, weights), y, weighting)
    both = run_network(model, torch.cat([x, x_adv]), weights)
    n = len(x)
    first, second = (
        NetworkOutput(both.logits[part], None if both.maps is None else both.maps[part])
        for part in (slice(None, n), slice(n, None))
    )
    return compute_losses(weights, first, second, y, weighting)


def find_worst_images(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seeds: Tensor,
    weights: Weights,
    *,
    eps: float,
    steps: int,
    step: float,
    weighting: Weighting = "softmax",
    search: Search = "pgd",
) -> Tensor:
    """Find images within `eps` that raise the terms: projected ascent from a random start.

    With the model in eval mode, left as it was. Of all iterates the one of highest value counts,
    where [1] takes the last.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x, y : Tensor
        Images ``(n, c, h, w)`` in [0, 1] and labels ``(n,)``.
    seeds : Tensor
        One per image ``(n,)``, for the starts.
    weights : mapping
        Of the terms that are raised; without any, the images stay as they are.
    eps, step : float
        Radius in linf and length of a step, in units of the [0, 1] pixel range.
    steps : int
        Steps.
    weighting : {"softmax", "runner_up"}
        See `weigh_wrong_classes`.
    search : {"pgd", "nfgsm"}
        The latter takes one step from noise, see `step_from_noise`; up to three radii away.

    Returns
    -------
    Tensor
        ``(n, c, h, w)``, off the graph.
    """
    if eps == 0 or not weights:
        return x
    with frozen(model):
        clean: NetworkOutput | None = None
        if not OF_BOTH.isdisjoint(weights):
            with torch.no_grad():
                clean = run_network(model, x, weights)

        if search == "nfgsm":

            def raised(z: Tensor) -> Tensor:
                found = run_network(model, z, weights)
                return compute_losses(weights, clean, found, y, weighting, search=True)

            return step_from_noise(raised, x, seeds, eps=eps, step=step)

        def objective(x_adv: Tensor, index: Tensor) -> Score:
            found = run_network(model, x_adv, weights)
            before = None if clean is None else clean.select(index)
            value = compute_losses(weights, before, found, y[index], weighting, search=True)
            return Score(-value, torch.zeros_like(index, dtype=torch.bool))

        found = descend_from_starts(
            objective,
            Ball.around(x, "linf", eps),
            seeds,
            restarts=1,
            random_start=True,
            step=step,
            steps=steps,
            stop="never",
        )
    return found.x_adv


def step_from_noise(
    objective: Callable[[Tensor], Tensor], x: Tensor, seeds: Tensor, *, eps: float, step: float
) -> Tensor:
    """Add noise of twice the radius, and take one signed step that raises the objective there.

    Make Some Noise: Reliable and Efficient Single-Step Adversarial Training, arXiv:2202.01181,
    Algorithm 1. The noise is part of what the network learns from, and the result is not brought
    back into the ball: both keep single-step training from collapsing.

    Parameters
    ----------
    objective : callable
        Images to values ``(n,)``, on the graph.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    seeds : Tensor
        One per image ``(n,)``, for the noise.
    eps, step : float
        Radius and length of the step, in units of the [0, 1] pixel range.

    Returns
    -------
    Tensor
        ``(n, c, h, w)`` in [0, 1], off the graph.
    """
    noise = (2 * per_image(seeds, x.shape[1:]).to(x) - 1) * (NOISE * eps)
    z = (x + noise).clamp(0, 1).requires_grad_()
    with torch.enable_grad():
        (grad,) = autograd.grad(objective(z).sum(), z)
    return (z.detach() + step * grad.sign()).clamp(0, 1)


class MapBound(NamedTuple):
    """The two sides of the bound of [1], per image."""

    discrepancy: Tensor  # (n,)
    bound: Tensor  # (n,)


def measure_map_bound(model: nn.Module, x: Tensor, x_adv: Tensor) -> MapBound:
    """Measure how far maps move in l1, and what that cannot fall below once a prediction changes.

    With t predicted before and t' after, half the l1 distances of the maps of t and t' are at
    least half of what the logit of t exceeds that of t' by on the clean image, whatever was
    changed: a map's sum moves by no more than the map. That holds for maps neither rectified nor
    stretched, and of both classes; the map of t alone has no such bound.

    Parameters
    ----------
    model : nn.Module
        As for `robusteval.interpreters.heads.observe_head`.
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` and attacked images.

    Returns
    -------
    Bounded
        The bound is zero where the prediction is the same.

    Raises
    ------
    ValueError
        If the network has no class activation maps.
    """
    with frozen(model), torch.no_grad():
        before, after = observe_head(model, x), observe_head(model, x_adv)
        moved = (compute_class_maps(before) - compute_class_maps(after)).abs().sum((2, 3))  # (n, k)
    pair = torch.stack([before.logits.argmax(1), after.logits.argmax(1)], 1)  # (n, 2)
    own = before.logits.gather(1, pair)
    return MapBound(moved.gather(1, pair).sum(1) / 2, (own[:, 0] - own[:, 1]) / 2)
