"""A plan that other processes can make, and a pool that is this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from toys import trained

from robusteval.datasets.dataset import Positions
from robusteval.datasets.sources import open_data
from robusteval.evaluation.bench import Bench
from robusteval.evaluation.pieces import Computed, Seen, Task
from robusteval.evaluation.plan import Plan, prepare_plan
from robusteval.models.classifier import Classifier


def build_bands_plan(
    npz: Path, attacks: Sequence[str], samples: int, mark: Path | None = None
) -> Plan:
    """Attacks on the trained `Bands`; the process that first comes here kills itself.

    Where a `mark` is named: it is written just before, and where it is nothing dies.
    """
    if mark is not None and not mark.exists():
        mark.write_text("dead")
        os.kill(os.getpid(), signal.SIGKILL)
    classifier = Classifier(
        trained(), mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    return prepare_plan(classifier, open_data(str(npz)), attacks, samples=samples, probes=False)


class Here:
    """A pool whose bench is in this process, and which does the last batches first."""

    size = 3

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tasks: list[Task] = []

    def compute(
        self, task: Task, seen: Sequence[Seen], batches: Sequence[Positions]
    ) -> Iterator[Computed]:
        """Results, last batch first."""
        self.tasks.append(task)
        for rows in reversed(batches):
            yield self.bench.compute(task, seen, rows)
