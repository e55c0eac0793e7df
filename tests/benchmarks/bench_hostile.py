"""What it takes to refuse, or to lay out, each hostile file through the command line.

    PYTHONPATH=tests python tests/benchmarks/bench_hostile.py [PART OF A NAME] [EVERY]

Checkpoints, images, runs, baselines, gates and presets: each is given to a command in a process of
its own; of all, or of one in EVERY. Ctrl-C ends it early. Printed are how many of each kind there
are, the slowest and the largest, and those that take more than 5 s of processor time or 1.5 GB, end
in a code that is not documented, show a traceback or an internal error, or execute anything.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import hostile_checkpoints
import hostile_data
from hostile_runs import BASELINES, READ, REFUSED, keep_sound_run
from hostile_settings import BROKEN, GATES, ODD, PRESETS

from robusteval.cli import cli

MOST_SECONDS, MOST_BYTES = 5.0, 1.5e9
DOCUMENTED = range(7)
SIGNS = (b"Traceback", b"internal error", b"bug in robusteval")


class Case(NamedTuple):
    """A change to a folder, and what is then called in it: words, and what the change names."""

    name: str
    spoil: Callable[[Path], object]
    words: tuple[str, ...]


class Measured(NamedTuple):
    """What one case took, and how it ended."""

    name: str
    code: int
    seconds: float  # of the processor
    passed: float  # seconds on the clock
    size: float  # bytes, at most, the program itself included
    fault: str

    def __str__(self) -> str:
        took = f"{self.seconds:6.2f} s ({self.passed:.2f} s passed) {self.size / 1e6:6.0f} MB"
        return f"{took}  {self.name}  {self.fault}"


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
    from robusteval.models.networks import ARCHITECTURES

    state = ARCHITECTURES["digits_cnn"]().state_dict()
    words: tuple[str, ...] = ("evaluate", "x.pt", "--data", "digits")
    for name, raw, _ in hostile_checkpoints.list_all(state):
        yield Case(
            f"checkpoint: {name}", write("x.pt", raw), (*words, "--arch", "robusteval:digits_cnn")
        )
    for name, raw, _ in hostile_checkpoints.list_notes(state):
        yield Case(f"checkpoint: {name}", write("x.pt", raw), words)
    words = ("evaluate", "net.safetensors", "--attack", "noise", "--no-probes", "--out", "new")
    for name, make in hostile_data.list_all():
        yield Case(f"images: {name}", make, (*words, "--data"))
    for name, spoil in {**REFUSED, **READ}.items():
        for form in ("table", "html", "csv"):
            yield Case(f"run: {name}, {form}", below(spoil), ("report", "run", "--format", form))
        yield Case(f"run: {name}, compared", below(spoil), ("compare", "run", "run"))
        yield Case(f"run: {name}, checked", below(spoil), ("check", "run"))
        yield Case(f"run: {name}, as baseline", below(spoil), ("baseline", "update", "run"))
    for name, change in BASELINES.items():
        yield Case(f"baseline: {name}", rewrite(change), ("check", "run", "--baseline", "b.json"))
    for name, content in {**BROKEN, **GATES, **ODD}.items():
        assert isinstance(content, str | bytes)
        yield Case(f"gates: {name}", write("robusteval.toml", content), ("check", "run"))
    words = ("evaluate", "none.pt", "--data", "none.npz", "--preset", "mine.toml")
    for name, text in PRESETS.items():
        yield Case(f"preset: {name}", write("mine.toml", text), words)


def call(room: Path, words: Sequence[str], out: int) -> None:
    """Call the command in this process, which ends; never returns."""
    os.chdir(room)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code: object = 99
    try:
        cli.main(list(words))
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def measure(case: Case, sound: Path) -> Measured:
    """Call the command in a copy of the folder, in a process of its own."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as said:
        room = Path(place) / "room"
        shutil.copytree(sound, room)
        named = case.spoil(room)
        words = (*case.words, named) if isinstance(named, str) else case.words
        started = time.monotonic()
        child = os.fork()
        if not child:
            call(room, words, said.fileno())
        _, status, usage = os.wait4(child, 0)
        passed = time.monotonic() - started
        said.seek(0)
        shown = said.read()
        executed = any(room.rglob(hostile_checkpoints.MARK))
    code = os.waitstatus_to_exitcode(status)
    seconds, size = usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss
    fault = "executed" if executed else ""
    if any(sign in shown for sign in SIGNS):
        fault = shown.decode("utf-8", "replace").strip()[-200:]
    elif code not in DOCUMENTED:
        fault = f"exit code {code}"
    elif seconds > MOST_SECONDS or size > MOST_BYTES:
        fault = "takes too much"
    return Measured(case.name, code, seconds, passed, size, fault)


def prepare(sound: Path) -> None:
    """Write a sound run, its baseline and a network."""
    from robusteval.models.checkpoint import save
    from robusteval.models.networks import ARCHITECTURES

    keep_sound_run(sound / "run")
    state = ARCHITECTURES["digits_cnn"]().state_dict()
    save(sound / "net.safetensors", state, arch="robusteval:digits_cnn", num_classes=10,
         input_shape=(1, 32, 32), mean=None, std=None)  # fmt: skip
    if not (child := os.fork()):
        call(sound, ("baseline", "update", "run", "--baseline", "b.json"), 2)
    os.waitpid(child, 0)


def main(wanted: str = "", every: str = "1") -> int:
    """Measure those whose name holds a word and print; 1 if one is not as it should be."""
    for name in ("rich.console", "matplotlib.figure", "jinja2", "scipy.special", "torch", "art"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as place:
        sound = Path(place) / "sound"
        sound.mkdir()
        prepare(sound)
        cases = [case for case in list_cases() if wanted in case.name]
        measured = []
        with suppress(KeyboardInterrupt):
            for case in cases[:: int(every)]:
                measured.append(measure(case, sound))
    for kind, number in Counter(each.name.partition(":")[0] for each in measured).items():
        print(f"{number} calls on {kind}")
    print(f"{len(measured)} of {len(cases)} in all, {sum(each.seconds for each in measured):.0f} s")
    slowest = sorted(measured, key=lambda each: -each.seconds)[:5]
    largest = sorted(measured, key=lambda each: -each.size)[:5]
    wrong = [each for each in measured if each.fault]
    for title, some in (("slowest", slowest), ("largest", largest), ("wrong", wrong)):
        for each in some:
            print(f"{title:8} {each}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
