"""Run every attack on a classifier and keep, image by image, what can be believed of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from robusteval.datasets.dataset import Data
from robusteval.datasets.keeping import keep_decoded, read_ahead
from robusteval.errors import (
    Interrupted,
    RobustevalError,
    UsageError,
    check_path,
    check_whole,
)
from robusteval.evaluation import estimate, sanity_checks
from robusteval.evaluation.active_test import check_active_tests, list_planted_searches
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.batches import ResumableMap
from robusteval.evaluation.cells import Cells
from robusteval.evaluation.columns import PROBED, STEADY
from robusteval.evaluation.company import find_company
from robusteval.evaluation.computation import Computation
from robusteval.evaluation.conventions import find_convention
from robusteval.evaluation.defense import Defense
from robusteval.evaluation.loss_curves import check_curves
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.pieces import Pool
from robusteval.evaluation.plan import Attack, Plan, prepare_plan
from robusteval.evaluation.recording import Recording
from robusteval.evaluation.sparing import spare_none
from robusteval.evaluation.target import (
    DefenseBroke,
    Target,
    choose_other,
    known_surroundings,
    list_receivers,
    list_targets,
)
from robusteval.evaluation.unmasking import Examination, describe_masks, list_unmaskings
from robusteval.evaluation.votes import check_survival
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import frozen
from robusteval.progress import Progress, Silent, open_progress
from robusteval.runs.folder import Store, save_share
from robusteval.runs.kept_images import KeptImages
from robusteval.runs.types import Finding, Outcome, Run, Spec


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
    keep_images: bool = False,
    probes: bool = True,
    interpreters: Sequence[str | Spec] = (),
    defenses: Sequence[str | Spec | Defense] = (),
    targets: Mapping[str, nn.Module] | None = None,
    shortcuts: Sequence[str] = (),
    progress: Progress | bool | None = None,
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
    keep_images : bool
        Keep all adversarial images in `out`, see `robusteval.runs.kept_images`.
    probes : bool
        Run the extra attacks on a few images that the trust checks need.
    interpreters : sequence of str or Spec
        Such as ``"cam"`` or ``"grad:pool=2"``: whose maps are compared before and after each
        attack, see `robusteval.evaluation.map_changes`.
    defenses : sequence of str, Spec or Defense
        Such as ``"detector:file=FILE"`` or the file itself; see `robusteval.evaluation.defense`.
        Each attack is judged behind each of them as well, where it knows nothing of the defense,
        and run against it where it does.
    targets : mapping of str to nn.Module
        Other networks by name, on which the adversarial images made on this one are judged.
    shortcuts : sequence of {"amp", "compile"}
        Passes that attacks differentiate are made under torch's autocast, or by the compiled
        network. Verdicts never are; where the two differ is counted.
    progress : Progress or bool, optional
        Where to say how far it is; True for bars on stderr.

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
    if out is not None:
        check_path("out", out)
    elif keep_images:
        raise UsageError("keep_images needs a folder to keep them in: give out")
    with open_progress(progress) as shown:
        plan = prepare_plan(
            classifier,
            data,
            attacks,
            samples=samples,
            seed=seed,
            probes=probes,
            interpreters=interpreters,
            defenses=defenses,
            receivers=targets,
            shortcuts=shortcuts,
            progress=shown,
        )
        if out is not None:
            return execute(
                plan,
                Path(out),
                batch_size=batch_size,
                fresh=fresh,
                keep_images=keep_images,
                progress=shown,
            )
        with tempfile.TemporaryDirectory(prefix="robusteval-") as folder:
            run = execute(plan, Path(folder), batch_size=batch_size, progress=shown)
            return replace(run, folder=None)


def execute(
    plan: Plan,
    folder: Path,
    *,
    batch_size: int | None = None,
    fresh: bool = False,
    keep_images: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: str = "",
    pool: Pool | None = None,
) -> Run:
    """Run a plan, or what is left of it, and keep it in a folder; see `evaluate`.

    `stopping` is asked after each batch; Interrupted once it says so. The processes of a `pool`, if
    there is one, do the work.
    """
    if batch_size is not None:
        check_whole("batch-size", batch_size, 1)
    plan = replace(plan, data=keep_decoded(plan.data))
    models = [plan.classifier, *(each.model for each in (*plan.defenses, *plan.receivers))]
    blocks = [model.block for model in models]
    try:
        with ExitStack() as stack:
            say = (progress or Silent()).say
            store = stack.enter_context(Store.open(folder, plan.config, fresh=fresh, say=say))
            if keep_images:
                store.images = KeptImages(store.folder, say)
            for model in models:
                stack.enter_context(frozen(model))
            stack.enter_context(exact_arithmetic())
            if pool is None:  # or others read
                stack.enter_context(read_ahead(plan.data))
            evaluation = Evaluation(
                plan,
                store,
                batch_size=batch_size,
                progress=progress or Silent(),
                stopping=stopping,
                command=command,
            )
            evaluation.computation.handing.pool = pool
            return evaluation.run()
    finally:
        for model, block in zip(models, blocks, strict=True):
            model.block = block  # made smaller where memory ran out


class Evaluation:
    """One plan on its way into one store."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        batch_size: int | None,
        progress: Progress,
        stopping: Callable[[], bool],
        command: str,
        answers: Answers | None = None,
    ) -> None:
        self.plan = plan
        self.progress = progress
        self.targets = list_targets(plan)
        self.receivers = list_receivers(plan)
        # goes on counting the seconds of all calls, spent on what had to be computed
        self.batches = ResumableMap(store.parts, progress, stopping, seconds=store.seconds)
        those = [*self.targets, *self.receivers]
        self.answers = answers or Answers()
        self.answers.find("plan", lambda: list(plan.findings))
        self.answers.count("classes", lambda: plan.classifier.num_classes)
        self.computation = Computation(plan, store, those, self.batches, batch_size, self.answers)
        self.cells = Cells(plan, store, self.targets, self.computation, self.receivers)
        self.recording = Recording(plan, store, those, command)

    def run(self) -> Run:
        """Compute all cells, one after the other; the record is written after each."""
        undefended, *defended = self.targets
        self.write_record()
        estimate.foresee_stages(self.progress, self.plan, self.targets, self.receivers)
        for target in self.targets:
            self.measure_clean(target)
        measure_receivers(self)
        for finding in self.recording.findings:
            self.progress.say(finding.message)
        if undefended.measurement is not None:
            self.measure_quality(undefended.measurement)
        self.say_forecast()
        for attack in self.plan.attacks:
            self.run_attack(attack, undefended)
        for target in defended:
            for attack in self.plan.list_attacks_on(target.defense):
                self.run_attack(attack, target)
        for target in self.targets:
            attacks = self.plan.list_questioned(target.defense)
            name, _ = choose_other(self.targets, target)
            for spec in list_unmaskings(target.found, attacks, name):
                self.run_extra(spec, target)
            self.check_target(target)
        is_part, failed = self.plan.share is not None, bool(self.recording.failures)
        if is_part and not failed:
            save_share(self.recording.store.folder, self.answers.known)
        return self.write_record("incomplete" if is_part or failed else "complete")

    def say_forecast(self) -> None:
        """Say how long the attacks will take, where that is worth saying."""
        most = self.computation.sizes.usual
        estimate.say_forecast(self.progress, self.plan, self.targets, self.receivers, most)

    def write_record(self, status: str | None = None) -> Run:
        """Write the record as far as it is, see `Recording.write`."""
        return self.recording.write(status, self.batches.seconds, self.cells.keys)

    def measure_clean(self, target: Target) -> None:
        """Measure the images as they are, and see what they say of the model."""
        examine_network(self.plan, target, self.targets[0].found, self.answers)
        self.cells.compute_clean(target)
        self.write_record()
        findings = self.recording.findings
        if target.defense is not None:
            findings += sanity_checks.check_seen(target.clean, target.defense.seen, target.suffix)
        if target.detector is not None:  # the same network; only its alarms are new
            return
        found = question_network(self.plan, target, self.answers, self.progress)
        findings += [target.name_defense(finding) for finding in found]

    def measure_quality(self, measurement: Measurement) -> None:
        """Measure what maps are worth without an attack, or note why nobody knows."""
        try:
            self.recording.quality = self.cells.compute_quality(measurement)
        except Interrupted:
            raise
        except RobustevalError as error:
            message = f"What the maps are worth was not measured: {error}"
            self.recording.findings.append(Finding("quality-failed", False, message))
            self.progress.say(message)
        finally:
            self.write_record()

    def run_attack(self, attack: Attack, target: Target, without: Sequence[Target] = ()) -> None:
        """Run one attack, or note why it has no result; a stop is passed on."""
        failures = self.recording.failures
        wider = None
        try:
            with known_surroundings(self.targets, target):
                outcomes = self.cells.compute_attack(attack, target, without)
            self.recording.outcomes += outcomes
            wider = spare_none(outcomes[0])
        except Interrupted:
            raise
        except DefenseBroke as error:  # judged behind the others all the same
            cell = error.target.name_cell(attack.spec)
            failures[cell] = str(error)
            self.progress.say(f"{cell} has no result: {error}")
            self.run_attack(attack, target, (*without, error.target))
        except RobustevalError as error:
            for missing in self.plan.list_cells_of(attack, target.defense):
                failures.setdefault(missing.label, str(error))
            self.progress.say(f"{attack.spec}{target.suffix} has no result: {error}")
        finally:
            self.write_record()
        if wider is not None:
            spec, finding = wider
            self.recording.findings.append(target.name_defense(finding))
            self.progress.say(finding.message)
            wide = self.plan.prepare(spec, target.model)
            if not self.plan.asks_for(wide):  # or it runs in its turn
                self.run_attack(wide, target, without)

    def run_extra(self, spec: Spec, target: Target, role: str = "attack") -> list[Outcome]:
        """Run an attack that nobody asked for; where it has no result a remark says why."""
        outcomes: list[Outcome] = []
        try:
            attack = self.plan.prepare(spec, target.model, role)
            with known_surroundings(self.targets, target):
                outcomes = self.cells.compute_attack(attack, target)
            self.recording.outcomes += outcomes
        except Interrupted:
            raise
        except RobustevalError as error:
            what = "The attack" if role == "attack" else "The trust check"
            finding = Finding("probe-failed", False, f"{what} {spec} has no result: {error}")
            self.recording.findings.append(target.name_defense(finding))
        finally:
            self.write_record()
        return outcomes

    def check_target(self, target: Target) -> None:
        """Run the extra attacks of the trust checks, and see what all attacks say of each other."""
        recording = self.recording
        mine = [o for o in recording.outcomes if o.defense == target.spec and o.adaptive]
        found: list[Finding] = []
        if self.plan.probes and not recording.failures and target.detector is None:
            probes = sanity_checks.list_probes(mine, moving=target.found.is_moving)
            for probe in estimate.foresee_checks(self.progress, self.plan, target, probes):
                mine += self.run_extra(probe.spec, target, probe.role)
            mine += self.plant_examples(mine, target)
        if self.plan.share is None and (mine or target.defense is None):
            found = sanity_checks.check_outcomes(mine) + check_active_tests(mine)
            found += [*check_survival(target.clean, mine), *check_curves(mine)]
        recording.findings += [target.name_defense(finding) for finding in found]

    def plant_examples(self, outcomes: list[Outcome], target: Target) -> list[Outcome]:
        """Test whether the attacks find what is there; nothing where nothing can be planted."""
        found: list[Outcome] = []
        # where answers are random, or others beside others, nothing could lie in one place
        for spec in [] if target.found.is_moving else list_planted_searches(outcomes):
            attack = self.plan.prepare(spec, target.model)
            try:
                found.append(self.cells.compute_active_test(attack, target))
            except Interrupted:
                raise
            except RobustevalError as error:
                unknown = f"Whether {spec} would have found something is not known: {error}"
                self.progress.say(unknown)
                break
            self.recording.outcomes.append(found[-1])
            self.write_record()
        return found


