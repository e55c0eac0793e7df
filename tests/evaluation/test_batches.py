"""One map over batches: what is finished is not done again, and little memory is no end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robusteval.datasets.dataset import Positions
from robusteval.errors import Interrupted, RunError
from robusteval.evaluation import batches
from robusteval.evaluation.batches import (
    Assembly,
    ResumableMap,
    batch_by_id,
    run_in_halves,
    split_evenly,
    split_rows,
)
from robusteval.evaluation.columns import send_to
from robusteval.evaluation.work_cache import WorkCache
from robusteval.runs.folder import Store
from robusteval.runs.storage import PartFolder
from robusteval.runs.types import Columns

KEY = 64 * "a"


class Squares:
    """Squares of rows; remembers which rows it was asked for."""

    def __init__(self, room: int = 10**9) -> None:
        self.asked: list[list[int]] = []
        self.room = room

    def __call__(self, rows: Positions) -> Columns:
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.asked.append(rows.tolist())
        return {"square": rows**2, "wide": np.stack([rows, rows], 1)}

    def cells(self, rows: Positions) -> list[Columns]:
        return [self(rows)]


@pytest.fixture(params=["run", "cache"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> PartFolder:
    """The two places where rows are kept."""
    return Store(tmp_path).parts if request.param == "run" else WorkCache(tmp_path).parts


def stop_after(n: int) -> Any:
    left = iter(range(n))
    return lambda: next(left, None) is None


def test_a_stopped_map_continues(parts: PartFolder) -> None:
    """Also with other batches; every row is done once and comes in its place."""
    rows, first, second = np.array([2, 3, 5, 8, 13, 21]), Squares(), Squares()
    with pytest.raises(Interrupted):
        ResumableMap(parts, stopping=stop_after(1)).map(
            "squares", KEY, split_rows(rows[::-1], 2), first
        )

    found = ResumableMap(parts).map("squares", KEY, split_rows(rows, 4), second)

    assert first.asked == [[21, 13], [8, 5]]
    assert second.asked == [[2, 3]]
    np.testing.assert_array_equal(found["square"], rows**2)
    np.testing.assert_array_equal(found["wide"][:, 1], rows)


def test_another_key_takes_nothing_over(parts: PartFolder) -> None:
    work = Squares()
    for key in (KEY, 64 * "b"):
        ResumableMap(parts).map("squares", key, [np.arange(3)], work)

    assert work.asked == [[0, 1, 2], [0, 1, 2]]


def test_what_breaks_keeps_what_is_finished(parts: PartFolder) -> None:
    """The batch that broke is done again, no other."""
    asked: list[list[int]] = []

    def work(rows: Positions) -> Columns:
        asked.append(rows.tolist())
        if len(asked) == 2:
            raise ValueError("broken")
        return {"square": rows**2}

    with pytest.raises(ValueError, match="broken"):
        ResumableMap(parts).map("squares", KEY, split_rows(np.arange(4), 2), work)
    ResumableMap(parts).map("squares", KEY, split_rows(np.arange(4), 2), work)

    assert asked == [[0, 1], [2, 3], [2, 3]]


def test_a_batch_that_is_part_of_the_result_is_done_as_a_whole(parts: PartFolder) -> None:
    """Of other batches only what is missing."""
    ResumableMap(parts).map("squares", KEY, [np.arange(3)], Squares())
    some, whole = Squares(), Squares()
    for work, options in ((whole, {"whole": True}), (some, {})):
        (found,) = ResumableMap(parts).map_cells(
            "squares", [KEY], split_rows(np.arange(6), 2), work.cells, **options
        )
        np.testing.assert_array_equal(found["square"], np.arange(6) ** 2)

    assert whole.asked == [[2, 3], [4, 5]]
    assert some.asked == []


def test_cells_have_columns_of_their_own(parts: PartFolder) -> None:
    """A row counts as finished once every cell has it."""
    keys, asked = ["a" * 64, "b" * 64], list[list[int]]()

    def work(rows: Positions) -> list[Columns]:
        asked.append(rows.tolist())
        return [{"x": rows + 1}, {"x": rows + 2, "y": rows}]

    parts.save_part(keys[0], {"x": np.array([1, 2, 3]), "row": np.arange(3)})
    parts.save_part(keys[1], {"x": np.array([3]), "y": np.array([1]), "row": np.array([1])})

    one, other = ResumableMap(parts).map_cells("both", keys, [np.arange(3)], work)

    assert asked == [[0, 2]]
    assert {**one, **other}.keys() == {"x", "y"}
    np.testing.assert_array_equal(one["x"], [1, 2, 3])
    np.testing.assert_array_equal(other["x"], [2, 3, 4])


def test_columns_come_together_as_they_are_concatenated() -> None:
    """Whatever the order of the pieces, and of the kinds of numbers in them."""
    assembly = Assembly(np.array([1, 4, 6, 9]))

    assembly.place(np.array([9, 4]), {"a": np.array([90, 40]), "b": np.array([[9, 0], [4, 0]])})
    assembly.place(np.array([1, 6]), {"a": np.array([0.5, 6.5]), "b": np.array([[1, 0], [6, 0]])})
    found = assembly.join()

    np.testing.assert_array_equal(found["a"], [0.5, 40, 6.5, 90])
    np.testing.assert_array_equal(found["b"][:, 0], [1, 4, 6, 9])


def test_pieces_that_do_not_fit_together_are_refused() -> None:
    assembly = Assembly(np.array([1, 4]))
    assembly.place(np.array([4]), {"a": np.zeros(1)})

    with pytest.raises(KeyError):
        assembly.join()
    with pytest.raises(KeyError):
        assembly.place(np.array([5]), {"a": np.zeros(1)})
    with pytest.raises(KeyError):
        assembly.place(np.array([1]), {"b": np.zeros(1)})
    with pytest.raises(ValueError, match="shapes"):
        assembly.place(np.array([1]), {"a": np.zeros((1, 1))})


def test_rows_stream_once(parts: PartFolder) -> None:
    """Those of an earlier call first; what is not asked for any more is left out."""
    ResumableMap(parts).map("squares", KEY, [np.arange(4)], Squares())

    pieces = list(ResumableMap(parts).stream("squares", [KEY], [np.arange(2, 6)], Squares().cells))

    assert [rows.tolist() for rows, _ in pieces] == [[2, 3], [4, 5]]
    for rows, (columns,) in pieces:
        np.testing.assert_array_equal(columns["square"], rows**2)


def test_rows_are_saved_every_few_seconds(
    parts: PartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said to be saved before comes before."""
    monkeypatch.setattr(batches, "SAVE_EVERY", -1.0)
    events: list[str] = []

    def work(rows: Positions) -> list[Columns]:
        events.append(f"{sum(len(part['row']) for part in parts.read_parts(KEY))} kept")
        return [{"square": rows**2}]

    ResumableMap(parts).map_cells(
        "squares",
        [KEY],
        split_rows(np.arange(3), 1),
        work,
        before_saving=lambda: events.append("before"),
    )

    assert events == ["0 kept", "before", "1 kept", "before", "2 kept", "before", "before"]


