"""How far adversarial images transfer: made on one network, judged on others.

Only images count that all of these networks have right: where one is wrong from the start, nothing
was done to it. A network that withstands images made for another one has shown no robustness of
its own, so nothing here is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from robusteval.runs import metrics
from robusteval.runs.types import Flags, Outcome, Run

from . import formatting
from .measures import Count, RateRecord, ThreatRecord, build_rate, build_threat
from .rejudged import RejudgedRecord, build_rejudged, identify, write_rejudged

SOURCE = "the source"


@dataclass(frozen=True)
class ReceiverRow:
    """A network that images made on another one were judged on."""

    name: str
    arch: str | None
    clean_accuracy: RateRecord


@dataclass(frozen=True)
class TransferredRow:
    """What images of one attack do to each network."""

    attack: str
    threat: ThreatRecord
    source: Annotated[RateRecord, "fooled, of the images that all networks have right"]
    receivers: Annotated[tuple[RateRecord | None, ...], "the same; null: no result"]
    carried: Annotated[
        tuple[RateRecord | None, ...], "fooled, of those among them that fool the source"
    ]


@dataclass(frozen=True)
class ReceivedRecord:
    """Attacks on one network, judged on others."""

    source: str
    shared: Annotated[Count, "images that all networks have right"]
    receivers: tuple[ReceiverRow, ...]
    attacks: tuple[TransferredRow, ...]
    rejudged: Annotated[
        tuple[RejudgedRecord, ...], "by the same weights in another arithmetic; empty: none was"
    ]


class TransferTable(NamedTuple):
    """Attacks on the source against networks, as text: the first column names the attack."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    lines: list[str]
    note: str


def build_received(run: Run) -> ReceivedRecord | None:
    """What a run of different images says of transfer; None where no target was named."""
    if not run.receivers:
        return None
    rights = [metrics.find_right(clean) for clean in (run.clean, *(r.clean for r in run.receivers))]
    shared: Flags = np.logical_and.reduce(rights)
    source, dtype = formatting.name_file(run.model.get("file")) or SOURCE, run.model.get("dtype")
    return ReceivedRecord(
        source=f"{source} in {dtype}" if dtype else source,
        shared=int(shared.sum()),
        receivers=tuple(
            ReceiverRow(
                str(each.spec), each.facts.get("arch"), build_rate(metrics.accuracy(each.clean))
            )
            for each in run.receivers
        ),
        attacks=tuple(build_transferred(run, shared)),
        rejudged=tuple(build_rejudged(run)),
    )


def build_transferred(run: Run, shared: Flags) -> Iterator[TransferredRow]:
    """A row for each attack on the source; `shared` are the images ``(n,)`` that count."""
    found = {(identify(o), str(o.defense)): o for o in run.transfers}
    for outcome in run.attacks:
        if outcome.defense is not None:
            continue
        fooled = outcome.success() & shared
        judged = [found.get((identify(outcome), str(each.spec))) for each in run.receivers]
        yield TransferredRow(
            attack=str(outcome.attack),
            threat=build_threat(outcome.threat),
            source=build_rate(metrics.rate(fooled[shared])),
            receivers=tuple(count_fooled(each, shared) for each in judged),
            carried=tuple(count_fooled(each, fooled) for each in judged),
        )


def count_fooled(outcome: Outcome | None, among: Flags) -> RateRecord | None:
    """On how many of some images ``(n,)`` a network is fooled; None where that is not known."""
    return None if outcome is None else build_rate(metrics.rate(outcome.success()[among]))


def build_transfer_table(record: ReceivedRecord) -> TransferTable:
    """Attacks against networks: the share of images fooled, with its interval."""
    several = len(record.receivers) > 1
    return TransferTable(
        title=f"Transfer of images made on {record.source}",
        columns=("source", *(each.name for each in record.receivers)),
        rows=[
            (row.attack, *map(format_share, (row.source, *row.receivers))) for row in record.attacks
        ],
        lines=[
            *write_carried(record),
            *(line for each in record.rejudged for line in write_rejudged(each)),
        ],
        note=(
            f"Images fooled, of the {formatting.format_count(record.shared, 'image')} that"
            f" {'all of these networks have' if several else 'both networks have'} right, with the"
            " Wilson 95 % interval. Each network has its own architecture and normalisation."
            f" {write_accuracies(record.receivers)}"
        ),
    )


def write_carried(record: ReceivedRecord) -> Iterator[str]:
    """How many of the images that fool the source fool other networks too, in sentences."""
    for row in record.attacks:
        told = [
            f"{each.name} is fooled by {rate.k}, {formatting.format_rate(rate)}"
            for each, rate in zip(record.receivers, row.carried, strict=True)
            if rate is not None and rate.n
        ]
        if told:
            count = formatting.format_count(row.source.k, "image")
            yield f"{row.attack}: of {count} that fool the source, {'; '.join(told)}."


def format_share(rate: RateRecord | None) -> str:
    """A rate with its interval; a dash where there is none."""
    return formatting.MISSING if rate is None else formatting.format_rate(rate)


def write_accuracies(receivers: Sequence[ReceiverRow]) -> str:
    """How well the other networks do on the images as they are."""
    said = (f"{each.name} {formatting.format_rate(each.clean_accuracy)}" for each in receivers)
    return f"Right on the images as they are: {'; '.join(said)}."
