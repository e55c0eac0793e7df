"""Run every attack on a classifier and keep, image by image, what can be believed of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval import trust
from robusteval.data import Data
from robusteval.errors import Interrupted, RobustevalError, RunError, UsageError
from robusteval.gallery import Gallery, hardness
from robusteval.guard import out_of_memory, sentence
from robusteval.interpretation import Measurement
from robusteval.judge import confidence, judge, repaired, untouched
from robusteval.losses import Loss, attacker_loss, margin
from robusteval.model import block_size, counting, frozen, predictions
from robusteval.norms import quantise
from robusteval.plan import Attack, Plan, Positions, build, environment, prepare
from robusteval.progress import Progress, Silent
from robusteval.records import Columns, Finding, Outcome, Run, Spec, Store, digest, entry_of
from robusteval.seeds import random_targets, sample_seeds

STEADY = 128  # images predicted twice, and under other conventions
PROBED = 64  # images whose gradients and probes are looked at
SAVE_EVERY = 2.0  # seconds


def evaluate(
    classifier: nn.Module,
    data: Data,
    attacks: Sequence[str | Spec],
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: Path | str | None = None,
    fresh: bool = False,
    probes: bool = True,
    interpreters: Sequence[str | Spec] = (),
    progress: Progress | None = None,
) -> Run:
    """Attack a classifier and judge the results.

    Parameters
    ----------
    classifier : nn.Module
        Maps images in [0, 1] to logits; a `Classifier`, or any module, which is then wrapped. It
        comes out as it went in.
    data : Data
        What to attack, see `robusteval.data.open_data`.
    attacks : sequence of str or Spec
        Such as ``"pgd:eps=8/255,steps=20"``.
    samples : int, optional
        Images drawn at random; all if not given.
    seed : int
        Decides the draw and every random number of the attacks.
    batch_size : int, optional
        Images attacked at a time; does not change a result. None: by size and device.
    out : Path, optional
        Folder of the run; one that is there is continued. None: nothing is kept on disk.
    fresh : bool
        Throw away what is in `out`.
    probes : bool
        Run the extra attacks on a few images that the trust checks need.
    interpreters : sequence of str or Spec
        Such as ``"cam"`` or ``"grad:pool=2"``: whose maps are compared before and after each
        attack, see `robusteval.interpretation`.
    progress : Progress, optional
        Where to say how far it is.

    Returns
    -------
    Run
        Columns of every cell, and the findings of the trust checks.

    Raises
    ------
    UsageError
        For a mistake in what was asked; nothing was run.
    RunError
        If something broke; what was finished is kept in `out`.
    """
    progress = progress or Silent()
    plan = prepare(
        classifier,
        data,
        attacks,
        samples=samples,
        seed=seed,
        probes=probes,
        interpreters=interpreters,
        progress=progress,
    )
    if out is not None:
        return execute(plan, Path(out), batch_size=batch_size, fresh=fresh, progress=progress)
    with tempfile.TemporaryDirectory(prefix="robusteval-") as folder:
        run = execute(plan, Path(folder), batch_size=batch_size, progress=progress)
        return replace(run, folder=None)


def execute(
    plan: Plan,
    folder: Path,
    *,
    batch_size: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: str = "",
) -> Run:
    """Run a plan, or what is left of it, and keep it in a folder; see `evaluate`.

    `stopping` is asked after each batch; Interrupted once it says so.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch-size must be at least 1, not {batch_size}")
    block = plan.classifier.block
    try:
        with (
            Store.opened(folder, plan.config, fresh=fresh) as store,
            frozen(plan.classifier),
            exact_arithmetic(),
        ):
            execution = Execution(plan, store, batch_size, progress or Silent(), stopping, command)
            return execution.run()
    finally:
        plan.classifier.block = block  # made smaller where memory ran out


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 and the same kernels every time; torch's switches restored afterwards."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32
    with torch.backends.cudnn.flags(
        enabled=bool(torch.backends.cudnn.enabled),
        benchmark=False,
        deterministic=True,
        allow_tf32=False,
    ):
        try:
            matmul.allow_tf32 = False
            yield
        finally:
            matmul.allow_tf32 = tf32


