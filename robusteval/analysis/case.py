"""The images that are explained, and the attack on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.dataset import Batch, Data, Positions, draw
from robusteval.errors import NothingEvaluated
from robusteval.evaluation.batches import ResumableMap, split_rows
from robusteval.evaluation.perturbing import choose_goals, perturb
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.shares import Share
from robusteval.evaluation.work_cache import (
    Arrays,
    WorkCache,
    describe_circumstances,
    hash_inputs,
)
from robusteval.models.admission import check_labels
from robusteval.models.classifier import Classifier, choose_block_size, predict_classes
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import sample_seeds
from robusteval.progress import Progress
from robusteval.runs.types import Columns

Values = np.ndarray[Any, Any]


class Case(NamedTuple):
    """The images that are explained."""

    x: Tensor  # (n, c, h, w)
    x_adv: Tensor  # (n, c, h, w)
    y: Tensor  # (n,) labels
    goal: Tensor  # (n,) targets, or labels of an untargeted attack
    made: Tensor  # (n,) predictions after the attack
    seeds: Tensor  # (n,)
    positions: Values  # (n,) in the data set
    ids: Values  # (n,) of their content


@dataclass(frozen=True)
class Work:
    """Work on the images, batch by batch, that the next call takes up where one was stopped.

    What other processes have done of it is in the caches of `shards`; each has worked on the images
    of its share as if there were no others.
    """

    batches: ResumableMap
    circumstances: list[Any]  # what results depend on, besides what is given to `map`
    shards: Mapping[Share, WorkCache] = field(default_factory=dict)

    @classmethod
    def resume(
        cls,
        model: Classifier,
        seed: int,
        cache: WorkCache | None,
        progress: Progress,
        stopping: Callable[[], bool] = lambda: False,
        shards: Mapping[Share, WorkCache] | None = None,
    ) -> Work:
        """Work on one model, whose results are kept in the cache, if there is one."""
        if cache is None or cache.folder is None:
            return cls(ResumableMap(WorkCache().parts, progress, stopping), [])
        batches = ResumableMap(cache.parts, progress, stopping)
        return cls(batches, describe_circumstances(model, seed), shards or {})

    def map(
        self,
        title: str,
        facts: Any,
        arrays: Arrays,
        ids: Values,
        batches: Sequence[Positions],
        work: Callable[[Positions], Columns],
        *,
        whole: bool = False,
    ) -> Columns:
        """Compute columns of all rows.

        Parameters
        ----------
        title : str
            What it is called while it is under way.
        facts : JSON-able
            All that the result depends on, besides the circumstances and
        arrays : tuple of ndarray
            these, of all n images.
        ids : ndarray
            Of the images' content ``(n,)``.
        batches : sequence of ndarray
            Rows ``(m,)`` that are worked on together.
        work : callable
            ``rows (m,) -> columns of m entries each``.
        whole : bool
            A batch is part of the result: it is done whole or anew, and by no shard.
        """
        key = hash_inputs([self.circumstances, facts], arrays)
        for share, cache in self.shards.items() if not whole else ():
            mine = share.own(np.arange(len(ids)), ids)
            theirs = hash_inputs([self.circumstances, facts], tuple(each[mine] for each in arrays))
            parts = [
                {**part, "row": mine[part["row"]]}
                for part in cache.parts.read_parts(theirs)
                if np.isin(part["row"], np.arange(len(mine))).all()
            ]
            for part in parts:
                self.batches.parts.save_part(key, part)
            if len(mine) and not parts:
                self.batches.progress.say(
                    f"{title}: what shard {share} has of it was made with other images, another"
                    " network or on another machine, so it is done here."
                )
        return self.batches.map(title, key, batches, work, whole=whole)


def build_case(
    model: Classifier,
    data: Data,
    attack: Attack,
    samples: int,
    seed: int,
    work: Work,
    progress: Progress,
) -> Case:
    """Attack the first images of the draw that are classified correctly.

    Raises
    ------
    UsageError
        If labels and network do not belong together.
    NothingEvaluated
        If no image is classified correctly.
    RunError
        If the network or the attack broke.
    """
    images = draw_correct(model, data, samples, seed, progress)
    return attack_images(model, images, attack, seed, work)


def attack_images(model: Classifier, images: Batch, attack: Attack, seed: int, work: Work) -> Case:
    """Attack images that are classified correctly; RunError if the network or the attack broke."""
    x, y = images.x.to(model.device), images.y.to(model.device)
    seeds = sample_seeds(seed, images.ids)
    goal = choose_goals(attack, y, seeds, model.num_classes, images.index)

    def attack_rows(rows: Positions) -> Columns:
        some = torch.from_numpy(rows)
        there = some.to(model.device)
        found = perturb(attack, model, x[there], y[there], seeds=seeds[some], goal=goal[there])
        return {"x_adv": found.x_adv.cpu().numpy()}

    n = len(x)
    # attacks of other packages that draw from global state need all images at once
    size = n if attack.foreign else 4 * choose_block_size(x.shape[1:].numel(), model.device)
    columns = work.map(
        str(attack.spec),
        ["attack", str(attack.spec), attack.resolved],
        (images.x.numpy(), goal.cpu().numpy(), images.ids),
        images.ids,
        split_rows(np.arange(n), size),
        attack_rows,
        whole=attack.foreign,
    )
    x_adv = torch.from_numpy(columns["x_adv"]).to(x)
    with torch.no_grad():
        made = predict_classes(model(x_adv))
    return Case(x, x_adv, y, goal, made, seeds, images.index, images.ids)


def draw_correct(
    model: Classifier, data: Data, samples: int, seed: int, progress: Progress
) -> Batch:
    """Draw images that are classified correctly, at most `samples` and at least one."""
    order = draw(len(data), None, seed)
    right: list[Batch] = []
    count = 0
    progress.begin("Drawing images", samples)
    for start in range(0, len(order), samples):
        index = order[start : start + samples]
        check_labels(data, index, model)
        batch = data.batch(index)
        with torch.no_grad(), raise_as_run_error("the network cannot take the images"):
            keep = (predict_classes(model(batch.x.to(model.device))).cpu() == batch.y).numpy()
        keep &= np.cumsum(keep) <= samples - count
        rows = np.flatnonzero(keep)
        right.append(Batch(batch.x[rows], batch.y[rows], batch.ids[rows], batch.index[rows]))
        count += len(rows)
        progress.advance(len(rows))
        if count == samples:
            break
    progress.end()
    if not count:
        raise NothingEvaluated("no image is classified correctly, so there is nothing to explain")
    return Batch(
        torch.cat([batch.x for batch in right]),
        torch.cat([batch.y for batch in right]),
        np.concatenate([batch.ids for batch in right]),
        np.concatenate([batch.index for batch in right]),
    )
