"""What a worst case means and what to do about it, for who decides and does not know the field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .formatting import choose_decimals, format_percent, format_quantity, format_threat
from .groups import is_below
from .measures import ThreatRecord
from .record import RunRecord, WorstCaseRow

QUOTABLE = ("standard", "thorough", "autoattack")  # searches whose numbers are to be published
SEARCHED = ("linf", "l2", "l1", "l0", "l0_pixels")  # norms that they know
HARDLY = 0.1  # of the images that are right, left by attacks
CHANCE = ("non-deterministic", "random-answers", "company")  # findings: a success may be luck


def describe_attacker(record: RunRecord, case: WorstCaseRow) -> str:
    """Who fools it, as the subject of a sentence: what is known and what may be changed."""
    knows = {row.knowledge for row in record.attacks if row.spec in case.attacks}
    sight = "who knows the network" if "white-box" in knows else "who sees its answers alone"
    if knows <= {"none"}:
        sight = "who sees nothing of it"
    reach = describe_reach(case.threat, find_shift(record, case))
    return f"An attacker {sight} and may change {reach}"


def find_shift(record: RunRecord, case: WorstCaseRow) -> float | None:
    """The largest shift, in shares of the side, of attacks that turn and shift; None of others."""
    if case.threat.norm != "spatial":
        return None
    known = (
        row.parameters.get("shift")
        for row in record.attacks
        if (row.threat, row.defense) == (case.threat, case.defense)
    )
    return max((each for each in known if isinstance(each, int | float)), default=None)


def describe_reach(threat: ThreatRecord, shift: float | None = None) -> str:
    """What an attacker may change, without the names of norms where there is a way."""
    eps = threat.eps
    if eps is None:
        return "as much as it takes"
    size = format_quantity(eps)
    if threat.norm == "linf" and threat.eps_255:
        return f"every pixel by up to {threat.eps_255.removesuffix('/255')} of 255 grey levels"
    if threat.norm == "l0":
        return f"up to {size} of an image's values at will"
    if threat.norm == "l0_pixels":
        return f"up to {size} pixels at will"
    if threat.norm == "patch":
        return f"a square of {format_quantity(100 * eps)} % of an image at will"
    if threat.norm == "spatial":
        far = "" if shift is None else f" of up to {format_quantity(100 * shift)} % of the side"
        return f"the view, by turns of up to {size} degrees and by shifts{far},"
    if threat.norm in ("l1", "l2"):
        return f"an image by up to {size} in {threat.norm} (1 is a value from none to full)"
    return f"an image by up to {size} in {threat.norm}"


def write_attack_meaning(record: RunRecord, case: WorstCaseRow, behind: str) -> str:
    """What the strongest attacker found does, as one sentence; `behind` says which defense."""
    fooled, rounded = case.success_rate.float, case.success_rate.eight_bit.k
    goal = "leads it to a chosen class" if case.threat.targeted else "fools it"
    return (
        f"{describe_attacker(record, case)} {goal}{behind} on {fooled.k:,} of the {fooled.n:,}"
        f" images it had right ({format_percent(fooled)}); after rounding to 8 bit on {rounded:,}."
    )


def write_weakest_groups(record: RunRecord) -> Iterator[str]:
    """The class, and the slice of each column, that falls more easily than the other images.

    Of each the first threat within a radius, without a defense, where that is not by chance.
    """
    told = set()
    for group in record.groups:
        within = group.threat.eps is not None and group.defense is None
        if not within or (group.kind, group.by) in told or group.worst is None:
            continue
        row, rest = group.rows[group.worst], group.rest
        if rest is None or not is_below(row):
            continue
        told.add((group.kind, group.by))
        noun = "class" if group.kind == "class" else group.by
        yield (
            f"Not all alike: of the {noun} {row.name} {format_percent(row.robust_accuracy)} hold,"
            f" of the other images {format_percent(rest)}, at {format_threat(group.threat)}; more"
            " below."
        )


def write_claim(record: RunRecord, cases: Sequence[WorstCaseRow]) -> Iterator[str]:
    """What a decision may rest on: successes are proofs, and what is left of images is none."""
    bounded = [case for case in cases if case.threat.eps is not None]
    if not bounded or record.misfed or any(each.code in CHANCE for each in record.findings):
        return
    several = len(bounded) > 1
    least = [round_down(c.success_rate.float.low, c.success_rate.float.n) for c in bounded]
    shares = [
        f"{percent} %" + (f" at {format_threat(case.threat)}" if several else "")
        for percent, case in zip(least, bounded, strict=True)
        if float(percent)
    ]
    if any(case.success_rate.float.k for case in bounded):
        if not shares:
            return  # one or two of very many, which is no share that could be written
        yield (
            f"Safe to claim: of images like these that it has right, at least {', '.join(shares)}"
            " fall to such an attacker. Not shown: that a stronger one spares the rest."
        )
    else:
        yield (
            "Safe to claim: these attacks found nothing. Not shown: that a stronger one finds"
            " nothing either."
        )


def round_down(share: float, n: int) -> str:
    """A share of `n` images in percent, never more than it is."""
    digits = choose_decimals(n)
    return f"{math.floor(100 * share * 10**digits) / 10**digits:.{digits}f}"


def write_advice(record: RunRecord) -> Iterator[str]:
    """What to do next, if anything: the first thing that stands in the way of a decision."""
    bounded = [case for case in record.worst_cases if case.threat.eps is not None]
    cases = [case for case in bounded if case.threat.norm in SEARCHED]
    names = {spec.partition(":")[0] for case in cases for spec in case.attacks}
    left = [case.robust_accuracy.float for case in cases if not case.defense]
    if record.misfed:
        yield "Next: feed the model as it was trained, as the findings say; until then no number."
    elif not record.complete:
        yield "Next: give the same command again, which continues."
    elif record.upper_bound:
        yield "Next: what the grave findings say; until then the number is an upper bound only."
    elif any(rate.k <= HARDLY * record.clean_accuracy.k for rate in left):
        yield "Next: robusteval train makes a network that withstands more."
    elif cases and not names.intersection(QUOTABLE):
        yield "Next: before it is published or relied on, --preset standard, which searches more."
    elif cases and record.gates is None:
        floor = min((rate.low for rate in left), default=0.0)
        yield (
            "Next: say how much is enough for its use; a gate such as"
            f" floor = {math.floor(100 * floor) / 100:.2f} holds later networks to it."
        )