@pytest.mark.parametrize(
    ("quick", "most", "sizes"),
    [
        (1e9, 7, [2, 6, 5]),
        (1e9, 100, [2, 11]),
        (0.0, 100, [2, 2, 2, 2, 2, 2, 1]),
        (1e9, 0, [2, 2, 2, 2, 2, 2, 1]),
    ],
    ids=["at most 7 rows", "quick", "slow", "not to be joined"],
)
def test_quick_batches_are_done_together(
    parts: PartFolder, monkeypatch: pytest.MonkeyPatch, quick: float, most: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(batches, "QUICK", quick)
    work, rows = Squares(), np.arange(13)

    found = ResumableMap(parts).map("squares", KEY, split_rows(rows, 2), work, most=most)

    assert [len(asked) for asked in work.asked] == sizes
    assert [row for asked in work.asked for row in asked] == rows.tolist()
    np.testing.assert_array_equal(found["square"], rows**2)


@pytest.mark.parametrize(("quick", "together"), [(3.9, 1), (4, 2), (7.5, 3), (0, 1), (np.inf, 4)])
def test_as_many_batches_as_are_quick(quick: float, together: int) -> None:
    assert batches.count_together(split_rows(np.arange(9), 2), 8, quick) == together
    assert batches.count_together([], 8, quick) == 1


def test_batches_are_not_joined_beyond_what_memory_held(
    parts: PartFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "QUICK", 1e9)
    work = Squares(room=4)

    ResumableMap(parts).map("squares", KEY, split_rows(np.arange(20), 2), work, most=10)

    assert [len(asked) for asked in work.asked] == 10 * [2]


def test_memory_that_runs_out_halves_the_batch() -> None:
    """As often as it takes; whoever can is asked to need less."""
    work = Squares(room=3)
    asked: list[int] = []
    pieces = run_in_halves(work, np.arange(9), asked.append)

    assert [len(rows) for rows, _ in pieces] == [2, 2, 2, 2, 1]
    assert np.concatenate([rows for rows, _ in pieces]).tolist() == list(range(9))
    assert asked == [4, 2]


def test_memory_that_is_never_enough_is_a_sentence() -> None:
    with pytest.raises(RunError, match="even for one image"):
        run_in_halves(Squares(room=0), np.arange(4))


def test_another_error_is_passed_on() -> None:
    def broken(rows: Positions) -> Columns:
        raise RuntimeError("a shape")

    with pytest.raises(RuntimeError, match="a shape"):
        run_in_halves(broken, np.arange(4))


def test_batches_follow_content() -> None:
    """Not the order of the images."""
    ids = np.array([30, 10, 20, 0], np.uint64)

    assert [b.tolist() for b in batch_by_id(np.array([0, 1, 3]), ids, 2)] == [[3, 1], [0]]


def test_even_batches() -> None:
    assert [len(batch) for batch in split_evenly(7, 3)] == [3, 2, 2]
    assert [len(batch) for batch in split_evenly(0, 3)] == [0]


class Watched:
    """Stands in for a tensor where there is no GPU: says how it is copied."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def pin_memory(self) -> Watched:
        self.said.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Watched:
        self.said.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:1", ["pinned", ("cuda", True)]), ("cpu", [("cpu", False)])]
)
def test_copies_to_a_gpu_are_waited_for_by_nobody(device: str, said: list[object]) -> None:
    tensor: Any = Watched()

    assert send_to(torch.device(device), tensor).said == said  # type: ignore[attr-defined]
