"""The record of a report in words: sentences and cells that every format shows alike.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from robusteval.runs.types import format_number

Record = dict[str, Any]
CAUGHT = 0.2  # of the results of an attack that knows a detector, below which it is none
MISSING = "–"


class Column(NamedTuple):
    """A column of the table of attacks."""

    title: str
    cell: Callable[[Record], str]
    left: bool = False


class Line(NamedTuple):
    """A row: an attack, the worst case of several, or (without numbers) a threat."""

    title: str
    kind: str  # "threat", "attack", "worst"
    numbers: Record
    note: str = ""


class Cell(NamedTuple):
    """A number of the matrix, and what must be known of it."""

    number: str
    note: str = ""


class Row(NamedTuple):
    """A row of the matrix: for each of its columns the cells that stand there."""

    title: str
    kind: str  # "clean", "threat", "attack", "worst"
    cells: list[list[Cell]]


def percent(rate: Record) -> str:
    """A share as ``12.4 %``, never rounded to all or nothing; whole up to 100 images."""
    k, n = rate["k"], rate["n"]
    if n == 0:
        return MISSING
    text = f"{100 * k / n:.{decimals(n)}f}"
    if k and not float(text):
        return "< 0.1 %"
    if k < n and float(text) == 100:
        return "> 99.9 %"
    return f"{text} %"


def with_interval(rate: Record) -> str:
    """A share with its interval, as ``12.4 % (9.8–15.6)``."""
    if rate["n"] == 0:
        return MISSING
    d = decimals(rate["n"])
    return f"{percent(rate)} ({100 * rate['low']:.{d}f}–{100 * rate['high']:.{d}f})"


def decimals(n: int) -> int:
    """Digits after the point that a share of `n` images deserves."""
    return 0 if n <= 100 else 1


def quantity(value: float | None) -> str:
    """A number to three digits."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def similarity(value: float | None) -> str:
    """An SSIM to four digits, never rounded to identity."""
    if value is None:
        return MISSING
    return "> 0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def decibels(value: float | None) -> str:
    """A PSNR."""
    return MISSING if value is None else f"{value:.1f} dB"


def share(value: float | None) -> str:
    """A part of one as a percentage to a tenth, ``12.4 %``."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares, ``3.2 points``."""
    return MISSING if value is None else f"{100 * value:.1f} points"


def duration(seconds: float | None) -> str:
    """A time to about two digits."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plural(n: int, noun: str) -> str:
    """``1 attack``, ``2,000 attacks``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def threat(record: Record) -> str:
    """A threat model, as ``linf eps 8/255 (0.0314)``."""
    goal = " targeted" if record["targeted"] else ""
    if record["norm"] == "none":
        radius = "" if record["eps"] is None else f", {budget(record)}"
        return f"no stated norm{radius}{goal}"
    return f"{record['norm']}{',' if unbounded(record) else ''} {budget(record)}{goal}"


def unbounded(record: Record) -> bool:
    """Whether a threat has neither a radius nor a distance that its attacks minimise."""
    return record["norm"] == "ssim" and record["eps"] is None


def budget(record: Record) -> str:
    """A radius on both scales."""
    eps, levels = record["eps"], record["eps_255"]
    if eps is None:
        return "no fixed radius" if unbounded(record) else "minimum norm"
    if levels is None:
        return f"eps {format_number(eps)}"
    if format_number(eps) == levels:
        return f"eps {levels} ({eps:.3g})"
    return f"eps {format_number(eps)} ({eps * 255:.4g}/255)"


def verdict(record: Record) -> str:
    """The first line of every report: one sentence a reader may quote."""
    return start(record) + nothing(record) if nothing(record) else start(record) + number(record)


def start(record: Record) -> str:
    """What must be known before anything else."""
    said = ""
    if record["misfed"]:
        said += "Not to be used: the model is probably not fed as it was trained. "
    if not record["complete"]:
        finished = f"{len(record['attacks'])} of {record['attacks_asked']}"
        said += f"Incomplete: {finished} attacks finished. "
    return said