def try_conventions(plan: Plan, target: Target, progress: Progress) -> list[Finding]:
    """Find out whether a network should be fed in another way."""
    some = plan.index[:STEADY]
    progress.begin(f"Checking how the model is fed{target.suffix}", len(some))
    pred = target.clean["pred_clean"][:STEADY]
    found = find_convention(target.model, plan.data, some, pred, progress.advance)
    progress.end()
    return found


def measure_receivers(evaluation: Evaluation) -> None:
    """Measure the images as other networks see them, and whether these are fed as they should."""
    plan, answers = evaluation.plan, evaluation.answers
    for receiver in evaluation.receivers:
        examine_network(plan, receiver, evaluation.targets[0].found, answers)
        evaluation.cells.compute_clean(receiver)
        evaluation.write_record()
        found = ask_network(plan, receiver, answers, evaluation.progress)
        evaluation.recording.findings += [
            # of the transfer alone: what is said of the classifier itself holds all the same
            receiver.name_defense(finding._replace(code=f"target-{finding.code}", grave=False))
            for finding in found
        ]


def examine_network(plan: Plan, target: Target, undefended: Examination, answers: Answers) -> None:
    """Look for what in a network leads attacks astray, unless that is known; fills its `found`."""

    def examine() -> Examination:
        target.examine_model(plan, undefended)
        return target.found

    target.found = answers.examine(f"examination{target.suffix}", examine)


def question_network(
    plan: Plan, target: Target, answers: Answers, progress: Progress
) -> list[Finding]:
    """What is said of a network that is attacked, see `ask_network`; adds to its `found`."""
    found = ask_network(plan, target, answers, progress)
    target.found = target.found.add_answers(target.clean, target.model.num_classes)
    return [*found, *describe_masks(target.found, followed=plan.probes)]


def ask_network(plan: Plan, target: Target, answers: Answers, progress: Progress) -> list[Finding]:
    """What the images as they are, and a few more questions, say of a network."""
    suffix, some = target.suffix, plan.index[:PROBED]
    found = sanity_checks.check_clean(target.clean, target.model.num_classes)
    company = answers.find(f"company{suffix}", partial(find_company, target.model, plan.data, some))
    if company:
        # predicted again in smaller batches they then differ too, which is not by chance
        found = [each for each in found if each.code != "non-deterministic"] + company
    return found + answers.find(
        f"conventions{suffix}", partial(try_conventions, plan, target, progress)
    )
