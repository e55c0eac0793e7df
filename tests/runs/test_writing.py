"""Files are whole or not there, their temporary names are nobody's, and locks leave nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout

from robusteval.evaluation.work_cache import WorkCache
from robusteval.runs.folder import Store
from robusteval.runs.keys import hash_clean
from robusteval.runs.storage import pack
from robusteval.runs.types import Columns
from robusteval.runs.writing import hold_lock, remove_leftovers, write_atomically

CONFIG = {"seed": 0}
TOKEN = "0123456789abcdef"
CANDIDATES: Columns = {
    "row": np.arange(2),
    "id": np.arange(2, dtype=np.uint64),
    "hard": np.zeros(2),
    "clean": np.zeros((2, 1, 1, 1), np.uint8),
    "delta": np.zeros((2, 1, 1, 1), np.float16),
}
RECORD = {
    "status": "incomplete",
    "config": CONFIG,
    "model": {},
    "data": {},
    "environment": {},
    "failures": {},
    "findings": [],
    "created": "",
    "seconds": 0.0,
}


def test_no_link_at_the_old_temporary_name_is_followed(tmp_path: Path) -> None:
    """Its name could be guessed, as it held the number of the process."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "theirs")

    write_atomically(tmp_path / "file", b"ours")

    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "file").read_bytes() == b"ours"


def test_a_file_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    """Those of a temporary file are often its owner's alone."""
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_writers_of_one_file_never_tear_it(tmp_path: Path) -> None:
    """Threads have one process number, as have processes in two containers."""
    contents = [bytes([i]) * 50_000 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(10):
            write_atomically(tmp_path / "file", content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_bytes() in contents
    for writer in writers:
        writer.join()

    assert os.listdir(tmp_path) == ["file"]


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path) -> None:
    """Under the name of today and that of version 0.1.0; nothing else, and nobody's link target."""
    theirs = [".file.draft.tmp", ".other.123.tmp", "file.123.tmp", ".file.tmp", f".x.{TOKEN}.tmp"]
    for name in (*theirs, f".file.{TOKEN}.tmp", ".file.123.tmp"):
        (tmp_path / name).touch()

    write_atomically(tmp_path / "file", b"")

    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "file"])


@pytest.mark.skipif(sys.platform == "win32", reason="open files are not removed there")
def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / f".file.{TOKEN}.tmp").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path, "file")
        assert os.listdir(tmp_path) == [f".file.{TOKEN}.tmp"]
    remove_leftovers(tmp_path, "file")

    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")

    assert os.listdir(tmp_path) == []


def test_a_lock_file_goes_with_the_lock(tmp_path: Path) -> None:
    """Also one that a killed process left."""
    path = tmp_path / ".lock"
    path.touch()
    with hold_lock(path):
        assert path.exists()
        with pytest.raises(Timeout), hold_lock(path):
            pass
        assert path.exists()
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)

    assert not path.exists()


