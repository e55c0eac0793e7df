"""What it takes to refuse, or to lay out, each hostile run, baseline, gate and preset.

    PYTHONPATH=tests python tests/benchmarks/bench_hostile.py

Each is given to a command in a process of its own. Printed are the slowest and the largest, and
those that take more than 5 s of processor time or 1.5 GB.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hostile_runs import BASELINES, READ, REFUSED, keep_sound_run
from hostile_settings import BROKEN, GATES, ODD, PRESETS

from robusteval.cli import cli

MOST_SECONDS, MOST_BYTES = 5.0, 1.5e9
DOCUMENTED = range(7)


class Case(NamedTuple):
    """A change to a folder, and what is then called in it."""

    name: str
    spoil: Callable[[Path], object]
    words: tuple[str, ...]


class Measured(NamedTuple):
    """What one case took."""

    name: str
    code: int
    seconds: float
    size: float  # bytes, at most, the program itself included


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Write one file of the folder."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda room: (room / name).write_bytes(raw)


def rewrite(make: Callable[[str], str]) -> Callable[[Path], object]:
    """Write the baseline anew."""
    return lambda room: (room / "b.json").write_text(make((room / "b.json").read_text()))


def below(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """Change the run."""
    return lambda room: spoil(room / "run")


def list_cases() -> Iterator[Case]:
    """All of them."""
    for name, spoil in {**REFUSED, **READ}.items():
        yield Case(f"run: {name}", below(spoil), ("report", "run", "--format", "html"))
        yield Case(f"run, compared: {name}", below(spoil), ("compare", "run", "run"))
    for name, make in BASELINES.items():
        yield Case(f"baseline: {name}", rewrite(make), ("check", "run", "--baseline", "b.json"))
    for name, content in {**BROKEN, **GATES, **ODD}.items():
        assert isinstance(content, str | bytes)
        yield Case(f"gates: {name}", write("robusteval.toml", content), ("check", "run"))
    words = ("evaluate", "none.pt", "--data", "none.npz", "--preset", "mine.toml")
    for name, text in PRESETS.items():
        yield Case(f"preset: {name}", write("mine.toml", text), words)


def measure(case: Case, sound: Path) -> Measured:
    """Call the command in a copy of the folder, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        room = Path(place) / "room"
        shutil.copytree(sound, room)
        case.spoil(room)
        child = os.fork()
        if not child:
            os.chdir(room)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            code = 99
            try:
                cli.main(list(case.words))
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            os._exit(code)
        _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Measured(case.name, code, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def main() -> int:
    """Measure all and print; 1 if one is beyond the limits or ends in another code."""
    for name in ("rich.console", "matplotlib.figure", "jinja2", "scipy.special"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as place:
        sound = Path(place)
        keep_sound_run(sound / "run")
        words = ("baseline", "update", "run", "--baseline", "b.json")
        measured = []
        if not (child := os.fork()):
            os.chdir(sound)
            cli.main(list(words))
        os.waitpid(child, 0)
        for case in list_cases():
            measured.append(measure(case, sound))
    wrong = [
        each
        for each in measured
        if each.code not in DOCUMENTED or each.seconds > MOST_SECONDS or each.size > MOST_BYTES
    ]
    slowest = sorted(measured, key=lambda each: -each.seconds)[:5]
    largest = sorted(measured, key=lambda each: -each.size)[:5]
    print(f"{len(measured)} calls, {sum(each.seconds for each in measured):.0f} s in all")
    for title, some in (("slowest", slowest), ("largest", largest), ("beyond", wrong)):
        for each in some:
            print(f"{title:8} {each.seconds:6.2f} s {each.size / 1e6:6.0f} MB  {each.name}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
