"""Workers on a cluster that Ray runs: they do pieces of a run, as those of `workers` do.

Ray starts them where there is a GPU or a core, brings them what they need to know, and does again
what a worker was doing when it died.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from robusteval.datasets.dataset import Positions
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.evaluation.bench import Bench
from robusteval.evaluation.pieces import Computed, Seen, Task
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.workers import AHEAD, DEATHS, WAIT, Recipe
from robusteval.models.environment import keep_freed_memory
from robusteval.models.steps import STOPPED

ANSWER = 10.0  # seconds in which the address of a cluster must answer


class Worker:
    """A process of Ray's with a bench.

    Parameters
    ----------
    recipe : callable
        Makes the plan; a function of a module with its arguments, as it is sent to the process.
    key : str
        Of the plan that must come of it.
    folder : str
        Where relative paths begin.
    """

    def __init__(self, recipe: Recipe, key: str, folder: str) -> None:
        os.chdir(folder)
        torch.set_num_threads(1)
        keep_freed_memory()
        self.bench = Bench(recipe(), key)

    def compute(self, task: Task, seen: Sequence[Seen], rows: Positions) -> Computed:
        """See `Bench.compute`."""
        return self.bench.compute(task, seen, rows)


class RayPool:
    """Workers of Ray's that do pieces of a run; see `open_ray`.

    Parameters
    ----------
    ray : module
        Connected.
    workers : list
        Handles of Ray's.
    stopping : callable
        Asked again and again whether the run is to stop.
    """

    def __init__(self, ray: Any, workers: list[Any], stopping: Callable[[], bool]) -> None:
        self.ray = ray
        self.workers = workers
        self.stopping = stopping

    @property
    def size(self) -> int:
        """How many work at once."""
        return len(self.workers)

    def compute(
        self, task: Task, seen: Sequence[Seen], batches: Sequence[Positions]
    ) -> Iterator[Computed]:
        """Do a task on each of some batches of rows ``(m,)``; results as they come."""
        known = self.ray.put(list(seen))
        waiting = list(reversed(batches))
        under_way: dict[Any, Any] = {}
        for worker in self.workers * AHEAD:
            if waiting:
                under_way[worker.compute.remote(task, known, waiting.pop())] = worker
        while under_way:
            done, _ = self.ray.wait(list(under_way), timeout=WAIT)
            for reference in done:
                worker = under_way.pop(reference)
                found = self._fetch(reference)
                if waiting:
                    under_way[worker.compute.remote(task, known, waiting.pop())] = worker
                yield found
            if self.stopping():
                raise Interrupted(STOPPED)

    def _fetch(self, reference: Any) -> Computed:
        """What came of a piece; RunError if a worker died too often, or Ray itself did."""
        try:
            found: Computed = self.ray.get(reference)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            text = " ".join(str(cause).split())[:200] or type(cause).__name__
            raise RunError(
                f"Ray's workers do not answer ({text}); what is finished is saved, and the same"
                " command continues, also without --ray"
            ) from None
        return found


@contextmanager
def open_ray(
    plan: Plan,
    recipe: Recipe,
    address: str,
    workers: int | None,
    stopping: Callable[[], bool],
) -> Iterator[RayPool]:
    """Start workers on a cluster of Ray's, and end them in the end.

    Parameters
    ----------
    plan : Plan
        What is run.
    recipe : callable
        Makes the same plan in another process.
    address : str
        Of the cluster; ``local`` starts one on this machine.
    workers : int, optional
        How many; one for each GPU, or for each core, if not given.
    stopping : callable
        Asked again and again whether the run is to stop.

    Raises
    ------
    UsageError
        Ray is not installed, or nothing answers at the address.
    """
    ray = import_ray()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = torch.get_num_threads()
    kind = "GPU" if plan.classifier.device.type == "cuda" else "CPU"
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"--ray {address}: Ray does not answer there: {text}") from None
        for number, handler in handlers.items():
            signal.signal(number, handler)  # a stop is ours to handle
        torch.set_num_threads(1)  # as in the workers: bits may depend on it
        there = float(ray.cluster_resources().get(kind, 0))
        if there < 1:
            raise UsageError(f"--ray {address}: the cluster has no {kind}")
        count = workers or int(there)
        share = min(there / count, 1.0)
        make = ray.remote(Worker).options(
            num_cpus=share if kind == "CPU" else 0,
            num_gpus=share if kind == "GPU" else 0,
            max_restarts=DEATHS,
            max_task_retries=DEATHS,
        )
        folder = os.getcwd()
        handles = [make.remote(recipe, plan.key, folder) for _ in range(count)]
        yield RayPool(ray, handles, stopping)
    finally:
        torch.set_num_threads(before)
        ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_address(address: str) -> None:
    """UsageError if nothing listens at a HOST:PORT, for which Ray itself waits for minutes.

    Other addresses, such as ``auto``, are Ray's to find.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError, UnicodeError) as error:
        text = getattr(error, "strerror", None) or error
        raise UsageError(f"--ray {address}: nothing answers there: {text}") from None


def import_ray() -> Any:
    """The package; UsageError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        return import_module("ray")
    except ImportError:
        raise UsageError(
            "--ray needs Ray, which is not installed: pip install 'robusteval[ray]'"
        ) from None