def nothing(record: Record) -> str:
    """Why there is no number; empty if there is one."""
    clean = record["clean_accuracy"]
    if clean["n"] == 0:
        return "Nothing was evaluated: no image was looked at."
    shown = f"clean accuracy {with_interval(clean)}, n = {clean['n']:,}"
    if not record["attacks"]:
        return f"Nothing was evaluated: no attack has a result; {shown}."
    if clean["k"] == 0:
        return f"Nothing was evaluated: no image was classified correctly to begin with; {shown}."
    return ""


def number(record: Record) -> str:
    """The numbers of the verdict, one for each radius; or, without one, how near attacks got."""
    clean, worst = record["clean_accuracy"], plain(record["worst_cases"])
    bounded = [case for case in worst if case["threat"]["eps"] is not None]
    n = f"n = {clean['n']:,}"
    most = "at most " if record["upper_bound"] else ""
    if not bounded:
        main = f"{'; '.join(reach(record, case) for case in worst)}, {n}"
    elif len(bounded) == 1:
        value = with_interval(bounded[0]["robust_accuracy"]["float"])
        main = f"Robust accuracy {most}{value}, {n}, {at(record, bounded[0])}, {by(bounded[0])}"
    else:
        cases = (
            f"{most}{with_interval(case['robust_accuracy']['float'])} at {at(record, case)},"
            f" {by(case)}"
            for case in bounded
        )
        main = f"Robust accuracy, {n}: {'; '.join(cases)}"
    defended = "".join(shielded(record, [case for case in bounded if not case["defense"]]))
    return f"{main}; clean {percent(clean)}{defended}{weakness(record)}"


def plain(cases: list[Record]) -> list[Record]:
    """The cases without a defense; all, if each has one."""
    return [case for case in cases if case["defense"] is None] or cases


def place(case: Record) -> str:
    """Threat and defense of a case."""
    return threat(case["threat"]) + (f" behind {case['defense']}" if case["defense"] else "")


def at(record: Record, case: Record) -> str:
    """The same, as short as this record allows."""
    return place({**case, "defense": case["defense"] and short(record, case["defense"])})


def short(record: Record, spec: str) -> str:
    """A defense by its name alone, where no other has it."""
    names = {defense["spec"]: str(defense["name"]) for defense in record["defenses"]}
    name = names.get(spec)
    return name if name and list(names.values()).count(name) == 1 else spec


def shielded(record: Record, cases: list[Record]) -> Iterator[str]:
    """What defenses make of these cases, for the verdict."""
    clean = {defense["spec"]: defense["clean_accuracy"] for defense in record["defenses"]}
    most = "at most " if record["upper_bound"] else ""
    for case in cases:
        where = f" at {threat(case['threat'])}" if len(cases) > 1 else ""
        for other in record["worst_cases"]:
            if other["threat"] == case["threat"] and other["defense"] in clean:
                yield (
                    f"; behind {short(record, other['defense'])}{where} {most}"
                    f"{with_interval(other['robust_accuracy']['float'])}"
                    f" {', '.join(known(record, other))}, clean {percent(clean[other['defense']])}"
                )


def known(record: Record, row: Record) -> Iterator[str]:
    """What must be said beside a number behind a defense."""
    if row["defense"] is None:
        return
    yield "adaptive" if row["adaptive"] else "oblivious"
    if "attacks" in row and row["threat"] in (
        defeat["threat"]
        for defense in record["defenses"]
        if defense["spec"] == row["defense"]
        for defeat in defense["defeated"]
    ):
        yield "defeated"


def by(case: Record) -> str:
    """Who found it."""
    return (
        "one attack"
        if len(case["attacks"]) == 1
        else f"worst case of {len(case['attacks'])} attacks"
    )


