"""Explain what an attack did: by region, by image, by unit of the network.

Everything that is measured goes into one record of plain values, which `robusteval explain` prints
and writes; pictures are arrays beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from robusteval.analysis.dissection import Link, dissect, link, sensitivity
from robusteval.analysis.regions import (
    BALANCED,
    COUNTER,
    INACTIVE,
    KINDS,
    PROMOTION,
    SUPPRESSION,
    Effects,
    by_region,
    effects,
    focus,
    grid,
    ranks,
    refine,
    top,
)
from robusteval.analysis.sparse_noise import REGIONS, places, portrait, roles
from robusteval.datasets.concepts import Concepts, Generated
from robusteval.datasets.dataset import Batch, Data, draw
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack, prepare_attack
from robusteval.interpreters.cam import cam, gradcam, gradcam_plus_plus
from robusteval.interpreters.scaling import resize
from robusteval.models.classifier import Classifier, counting, frozen, predictions
from robusteval.models.environment import environment
from robusteval.models.failures import raise_as_run_error, raise_as_usage_error
from robusteval.models.identity import identify_model
from robusteval.models.seeds import random_targets, sample_seeds
from robusteval.progress import Progress, Silent
from robusteval.runs.explanation_record import ExplainedPanel
from robusteval.runs.types import Spec
from robusteval.search.balls import measure_distances
from robusteval.search.descent import prune

SCHEMA = 1
MAPS: dict[str, Callable[..., Tensor]] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcam_plus_plus": gradcam_plus_plus,
}
DISCRIMINATIVE = 0.2  # share of a map that counts as the discriminative region
ROUNDS = 11  # forward passes that every way of refining may spend
RESAMPLED = 1000
LISTED = 10  # units named one by one
SPARSE = 0.1  # share of places up to which changes are looked at one by one

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Explanation:
    """What was measured, and what can be shown."""

    record: dict[str, Any]  # JSON-able, but for nan
    panels: tuple[ExplainedPanel, ...]


class Case(NamedTuple):
    """The images that are explained."""

    x: Tensor  # (n, c, h, w)
    x_adv: Tensor
    y: Tensor  # (n,) labels
    goal: Tensor  # (n,) targets, or labels of an untargeted attack
    made: Tensor  # (n,) predictions after the attack
    seeds: Tensor  # (n,)
    positions: Values  # in the data set
    ids: Values


def explain(
    classifier: Classifier,
    data: Data,
    attack: str | Spec,
    *,
    samples: int = 20,
    seed: int = 0,
    side: int | None = None,
    layer: str | None = None,
    concepts: Concepts | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Attack some images and take the perturbations apart.

    Parameters
    ----------
    classifier : Classifier
        What is attacked; it comes out as it went in.
    data : Data
        Where the images come from.
    attack : str or Spec
        Such as ``"pgd:eps=8/255"``.
    samples : int
        Images to explain, drawn at random among those that are classified correctly.
    seed : int
        Decides the draw and every random number.
    side : int, optional
        Pixels along a region, see `robusteval.analysis.regions.grid`.
    layer : str, optional
        The layer whose maps and units are looked at; the last feature maps if not given.
    concepts : Concepts, optional
        What units may stand for; drawn colours, textures and shapes if not given.
    progress : Progress, optional
        Where to say how far it is.

    Raises
    ------
    UsageError
        For a mistake in what was asked.
    NothingEvaluated
        If no image is classified correctly.
    RunError
        If the network or the attack broke.
    """
    progress = progress or Silent()
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    ready = prepare_attack(attack, classifier, data.shape)
    with raise_as_usage_error():
        regions = grid(*data.shape[1:], side)
    began = time.monotonic()
    with frozen(classifier):
        case = attacked(classifier, data, ready, samples, seed, progress)
        fooled = case.made != case.y
        if ready.threat.targeted:
            fooled = case.made == case.goal
        remarks: list[str] = []
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "attack": str(ready.spec),
            "threat": ready.threat._asdict(),
            "samples": {"asked": samples, "attacked": len(case.x), "fooled": int(fooled.sum())},
        }
        found = scored(classifier, case, regions, progress)
        record["regions"] = of_regions(classifier, case, found, regions, fooled, seed)
        maps = looked(classifier, case, layer, remarks, progress)
        record["focus"] = of_focus(case, maps, fooled, seed)
        record["noise"] = of_noise(classifier, case, maps, fooled, seed)
        record["refinement"] = of_refinement(classifier, case, found, regions, maps, ready, fooled)
        record["units"] = of_units(
            classifier, case, layer, concepts or Generated(data.shape), fooled, remarks, progress
        )
        record["images"] = [
            image_of(case, found, fooled, row, data.class_names) for row in range(len(case.x))
        ]
        record["remarks"] = remarks
        record["provenance"] = {
            "model": identify_model(classifier, data, case.positions),
            "data": {"name": data.name, "total": len(data), "shape": list(data.shape)},
            "environment": environment(classifier.device),
            "resolved": ready.resolved,
            "seed": seed,
            "side": side,
            "layer": layer,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - began,
        }
        portraits = portraits_of(classifier, case, maps, layer)
    panels = tuple(
        panel_of(case, found, regions, maps, portraits, row) for row in range(len(case.x))
    )
    return Explanation(record, panels)


