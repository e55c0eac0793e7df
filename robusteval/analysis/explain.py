"""Explain what an attack did: by region, by image, by unit of the network.

Everything that is measured goes into one record, which `robusteval explain` prints and writes;
pictures are arrays beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from torch import Tensor, nn

from robusteval.analysis.case import Case, Work, attack_images, build_case, draw_correct
from robusteval.analysis.dissection import measure_units
from robusteval.analysis.focus import measure_focus, remark_same_maps
from robusteval.analysis.map_heights import measure_heights
from robusteval.analysis.refinement import measure_refinement
from robusteval.analysis.regions import (
    KINDS,
    Effects,
    build_grid,
    measure_regions,
    score_regions,
)
from robusteval.analysis.sparse_noise import (
    draw_portraits,
    measure_noise,
)
from robusteval.datasets.class_names import match_classes
from robusteval.datasets.concepts import Concepts, Generated
from robusteval.datasets.dataset import Batch, Data
from robusteval.datasets.images import choose_shown
from robusteval.errors import UsageError, check_argument
from robusteval.evaluation.plan import check_draw, prepare_attack
from robusteval.evaluation.shares import Share
from robusteval.evaluation.work_cache import WorkCache
from robusteval.interpreters.cam import cam, gradcam, gradcam_plus_plus
from robusteval.interpreters.scaling import resize
from robusteval.models.admission import check_data, wrap_module
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.environment import describe_environment
from robusteval.models.failures import raise_as_usage_error
from robusteval.models.identity import identify_model
from robusteval.progress import Progress, open_progress
from robusteval.runs.explanation_record import (
    ExplainedData,
    ExplainedImage,
    ExplainedPanel,
    ExplainedSamples,
    ExplainedThreat,
    ExplanationRecord,
    ExplanationSource,
)
from robusteval.runs.types import Spec
from robusteval.search.balls import measure_distances

SCHEMA = 1
MAPS: dict[str, Callable[..., Tensor]] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcam_plus_plus": gradcam_plus_plus,
}

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Explanation:
    """What was measured, and what can be shown."""

    record: ExplanationRecord
    panels: tuple[ExplainedPanel, ...]


def explain(
    classifier: nn.Module,
    data: Data,
    attack: str | Spec,
    *,
    samples: int = 20,
    seed: int = 0,
    side: int | None = None,
    layer: str | None = None,
    concepts: Concepts | None = None,
    progress: Progress | bool | None = None,
    cache: WorkCache | None = None,
    shards: Mapping[Share, WorkCache] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: str | None = None,
) -> Explanation:
    """Attack some images and take the perturbations apart.

    Parameters
    ----------
    classifier : nn.Module
        What is attacked; a `Classifier`, or any module, which is then wrapped. It comes out as it
        went in.
    data : Data
        Where the images come from.
    attack : str or Spec
        Such as ``"pgd:eps=8/255"``.
    samples : int
        Images to explain, drawn at random among those that are classified correctly.
    seed : int
        Decides the draw and every random number.
    side : int, optional
        Pixels along a region, see `robusteval.analysis.regions.build_grid`.
    layer : str, optional
        The layer whose maps and units are looked at; the last feature maps if not given.
    concepts : Concepts, optional
        What units may stand for; drawn colours, textures and shapes if not given.
    progress : Progress or bool, optional
        Where to say how far it is; True for bars on stderr.
    cache : WorkCache, optional
        Keeps what is finished of the attack and of the regions' scores, so that the same call after
        a stop goes on from there.
    shards : mapping of Share to WorkCache, optional
        Where `explain_share` has kept what it has finished of the same explanation; what none of
        them holds is done here.
    stopping : callable
        Asked after each batch of that; Interrupted once it says so.
    command : str, optional
        What a user typed to ask for it; kept in the record.

    Raises
    ------
    UsageError
        For a mistake in what was asked.
    NothingEvaluated
        If no image is classified correctly.
    RunError
        If the network or the attack broke.
    """
    check_draw(samples, seed)
    check_argument("attack", attack, (str, Spec), 'name one, such as "pgd:eps=8/255"')
    classifier, data = match_images(classifier, data)
    ready = prepare_attack(attack, classifier, data.shape, data=data)
    with raise_as_usage_error():
        regions = build_grid(*data.shape[1:], side)
    began = time.monotonic()
    with frozen(classifier), open_progress(progress) as shown:
        work = Work.resume(classifier, seed, cache, shown, stopping, shards)
        case = build_case(classifier, data, ready, samples, seed, work, shown)
        fooled, attacked = case.made != case.y, len(case.x)
        remarks: list[str] = []
        if ready.threat.targeted:
            there = case.goal == case.y  # an attack has nothing to do with them
            fooled, attacked = (case.made == case.goal) & ~there, int((~there).sum())
            remarks += remark_left_alone(len(case.x) - attacked)
        found = score_regions(classifier, case, regions, work)
        region_figures = measure_regions(classifier, case, found, regions, fooled)
        maps = draw_maps(classifier, case, layer, remarks, shown)
        record = ExplanationRecord(
            schema=SCHEMA,
            attack=str(ready.spec),
            threat=ExplainedThreat(**ready.threat._asdict()),
            samples=ExplainedSamples(samples, attacked, int(fooled.sum())),
            regions=region_figures,
            focus=measure_focus(case, maps, fooled),
            heights=tuple(measure_heights(maps, fooled)),
            noise=measure_noise(classifier, case, maps, fooled),
            refinement=measure_refinement(classifier, case, found, regions, maps, ready, fooled),
            units=measure_units(
                classifier,
                case,
                layer,
                concepts or Generated(data.shape),
                fooled,
                remarks,
                shown,
            ),
            images=tuple(
                describe_image(case, found, fooled, row, data.class_names)
                for row in range(len(case.x))
            ),
            remarks=tuple(remarks),  # last, as what is measured adds to them
            provenance=ExplanationSource(
                model=identify_model(classifier, data, case.positions),
                data=ExplainedData(data.name, len(data), data.shape),
                environment=describe_environment(classifier.device),
                resolved=ready.resolved,
                seed=seed,
                side=side,
                layer=layer,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=time.monotonic() - began,
                command=command,
            ),
        )
        portraits = draw_portraits(classifier, case, maps, layer)
    panels = tuple(
        build_panel(case, found, regions, maps, portraits, row) for row in range(len(case.x))
    )
    return Explanation(record, panels)


def remark_left_alone(count: int) -> list[str]:
    """Say how many images show the class to reach already, if any does."""
    if not count:
        return []
    said = "image is" if count == 1 else "images are"
    return [f"{count} {said} of the class that is to be reached, and left alone."]


def explain_share(
    classifier: nn.Module,
    data: Data,
    attack: str | Spec,
    share: Share,
    *,
    samples: int,
    seed: int,
    cache: WorkCache,
    progress: Progress,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Do what takes longest of an explanation for a share of its images: attack, and score regions.

    See `explain`, which takes it from the cache. An attack that minds which images are in a batch
    is left to it.

    Returns
    -------
    int
        How many images were done.
    """
    classifier, data = match_images(classifier, data)
    ready = prepare_attack(attack, classifier, data.shape, data=data)
    if ready.foreign:
        return 0
    with frozen(classifier):
        work = Work.resume(classifier, seed, cache, progress, stopping)
        images = draw_correct(classifier, data, samples, seed, progress)
        mine = share.own(np.arange(len(images.ids)), images.ids)
        if len(mine):
            images = Batch(images.x[mine], images.y[mine], images.ids[mine], images.index[mine])
            case = attack_images(classifier, images, ready, seed, work)
            score_regions(classifier, case, build_grid(*data.shape[1:]), work)
    return len(mine)


