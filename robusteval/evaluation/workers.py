"""Processes on this machine that do pieces of a run; the standard library runs them.

Each makes the plan of the run for itself, from the same files, and is then given pieces. What a
worker was doing when it died is done again. The process that gives the work keeps the results, so
that whatever else dies, the run continues from its folder, with workers or without.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, connection, get_context, parent_process
from multiprocessing.util import Finalize
from pathlib import Path
from threading import Thread

import torch

from robusteval.datasets.dataset import Positions
from robusteval.errors import Interrupted, RobustevalError, RunError
from robusteval.evaluation.bench import Bench
from robusteval.evaluation.pieces import Computed, Seen, Task
from robusteval.evaluation.plan import Plan
from robusteval.models.environment import keep_freed_memory
from robusteval.models.steps import STOPPED

WAIT = 0.5  # seconds between two looks at whether the run is to stop
DEATHS = 5  # of workers in a row, without a piece that was done in between, that end the run
PATIENCE = 3.0  # seconds in which workers without work end by themselves, or are ended
AHEAD = 2  # pieces that a worker is given at a time
Recipe = Callable[[], Plan]

_bench: Bench | None = None  # of this process, if it is a worker
_seen: tuple[str, Sequence[Seen]] = ("", ())  # the file that was read last, and what it holds


def start_worker(folder: str, threads: int) -> None:
    """Make a worker of this process: it ends with the one that started it, not by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr  # other people's code may print
    warnings.simplefilter("ignore")  # they are told once, by the process that gives the work
    Thread(target=follow_parent, daemon=True).start()
    # after what libraries have to take away, without taking the interpreter apart: that takes long
    Finalize(None, os._exit, args=(0,), exitpriority=-1)
    os.chdir(folder)
    torch.set_num_threads(threads)
    keep_freed_memory()


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started inside never hear Ctrl-C, not even while they import.

    Here one that comes inside is heard at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """End this process as soon as the one that started it has ended, whatever ended that."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def do_piece(recipe: Recipe, key: str, task: Task, path: str, rows: Positions) -> Computed:
    """Do a task on some rows ``(m,)`` at the bench of this process, made by the first call.

    What is known of the targets is in the file `path`.
    """
    global _bench, _seen
    try:
        if _bench is None:
            _bench = Bench(recipe(), key)
    except RobustevalError as error:
        return Computed(error=error)
    if _seen[0] != path:
        with open(path, "rb") as file:
            _seen = path, pickle.load(file)
    return _bench.compute(task, _seen[1], rows)


class ProcessPool:
    """Processes of the standard library that do pieces of a run; see `open_processes`.

    Parameters
    ----------
    size : int
        How many.
    threads : int
        Of torch, in each.
    recipe : callable
        Makes the plan; a function of a module with its arguments, as it is sent to the processes.
    key : str
        Of the plan that must come of it.
    stopping : callable
        Asked again and again whether the run is to stop.
    """

    def __init__(
        self,
        size: int,
        threads: int,
        recipe: Recipe,
        key: str,
        stopping: Callable[[], bool],
    ) -> None:
        self.size = size
        self.threads = threads
        self.work = partial(do_piece, recipe, key)
        self.stopping = stopping
        self.others = set(active_children())
        self.executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.size,
            mp_context=get_context("spawn"),
            initializer=start_worker,
            initargs=(os.getcwd(), self.threads),
        )

    def close(self, patience: float = 0.0) -> None:
        """End the processes, whatever they are doing.

        Those without work end by themselves in so many seconds, and so take away what libraries
        that they imported have made, such as the locks of progress bars.
        """
        self.executor.shutdown(wait=False, cancel_futures=True)
        processes = set(active_children()) - self.others
        until = time.monotonic() + patience
        for process in processes:
            process.join(max(until - time.monotonic(), 0.0))
        for process in processes:
            process.terminate()

    def compute(
        self, task: Task, seen: Sequence[Seen], batches: Sequence[Positions]
    ) -> Iterator[Computed]:
        """Do a task on each of some batches of rows ``(m,)``; results as they come."""
        waiting = list(reversed(batches))
        under_way: dict[Future[Computed], Positions] = {}
        deaths = 0
        with tempfile.TemporaryDirectory(prefix="robusteval-") as folder:
            path = Path(folder) / "seen"
            path.write_bytes(pickle.dumps(list(seen)))
            try:
                while waiting or under_way:
                    try:
                        while waiting and len(under_way) < AHEAD * self.size:
                            rows = waiting[-1]
                            with deaf():  # the first call starts the processes
                                given = self.executor.submit(self.work, task, str(path), rows)
                            under_way[given] = rows
                            waiting.pop()
                        for found in self._collect(under_way):
                            deaths = 0
                            yield found
                    except BrokenProcessPool:
                        deaths += 1
                        if deaths > DEATHS:
                            raise RunError(
                                "workers died again and again; what is finished is saved, and the"
                                " same command without --workers continues"
                            ) from None
                        waiting += under_way.values()
                        under_way.clear()
                        self.close()
                        self.executor = self._start()
                    if self.stopping():
                        raise Interrupted(STOPPED)
            finally:
                for future in under_way:
                    future.cancel()

    def _collect(self, under_way: dict[Future[Computed], Positions]) -> Iterator[Computed]:
        """What is done by now, taken from what is under way; BrokenProcessPool if a worker died."""
        done, _ = wait(under_way, timeout=WAIT, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda each: each.exception() is not None):
            found = future.result()
            del under_way[future]
            yield found


@contextmanager
def open_processes(
    plan: Plan, recipe: Recipe, workers: int, stopping: Callable[[], bool]
) -> Iterator[ProcessPool]:
    """Start workers, and end them in the end; they share the cores, or the GPU.

    Parameters
    ----------
    plan : Plan
        What is run.
    recipe : callable
        Makes the same plan in another process.
    workers : int
        How many.
    stopping : callable
        Asked again and again whether the run is to stop.
    """
    before = torch.get_num_threads()
    threads = max(before // workers, 1)
    torch.set_num_threads(threads)  # here as well: bits may depend on it
    pool = ProcessPool(workers, threads, recipe, plan.key, stopping)
    try:
        yield pool
        pool.close(PATIENCE)
    finally:
        pool.close()
        torch.set_num_threads(before)
