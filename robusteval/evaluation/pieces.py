"""A piece of work that any process with the same plan can do: one thing measured on some images.

Who gives work away says what is to be measured, a `Task`, and on which images. Who has made the
same plan does it, see `robusteval.evaluation.bench`, and returns `Computed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from robusteval.datasets.dataset import Positions
from robusteval.errors import RobustevalError
from robusteval.evaluation.batches import Piece, Runner
from robusteval.evaluation.gallery import Gallery
from robusteval.evaluation.target import DefenseBroke, Target
from robusteval.evaluation.unmasking import Examination
from robusteval.runs.types import Columns, Spec

ROUNDS = 4  # pieces for each worker, so that none waits long for the last one


class Task(NamedTuple):
    """What is to be measured. Targets are named by their place in `list_targets` of the plan."""

    kind: str  # "clean", "quality", "attack" or "planted"
    target: int
    spec: Spec | None = None  # the attack
    role: str = "attack"
    defended: tuple[int, ...] = ()  # what else judges the attack's results
    maps: bool = False  # whether what becomes of the target's maps is measured


class Seen(NamedTuple):
    """What is known of a target."""

    clean: Columns  # the images of the run as they are, as far as they were measured
    found: Examination
    company: Tensor | None  # other images beside which it judges
    block: int | None  # images per call of its network


class Computed(NamedTuple):
    """What came of a piece."""

    pieces: Sequence[Piece] = ()
    candidates: Columns | None = None  # for pictures
    notes: tuple[str, ...] = ()  # of what was done where memory ran out
    error: RobustevalError | None = None
    broken: int | None = None  # the target whose defense the error is about


class Pool(Protocol):
    """Processes that do pieces of work."""

    @property
    def size(self) -> int:
        """How many work at once."""
        ...

    def compute(
        self, task: Task, seen: Sequence[Seen], batches: Sequence[Positions]
    ) -> Iterator[Computed]:
        """Do a task on each of some batches of rows ``(m,)``; results in any order.

        Interrupted if the run is to stop; RunError if a process broke several times.
        """
        ...


def split_finely(
    batches: Sequence[Positions], workers: int, least: int, rounds: int = ROUNDS
) -> list[Positions]:
    """Split batches so that all workers have some, each evenly into pieces.

    Of as many rows that each worker has about `rounds` of them, where batches are large enough for
    pieces of `least` rows.
    """
    total = sum(map(len, batches))
    size = least * max(-(-total // (rounds * workers * least)), 1)
    # of 258 rows 128 for each of two workers, where multiples of 32 would be 160 and 98
    return [
        part
        for batch in batches
        if len(batch)
        for part in np.array_split(batch, -(-len(batch) // size))
    ]


class HandingOut:
    """Gives the work on batches to a pool, if there is one.

    Parameters
    ----------
    targets : sequence
        What tasks name by their place.
    notes : list of str
        Gets what was done where memory ran out.
    least : int
        Rows of a piece, or some times as many.
    """

    def __init__(self, targets: Sequence[Target], notes: list[str], least: int) -> None:
        self.targets = targets
        self.notes = notes
        self.least = least
        self.pool: Pool | None = None  # of processes that do the work; this one if None

    def hand_out(
        self,
        task: Task,
        gallery: Gallery | None = None,
        *,
        whole: bool = False,
        rounds: int = ROUNDS,
        least: int | None = None,
    ) -> Runner | None:
        """Who does a task: the pool, if there is one.

        Batches are split, unless they are `whole`, into about so many pieces for each worker, of
        at least so many rows.
        """
        if self.pool is None:
            return None
        split = partial(
            split_finely, workers=self.pool.size, least=least or self.least, rounds=rounds
        )
        return partial(self._run, self.pool, task, gallery, list if whole else split)

    def _run(
        self,
        pool: Pool,
        task: Task,
        gallery: Gallery | None,
        split: Callable[[Sequence[Positions]], list[Positions]],
        batches: Sequence[Positions],
    ) -> Iterator[Sequence[Piece]]:
        seen = [
            Seen(each.clean, each.found, each.company, each.model.block) for each in self.targets
        ]
        for computed in pool.compute(task, seen, split(batches)):
            self.notes += computed.notes
            if computed.error is not None and computed.broken is not None:
                raise DefenseBroke(computed.error.message, self.targets[computed.broken])
            if computed.error is not None:
                raise computed.error
            if gallery is not None and computed.candidates:
                gallery.join(computed.candidates)
            yield computed.pieces
