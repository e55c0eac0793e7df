"""The record of a run in sentences: verdict, what it means, warnings, probes, provenance.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .abridged import QUOTED, choose_cases, count_others
from .corruptions import write_corruption_notes, write_corruption_numbers
from .formatting import (
    MISSING,
    format_count,
    format_decibels,
    format_duration,
    format_hash,
    format_normalisation,
    format_percent,
    format_quantity,
    format_range,
    format_rate,
    format_shape,
    format_share,
    format_similarity,
    format_threat,
    join_parts,
    name_attack,
    name_file,
)
from .meaning import (
    find_shift,
    write_advice,
    write_attack_meaning,
    write_claim,
    write_weakest_groups,
)
from .measures import CORRUPTION
from .neighbours import write_neighbours
from .record import (
    AttackRow,
    DefenseRow,
    DetectionRecord,
    FindingRow,
    ProbeRow,
    RunRecord,
    WorstCaseRow,
)
from .shortcuts import describe_shortcuts

DIFFERING = 20  # sentences on PNG files
CAUGHT = 0.2  # of the results of an attack that knows a detector, below which it is none
PROBES = {
    "probe:noise": "Noise of the same size, {threat}",
    "probe:unlimited": "An unlimited {norm} attack",
    "probe:double": "Twice the budget, {spec}",
}


def write_verdict(record: RunRecord) -> str:
    """The first line of every report: one sentence a reader may quote."""
    return write_caveats(record) + (explain_missing_number(record) or write_numbers(record))


def write_caveats(record: RunRecord) -> str:
    """What must be known before any number: unfit for use, or incomplete."""
    said = ""
    if record.misfed:
        said += "Not to be used: the model is probably not fed as it was trained. "
    if record.run.shard:
        said += f"Shard {record.run.shard} of a run: `robusteval merge` joins all shards. "
    elif not record.complete:
        finished = f"{len(record.attacks)} of {record.attacks_asked}"
        said += f"Incomplete: {finished} attacks finished. "
    return said


def explain_missing_number(record: RunRecord) -> str:
    """Why there is no number; empty if there is one."""
    clean = record.clean_accuracy
    if clean.n == 0:
        return "Nothing was evaluated: no image was looked at."
    shown = f"clean accuracy {format_rate(clean)}, n = {clean.n:,}"
    if not record.attacks:
        when = "Until then" if record.run.shard else "Nothing was evaluated:"
        return f"{when} no attack has a result; {shown}."
    if clean.k == 0:
        return f"Nothing was evaluated: no image was classified correctly to begin with; {shown}."
    return ""


def write_numbers(record: RunRecord) -> str:
    """The numbers of the verdict, one for each radius; or, without one, how near attacks got."""
    clean, worst = record.clean_accuracy, list_attacked_cases(record)
    bounded = [case for case in worst if case.threat.eps is not None]
    n = f"n = {clean.n:,}"
    corrupted = [write_corruption_numbers(found) for found in record.corruptions[:1]]
    if not worst:
        return f"Accuracy {corrupted[0]}, {n}; clean {format_percent(clean)}"
    most = "at most " if record.upper_bound else ""
    if not bounded:
        quoted = choose_cases(worst, QUOTED)
        reached = "; ".join(write_reach(record, case) for case in quoted)
        main = f"{reached}{count_others(worst, quoted)}, {n}"
    elif len(bounded) == 1:
        value = format_rate(bounded[0].robust_accuracy.float)
        place = format_short_place(record, bounded[0])
        main = f"Robust accuracy {most}{value}, {n}, {place}, {count_attacks(bounded[0])}"
    else:
        quoted = choose_cases(bounded, QUOTED)
        cases = (
            f"{most}{format_rate(case.robust_accuracy.float)} at"
            f" {format_short_place(record, case)}, {count_attacks(case)}"
            for case in quoted
        )
        main = f"Robust accuracy, {n}: {'; '.join(cases)}{count_others(bounded, quoted)}"
        bounded = quoted
    defended = "".join(
        write_defended_numbers(record, [case for case in bounded if not case.defense])
    )
    beside = "".join(f"; {found}" for found in corrupted)
    again = "".join(write_rejudged_numbers(record, bounded))
    return f"{main}; clean {format_percent(clean)}{again}{defended}{beside}{write_weakness(record)}"


def write_rejudged_numbers(record: RunRecord, cases: Sequence[WorstCaseRow]) -> Iterator[str]:
    """What the same weights in another arithmetic make of these cases, for the verdict."""
    found = [
        (case.threat, each.dtype, row.robust)
        for case in cases
        if not case.defense
        for each in (record.received.rejudged if record.received else ())
        for row in each.cases
        if row.threat == case.threat
    ]
    for threat, dtype, robust in found:
        where = f" at {format_threat(threat)}" if len(found) > 1 else ""
        yield f"; judged in {dtype}{where} at most {format_percent(robust)}"


def write_defended_numbers(record: RunRecord, cases: Sequence[WorstCaseRow]) -> Iterator[str]:
    """What defenses make of these cases, for the verdict."""
    clean = {defense.spec: defense.clean_accuracy for defense in record.defenses}
    most = "at most " if record.upper_bound else ""
    for case in cases:
        where = f" at {format_threat(case.threat)}" if len(cases) > 1 else ""
        for other in record.worst_cases:
            if other.defense and other.threat == case.threat and other.defense in clean:
                yield (
                    f"; behind {shorten_defense(record, other.defense)}{where} {most}"
                    f"{format_rate(other.robust_accuracy.float)}"
                    f" {', '.join(list_knowledge(record, other))},"
                    f" clean {format_percent(clean[other.defense])}"
                )


def count_attacks(case: WorstCaseRow) -> str:
    """By how many attacks a case was found."""
    return "one attack" if len(case.attacks) == 1 else f"worst case of {len(case.attacks)} attacks"


def write_reach(record: RunRecord, case: WorstCaseRow) -> str:
    """How near attacks got that look for the nearest success."""
    fooled, found = case.success_rate.float, case.distances
    if case.threat.norm in ("ssim", "none"):
        return (
            f"Fooled on {fooled.k:,} of {fooled.n:,} images it had right, mean SSIM"
            f" {format_similarity(found.ssim)} and PSNR {format_decibels(found.psnr)},"
            f" {format_short_place(record, case)}, {count_attacks(case)}"
        )
    goal = "a chosen" if case.threat.targeted else "another"
    behind = f" behind {shorten_defense(record, case.defense)}" if case.defense else ""
    return (
        f"Median {case.threat.norm} distance to {goal} class"
        f" {format_quantity(case.distance.median)}, over {fooled.k:,} of {fooled.n:,} images"
        f" it had right{behind}, {count_attacks(case)}"
    )


def write_weakness(record: RunRecord) -> str:
    """The end of the verdict when it should not be believed."""
    grave = sum(finding.grave for finding in record.findings)
    return (
        f"; this evaluation is weak: {format_count(grave, 'grave finding')} below" if grave else ""
    )


def write_meaning(record: RunRecord) -> Iterator[str]:
    """What the verdict means: images, files, belief, cost."""
    if explain_missing_number(record):
        return
    every = list_attacked_cases(record)
    cases = choose_cases(every, QUOTED)
    for case in cases:
        behind = f" behind {shorten_defense(record, case.defense)}" if case.defense else ""
        yield write_attack_meaning(record, case, behind)
    if others := len(every) - len(cases):
        yield f"{others:,} more threats are between these."
    yield from write_corruption_notes(record.corruptions, bool(cases))
    yield from write_weakest_groups(record)
    yield from write_png_notes(record)
    yield from (
        line for defense in record.defenses for line in write_defense_notes(record, defense)
    )
    yield from write_neighbours(record)
    yield write_trust(record)
    yield from write_claim(record, cases)
    yield from write_advice(record)
    yield write_cost(record)


def write_png_notes(record: RunRecord) -> Iterator[str]:
    """Where PNG files are not what rounding to 8 bit is."""
    if any(row.robust_accuracy.png is None for row in record.attacks):
        yield "A PNG file cannot hold these images."
    rows: list[tuple[str, AttackRow | WorstCaseRow]] = [
        (f"{name_worst(case)} at {format_short_place(record, case)}", case)
        for case in record.worst_cases
    ]
    rows += [(name_attack(row.spec, row.defense), row) for row in record.attacks]
    differing = [
        f"Read back from PNG files {format_percent(rates.png)} robust, rounded to 8 bit"
        f" {format_percent(rates.eight_bit)}: {name}."
        for name, row in rows
        if (rates := row.robust_accuracy).png is not None and rates.png != rates.eight_bit
    ]
    yield from differing[:DIFFERING]
    if len(differing) > DIFFERING:
        yield f"PNG files differ from rounding for {len(differing) - DIFFERING:,} more rows."


def write_defense_notes(record: RunRecord, defense: DefenseRow) -> Iterator[str]:
    """What must be known of a defense before its numbers are believed."""
    name = shorten_defense(record, defense.spec)
    for defeat in defense.defeated:
        yield (
            f"Defeated: against attacks that know it, {name} is no better than no defense, as far"
            f" as {defeat.undefended.n:,} images can show:"
            f" {format_rate(defeat.robust_accuracy)} robust, undefended"
            f" {format_rate(defeat.undefended)}, {format_threat(defeat.threat)}."
        )
    yield from warn_of_blind_detector(name, defense.detector)
    rows = [row for row in record.attacks if row.defense == defense.spec]
    if rows and not any(row.adaptive for row in rows):
        yield f"Oblivious: no attack here knows {name}; one that does may be stronger."


def warn_of_blind_detector(name: str, detector: DetectionRecord | None) -> Iterator[str]:
    """Whether attacks that know a detector pass it by."""
    known = [row for row in detector.attacks if row.adaptive] if detector else []
    known = [row for row in known if row.tpr.n]
    worst = min(known, key=lambda row: row.tpr.value or 0.0, default=None)
    if detector and worst and (worst.tpr.value or 0.0) < CAUGHT:
        yield (
            f"No defense: {name} flags {format_rate(worst.tpr)} of"
            f" {worst.tpr.n:,} results of {worst.attack}, which knows it, where it was"
            f" set to flag {format_share(detector.fpr_asked)} of the images as they are."
        )


def write_cost(record: RunRecord) -> str:
    """Time and passes that the whole evaluation took."""
    costs = [case.cost for case in record.worst_cases]
    forwards = format_quantity(sum(cost.forwards or 0.0 for cost in costs))
    backwards = format_quantity(sum(cost.backwards or 0.0 for cost in costs))
    took = format_duration(record.provenance.seconds)
    return f"Cost: {took}; {forwards} forward and {backwards} backward passes per attacked image."


def write_trust(record: RunRecord) -> str:
    """Whether the numbers can be believed."""
    findings = record.findings
    grave = sum(finding.grave for finding in findings)
    if record.misfed:
        found = format_count(grave, "grave finding")
        return f"Trust checks: {found}; mend how the model is fed first."
    if grave:
        return (
            f"Trust checks: {format_count(grave, 'grave finding')}; the model may be less robust."
        )
    if not record.complete:
        return "Trust checks: not finished."
    skipped = record.provenance.config.get("probes") is False
    note = " Their extra attacks were skipped." if skipped else ""
    if findings:
        return f"Trust checks: {format_count(len(findings), 'remark')}, nothing grave.{note}"
    return f"Trust checks: nothing found.{note}"


def write_finding(finding: FindingRow) -> str:
    """A finding with a mark that needs no colour."""
    cell = finding.cell
    where = f"{cell}: " if cell and cell not in finding.message else ""
    return f"{'✗' if finding.grave else '!'} {where}{finding.message}"


def write_probes(record: RunRecord) -> Iterator[str]:
    """What the extra attacks of the trust checks did; what follows from it is in the findings."""
    for probe in record.probes:
        form = PROBES.get(probe.probe, "{spec}")
        facts = {"threat": format_short_place(record, probe), "norm": probe.threat.norm}
        fooled = probe.success_rate.float
        if probe.probe == "probe:planted":
            if fooled.n:  # or a finding says that none could be planted
                yield write_planted(probe)
            continue
        what = form.format(spec=name_attack(probe.spec, probe.defense), **facts)
        if probe.defense and "{norm}" in form:
            what += f" behind {shorten_defense(record, probe.defense)}"
        yield f"{what}: fooled {fooled.k:,} of {fooled.n:,} images"


def write_planted(probe: ProbeRow) -> str:
    """How much an attack finds of what was planted on the network, beside its robust accuracy."""
    found = probe.success_rate.float
    return (
        f"{name_attack(probe.spec, probe.defense)} finds planted adversarial examples on this"
        f" network in {format_rate(found)} of {found.n:,} cases"
    )


def write_absences(record: RunRecord) -> Iterator[str]:
    """Attacks without a result."""
    yield from (f"{spec}: {reason}" for spec, reason in record.failures.items())
    yield from (f"{spec}: not finished" for spec in record.not_run)


def write_detectors(record: RunRecord) -> Iterator[str]:
    """How well each detector tells attacked images from others."""
    for defense in record.defenses:
        found = defense.detector
        if found is None:
            continue
        name = shorten_defense(record, defense.spec)
        yield (
            f"{name}: false alarms on {format_rate(found.fpr)} of the images as they are (set"
            f" for {format_share(found.fpr_asked)}, threshold {format_quantity(found.threshold)})"
        )
        for attack in found.attacks:
            knows = "adaptive" if attack.adaptive else "oblivious"
            area = MISSING if attack.auc is None else f"{attack.auc:.3f}"
            yield (
                f"{name} against {attack.attack}, {knows}: flags"
                f" {format_rate(attack.tpr)} of {attack.tpr.n:,} results that fool the"
                f" model, AUC {area}"
            )


def list_provenance(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Where the numbers come from, without the command."""
    source = record.provenance
    model, data, environment = source.model, source.data, source.environment
    key = f"weights {model['weights']}" if model.get("weights") else ""
    file = name_file(model.get("file"))
    yield "model", join_parts(file, key, format_hash(model), model.get("arch"))
    if model.get("reading"):
        yield "weights", model["reading"]
    if model.get("outputs"):
        yield "outputs", model["outputs"]
    if model.get("precision"):
        yield "computed in", model["precision"]
    yield from (("differentiated", said) for said in describe_shortcuts(record))
    yield "normalisation", format_normalisation(model)
    for defense in record.defenses:
        facts = defense.facts
        yield "defense", join_parts(defense.spec, format_hash(facts), facts.get("arch"))
    drawn = f"{data.get('samples', 0):,} of {data.get('total', 0):,} images"
    seed = "" if source.seed is None else f"seed {source.seed}"
    yield (
        "data",
        join_parts(
            name_file(data.get("name")),
            drawn,
            seed,
            format_shape(data),
            format_range(data),
            format_hash(data),
        ),
    )
    if data.get("transform") not in (None, "none", "as stored"):
        yield "preparation", data["transform"]
    if data.get("turned"):
        yield "orientation", f"{data['turned']} images are turned upright, as their EXIF says"
    if data.get("labels"):
        yield "labels", f"matched {data['labels']}"
    versions = (
        f"{name} {environment[name]}"
        for name in ("robusteval", "python", "torch", "torchvision", "art", "numpy")
        if name in environment
    )
    yield "made with", join_parts(*versions)
    device = environment.get("device")
    took = (
        f"{format_duration(source.seconds)} on {device}"
        if device
        else format_duration(source.seconds)
    )
    yield "made", join_parts(source.created, took, environment.get("platform"))
    if source.folder:
        yield "folder", source.folder


