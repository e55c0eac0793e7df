"""Which units of a layer to switch off, and what that is worth.

Units are ranked on some images and judged on others: under an attack made for the unmasked network
and under one made for the masked network, beside a random mask of equal size.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.dataset import Batch, Data, draw
from robusteval.errors import UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.admission import check_images, check_labels
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.failures import raise_as_run_error
from robusteval.models.masked import Masked, measure_activations
from robusteval.progress import Progress, Silent
from robusteval.runs.types import Spec

from .unit_ranking import (
    attack_images,
    check_hidden,
    find_penultimate_layer,
    measure_importance,
    measure_sensitivity,
)

Rank = Literal["sensitivity", "importance", "random"]
LEAST = 10  # images to rank by, and as many to judge on


class ChosenMasks(NamedTuple):
    """Masks, and on what they were chosen."""

    layer: str
    masks: Tensor  # (K,) or (C, K)
    control: Tensor  # of the same shape, as many units masked at random
    ranked: int  # images that units were ranked by
    ranking: Batch  # images that must not be judged on
    judging: Batch

    @property
    def masked(self) -> int:
        """Units that are masked; of each class, if classes have masks."""
        return int((self.masks == 0).sum(-1).max())


def choose_masks(
    classifier: Classifier,
    data: Data,
    *,
    rank: Rank = "sensitivity",
    units: int | Fraction,
    layer: str | None = None,
    per_class: bool = False,
    attack: str | Spec = "pgd:eps=1/255,steps=20,stop=never",
    samples: int = 500,
    seed: int = 0,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> ChosenMasks:
    """Choose the units of a layer to mask.

    Parameters
    ----------
    classifier : Classifier
        Unmasked; it comes out as it went in.
    data : Data
        Where the images come from; of those drawn the first half is ranked by.
    rank : {"sensitivity", "importance", "random"}
        What is masked: the units that the attack moves most, in standard deviations of what they
        do on unchanged images (reconstructed after arXiv:1904.02057); those whose removal changes
        the logit of the true class least (as in arXiv:2409.15190); or any.
    units : int or Fraction
        How many are masked, or what share of the layer's; with `per_class`, of each class.
    layer : str, optional
        Name of a module; the last feature maps before pooling and the final linear layer if not
        given.
    per_class : bool
        Rank units by the images of each class, for masks ``(C, K)``.
    attack : str or Spec
        What moves the units.
    samples : int
        Images, to rank by and to judge on.
    seed : int
        Decides the draw and every random number.
    done : WorkCache, optional
        Keeps attacked images, so that the same call after a stop goes on from there.
    progress : Progress, optional
        Where to say how far it is.

    Raises
    ------
    UsageError
        For a mistake in what was asked.
    NothingEvaluated
        No image to rank by is classified correctly.
    RunError
        The network or the attack broke.
    """
    progress = progress or Silent()
    if per_class and rank == "random":
        raise UsageError(
            "random units know of no class: leave --per-class away (a random mask is judged beside"
            " every other one anyway)"
        )
    if isinstance(classifier.network, Masked):
        raise UsageError("the checkpoint has masks already: start from the one that it was made of")
    index = draw(len(data), samples, seed)
    check_labels(data, index, classifier)
    check_images(data, index, classifier)
    ready = prepare_attack(attack, classifier, data.shape, data=data)
    ranking, judging = split_for_ranking(data, index, progress)
    k = classifier.num_classes
    with frozen(classifier), exact_arithmetic():
        x, y = (part.to(classifier.device) for part in ranking[:2])
        with raise_as_run_error("the network broke"):
            if layer is None:
                layer = find_penultimate_layer(classifier, x)
            else:
                check_hidden(classifier, x, layer)
            width = measure_activations(classifier, x[:2], layer).shape[1]
        count = count_units(units, width, layer)
        if per_class:
            check_every_class(y, k)
        if rank == "sensitivity":
            x, x_adv, y = attack_images(
                classifier, ranking, ready, seed, done or WorkCache(), progress
            )
            scores = -measure_sensitivity(classifier, x, x_adv, layer)
        elif rank == "importance":
            scores = measure_importance(classifier, x, y, layer, progress)
        else:
            scores = torch.zeros(len(x), 0)
    shape = (k, width) if per_class else (width,)
    control = draw_random_masks(shape, count, seed, 1)
    if rank == "random":
        masks = draw_random_masks(shape, count, seed, 0)
    elif per_class:
        check_every_class(y, k)
        masks = mask_lowest(torch.stack([scores[y == c].mean(0) for c in range(k)]), count)
    else:
        masks = mask_lowest(scores.mean(0), count)
    return ChosenMasks(layer, masks, control, len(scores), ranking, judging)


def split_for_ranking(
    data: Data, index: np.ndarray[Any, Any], progress: Progress
) -> tuple[Batch, Batch]:
    """Split images into those to rank by and others to judge on, none of them in both."""
    progress.begin("Reading data", len(index))
    middle = len(index) // 2
    ranking, judging = data.batch(index[:middle]), data.batch(index[middle:])
    progress.advance(len(index))
    progress.end()
    fresh = ~np.isin(judging.ids, ranking.ids)
    if min(middle, int(fresh.sum())) < LEAST:
        raise UsageError(
            f"{len(index)} images of {data.name} are too few: half of them rank the units, the"
            f" others judge the mask, and each needs {LEAST} different ones"
        )
    if bool((ranking.y == ranking.y[0]).all()):
        raise UsageError(
            f"the images of {data.name} are all of class {int(ranking.y[0])}: masks need several"
        )
    rows = torch.from_numpy(fresh)
    kept = Batch(judging.x[rows], judging.y[rows], judging.ids[fresh], judging.index[fresh])
    return ranking, kept


def count_units(units: int | Fraction, width: int, layer: str) -> int:
    """Count how many units are masked; UsageError if that is none or all, or no number of units."""
    if not isinstance(units, int) and units > 1:
        raise UsageError(
            f"{float(units):g} is no number of units: give a whole one, or a share of the layer"
            " below 1"
        )
    count = units if isinstance(units, int) else round(units * width)
    asked = f"{float(units):g} for the number of masked units means"
    if count < 1:
        raise UsageError(f"{asked} none of the {width} of layer {layer}")
    if count >= width:
        raise UsageError(f"{asked} all of the {width} of layer {layer}: leave at least one")
    return count


def check_every_class(y: Tensor, classes: int) -> None:
    """Refuse masks for classes of which nothing is known."""
    missing = sorted(set(range(classes)) - set(y.tolist()))
    if missing:
        raise UsageError(
            f"no image to rank by is of class {missing[0]}"
            f"{f' or {len(missing) - 1} others' if len(missing) > 1 else ''} (or none is classified"
            " correctly): give more --samples, or leave --per-class away"
        )


def mask_lowest(scores: Tensor, count: int) -> Tensor:
    """Mask units: zeros at the `count` lowest of scores ``(…, K)``; of equal ones the first."""
    masks = torch.ones(scores.shape)
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return masks.scatter(-1, lowest, 0.0)


def draw_random_masks(shape: tuple[int, ...], count: int, seed: int, stream: int) -> Tensor:
    """Draw masks of this shape ``(…, K)`` with `count` zeros in each, wherever."""
    scores = np.random.default_rng([seed, stream]).random(shape)
    return mask_lowest(torch.from_numpy(scores), count)
