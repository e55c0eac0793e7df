"""What `robusteval reproduce` tells its workers, and what it says of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, cast

from robusteval.analysis.papers.declaration import Paper

from .networks import NetworkSpec, load_networks
from .session import Request, Session
from .working import open_pool

if TYPE_CHECKING:
    from robusteval.analysis.papers.planning import PaperRun
    from robusteval.analysis.papers.shards import ShardSummary
    from robusteval.evaluation.pieces import Pool
    from robusteval.evaluation.plan import Plan
    from robusteval.evaluation.shares import Share
    from robusteval.progress import Bars


@dataclass(frozen=True)
class PaperRequest:
    """What was asked for of a paper, as it can be sent to a worker."""

    request: Request  # model and images
    paper: Paper
    size: str
    samples: int | None
    seed: int
    networks: Sequence[NetworkSpec]  # that images are judged on
    proposed: Sequence[NetworkSpec]  # one that was trained as the paper proposes, or none
    share: Share | None

    def build_plan(self, run: PaperRun, fingerprint: str) -> Plan:
        """Make the plan of a run once more, in a worker; the images have this fingerprint."""
        from robusteval.analysis.papers.planning import Subject
        from robusteval.progress import Silent

        silent = cast("Bars", Silent())
        classifier, images = self.request.open_both(silent)
        device = self.request.device
        subject = Subject(
            self.paper,
            classifier,
            images,
            self.size,
            self.samples,
            self.seed,
            load_networks(self.networks if run.kind == "run" else (), silent, device=device),
            load_networks(self.proposed if run.kind == "hardened" else (), silent, device=device),
            self.share,
        )
        return subject.prepare(run, fingerprint=fingerprint)

    def hire(
        self, session: Session, workers: int | None, address: str | None
    ) -> Callable[[PaperRun, Plan], AbstractContextManager[Pool | None]]:
        """How the workers of a run are opened, if any were asked for, see `open_pool`."""
        return lambda run, plan: open_pool(
            session, plan, partial(self.build_plan, run), workers, address
        )


def describe_shard(found: ShardSummary) -> Iterator[str]:
    """What a shard has done, what is left, and how the tables come about."""
    explained = f", and explained {found.explained}" if found.explained else ""
    yield f"Shard {found.share} of {found.name} is done, in {found.folder}:"
    lines = [
        f"{found.images} of {found.total} images under {found.attacks} attacks{explained}.",
        *(f"Tried again by whoever joins: {name}: {why}" for name, why in found.failures.items()),
        *(f"Not divided: {name}." for name in found.left),
    ]
    if found.waiting:
        some = ", ".join(found.waiting[:8])
        more = f" and {len(found.waiting) - 8} more" if found.waiting[8:] else ""
        lines += [
            f"Not done yet: {some}{more}.",
            "Once all are, the same command without --shard makes the tables.",
        ]
    else:
        lines += ["All are done: the same command without --shard makes the tables."]
    for line in lines:
        yield from wrap(line, 80, initial_indent="  ", subsequent_indent="    ")
