"""The record of a run while it grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from robusteval.evaluation.plan import Plan
from robusteval.evaluation.target import Target
from robusteval.models.environment import describe_environment
from robusteval.runs.folder import Store
from robusteval.runs.slices import decode_slices
from robusteval.runs.types import Columns, Defended, Finding, Outcome, Run

LONG = 0.1  # seconds that writing the record takes, from which on it is not always written
RESTING = 20  # times that, before it is written again


class Recording:
    """Everything a run says so far, written to its folder.

    Parameters
    ----------
    plan : Plan
        What is run.
    store : Store
        Where to.
    targets : sequence of Target
        The classifier as it is, then behind each defense, then other networks.
    command : str
        As the user gave it; empty from Python.
    """

    def __init__(self, plan: Plan, store: Store, targets: Sequence[Target], command: str) -> None:
        self.plan = plan
        self.store = store
        self.targets = targets
        self.command = command
        self.created = store.created or datetime.now(UTC).isoformat(timespec="seconds")
        self.outcomes: list[Outcome] = []
        self.failures: dict[str, str] = {}  # cell -> why it has no result
        self.findings: list[Finding] = list(plan.findings)
        self.quality: Columns = {}  # of the maps
        self.put_off_until = 0.0  # by the clock of `time.monotonic`
        self.environment: dict[str, Any] = {}  # where it was computed; here if empty

    def build_run(self, status: str, seconds: float) -> Run:
        """Build the run as it is now; `seconds` were spent on it."""
        plan = self.plan
        return Run(
            config={**plan.config, "command": self.command},
            model=plan.config["model"],
            data=self._describe_data(),
            environment=self.environment or describe_environment(plan.classifier.device),
            clean=self._join_clean(),
            outcomes=tuple(self.outcomes),
            findings=tuple(self.findings),
            status=status,
            failures=dict(self.failures),
            seconds=seconds,
            created=self.created,
            folder=str(self.store.folder),
            defenses=self._list_measured(receives=False),
            receivers=self._list_measured(receives=True),
        )

    def _join_clean(self) -> Columns:
        """What is known of the images as they are; nothing before they were predicted."""
        clean = self.targets[0].clean
        return {**clean, **decode_slices(self.plan.config), **self.quality} if clean else {}

    def _list_measured(self, *, receives: bool) -> tuple[Defended, ...]:
        """Defenses, or receivers, that have seen the clean images."""
        found = [each.defended for each in self.targets if each.receives == receives]
        return tuple(each for each in found if each is not None and each.clean)

    def write(self, status: str | None, seconds: float, keys: list[str]) -> Run:
        """Write ``run.json`` with the cells of these keys; the run as it is now.

        Without a status it may be put off, where the record is long: of thousands of cells writing
        it after each would take longer than most attacks. What is finished of cells that it does
        not name yet is kept as parts, so that a kill loses none of it.
        """
        run = self.build_run(status or "incomplete", seconds)
        started = time.monotonic()
        if status is not None or started >= self.put_off_until:
            self.store.save_record(run.to_record(), keys)
            ended = time.monotonic()
            took = ended - started
            self.put_off_until = ended + RESTING * took if took > LONG else 0.0
        return run

    def _describe_data(self) -> dict[str, Any]:
        """What a report says of the images; the range of pixels once they were looked at."""
        data, clean = self.plan.data, self.targets[0].clean
        seen = [float(clean["darkest"].min()), float(clean["brightest"].max())] if clean else None
        return {
            "name": data.name,
            "total": len(data),
            "samples": len(self.plan.index),
            "sha256": self.plan.config["data"]["sha256"],
            "shape": list(data.shape),
            "transform": data.transform,
            "range": seen,
            "class_names": list(data.class_names) if data.class_names else None,
            **({"turned": turned} if (turned := data.count_turned(self.plan.index)) else {}),
            **(
                {"labels": matching} if (matching := getattr(data.source, "matching", None)) else {}
            ),
        }
