"""How well a detector detects attacks, beside simpler rules, other attacks and leak tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from robusteval.models.seeds import Ids
from robusteval.runs.detector_record import (
    AttackFigures,
    FalseAlarms,
    FewerChannels,
    Headline,
    LeakChecks,
    SimplerRule,
    TransferFigures,
    TransferRow,
    TreeChoice,
    TriedTrees,
)

from .boosting import FPRS, GRID, ColumnRule, Logistic, choose_threshold
from .detector_fitting import Fitter, TreeFit
from .detector_metrics import (
    Resampling,
    Scored,
    count_share,
    judge_scores,
    measure_calibration,
)
from .detector_tasks import NEGATIVES, TaskMaker
from .detector_view import View
from .leak_tests import LeakTests
from .map_features import list_statistics
from .transforms import Array

KEPT = f"{FPRS[0]:g}"  # the rate that most tables are for

Scores = Callable[[Array], Array]


@dataclass(frozen=True)
class DetectorFigures:
    """What a detector is worth; the parts are those of a `DetectorRecord`."""

    headline: Headline
    rounds: int
    trees: TreeChoice
    per_attack: tuple[AttackFigures, ...]
    negatives: tuple[FalseAlarms, ...]
    baselines: tuple[SimplerRule, ...]
    matrix: tuple[TransferRow, ...]
    simpler: tuple[FewerChannels, ...]
    leaks: LeakChecks


@dataclass
class DetectorReport:
    """How a detector does on images that had no say, beside what it must be compared with."""

    tasks: TaskMaker
    fitter: Fitter
    attacks: tuple[str, ...]
    ids: Ids  # of the source images
    seed: int
    tune: bool = False  # choose how trees grow

    def __post_init__(self) -> None:
        self.rows, self.parts, self.view = self.tasks.rows, self.tasks.parts, self.tasks.view
        self.resampling = Resampling(int(self.rows.group.max()) + 1, self.seed)

    @property
    def fits(self) -> int:
        """How often something is fitted."""
        matrix = len(self.attacks) if len(self.attacks) > 1 else 0
        grid = 1 + len(GRID) if self.tune else 0
        leaks = 2 * len(self.parts.folds) + 1
        return 1 + grid + matrix + leaks + len(list_simpler_views(self.view))

    def fit_main(self) -> tuple[TreeFit, dict[str, float], list[float]]:
        """Fit the detector and choose its thresholds; with the AUCs of the trees tried for it."""
        task = self.tasks.make_attack_task(self.attacks)
        tried = self.fitter.choose_settings(task) if self.tune else []
        main = self.fitter.fit_once(task)
        return main, self.choose_thresholds(self.make_scorer(main)), tried

    def judge_detector(self) -> tuple[TreeFit, dict[str, float], DetectorFigures]:
        """Fit the detector, choose its thresholds, and judge what it is worth."""
        main, thresholds, tried = self.fit_main()
        by = self.make_scorer(main)
        test = self.score_test_images(by, self.attacks)
        judgement = judge_scores(test, thresholds, self.resampling)
        figures = DetectorFigures(
            headline=Headline(*judgement, *measure_calibration(test)),
            rounds=main.rounds,
            trees=TreeChoice(
                *self.fitter.settings,
                tuple(TriedTrees(*each, area) for each, area in zip(GRID, tried, strict=False)),
            ),
            per_attack=tuple(self.judge_attack(name, by, thresholds) for name in self.attacks),
            negatives=tuple(self.count_alarms(by, thresholds)),
            baselines=tuple(self.judge_baselines(test)),
            matrix=tuple(self.judge_transfer(by, thresholds)),
            simpler=tuple(self.judge_simpler_views(test)),
            leaks=LeakTests(
                self.tasks, self.fitter, self.attacks, self.ids, self.resampling, self.seed
            ).run_tests(),
        )
        return main, thresholds, figures

    def make_scorer(self, fit: TreeFit) -> Scores:
        """Make the function that scores rows."""
        return lambda some: fit.predict_scores(self.rows, some)

    def choose_thresholds(self, by: Scores) -> dict[str, float]:
        """Choose one for each false-positive rate, by images that trees were not fitted on."""
        benign = by(
            self.tasks.select_within(self.rows.list_variants("clean"), self.parts.validation)
        )
        return {f"{fpr:g}": choose_threshold(benign, fpr) for fpr in FPRS}

    def score_test_images(self, by: Scores, attacks: Sequence[str]) -> Scored:
        """Score test images as they are, and the results of attacks on them."""
        clean = self.tasks.select_within(self.rows.list_variants("clean"), self.parts.test)
        hits = self.tasks.select_within(self.tasks.select_hits(attacks), self.parts.test)
        some = np.concatenate([clean, hits])
        label = np.repeat([0, 1], [len(clean), len(hits)])
        return Scored(by(some), label, self.rows.group[some])

    def judge_attack(self, name: str, by: Scores, thresholds: dict[str, float]) -> AttackFigures:
        """Judge how one attack fares, its failures apart."""
        mine = self.tasks.select_within(self.rows.list_variants(name), self.parts.test)
        fooled, score = self.rows.fooled[mine], by(mine)
        return AttackFigures(
            name,
            *judge_scores(self.score_test_images(by, [name]), thresholds, self.resampling),
            failures_flagged=count_share(score[~fooled] > thresholds[KEPT]),
            undetected=count_share(fooled & (score <= thresholds[KEPT])),
        )

    def count_alarms(self, by: Scores, thresholds: dict[str, float]) -> list[FalseAlarms]:
        """Count how often what is no attack is flagged."""
        found = []
        for name in NEGATIVES:
            mine = self.tasks.select_within(self.rows.list_variants(name), self.parts.test)
            kinds = {name: mine}
            if name == "clean":
                wrong = mine[~self.rows.right[mine]]
                kinds["clean, predicted wrongly"] = wrong
            for kind, some in kinds.items():
                score = by(some)
                flagged = {fpr: count_share(score > value) for fpr, value in thresholds.items()}
                found.append(FalseAlarms(kind, flagged))
        return found

    def judge_baselines(self, main: Scored) -> list[SimplerRule]:
        """Judge rules that need no trees, fitted and judged on the same images."""
        task = self.tasks.make_attack_task(self.attacks)
        x, train = self.rows.statistics, task.train
        label, weight = task.label[train], task.weight[train]
        names = [n for n in self.view.statistic_names if "the class" not in n]
        maps = [self.view.statistic_names.index(name) for name in names]
        logistic = Logistic.fit_rows(x[train][:, maps], label, weight)
        best = ColumnRule.choose_best(x[train], label, maps)
        probability = self.rows.probability[:, None]
        certain = ColumnRule.choose_best(probability[train], label, [0])
        rules: dict[str, Scores] = {
            "logistic regression on the statistics": lambda some: logistic.predict_scores(
                x[some][:, maps]
            ),
            f"one statistic: {self.view.statistic_names[best.column]}": lambda some: (
                best.predict_scores(x[some])
            ),
            "probability of the predicted class": lambda some: certain.predict_scores(
                probability[some]
            ),
        }
        found = []
        for name, by in rules.items():
            test = self.score_test_images(by, self.attacks)
            judgement = judge_scores(test, self.choose_thresholds(by), self.resampling)
            gain = self.resampling.estimate_gain(main, test)
            found.append(SimplerRule(name, *judgement, gain=gain))
        return found

    def judge_transfer(self, by: Scores, thresholds: dict[str, float]) -> list[TransferRow]:
        """Fit to each attack alone, and to all, and judge on each; each with its own thresholds."""
        found = []
        if len(self.attacks) > 1:
            for name in self.attacks:
                mine = self.make_scorer(self.fitter.fit_once(self.tasks.make_attack_task([name])))
                found.append(self.judge_on_each_attack(name, mine, self.choose_thresholds(mine)))
        found.append(self.judge_on_each_attack(None, by, thresholds))
        return found

    def judge_on_each_attack(
        self, fitted_on: str | None, by: Scores, thresholds: dict[str, float]
    ) -> TransferRow:
        """Judge one fit on each attack: one row of the matrix."""
        cells = []
        for name in self.attacks:
            test = self.score_test_images(by, [name])
            caught = count_share(test.score[test.label == 1] > thresholds[KEPT])
            cells.append(TransferFigures(self.resampling.estimate_auc([test]), caught))
        return TransferRow(fitted_on, tuple(cells))

    def judge_simpler_views(self, main: Scored) -> list[FewerChannels]:
        """Judge detectors that look at fewer channels."""
        found = []
        for name, planes, columns in list_simpler_views(self.view):
            fit = self.fitter.fit_once(self.tasks.make_attack_task(self.attacks, planes, columns))
            test = self.score_test_images(self.make_scorer(fit), self.attacks)
            gain = self.resampling.estimate_gain(main, test)
            found.append(FewerChannels(name, self.resampling.estimate_auc([test]), gain))
        return found


def list_simpler_views(view: View) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """List what one could do with fewer channels: name, channels, statistics."""
    names = [spec.name for spec in view.specs]
    if view.channels == "pair_product":
        return [
            (f"{'+'.join(names)} without product", (0, 1), tuple(range(len(view.statistic_names))))
        ]
    found = []
    for some in combinations(range(len(names)), len(names) - 1):
        kept = [names[i] for i in some]
        wanted = list_statistics(kept, view.confidence)
        columns = tuple(view.statistic_names.index(name) for name in wanted)
        found.append(("+".join(kept), some, columns))
    return found
