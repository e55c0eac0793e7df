"""Looking for planted examples: the active test of a run, on each of its targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError
from robusteval.evaluation.active_test import Planter, count_images, measure_planted
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.target import Target
from robusteval.models.classifier import Classifier
from robusteval.runs import metrics
from robusteval.runs.types import Columns


def keep_planted(rows: Positions, found: Columns) -> tuple[Positions, Columns]:
    """Rows ``(m,)`` and what was found there, without those where nothing could be planted."""
    if not found:
        return rows, found
    planted = ~np.isnan(found["margin_adv"])
    return rows[planted], {name: column[planted] for name, column in found.items()}


class Planting:
    """The planters of a run's targets, each made once.

    Parameters
    ----------
    plan : Plan
        What is run.
    answers : Answers
        Of the networks, where they were asked already.
    watch : callable
        Told of each network that is called with smaller batches where memory runs out.
    """

    def __init__(self, plan: Plan, answers: Answers, watch: Callable[[Classifier], object]) -> None:
        self.plan = plan
        self.answers = answers
        self.watch = watch
        self.planters: dict[str, Planter] = {}

    def choose_rows(self, target: Target) -> Positions:
        """The images around which something is planted: the first that are right.

        UsageError if nothing can be planted on this network.
        """
        suffix, values = target.suffix, int(np.prod(self.plan.data.shape))
        if reason := self.answers.explain(f"planting{suffix}", lambda: self._try(target)):
            raise UsageError(reason)
        count = self.answers.count(f"planted{suffix}", lambda: count_images(target.model, values))
        return np.flatnonzero(metrics.find_right(target.clean))[:count]

    def measure(self, attack: Attack, target: Target, rows: Positions) -> Columns:
        """What an attack finds of what is planted around some images ``(m,)``."""
        return measure_planted(self.plan, target, self.find_planter(target), attack, rows)

    def _try(self, target: Target) -> str:
        """Why nothing can be planted on a network; empty if something can."""
        try:
            self.find_planter(target)
        except UsageError as error:
            return error.message
        return ""

    def find_planter(self, target: Target) -> Planter:
        """The one of a target, for all its attacks; UsageError if nothing can be planted."""
        planter = self.planters.get(target.suffix)
        if planter is None:
            x = self.plan.data.batch(self.plan.index[:2]).x.to(target.model.device)
            planter = self.planters[target.suffix] = Planter(target.model, x)
            self.watch(planter.features)
        return planter
