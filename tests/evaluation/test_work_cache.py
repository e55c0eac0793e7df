"""What is finished is not done again, unless anything it was made from has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.evaluation.work_cache import Arrays, WorkCache, hash_inputs

DATA = (np.arange(6, dtype=np.float32).reshape(2, 3),)


class Work:
    """Doubles, and counts how often."""

    times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return 2 * DATA[0], np.array([True, False])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "some" / "folder"


def test_work_is_done_once(folder: Path) -> None:
    """Another process finds the same arrays."""
    work = Work()
    first = WorkCache(folder).compute(["double", 2], DATA, work)
    again = WorkCache(folder).compute(["double", 2], DATA, work)

    assert work.times == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        (["double", 3], DATA),
        (["double", 2], (DATA[0] + 1,)),
        (["double", 2], (DATA[0].reshape(3, 2),)),
        (["double", 2], (DATA[0].astype(np.float64),)),
        (["double", 2], (DATA[0], DATA[0])),
    ],
)
def test_other_work_is_not_taken_for_it(folder: Path, facts: Any, arrays: Arrays) -> None:
    """Whatever is different: facts, values, shapes, types or how many there are."""
    work = Work()
    WorkCache(folder).compute(["double", 2], DATA, work)
    WorkCache(folder).compute(facts, arrays, work)

    assert work.times == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw[:80] + bytes([raw[80] ^ 255]) + raw[81:],
        lambda raw: b"no archive",
    ],
    ids=["half", "empty", "flipped", "other"],
)
def test_what_is_damaged_is_made_again(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    work = Work()
    WorkCache(folder).compute([], DATA, work)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    said: list[str] = []

    found = WorkCache(folder, said.append).compute([], DATA, work)

    np.testing.assert_array_equal(found[0], 2 * DATA[0])
    assert work.times == 2
    assert said == [f"{path} is damaged: what it held is computed again."]


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    """Of header, arrays, directory and seal."""
    WorkCache(folder).compute([], DATA, Work())
    (path,) = folder.iterdir()
    raw = path.read_bytes()
    for place in range(0, len(raw), 7):
        work = Work()
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])

        found = WorkCache(folder).compute([], DATA, work)

        np.testing.assert_array_equal(found[0], 2 * DATA[0])
        assert work.times == 1


def test_a_result_under_another_name_is_not_taken(folder: Path) -> None:
    work = Work()
    WorkCache(folder).compute([1], DATA, lambda: (np.zeros(3),))
    (path,) = folder.iterdir()
    path.rename(folder / f"{hash_inputs([2], DATA)}.npz")

    found = WorkCache(folder).compute([2], DATA, work)

    np.testing.assert_array_equal(found[0], 2 * DATA[0])


def test_parts_of_another_work_and_what_are_no_parts_are_dropped(folder: Path) -> None:
    one, other = "a" * 64, "b" * 64
    WorkCache(folder).parts.save_part(one, {"row": np.arange(2)})
    here = folder / f"{other}.parts"
    (folder / f"{one}.parts").rename(here)
    WorkCache(folder).parts.save_part(other, {"row": np.arange(3), "x": np.arange(2)})
    WorkCache(folder).parts.save_part(other, {"x": np.arange(2)})
    WorkCache(folder).parts.save_part(other, {"row": np.array(["a", "b"])})
    (here / "folder.npz").mkdir()
    WorkCache(folder).parts.save_part(other, {"row": np.arange(4)})
    said: list[str] = []

    (part,) = WorkCache(folder, said.append).parts.read_parts(other)

    assert part["row"].tolist() == [0, 1, 2, 3]
    assert len(said) == 5
    assert len(list(here.iterdir())) == 1


def test_parts_behind_a_link_are_not_read(folder: Path) -> None:
    key = "a" * 64
    WorkCache(folder).parts.save_part(key, {"row": np.arange(2)})
    (folder / f"{key}.parts").rename(folder / "elsewhere")
    (folder / f"{key}.parts").symlink_to(folder / "elsewhere")

    assert not list(WorkCache(folder).parts.read_parts(key))
    WorkCache(folder).parts.save_part(key, {"row": np.arange(3)})
    assert len(list((folder / "elsewhere").iterdir())) == 1


def test_what_breaks_leaves_nothing(folder: Path) -> None:
    def broken() -> Arrays:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        WorkCache(folder).compute([], DATA, broken)
    assert not WorkCache(folder).has_results


def test_clearing_spares_what_is_not_its_own(folder: Path) -> None:
    """The folder goes with the last file."""
    done = WorkCache(folder)
    assert not done.has_results
    done.compute([], DATA, Work())
    (folder / "mine.npz").touch()
    assert done.has_results

    done.clear()
    assert [path.name for path in folder.iterdir()] == ["mine.npz"]
    assert not done.has_results
    (folder / "mine.npz").unlink()
    done.compute([], DATA, Work())
    (folder / f".{64 * 'a'}.npz.123.tmp").touch()  # what a kill leaves
    done.clear()
    assert not folder.exists()
    done.clear()


def test_folders_of_evaluations_go_with_the_rest(folder: Path) -> None:
    """Each of other facts has its own."""
    done = WorkCache(folder)
    one, other = done.name_run_folder(["mask", 1]), done.name_run_folder(["mask", 2])
    assert one is not None
    assert one != other
    (one / "samples").mkdir(parents=True)
    assert done.has_results

    done.clear()

    assert not folder.exists()
    assert WorkCache().name_run_folder([]) is None


def test_without_a_folder_nothing_is_kept() -> None:
    done, work = WorkCache(), Work()
    done.compute([], DATA, work)
    done.compute([], DATA, work)

    assert work.times == 2
    assert not done.has_results
    done.clear()


def test_parts_go_with_the_rest(folder: Path) -> None:
    """What is finished of a map over batches."""
    done = WorkCache(folder)
    done.parts.save_part("a" * 64, {"row": np.arange(2)})
    assert done.has_results
    (part,) = WorkCache(folder).parts.read_parts("a" * 64)
    assert part["row"].tolist() == [0, 1]

    done.clear()

    assert not folder.exists()
    WorkCache().parts.save_part("a" * 64, part)
    assert not list(WorkCache().parts.read_parts("a" * 64))
