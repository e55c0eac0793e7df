"""Whether a detector detects attacks, or leaks, or anything that a simpler rule finds as well."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from robusteval.evaluation.work_cache import Arrays, WorkCache
from robusteval.models.classifier import absorb
from robusteval.models.seeds import sample_seeds

from .boosting import FPRS, Logistic, Rule, engine, threshold_at
from .detector import View
from .detector_metrics import Record, Resampling, Scored, calibrated, judged, ratio, share
from .fitting import EPOCHS, Fitted, Rows, Task, fitted, weighed
from .map_features import statistic_names
from .variants import Array, Parts, Sources

NEGATIVES = ("clean", "noise", "jpeg", "blur", "crop")
AGAIN = "noise again"  # other noise, for a comparison in which there is nothing to find
SHUFFLE = np.uint64(0xC2B2AE3D)
KEPT = f"{FPRS[0]:g}"  # the rate that most tables are for

Scores = Callable[[Array], Array]


@dataclass
class Judgement:
    """Everything that is fitted to some rows, and how it does on those that had no say."""

    rows: Rows
    parts: Parts
    sources: Sources
    view: View
    attacks: tuple[str, ...]
    seed: int
    device: torch.device
    start: nn.Module | None
    advance: Callable[[int], object]
    facts: list[Any] = field(default_factory=list)  # all that rows depend on, for what is kept
    done: WorkCache = field(default_factory=WorkCache)

    def __post_init__(self) -> None:
        groups = int(self.sources.groups.max()) + 1
        self.resampling = Resampling(groups, self.seed)
        self.planes = tuple(range(self.view.planes))
        self.columns = tuple(range(len(self.view.names)))
        self.fooled = np.flatnonzero(self.rows.fooled)

    @property
    def fits(self) -> int:
        """How often something is fitted."""
        matrix = len(self.attacks) if len(self.attacks) > 1 else 0
        return 1 + matrix + 2 * len(self.parts.folds) + 1 + len(self.simpler())

    def made(self) -> tuple[Fitted, dict[str, float], Record]:
        """The detector, its thresholds, and what it is worth."""
        main = self.fitted(self.task(self.attacks))
        by = self.scorer(main)
        thresholds = self.thresholds(by)
        test = self.scored(by, self.attacks)
        judgement = judged(test, thresholds, self.resampling) | calibrated(test)
        report = {
            "headline": judgement,
            "rounds": main.rounds,
            "per_attack": [self.per_attack(name, by, thresholds) for name in self.attacks],
            "negatives": self.alarms(by, thresholds),
            "baselines": self.baselines(test),
            "matrix": self.matrix(by, thresholds),
            "simpler": self.simplified(test),
            "leaks": self.leaks(),
        }
        return main, thresholds, report

    def fitted(self, task: Task) -> Fitted:
        """What the detector would learn from a task, or has learnt before a stop."""
        kind, told = self.view.extractor, []

        def advance(epochs: int) -> None:
            told.append(epochs)
            self.advance(epochs)

        def work() -> Arrays:
            return fitted(
                self.rows, task, kind, self.seed, self.device, start=self.start, advance=advance
            ).arrays()

        given = (task.label, task.weight, task.train, task.validation, self.content)
        arrays = self.done.compute(
            [*self.facts, engine(), kind, task.planes, task.columns], given, work
        )
        self.advance(EPOCHS - sum(told))
        return Fitted.restored(task, kind, self.device, arrays)

    @cached_property
    def content(self) -> Array:
        """SHA-256 of everything that is fitted to."""
        content = hashlib.sha256()
        for array in (self.rows.stacks, self.rows.statistics):
            content.update(np.ascontiguousarray(array).data)
        if self.start is not None:
            absorb(content, self.start.state_dict())
        return np.frombuffer(content.digest(), np.uint8)

    def scorer(self, fit: Fitted) -> Scores:
        """Scores by row."""
        return lambda some: fit.scores(self.rows, some)

    def within(self, rows: Array, groups: Array) -> Array:
        """Those of the rows whose source image is in some groups."""
        return rows[np.isin(self.rows.group[rows], groups)]

    def hits(self, attacks: Sequence[str]) -> Array:
        """Rows of attacks that reached their goal."""
        return np.intersect1d(self.rows.of(*attacks), self.fooled)

    def task(
        self,
        attacks: Sequence[str],
        planes: tuple[int, ...] | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> Task:
        """Telling the results of attacks from all that is none."""
        return self.telling(
            self.rows.of(*NEGATIVES),
            self.hits(attacks),
            self.parts.train,
            self.parts.validation,
            planes,
            columns,
        )

    def telling(
        self,
        negatives: Array,
        positives: Array,
        train: Array,
        validation: Array,
        planes: tuple[int, ...] | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> Task:
        """Telling some rows from others, fitted within some groups, stopped by others."""
        label = np.zeros(len(self.rows.variant), dtype=np.int64)
        label[positives] = 1
        both = np.concatenate([negatives, positives])
        first, second = self.within(both, train), self.within(both, validation)
        weight = np.zeros(len(label))
        for part in (first, second):
            weight[part] = weighed(self.rows, part[label[part] == 0], part[label[part] == 1])[part]
        return Task(label, weight, first, second, planes or self.planes, columns or self.columns)

    def thresholds(self, by: Scores) -> dict[str, float]:
        """By false-positive rate, from images as they are that trees were not fitted on."""
        benign = by(self.within(self.rows.of("clean"), self.parts.validation))
        return {f"{fpr:g}": threshold_at(benign, fpr) for fpr in FPRS}

    def scored(self, by: Scores, attacks: Sequence[str]) -> Scored:
        """Test images as they are, and the results of attacks on them."""
        clean = self.within(self.rows.of("clean"), self.parts.test)
        hits = self.within(self.hits(attacks), self.parts.test)
        some = np.concatenate([clean, hits])
        label = np.repeat([0, 1], [len(clean), len(hits)])
        return Scored(by(some), label, self.rows.group[some])

    def per_attack(self, name: str, by: Scores, thresholds: dict[str, float]) -> Record:
        """How one attack fares, its failures apart."""
        mine = self.within(self.rows.of(name), self.parts.test)
        fooled, score = self.rows.fooled[mine], by(mine)
        return {
            "attack": name,
            **judged(self.scored(by, [name]), thresholds, self.resampling),
            "failures_flagged": share(score[~fooled] > thresholds[KEPT]),
            "undetected": share(fooled & (score <= thresholds[KEPT])),
        }

    def alarms(self, by: Scores, thresholds: dict[str, float]) -> list[Record]:
        """How often what is no attack is flagged."""
        found = []
        for name in NEGATIVES:
            mine = self.within(self.rows.of(name), self.parts.test)
            kinds = {name: mine}
            if name == "clean":
                wrong = mine[~self.rows.right[mine]]
                kinds["clean, predicted wrongly"] = wrong
            for kind, some in kinds.items():
                score = by(some)
                flagged = {fpr: share(score > value) for fpr, value in thresholds.items()}
                found.append({"kind": kind, "flagged": flagged})
        return found

    def baselines(self, main: Scored) -> list[Record]:
        """Rules that need no trees, fitted and judged on the same images."""
        task = self.task(self.attacks)
        x, train = self.rows.statistics, task.train
        label, weight = task.label[train], task.weight[train]
        names = [n for n in self.view.names if "the class" not in n]
        maps = [self.view.names.index(name) for name in names]
        logistic = Logistic.fitted(x[train][:, maps], label, weight)
        best = Rule.best(x[train], label, maps)
        probability = self.rows.probability[:, None]
        certain = Rule.best(probability[train], label, [0])
        rules: dict[str, Scores] = {
            "logistic regression on the statistics": lambda some: logistic.scores(x[some][:, maps]),
            f"one statistic: {self.view.names[best.column]}": lambda some: best.scores(x[some]),
            "probability of the predicted class": lambda some: certain.scores(probability[some]),
        }
        found = []
        for name, by in rules.items():
            test = self.scored(by, self.attacks)
            judgement = judged(test, self.thresholds(by), self.resampling)
            gain = self.resampling.difference(main, test)
            found.append({"name": name, **judgement, "gain": gain})
        return found

    def matrix(self, by: Scores, thresholds: dict[str, float]) -> list[Record]:
        """Fitted on each attack alone, and on all, judged on each; its own thresholds."""
        found = []
        if len(self.attacks) > 1:
            for name in self.attacks:
                mine = self.scorer(self.fitted(self.task([name])))
                found.append(self.against(name, mine, self.thresholds(mine)))
        found.append(self.against(None, by, thresholds))
        return found

    def against(self, fitted_on: str | None, by: Scores, thresholds: dict[str, float]) -> Record:
        """One row of the matrix."""
        cells = []
        for name in self.attacks:
            test = self.scored(by, [name])
            caught = share(test.score[test.label == 1] > thresholds[KEPT])
            cells.append({"auc": self.resampling.interval([test]), "tpr": caught})
        return {"fitted_on": fitted_on, "judged_on": cells}

    def simpler(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """What one could do with fewer channels: name, channels, statistics."""
        names = [spec.name for spec in self.view.specs]
        if self.view.channels == "pair_product":
            return [(f"{'+'.join(names)} without product", (0, 1), self.columns)]
        found = []
        for some in combinations(range(len(names)), len(names) - 1):
            kept = [names[i] for i in some]
            wanted = statistic_names(kept, self.view.confidence)
            columns = tuple(self.view.names.index(name) for name in wanted)
            found.append(("+".join(kept), some, columns))
        return found

    def simplified(self, main: Scored) -> list[Record]:
        """The same with fewer channels."""
        found = []
        for name, planes, columns in self.simpler():
            fit = self.fitted(self.task(self.attacks, planes, columns))
            test = self.scored(self.scorer(fit), self.attacks)
            gain = self.resampling.difference(main, test)
            found.append({"name": name, "auc": self.resampling.interval([test]), "gain": gain})
        return found

    def leaks(self) -> Record:
        """Comparisons in which there is nothing to find, and one that cheats."""
        clean, hits = self.rows.of("clean"), self.hits(self.attacks)
        clean = clean[np.isin(self.rows.image[clean], self.rows.image[hits])]
        shuffled = self.shuffled(np.concatenate([clean, hits]))
        copies = self.rows.of("noise"), self.rows.of(AGAIN)
        return {
            "shuffled": self.crossed(*shuffled),
            "benign": self.crossed(*copies),
            "row_wise": self.row_wise(),
        }

    def shuffled(self, some: Array) -> tuple[Array, Array]:
        """The rows with labels exchanged among those of one image."""
        positive = np.isin(some, self.fooled)
        ids = self.sources.ids[self.rows.image[some]]
        keys = sample_seeds(self.seed, ids ^ SHUFFLE ^ self.rows.variant[some].astype(np.uint64))
        # within an image, the labels in one order and the rows in another
        image = self.rows.image[some]
        plain, mixed = np.lexsort((some, image)), np.lexsort((keys.numpy(), image))
        label = np.empty_like(positive)
        label[mixed] = positive[plain]
        return some[~label], some[label]

    def crossed(self, negatives: Array, positives: Array) -> Record:
        """AUC on images held out in turn."""
        folds = self.parts.folds
        found = []
        for i, test in enumerate(folds):
            stop = folds[(i + 1) % len(folds)]
            others = [f for j, f in enumerate(folds) if j not in (i, (i + 1) % len(folds))]
            task = self.telling(negatives, positives, np.concatenate(others), stop)
            some = self.within(np.concatenate([negatives, positives]), test)
            fit = self.fitted(task)
            found.append(
                Scored(fit.scores(self.rows, some), task.label[some], self.rows.group[some])
            )
        return self.resampling.interval(found)

    def row_wise(self) -> Record:
        """AUC where rows are parted at random, so that an image's twin may have been seen."""
        task = self.task(self.attacks)
        both = np.concatenate([self.rows.of(*NEGATIVES), self.hits(self.attacks)])
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(both)
        total = sum(map(len, self.parts[:3]))
        ends = np.cumsum([len(part) / total for part in self.parts[:2]]) * len(order)
        train, validation, test = np.split(order, ends.round().astype(int))
        weight = np.zeros(len(task.weight))
        for part in (train, validation):
            zero, one = (part[task.label[part] == label] for label in (0, 1))
            weight[part] = weighed(self.rows, zero, one)[part]
        fit = self.fitted(task._replace(weight=weight, train=train, validation=validation))
        kept = np.isin(test, np.concatenate([self.rows.of("clean"), self.fooled]))
        some = test[kept]
        found = Scored(fit.scores(self.rows, some), task.label[some], self.rows.group[some])
        return self.resampling.interval([found])


