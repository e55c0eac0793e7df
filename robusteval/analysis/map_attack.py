"""The attack on interpretations alone: what was highest in a map is lowered, whatever the class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn

from robusteval.datasets.dataset import Data, Positions
from robusteval.evaluation.change_places import measure_orders
from robusteval.interpreters.cam import cam
from robusteval.models.classifier import (
    Classifier,
    choose_graph_size,
    frozen,
    predict_classes,
)
from robusteval.models.failures import raise_as_usage_error
from robusteval.models.seeds import sample_seeds
from robusteval.models.steps import tell_step
from robusteval.search.balls import Ball

HIGHEST = 8  # cells of a map that are lowered
STEP = 0.01  # in units of the [0, 1] pixel range, whatever the radius

Arrays = tuple[np.ndarray[Any, Any], ...]


def lower_highest_cells(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, seeds: Tensor
) -> Tensor:
    """Images whose class activation map is as low as can be where it was highest.

    The attack on interpretability (AAI) of Proper Network Interpretability Helps Adversarial
    Robustness in Classification, arXiv:2006.14748, after its authors' code: signed steps of .01
    from a random point of the linf ball, down the sum of the cells that were the eight highest.
    The last image is the result.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Classes of the maps ``(n,)``.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    steps : int
        Steps, each a forward and a backward pass.
    seeds : Tensor
        One per image ``(n,)``, for the start.

    Returns
    -------
    Tensor
        ``(n, c, h, w)``, in the ball and in [0, 1].

    Raises
    ------
    ValueError
        If the network has no class activation maps, or `eps` is no radius.
    """
    ball = Ball.around(x, "linf", eps)
    with torch.no_grad():
        benign = cam(model, x, y).flatten(1)  # (n, cells)
    most = benign.topk(min(HIGHEST, benign.shape[1]), 1).indices
    highest = torch.zeros_like(benign).scatter(1, most, 1.0)
    x_adv = ball.sample(seeds)
    for i in range(steps):
        tell_step(i, steps)
        z = x_adv.detach().requires_grad_()
        height = (cam(model, z, y).flatten(1) * highest).sum(1)
        grad = autograd.grad(height.sum(), z)[0]
        x_adv = ball.project(z.detach() - STEP * ball.find_direction(grad))
    return x_adv.detach()


def attack_maps(
    classifier: Classifier, data: Data, positions: Positions, *, eps: float, steps: int, seed: int
) -> Arrays:
    """Attack the maps of those images that are right, and see in which order their cells are left.

    Parameters
    ----------
    classifier : Classifier
        Whose maps.
    data : Data
        The images.
    positions : ndarray
        Which of them ``(n,)``.
    eps, steps
        See `lower_highest_cells`.
    seed : int
        Decides where the search starts, with each image's content.

    Returns
    -------
    tuple of ndarray
        Of the images that were right ``(m,)``: content ids; Kendall's tau-b between the map of the
        label before and after, nan where one is flat; whether the label is predicted after it, too.

    Raises
    ------
    UsageError
        If the network has no class activation maps.
    """
    size = choose_graph_size(int(np.prod(data.shape)), classifier.device)
    found: list[Arrays] = []
    with frozen(classifier), raise_as_usage_error("cam"):
        for start in range(0, len(positions), size):
            batch = data.batch(positions[start : start + size])
            x, y = batch.x.to(classifier.device), batch.y.to(classifier.device)
            with torch.no_grad():
                right = predict_classes(classifier(x)) == y
            x, y, ids = x[right], y[right], batch.ids[right.cpu().numpy()]
            if not len(x):
                continue
            seeds = sample_seeds(seed, ids)
            x_adv = lower_highest_cells(classifier, x, y, eps=eps, steps=steps, seeds=seeds)
            with torch.no_grad():
                before, after = (cam(classifier, z, y).squeeze(1) for z in (x, x_adv))
                kept = predict_classes(classifier(x_adv)) == y
            orders = measure_orders(after.cpu().numpy(), before.cpu().numpy())
            found.append((ids, orders["map_kendall"], kept.cpu().numpy()))
    if not found:
        return np.empty(0, np.uint64), np.empty(0), np.empty(0, np.bool_)
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
