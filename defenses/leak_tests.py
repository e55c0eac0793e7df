"""Whether the way a detector is fitted finds something where there is nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robusteval.models.seeds import Ids, sample_seeds
from robusteval.runs.detector_record import Estimate, LeakChecks

from .detector_fitting import Fitter, weigh_rows
from .detector_metrics import Resampling, Scored
from .detector_tasks import NEGATIVES, TaskMaker
from .image_variants import AGAIN
from .transforms import Array

SHUFFLE = np.uint64(0xC2B2AE3D)


@dataclass
class LeakTests:
    """Comparisons in which there is nothing to find, and one that cheats."""

    tasks: TaskMaker
    fitter: Fitter
    attacks: tuple[str, ...]
    ids: Ids  # of the source images
    resampling: Resampling
    seed: int

    def run_tests(self) -> LeakChecks:
        """Run all leak tests: their AUCs by name."""
        clean, hits = self.tasks.rows.list_variants("clean"), self.tasks.select_hits(self.attacks)
        clean = clean[np.isin(self.tasks.rows.image[clean], self.tasks.rows.image[hits])]
        shuffled = self.exchange_labels(np.concatenate([clean, hits]))
        copies = self.tasks.rows.list_variants("noise"), self.tasks.rows.list_variants(AGAIN)
        return LeakChecks(
            shuffled=self.cross_validate(*shuffled),
            benign=self.cross_validate(*copies),
            row_wise=self.split_by_rows(),
        )

    def exchange_labels(self, some: Array) -> tuple[Array, Array]:
        """Exchange labels among the rows of one image; negatives and positives."""
        positive = np.isin(some, self.tasks.fooled)
        ids = self.ids[self.tasks.rows.image[some]]
        keys = sample_seeds(
            self.seed, ids ^ SHUFFLE ^ self.tasks.rows.variant[some].astype(np.uint64)
        )
        # within an image, the labels in one order and the rows in another
        image = self.tasks.rows.image[some]
        plain, mixed = np.lexsort((some, image)), np.lexsort((keys.numpy(), image))
        label = np.empty_like(positive)
        label[mixed] = positive[plain]
        return some[~label], some[label]

    def cross_validate(self, negatives: Array, positives: Array) -> Estimate:
        """Estimate the AUC on images held out in turn."""
        folds = self.tasks.parts.folds
        found = []
        for i, test in enumerate(folds):
            stop = folds[(i + 1) % len(folds)]
            others = [f for j, f in enumerate(folds) if j not in (i, (i + 1) % len(folds))]
            task = self.tasks.make_task(negatives, positives, np.concatenate(others), stop)
            some = self.tasks.select_within(np.concatenate([negatives, positives]), test)
            fit = self.fitter.fit_once(task)
            found.append(
                Scored(
                    fit.predict_scores(self.tasks.rows, some),
                    task.label[some],
                    self.tasks.rows.group[some],
                )
            )
        return self.resampling.estimate_auc(found)

    def split_by_rows(self) -> Estimate:
        """Estimate the AUC of a random split of rows, where an image's twin may have been seen."""
        task = self.tasks.make_attack_task(self.attacks)
        both = np.concatenate(
            [self.tasks.rows.list_variants(*NEGATIVES), self.tasks.select_hits(self.attacks)]
        )
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(both)
        total = sum(map(len, self.tasks.parts[:3]))
        ends = np.cumsum([len(part) / total for part in self.tasks.parts[:2]]) * len(order)
        train, validation, test = np.split(order, ends.round().astype(int))
        weight = np.zeros(len(task.weight))
        for part in (train, validation):
            zero, one = (part[task.label[part] == label] for label in (0, 1))
            weight[part] = weigh_rows(self.tasks.rows, zero, one)[part]
        fit = self.fitter.fit_once(task._replace(weight=weight, train=train, validation=validation))
        kept = np.isin(
            test, np.concatenate([self.tasks.rows.list_variants("clean"), self.tasks.fooled])
        )
        some = test[kept]
        found = Scored(
            fit.predict_scores(self.tasks.rows, some), task.label[some], self.tasks.rows.group[some]
        )
        return self.resampling.estimate_auc([found])
