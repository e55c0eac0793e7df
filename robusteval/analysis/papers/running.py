"""Run what a paper declares by the ordinary evaluation, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from robusteval.analysis.attack_comparison import compare_explanations
from robusteval.analysis.explain import explain
from robusteval.analysis.map_attack import attack_maps
from robusteval.analysis.papers.comparison import Reproduction, compare_paper
from robusteval.analysis.papers.declaration import Detectors, Paper
from robusteval.analysis.papers.evading import Evasion, WriteDetector
from robusteval.analysis.papers.masked import MaskWorth
from robusteval.analysis.papers.on_maps import MapAttack
from robusteval.analysis.papers.results import Results
from robusteval.art.field_names import check_attack
from robusteval.datasets.chosen import choose_images
from robusteval.datasets.dataset import Data
from robusteval.errors import Interrupted, RobustevalError, UsageError
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.plan import Plan, prepare_plan
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances
from robusteval.models.classifier import Classifier
from robusteval.progress import Progress, Silent
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.detector_record import Combination
from robusteval.runs.explanation_record import ExplanationComparison, ExplanationRecord
from robusteval.runs.types import Outcome, Run, Spec, format_value

# what is wanted, the names, seed and cache; figures, and by name why a detector has none
Detect = Callable[
    [Detectors, Sequence[str], int, WorkCache], tuple[list[Combination], dict[str, str]]
]

# the attack, the units, how many images, the seed and cache
Mask = Callable[[str, str, int, int, WorkCache], MaskWorth]


def reproduce(
    paper: Paper,
    classifier: Classifier,
    data: Data,
    folder: Path,
    *,
    size: str = "small",
    samples: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
    command: str = "",
    detect: Detect | None = None,
    mask: Mask | None = None,
    write: WriteDetector | None = None,
    start: Path | None = None,
    targets: Mapping[str, Classifier] | None = None,
    hardened: tuple[str, Classifier] | None = None,
) -> Reproduction:
    """Measure what a paper has published, on another network.

    Parameters
    ----------
    paper : Paper
        See `robusteval.analysis.papers.declaration.read_paper`.
    classifier : Classifier
        What is attacked.
    data : Data
        The images.
    folder : Path
        Where the run and what is explained are kept, and continued.
    size : {"small", "paper"}
        How much is run.
    samples : int, optional
        Images; as the size says if not given, which also says how many of them are explained.
    seed : int
        Decides the draw and every random number.
    fresh : bool
        Throw away what is in `folder`.
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
    targets : mapping of str to Classifier, optional
        Other networks that the images are shown to; tables of transfer are of the first.
    hardened : tuple of str and Classifier, optional
        The name of a network that was trained as the paper proposes, and the network: what has
        rows of such a one attacks it as well, on the same images.

    Raises
    ------
    UsageError
        If nothing of the paper can be run on this network.
    RunError
        If something broke; what was finished is kept.
    """
    attacks = paper.list_attacks(size, int(np.prod(data.shape)))
    specs = list(
        dict.fromkeys(str(check_attack(parse(t))) for each in attacks.values() for t in each)
    )
    asked = [check_attack(parse(text)) for text in specs]
    explained = [INTERPRETERS.check_spec(parse(text)) for text in paper.list_interpreters(size)]

    def prepare(model: Classifier, receivers: Mapping[str, Classifier] | None) -> Plan:
        return prepare_plan(
            model,
            data,
            asked,
            samples=samples or paper.choose_size(size).samples,
            seed=seed,
            probes=False,
            interpreters=explained,
            optional=(*asked, *explained),
            receivers=receivers,
            progress=progress or Silent(),
        )

    run_plan = partial(execute, fresh=fresh, progress=progress, stopping=stopping, command=command)
    plan = prepare(classifier, targets)
    run = run_plan(plan, folder / "run")
    missing = {**list_left_out(plan), **run.failures}

    def lead_maps(model: Classifier) -> dict[str, MapAttack]:
        """Attack the maps of a network at every radius that the paper has."""
        found, steps = {}, paper.choose_size(size).map_steps
        cache = open_cache(folder / "maps", fresh, progress)
        for name, eps in paper.on_maps.items():
            if stopping():
                raise Interrupted
            facts = ["maps", describe_circumstances(model, seed), eps, steps]
            work = partial(
                attack_maps, model, plan.data, plan.index, eps=eps, steps=steps, seed=seed
            )
            try:
                ids, tau, kept = cache.compute(facts, (run.clean["id"],), work)
            except UsageError as error:
                missing["maps"] = str(error)
                break
            text = f"cells of the map lowered, eps {format_value(eps)}, {steps} steps"
            found[name] = MapAttack(text, ids, tau, kept)
        return found

    on_maps, on_hardened_maps = lead_maps(classifier), dict[str, MapAttack]()
    hard: Run | None = None
    if hardened is not None and paper.compares_hardened:
        hard = run_plan(prepare(hardened[1], None), folder / "hardened")
        on_hardened_maps = lead_maps(hardened[1])
    called = {
        name: tuple(str(check_attack(parse(text))) for text in each)
        for name, each in attacks.items()
    }
    again: dict[str, list[Outcome]] = {}
    chaotic = [check_attack(parse(text)) for name in paper.chaotic for text in attacks[name]]
    for other in range(1, paper.choose_size(size).seeds if chaotic else 1):
        luck = prepare_plan(
            classifier,
            choose_images(plan.data, plan.index),  # which another seed would draw otherwise
            chaotic,
            seed=seed + other,
            probes=False,
            optional=chaotic,
            progress=progress or Silent(),
        )
        for outcome in run_plan(luck, folder / "seeds" / str(seed + other)).attacks:
            again.setdefault(str(outcome.attack), []).append(outcome)
    explanations: dict[str, ExplanationRecord] = {}
    most = paper.choose_size(size).count_explained(samples)
    for name in paper.explained:
        if stopping():
            raise Interrupted
        (text,) = attacks[name]
        cache = open_cache(folder / "explained" / name, fresh, progress)
        try:
            explanations[name] = explain(
                classifier,
                data,
                text,
                samples=most,
                seed=seed,
                progress=progress,
                cache=cache,
            ).record
        except Interrupted:
            raise
        except RobustevalError as error:
            missing[f"explain {name}"] = str(error)
    masked: dict[str, MaskWorth] = {}
    for name, units in paper.masked.items():
        if mask is None:
            break
        cache = open_cache(folder / "masked" / name, fresh, progress)
        images = samples or paper.choose_size(size).masked
        try:
            masked[name] = mask(paper.mask_attack, units, images, seed, cache)
        except Interrupted:
            raise
        except RobustevalError as error:
            missing[f"mask {name}"] = str(error)
    detectors: dict[str, Combination] = {}
    wanted = paper.choose_size(size).detectors
    began = time.monotonic()
    if wanted is not None and detect is not None:
        wanted = wanted if samples is None else replace(wanted, samples=samples)
        cache = open_cache(folder / "detectors", fresh, progress)
        try:
            fitted, reasons = detect(wanted, paper.detectors, seed, cache)
            detectors = {each.name: each for each in fitted}
        except Interrupted:
            raise
        except RobustevalError as error:
            reasons = dict.fromkeys(paper.detectors, str(error))
        missing |= {f"detect {name}": reason for name, reason in reasons.items()}
    behind: dict[str, Outcome] = {}
    if wanted is not None and wanted.evasions and write is not None:
        kept = folder / "evaded" / wanted.extractor
        evasion = Evasion(classifier, data, kept, seed, start)
        try:
            behind, reasons = evasion.run_attacks(
                wanted, write, fresh=fresh, progress=progress or Silent(), stopping=stopping
            )
        except Interrupted:
            raise
        except RobustevalError as error:
            reasons = dict.fromkeys([*wanted.watching, *wanted.evasions], str(error))
        missing |= {f"behind {name}": reason for name, reason in reasons.items()}
    compared = compare_briefly(list(explanations.values()))
    return compare_paper(
        paper,
        size,
        Results(
            run,
            called,
            missing,
            explanations,
            detectors,
            behind,
            hard,
            again,
            on_maps,
            on_hardened_maps,
            masked,
        ),
        remarks=(
            *(describe_hardened(hardened[0], hard) if hardened and hard else ()),
            *(() if compared is None else compared.remarks),
            *(f"Masked, {each.name}: {each.verdict}" for each in masked.values()),
        ),
        explained=compared,
        more_seconds=time.monotonic()
        - began
        + (hard.seconds if hard else 0)
        + sum(each.provenance.seconds for each in explanations.values()),
    )


def describe_hardened(name: str, run: Run) -> tuple[str, ...]:
    """Which network rows of a hardened one are of; findings against it that a reader must know."""
    right = int((run.clean["pred_clean"] == run.clean["label"]).sum())
    grave = [each for each in run.findings if each.grave and each.code != "weak-attacks"]
    return (
        f"The hardened network is {name}, which has {right} of {len(run.clean['label'])} images"
        " right.",
        *(f"Of the hardened network: {finding.message}" for finding in grave),
    )


def open_cache(folder: Path, fresh: bool, progress: Progress | None) -> WorkCache:
    """What an earlier call has finished in a folder, unless it is to begin anew."""
    cache = WorkCache(folder, (progress or Silent()).say)
    if fresh:
        cache.clear()
    return cache


def compare_briefly(records: Sequence[ExplanationRecord]) -> ExplanationComparison | None:
    """Several explanations side by side without their single images; None of fewer than two."""
    if len(records) < 2:
        return None
    found = compare_explanations(records)
    return replace(found, attacks=tuple(replace(each, images=()) for each in found.attacks))


def list_left_out(plan: Plan) -> dict[str, str]:
    """What the network cannot have, by attack or interpreter, with the reason."""
    return {
        finding.cell: finding.message
        for finding in plan.findings
        if finding.code == "left-out" and finding.cell is not None
    }


def list_specs_of(paper: Paper, size: str) -> list[Spec]:
    """All attacks and interpreters of a paper, to see what they need."""
    attacks = [text for each in paper.list_attacks(size).values() for text in each]
    wanted = paper.choose_size(size).detectors
    theirs = () if wanted is None else (*wanted.interpreters, *wanted.attacks.values())
    return [parse(text) for text in (*attacks, *paper.list_interpreters(size), *theirs)]
