"""Published figures beside a run, where they are of the same data, threat and radius.

The figures are RobustBench's (arXiv:2010.09670), AutoAttack on all 10,000 test images of CIFAR-10,
as its repository states them in model_info/ (read on 2026-11-29). A run is put beside them only if
its data are that test set, nothing speaks against its numbers, and its worst case has one of the
ensembles that are to be quoted: beside a weaker attack the comparison would flatter.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from robusteval.registry.signatures import read_number

from .formatting import format_rate, format_threat
from .meaning import QUOTABLE
from .record import RunRecord, WorstCaseRow

IMAGES = {"cifar10": 10_000}  # of the test sets, all of which were attacked


class Published(NamedTuple):
    """A network of the leaderboard, under its name there; shares of 1."""

    data: str
    norm: str
    eps: float
    model: str
    clean: float
    robust: float


@cache
def read_published() -> tuple[Published, ...]:
    """Read the table, most robust first within each setting."""
    text = files("robusteval.reports").joinpath("published.csv").read_text("utf-8")
    return tuple(
        Published(
            row["data"],
            row["norm"],
            read_number(row["eps"]),
            row["model"],
            float(row["clean"]) / 100,
            float(row["robust"]) / 100,
        )
        for row in csv.DictReader(text.splitlines())
    )


def find_neighbours(record: RunRecord, case: WorstCaseRow) -> list[Published]:
    """The published figures next above and below a worst case; none where anything differs."""
    threat, rate = case.threat, case.robust_accuracy.float
    doubtful = record.misfed or record.upper_bound or not record.complete
    if doubtful or case.defense or threat.targeted or threat.eps is None or not rate.n:
        return []
    if not any(spec.partition(":")[0] in QUOTABLE for spec in case.attacks):
        return []
    same = [
        each
        for each in read_published()
        if is_test_set(record, each.data)
        and each.norm == threat.norm
        and abs(each.eps - threat.eps) < 1e-9
    ]
    share = rate.k / rate.n
    above = [each for each in same if each.robust >= share][-1:]
    below = [each for each in same if each.robust < share][:1]
    return above + below


def is_test_set(record: RunRecord, name: str) -> bool:
    """Whether the images of a run were drawn from the whole test set of that name."""
    data = record.provenance.data
    return data.get("name") == f"{name} (test)" and data.get("total") == IMAGES.get(name)


def write_neighbours(record: RunRecord) -> Iterator[str]:
    """A sentence for each worst case that has neighbours."""
    for case in record.worst_cases:
        found = find_neighbours(record, case)
        if found:
            near = ", ".join(
                f"{each.model} {100 * each.robust:.2f} % (clean {100 * each.clean:.2f} %)"
                for each in found
            )
            rate = case.robust_accuracy.float
            yield (
                f"Nearest published at {format_threat(case.threat)}: {near}, by AutoAttack on all"
                f" {IMAGES[found[0].data]:,} images (RobustBench); here {format_rate(rate)} of"
                f" {rate.n:,}."
            )
