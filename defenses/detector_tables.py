"""Detectors of all pairs and triples of interpreters, as published and as they should be judged.

Tables V and VI of Hardening Interpretable Deep Learning Systems, arXiv:2211.15926, in one pass:
attacks and maps are made once, and every detector looks at its own planes of them. The paper says
neither how its rows were split nor how often an image as it is raises the alarm, and has no
statistics of how maps agree; so the accuracy of its protocol (`as_published`: images as they are
against attacked ones, features alone, rows parted at random) stands beside what is left of it where
an image and its attacked twin stay together, other images that are no attack count too, and classes
were not seen before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.dataset import Data
from robusteval.errors import UsageError
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import WorkCache
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, frozen
from robusteval.progress import Progress, Silent
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.detector_record import Combination, EstimateOfImages

from .boosting import FPRS, choose_threshold
from .detector_fitting import EPOCHS, Fitter, Task, TreeFit
from .detector_metrics import Resampling, Scored, count_share
from .detector_tasks import NEGATIVES, TaskMaker
from .detector_view import View
from .image_variants import Variant, VariantMaker
from .map_features import (
    Extractor,
    choose_side,
    compute_statistics,
    list_statistics,
    resize_maps,
)
from .map_rows import RowMaker
from .splits import LEAST, Parts, Sources, read_sources, split_groups
from .study import Study
from .transforms import Array, to_bytes

PRODUCT = ":product"  # behind the two names of a pair
UNSEEN = 0.2  # share of the classes that are held out


@dataclass(frozen=True)
class WideView(View):
    """The maps of any number of interpreters, and the product of each two."""

    @property
    def planes(self) -> int:
        """Channels of a stack: maps, then products."""
        maps = len(self.interpreters)
        return maps + maps * (maps - 1) // 2

    def measure_maps(self, maps: Sequence[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Stack maps and products ``(n, k, side, side)``, and compute statistics ``(n, d)``."""
        parts = [resize_maps(each, self.side) for each in maps]
        products = [one * other for one, other in combinations(parts, 2)]
        return torch.cat([*parts, *products], 1), compute_statistics(
            torch.cat(parts, 1), len(parts), None
        )


class Combined(NamedTuple):
    """One detector: the maps that it looks at, its planes, and its statistics."""

    name: str
    members: tuple[str, ...]
    planes: tuple[int, ...]
    columns: tuple[int, ...]


