"""Columns of where a change lies beside a map of relevance, and of how two maps are ordered."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.localisation import (
    NOISE,
    RELEVANCE,
    map_noise,
    measure_energy,
    measure_overlap,
    measure_overlap_at,
)
from robusteval.interpreters.quality import correlate_ranks
from robusteval.interpreters.scaling import resize
from robusteval.runs.types import Columns, Values

EQUAL_AREA = 0.05  # share of the pixels that count as changed where attacks are compared
PLACES = (
    "precision",
    "perturbed",
    "recall",
    "iou",
    "iou_outside",
    "precision_at",
    "noise_precision_at",
    "energy_ratio",
    "noise_energy_ratio",
)
ORDERS = ("map_l2", "map_spearman", "map_kendall")


def describe_thresholds() -> dict[str, float]:
    """What decides these columns."""
    return {"changed": NOISE, "relevant": RELEVANCE, "equal_area": EQUAL_AREA}


def map_changes(x: Tensor, x_adv: Tensor, noisy: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """What was changed in each of some images, and in noise of the same l2 size.

    See `robusteval.evaluation.localisation.map_noise`.

    Parameters
    ----------
    x, x_adv, noisy : Tensor
        Images ``(n, c, h, w)`` before the attack, after it, and after noise of the same l2 size.

    Returns
    -------
    list of pair of Tensor
        Maps ``(1, 1, h, w)`` of an image and of its control; None where nothing is changed or the
        images are smaller than the window of SSIM.
    """
    found: list[tuple[Tensor, Tensor] | None] = []
    for i in range(len(x)):  # one by one, so that no sum depends on the batch
        one, other, control = x[i : i + 1], x_adv[i : i + 1], noisy[i : i + 1]
        try:
            same = torch.equal(one, other)
            found.append(None if same else (map_noise(other, one), map_noise(control, one)))
        except UsageError:  # smaller than its window
            found.append(None)
    return found


def measure_places(
    x: Tensor,
    x_adv: Tensor,
    noisy: Tensor,
    relevance: Values,
    changes: Sequence[tuple[Tensor, Tensor] | None],
) -> Columns:
    """Measure whether changes lie where the maps of the benign images are high.

    Can Perceptual Guidance Lead to Semantically Explainable Adversarial Perturbations?,
    arXiv:2106.12731, section 4, with the controls of `robusteval.evaluation.localisation`.

    Parameters
    ----------
    x, x_adv, noisy : Tensor
        Images ``(n, c, h, w)`` before the attack, after it, and after noise of the same l2 size.
    relevance : ndarray
        Maps ``(n, h', w')`` in [0, 1] of the images before the attack.
    changes : sequence of pair of Tensor
        By `map_changes`: the same whatever map they are held against.

    Returns
    -------
    Columns
        Arrays ``(n,)`` named as in `PLACES`: how changed and relevant pixels overlap, at the
        thresholds of the paper and at equal area, and the share of the squared change on relevant
        pixels over their area; the last two also under the noise. nan where nothing is changed or
        relevant, or the images are smaller than the window of SSIM.
    """
    found = {name: np.full(len(x), math.nan) for name in PLACES}
    for i in range(len(x)):  # one by one, so that no sum depends on the batch
        one, other, control = x[i : i + 1], x_adv[i : i + 1], noisy[i : i + 1]
        where = resize(torch.from_numpy(relevance[i])[None, None].float(), (x.shape[2], x.shape[3]))
        if not bool(where.isfinite().all()) or torch.equal(one, other):
            continue
        where = where.to(x.device)
        found["energy_ratio"][i] = float(measure_energy(other, one, where).ratio)
        found["noise_energy_ratio"][i] = float(measure_energy(control, one, where).ratio)
        noises = changes[i]
        if noises is None:
            continue
        changed, by_chance = noises
        for name, value in measure_overlap(changed, where)._asdict().items():
            found[name][i] = float(value)
        for name, noise in (("precision_at", changed), ("noise_precision_at", by_chance)):
            found[name][i] = float(measure_overlap_at(noise, where, EQUAL_AREA).precision)
    return found


def measure_orders(maps: Values, benign: Values) -> Columns:
    """Compare maps ``(n, h', w')`` with benign ones: root mean square and rank correlations.

    Kendall's is tau-b. nan where a map is not finite; for the correlations also where it is flat.
    """
    from scipy import stats

    found = {name: np.full(len(maps), math.nan) for name in ORDERS}
    for i, (a, b) in enumerate(zip(maps, benign, strict=True)):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            continue
        found["map_l2"][i] = math.sqrt(np.square(a.astype(np.float64) - b).mean())
        if np.ptp(a) and np.ptp(b):
            pair = (torch.from_numpy(np.ascontiguousarray(m))[None, None] for m in (a, b))
            found["map_spearman"][i] = float(correlate_ranks(*pair))
            found["map_kendall"][i] = float(np.asarray(stats.kendalltau(a.ravel(), b.ravel()))[0])
    return found
