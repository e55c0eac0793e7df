"""The tasks that a detector and its comparisons are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detector_fitting import Task, weigh_rows
from .detector_view import View
from .map_rows import Rows
from .splits import Parts
from .transforms import Array

NEGATIVES = ("clean", "noise", "jpeg", "blur", "crop")


@dataclass
class TaskMaker:
    """Makes tasks: which rows are told from which, fitted within some parts of the images."""

    rows: Rows
    parts: Parts
    view: View

    def __post_init__(self) -> None:
        self.planes = tuple(range(self.view.planes))
        self.columns = tuple(range(len(self.view.statistic_names)))
        self.fooled = np.flatnonzero(self.rows.fooled)

    def select_within(self, rows: Array, groups: Array) -> Array:
        """Select the rows whose source image is in some groups."""
        return rows[np.isin(self.rows.group[rows], groups)]

    def select_hits(self, attacks: Sequence[str]) -> Array:
        """Select the rows of attacks that reached their goal."""
        return np.intersect1d(self.rows.list_variants(*attacks), self.fooled)

    def make_attack_task(
        self,
        attacks: Sequence[str],
        planes: tuple[int, ...] | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> Task:
        """Make the task of telling the results of attacks from all that is none."""
        return self.make_task(
            self.rows.list_variants(*NEGATIVES),
            self.select_hits(attacks),
            self.parts.train,
            self.parts.validation,
            planes,
            columns,
        )

    def make_task(
        self,
        negatives: Array,
        positives: Array,
        train: Array,
        validation: Array,
        planes: tuple[int, ...] | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> Task:
        """Make the task of telling some rows from others: fitted to groups, stopped by others."""
        label = np.zeros(len(self.rows.variant), dtype=np.int64)
        label[positives] = 1
        both = np.concatenate([negatives, positives])
        first, second = self.select_within(both, train), self.select_within(both, validation)
        weight = np.zeros(len(label))
        for part in (first, second):
            weight[part] = weigh_rows(self.rows, part[label[part] == 0], part[label[part] == 1])[
                part
            ]
        return Task(
            label,
            weight,
            first,
            second,
            self.planes if planes is None else planes,
            self.columns if columns is None else columns,
        )