def reach(record: Record, case: Record) -> str:
    """How near attacks got that look for the nearest success."""
    fooled, found = case["success_rate"]["float"], case["distances"]
    if case["threat"]["norm"] in ("ssim", "none"):
        return (
            f"Fooled on {fooled['k']:,} of {fooled['n']:,} images it had right, mean SSIM"
            f" {similarity(found['ssim'])} and PSNR {decibels(found['psnr'])}, {at(record, case)},"
            f" {by(case)}"
        )
    goal = "a chosen" if case["threat"]["targeted"] else "another"
    behind = f" behind {short(record, case['defense'])}" if case["defense"] else ""
    return (
        f"Median {case['threat']['norm']} distance to {goal} class"
        f" {quantity(case['distance']['median'])}, over {fooled['k']:,} of {fooled['n']:,} images"
        f" it had right{behind}, {by(case)}"
    )


def weakness(record: Record) -> str:
    """The end of the verdict when it should not be believed."""
    grave = sum(finding["grave"] for finding in record["findings"])
    return f"; this evaluation is weak: {plural(grave, 'grave finding')} below" if grave else ""


def meaning(record: Record) -> Iterator[str]:
    """What the verdict means: images, files, belief, cost."""
    if nothing(record):
        return
    cases = plain(record["worst_cases"])
    for case in cases:
        fooled, rounded = case["success_rate"]["float"], case["success_rate"]["eight_bit"]
        where = f" at {at(record, case)}" if len(cases) > 1 else ""
        yield (
            f"Fooled{where} on {fooled['k']:,} of the {fooled['n']:,} images it had right"
            f" ({percent(fooled)}); after rounding to 8 bit on {rounded['k']:,}."
        )
    yield from png(record)
    yield from (line for defense in record["defenses"] for line in worth(record, defense))
    yield belief(record)
    yield spent(record)


def png(record: Record) -> Iterator[str]:
    """Where PNG files are not what rounding to 8 bit is."""
    if any(row["robust_accuracy"]["png"] is None for row in record["attacks"]):
        yield "A PNG file cannot hold these images."
    rows = [(f"worst case at {at(record, case)}", case) for case in record["worst_cases"]]
    rows += [(cell(row), row) for row in record["attacks"]]
    for name, row in rows:
        rates = row["robust_accuracy"]
        if rates["png"] not in (None, rates["eight_bit"]):
            yield (
                f"Read back from PNG files {percent(rates['png'])} robust, rounded to 8 bit"
                f" {percent(rates['eight_bit'])}: {name}."
            )


def cell(row: Record) -> str:
    """An attack and what it was up against."""
    return f"{row['spec']} behind {row['defense']}" if row["defense"] else str(row["spec"])


def worth(record: Record, defense: Record) -> Iterator[str]:
    """What must be known of a defense before its numbers are believed."""
    name = short(record, defense["spec"])
    for defeat in defense["defeated"]:
        yield (
            f"Defeated: against attacks that know it, {name} is no better than no defense, as far"
            f" as {defeat['undefended']['n']:,} images can show:"
            f" {with_interval(defeat['robust_accuracy'])} robust, undefended"
            f" {with_interval(defeat['undefended'])}, {threat(defeat['threat'])}."
        )
    yield from blind(name, defense["detector"])
    rows = [row for row in record["attacks"] if row["defense"] == defense["spec"]]
    if rows and not any(row["adaptive"] for row in rows):
        yield f"Oblivious: no attack here knows {name}; one that does may be stronger."


def blind(name: str, detector: Record | None) -> Iterator[str]:
    """Whether attacks that know a detector pass it by."""
    known = [row for row in detector["attacks"] if row["adaptive"]] if detector else []
    known = [row for row in known if row["tpr"]["n"]]
    worst = min(known, key=lambda row: row["tpr"]["value"], default=None)
    if detector and worst and worst["tpr"]["value"] < CAUGHT:
        yield (
            f"No defense: {name} flags {with_interval(worst['tpr'])} of"
            f" {worst['tpr']['n']:,} results of {worst['attack']}, which knows it, where it was"
            f" set to flag {share(detector['fpr_asked'])} of the images as they are."
        )


