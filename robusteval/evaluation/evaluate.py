"""Run every attack on a classifier and keep, image by image, what can be believed of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.sources import Data, Positions
from robusteval.errors import Interrupted, RobustevalError, RunError, UsageError
from robusteval.evaluation import sanity_checks
from robusteval.evaluation.defense import Defense, WithDetector
from robusteval.evaluation.gallery import Gallery, hardness
from robusteval.evaluation.judge import confidence, judge, repaired, untouched
from robusteval.evaluation.map_changes import QUALITY, Interpreter, Measurement
from robusteval.evaluation.plan import Attack, Plan, build, needs_detector, prepare
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, block_size, counting, frozen, predictions
from robusteval.models.environment import environment
from robusteval.models.failures import out_of_memory, sentence
from robusteval.models.seeds import random_targets, sample_seeds
from robusteval.progress import Progress, Silent
from robusteval.runs import metrics
from robusteval.runs.folder import Store, entry_of
from robusteval.runs.storage import digest
from robusteval.runs.types import Columns, Defended, Finding, Outcome, Picture, Run, Spec, cell_name
from robusteval.search.balls import quantise
from robusteval.search.losses import Loss, attacker_loss, margin

STEADY = 128  # images predicted twice, and under other conventions
PROBED = 64  # images whose gradients and probes are looked at
SAVE_EVERY = 2.0  # seconds
WATCHED = np.uint64(0x5CA1AB1E0DDBA11)  # parts what a detector draws from what attacks draw
BEHIND = "behind:"  # what an attack that knows nothing of a defense does behind it
# what is another's judgement of the same images
JUDGED = ("pred_adv", "pred_8bit", "pred_png", "margin_adv", "confidence_adv")


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
    defenses: Sequence[str | Spec | Defense] = (),
    progress: Progress | None = None,
) -> Run:
    """Attack a classifier and judge the results.

    Parameters
    ----------
    classifier : nn.Module
        Maps images in [0, 1] to logits; a `Classifier`, or any module, which is then wrapped. It
        comes out as it went in.
    data : Data
        What to attack, see `robusteval.datasets.sources.open_data`.
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
        attack, see `robusteval.evaluation.map_changes`.
    defenses : sequence of str, Spec or Defense
        Such as ``"detector:file=FILE"`` or the file itself; see `robusteval.evaluation.defense`.
        Each attack
        is judged behind each of them as well, where it knows nothing of the defense, and run
        against it where it does.
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
        defenses=defenses,
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
    models = [plan.classifier, *(defense.model for defense in plan.defenses)]
    blocks = [model.block for model in models]
    try:
        with ExitStack() as stack:
            store = stack.enter_context(Store.opened(folder, plan.config, fresh=fresh))
            for model in models:
                stack.enter_context(frozen(model))
            stack.enter_context(exact_arithmetic())
            execution = Execution(plan, store, batch_size, progress or Silent(), stopping, command)
            return execution.run()
    finally:
        for model, block in zip(models, blocks, strict=True):
            model.block = block  # made smaller where memory ran out


@dataclass
class Side:
    """What is attacked: the classifier as it is or behind a defense, and its images."""

    model: Classifier
    defense: Defense | None = None
    measurement: Measurement | None = None
    clean: Columns = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What a cell's numbers depend on because of the defense; nothing without one."""
        return {} if self.defense is None else {"defense": self.defense.identity}

    @property
    def spec(self) -> Spec | None:
        """The defense; None without one."""
        return None if self.defense is None else self.defense.spec

    @property
    def behind(self) -> str:
        """For titles and messages."""
        return "" if self.defense is None else f" behind {self.defense.spec}"

    def watched(self, x: Tensor, seed: int, ids: np.ndarray[Any, Any]) -> Columns:
        """What a detector says of images; nothing if there is none."""
        if not isinstance(self.model, WithDetector):
            return {}
        detector = self.model.detector
        with sentence("the detector broke"):
            score = detector.score(self.model, x, sample_seeds(seed, ids ^ WATCHED))
        columns = {"score": score.double(), "flagged": score > detector.threshold}
        return {name: column.cpu().numpy() for name, column in columns.items()}