def remarks(report: dict[str, Any]) -> list[Record]:
    """What a reader must not miss; `grave` if it speaks against the detector."""
    found = [*leaking(report["leaks"]), *alarming(report)]
    for baseline in report["baselines"]:
        if baseline["gain"]["low"] <= 0:
            text = f"It is not shown to do better than {baseline['name']}"
            found.append(remark(True, f"{text}: AUC {signed(baseline['gain'])}."))
    for simpler in report["simpler"]:
        better = simpler["gain"]["low"] > 0
        text = "It does better than" if better else "It is not shown to do better than"
        found.append(
            remark(not better, f"{text} on {simpler['name']}: AUC {signed(simpler['gain'])}.")
        )
    found += transferring(report)
    found.append(
        remark(
            False,
            f"Its thresholds rest on {report['images']['validation']} images, the rates here on"
            f" {report['images']['test']}: for {percent(FPRS[1])} that is little.",
        )
    )
    return found


def remark(grave: bool, text: str) -> Record:
    """One of them."""
    return {"grave": grave, "text": text}


def percent(part: float) -> str:
    """A share without digits after the point."""
    return f"{100 * part:.0f} %"


def signed(gain: Record) -> str:
    """A difference with its interval."""
    return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def leaking(leaks: Record) -> list[Record]:
    """Whether the procedure finds something where there is nothing."""
    found = []
    for name, what in (
        ("shuffled", "images from their twins with labels exchanged"),
        ("benign", "two copies of the same noise"),
    ):
        area = leaks[name]
        if abs(area["value"] - 0.5) > 0.05 and not area["low"] <= 0.5 <= area["high"]:
            found.append(
                remark(
                    True,
                    f"The same procedure tells {what} (AUC {area['value']:.3f}), where there is"
                    " nothing to find: it leaks, and no figure here means anything.",
                )
            )
    return found


def alarming(report: Record) -> list[Record]:
    """Whether there are more false alarms than there should be."""
    often = [
        f"{each['kind']} {percent(ratio(each['flagged'][KEPT]))}"
        for each in report["negatives"]
        if each["flagged"][KEPT]["n"] and each["flagged"][KEPT]["low"] > FPRS[0]
    ]
    if not often:
        return []
    text = f"More than {percent(FPRS[0])} are flagged of images without any attack"
    return [remark(True, f"{text}: {', '.join(often)}.")]


def transferring(report: Record) -> list[Record]:
    """How little one that was fitted on one attack finds of another."""
    found = []
    for row in report["matrix"]:
        for attack, cell in zip(report["per_attack"], row["judged_on"], strict=True):
            if row["fitted_on"] not in (None, attack["attack"]):
                found.append((ratio(cell["tpr"]), row["fitted_on"], attack["attack"]))
    if not found:
        return []
    least, one, other = min(found)
    return [remark(least < 0.5, f"Fitted on {one} alone it flags {percent(least)} of {other}.")]