def spent(record: Record) -> str:
    """What the answer cost."""
    costs = [case["cost"] for case in record["worst_cases"]]
    forwards = quantity(sum(cost["forwards"] for cost in costs))
    backwards = quantity(sum(cost["backwards"] for cost in costs))
    took = duration(record["provenance"]["seconds"])
    return f"Cost: {took}; {forwards} forward and {backwards} backward passes per attacked image."


def belief(record: Record) -> str:
    """Whether the numbers can be believed."""
    findings = record["findings"]
    grave = sum(finding["grave"] for finding in findings)
    if record["misfed"]:
        return f"Trust checks: {plural(grave, 'grave finding')}; mend how the model is fed first."
    if grave:
        return f"Trust checks: {plural(grave, 'grave finding')}; the model may be less robust."
    if not record["complete"]:
        return "Trust checks: not finished."
    skipped = record["provenance"]["config"].get("probes") is False
    note = " Their extra attacks were skipped." if skipped else ""
    if findings:
        return f"Trust checks: {plural(len(findings), 'remark')}, nothing grave.{note}"
    return f"Trust checks: nothing found.{note}"


def finding(record: Record) -> str:
    """A finding with a mark that needs no colour."""
    cell = record["cell"]
    where = f"{cell}: " if cell and cell not in record["message"] else ""
    return f"{'✗' if record['grave'] else '!'} {where}{record['message']}"


def lines(record: Record) -> Iterator[Line]:
    """The rows of the table of attacks, threat by threat."""
    for case in record["worst_cases"]:
        yield Line(at(record, case), "threat", {})
        for row in record["attacks"]:
            if (row["threat"], row["defense"]) == (case["threat"], case["defense"]):
                note = "" if row["adaptive"] else "oblivious"
                yield Line(row["spec"], "attack", row, note)
        if len(case["attacks"]) > 1:
            yield Line("worst case", "worst", case)


def matrix(record: Record) -> tuple[list[str], list[Row]]:
    """Attacks against defenses: the titles of the columns, and the rows."""
    defenses: dict[str | None, Record] = {d["spec"]: d for d in record["defenses"]}
    columns = list(dict.fromkeys([None, *defenses, *(c["defense"] for c in record["worst_cases"])]))
    clean = [defenses[c]["clean_accuracy"] if c in defenses else None for c in columns]
    clean[0] = record["clean_accuracy"]
    rows = [
        Row(
            "clean accuracy",
            "clean",
            [[Cell(with_interval(rate))] if rate else [] for rate in clean],
        ),
        Row("clean cost", "clean", [price(defenses.get(c)) for c in columns]),
    ]
    threats = []
    for case in record["worst_cases"]:
        if case["threat"] not in threats:
            threats.append(case["threat"])
    for at in threats:
        rows.append(Row(threat(at), "threat", []))
        here = [row for row in record["attacks"] if row["threat"] == at]
        for spec in dict.fromkeys(row["spec"] for row in here):
            same = [row for row in here if row["spec"] == spec]
            rows.append(Row(spec, "attack", [judged(record, same, c) for c in columns]))
        worst = [case for case in record["worst_cases"] if case["threat"] == at]
        if any(len(case["attacks"]) > 1 for case in worst):
            rows.append(Row("worst case", "worst", [judged(record, worst, c) for c in columns]))
    return [column or "undefended" for column in columns], rows


def price(defense: Record | None) -> list[Cell]:
    """What a defense costs on clean images."""
    if defense is None:
        return []
    paid = defense["clean_cost"]
    return [Cell(points(paid["value"]), f"{paid['lost']:,} lost, {paid['gained']:,} gained")]


