"""Which images of a run are attacked here, and in which batches."""

from __future__ import annotations

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.evaluation.batches import batch_by_id
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.target import Target
from robusteval.runs import metrics


class Division:
    """The images of a plan, or those of its share, in batches.

    Parameters
    ----------
    plan : Plan
        What is run.
    undefended : Target
        The classifier as it is.
    """

    def __init__(self, plan: Plan, undefended: Target) -> None:
        self.plan = plan
        self.undefended = undefended

    def own(self, rows: Positions) -> Positions:
        """Those of some rows that are attacked here: of this share, or all of them."""
        share = self.plan.share
        return rows if share is None else share.own(rows, self.undefended.clean["id"])

    def split(self, rows: Positions, size: int) -> list[Positions]:
        """Split rows by content id, where that is known, so that no order of images matters."""
        ids = self.undefended.clean.get("id", np.arange(len(self.plan.index)))
        return batch_by_id(rows, ids, size)

    def split_all(self, size: int, first: int) -> list[Positions]:
        """All images, the first ones by themselves: they are asked more, and so fill blocks."""
        rows = np.arange(len(self.plan.index))
        return [*self.split(rows[:first], size), *self.split(rows[first:], size)]

    def split_attacked(self, rows: Positions, size: int, *, whole: bool) -> list[Positions]:
        """Batches of those rows that are attacked here.

        Where batches are part of the result, `whole`, they are those of the whole run, and a share
        has some.
        """
        if not whole:
            return self.split(self.own(rows), size)
        batches = self.split(rows, size)
        return batches if self.plan.share is None else self.plan.share.choose(batches)

    def list_judged(self, target: Target, attacked: Positions) -> Positions:
        """The images of a cell: those attacked here, and its own that were wrong before.

        `target` is what is attacked: who judges the results has other images wrong, and of all of
        these there must be a row.
        """
        wrong = np.flatnonzero(~metrics.find_right(target.clean))
        return np.sort(np.concatenate([attacked, self.own(wrong)]))