def measure_combinations(
    model: Classifier,
    data: Data,
    names: Sequence[str],
    interpreters: Sequence[str],
    attacks: Mapping[str, Attack],
    *,
    extractor: Extractor = "raw",
    samples: int | None = 600,
    seed: int = 0,
    start: nn.Module | None = None,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> tuple[list[Combination], dict[str, str]]:
    """Fit and judge a detector for each combination of interpreters.

    Parameters
    ----------
    model : Classifier
        What is attacked.
    data : Data
        Images, parted for every fit into those to learn from and those to judge.
    names : sequence of str
        Such as ``"grad+cam"``, ``"grad+cam:product"`` or ``"grad+cam+mask"``.
    interpreters : sequence of str
        All of their maps, such as ``"grad"`` or ``"mask:blur=15"``, each of another name.
    attacks : mapping of str to Attack
        By the name of the interpreter that an attack minds. A detector learns from those that mind
        one of its maps, as in the paper.
    extractor, samples, seed, start, done, progress
        As for `robusteval.defenses.detection.fit_detector`.

    Returns
    -------
    tuple
        Figures in the order of `names`, and by name why a combination has none: maps that the
        network cannot have, or attacks that hardly ever succeed.

    Raises
    ------
    UsageError
        If there are too few images or classes, or a combination that is none.
    """
    progress = progress or Silent()
    missing: dict[str, str] = {}
    possible, lacking = find_possible(model, data, interpreters)
    for name in names:
        reasons = [lacking[each] for each in split_name(name) if each in lacking]
        if reasons:
            missing[name] = "; ".join(reasons)
    names = [name for name in names if name not in missing]
    attacks = {name: attack for name, attack in attacks.items() if name not in lacking}
    if not names:
        return [], missing
    view = WideView(
        tuple(possible), "triple", extractor, choose_side(extractor, data.shape), False,
        data.shape,
    )  # fmt: skip
    chosen = [combine(name, view) for name in names]
    study = Study(model, data, view, list(attacks.values()), seed, progress, done or WorkCache())
    with frozen(model), exact_arithmetic():
        sources = read_sources(model, data, samples, seed, study.batch, progress)
        parts = split_groups(sources, seed)
        variants, weak = make_successful_variants(study, sources, parts)
        with RowMaker(study, sources, variants).make_rows() as rows:
            tasks = TaskMaker(rows, parts, view)
            fitter = Fitter(
                rows, extractor, seed, model.device, start, progress.advance,
                study.circumstances, study.done,
            )  # fmt: skip
            judge = CombinationJudge(tasks, fitter, sources, seed)
            progress.begin("Fitting detectors", 4 * EPOCHS * len(chosen))
            found: list[Combination] = []
            for each in chosen:
                specs = {name: str(attacks[name].spec) for name in each.members if name in attacks}
                usable = [spec for spec in specs.values() if spec not in weak]
                if usable:
                    found.append(judge.judge_combination(each, usable))
                else:
                    reasons = [weak[spec] for spec in specs.values()] or [
                        "no attack minds its maps"
                    ]
                    missing[each.name] = "; ".join(reasons)
                    progress.advance(4 * EPOCHS)
            progress.end()
    return found, missing


def find_possible(
    model: Classifier, data: Data, interpreters: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The interpreters that the network can have, and why not the others."""
    possible, lacking = [], {}
    for text in interpreters:
        spec = INTERPRETERS.check_spec(parse(text))
        try:
            Interpreter.build(spec, model, data.shape)
            possible.append(text)
        except UsageError as error:
            lacking[spec.name] = str(error)
    return possible, lacking


def split_name(name: str) -> tuple[str, ...]:
    """The interpreters of a combination."""
    return tuple(name.removesuffix(PRODUCT).split("+"))


def combine(name: str, view: View) -> Combined:
    """The planes and statistics of a combination by name; UsageError if there is none."""
    known = [spec.name for spec in view.specs]
    members = split_name(name)
    product = name.endswith(PRODUCT)
    right = 2 <= len(set(members)) == len(members) <= 3 and set(members) <= set(known)
    if not right or (product and len(members) != 2):
        raise UsageError(
            f"{name} is no detector of {', '.join(known)}: name two or three of them, as grad+cam,"
            f" and {PRODUCT} behind two"
        )
    planes = [known.index(each) for each in members]
    if product:
        pairs = list(combinations(range(len(known)), 2))
        one, other = sorted(planes)
        planes.append(len(known) + pairs.index((one, other)))
    ordered = [each for each in known if each in members]
    wanted = list_statistics(ordered, False)
    columns = tuple(view.statistic_names.index(each) for each in wanted)
    return Combined(name, members, tuple(planes), columns)


def make_successful_variants(
    study: Study, sources: Sources, parts: Parts
) -> tuple[list[Variant], dict[str, str]]:
    """Make all variants, and name the attacks that succeed too seldom to learn from."""
    maker = VariantMaker(study, sources, parts)
    x8 = to_bytes(sources.x)
    variants = [Variant("clean", np.arange(len(x8)), x8)]
    right = (study.predict_classes(sources.x) == sources.labels).nonzero().flatten().numpy()
    changed, moved = x8.copy(), np.zeros(len(x8), dtype=bool)
    weak: dict[str, str] = {}
    for attack in study.attacks:
        attacked = maker.attack_images(attack, right)
        hit = maker.find_successes(attack, attacked)
        groups = sources.groups[attacked.rows[hit]]
        counts = [int(np.isin(groups, part).sum()) for part in parts[:3]]
        variants.append(attacked)
        if any(count < least for count, least in zip(counts, LEAST, strict=True)):
            weak[str(attack.spec)] = (
                f"{attack.spec} succeeds on {len(groups)} of {len(right)} images, too few to learn"
                " from"
            )
            continue
        new = ~moved[attacked.rows] & (attacked.images != x8[attacked.rows]).any((1, 2, 3))
        changed[attacked.rows[new]] = attacked.images[new]
        moved[attacked.rows[new]] = True
    return [*variants, *maker.make_benign_variants(changed, moved)], weak


@dataclass
class CombinationJudge:
    """Fits the detectors of a table, and judges them by several protocols."""

    tasks: TaskMaker
    fitter: Fitter
    sources: Sources
    seed: int

    def __post_init__(self) -> None:
        self.rows = self.tasks.rows
        self.resampling = Resampling(int(self.rows.group.max()) + 1, self.seed)

    def judge_combination(self, combined: Combined, attacks: Sequence[str]) -> Combination:
        """Fit the detector of a combination by each protocol, and judge it."""
        hits = self.tasks.select_hits(attacks)
        clean = self.rows.list_variants("clean")
        others = self.rows.list_variants(*NEGATIVES)
        grouped = self.fit_grouped(combined, others, hits, self.tasks.parts, combined.columns)
        plain = self.fit_grouped(combined, others, hits, self.tasks.parts, ())
        test = self.score(grouped, clean, hits, self.tasks.parts.test)
        quiet = self.tasks.select_within(clean, self.tasks.parts.validation)
        threshold = choose_threshold(grouped.predict_scores(self.rows, quiet), FPRS[0])
        alone = self.score(plain, clean, hits, self.tasks.parts.test)
        return Combination(
            name=combined.name,
            attacks=tuple(attacks),
            as_published=self.judge_by_rows(combined, clean, hits),
            grouped=self.estimate_accuracy(test),
            auc=self.estimate_area(test),
            flagged=count_share(test.score[test.label == 1] > threshold),
            false_alarms=count_share(test.score[test.label == 0] > threshold),
            without_statistics=self.estimate_area(alone),
            unseen_classes=self.judge_unseen_classes(combined, others, clean, hits),
        )

    def fit_grouped(
        self, combined: Combined, negatives: Array, hits: Array, parts: Parts,
        columns: tuple[int, ...],
    ) -> TreeFit:  # fmt: skip
        """Fit with all rows of an image in one part."""
        return self.fitter.fit_once(
            self.tasks.make_task(
                negatives, hits, parts.train, parts.validation, combined.planes, columns
            )
        )

    def score(self, fit: TreeFit, clean: Array, hits: Array, groups: Array) -> Scored:
        """Score images as they are and attacked ones of some groups."""
        some = [self.tasks.select_within(rows, groups) for rows in (clean, hits)]
        both = np.concatenate(some)
        label = np.repeat([0, 1], [len(each) for each in some])
        return Scored(fit.predict_scores(self.rows, both), label, self.rows.group[both])

    def judge_by_rows(self, combined: Combined, clean: Array, hits: Array) -> EstimateOfImages:
        """The accuracy by the protocol that is probably the paper's: it cheats."""
        both = np.concatenate([clean, hits])
        task = self.tasks.make_task(
            clean, hits, self.tasks.parts.train, self.tasks.parts.validation, combined.planes, ()
        )
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(both)
        train, validation, test = np.split(order, [3 * len(order) // 5, 4 * len(order) // 5])
        weight = np.zeros(len(task.weight))
        for part in (train, validation):
            weight[part] = balance_labels(task, part)
        fit = self.fitter.fit_once(task._replace(weight=weight, train=train, validation=validation))
        scores = fit.predict_scores(self.rows, test)
        return self.estimate_accuracy(Scored(scores, task.label[test], self.rows.group[test]))

    def judge_unseen_classes(
        self, combined: Combined, negatives: Array, clean: Array, hits: Array
    ) -> EstimateOfImages | None:
        """The AUC on classes that had no say; None where too few images are left to tell."""
        parts = self.split_classes()
        counts = [len(self.tasks.select_within(hits, part)) for part in parts[:3]]
        if any(count < least for count, least in zip(counts, LEAST, strict=True)):
            self.fitter.advance(EPOCHS)
            return None
        fit = self.fit_grouped(combined, negatives, hits, parts, combined.columns)
        return self.estimate_area(self.score(fit, clean, hits, parts.test))

    def split_classes(self) -> Parts:
        """Groups of images by class: those of some classes to judge, of all others to fit."""
        labels = self.sources.labels.numpy()
        classes = np.random.Generator(np.random.PCG64(self.seed)).permutation(np.unique(labels))
        held = classes[: max(1, round(UNSEEN * len(classes)))]
        test = np.unique(self.sources.groups[np.isin(labels, held)])
        parts = self.tasks.parts
        others = np.setdiff1d(np.concatenate(parts[:3]), test)
        order = np.array([each for part in parts[:3] for each in part])
        rest = order[np.isin(order, others)]
        train, validation = np.split(rest, [3 * len(rest) // 4])
        return Parts(train, validation, test, parts.folds)

    def estimate_area(self, scored: Scored) -> EstimateOfImages:
        """The area under the ROC curve, images resampled."""
        found = self.resampling.estimate_auc([scored])
        return EstimateOfImages(found.value, found.low, found.high, count_groups(scored))

    def estimate_accuracy(self, scored: Scored) -> EstimateOfImages:
        """The accuracy at one half, both labels weighing the same, images resampled."""
        right = (scored.score > 0.5) == (scored.label == 1)
        drawn = self.resampling.resample_rate(right, scored)
        value = np.mean([right[scored.label == label].mean() for label in (0, 1)])
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        return EstimateOfImages(float(value), float(low), float(high), count_groups(scored))


def balance_labels(task: Task, part: Array) -> Array:
    """Weights ``(m,)`` of mean one by which both labels count the same."""
    label = task.label[part]
    counts = np.bincount(label, minlength=2)
    return np.asarray(len(part) / (2 * np.maximum(counts, 1)))[label]


def count_groups(scored: Scored) -> int:
    """How many different source images are scored."""
    return len(np.unique(scored.group))