class DefenseBroke(RunError):
    """What an attack on the classifier did could not be judged behind a defense."""

    def __init__(self, message: str, side: Side) -> None:
        super().__init__(message)
        self.side = side


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
        self.asked, self.batch_size = batch_size, batch_size or self.natural
        self.keys: list[str] = []
        self.outcomes: list[Outcome] = []
        self.failures: dict[str, str] = {}
        self.notes: list[str] = []
        self.findings: list[Finding] = list(plan.findings)
        self.side = Side(plan.classifier, measurement=self.measuring(plan.classifier))
        self.shields = [
            Side(d.model, d, None if d.kind == "detector" else self.measuring(d.model))
            for d in plan.defenses
        ]
        self.defended: list[Defended] = []
        self.quality: Columns = {}

    @property
    def clean(self) -> Columns:
        """The images as the undefended classifier sees them."""
        return self.side.clean

    def measuring(self, model: Classifier) -> Measurement | None:
        """Measures the maps of a model, if that was asked for and it can have them."""
        plan = self.plan
        try:
            explained = [
                i if model is plan.classifier else Interpreter.made(i.spec, model, plan.data.shape)
                for i in plan.interpreters
            ]
        except UsageError:
            return None
        return Measurement(model, explained, plan.seed) if explained else None

    def run(self) -> Run:
        """All cells, one after the other; the record is written after each."""
        self.save("incomplete")
        for side in (self.side, *self.shields):
            self.look(side)
        for finding in self.findings:
            self.progress.say(finding.message)
        if self.side.measurement is not None:
            self.examine(self.side.measurement)
        for attack in self.plan.attacks:
            self.attempt(attack, self.side)
        for side in self.shields:
            for attack in self.plan.knowing(side.defense):
                self.attempt(attack, side)
        for side in (self.side, *self.shields):
            self.question(side)
        status = "incomplete" if self.failures else "complete"
        self.save(status)
        return self.result(status)

    def look(self, side: Side) -> None:
        """The images as they are, and what they say of the model."""
        side.clean = self.clean_cell(side)
        self.save("incomplete")
        if side.defense is not None:
            self.findings += sanity_checks.of_fit(side.clean, side.defense.seen, side.behind)
        if isinstance(side.model, WithDetector):  # the same network; only its alarms are new
            return
        found = sanity_checks.of_clean(side.clean, side.model.num_classes) + self.conventions(side)
        self.findings += [named(finding, side) for finding in found]

    def question(self, side: Side) -> None:
        """The extra attacks of the trust checks, and what all attacks say of each other."""
        mine = [o for o in self.outcomes if o.defense == side.spec and o.adaptive]
        if self.plan.probes and not self.failures and not isinstance(side.model, WithDetector):
            for probe in sanity_checks.probes(mine):
                attack = build(probe.spec, side.model, self.plan.data.shape)
                try:
                    mine += self.attack_cells(replace(attack, role=probe.role), side)
                except Interrupted:
                    raise
                except RobustevalError as error:
                    message = f"The trust check {probe.spec} has no result: {error}"
                    self.findings.append(named(Finding("probe-failed", False, message), side))
                finally:
                    self.save("incomplete")
        if mine or side.defense is None:
            self.findings += [named(finding, side) for finding in sanity_checks.of_outcomes(mine)]

    def conventions(self, side: Side) -> list[Finding]:
        """Whether the model should be fed in another way."""
        some = self.plan.index[:STEADY]
        self.progress.begin(f"Checking how the model is fed{side.behind}", len(some))
        found = sanity_checks.diagnose(
            side.model,
            self.plan.data,
            some,
            side.clean["pred_clean"][:STEADY],
            self.progress.advance,
        )
        self.progress.end()
        return found

    def attempt(self, attack: Attack, side: Side, without: Sequence[Side] = ()) -> None:
        """One attack, written down when it ends, or why it has no result; a stop is passed on."""
        before = set(self.keys)
        try:
            self.attack_cells(attack, side, without)
        except Interrupted:
            raise
        except DefenseBroke as error:  # judged behind the others all the same
            cell = cell_name(attack.spec, error.side.spec, False)
            self.failures[cell] = str(error)
            self.progress.say(f"{cell} has no result: {error}")
            self.keys = [key for key in self.keys if key in before]
            self.attempt(attack, side, (*without, error.side))
        except RobustevalError as error:
            for missing in self.plan.cells_of(attack, side.defense):
                self.failures.setdefault(missing.name, str(error))
            self.progress.say(f"{attack.spec}{side.behind} has no result: {error}")
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
            clean={**self.clean, **self.quality},
            outcomes=tuple(self.outcomes),
            findings=tuple(self.findings),
            status=status,
            failures=dict(self.failures),
            seconds=record["seconds"],
            created=self.created,
            folder=str(self.store.folder),
            defenses=tuple(self.defended),
        )

    def basis(self) -> dict[str, Any]:
        """What every cell's numbers depend on."""
        names = ("model", "data", "samples", "seed", "versions", "device")
        return {name: self.plan.config[name] for name in names}

    def clean_cell(self, side: Side) -> Columns:
        """Every image as it is."""
        defense = side.defense
        entry: dict[str, Any] = {"role": "clean"}
        if defense is not None:
            facts = {"kind": defense.kind, "facts": defense.facts}
            entry = {"role": "defense", "defense": defense.spec._asdict(), **facts}
        key = digest({"role": entry["role"], "basis": self.basis(), **side.facts})
        self.keys.append(key)
        columns = self.store.cell(key)
        if columns is None:
            positions = np.arange(len(self.plan.index))
            title = f"Clean accuracy{side.behind}"
            work = partial(self.clean_rows, side)
            columns = self.filled(key, title, positions, self.batch_size, work)
            self.store.save_cell(key, columns, entry)
        if defense is not None:
            self.defended.append(Defended(defense.spec, defense.kind, columns, defense.facts))
        return columns

    def clean_rows(self, side: Side, positions: Positions) -> Columns:
        """Columns of some images as they are."""
        model = side.model
        batch = self.plan.data.batch(self.plan.index[positions])
        x, y = batch.x.to(model.device), batch.y.to(model.device)
        if isinstance(model, WithDetector):
            known = {name: column[positions] for name, column in self.clean.items()}
            return {**known, **side.watched(x, self.plan.seed, batch.ids)}
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

    def examine(self, measurement: Measurement) -> None:
        """What the maps are worth without an attack, or a remark why nobody knows."""
        try:
            self.quality = self.quality_cell(measurement)
        except Interrupted:
            raise
        except RobustevalError as error:
            message = f"What the maps are worth was not measured: {error}"
            self.findings.append(Finding("quality-failed", False, message))
            self.progress.say(message)
        finally:
            self.save("incomplete")

    def quality_cell(self, measurement: Measurement) -> Columns:
        """What maps of the first images that were right are worth, nan for the others."""
        facts = {"role": "quality", "maps": self.plan.config["maps"], "images": QUALITY}
        key = digest({**facts, "basis": self.basis()})
        self.keys.append(key)
        stored = self.store.cell(key)
        if stored is not None:
            return stored
        right = metrics.right(self.clean)
        rows = np.flatnonzero(right)[:QUALITY]
        work = partial(self.quality_rows, measurement)
        found = self.filled(key, "What the maps are worth", rows, self.batch_size, work)
        columns = {name: np.full(len(right), np.nan) for name in measurement.qualities()}
        for name, values in found.items():
            columns[name][rows] = values
        self.store.save_cell(key, columns, {"role": "quality"})
        return columns

    def quality_rows(self, measurement: Measurement, positions: Positions) -> Columns:
        """What the maps of some images are worth."""
        batch = self.plan.data.batch(self.plan.index[positions])
        x, pred = batch.x.to(measurement.model.device), self.clean["pred_clean"][positions]
        return measurement.quality(x, batch.ids, pred)

    def attack_cells(
        self, attack: Attack, side: Side, without: Sequence[Side] = ()
    ) -> list[Outcome]:
        """One attack on every image that was right at first; a probe on the first few of them.

        What it does to the classifier as it is is judged behind the defenses, too.
        """
        plain = side.defense is None and attack.role == "attack"
        others = [other for other in self.shields if plain and other not in without]
        measurement = side.measurement if attack.role == "attack" else None
        facts = {
            "role": attack.role,
            "attack": attack.spec.name,
            "resolved": attack.resolved,
            "basis": self.basis(),
            **side.facts,
        }
        if measurement is not None:
            facts["maps"] = self.plan.config["maps"]
        key = digest(facts)
        keys = [key, *(digest({"oblivious": key, **other.facts}) for other in others)]
        self.keys += keys
        stored = [outcome for each in keys if (outcome := self.store.outcome(each)) is not None]
        if len(stored) == len(keys):
            self.outcomes += stored
            return stored

        attacked = metrics.right(side.clean)
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

        title = str(attack.spec) if attack.role == "attack" else f"Trust check {attack.spec}"
        found = self.filled(
            digest({"cells": keys}) if others else key,
            f"{title}{side.behind}",
            rows,
            self.batch_for(attack),
            partial(self.attack_rows, attack, side, others, gallery, measurement),
            whole=attack.foreign,
            # before the columns: what these say is done is not offered again
            before=keep_candidates,
        )
        outcomes = []
        for i, (each, cell) in enumerate(zip(keys, (side, *others), strict=True)):
            columns = untouched({name: column[shown] for name, column in cell.clean.items()})
            here = {name: c for name, c in found.items() if not name.startswith(BEHIND)}
            if measurement is not None and i == 0:
                columns |= {name: np.full(len(shown), np.nan) for name in measurement.names()}
            if i > 0:
                mark = f"{BEHIND}{i - 1}:"
                theirs = {n.removeprefix(mark): c for n, c in found.items() if n.startswith(mark)}
                here = {name: c for name, c in here.items() if name in columns} | theirs
            place = np.searchsorted(shown, rows)
            open_ = columns["attacked"][place]  # the attack changed no image that was lost before
            for name, values in here.items():
                columns[name][place[open_]] = values[open_]
            outcome = Outcome(
                attack=attack.spec,
                threat=attack.threat,
                knowledge=attack.knowledge,
                columns=columns,
                role=attack.role,
                notes=tuple(dict.fromkeys(self.notes)) if i == 0 else (),
                resolved=attack.resolved,
                defense=cell.spec,
                adaptive=i == 0,
            )
            pictures: Sequence[Picture] = ()
            if i == 0 and gallery is not None and len(rows):
                pictures = gallery.chosen(hardness(found, attack.threat))
            self.store.save_cell(each, columns, entry_of(outcome), pictures)
            outcomes.append(outcome)
        self.outcomes += outcomes
        return outcomes

    def batch_for(self, attack: Attack) -> int:
        """Images at a time: less of those that take seconds each, so that progress is seen."""
        if attack.foreign:
            return self.natural
        slow = "interpreter" in attack.resolved or needs_detector(attack.spec)
        return self.natural // 4 if slow and self.asked is None else self.batch_size

    def attack_rows(
        self,
        attack: Attack,
        side: Side,
        others: Sequence[Side],
        gallery: Gallery | None,
        measurement: Measurement | None,
        positions: Positions,
    ) -> Columns:
        """Columns of some images under attack."""
        plan, model = self.plan, side.model
        batch = plan.data.batch(plan.index[positions])
        if not np.array_equal(batch.ids, side.clean["id"][positions]):
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
        changed, _ = repaired(x_adv.detach().to(x), x, attack.threat)
        columns |= side.watched(changed, plan.seed, batch.ids)
        for i, other in enumerate(others):
            again = columns
            try:
                if not isinstance(
                    other.model, WithDetector
                ):  # which answers like the classifier itself
                    with sentence("the defense broke"):
                        again = judge(other.model, x_adv, x, y, attack.threat)
                theirs = {name: again[name] for name in JUDGED}
                theirs |= other.watched(changed, plan.seed, batch.ids)
            except RobustevalError as error:
                raise DefenseBroke(str(error), other) from error
            columns |= {f"{BEHIND}{i}:{name}": column for name, column in theirs.items()}
        maps: Columns = {}
        if measurement is not None:
            measure = partial(self.measured, side, measurement, positions, x, changed, columns)
            found = self.roomy(measure, np.arange(len(x)))
            columns |= {name: found.pop(name) for name in measurement.names()}
            maps = {name: column for name, column in found.items() if name != "row"}
        if gallery is not None:

            def images(some: Positions) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
                z = x[some]
                return pixels(quantise(z) * 255).round().astype(np.uint8), pixels(changed[some] - z)

            gallery.offer(positions, batch.ids, hardness(columns, attack.threat), images, maps)
        return {
            **columns,
            "forwards": passes.forwards.double().cpu().numpy(),
            "backwards": passes.backwards.double().cpu().numpy(),
            "seconds": np.full(len(x), seconds / len(x)),
        }

    def measured(
        self,
        side: Side,
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
            side.clean["id"][rows],
            side.clean["pred_clean"][rows],
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
        parts = list(self.store.parts.read_parts(key))
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
        self.store.parts.save_part(key, part)
        return [part]

    def roomy(self, work: Callable[[Positions], Columns], positions: Positions) -> Columns:
        """The work on these positions, in halves where memory runs out."""
        try:
            return {**work(positions), "row": positions}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if len(positions) == 1:
            raise RunError("memory runs out even for one image: use a machine with more of it")
        half = len(positions) // 2
        large = [
            side.model
            for side in (self.side, *self.shields)
            if half < (side.model.block or half + 1)
        ]
        for model in large:
            # smaller calls of the network, too: this can change a logit's last digits
            model.block = half
        if large:
            self.notes.append(
                f"memory ran out: the network was called with {half} images at a time"
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


def named(finding: Finding, side: Side) -> Finding:
    """What was found of a model behind a defense, and which."""
    if side.defense is None:
        return finding
    cell = finding.cell and f"{finding.cell}{side.behind}"
    text = f"Behind {side.defense.spec}: {finding.message}"
    return finding._replace(message=text, cell=cell)


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
