"""Fitting a detector to a classifier: from images and attacks to a file and a report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from robusteval.datasets.dataset import Data
from robusteval.errors import UsageError
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, frozen
from robusteval.progress import Progress, Silent
from robusteval.runs.detector_record import (
    DetectorCost,
    DetectorParts,
    DetectorRecord,
    ImageCounts,
    LearntAttack,
)

from .detector import Fit, MapDetector, identify_classifier
from .detector_fitting import EPOCHS, Fitter, TreeFit
from .detector_metrics import count_share
from .detector_remarks import write_remarks
from .detector_report import DetectorFigures, DetectorReport
from .detector_tasks import TaskMaker
from .detector_view import choose_view, count_forwards, hash_mask_network
from .image_variants import VariantMaker
from .imitation import Imitator, fit_imitator, measure_fidelity
from .map_features import Channels, Extractor
from .map_rows import RowMaker, Rows
from .splits import Parts, Sources, read_sources, split_groups
from .study import Study


class FittedDetector(NamedTuple):
    """A detector that was fitted, and the report on it."""

    detector: MapDetector
    report: DetectorRecord


def fit_detector(
    model: Classifier,
    data: Data,
    interpreters: Sequence[str],
    attacks: Sequence[Attack],
    *,
    channels: Channels | None = None,
    extractor: Extractor = "small_cnn",
    confidence: bool = False,
    samples: int | None = 600,
    seed: int = 0,
    start: nn.Module | None = None,
    tune: bool = False,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> FittedDetector:
    """Fit a detector of attacked images, and judge it on images that had no say.

    Source images are parted first, alike ones together; every variant of an image stays in its
    part. Trees and features are fitted on 60 % of them, rounds and thresholds are decided by 20 %,
    and the last 20 % are looked at once.

    Parameters
    ----------
    model : Classifier
        What is attacked.
    data : Data
        Images that the detector will never be judged on again.
    interpreters : sequence of str
        Two or three, such as ``"grad"`` or ``"mask:blur=15"``.
    attacks : sequence of Attack
        From `robusteval.evaluation.plan.prepare_attack`; the detector learns from all of them.
    channels : {"pair", "pair_product", "triple"}, optional
        By the number of interpreters if not given.
    extractor : {"raw", "small_cnn", "vgg16"}
        What makes features of maps, besides the statistics of how they agree.
    confidence : bool
        Let it also look at how sure the classifier is, which is no explanation.
    samples : int, optional
        Source images, drawn at random; all if None.
    seed : int
        Decides everything that is drawn.
    start : Module, optional
        VGG-16 with weights, for `vgg16`.
    tune : bool
        Choose depth, rate and columns of the trees by grouped cross-validation.
    done : WorkCache, optional
        Keeps attacked images, maps and fits, so that the same call after a stop goes on from there.
    progress : Progress, optional
        Where to say how far it is.

    Returns
    -------
    Found
        The detector, and the report on it.

    Raises
    ------
    UsageError
        If there are too few images or classes, an attack that succeeds too seldom, or an
        interpreter that the network cannot have.
    """
    view = choose_view(interpreters, channels, extractor, confidence, data.shape)
    study = Study(model, data, view, attacks, seed, progress or Silent(), done or WorkCache())
    with prepare_fit(study, samples, start, tune=tune) as (sources, judgement):
        return judge_fit(study, sources, judgement)


def fit_unjudged(
    model: Classifier,
    data: Data,
    interpreters: Sequence[str],
    attacks: Sequence[Attack],
    *,
    extractor: Extractor = "small_cnn",
    seed: int = 0,
    start: nn.Module | None = None,
    progress: Progress | None = None,
) -> MapDetector:
    """Fit a detector to all images of some data as `fit_detector` does, and nothing else."""
    view = choose_view(interpreters, None, extractor, False, data.shape)
    study = Study(model, data, view, attacks, seed, progress or Silent())
    with prepare_fit(study, None, start) as (sources, judgement):
        study.progress.begin("Fitting a detector", EPOCHS)
        main, thresholds, _ = judgement.fit_main()
        study.progress.end()
        imitator, _ = imitate_fit(main, judgement.rows, judgement.parts, seed)
        return assemble_fit(study, sources, judgement.parts, main, thresholds, imitator)


@contextmanager
def prepare_fit(
    study: Study, samples: int | None, start: nn.Module | None, *, tune: bool = False
) -> Iterator[tuple[Sources, DetectorReport]]:
    """Attack the images of a study and look at all of them: the images, and what fits and judges.

    UsageError if that cannot be done.
    """
    if not study.attacks:
        raise UsageError("a detector needs at least one attack to learn from")
    if (study.view.extractor == "vgg16") != (start is not None):
        raise UsageError(
            "the extractor vgg16, and no other, needs VGG-16 with weights to start from"
        )
    names = tuple(str(attack.spec) for attack in study.attacks)
    if len(set(names)) < len(names):
        raise UsageError(f"the same attack is asked for twice: {', '.join(names)}")
    study.view.check_network(study.model)
    with frozen(study.model), exact_arithmetic():
        sources = read_sources(
            study.model, study.data, samples, study.seed, study.batch, study.progress
        )
        parts = split_groups(sources, study.seed)
        variants = list(VariantMaker(study, sources, parts).make_variants())
        with RowMaker(study, sources, variants).make_rows() as rows:
            fitter = Fitter(
                rows,
                study.view.extractor,
                study.seed,
                study.model.device,
                start,
                study.progress.advance,
                study.circumstances,
                study.done,
            )
            tasks = TaskMaker(rows, parts, study.view)
            yield sources, DetectorReport(tasks, fitter, names, sources.ids, study.seed, tune)


def judge_fit(study: Study, sources: Sources, judgement: DetectorReport) -> FittedDetector:
    """Fit the detector of a study to its rows, and judge it."""
    rows, parts = judgement.rows, judgement.parts
    study.progress.begin("Fitting, and looking for leaks", EPOCHS * judgement.fits)
    main, thresholds, figures = judgement.judge_detector()
    study.progress.end()
    imitator, fidelity = imitate_fit(main, rows, parts, study.seed)
    detector = assemble_fit(study, sources, parts, main, thresholds, imitator)
    report = describe_study(study, detector, sources, parts, rows, figures, fidelity)
    return FittedDetector(detector, replace(report, remarks=tuple(write_remarks(report))))


def imitate_fit(main: TreeFit, rows: Rows, parts: Parts, seed: int) -> tuple[Imitator, float]:
    """Fit a network to the scores of a detector, and measure how well it orders unseen images."""
    known = [np.flatnonzero(np.isin(rows.group, part)) for part in parts[:3]]
    everything = np.concatenate(known)
    x = main.standardise_features(rows, everything).cpu().numpy()
    scores = main.trees.predict_scores(x)
    ends = np.cumsum([len(part) for part in known])
    train, validation, test = np.split(np.arange(len(everything)), ends[:2])
    imitator = fit_imitator(x, scores, train, validation, seed)
    return imitator, measure_fidelity(imitator, x[test], scores[test])


def assemble_fit(
    study: Study,
    sources: Sources,
    parts: Parts,
    main: TreeFit,
    thresholds: dict[str, float],
    imitator: Imitator,
) -> MapDetector:
    """Assemble the detector that goes into the file."""
    known = np.isin(sources.groups, np.concatenate(parts[:2]))
    fit = Fit(
        model=identify_classifier(study.model),
        rts=hash_mask_network(study.view, study.model),
        thresholds=thresholds,
        forwards=count_forwards(study.view, study.model, *study.draw_few(sources)),
        attacks=tuple(str(attack.spec) for attack in study.attacks),
        data=study.data.name,
        train=int(np.isin(sources.groups, parts.train).sum()),
        validation=int(np.isin(sources.groups, parts.validation).sum()),
        rounds=main.rounds,
        seed=study.seed,
    )
    return MapDetector(
        study.view,
        fit,
        main.extractor,
        main.center,
        main.spread,
        main.booster,
        np.unique(sources.ids[known]),
        imitator=imitator.to(study.model.device),
    )


def describe_study(
    study: Study,
    detector: MapDetector,
    sources: Sources,
    parts: Parts,
    rows: Rows,
    figures: DetectorFigures,
    fidelity: float,
) -> DetectorRecord:
    """Describe model, images, attacks and figures of a fit: the report before any remark."""
    facts = detector.facts
    train, validation, test = (int(np.isin(sources.groups, part).sum()) for part in parts[:3])
    found = []
    for attack in study.attacks:
        mine = rows.list_variants(str(attack.spec))
        fooled = count_share(rows.fooled[mine])
        found.append(LearntAttack(str(attack.spec), fooled.k, fooled.n, fooled.low, fooled.high))
    return DetectorRecord(
        detector=DetectorParts(
            interpreters=tuple(facts["interpreters"]),
            channels=facts["channels"],
            extractor=facts["extractor"],
            confidence=facts["confidence"],
        ),
        model=detector.fit.model,
        data=study.data.name,
        seed=study.seed,
        images=ImageCounts(
            total=len(sources.x),
            alike=len(sources.x) - len(np.unique(sources.groups)),
            train=train,
            validation=validation,
            test=test,
        ),
        attacks=tuple(found),
        features=len(detector.center),
        cost=DetectorCost(detector.fit.forwards, measure_slowdown(study, detector, sources)),
        headline=figures.headline,
        rounds=figures.rounds,
        trees=figures.trees,
        per_attack=figures.per_attack,
        negatives=figures.negatives,
        baselines=figures.baselines,
        matrix=figures.matrix,
        simpler=figures.simpler,
        leaks=figures.leaks,
        imitation=fidelity if math.isfinite(fidelity) else None,
        remarks=(),
        command=None,
    )


def measure_slowdown(study: Study, detector: MapDetector, sources: Sources) -> float:
    """Measure the duration of a score as a multiple of that of a prediction."""
    x, seeds = study.draw_few(sources)

    def seconds(work: Callable[[], object]) -> float:
        taken: list[float] = []
        while len(taken) < 3 and sum(taken) < 1:
            started = time.perf_counter()
            work()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            taken.append(time.perf_counter() - started)
        return min(taken)

    with torch.no_grad():
        alone = seconds(lambda: study.model(x))
    return seconds(lambda: detector.score(study.model, x, seeds)) / alone
