"""Run what a paper declares by the ordinary evaluation, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from robusteval.analysis.attack_comparison import compare_explanations
from robusteval.analysis.explain import explain
from robusteval.analysis.map_attack import attack_maps
from robusteval.analysis.papers.comparison import Reproduction, compare_paper
from robusteval.analysis.papers.declaration import Detectors
from robusteval.analysis.papers.evading import Evasion, WriteDetector
from robusteval.analysis.papers.masked import MaskWorth
from robusteval.analysis.papers.on_maps import MapAttack
from robusteval.analysis.papers.planning import PaperRun, Subject, list_left_out
from robusteval.analysis.papers.results import Results
from robusteval.analysis.papers.shards import Hire, find_shards, hire_nobody, join_run, open_cache
from robusteval.errors import Interrupted, RobustevalError, UsageError
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.shares import Share
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances
from robusteval.models.classifier import Classifier
from robusteval.progress import Progress, Silent
from robusteval.runs.detector_record import Combination
from robusteval.runs.explanation_record import ExplanationComparison, ExplanationRecord
from robusteval.runs.types import Outcome, Run, format_value

# what is wanted, the names, seed and cache; figures, and by name why a detector has none
Detect = Callable[
    [Detectors, Sequence[str], int, WorkCache], tuple[list[Combination], dict[str, str]]
]

# the attack, the units, how many images, the seed and cache
Mask = Callable[[str, str, int, int, WorkCache], MaskWorth]


def reproduce(
    subject: Subject,
    folder: Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: str = "",
    detect: Detect | None = None,
    mask: Mask | None = None,
    write: WriteDetector | None = None,
    start: Path | None = None,
    hire: Hire = hire_nobody,
) -> Reproduction:
    """Measure what a paper has published, on another network.

    Parameters
    ----------
    subject : Subject
        The paper and the network.
    folder : Path
        Where the run and what is explained are kept, and continued. Where several processes have
        measured shares of the images in it (`robusteval.analysis.papers.shards`), what they did is
        joined.
    fresh : bool
        Throw away what is in `folder`; shards stay, and are joined anew.
    progress : Progress, optional
        Where to say how far it is.
    stopping : callable
        Asked after each batch; Interrupted once it says so.
    command : str
        What a user typed to ask for it.
    detect : callable, optional
        Fits and judges the detectors that a paper has.
    mask : callable, optional
        Masks units, and says what that is worth.
    write : callable, optional
        Fits the detector that is attacked, and writes its file.
    start : Path, optional
        The weights in a file from which `write` starts, if from any; what it has written is used
        again with the same ones only.
    hire : callable
        Opens the processes that do the work of a run. All else is done by this one.

    Raises
    ------
    UsageError
        If nothing of the paper can be run on this network, or a shard is missing, not finished or
        of another command.
    RunError
        If something broke; what was finished is kept.
    """
    measuring = Measuring(subject, folder, fresh, progress or Silent(), stopping, command, hire)
    measuring.prepare()
    run = measuring.run_attacks()
    on_maps = measuring.attack_maps(subject.classifier, run)
    hardened = measuring.run_hardened()
    results = Results(
        run,
        subject.name_attacks(),
        measuring.missing,
        hardened=hardened,
        on_maps=on_maps,
        on_hardened_maps=measuring.attack_hardened_maps(run),
        again=measuring.run_again(),
        explanations=measuring.explain_attacks(),
        masked=measuring.mask_units(mask),
        detectors=measuring.fit_detectors(detect),
        behind=measuring.attack_detector(write, start),
    )
    compared = compare_briefly(list(results.explanations.values()))
    names = tuple(subject.hardened)
    return compare_paper(
        subject.paper,
        subject.size,
        results,
        remarks=(
            *(describe_hardened(names[0], hardened, run) if hardened else ()),
            *(() if compared is None else compared.remarks),
            *(f"Masked, {each.name}: {each.verdict}" for each in results.masked.values()),
        ),
        explained=compared,
        more_seconds=measuring.seconds,
    )


@dataclass
class PaperRuns:
    """The runs of a paper: each method makes one kind, and continues what is in the folder."""

    subject: Subject
    folder: Path
    fresh: bool
    progress: Progress
    stopping: Callable[[], bool]
    command: str
    hire: Hire
    plans: dict[PaperRun, Plan] = field(default_factory=dict)
    shards: dict[Share, Path] = field(default_factory=dict)
    # by attack, or by what is done and to what, the reason why there is no result
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # spent on other parts than the first run
    caches: dict[str, WorkCache] = field(default_factory=dict)  # by their folder

    def prepare(self) -> None:
        """Plan the runs, and join what other processes have done of them."""
        self.shards = find_shards(self.folder)
        runs = self.subject.list_runs()
        self.plans = {run: self.subject.prepare(run, progress=self.progress) for run in runs}
        for run, plan in self.plans.items() if self.shards else ():
            out = self.folder / run.folder
            join_run(self.shards, run, plan, out, fresh=self.fresh, progress=self.progress)

    def run_attacks(self) -> Run:
        """The run that most tables are filled from."""
        (run,) = self._execute("run")
        self.missing |= {**list_left_out(next(iter(self.plans.values()))), **run.failures}
        return run

    def run_hardened(self) -> Run | None:
        """The same on the network that was trained as the paper proposes; None without one."""
        runs = self._execute("hardened")
        self.seconds += sum(run.seconds for run in runs)
        return runs[0] if runs else None

    def run_again(self) -> dict[str, list[Outcome]]:
        """What comes of attacks that are a matter of luck with other seeds, by attack."""
        again: dict[str, list[Outcome]] = {}
        for run in self._execute("again"):
            for outcome in run.attacks:
                again.setdefault(str(outcome.attack), []).append(outcome)
        return again

    def _execute(self, kind: str) -> list[Run]:
        """Make the runs of a kind, or continue them."""
        found = []
        for run, plan in self.plans.items():
            if run.kind == kind:
                with self.hire(run, plan) as pool:
                    done = execute(
                        plan,
                        self.folder / run.folder,
                        fresh=self.fresh and not self.shards,
                        progress=self.progress,
                        stopping=self.stopping,
                        command=self.command,
                        pool=pool,
                    )
                found.append(done)
        return found


class Measuring(PaperRuns):
    """All parts of a paper: the runs, and methods for what else is measured."""

    def attack_maps(self, model: Classifier, run: Run) -> dict[str, MapAttack]:
        """Attack the maps of a network for the images of a run, at every radius of the paper."""
        subject, steps = self.subject, self.subject.scale.map_steps
        found: dict[str, MapAttack] = {}
        cache, images = self._open_cache("maps"), subject.draw_images()
        for name, eps in subject.paper.on_maps.items():
            self._stop_if_asked()
            facts = ["maps", describe_circumstances(model, subject.seed), eps, steps]
            work = partial(attack_maps, model, *images, eps=eps, steps=steps, seed=subject.seed)
            try:
                ids, tau, kept = cache.compute(facts, (run.clean["id"],), work)
            except UsageError as error:
                self.missing["maps"] = str(error)
                break
            text = f"cells of the map lowered, eps {format_value(eps)}, {steps} steps"
            found[name] = MapAttack(text, ids, tau, kept)
        return found

    def attack_hardened_maps(self, run: Run) -> dict[str, MapAttack]:
        """The same of the network that was trained as the paper proposes; nothing without one."""
        if not self.subject.paper.compares_hardened:
            return {}
        models = self.subject.hardened.values()
        return {k: v for model in models for k, v in self.attack_maps(model, run).items()}

    def explain_attacks(self) -> dict[str, ExplanationRecord]:
        """What some attacks do region by region, by short name."""
        subject = self.subject
        explanations: dict[str, ExplanationRecord] = {}
        for name in subject.paper.explained:
            self._stop_if_asked()
            (text,) = subject.attacks[name]
            try:
                explanations[name] = explain(
                    subject.classifier,
                    subject.data,
                    text,
                    samples=subject.scale.count_explained(subject.samples),
                    seed=subject.seed,
                    progress=self.progress,
                    cache=self._open_cache(f"explained/{name}"),
                    shards={
                        share: WorkCache(folder / "explained" / name, self.progress.say)
                        for share, folder in self.shards.items()
                    },
                    stopping=self.stopping,
                ).record
            except Interrupted:
                raise
            except RobustevalError as error:
                self.missing[f"explain {name}"] = str(error)
        self.seconds += sum(each.provenance.seconds for each in explanations.values())
        return explanations

    def mask_units(self, mask: Mask | None) -> dict[str, MaskWorth]:
        """What masks of units are worth, by short name."""
        subject, masked = self.subject, dict[str, MaskWorth]()
        if mask is None:
            return masked
        images, attack = subject.samples or subject.scale.masked, subject.paper.mask_attack
        for name, units in subject.paper.masked.items():
            try:
                with self._count_seconds():
                    cache = self._open_cache(f"masked/{name}")
                    masked[name] = mask(attack, units, images, subject.seed, cache)
            except Interrupted:
                raise
            except RobustevalError as error:
                self.missing[f"mask {name}"] = str(error)
        return masked

    def fit_detectors(self, detect: Detect | None) -> dict[str, Combination]:
        """The detectors of the paper by name, fitted and judged."""
        wanted, samples = self.subject.scale.detectors, self.subject.samples
        if wanted is None or detect is None:
            return {}
        wanted = wanted if samples is None else replace(wanted, samples=samples)
        names = self.subject.paper.detectors
        with self._count_seconds():
            try:
                cache = self._open_cache("detectors")
                fitted, reasons = detect(wanted, names, self.subject.seed, cache)
            except Interrupted:
                raise
            except RobustevalError as error:
                fitted, reasons = [], dict.fromkeys(names, str(error))
        self.missing |= {f"detect {name}": reason for name, reason in reasons.items()}
        return {each.name: each for each in fitted}

    def attack_detector(
        self, write: WriteDetector | None, start: Path | None
    ) -> dict[str, Outcome]:
        """What comes of attacks that know a detector, by short name."""
        subject, samples = self.subject, self.subject.samples
        wanted = subject.scale.detectors
        if wanted is None or not wanted.evasions or write is None:
            return {}
        wanted = wanted if samples is None else replace(wanted, samples=samples)
        kept = self.folder / "evaded" / wanted.extractor
        evasion = Evasion(subject.classifier, subject.data, kept, subject.seed, start)
        behind: dict[str, Outcome] = {}
        with self._count_seconds():
            try:
                behind, reasons = evasion.run_attacks(
                    wanted,
                    write,
                    fresh=self.fresh,
                    progress=self.progress,
                    stopping=self.stopping,
                )
            except Interrupted:
                raise
            except RobustevalError as error:
                reasons = dict.fromkeys([*wanted.watching, *wanted.evasions], str(error))
        self.missing |= {f"behind {name}": reason for name, reason in reasons.items()}
        return behind

    def _open_cache(self, name: str) -> WorkCache:
        """The cache of a folder; cleared once, as maps of two networks have one."""
        if name not in self.caches:
            folder = self.folder / name
            self.caches[name] = open_cache(folder, fresh=self.fresh, progress=self.progress)
        return self.caches[name]

    def _stop_if_asked(self) -> None:
        """Interrupted if the work is to stop."""
        if self.stopping():
            raise Interrupted

    @contextmanager
    def _count_seconds(self) -> Iterator[None]:
        """Count how long something takes that says nothing of it."""
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began


def describe_hardened(name: str, run: Run, beside: Run) -> tuple[str, ...]:
    """Which network rows of a hardened one are of; findings against it that a reader must know."""
    same = run.model == beside.model
    right = int((run.clean["pred_clean"] == run.clean["label"]).sum())
    grave = [each for each in run.findings if each.grave and each.code != "weak-attacks"]
    return (
        f"The hardened network is {name}, which has {right} of {len(run.clean['label'])} images"
        " right.",
        *(("It is the network beside it: what the two differ by says nothing.",) if same else ()),
        *(f"Of the hardened network: {finding.message}" for finding in grave),
    )


def compare_briefly(records: Sequence[ExplanationRecord]) -> ExplanationComparison | None:
    """Several explanations side by side without their single images; None of fewer than two."""
    if len(records) < 2:
        return None
    found = compare_explanations(records)
    return replace(found, attacks=tuple(replace(each, images=()) for each in found.attacks))