def test_one_at_a_time_holds_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    """A file may be removed between opening and locking it, and is then no lock."""
    code = (
        "import sys\nfrom filelock import Timeout\nfrom pathlib import Path\n"
        "from robusteval.runs.writing import hold_lock\n"
        "done = 0\n"
        "while done < 100:\n"
        "    try:\n"
        "        with hold_lock(Path(sys.argv[1], '.lock')):\n"
        "            (alone := Path(sys.argv[1], 'alone')).touch(exist_ok=False)\n"
        "            alone.unlink()\n"
        "            done += 1\n"
        "    except Timeout:\n"
        "        pass\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE) for _ in range(2)]

    assert [(p.communicate()[1], p.returncode) for p in processes] == [(b"", 0)] * 2
    assert os.listdir(tmp_path) == []


def test_opening_a_run_removes_what_a_kill_left_and_nothing_of_the_user(tmp_path: Path) -> None:
    with Store.open(tmp_path, CONFIG) as store:
        key = hash_clean(CONFIG)
        store.save_cell(key, {"id": np.arange(2)}, {"role": "clean"})
        store.save_record(RECORD, [key])
    ours = [f".run.json.{TOKEN}.tmp", f"samples/.two.npz.{TOKEN}.tmp", "samples/.two.npz.77.tmp"]
    mine = [".notes.tmp", f".notes.{TOKEN}.tmp", "samples/.mine.txt.77.tmp", "samples/two.npz.bak"]
    for name in (*ours, *mine):
        (tmp_path / name).touch()

    with Store.open(tmp_path, CONFIG):
        pass

    assert not any((tmp_path / name).exists() for name in (*ours, ".lock"))
    assert all((tmp_path / name).exists() for name in mine)


def test_candidates_never_share_a_path_with_pictures(tmp_path: Path) -> None:
    """They go when the record names the cell."""
    with Store.open(tmp_path, CONFIG) as store:
        store.save_candidates("key", CANDIDATES)
        assert not (tmp_path / "pictures").exists()
        assert store.read_candidates("key").keys() == CANDIDATES.keys()
        store.save_cell("key", {"id": np.arange(2)}, {"role": "attack"})
        store.save_record(RECORD, ["key"])
        assert store.read_candidates("key") == {}

    assert os.listdir(tmp_path / "samples") == ["key.npz"]


def test_candidates_of_an_older_version_are_read(tmp_path: Path) -> None:
    """It kept them where the pictures of a finished cell are, which are not taken for them."""
    store = Store(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.npz").write_bytes(pack(CANDIDATES))
    pictures = {name: CANDIDATES[name] for name in ("row", "clean", "delta")}
    pictures["place"] = np.array(["easiest", "hardest"])
    (tmp_path / "pictures" / "two.npz").write_bytes(pack(pictures))

    assert store.read_candidates("one").keys() == CANDIDATES.keys()
    assert store.read_candidates("two") == {}


def test_rows_whose_candidates_are_lost_are_computed_again(tmp_path: Path) -> None:
    """What is finished is offered to the gallery no more, so pictures would come from the rest."""
    store = Store(tmp_path)
    store.parts.save_part("key", {"row": np.arange(2)})
    store.save_candidates("key", CANDIDATES)
    assert len(store.read_candidates("key")) == 5
    assert len(list(store.parts.read_parts("key"))) == 1

    (tmp_path / "samples" / "key.parts" / "candidates").write_bytes(b"torn")

    assert store.read_candidates("key") == {}
    assert list(store.parts.read_parts("key")) == []


def filled(folder: Path) -> WorkCache:
    """Some work, with the beginning of a run."""
    done = WorkCache(folder)
    done.compute([], (np.zeros(2),), lambda: (np.zeros(2),))
    (folder / "run-0" / "samples").mkdir(parents=True)
    (folder / "run-0" / "run.json").touch()
    return done


def test_work_goes_when_its_result_is_written(tmp_path: Path) -> None:
    done = filled(tmp_path / "net.part")

    done.finish(tmp_path / "net.bin", lambda path: path.write_bytes(b"result"))

    assert os.listdir(tmp_path) == ["net.bin"]
    assert (tmp_path / "net.bin").read_bytes() == b"result"


def test_work_of_a_finished_result_is_known_as_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of a result which is to be replaced is not."""
    out = tmp_path / "net.bin"
    out.write_bytes(b"old")
    done = filled(tmp_path / "net.part")
    done.clear_if_done(out)
    assert done.has_results

    with monkeypatch.context() as patch:
        patch.setattr(WorkCache, "clear", lambda self: None)  # killed before it
        done.finish(out, lambda path: path.write_bytes(b"result"))
    assert done.has_results
    done.clear_if_done(tmp_path / "gone.bin")
    assert done.has_results
    done.clear_if_done(out)

    assert os.listdir(tmp_path) == ["net.bin"]