def match_images(classifier: nn.Module, data: Data) -> tuple[Classifier, Data]:
    """A module as a classifier, and the images with labels as it counts them."""
    check_data(data)
    if not isinstance(classifier, Classifier):
        classifier = wrap_module(classifier, data)
    return classifier, match_classes(data, classifier.num_classes, classifier.class_names)


def draw_maps(
    model: Classifier, case: Case, layer: str | None, remarks: list[str], progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """Draw maps ``(n, 1, h, w)`` of both images for both classes, by interpreter, then by view.

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
    drawn: dict[str, dict[str, Tensor]] = {}  # as they are, since what is rectified resizes apart
    progress.begin("Drawing maps", len(MAPS) * len(views))
    for name, interpreter in MAPS.items():
        options = {} if name == "cam" else {"layer": layer}
        try:
            drawn[name] = {}
            for view, (z, y) in views.items():
                with raise_as_usage_error():
                    drawn[name][view] = interpreter(model, z, y, **options)
                progress.advance(1)
            found[name] = {view: resize(maps, size) for view, maps in drawn[name].items()}
        except UsageError as error:
            if layer is not None and name != "cam":
                raise
            del drawn[name]
            remarks.append(f"No {name} maps: {error}.")
    progress.end()
    remarks.extend(remark_same_maps(drawn))
    return found


def describe_image(
    case: Case, found: Effects, fooled: Tensor, row: int, names: Sequence[str] | None
) -> ExplainedImage:
    """Describe one image in figures."""
    kinds = found.kinds[row].tolist()

    def name_class(number: int) -> str | None:
        return names[number] if names and 0 <= number < len(names) else None

    label, predicted = int(case.y[row]), int(case.made[row])
    sizes = measure_distances(case.x_adv[row : row + 1], case.x[row : row + 1])
    return ExplainedImage(
        index=int(case.positions[row]),
        id=f"{int(case.ids[row]):016x}",
        label=label,
        label_name=name_class(label),
        predicted=predicted,
        predicted_name=name_class(predicted),
        fooled=bool(fooled[row]),
        types={name: kinds.count(kind) for kind, name in enumerate(KINDS)},
        suppression=tuple(found.suppression[row].tolist()),
        promotion=tuple(found.promotion[row].tolist()),
        residual=tuple(found.residual[row].tolist()),
        **{norm: float(size[0]) for norm, size in sizes.items()},
    )


def build_panel(
    case: Case,
    found: Effects,
    regions: Tensor,
    maps: dict[str, dict[str, Tensor]],
    portraits: dict[str, Tensor],
    row: int,
) -> ExplainedPanel:
    """Gather one image for a picture; maps on the scale of the largest among the four."""
    shown: dict[str, Values] = {}
    name = ""
    for name, views in maps.items():  # the last is shown
        largest = max(float(view[row].abs().max()) for view in views.values()) or 1.0
        shown = {name: (view[row, 0] / largest).cpu().numpy() for name, view in views.items()}
    return ExplainedPanel(
        position=int(case.positions[row]),
        label=int(case.y[row]),
        predicted=int(case.made[row]),
        clean=choose_shown(case.x)[row].permute(1, 2, 0).cpu().numpy(),
        adversarial=choose_shown(case.x_adv)[row].permute(1, 2, 0).cpu().numpy(),
        regions=regions.cpu().numpy(),
        kinds=found.kinds[row].cpu().numpy(),
        strength=found.strength[row].cpu().numpy(),
        interpreter=name,
        maps=shown,
        portrait={
            name: choose_shown(drawn)[row].permute(1, 2, 0).cpu().numpy()
            for name, drawn in portraits.items()
        },
    )