def attacked(
    model: Classifier, data: Data, attack: Attack, samples: int, seed: int, progress: Progress
) -> Case:
    """The first images of the draw that are right, and what the attack makes of them."""
    order = draw(len(data), None, seed)
    right: list[Batch] = []
    count = 0
    progress.begin("Drawing images", samples)
    for start in range(0, len(order), samples):
        batch = data.batch(order[start : start + samples])
        if int(batch.y.max()) >= model.num_classes or int(batch.y.min()) < 0:
            raise UsageError(
                f"the labels of {data.name} go up to {int(batch.y.max())}, the network answers"
                f" with classes 0 to {model.num_classes - 1}: check that they belong together"
            )
        with torch.no_grad(), raise_as_run_error("the network cannot take the images"):
            keep = (predictions(model(batch.x.to(model.device))).cpu() == batch.y).numpy()
        keep &= np.cumsum(keep) <= samples - count
        rows = np.flatnonzero(keep)
        right.append(Batch(batch.x[rows], batch.y[rows], batch.ids[rows], batch.index[rows]))
        count += len(rows)
        progress.advance(len(rows))
        if count == samples:
            break
    progress.end()
    if not count:
        raise NothingEvaluated("no image is classified correctly, so there is nothing to explain")
    x = torch.cat([batch.x for batch in right]).to(model.device)
    y = torch.cat([batch.y for batch in right]).to(model.device)
    ids = np.concatenate([batch.ids for batch in right])
    seeds = sample_seeds(seed, ids)
    targeted = attack.threat.targeted
    goal = random_targets(y, seeds, model.num_classes) if targeted else y
    progress.begin(str(attack.spec), len(x))
    with raise_as_run_error("the attack broke"):
        x_adv = attack.perturb(model, x.clone(), goal.clone(), targeted=targeted, seeds=seeds)
    progress.advance(len(x))
    progress.end()
    x_adv, _ = repair(x_adv.detach().to(x), x, attack.threat)
    with torch.no_grad():
        made = predictions(model(x_adv))
    positions = np.concatenate([batch.index for batch in right])
    return Case(x, x_adv, y, goal, made, seeds, positions, ids)


