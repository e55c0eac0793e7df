"""Where a process does pieces of a run that another process gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.errors import RobustevalError, RunError
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.batches import run_in_halves
from robusteval.evaluation.columns import AttackedColumns, measure_clean, measure_quality
from robusteval.evaluation.computation import Shrinking
from robusteval.evaluation.gallery import Gallery
from robusteval.evaluation.pieces import Computed, Seen, Task
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.planting import Planting
from robusteval.evaluation.target import (
    DefenseBroke,
    Target,
    known_surroundings,
    list_receivers,
    list_targets,
)
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, frozen
from robusteval.runs.types import Columns


class Bench:
    """A plan, made once more, and its networks.

    Parameters
    ----------
    plan : Plan
        Of the same things as that of the process which gives the work.
    key : str
        `Plan.key` there; RunError if it is another here.
    """

    def __init__(self, plan: Plan, key: str) -> None:
        if plan.key != key:
            raise RunError(
                "a worker has another model, other images or other versions: give all machines the"
                " same files and packages"
            )
        self.plan = plan
        self.targets = list_targets(plan)
        self.everyone = [*self.targets, *list_receivers(plan)]
        self.planted: list[Classifier] = []  # networks around whose images something is planted
        self.planting = Planting(plan, Answers(), self.planted.append)

    def compute(self, task: Task, seen: Sequence[Seen], rows: Positions) -> Computed:
        """Do a task on some rows ``(m,)``, with what is known of each target."""
        for target, known in zip(self.everyone, seen, strict=True):
            target.clean, target.found, target.company, target.model.block = known
        values, target = int(np.prod(self.plan.data.shape)), self.everyone[task.target]
        gallery = Gallery({})
        try:
            with ExitStack() as stack:
                for each in self.everyone:
                    stack.enter_context(frozen(each.model))
                stack.enter_context(exact_arithmetic())
                if task.kind == "planted":  # on a network of its own, without surroundings
                    self.planting.find_planter(target)
                else:
                    stack.enter_context(known_surroundings(self.targets, target))
                models = [*(each.model for each in self.everyone), *self.planted]
                shrinking = Shrinking(models, values)
                work = self._open(task, target, gallery, shrinking)
                pieces = run_in_halves(work, rows, shrinking.shrink_blocks)
        except DefenseBroke as error:
            broken = self.everyone.index(error.target)
            return Computed(error=RunError(error.message), broken=broken)
        except RobustevalError as error:
            return Computed(error=error)
        return Computed(pieces, gallery.candidates, tuple(shrinking.notes))

    def _open(
        self, task: Task, target: Target, gallery: Gallery, shrinking: Shrinking
    ) -> Callable[[Positions], Sequence[Columns]]:
        """The work of a task: ``rows (m,) -> columns`` for each key."""
        known = self.targets[0].clean
        if task.kind == "clean":
            measure = partial(measure_clean, self.plan, target, known)
            return lambda rows: [measure(rows)]
        measurement = target.measurement
        if task.kind == "quality":
            assert measurement is not None
            worth = partial(measure_quality, self.plan, measurement, known)
            return lambda rows: [worth(rows)]
        assert task.spec is not None
        attack = self.plan.prepare(task.spec, target.model, task.role)
        if task.kind == "planted":
            look = partial(self.planting.measure, attack, target)
            return lambda rows: [look(rows)]
        return AttackedColumns(
            self.plan,
            attack,
            target,
            [self.everyone[i] for i in task.defended],
            measurement if task.maps else None,
            gallery if task.role == "attack" else None,
            shrinking.shrink_blocks,
        ).measure