def select_undefended(cases: Sequence[WorstCaseRow]) -> Sequence[WorstCaseRow]:
    """The cases without a defense; all, if each has one."""
    return [case for case in cases if case.defense is None] or cases


def list_attacked_cases(record: RunRecord) -> Sequence[WorstCaseRow]:
    """The cases of the first screen: those of attackers, not of corruptions."""
    attacked = [case for case in record.worst_cases if case.threat.norm != CORRUPTION]
    return select_undefended(attacked)


def name_worst(case: WorstCaseRow) -> str:
    """What the images that hold against all attacks of a case are called."""
    return "right under all of them" if case.threat.norm == CORRUPTION else "worst case"


def format_short_place(record: RunRecord, case: WorstCaseRow | ProbeRow) -> str:
    """Threat and defense of a case, the defense as short as this record allows."""
    shift = find_shift(record, case) if isinstance(case, WorstCaseRow) else None
    behind = f" behind {shorten_defense(record, case.defense)}" if case.defense else ""
    return format_threat(case.threat, shift) + behind


def shorten_defense(record: RunRecord, spec: str) -> str:
    """A defense by its name alone, where no other has it."""
    names = {defense.spec: defense.name for defense in record.defenses}
    name = names.get(spec)
    return name if name and list(names.values()).count(name) == 1 else spec


def list_knowledge(record: RunRecord, row: AttackRow | WorstCaseRow) -> Iterator[str]:
    """What must be said beside a number behind a defense."""
    if row.defense is None:
        return
    yield "adaptive" if row.adaptive else "oblivious"
    if isinstance(row, WorstCaseRow) and row.threat in (
        defeat.threat
        for defense in record.defenses
        if defense.spec == row.defense
        for defeat in defense.defeated
    ):
        yield "defeated"
