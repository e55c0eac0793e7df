"""Whoever does the pieces of a run, and whoever dies on the way, it is the run of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from recipes import Here, build_bands_plan
from same_runs import assert_same
from toys import Bands

from robusteval.cli import cli
from robusteval.commands.working import open_pool
from robusteval.datasets.dataset import Positions
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.evaluation import ray_workers
from robusteval.evaluation.bench import Bench
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.pieces import Computed, Seen, Task, split_finely
from robusteval.evaluation.plan import prepare_plan
from robusteval.evaluation.workers import deaf, open_processes
from robusteval.models.classifier import Classifier
from robusteval.runs.folder import load_run

ATTACKS = ["pgd:eps=12/255,steps=12", "noise:eps=12/255"]
FOREIGN = "art:SquareAttack:eps=12/255,max_iter=3"
SAMPLES = 40


@pytest.fixture
def build(trained_bands: Bands, npz: Path) -> Any:
    """Makes a plan, with a network of its own."""

    def make(attacks: Sequence[str] = ATTACKS, probes: bool = False) -> Any:
        classifier = Classifier(
            trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
        ).eval()
        data = open_data(str(npz))
        return prepare_plan(classifier, data, attacks, samples=SAMPLES, probes=probes)

    return make


def test_pieces_done_elsewhere_are_the_run_of_one_process(build: Any, tmp_path: Path) -> None:
    """In any order, with the probes, and an attack of ART in batches that are part of it."""
    attacks = [ATTACKS[0], FOREIGN]
    whole = execute(build(attacks, True), tmp_path / "whole")
    plan = build(attacks, True)
    pool = Here(Bench(build(attacks, True), plan.key))

    run = execute(plan, tmp_path / "run", pool=pool)

    assert {task.kind for task in pool.tasks} == {"clean", "attack", "planted"}
    assert {"attack", "probe:noise"} <= {task.role for task in pool.tasks}
    assert_same(whole, run)


def test_a_worker_that_dies_and_a_stop_lose_nothing_but_time(
    build: Any, npz: Path, tmp_path: Path
) -> None:
    """Two processes, one of which is killed; stopped; and continued without them."""
    whole = execute(build(), tmp_path / "whole")
    plan, mark = build(), tmp_path / "mark"
    recipe = partial(build_bands_plan, npz, ATTACKS, SAMPLES, mark)
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return bool(list((tmp_path / "run" / "samples").glob("*.npz")))  # after the clean images

    with open_processes(plan, recipe, 2, stopping) as pool:
        with pytest.raises(Interrupted):
            execute(plan, tmp_path / "run", pool=pool, stopping=stopping)
        assert mark.exists()
        pool.stopping = lambda: False
        run = execute(plan, tmp_path / "run", pool=pool)
        workers = active_children()

    for worker in workers:
        worker.join()
    assert 0 in [worker.exitcode for worker in workers]  # ended by themselves: nothing is left
    assert_same(whole, run)
    assert_same(whole, execute(build(), tmp_path / "run"))


def test_a_worker_with_another_model_is_refused(build: Any) -> None:
    """So no bits of one network come into the run of another."""
    with pytest.raises(RunError, match="another model, other images or other versions"):
        Bench(build(), "0" * 64)


def test_what_breaks_in_a_worker_breaks_the_cell_alone(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason stands in the run, as without workers."""
    plan = build()
    bench = Bench(build(), plan.key)
    whole = bench.compute

    def fail(task: Task, seen: Sequence[Seen], rows: Positions) -> Computed:
        if task.spec is not None and task.spec.name == "noise":
            return Computed(error=RunError("it broke"))
        return whole(task, seen, rows)

    monkeypatch.setattr(bench, "compute", fail)

    run = execute(plan, tmp_path / "run", pool=Here(bench))

    assert run.failures == {"noise:eps=12/255": "it broke"}
    assert [str(outcome.attack) for outcome in run.attacks] == [ATTACKS[0]]


def test_pieces_are_enough_for_all_workers_and_as_even_as_they_can_be() -> None:
    """The last worker is waited for; no more pieces than there are blocks, so none is padded."""
    batches = [np.arange(128), np.arange(128, 200)]

    some = split_finely(batches, 2, 16)

    np.testing.assert_array_equal(np.concatenate(some), np.arange(200))
    assert [len(rows) for rows in some] == [32, 32, 32, 32, 24, 24, 24]
    even = split_finely([np.arange(256), np.arange(256, 258)], 2, 32, rounds=1)
    assert [len(rows) for rows in even] == [128, 128, 2]
    assert [len(rows) for rows in split_finely([np.arange(10)], 4, 16)] == [10]
    assert split_finely([], 2, 16) == []