def judged(record: Record, rows: list[Record], defense: str | None) -> list[Cell]:
    """Robust accuracy behind one defense, and what the attacks knew."""
    return [
        Cell(
            with_interval(row["robust_accuracy"]["float"]),
            ", ".join(known(record, row)) or row.get("knowledge", ""),
        )
        for row in rows
        if row["defense"] == defense
    ]


def detectors(record: Record) -> Iterator[str]:
    """How well each detector tells attacked images from others."""
    for defense in record["defenses"]:
        found = defense["detector"]
        if found is None:
            continue
        name = short(record, defense["spec"])
        yield (
            f"{name}: false alarms on {with_interval(found['fpr'])} of the images as they are (set"
            f" for {share(found['fpr_asked'])}, threshold {quantity(found['threshold'])})"
        )
        for attack in found["attacks"]:
            knows = "adaptive" if attack["adaptive"] else "oblivious"
            area = MISSING if attack["auc"] is None else f"{attack['auc']:.3f}"
            yield (
                f"{name} against {attack['attack']}, {knows}: flags"
                f" {with_interval(attack['tpr'])} of {attack['tpr']['n']:,} results that fool the"
                f" model, AUC {area}"
            )


def strength(record: Record) -> tuple[Column, ...]:
    """The columns that tell how strong attacks were; marginal gain only beside another.

    Where there is a matrix, it has the first two.
    """
    several = any(len(case["attacks"]) > 1 for case in record["worst_cases"])
    columns = STRENGTH if several else STRENGTH[:-1]
    return columns[2:] if record["defenses"] else columns


def cost(record: Record) -> tuple[Column, ...]:
    """The columns that tell what attacks changed and took, as their threats measure it."""
    norms = {case["threat"]["norm"] for case in record["worst_cases"]}
    return (
        SUCCESS,
        *(DISTANCE if norms - COUNTED - ALIKE else ()),
        *(VALUES if norms & COUNTED else ()),
        *(SIMILARITY if norms & ALIKE else ()),
        *PRICE,
    )


def measured(title: str, norms: frozenset[str], cell: Callable[[Record], str]) -> Column:
    """A column that is empty but for threats of these norms."""
    return Column(title, lambda row: cell(row) if row["threat"]["norm"] in norms else "")


STRENGTH = (
    Column("knowledge", lambda row: row.get("knowledge", ""), left=True),
    Column("robust accuracy", lambda row: with_interval(row["robust_accuracy"]["float"])),
    Column("after 8 bit", lambda row: percent(row["robust_accuracy"]["eight_bit"])),
    Column("only this", lambda row: f"{row['unique_breaks']:,}" if "unique_breaks" in row else ""),
)
# norms that count, and threats whose attacks are told by likeness
COUNTED = frozenset(("l0", "l0_pixels"))
ALIKE = frozenset(("ssim", "none"))
SUCCESS = Column("success", lambda row: percent(row["success_rate"]["float"]))
DISTANCE = (
    Column(
        "median distance",
        lambda row: (
            "" if row["threat"]["norm"] in COUNTED | ALIKE else quantity(row["distance"]["median"])
        ),
    ),
)
VALUES = (
    measured("median values", COUNTED, lambda row: quantity(row["distances"]["l0"])),
    measured("median pixels", COUNTED, lambda row: quantity(row["distances"]["l0_pixels"])),
)
SIMILARITY = (
    measured("mean SSIM", ALIKE, lambda row: similarity(row["distances"]["ssim"])),
    measured("mean PSNR", ALIKE, lambda row: decibels(row["distances"]["psnr"])),
)
PRICE = (
    Column("forward / back", lambda row: passes(row["cost"])),
    Column("time", lambda row: duration(row["cost"]["seconds"])),
)