class Execution:
    """One plan on its way into one store."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        batch_size: int | None,
        progress: Progress,
        stopping: Callable[[], bool],
        command: str,
    ) -> None:
        self.plan = plan
        self.store = store
        self.progress = progress
        self.stopping = stopping
        self.command = command
        self.created = store.created or datetime.now(UTC).isoformat(timespec="seconds")
        self.worked = store.seconds  # in all calls, on what had to be computed
        values = int(np.prod(plan.data.shape))
        # several blocks, so that padding is little when most images of a batch are finished; for
        # foreign attacks batches are part of the result and never the user's choice
        self.natural = 4 * block_size(values, plan.classifier.device)
        self.batch_size = batch_size or self.natural
        self.keys: list[str] = []
        self.outcomes: list[Outcome] = []
        self.failures: dict[str, str] = {}
        self.notes: list[str] = []
        self.findings: list[Finding] = list(plan.findings)
        self.measurement = None
        if plan.interpreters:
            self.measurement = Measurement(plan.classifier, plan.interpreters, plan.seed)
        self.clean: Columns = {}

    def run(self) -> Run:
        """All cells, one after the other; the record is written after each."""
        self.save("incomplete")
        self.clean = self.clean_cell()
        self.save("incomplete")
        self.findings += trust.of_clean(self.clean, self.plan.classifier.num_classes)
        self.findings += self.conventions()
        for finding in self.findings:
            self.progress.say(finding.message)
        for attack in self.plan.attacks:
            try:
                self.attempt(attack)
            except Interrupted:
                raise
            except RobustevalError as error:
                self.failures[str(attack.spec)] = str(error)
                self.progress.say(f"{attack.spec} has no result: {error}")
        if self.plan.probes and not self.failures:
            for probe in trust.probes(self.outcomes):
                try:
                    self.attempt(self.built(probe))
                except Interrupted:
                    raise
                except RobustevalError as error:
                    message = f"The trust check {probe.spec} has no result: {error}"
                    self.findings.append(Finding("probe-failed", False, message))
        self.findings += trust.of_outcomes(self.outcomes)
        status = "incomplete" if self.failures else "complete"
        self.save(status)
        return self.result(status)

    def conventions(self) -> list[Finding]:
        """Whether the model should be fed in another way."""
        some = self.plan.index[:STEADY]
        self.progress.begin("Checking how the model is fed", len(some))
        found = trust.diagnose(
            self.plan.classifier,
            self.plan.data,
            some,
            self.clean["pred_clean"][:STEADY],
            self.progress.advance,
        )
        self.progress.end()
        return found

    def built(self, probe: trust.Probe) -> Attack:
        """An extra attack for this plan."""
        attack = build(probe.spec, self.plan.classifier, self.plan.data.shape)
        return replace(attack, role=probe.role)

    def attempt(self, attack: Attack) -> None:
        """One cell, written down when it ends; a stop is passed on, and all other failures."""
        try:
            self.outcomes.append(self.attack_cell(attack))
        finally:
            self.save("incomplete")

    def record(self, status: str) -> dict[str, Any]:
        """What ``run.json`` says besides the cells."""
        plan, data = self.plan, self.plan.data
        return {
            "status": status,
            "created": self.created,
            "seconds": self.worked,
            "command": self.command,
            "config": plan.config,
            "model": plan.config["model"],
            "data": {
                "name": data.name,
                "total": len(data),
                "samples": len(plan.index),
                "sha256": plan.config["data"]["sha256"],
                "shape": list(data.shape),
                "transform": data.transform,
                "range": self.range(),
                "class_names": list(data.class_names) if data.class_names else None,
            },
            "environment": environment(plan.classifier.device),
            "findings": [finding._asdict() for finding in self.findings],
            "failures": self.failures,
        }

    def range(self) -> list[float] | None:
        """Darkest and brightest pixel of all images, once they were looked at."""
        if not self.clean:
            return None
        return [float(self.clean["darkest"].min()), float(self.clean["brightest"].max())]

    def save(self, status: str) -> None:
        """Write the record as far as it is."""
        self.store.save_record(self.record(status), self.keys)

    def result(self, status: str) -> Run:
        """The run as a value."""
        record = self.record(status)
        return Run(
            config={**record["config"], "command": self.command},
            model=record["model"],
            data=record["data"],
            environment=record["environment"],
            clean=self.clean,
            outcomes=tuple(self.outcomes),
            findings=tuple(self.findings),
            status=status,
            failures=dict(self.failures),
            seconds=record["seconds"],
            created=self.created,
            folder=str(self.store.folder),
        )

    def basis(self) -> dict[str, Any]:
        """What every cell's numbers depend on."""
        names = ("model", "data", "samples", "seed", "versions", "device")
        return {name: self.plan.config[name] for name in names}

    def clean_cell(self) -> Columns:
        """Every image as it is."""
        key = digest({"role": "clean", "basis": self.basis()})
        self.keys.append(key)
        stored = self.store.cell(key)
        if stored is not None:
            return stored
        positions = np.arange(len(self.plan.index))
        columns = self.filled(key, "Clean accuracy", positions, self.batch_size, self.clean_rows)
        self.store.save_cell(key, columns, {"role": "clean"})
        return columns

    def clean_rows(self, positions: Positions) -> Columns:
        """Columns of some images as they are."""
        model = self.plan.classifier
        batch = self.plan.data.batch(self.plan.index[positions])
        x, y = batch.x.to(model.device), batch.y.to(model.device)
        with torch.no_grad(), sentence(f"the network cannot take images {tuple(x.shape[1:])}"):
            logits = model(x)
        pred = predictions(logits)
        asked = torch.from_numpy(positions < STEADY).to(x.device)
        steady = torch.full_like(pred, -1)
        with torch.no_grad():
            again = model(x[asked])
        same = (again == logits[asked]) | (again.isnan() & logits[asked].isnan())
        steady[asked] = same.all(1).long()
        probed = torch.from_numpy(positions < PROBED).to(x.device)
        columns: dict[str, Tensor] = {
            "label": y,
            "pred_clean": pred,
            "margin_clean": margin(logits, y).double(),
            "confidence_clean": confidence(logits, pred),
            "steady": steady,  # 1 same logits twice, 0 not, -1 not asked
            "probabilities": looks_like_probabilities(logits),
            "darkest": x.flatten(1).amin(1).double(),
            "brightest": x.flatten(1).amax(1).double(),
            "slope_ce": slope(model, x, y, probed, "ce"),
            "slope_margin": slope(model, x, y, probed, "margin"),
        }
        made = {name: column.cpu().numpy() for name, column in columns.items()}
        return {"index": batch.index, "id": batch.ids, **made}

    def attack_cell(self, attack: Attack) -> Outcome:
        """One attack on every image that was right at first; a probe on the first few of them."""
        measurement = self.measurement if attack.role == "attack" else None
        facts = {
            "role": attack.role,
            "attack": attack.spec.name,
            "resolved": attack.resolved,
            "basis": self.basis(),
        }
        if measurement is not None:
            facts["maps"] = self.plan.config["maps"]
        key = digest(facts)
        self.keys.append(key)
        stored = self.store.outcome(key)
        if stored is not None:
            return stored

        attacked = self.clean["pred_clean"] == self.clean["label"]
        rows = np.flatnonzero(attacked)  # positions attacked
        shown = np.arange(len(attacked))  # positions in the columns
        gallery = None
        if attack.role == "attack":
            gallery = Gallery(self.store.candidates(key))
        else:
            rows = shown = rows[:PROBED]
        self.notes = []

        def keep_candidates() -> None:
            if gallery is not None and gallery.candidates:
                self.store.save_candidates(key, gallery.candidates)

        found = self.filled(
            key,
            str(attack.spec) if attack.role == "attack" else f"Trust check {attack.spec}",
            rows,
            self.natural if attack.foreign else self.batch_size,
            partial(self.attack_rows, attack, gallery),
            whole=attack.foreign,
            # before the columns: what these say is done is not offered again
            before=keep_candidates,
        )
        clean = {name: column[shown] for name, column in self.clean.items()}
        columns = untouched(clean)
        if measurement is not None:
            columns |= {name: np.full(len(shown), np.nan) for name in measurement.names()}
        for name, values in found.items():
            columns[name][np.searchsorted(shown, rows)] = values
        outcome = Outcome(
            attack=attack.spec,
            threat=attack.threat,
            knowledge=attack.knowledge,
            columns=columns,
            role=attack.role,
            notes=tuple(dict.fromkeys(self.notes)),
            resolved=attack.resolved,
        )
        pictures = gallery.chosen(hardness(found, attack.threat)) if gallery and len(rows) else ()
        self.store.save_cell(key, columns, entry_of(outcome), pictures)
        return outcome

    def attack_rows(self, attack: Attack, gallery: Gallery | None, positions: Positions) -> Columns:
        """Columns of some images under attack."""
        plan, model = self.plan, self.plan.classifier
        batch = plan.data.batch(plan.index[positions])
        if not np.array_equal(batch.ids, self.clean["id"][positions]):
            raise RunError(f"images of {plan.data.name} changed while they were evaluated")
        x, y = batch.x.to(model.device), batch.y.to(model.device)
        seeds = sample_seeds(plan.seed, batch.ids)
        targeted = attack.threat.targeted
        goal = random_targets(y, seeds, model.num_classes) if targeted else y

        started = time.perf_counter()
        with counting(model, len(x), model.device) as passes, sentence("the attack broke"):
            x_adv = attack.perturb(model, x.clone(), goal.clone(), targeted=targeted, seeds=seeds)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - started

        columns = judge(model, x_adv, x, y, attack.threat)
        columns["target"] = goal.cpu().numpy() if targeted else np.full(len(x), -1)
        maps: Columns = {}
        if self.measurement is not None and attack.role == "attack":
            changed, _ = repaired(x_adv.detach().to(x), x, attack.threat)
            measure = partial(self.measured, self.measurement, positions, x, changed, columns)
            found = self.roomy(measure, np.arange(len(x)))
            columns |= {name: found.pop(name) for name in self.measurement.names()}
            maps = {name: column for name, column in found.items() if name != "row"}
        if gallery is not None:

            def images(some: Positions) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
                z = x[some]
                changed, _ = repaired(x_adv[some].detach().to(z), z, attack.threat)
                return pixels(quantise(z) * 255).round().astype(np.uint8), pixels(changed - z)

            gallery.offer(positions, batch.ids, hardness(columns, attack.threat), images, maps)
        return {
            **columns,
            "forwards": passes.forwards.double().cpu().numpy(),
            "backwards": passes.backwards.double().cpu().numpy(),
            "seconds": np.full(len(x), seconds / len(x)),
        }

    def measured(
        self,
        measurement: Measurement,
        positions: Positions,
        x: Tensor,
        x_adv: Tensor,
        judged: Columns,
        some: Positions,
    ) -> Columns:
        """What became of the maps of some images of a batch; not booked as the attack's cost."""
        rows = positions[some]
        return measurement.columns(
            x[some],
            x_adv[some],
            self.clean["id"][rows],
            self.clean["pred_clean"][rows],
            judged["pred_adv"][some],
        )

    def filled(
        self,
        key: str,
        title: str,
        positions: Positions,
        size: int,
        work: Callable[[Positions], Columns],
        *,
        whole: bool = False,
        before: Callable[[], object] = lambda: None,
    ) -> Columns:
        """Columns for these positions, in their order, worked out batch by batch.

        What an earlier run left is taken over, what is new is saved every few seconds. The batches
        go by content id: where they matter (`whole`) they do not depend on the order of the images.
        """
        parts = list(self.store.parts(key))
        have = {row for part in parts for row in part["row"].tolist()}
        ids = self.clean.get("id", np.arange(len(self.plan.index)))
        order = positions[np.argsort(ids[positions], kind="stable")]
        unsaved: list[Columns] = []
        started = saved = time.monotonic()
        self.progress.begin(title, len(positions))
        try:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                todo = batch[[row not in have for row in batch.tolist()]]
                if whole and len(todo) < len(batch) and len(todo):
                    todo = batch
                if len(todo):
                    unsaved.append(self.roomy(work, todo))
                self.progress.advance(len(batch))
                if time.monotonic() - saved > SAVE_EVERY:
                    before()
                    parts += self.saved(key, unsaved)
                    unsaved, saved = [], time.monotonic()
                if self.stopping():
                    raise Interrupted("stopped; the same command continues where this one ended")
        finally:
            before()
            parts += self.saved(key, unsaved)
            self.worked += time.monotonic() - started
            self.progress.end()
        return assembled(parts, positions)

    def saved(self, key: str, columns: list[Columns]) -> list[Columns]:
        """The columns as one part, kept in the store."""
        if not columns:
            return []
        part = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        self.store.save_part(key, part)
        return [part]

    def roomy(self, work: Callable[[Positions], Columns], positions: Positions) -> Columns:
        """The work on these positions, in halves where memory runs out."""
        try:
            return {**work(positions), "row": positions}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        model = self.plan.classifier
        if len(positions) == 1:
            raise RunError("memory runs out even for one image: use a machine with more of it")
        half = len(positions) // 2
        if half < (model.block or half + 1):
            # smaller calls of the network, too: this can change a logit's last digits
            model.block = max(1, half)
            self.notes.append(
                f"memory ran out: the network was called with {model.block} images at a time"
            )
        parts = [self.roomy(work, p) for p in (positions[:half], positions[half:])]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assembled(parts: list[Columns], positions: Positions) -> Columns:
    """One set of columns from parts with a column `row`, in the order of `positions`."""
    if not parts:
        return {}
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = whole.pop("row")
    last = {row: at for at, row in enumerate(rows.tolist())}  # a row that was redone counts last
    places = [last[row] for row in positions.tolist()]
    return {name: column[places] for name, column in whole.items()}


def pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Images ``(m, c, h, w)`` as arrays ``(m, h, w, c)``."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def looks_like_probabilities(logits: Tensor) -> Tensor:
    """Which rows ``(n,)`` lie in [0, 1] and sum to one."""
    return (logits.sum(1) - 1).abs().lt(1e-3) & logits.ge(0).all(1) & logits.le(1).all(1)


def slope(model: nn.Module, x: Tensor, y: Tensor, asked: Tensor, loss: Loss) -> Tensor:
    """Largest entry of the loss's gradient at the images asked for ``(n,)``; NaN for others."""
    out = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    if not bool(asked.any()):
        return out
    z = x[asked].requires_grad_()
    value = attacker_loss(model(z), y[asked], targeted=False, loss=loss).sum()
    if value.requires_grad:
        grad = torch.autograd.grad(value, z)[0]
        out[asked] = grad.flatten(1).abs().amax(1).double()
    else:
        out[asked] = 0.0  # the network cuts the graph
    return out