class StandIn:
    """What of Ray's interface is used, in this process: what was asked for last is done first."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.is_up = False

    def init(self, **options: Any) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: Any) -> Any:
        def options(**given: Any) -> Any:
            self.asked.append(given)
            return SimpleNamespace(remote=lambda *args: self.start(kind(*args)))

        return SimpleNamespace(options=options)

    def start(self, worker: Any) -> Any:
        call = SimpleNamespace(remote=lambda *args: partial(worker.compute, *args))
        return SimpleNamespace(compute=call)

    def wait(self, waiting: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return waiting[-1:], waiting[:-1]

    def get(self, reference: Any) -> Any:
        return reference()


def test_workers_of_ray_do_the_same_pieces(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker for each core of the cluster; Ray is told to do again what a worker dies of."""
    ray = StandIn()
    monkeypatch.setattr(ray_workers, "import_module", lambda name: ray)
    attacks = ATTACKS[1:]
    plan = build(attacks)

    with ray_workers.open_ray(plan, partial(build, attacks), "auto", None, bool) as pool:
        assert (pool.size, ray.is_up) == (2, True)
        run = execute(plan, tmp_path / "run", pool=pool)

    assert not ray.is_up
    assert {"max_restarts", "max_task_retries"} <= ray.asked[0].keys()
    assert ray.asked[0]["num_cpus"] == 1
    assert_same(execute(build(attacks), tmp_path / "whole"), run)


def test_ray_itself_gives_the_run_of_one_process(tmp_path: Path) -> None:
    """Whole commands: Ray started on this machine, and none."""
    pytest.importorskip("ray", reason="Ray is not installed")
    words = ["evaluate", "demo", "--samples=60", "--attack=pgd:eps=12/255,steps=5"]

    for name, more in (("alone", []), ("by-ray", ["--ray=local", "--workers=2"])):
        command = [sys.executable, "-m", "robusteval", *words, *more, f"--out={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True)

    assert_same(load_run(tmp_path / "alone"), load_run(tmp_path / "by-ray"))


def test_what_ray_says_becomes_a_sentence(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cluster at the address; a head that is gone: the run says so and can be continued."""
    ray = StandIn()
    monkeypatch.setattr(ray_workers, "import_module", lambda name: ray)
    attacks = ATTACKS[1:]
    plan = build(attacks)

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("nobody there")

    with ray_workers.open_ray(plan, partial(build, attacks), "auto", 1, bool) as pool:
        monkeypatch.setattr(ray, "get", fail)
        with pytest.raises(RunError, match="continues, also without --ray"):
            execute(plan, tmp_path / "run", pool=pool)
    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(UsageError, match="does not answer there: nobody there"),
        ray_workers.open_ray(plan, partial(build, attacks), "head:1", 1, bool),
    ):
        pass


def test_ctrl_c_while_ray_is_looked_for_ends_the_command(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no step to wait for; with workers a stop waits for one again."""
    stop, told, ray = SimpleNamespace(asked=0, politely=True), list[str](), StandIn()
    session: Any = SimpleNamespace(progress=SimpleNamespace(say=told.append), stop=stop)
    polite: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **options: polite.append(stop.politely))
    monkeypatch.setattr(ray_workers, "import_module", lambda name: ray)

    plan = build()
    with open_pool(session, plan, lambda fingerprint: plan, 1, "auto"):
        polite.append(stop.politely)

    assert told == ["Connecting to Ray, auto."]
    assert polite == [False, True]


def test_an_address_at_which_nothing_listens_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray tries for minutes; what is no HOST:PORT is left to it."""
    monkeypatch.setattr(ray_workers, "import_module", lambda name: StandIn())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
            ray_workers.check_address(address)

    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999", "a..b:1"):
        words = ["evaluate", "missing.pth", "--data=digits", "--attack=noise", f"--ray={address}"]
        ended = CliRunner().invoke(cli, words)
        assert ended.exit_code == 2
        assert "nothing answers there" in " ".join(ended.stderr.split())


def test_without_ray_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it, before anything is looked for."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(ray_workers, "import_module", missing)
    words = ["evaluate", "missing.pth", "--data=digits", "--attack=noise:eps=1/255", "--ray=auto"]

    ended = CliRunner().invoke(cli, words)

    assert ended.exit_code == 2
    assert "pip install 'robusteval[ray]'" in ended.stderr


def test_more_workers_than_cores_are_remarked_on(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take memory and gain nothing; as many as there are cores are nobody's mistake."""
    said: list[str] = []
    progress, stop = SimpleNamespace(say=said.append), SimpleNamespace(asked=0)
    session: Any = SimpleNamespace(progress=progress, stop=stop)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)

    with open_pool(session, build(), build, 2, None):
        assert said == []
    with open_pool(session, build(), build, 3, None):
        assert said == ["3 workers share 2 cores: more than these make nothing faster."]


def test_ctrl_c_while_workers_start_is_heard_by_their_parent_alone() -> None:
    """It comes while they import, before they could have said what is to become of it."""
    asks = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with deaf():
            signal.raise_signal(signal.SIGINT)
            child = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
            assert not heard
    finally:
        signal.signal(signal.SIGINT, before)

    assert child.stdout == "True\n"
    assert heard == [signal.SIGINT]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
