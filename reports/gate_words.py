"""Gates in words: what was found, what was asked, how much room is left, and why.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from .formatting import MISSING, format_points, format_quantity, format_share, join_parts
from .record import GateRow, GatesRecord

OUTCOMES = {"passed": "✓ passed", "failed": "✗ FAILED", "inconclusive": "? inconclusive"}
SHOWN = 6  # flipped images that are named

# kinds of gates whose value must stay above the limit, and those that count
FLOORS = ("floor", "min_tpr")
COUNTS = ("findings",)


def summarise_gates(gates: GatesRecord) -> str:
    """The outcome of all gates in one line."""
    each = [gate.outcome for gate in gates.gates]
    counted = [
        f"{each.count(outcome)} {outcome}"
        for outcome in ("failed", "inconclusive", "passed")
        if outcome in each
    ]
    facts = [
        join_parts(*counted),
        f"baseline {gates.baseline}" if gates.baseline else "",
        f"gates from {gates.config}" if gates.config else "",
        f"alpha {gates.alpha:g}",
    ]
    return f"{OUTCOMES[gates.outcome]} ({join_parts(*facts)})"


def name_gate(gate: GateRow) -> str:
    """Name of a gate, and what it looks at."""
    return gate.name if gate.on in gate.name else f"{gate.name}: {gate.on}"


def format_gate_number(gate: GateRow, value: float | None) -> str:
    """A value or limit of a gate in its unit."""
    if gate.kind in COUNTS:
        return format_quantity(value)
    return format_share(value) if gate.kind in FLOORS else format_points(value)


def format_gate_value(gate: GateRow) -> str:
    """What was found, with its interval."""
    if gate.value is None or gate.low is None or gate.high is None:
        return format_gate_number(gate, gate.value)
    low, high = (f"{100 * end:.1f}" for end in (gate.low, gate.high))
    return f"{format_gate_number(gate, gate.value)} ({low}–{high})"


def format_gate_limit(gate: GateRow) -> str:
    """What was asked."""
    bound = "at least" if gate.kind in FLOORS else "at most"
    return MISSING if gate.limit is None else f"{bound} {format_gate_number(gate, gate.limit)}"


def format_gate_margin(gate: GateRow) -> str:
    """How much room is left to the limit; less than nothing where it is crossed.

    A value that must stay above its limit is judged by the lower end of its interval.
    """
    above = gate.kind in FLOORS
    value = gate.low if above and gate.low is not None else gate.value
    if value is None or gate.limit is None:
        return MISSING
    room = value - gate.limit if above else gate.limit - value
    return f"{room:+.0f}" if gate.kind in COUNTS else f"{100 * room:+.1f} points"


def write_gate_numbers(gate: GateRow) -> str:
    """The numbers of a gate, as far as it has some."""
    said = (
        format_gate_value(gate),
        f"asked {format_gate_limit(gate)}" if gate.limit is not None else MISSING,
        f"margin {format_gate_margin(gate)}" if format_gate_margin(gate) != MISSING else MISSING,
    )
    return "; ".join(part for part in said if part != MISSING)


def write_gate(gate: GateRow) -> str:
    """A gate in one line of plain text."""
    outcome = OUTCOMES[gate.outcome].partition(" ")[2]
    numbers = filter(None, [outcome, write_gate_numbers(gate)])
    return " ".join((f"{name_gate(gate)}: {'; '.join(numbers)}.", *explain_gate(gate)))


def explain_gate(gate: GateRow) -> Iterator[str]:
    """Why it came out so, and which images were lost, in sentences."""
    if gate.reason:
        yield gate.reason
    named = [f"{image.id} (image {image.index})" for image in gate.flipped[:SHOWN]]
    if named:
        more = (gate.lost or 0) - len(named)
        yield f"Lost: {', '.join(named)}{f', {more:,} more' if more > 0 else ''}."
