"""The record of a report in words: sentences and cells that every format shows alike.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from robusteval.records import show_number

Record = dict[str, Any]
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
    return f"{record['norm']} {budget(record)}{goal}"


def budget(record: Record) -> str:
    """A radius on both scales."""
    eps, levels = record["eps"], record["eps_255"]
    if eps is None:
        return "minimum norm"
    if levels is None:
        return f"eps {show_number(eps)}"
    if show_number(eps) == levels:
        return f"eps {levels} ({eps:.3g})"
    return f"eps {show_number(eps)} ({eps * 255:.4g}/255)"


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
    clean, worst = record["clean_accuracy"], record["worst_cases"]
    bounded = [case for case in worst if case["threat"]["eps"] is not None]
    n = f"n = {clean['n']:,}"
    most = "at most " if record["upper_bound"] else ""
    if not bounded:
        main = f"{'; '.join(reach(case) for case in worst)}, {n}"
    elif len(bounded) == 1:
        value = with_interval(bounded[0]["robust_accuracy"]["float"])
        main = f"Robust accuracy {most}{value}, {n}, {threat(bounded[0]['threat'])}, "
        main += by(bounded[0])
    else:
        cases = (
            f"{most}{with_interval(case['robust_accuracy']['float'])} at {threat(case['threat'])},"
            f" {by(case)}"
            for case in bounded
        )
        main = f"Robust accuracy, {n}: {'; '.join(cases)}"
    return f"{main}; clean {percent(clean)}{weakness(record)}"


def by(case: Record) -> str:
    """Who found it."""
    return (
        "one attack"
        if len(case["attacks"]) == 1
        else f"worst case of {len(case['attacks'])} attacks"
    )


def reach(case: Record) -> str:
    """How near attacks got that look for the nearest success."""
    fooled = case["success_rate"]["float"]
    goal = "a chosen" if case["threat"]["targeted"] else "another"
    return (
        f"Median {case['threat']['norm']} distance to {goal} class"
        f" {quantity(case['distance']['median'])}, over {fooled['k']:,} of {fooled['n']:,} images"
        f" it had right, {by(case)}"
    )


def weakness(record: Record) -> str:
    """The end of the verdict when it should not be believed."""
    grave = sum(finding["grave"] for finding in record["findings"])
    return f"; this evaluation is weak: {plural(grave, 'grave finding')} below" if grave else ""


def meaning(record: Record) -> Iterator[str]:
    """What the verdict means: images, files, belief, cost."""
    if nothing(record):
        return
    several = len(record["worst_cases"]) > 1
    for case in record["worst_cases"]:
        fooled, rounded = case["success_rate"]["float"], case["success_rate"]["eight_bit"]
        where = f" at {threat(case['threat'])}" if several else ""
        yield (
            f"Fooled{where} on {fooled['k']:,} of the {fooled['n']:,} images it had right"
            f" ({percent(fooled)}); after rounding to 8 bit on {rounded['k']:,}."
        )
    yield from png(record)
    yield belief(record)
    yield spent(record)


def png(record: Record) -> Iterator[str]:
    """Where PNG files are not what rounding to 8 bit is."""
    if any(row["robust_accuracy"]["png"] is None for row in record["attacks"]):
        yield "A PNG file cannot hold these images."
    rows = [(f"worst case at {threat(case['threat'])}", case) for case in record["worst_cases"]]
    rows += [(row["spec"], row) for row in record["attacks"]]
    for name, row in rows:
        rates = row["robust_accuracy"]
        if rates["png"] not in (None, rates["eight_bit"]):
            yield (
                f"Read back from PNG files {percent(rates['png'])} robust, rounded to 8 bit"
                f" {percent(rates['eight_bit'])}: {name}."
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
        yield Line(threat(case["threat"]), "threat", {})
        for row in record["attacks"]:
            if row["threat"] == case["threat"]:
                yield Line(row["spec"], "attack", row)
        if len(case["attacks"]) > 1:
            yield Line("worst case", "worst", case)


def strength(record: Record) -> tuple[Column, ...]:
    """The columns that tell how strong attacks were; marginal gain only beside another."""
    several = any(len(case["attacks"]) > 1 for case in record["worst_cases"])
    return STRENGTH if several else STRENGTH[:-1]


STRENGTH = (
    Column("knowledge", lambda row: row.get("knowledge", ""), left=True),
    Column("robust accuracy", lambda row: with_interval(row["robust_accuracy"]["float"])),
    Column("after 8 bit", lambda row: percent(row["robust_accuracy"]["eight_bit"])),
    Column("only this", lambda row: f"{row['unique_breaks']:,}" if "unique_breaks" in row else ""),
)
COST = (
    Column("success", lambda row: percent(row["success_rate"]["float"])),
    Column("median distance", lambda row: quantity(row["distance"]["median"])),
    Column("forward / back", lambda row: passes(row["cost"])),
    Column("time", lambda row: duration(row["cost"]["seconds"])),
)


def legend(record: Record) -> str:
    """What the columns mean."""
    gain = "“Only this”: images that no other attack of the same threat fools. "
    return (
        "Intervals: Wilson, 95 %. "
        + (gain if len(strength(record)) == len(STRENGTH) else "")
        + "Distances: of successes, pixels in [0, 1]. Passes: per attacked image."
    )


def passes(cost: Record) -> str:
    """Forward and backward passes per attacked image."""
    return f"{quantity(cost['forwards'])} / {quantity(cost['backwards'])}"


PROBES = {
    "probe:noise": "Noise of the same size, {threat}",
    "probe:unlimited": "An unlimited {norm} attack",
    "probe:double": "Twice the budget, {spec}",
}


def probes(record: Record) -> Iterator[str]:
    """What the extra attacks of the trust checks did; what follows from it is in the findings."""
    for probe in record["probes"]:
        form = PROBES.get(probe["probe"], "{spec}")
        facts = {"threat": threat(probe["threat"]), "norm": probe["threat"]["norm"]}
        fooled = probe["success_rate"]["float"]
        what = form.format(spec=probe["spec"], **facts)
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
