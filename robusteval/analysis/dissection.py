"""Units of a network: which an attack moves, and which stand for a concept.

Network dissection (arXiv:1704.05796) matches a unit with a concept when the places where it fires
most overlap with the places that show the concept. That the units which attacks move are units with
a concept is a finding of arXiv:1904.02057, whose measure of sensitivity could not be checked: the
one here is reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.analysis.case import Case
from robusteval.datasets.concepts import Concepts, Probe
from robusteval.errors import UsageError
from robusteval.interpreters.observing import observe_calls
from robusteval.models.classifier import Classifier
from robusteval.models.failures import raise_as_usage_error
from robusteval.models.seeds import per_image
from robusteval.progress import Progress
from robusteval.runs.explanation_record import MovedUnit, UnitFigures
from robusteval.search.noise import add_equal_noise

RESAMPLED = 1000  # times, for an interval over units
LISTED = 10  # units named one by one

FIRES = 0.005  # share of places at which a unit counts as firing, as in arXiv:1704.05796
MATCH = 0.04  # least overlap of a unit and its concept, as there
PLACES = 2**16  # activations per unit from which its threshold is taken, at most
FINEST = 56  # pixels along which maps and masks are compared, at most


class Dissection(NamedTuple):
    """What each of K units of a layer stands for."""

    overlap: Tensor  # (K, concepts) intersection over union, over all probes
    best: Tensor  # (K,) the concept of largest overlap
    score: Tensor  # (K,) that overlap

    @property
    def matched(self) -> Tensor:
        """The units that stand for a concept ``(K,)``."""
        return self.score >= MATCH


@torch.no_grad()
def dissect(
    model: nn.Module,
    concepts: Concepts,
    *,
    layer: str | None = None,
    batch: int = 32,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> Dissection:
    """Match the units of a layer with concepts.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits, in eval mode.
    concepts : Concepts
        Probes.
    layer : str, optional
        Name of a module; the last feature maps if not given.
    batch : int
        Probes at a time.
    limit : int, optional
        Probes, at most, drawn at random.
    seed : int
        Of this draw.
    progress : callable
        Told how many probes were done; twice as many as there are.
    """
    index = np.arange(len(concepts))
    if limit is not None and limit < len(index):
        index = np.sort(np.random.default_rng(seed).choice(index, limit, replace=False))
    device = next(model.parameters()).device

    def read_units(rows: list[int]) -> tuple[list[Probe], Tensor]:
        probes = [concepts.probe(int(row)) for row in rows]
        maps = compute_unit_maps(model, torch.stack([p.image for p in probes]).to(device), layer)
        progress(len(probes))
        return probes, maps

    kept: list[Tensor] = []
    for rows in iterate_chunks(index.tolist(), batch):
        _, maps = read_units(rows)  # (b, K, h', w')
        places = maps.transpose(0, 1).flatten(1)  # (K, places)
        share = max(1, PLACES * len(rows) // len(index))
        if share < places.shape[1]:
            draw = per_image(torch.tensor([seed + rows[0]]), torch.Size((places.shape[1],)))
            places = places[:, draw[0].argsort()[:share].to(device)]
        kept.append(places.cpu())
    threshold = choose_thresholds(torch.cat(kept, 1)).to(device)

    units, k = len(threshold), len(concepts.concepts)
    category = [concept.category for concept in concepts.concepts]
    shared = torch.zeros(units, k, dtype=torch.float64)
    fired = torch.zeros(units, k, dtype=torch.float64)
    shown = torch.zeros(k, dtype=torch.float64)
    for rows in iterate_chunks(index.tolist(), batch):
        probes, maps = read_units(rows)
        for probe, narrow in zip(probes, maps, strict=True):
            # one image at a time: (K, h, w) of a whole batch would be gigabytes
            size = [min(edge, FINEST) for edge in probe.image.shape[1:]]
            wide = F.interpolate(narrow[None], size=size, mode="bilinear", align_corners=False)[0]
            fires = (wide.flatten(1) >= threshold[:, None]).float()  # (K, h*w)
            looked = torch.tensor([name in probe.categories for name in category])
            fired += fires.sum(1, keepdim=True).cpu() * looked
            for at, mask in probe.masks.items():
                inside = F.interpolate(mask[None, None].float(), size=size)[0, 0].flatten()
                shared[:, at] += (fires @ inside.to(fires)).cpu()
                shown[at] += inside.sum()
    overlap = shared / (fired + shown - shared).clamp_min(1)
    score, best = overlap.max(1)
    return Dissection(overlap, best, score)


def iterate_chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    """Yield the rows, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def choose_thresholds(places: Tensor) -> Tensor:
    """The activation ``(K,)`` from which on each unit fires, given some of its ``(K, places)``.

    Reached at `FIRES` of the places, or more where many are equal; infinite for a unit that is the
    same everywhere.
    """
    top = max(1, round(FIRES * places.shape[1]))
    least = places.topk(top, dim=1).values[:, -1]
    return torch.where(least > places.amin(1), least, torch.inf)


def compute_unit_maps(model: nn.Module, x: Tensor, layer: str | None = None) -> Tensor:
    """Feature maps ``(n, K, h', w')`` of a layer, the last ones if none is named.

    ValueError if there are none.
    """
    _, calls = observe_calls(model, x, layer)
    parts = [maps for call in calls if (maps := call.read_maps()) is not None]
    if not parts or len(parts) < len(calls):
        raise ValueError(
            "the network has no feature maps of at least 2x2 before its head: name a layer"
        )
    return torch.cat(parts)[: len(x)]


