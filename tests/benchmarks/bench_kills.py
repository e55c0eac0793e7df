"""Whether a run whose processes are killed at random moments ends with the same bits. By hand.

Usage: python tests/benchmarks/bench_kills.py [--times 10] [--workers 2] [--ray ADDRESS]
       [-- OPTIONS OF EVALUATE]

The demo network is evaluated once without workers. Then, as often as asked for each way: a worker
is killed with -9 and replaced; the first process is killed with -9, or told to stop as by Ctrl-C,
and the same command given again. Columns, findings and pictures must be those of the first run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from robusteval.runs.folder import load_run

sys.path.insert(0, str(Path(__file__).parents[1]))
from same_runs import assert_same

OPTIONS = ("demo", "--preset", "quick", "--samples", "60")
WAYS = ("worker", "head", "Ctrl-C")


def start(folder: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """An evaluation in a process group of its own."""
    command = [sys.executable, "-m", "robusteval", "evaluate", *options, "--out", str(folder)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, start_new_session=True, stdout=quiet, stderr=quiet)


def list_workers(head: int) -> list[int]:
    """Processes that compute for a first process, or that Ray started for it; Linux."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        parents[int(folder.name)] = parent
    of_ray = [
        number
        for number, title in titles.items()
        if title.startswith(b"ray::Worker") and parents.get(parents[number]) == head
    ]
    own = [
        number
        for number, parent in parents.items()
        if parent == head and b"multiprocessing.spawn" in titles[number]
    ]
    return sorted(of_ray or own)


def disturb(way: str, process: subprocess.Popen[bytes], rng: np.random.Generator) -> bool:
    """Kill what the way says; False if there was nothing to kill any more."""
    if process.poll() is not None:
        return False
    if way != "worker":
        process.send_signal(signal.SIGKILL if way == "head" else signal.SIGINT)
        return True
    workers = list_workers(process.pid)
    if workers:
        os.kill(int(rng.choice(workers)), signal.SIGKILL)
    return bool(workers)


def describe_difference(one: Path, other: Path) -> str:
    """The first thing in which two runs differ; empty if there is none."""
    try:
        assert_same(load_run(one), load_run(other))
    except AssertionError as error:
        return str(error).strip() or "findings, records or pictures"
    return ""


@click.command()
@click.option("--times", default=10)
@click.option("--workers", default=2)
@click.option("--ray", "address", help="Workers of Ray's instead of our own, say `local`.")
@click.option("--seed", default=0)
@click.argument("options", nargs=-1)
def main(
    times: int, workers: int, address: str | None, seed: int, options: tuple[str, ...]
) -> None:
    """Print what became of each run."""
    given = options or OPTIONS
    shared = [*given, "--workers", str(workers), *(["--ray", address] if address else [])]
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        reference, number = Path(folder, "reference"), 0
        if start(reference, given).wait():
            raise click.ClickException("evaluate fails by itself: try it with these options")
        began = time.perf_counter()
        process = start(Path(folder, "undisturbed"), shared)
        while process.poll() is None and not list_workers(process.pid):
            time.sleep(0.1)
        ready = time.perf_counter() - began
        process.wait()
        whole = time.perf_counter() - began
        for way in WAYS:
            same, hit = 0, 0
            for _ in range(times):
                out, number = Path(folder, str(number)), number + 1
                process = start(out, shared)
                time.sleep(ready + (whole - ready) * rng.uniform(0, 0.95))
                hit += disturb(way, process, rng)
                process.wait()
                if process.returncode:
                    start(out, shared).wait()
                difference = describe_difference(reference, out)
                same += not difference
                if difference:
                    click.echo(f"{way}: {difference}")
            click.echo(f"{way}: {hit} of {times} killed in time, {same} end with the same bits")


if __name__ == "__main__":
    main()
