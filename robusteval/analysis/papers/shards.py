"""A paper measured by several processes, each on its share of the images, and what they did joined.

Runs are divided, and of explanations what takes longest. Whatever looks at all images at once is
left to the process that joins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robusteval.analysis.explain import explain_share
from robusteval.analysis.papers.declaration import Paper
from robusteval.analysis.papers.planning import PaperRun, Subject
from robusteval.errors import Interrupted, RobustevalError, UsageError
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.merging import Shard, check_parts, join_columns
from robusteval.evaluation.pieces import Pool
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.shares import Share
from robusteval.evaluation.work_cache import WorkCache
from robusteval.progress import Progress
from robusteval.runs.folder import Store, read_record, refuse_links
from robusteval.runs.storage import differences
from robusteval.runs.types import Run
from robusteval.runs.writing import write_atomically

SHARDS = "shards"  # the folder of all of them in that of the paper
DONE = "done.json"  # in the folder of one that is finished
NAME = re.compile(r"([0-9]{1,6})-of-([0-9]{1,6})")

# the processes that do the work of a run, if there are any
Hire = Callable[[PaperRun, Plan], AbstractContextManager[Pool | None]]


def hire_nobody(run: PaperRun, plan: Plan) -> AbstractContextManager[Pool | None]:
    """No processes: this one does the work."""
    return nullcontext()


@dataclass(frozen=True)
class ShardSummary:
    """What a process has done of a paper."""

    name: str  # of the paper
    share: Share
    folder: Path
    images: int  # of the share
    total: int  # images of that run
    attacks: int  # of all runs
    explained: int  # attacks
    failures: Mapping[str, str]  # why an attack has no result
    left: tuple[str, ...]  # what no shard does
    waiting: tuple[str, ...]  # shards that are not finished


def locate_shard(folder: Path, share: Share) -> Path:
    """The folder of a shard in that of the paper."""
    return folder / SHARDS / f"{share.part}-of-{share.of}"


def measure_share(
    subject: Subject,
    folder: Path,
    share: Share,
    *,
    fresh: bool,
    progress: Progress,
    stopping: Callable[[], bool],
    command: str,
    hire: Hire = hire_nobody,
) -> ShardSummary:
    """Measure the share of a subject, and keep it in a folder of its own below that of the paper.

    Parameters
    ----------
    subject : Subject
        The paper and the network.
    folder : Path
        Of the paper, which all shards may have in common.
    share : Share
        The part of the images.
    fresh : bool
        Throw away what this shard has done; others stay.
    progress, stopping, command, hire
        See `robusteval.analysis.papers.running.reproduce`.

    Raises
    ------
    UsageError
        There are fewer images than shards, or nothing of the paper can be run on this network.
    RunError
        If something broke; what was finished is kept.
    """
    check_share(subject, folder, share)
    subject = replace(subject, share=share)
    plans = {run: subject.prepare(run, progress=progress) for run in subject.list_runs()}
    mine = locate_shard(folder, share)
    try:
        (mine / DONE).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {mine} ({error.strerror or error}): choose another --out"
        ) from None
    runs: list[Run] = []
    for run, plan in plans.items():
        with hire(run, plan) as pool:
            done = execute(
                plan,
                mine / run.folder,
                fresh=fresh,
                progress=progress,
                stopping=stopping,
                command=command,
                pool=pool,
            )
        runs.append(done)
    explained = explain_shares(
        subject, mine, share, fresh=fresh, progress=progress, stopping=stopping
    )
    failures = {name: reason for run in runs for name, reason in run.failures.items()}
    write_atomically(mine / DONE, json.dumps({"failures": failures}).encode())
    return ShardSummary(
        subject.paper.name,
        share,
        mine,
        len(share.own(np.arange(len(runs[0].clean["id"])), runs[0].clean["id"])),
        len(runs[0].clean["id"]),
        sum(len(run.attacks) for run in runs),
        explained,
        failures,
        list_undivided(subject),
        tuple(str(each) for each in list_waiting(folder, share.of)),
    )


def explain_shares(
    subject: Subject,
    folder: Path,
    share: Share,
    *,
    fresh: bool,
    progress: Progress,
    stopping: Callable[[], bool],
) -> int:
    """Do a share of each explanation; how many there were. One that breaks is left to who joins."""
    count = 0
    for name in subject.paper.explained:
        if stopping():
            raise Interrupted
        cache = open_cache(folder / "explained" / name, fresh=fresh, progress=progress)
        try:
            count += 0 < explain_share(
                subject.classifier,
                subject.data,
                subject.attacks[name][0],
                share,
                samples=subject.scale.count_explained(subject.samples),
                seed=subject.seed,
                cache=cache,
                progress=progress,
                stopping=stopping,
            )
        except Interrupted:
            raise
        except RobustevalError as error:
            progress.say(f"explain {name}: {error}")
    return count


def open_cache(folder: Path, *, fresh: bool, progress: Progress) -> WorkCache:
    """What an earlier call has finished in a folder, unless it is to begin anew."""
    cache = WorkCache(folder, progress.say)
    if fresh:
        cache.clear()
    return cache


def list_undivided(subject: Subject) -> tuple[str, ...]:
    """What a paper has that no shard does."""
    paper: Paper = subject.paper
    found = ["attacks on maps alone"] if paper.on_maps else []
    found += ["what explanations are summed up in"] if paper.explained else []
    found += ["masks of units"] if paper.masked else []
    if subject.scale.detectors is not None:
        found += ["detectors, which are fitted to all images, and attacks on them"]
    return tuple(found)


def list_shards(folder: Path) -> Iterator[tuple[Share, Path]]:
    """The shards that were begun in the folder of a paper, in order."""
    found = []
    for path in (folder / SHARDS).glob("*/"):
        match = NAME.fullmatch(path.name)
        if match and 1 <= int(match[1]) <= int(match[2]):
            found.append((Share(int(match[1]), int(match[2])), path))
    yield from sorted(found)


def check_share(subject: Subject, folder: Path, share: Share) -> None:
    """Refuse more shards than there are images, and one of another division; UsageError."""
    share.check_images(subject.draw_images()[1])
    check_division(folder, share)


def check_division(folder: Path, share: Share) -> None:
    """Refuse a share beside those of another division; UsageError."""
    for other, path in list_shards(folder):
        if other.of != share.of:
            raise UsageError(
                f"{path} is shard {other}, of another division than {share}: go on with that, or"
                f" remove {folder / SHARDS}"
            )


def list_waiting(folder: Path, of: int) -> list[Share]:
    """The shards that are not finished, in order."""
    shares = (Share(part, of) for part in range(1, of + 1))
    return [each for each in shares if not (locate_shard(folder, each) / DONE).exists()]


def find_shards(folder: Path) -> dict[Share, Path]:
    """The shards of a paper, all of which are finished; none if it was not divided.

    UsageError that names those that are missing or not finished, or of another division.
    """
    found = dict(list_shards(folder))
    if not found:
        return {}
    first = next(iter(found))
    check_division(folder, first)
    waiting = list_waiting(folder, first.of)
    if waiting:
        names = [f"{each} is {'not finished' if each in found else 'missing'}" for each in waiting]
        more = f", and {len(names) - 4} more" if names[4:] else ""
        raise UsageError(
            f"{folder / SHARDS} holds no whole measurement: shard {', '.join(names[:4])}{more};"
            f" give the same command with --shard {waiting[0]}, or remove that folder to measure"
            " all here"
        )
    return found


def join_run(
    shards: Mapping[Share, Path],
    run: PaperRun,
    plan: Plan,
    out: Path,
    *,
    fresh: bool,
    progress: Progress,
) -> None:
    """Put what the shards of a paper have of one of its runs into a folder, to be continued there.

    A run that is complete there is left as it is, unless it is to begin anew.

    Raises
    ------
    UsageError
        A shard lacks the run, or is of another command.
    RunError
        A file of a shard is damaged, or two of them have the same rows.
    """
    if not fresh and is_complete(out, plan):
        return
    parts = [read_part(share, folder, run, plan) for share, folder in shards.items()]
    check_parts(parts)
    with Store.open(out, plan.config, fresh=fresh, say=progress.say) as store:
        join_columns(parts, store, progress)


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether a folder holds the whole run of a plan."""
    if not (out / "run.json").exists():
        return False
    record = read_record(out / "run.json")
    return bool(record["status"] == "complete" and record["config"] == plan.config)


def read_part(share: Share, folder: Path, run: PaperRun, plan: Plan) -> Shard:
    """What a shard has of a run; UsageError if it is none of this plan."""
    place = folder / run.folder
    again = f"give the same command with --shard {share} --fresh"
    refuse_links(place)
    if not (place / "run.json").exists():
        raise UsageError(
            f"shard {share} has no {run.folder}, which this command needs: give the same command"
            f" with --shard {share}"
        )
    record = read_record(place / "run.json")
    if record["config"].get("shard") != str(share):
        raise UsageError(f"{place} is not of shard {share}: {again}")
    part = Shard(place, share, record, {})
    here = dict(plan.config)
    if part.config.get("attacks") != here["attacks"]:
        here["resolved"] = part.config.get("resolved")  # would say it once more, at length
    lines = list(differences(part.config, here))
    if lines:
        raise UsageError(
            f"shard {share} was made by another command than this; {again}, or remove"
            f" {folder.parent}:",
            (f"  {line}" for line in lines[:8]),
        )
    return part