def scored(model: Classifier, case: Case, regions: Tensor, progress: Progress) -> Effects:
    """Region scores of every image, a few images at a time for the sake of the progress bar."""
    parts = []
    progress.begin("Scoring regions", len(case.x))
    for rows in torch.split(torch.arange(len(case.x)), 4):
        some = rows.to(case.x.device)
        parts.append(effects(model, case.x[some], case.x_adv[some], case.y[some], regions))
        progress.advance(len(rows))
    progress.end()
    return Effects(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def of_regions(
    model: Classifier, case: Case, found: Effects, regions: Tensor, fooled: Tensor, seed: int
) -> dict[str, Any]:
    """What kinds of regions there are, and whether their size tells what they do."""
    kinds = found.kinds[fooled].cpu().numpy()  # (n, m)
    active = (kinds != INACTIVE) & (kinds != COUNTER)
    m = kinds.shape[1]
    shares = {}
    for kind in (SUPPRESSION, BALANCED, PROMOTION):
        each = (kinds == kind).sum(1) / np.where(active.sum(1), active.sum(1), np.nan)
        shares[KINDS[kind]] = mean_of(each, seed)
    for kind in (INACTIVE, COUNTER):
        shares[KINDS[kind]] = mean_of((kinds == kind).mean(1), seed)

    quick = effects(model, case.x, case.x_adv, case.y, regions, mode="gradient").strength
    size = region_norms(case.x_adv - case.x, regions)
    rows = torch.nonzero(fooled).flatten().tolist()
    pearson, kendall, order = [], [], []
    for row in rows:
        moved = (size[row] > 0).cpu().numpy()
        strength, norm, fast = (
            column[row].double().cpu().numpy()[moved] for column in (found.strength, size, quick)
        )
        pearson.append(correlation(stats.pearsonr, strength, norm))
        kendall.append(correlation(stats.kendalltau, strength, norm))
        order.append(correlation(stats.spearmanr, strength, fast))
    whole = (found.suppression.sum(1) - found.residual[:, 0]).abs()
    rest = found.residual.abs() / torch.stack(
        [whole, (found.promotion.sum(1) - found.residual[:, 1]).abs()], 1
    )
    return {
        "count": m,
        "types": shares,
        "with_size": {
            "pearson": mean_of(np.array(pearson), seed),
            "kendall": mean_of(np.array(kendall), seed),
        },
        "with_gradient_mode": mean_of(np.array(order), seed),
        "residual": {
            name: median_of(rest[fooled, side])
            for side, name in enumerate(("suppression", "promotion"))
        },
    }


def region_norms(delta: Tensor, regions: Tensor) -> Tensor:
    """l2 norm of each region of perturbations ``(n, c, h, w)``, ``(n, m)``."""
    flat = delta.double().square().sum(1).flatten(1).cpu()
    norms = torch.zeros(len(delta), int(regions.max()) + 1, dtype=torch.float64)
    return norms.index_add_(1, regions.flatten(), flat).sqrt().to(delta.device)


def looked(
    model: Classifier, case: Case, layer: str | None, remarks: list[str], progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """Maps ``(n, 1, h, w)`` of both images for both classes, by interpreter and then by view.

    An interpreter that this network cannot have is left out, with a remark.
    """
    size = (case.x.shape[2], case.x.shape[3])
    views = {
        "clean, label": (case.x, case.y),
        "clean, predicted": (case.x, case.made.clamp_min(0)),
        "adversarial, label": (case.x_adv, case.y),
        "adversarial, predicted": (case.x_adv, case.made.clamp_min(0)),
    }
    found: dict[str, dict[str, Tensor]] = {}
    progress.begin("Drawing maps", len(MAPS) * len(views))
    for name, interpreter in MAPS.items():
        options = {} if name == "cam" else {"layer": layer}
        try:
            found[name] = {}
            for view, (z, y) in views.items():
                with raise_as_usage_error():
                    maps = interpreter(model, z, y, **options)
                found[name][view] = resize(maps, size)
                progress.advance(1)
        except UsageError as error:
            if layer is not None and name != "cam":
                raise
            del found[name]
            remarks.append(f"No {name} maps: {error}.")
    progress.end()
    return found


def of_focus(
    case: Case, maps: dict[str, dict[str, Tensor]], fooled: Tensor, seed: int
) -> list[dict[str, Any]]:
    """How much of the perturbations lies where the network looks, beside what chance gives."""
    rows = []
    delta = (case.x_adv - case.x)[fooled]
    for name, views in maps.items():
        for view in ("clean, label", "adversarial, predicted"):
            if not len(delta):
                continue
            found = focus(delta, top(views[view][fooled], DISCRIMINATIVE))
            columns = {
                field: mean_of(getattr(found, field).cpu().numpy(), seed)
                for field in ("score", "area", "chance", "elsewhere", "shifted")
            }
            rows.append(
                {
                    "map": name,
                    "view": view,
                    **columns,
                    "focused": {"k": int(found.focused.sum()), "n": len(delta)},
                }
            )
    return rows


def of_noise(
    model: Classifier,
    case: Case,
    maps: dict[str, dict[str, Tensor]],
    fooled: Tensor,
    seed: int,
) -> dict[str, Any] | None:
    """Whether sparse noise obscures the true class or leads to the wrong one (arXiv:2506.17250).

    None where changes are not sparse: then every place is one of them.
    """
    x, x_adv, y = case.x[fooled], case.x_adv[fooled], case.y[fooled]
    changed = (x != x_adv).any(1).flatten(1).double().mean(1)
    if "gradcam" not in maps or not len(x) or float(changed.median()) > SPARSE:
        return None
    views = maps["gradcam"]
    lying = places(
        x,
        x_adv,
        views["clean, label"][fooled],
        views["adversarial, predicted"][fooled],
        shares=[DISCRIMINATIVE],
    )
    acting = roles(model, x, x_adv, y)

    def averaged(values: Tensor) -> dict[str, Any]:
        return mean_of(values.cpu().numpy(), seed)

    return {
        "top": DISCRIMINATIVE,
        "places": {
            name: {
                "share": averaged(lying.share[:, 0, column]),
                "lift": averaged(lying.lift[:, 0, column]),
            }
            for column, name in enumerate(REGIONS)
        },
        "roles": {
            name: averaged(getattr(acting, name))
            for name in ("obscuring", "leading", "fall", "rise")
        },
    }


def portraits_of(
    model: Classifier, case: Case, maps: dict[str, dict[str, Tensor]], layer: str | None
) -> dict[str, Tensor]:
    """Grad-CAM and Guided Grad-CAM before and after, each on the scale of both; empty without."""
    if "gradcam" not in maps:
        return {}
    drawn = portrait(model, case.x, case.x_adv, case.y, layer=layer)
    found = {}
    for one, other in (("clean", "adversarial"), ("clean_guided", "adversarial_guided")):
        pair = [getattr(drawn, name) for name in (one, other)]
        largest = torch.maximum(*(z.abs().amax((1, 2, 3), keepdim=True) for z in pair))
        for name, z in zip((one, other), pair, strict=True):
            found[name] = z / largest.clamp_min(1e-12)
    return found


def of_refinement(
    model: Classifier,
    case: Case,
    found: Effects,
    regions: Tensor,
    maps: dict[str, dict[str, Tensor]],
    attack: Attack,
    fooled: Tensor,
) -> list[dict[str, Any]]:
    """What is left of the perturbations when only what matters is kept; several ways, one budget.

    Each way may spend the same number of forward passes; pruning also goes backward.
    """
    targeted = attack.threat.targeted
    x, x_adv, goal = case.x[fooled], case.x_adv[fooled], case.goal[fooled]
    if not len(x):
        return []

    def by_map(importance: Tensor) -> Callable[[], Tensor]:
        return lambda: refine(model, x, x_adv, goal, importance, targeted=targeted).x_adv

    ways: dict[str, Callable[[], Tensor]] = {"as attacked": lambda: x_adv}
    for name in list(maps)[-1:]:  # the finest that the network has
        views = maps[name]
        union = torch.maximum(
            ranks(views["clean, label"][fooled]), ranks(views["adversarial, predicted"][fooled])
        )
        ways[f"where {name} looks"] = by_map(union)
    signed = found.suppression + found.promotion
    ways["by region score"] = by_map(by_region(signed[fooled], regions))
    ways["by size of change"] = by_map((x_adv - x).abs().sum(1, keepdim=True))
    ways["pruned without a map"] = lambda: prune(
        model, x, x_adv, goal, targeted=targeted, rounds=ROUNDS
    )
    rows = []
    for name, way in ways.items():
        began = time.perf_counter()
        with counting(model, len(x), x.device) as passes:
            z = way()
        seconds = time.perf_counter() - began
        with torch.no_grad():
            made = predictions(model(z))
        still = made == goal if targeted else made != goal
        rows.append(
            {
                "way": name,
                "still_fooled": {"k": int(still.sum()), "n": len(x)},
                **{norm: median_of(sizes) for norm, sizes in measure_distances(z, x).items()},
                "forwards": float(passes.forwards.mean()),
                "backwards": float(passes.backwards.mean()),
                "seconds": seconds,
            }
        )
    return rows


def of_units(
    model: Classifier,
    case: Case,
    layer: str | None,
    concepts: Concepts,
    fooled: Tensor,
    remarks: list[str],
    progress: Progress,
) -> dict[str, Any] | None:
    """Whether the units that the attack moves are units that stand for something."""
    if not bool(fooled.any()):
        return None
    try:
        with raise_as_usage_error():
            moved = sensitivity(
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
    tie: Link = link(moved, known)
    order = moved.attack.argsort(descending=True)[:LISTED].tolist()
    return {
        "layer": layer,
        "concepts": concepts.name,
        "probes": len(concepts),
        **tie._asdict(),
        "most_moved": [
            {
                "unit": unit,
                "attack": float(moved.attack[unit]),
                "noise": float(moved.noise[unit]),
                "concept": concepts.concepts[int(known.best[unit])].name,
                "category": concepts.concepts[int(known.best[unit])].category,
                "overlap": float(known.score[unit]),
                "matched": bool(known.matched[unit]),
            }
            for unit in order
        ],
    }


def image_of(
    case: Case, found: Effects, fooled: Tensor, row: int, names: Sequence[str] | None
) -> dict[str, Any]:
    """One image in figures."""
    kinds = found.kinds[row].tolist()

    def called(number: int) -> str | None:
        return names[number] if names and 0 <= number < len(names) else None

    label, predicted = int(case.y[row]), int(case.made[row])
    sizes = measure_distances(case.x_adv[row : row + 1], case.x[row : row + 1])
    return {
        "index": int(case.positions[row]),
        "id": f"{int(case.ids[row]):016x}",
        "label": label,
        "label_name": called(label),
        "predicted": predicted,
        "predicted_name": called(predicted),
        "fooled": bool(fooled[row]),
        "types": {name: kinds.count(kind) for kind, name in enumerate(KINDS)},
        "suppression": found.suppression[row].tolist(),
        "promotion": found.promotion[row].tolist(),
        "residual": found.residual[row].tolist(),
        **{norm: float(size[0]) for norm, size in sizes.items()},
    }


def panel_of(
    case: Case,
    found: Effects,
    regions: Tensor,
    maps: dict[str, dict[str, Tensor]],
    portraits: dict[str, Tensor],
    row: int,
) -> ExplainedPanel:
    """One image for a picture; maps on the scale of the largest among the four."""
    shown: dict[str, Values] = {}
    name = ""
    for name, views in maps.items():  # the last is shown
        largest = max(float(view[row].abs().max()) for view in views.values()) or 1.0
        shown = {name: (view[row, 0] / largest).cpu().numpy() for name, view in views.items()}
    return ExplainedPanel(
        position=int(case.positions[row]),
        label=int(case.y[row]),
        predicted=int(case.made[row]),
        clean=case.x[row].permute(1, 2, 0).cpu().numpy(),
        adversarial=case.x_adv[row].permute(1, 2, 0).cpu().numpy(),
        regions=regions.cpu().numpy(),
        kinds=found.kinds[row].cpu().numpy(),
        strength=found.strength[row].cpu().numpy(),
        interpreter=name,
        maps=shown,
        portrait={
            name: drawn[row].permute(1, 2, 0).cpu().numpy() for name, drawn in portraits.items()
        },
    )


def correlation(measure: Callable[..., Any], one: Values, other: Values) -> float:
    """A correlation of two columns; nan for fewer than three or constant ones."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(measure(one, other).statistic)


def mean_of(values: Values, seed: int) -> dict[str, Any]:
    """The mean over images with its 95 % interval: the images resampled, not their parts."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    means = np.random.default_rng(seed).choice(values, (RESAMPLED, n)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": n}


def median_of(values: Tensor) -> float:
    """The median of what is finite; nan of nothing."""
    finite = values[values.isfinite()].double().cpu().numpy()
    return float(np.median(finite)) if len(finite) else math.nan
