"""What a report says of passes that attacks make faster than verdicts are made."""

from __future__ import annotations

from collections.abc import Iterator

from .formatting import format_count
from .record import RunRecord

COLUMN = "by_shortcuts"  # where verdicts differ, see `robusteval.runs.types.Outcome`


def describe_shortcuts(record: RunRecord) -> Iterator[str]:
    """What attacks differentiated in place of the network as it is; nothing where it was that."""
    ways = record.provenance.config.get("shortcuts")
    if not ways:
        return
    kinds = [f"in {ways['amp']} (autocast)"] if "amp" in ways else []
    kinds += ["compiled"] if "compile" in ways else []
    differing = count_differing(record)
    yield f"{' and '.join(kinds)}, by attacks; verdicts are made without{differing}"


def count_differing(record: RunRecord) -> str:
    """How many verdicts differ by shortcuts, where that is known."""
    columns = [outcome.columns for outcome in record.run.attacks]
    known = [c[COLUMN][c["attacked"]] for c in columns if COLUMN in c]
    if not known:
        return ""
    differing = sum(int((values > 0).sum()) for values in known)
    total = sum(map(len, known))
    return f", and differ in {differing:,} of {format_count(total, 'result')}"