def legend(record: Record) -> str:
    """What the columns mean."""
    alone = any(column.title == "only this" for column in strength(record))
    kinds = {defense["kind"] for defense in record["defenses"]}
    said = (
        "Intervals: Wilson, 95 %.",
        "“Only this”: images that no other attack of the same threat fools." if alone else "",
        KNOWN if kinds else "",
        ALARMS if "detector" in kinds else "",
        "Distances and likeness: of successes, pixels in [0, 1]. Passes: per attacked image.",
    )
    return " ".join(filter(None, said))


KNOWN = (
    "Adaptive: the attack knew the defense; oblivious: it did not. Clean cost: accuracy lost on"
    " images as they are, against undefended."
)
ALARMS = (
    "Behind a detector, an attacked image that raises an alarm is robust, an image as it is that"
    " raises one is wrong. An attack that asks the detector goes no further than below its"
    " threshold: its AUC is no worst case."
)


def passes(cost: Record) -> str:
    """Forward and backward passes per attacked image."""
    return f"{quantity(cost['forwards'])} / {quantity(cost['backwards'])}"


OUTCOMES = {"passed": "✓ passed", "failed": "✗ FAILED", "inconclusive": "? inconclusive"}
SHOWN = 6  # flipped images that are named

# kinds of gates whose value must stay above the limit, and those that count
FLOORS = ("floor", "min_tpr")
COUNTS = ("findings",)


def gates(check: Record) -> str:
    """The outcome of all gates in one line."""
    each = [gate["outcome"] for gate in check["gates"]]
    counted = [
        f"{each.count(outcome)} {outcome}"
        for outcome in ("failed", "inconclusive", "passed")
        if outcome in each
    ]
    facts = [
        joined(*counted),
        f"baseline {check['baseline']}" if check["baseline"] else "",
        f"gates from {check['config']}" if check["config"] else "",
        f"alpha {check['alpha']:g}",
    ]
    return f"{OUTCOMES[check['outcome']]} ({joined(*facts)})"


def gate_title(gate: Record) -> str:
    """Name of a gate, and what it looks at."""
    return gate["name"] if gate["on"] in gate["name"] else f"{gate['name']}: {gate['on']}"


def gate_number(gate: Record, value: float | None) -> str:
    """A value or limit of a gate in its unit."""
    if gate["kind"] in COUNTS:
        return quantity(value)
    return share(value) if gate["kind"] in FLOORS else points(value)


def gate_value(gate: Record) -> str:
    """What was found, with its interval."""
    ends = (gate["low"], gate["high"])
    if gate["value"] is None or None in ends:
        return gate_number(gate, gate["value"])
    low, high = (f"{100 * end:.1f}" for end in ends)
    return f"{gate_number(gate, gate['value'])} ({low}–{high})"


def gate_limit(gate: Record) -> str:
    """What was asked."""
    bound = "at least" if gate["kind"] in FLOORS else "at most"
    return MISSING if gate["limit"] is None else f"{bound} {gate_number(gate, gate['limit'])}"


def gate_margin(gate: Record) -> str:
    """How much room is left to the limit; less than nothing where it is crossed.

    A value that must stay above its limit is judged by the lower end of its interval.
    """
    above = gate["kind"] in FLOORS
    value = gate["low"] if above and gate["low"] is not None else gate["value"]
    if value is None or gate["limit"] is None:
        return MISSING
    room = value - gate["limit"] if above else gate["limit"] - value
    return f"{room:+.0f}" if gate["kind"] in COUNTS else f"{100 * room:+.1f} points"


def gate_line(gate: Record) -> str:
    """The numbers of a gate, as far as it has some."""
    said = (
        gate_value(gate),
        f"asked {gate_limit(gate)}" if gate["limit"] is not None else MISSING,
        f"margin {gate_margin(gate)}" if gate_margin(gate) != MISSING else MISSING,
    )
    return "; ".join(part for part in said if part != MISSING)


