"""A command in processes of which each dies at another file event, and again after each.

    python kills.py FOLDER WORD...

In a copy of FOLDER the command runs once without a kill, and its file events are counted. Then, for
each event in turn: in a new copy the process ends without a word just before it, and the same
command runs again. Printed is JSON: how often it was killed, and what was not as without a kill.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KILLED = 77
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
TIMES = ("seconds", "created", "images_per_second", "times", "sha256")  # of files that hold times


def run_and_die(folder: Path, words: list[str], at: int, told: int) -> None:
    """Run the command in this process, which ends before file event `at`; never returns.

    The number of events is written to the file `told`.
    """
    root, seen = str(folder), 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = given
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in EVENTS:
            path = given[0]
        else:
            return
        if os.path.abspath(os.fsdecode(path)).startswith(root):
            if seen == at:
                os._exit(KILLED)
            seen += 1

    os.chdir(folder)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["robusteval", *words]
    from robusteval.cli import cli

    sys.addaudithook(count)
    code: Any = 0
    try:
        cli(words)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        os.write(2, repr(error).encode())
        code = 99
    os.write(told, str(seen).encode())
    os._exit(code or 0)


def run_child(folder: Path, words: list[str], at: int = -1) -> tuple[int, int]:
    """Exit code and number of file events of the command in a process of its own."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        run_and_die(folder, words, at, tell)
    os.close(tell)
    count = os.read(told, 20)
    os.close(told)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)


def describe_files(folder: Path) -> dict[str, str]:
    """All that is in a folder, by hashes of its content without times."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hash_content(path)
        for path in sorted(folder.rglob("*"))
    }


def hash_content(path: Path) -> str:
    """Hash a file, arrays and JSON without the times in them."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(drop_times(json.loads(content))).encode()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            kept = {name: arrays[name] for name in arrays.files if name != "seconds"}
        content = b"".join(
            f"{name} {a.dtype} {a.shape}".encode() + a.tobytes() for name, a in sorted(kept.items())
        )
    return hashlib.sha256(content).hexdigest()


def drop_times(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: drop_times(each) for key, each in value.items() if key not in TIMES}
    return [drop_times(each) for each in value] if isinstance(value, list) else value


def kill_at_each_event(
    template: Path, words: list[str], room: Path, stride: int = 1
) -> dict[str, Any]:
    """See above."""

    def lay_out(name: str) -> Path:
        shutil.copytree(template, room / name)
        return room / name

    code, events = run_child(lay_out("whole"), words)
    if code:
        raise SystemExit((room / "whole.log").read_text())
    whole = describe_files(room / "whole")
    print(f"{events} file events", file=sys.stderr, flush=True)
    wrong: list[dict[str, Any]] = []
    started = time.monotonic()
    for at in range(0, events, stride):
        folder = lay_out(f"at{at}")
        first, _ = run_child(folder, words, at)
        second, _ = run_child(folder, words)
        said = folder.with_suffix(".log").read_text()
        refused = second == 2 and ": choose another --out" in said  # finished before the kill
        after = describe_files(folder)
        changed = [
            f"{name}: {'lost' if name not in after else 'litter' if name not in whole else 'other'}"
            for name in sorted(whole.keys() | after.keys())
            if whole.get(name) != after.get(name)
        ]
        if first != KILLED or (second and not refused) or changed:
            wrong.append({"at": at, "codes": [first, second], "changed": changed, "said": said})
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink()
    seconds = round(time.monotonic() - started, 1)
    return {"events": events, "files": len(whole), "wrong": wrong, "seconds": seconds}


def prepare() -> None:
    """Load what commands load, once for all processes, and let them save often and do little."""
    import robusteval

    for module in pkgutil.walk_packages(robusteval.__path__, "robusteval."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.figure", "xgboost", "sklearn.linear_model"):
        importlib.import_module(name)
    from robusteval.defenses import boosting, splits
    from robusteval.evaluation import batches

    batches.SAVE_EVERY = 0.0
    splits.FOLDS = 3
    boosting.ROUNDS = 5


if __name__ == "__main__":
    prepare()
    with tempfile.TemporaryDirectory() as place:
        found = kill_at_each_event(Path(sys.argv[1]), sys.argv[2:], Path(place).resolve())
    print(json.dumps(found))
