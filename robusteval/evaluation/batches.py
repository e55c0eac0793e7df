"""Work on many images batch by batch, such that a stop or little memory loses next to nothing.

Rows that are finished are kept every few seconds, in the folder of a run or in a `WorkCache`, and
taken over by the next call for the same key. Where memory runs out a batch is halved until it fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from robusteval.datasets.dataset import Positions
from robusteval.errors import Interrupted, RunError
from robusteval.models.failures import is_out_of_memory, run_in_parts
from robusteval.models.steps import STOPPED, listen
from robusteval.progress import Progress, Silent, take_over
from robusteval.runs.storage import PartFolder
from robusteval.runs.types import Columns

SAVE_EVERY = 2.0  # seconds
QUICK = 30.0  # seconds that batches may take together: so much is lost at a stop
T = TypeVar("T")
Piece = tuple[Positions, Sequence[Columns]]  # rows, and for each key their columns
Runner = Callable[[Sequence[Positions]], Iterator[Sequence[Piece]]]  # batches in, pieces out


@dataclass
class ResumableMap:
    """Work on batches of rows, taken up where an earlier call was stopped.

    Attributes
    ----------
    parts : PartFolder
        Keeps what is finished: `Store.parts` of a run, or `WorkCache.parts`.
    progress : Progress
        Told how far it is.
    stopping : callable
        Asked after each batch and each step that the work tells; Interrupted once it says so. A
        batch that is stopped in its middle is done again by the next call.
    shrink : callable
        Told how many images are left in half a batch when memory ran out, before it is tried again.
    expect : callable
        Told which rows are worked on next, in their order.
    seconds : float
        Spent so far on work, in all calls of this object.
    """

    parts: PartFolder
    progress: Progress = field(default_factory=Silent)
    stopping: Callable[[], bool] = lambda: False
    shrink: Callable[[int], object] = lambda half: None
    expect: Callable[[Positions], object] = lambda rows: None
    seconds: float = 0.0

    def map(
        self,
        title: str,
        key: str,
        batches: Sequence[Positions],
        work: Callable[[Positions], Columns],
        **options: Any,
    ) -> Columns:
        """Compute columns of many rows.

        Parameters
        ----------
        title : str
            What it is called while it is under way.
        key : str
            Hash of everything that the result depends on.
        batches : sequence of ndarray
            Rows ``(m,)`` that are worked on together; no row twice. See `batch_by_id` and
            `split_evenly`.
        work : callable
            ``rows (m,) -> columns of m entries each``.
        **options
            As for `stream`.

        Returns
        -------
        Columns
            Of all batches, in the order of their rows; empty if there are none.
        """
        return self.map_cells(title, [key], batches, lambda rows: [work(rows)], **options)[0]

    def map_cells(
        self,
        title: str,
        keys: Sequence[str],
        batches: Sequence[Positions],
        work: Callable[[Positions], Sequence[Columns]],
        **options: Any,
    ) -> list[Columns]:
        """Compute several sets of columns of the same rows at once, a key and a set for each.

        See `map` and, for the options, `stream`.
        """
        order = np.sort(np.concatenate([*batches, np.zeros(0, np.int64)]))
        found = [Assembly(order) for _ in keys]
        for rows, cells in self.stream(title, keys, batches, work, **options):
            for each, columns in zip(found, cells, strict=True):
                each.place(rows, columns)
        return [each.join() for each in found]

    def stream(
        self,
        title: str,
        keys: Sequence[str],
        batches: Sequence[Positions],
        work: Callable[[Positions], Sequence[Columns]],
        *,
        whole: bool = False,
        most: int = 0,
        before_saving: Callable[[], object] = lambda: None,
        run: Runner | None = None,
    ) -> Iterator[Piece]:
        """Yield rows and their columns as they come, for results too large to hold: each row once.

        Parameters
        ----------
        title, keys, batches, work
            As for `map_cells`.
        whole : bool
            A batch is part of the result: one that is finished in part is done again.
        most : int
            Batches that follow each other are done together, as many as those before say will be
            quick, if they have no more rows than this. Not for work that is given to `run`.
        before_saving : callable
            Called whenever rows are about to be kept.
        run : callable, optional
            Does the work on all batches in place of this process, in any order.
        """
        wanted = np.sort(np.concatenate([*batches, np.zeros(0, np.int64)]))
        stored: Iterable[Piece] = self._stored(keys)
        if whole:
            stored = drop_torn(list(stored), batches)
        have = np.zeros(len(wanted), np.bool_)
        unsaved: list[Piece] = []
        started = saved = time.monotonic()
        self.progress.begin(title, len(wanted))
        try:
            for rows, cells in stored:
                keep, places = locate_rows(wanted, rows)
                keep[keep] = ~have[places]
                have[places] = True
                yield rows[keep], [take_rows(columns, keep) for columns in cells]
            if have.any():
                take_over(self.progress, int(have.sum()))
            todo = [batch[~have[np.searchsorted(wanted, batch)]] for batch in batches]
            rest = [batch for batch in todo if len(batch)]
            for pieces in self._run(work, rest, most) if run is None else run(rest):
                unsaved += pieces
                yield from pieces
                self.progress.advance(sum(len(rows) for rows, _ in pieces))
                if time.monotonic() - saved > SAVE_EVERY:
                    before_saving()
                    self._save(keys, unsaved)
                    unsaved, saved = [], time.monotonic()
                if self.stopping():
                    raise Interrupted(STOPPED)
        finally:
            before_saving()
            self._save(keys, unsaved)
            self.seconds += time.monotonic() - started
            self.progress.end()

    def _run(
        self,
        work: Callable[[Positions], Sequence[Columns]],
        batches: Sequence[Positions],
        most: int,
    ) -> Iterator[Sequence[Piece]]:
        """Do the work batch by batch, or several at a time."""
        if batches:
            self.expect(np.concatenate(batches))
        together = 1
        while batches:
            batch, batches = np.concatenate(batches[:together]), batches[together:]
            started = time.monotonic()
            with listen(self.progress, len(batch), self.stopping):
                pieces = run_in_halves(work, batch, self.shrink)
            if len(pieces) > 1:  # memory ran out
                most = min(most, max(len(rows) for rows, _ in pieces))
            together = count_together(
                batches, most, QUICK * len(batch) / max(time.monotonic() - started, 1e-9)
            )
            yield pieces

    def _stored(self, keys: Sequence[str]) -> Iterator[Piece]:
        """Rows that an earlier call kept under all of these keys."""
        if len(keys) == 1:  # a part at a time: all of them may be too large to hold
            for part in self.parts.read_parts(keys[0]):
                yield part["row"], [drop_row(part)]
            return
        each = [
            [(part["row"], drop_row(part)) for part in self.parts.read_parts(key)] for key in keys
        ]
        known = [{row for rows, _ in parts for row in rows.tolist()} for parts in each]
        common = np.array(sorted(set.intersection(*known)), np.int64)
        if len(common):
            yield common, [sort_rows(parts, common) for parts in each]

    def _save(self, keys: Sequence[str], pieces: Sequence[Piece]) -> None:
        """Keep the rows of these pieces as one part under each key."""
        if not pieces:
            return
        rows = np.concatenate([rows for rows, _ in pieces])
        for i, key in enumerate(keys):
            columns = sort_rows([(some, cells[i]) for some, cells in pieces], rows)
            self.parts.save_part(key, {**columns, "row": rows})


class Assembly:
    """Columns of many rows that come in pieces, each put in its place at once.

    Held one by one until all are there, small arrays would lie scattered between those of the
    networks, whose memory could not be used again: more of it with every batch.

    Parameters
    ----------
    rows : ndarray
        Those that come ``(n,)``, in order, none twice.
    """

    def __init__(self, rows: Positions) -> None:
        self.rows = rows
        self.there = np.zeros(len(rows), np.bool_)
        self.columns: Columns = {}

    def place(self, rows: Positions, columns: Columns) -> None:
        """Put some rows ``(m,)`` in their places.

        KeyError or ValueError if their columns are not those of the first, even where no row is
        left of a piece, or if they are none of these.
        """
        if not self.columns:
            self.columns = {
                name: np.empty((len(self.rows), *values.shape[1:]), values.dtype)
                for name, values in columns.items()
            }
        places = np.searchsorted(self.rows, rows)
        if (places >= len(self.rows)).any() or not np.array_equal(self.rows[places], rows):
            raise KeyError("rows that nobody asked for")
        for name, column in self.columns.items():
            values = columns[name]
            if values.shape != (len(rows), *column.shape[1:]):
                raise ValueError(f"the column {name} has two shapes")
            kind = np.result_type(column, values)
            if kind != column.dtype:
                self.columns[name] = column = column.astype(kind)
            column[places] = values
        self.there[places] = True

    def join(self) -> Columns:
        """All columns; empty if there were no rows. KeyError if some did not come."""
        if self.columns and not self.there.all():
            raise KeyError("rows that no part has")
        return self.columns


def count_together(batches: Sequence[Positions], most: int, quick: float) -> int:
    """How many of the next batches have `most` rows, and so many as are `quick`, at most; or 1."""
    rows = np.cumsum([len(batch) for batch in batches])
    return max(1, int(np.searchsorted(rows, min(most, quick), side="right")))


def run_in_halves(
    work: Callable[[Positions], T],
    rows: Positions,
    shrink: Callable[[int], object] = lambda half: None,
) -> list[tuple[Positions, T]]:
    """Do the work on some rows ``(m,)``, all at once or in halves where memory runs out.

    Rows and results of each piece, see `run_in_parts`; RunError if there is too little memory for
    one row.
    """
    try:
        return run_in_parts(work, rows, shrink=shrink)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise RunError("memory runs out even for one image: use a machine with more of it")


def batch_by_id(rows: Positions, ids: np.ndarray[Any, Any], size: int) -> list[Positions]:
    """Split rows ``(m,)`` into batches in the order of their content ids, ``ids[rows]``.

    Such batches do not depend on the order of the images.
    """
    return split_rows(rows[np.argsort(ids[rows], kind="stable")], size)


def split_rows(rows: Positions, size: int) -> list[Positions]:
    """Split rows ``(m,)`` into batches of this size, the last one smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def split_evenly(n: int, size: int) -> list[Positions]:
    """Split the numbers below `n` into batches of nearly equal size, at most `size`."""
    return np.array_split(np.arange(n), max(1, -(-n // size)))


def drop_torn(pieces: Sequence[Piece], batches: Sequence[Positions]) -> list[Piece]:
    """Leave out the rows of batches that are finished in part only."""
    have = {row for rows, _ in pieces for row in rows.tolist()}
    torn = [batch for batch in batches if not have.issuperset(batch.tolist())]
    again = np.concatenate([*torn, np.zeros(0, np.int64)])
    kept = [(rows, cells, ~np.isin(rows, again)) for rows, cells in pieces]
    return [(rows[keep], [take_rows(c, keep) for c in cells]) for rows, cells, keep in kept]


def locate_rows(wanted: Positions, rows: Positions) -> tuple[np.ndarray[Any, Any], Positions]:
    """Which rows ``(m,)`` are among others, and where; these are in order, none twice."""
    if not len(wanted):
        return np.zeros(len(rows), np.bool_), np.zeros(0, np.int64)
    places = np.searchsorted(wanted, rows).clip(max=len(wanted) - 1)
    among = wanted[places] == rows
    return among, places[among]


def sort_rows(parts: Sequence[tuple[Positions, Columns]], rows: Positions) -> Columns:
    """Join columns, each with the rows it is of, in the order of `rows`; empty if there are none.

    Of a row that is there several times the last counts.
    """
    if not parts:
        return {}
    known = np.concatenate([some for some, _ in parts])
    order = np.argsort(known, kind="stable")
    last = np.searchsorted(known[order], rows, side="right") - 1
    places = order[last]
    if not np.array_equal(known[places], rows):
        raise KeyError("rows that no part has")
    return {
        name: np.concatenate([columns[name] for _, columns in parts])[places]
        for name in parts[0][1]
    }


def take_rows(columns: Columns, keep: np.ndarray[Any, Any]) -> Columns:
    """Columns of some rows alone: those at these positions, or where `keep` ``(m,)`` is true."""
    return {name: values[keep] for name, values in columns.items()}


def drop_row(part: Columns) -> Columns:
    """Columns without the one that says which rows they are of."""
    return {name: values for name, values in part.items() if name != "row"}