def gate(gate: Record) -> str:
    """A gate in one line of plain text."""
    outcome = OUTCOMES[gate["outcome"]].partition(" ")[2]
    numbers = filter(None, [outcome, gate_line(gate)])
    return " ".join((f"{gate_title(gate)}: {'; '.join(numbers)}.", *gate_facts(gate)))


def gate_facts(gate: Record) -> Iterator[str]:
    """Why it came out so, and which images were lost, in sentences."""
    if gate["reason"]:
        yield gate["reason"]
    named = [f"{image['id']} (image {image['index']})" for image in gate["flipped"][:SHOWN]]
    if named:
        more = (gate["lost"] or 0) - len(named)
        yield f"Lost: {', '.join(named)}{f', {more:,} more' if more > 0 else ''}."


PROBES = {
    "probe:noise": "Noise of the same size, {threat}",
    "probe:unlimited": "An unlimited {norm} attack",
    "probe:double": "Twice the budget, {spec}",
}


def probes(record: Record) -> Iterator[str]:
    """What the extra attacks of the trust checks did; what follows from it is in the findings."""
    for probe in record["probes"]:
        form = PROBES.get(probe["probe"], "{spec}")
        facts = {"threat": at(record, probe), "norm": probe["threat"]["norm"]}
        fooled = probe["success_rate"]["float"]
        what = form.format(spec=cell(probe), **facts)
        if probe["defense"] and "{norm}" in form:
            what += f" behind {short(record, probe['defense'])}"
        yield f"{what}: fooled {fooled['k']:,} of {fooled['n']:,} images"


def absences(record: Record) -> Iterator[str]:
    """Attacks without a result."""
    yield from (f"{spec}: {reason}" for spec, reason in record["failures"].items())
    yield from (f"{spec}: not finished" for spec in record["not_run"])


def provenance(record: Record) -> Iterator[tuple[str, str]]:
    """Where the numbers come from, without the command."""
    source = record["provenance"]
    model, data, environment = source["model"], source["data"], source["environment"]
    yield "model", joined(base(model.get("file")), sha(model), model.get("arch"))
    yield "normalisation", normalisation(model)
    for defense in record["defenses"]:
        facts = defense["facts"]
        yield "defense", joined(defense["spec"], sha(facts), facts.get("arch"))
    drawn = f"{data.get('samples', 0):,} of {data.get('total', 0):,} images"
    seed = "" if source["seed"] is None else f"seed {source['seed']}"
    yield "data", joined(base(data.get("name")), drawn, seed, shape(data), span(data), sha(data))
    versions = (
        f"{name} {environment[name]}"
        for name in ("robusteval", "python", "torch", "torchvision", "art", "numpy")
        if name in environment
    )
    yield "made with", joined(*versions)
    device = environment.get("device")
    took = f"{duration(source['seconds'])} on {device}" if device else duration(source["seconds"])
    yield "made", joined(source["created"], took, environment.get("platform"))
    if source["folder"]:
        yield "folder", source["folder"]


def joined(*parts: Any) -> str:
    """What there is of these, in a row."""
    return ", ".join(str(part) for part in parts if part) or MISSING


def base(path: Any) -> str:
    """A file without the folders above it, which are nobody's business."""
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2] if path else ""


def sha(facts: Record) -> str:
    """Enough of a hash to tell files apart."""
    return f"sha256 {str(facts['sha256'])[:12]}" if facts.get("sha256") else ""


def shape(data: Record) -> str:
    """The size of an image, as ``3×32×32``."""
    return "×".join(str(size) for size in data.get("shape") or ())


def span(data: Record) -> str:
    """Darkest and brightest pixel, as ``pixels 0 to 1``."""
    ends = data.get("range")
    return f"pixels {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""


def normalisation(model: Record) -> str:
    """What is done to pixels inside the model."""
    sides = (
        f"{name} {' '.join(f'{value:.4g}' for value in model[name])}"
        for name in ("mean", "std")
        if model.get(name)
    )
    return joined(model.get("normalisation"), *sides) if model.get("mean") else "none"
