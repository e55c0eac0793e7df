"""What is said of attacks and interpreters that a network cannot have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from robusteval.runs.types import Finding


def describe_left_out(left_out: Mapping[str, str]) -> Iterator[Finding]:
    """What a reader must know of specs that were left out, by spec the reason: each reason once."""
    for reason in dict.fromkeys(left_out.values()):
        specs = [spec for spec, why in left_out.items() if why == reason]
        were = "was" if len(specs) == 1 else "were"
        cell = specs[0] if len(specs) == 1 else None
        yield Finding("left-out", False, f"{', '.join(specs)} {were} left out: {reason}.", cell)
