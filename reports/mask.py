"""The report of a network with masked units, laid out from one record."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from robusteval.runs.statistics import Rate
from robusteval.runs.types import spell_line

REASONS = {
    "sensitivity": "those that the attack moves most, by {} other images",
    "importance": "those that matter least to the logit of the true class, by {} other images",
    "random": "drawn at random",
}
EARLY = (
    "This attack stops at the first success, of which little carries over to another network: with"
    " stop=never the figures in the middle are lower."
)


@dataclass(frozen=True)
class MaskFigures:
    """Images that a network is right on: as they are, and after two attacks."""

    clean: Rate
    static: Rate  # attack made for the unmasked network
    adaptive: Rate  # attack made for this network


@dataclass(frozen=True)
class MaskRecord:
    """What was masked, and what that is worth."""

    file: str  # the checkpoint with the mask
    layer: str
    units: int  # of the layer
    masked: int  # of them; of each class where classes have masks of their own
    per_class: bool
    rank: str  # "sensitivity", "importance" or "random"
    ranked: int  # images that units were ranked by
    data: str
    attack: str
    stops_early: bool  # whether the attack is content with the first success
    unmasked: MaskFigures
    mask: MaskFigures
    random_mask: MaskFigures
    verdict: str
    findings: tuple[str, ...]  # what must be known of the attacks


def render_mask(record: MaskRecord) -> str:
    """What was masked, the figures, and what they amount to, in 80 columns."""
    return "\n".join(map(spell_line, list_lines(record))) + "\n"


def list_lines(record: MaskRecord) -> Iterator[str]:
    """The lines of the report."""
    each = " for each class" if record.per_class else ""
    reason = REASONS[record.rank].format(record.ranked)
    yield from wrap_paragraph(
        f"{record.file} has {record.masked} of {record.units} units of layer {record.layer}"
        f" masked{each}, {reason}."
    )
    yield ""
    yield from wrap_paragraph(
        f"Right of {record.unmasked.clean.n} images of {record.data}, in % with 95 % intervals, as"
        f" they are and under {record.attack}:"
    )
    yield ""
    rows = [
        ("", "clean", "attack made for", "attack made for"),
        ("", "", "the unmasked", "this network"),
    ]
    for name, figures in (
        ("unmasked", record.unmasked),
        ("masked", record.mask),
        ("random mask", record.random_mask),
    ):
        clean, static, adaptive = map(write_rate, (figures.clean, figures.static, figures.adaptive))
        rows.append((name, clean, static, adaptive))
    for name, clean, static, adaptive in rows:
        yield f"  {name:<13}{clean:<20}{static:<20}{adaptive}".rstrip()
    yield ""
    yield from wrap_paragraph(record.verdict)
    if record.stops_early:
        yield from wrap_paragraph(EARLY)
    for finding in record.findings:
        yield from wrap_paragraph(f"Note: {finding}")


def wrap_paragraph(text: str) -> list[str]:
    """Lines of at most 80 columns."""
    return textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False)


def write_rate(rate: Rate) -> str:
    """A share in per cent, with its interval."""
    low, high = rate.interval
    return f"{100 * rate.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
