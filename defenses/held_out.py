"""Images held out of a training, and how a network does on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from robusteval.datasets.dataset import Data, draw
from robusteval.errors import UsageError
from robusteval.models.classifier import frozen, predict_classes
from robusteval.models.seeds import sample_seeds
from robusteval.runs.statistics import Rate
from robusteval.search.abreast import descend_from_starts
from robusteval.search.balls import Ball
from robusteval.search.descent import build_class_objective

from .objectives import measure_map_bound
from .training_settings import TrainingSettings

FEWEST = 20  # images that can still be split
MOST_HELD_OUT = 1000  # images that each epoch is judged on, unless asked for
AT_A_TIME = 250  # of them


def hold_out_images(data: Data, held_out: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose positions to train on, and positions held out: fixed by the seed, none in both.

    UsageError if there are too few images or classes.
    """
    n = len(data)
    if n < FEWEST:
        raise UsageError(
            f"{data.name} has {n} images: training needs at least {FEWEST}, of which some are"
            " held out to judge it on"
        )
    if held_out is None:
        held_out = min(MOST_HELD_OUT, max(n // 10, min(200, n // 5)))
    if not 1 <= held_out <= n // 2:
        raise UsageError(f"--held-out must be from 1 to {n // 2}, half the images, not {held_out}")
    order = draw(n, None, seed)
    trained, kept = np.sort(order[held_out:]), np.sort(order[:held_out])
    if len(np.unique(data.labels[trained])) < 2:
        raise UsageError(
            f"the images of {data.name} to train on are all of one class: at least two are needed"
        )
    return trained, kept


class HeldOut(NamedTuple):
    """What a network does on the images held out."""

    clean: Rate
    robust: Rate
    # of the attacks that succeeded, where the objective has maps: how often the discrepancy of
    # the maps fell below its bound (never, but for rounding), and the median of their ratio
    below: int | None
    ratio: float | None


def judge_held_out(
    model: nn.Module,
    data: Data,
    positions: np.ndarray,
    settings: TrainingSettings,
    device: torch.device,
) -> HeldOut:
    """Judge a network on images held out: as they are, and attacked at the full radius.

    The attack is projected ascent of the cross-entropy with twice the steps of the training, each
    image's start the same in every epoch.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits; judged in eval mode.
    data : Data
        Images and labels.
    positions : ndarray
        Positions ``(n,)`` of the images held out.
    settings : TrainingSettings
        How it is trained.
    device : torch.device
        Where the model is.
    """
    clean = robust = below = 0
    ratios: list[float] = []
    with frozen(model):
        for start in range(0, len(positions), AT_A_TIME):
            images = data.batch(positions[start : start + AT_A_TIME])
            x, y = images.x.to(device), images.y.to(device)
            with torch.no_grad():
                right = predict_classes(model(x)) == y
            x, y, seeds = x[right], y[right], sample_seeds(settings.seed, images.ids)
            clean += len(x)
            if len(x) == 0:
                continue
            found = descend_from_starts(
                build_class_objective(model, y, targeted=False, loss="ce"),
                Ball.around(x, "linf", settings.eps),
                seeds[right.cpu()],
                restarts=1,
                random_start=True,
                step=settings.judging_step,
                steps=2 * settings.steps,
                stop="float",
            )
            robust += int((~found.is_adv).sum())
            if settings.has_maps and bool(found.is_adv.any()):
                sides = measure_map_bound(model, x[found.is_adv], found.x_adv[found.is_adv])
                slack = 1e-4 * (sides.bound.abs() + 1)
                below += int((sides.discrepancy < sides.bound - slack).sum())
                ratios += (sides.discrepancy / sides.bound.clamp_min(1e-6)).tolist()
    n = len(positions)
    if not settings.has_maps:
        return HeldOut(Rate(clean, n), Rate(robust, n), None, None)
    ratio = float(np.median(ratios)) if ratios else None
    return HeldOut(Rate(clean, n), Rate(robust, n), below, ratio)