class Sensitivity(NamedTuple):
    """How far K units are moved, in standard deviations of what they do on unchanged images."""

    attack: Tensor  # (K,) mean over images
    noise: Tensor  # (K,) mean over images, under noise of the same norm


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module, x: Tensor, x_adv: Tensor, seeds: Tensor, *, layer: str | None = None
) -> Sensitivity:
    """How far an attack moves the mean activation of each unit, and how far noise does.

    Reconstructed, see above. The noise has the l2 norm of each image's own perturbation, drawn
    from its seed ``(n,)``, and is cut by the pixel box.
    """
    noisy = add_equal_noise(x_adv, x, seeds).clamp(0, 1)
    before, after, control = (
        compute_unit_maps(model, z, layer).double().mean((2, 3)) for z in (x, x_adv, noisy)
    )
    natural = before.std(0) if len(x) > 1 else torch.ones_like(before[0])
    natural = torch.where(natural > 0, natural, torch.inf)  # a unit that never moves
    moved, shaken = ((z - before).abs().mean(0) / natural for z in (after, control))
    return Sensitivity(moved, shaken)


class Link(NamedTuple):
    """Whether units that an attack moves are units with a concept."""

    correlation: float  # of ranks (Spearman), of sensitivity and overlap; nan if either is constant
    low: float  # its 95 % interval (Fisher's transformation)
    high: float
    noise: float  # the same correlation for noise of equal norm
    gain: float  # how much larger the first is
    gain_low: float  # its 95 % interval, the units resampled
    gain_high: float
    matched: int
    units: int


def correlate_concepts(found: Sensitivity, concepts: Dissection) -> Link:
    """Correlate sensitivity and interpretability over the units of a layer."""
    n = len(found.attack)
    rho = correlate_units(found.attack, concepts.score)
    low = high = float("nan")
    if n > 3 and abs(rho) < 1:
        half = 1.96 * 1.03 / (n - 3) ** 0.5  # ranks vary a little more than normal values
        low, high = (float(np.tanh(np.arctanh(rho) + side * half)) for side in (-1, 1))
    control = correlate_units(found.noise, concepts.score)
    gain_low, gain_high = resample_gain(found, concepts)
    matched = int(concepts.matched.sum())
    return Link(rho, low, high, control, rho - control, gain_low, gain_high, matched, n)


def resample_gain(found: Sensitivity, concepts: Dissection) -> tuple[float, float]:
    """95 % interval of how much better the attack correlates with concepts than noise does.

    Units are resampled, the same for both; nan where a correlation is not defined.
    """
    columns = (found.attack, found.noise, concepts.score)
    values = torch.stack([column.double().cpu() for column in columns]).numpy()  # (3, K)
    n = values.shape[1]
    if n < 4 or any(np.ptp(row) == 0 for row in values):
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLED, n))
    ranks = stats.rankdata(values[:, draws], axis=2)  # (3, RESAMPLED, K), anew in each draw
    ranks -= ranks.mean(2, keepdims=True)
    length = np.sqrt((ranks**2).sum(2))
    with np.errstate(invalid="ignore"):  # a draw may be constant
        attack, noise = ((ranks[i] * ranks[2]).sum(1) / (length[i] * length[2]) for i in (0, 1))
    low, high = np.nanquantile(attack - noise, [0.025, 0.975])
    return float(low), float(high)


def correlate_units(one: Tensor, other: Tensor) -> float:
    """Correlation of the ranks of units ``(K,)``; nan if either side is constant."""
    sides = one.double().cpu().numpy(), other.double().cpu().numpy()
    if any(np.ptp(side) == 0 for side in sides):
        return float("nan")
    return float(np.asarray(stats.spearmanr(*sides)[0]))


def measure_units(
    model: Classifier,
    case: Case,
    layer: str | None,
    concepts: Concepts,
    fooled: Tensor,
    remarks: list[str],
    progress: Progress,
) -> UnitFigures | None:
    """Measure whether the units that the attack moves are units that stand for something.

    None without an image that is fooled, or for a network without units, with a remark.
    """
    if not bool(fooled.any()):
        return None
    try:
        with raise_as_usage_error():
            moved = measure_sensitivity(
                model,
                case.x[fooled],
                case.x_adv[fooled],
                case.seeds[fooled.cpu()],
                layer=layer,
            )
    except UsageError as error:
        if layer is not None:
            raise
        remarks.append(f"No units: {error}.")
        return None
    progress.begin("Dissecting units", 2 * len(concepts))
    known = dissect(model, concepts, layer=layer, progress=progress.advance)
    progress.end()
    tie = correlate_concepts(moved, known)
    order = moved.attack.argsort(descending=True)[:LISTED].tolist()
    return UnitFigures(
        layer=layer,
        concepts=concepts.name,
        probes=len(concepts),
        correlation=tie.correlation,
        low=tie.low,
        high=tie.high,
        noise=tie.noise,
        gain=tie.gain,
        gain_low=tie.gain_low,
        gain_high=tie.gain_high,
        matched=tie.matched,
        units=tie.units,
        most_moved=tuple(
            MovedUnit(
                unit=unit,
                attack=float(moved.attack[unit]),
                noise=float(moved.noise[unit]),
                concept=concepts.concepts[int(known.best[unit])].name,
                category=concepts.concepts[int(known.best[unit])].category,
                overlap=float(known.score[unit]),
                matched=bool(known.matched[unit]),
            )
            for unit in order
        ),
    )
