"""From rows of maps to features and trees that tell one label from the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.evaluation.work_cache import Arrays, WorkCache
from robusteval.models.classifier import Classifier, absorb

from .boosting import (
    DEFAULT,
    GRID,
    Trees,
    TreeSettings,
    cross_validate_trees,
    describe_xgboost,
    fit_trees,
)
from .map_features import Examples, Extractor, build_extractor, train_extractor, wrap_extractor
from .map_rows import Rows
from .transforms import Array

EPOCHS = 20


class Task(NamedTuple):
    """Which rows are told from which, on what grounds, and who may see them."""

    label: Array  # (rows,)
    weight: Array  # (rows,)
    train: Array  # rows
    validation: Array
    planes: tuple[int, ...]
    columns: tuple[int, ...]  # of the statistics


class TreeFit(NamedTuple):
    """One extractor and its trees."""

    task: Task
    extractor: Classifier
    center: Tensor
    spread: Tensor
    booster: str  # as XGBoost writes it
    trees: Trees  # the same
    rounds: int

    def encode(self) -> Arrays:
        """Encode all that `decode` needs as arrays."""
        state = [value.cpu().numpy() for _, value in sorted(self.extractor.state_dict().items())]
        booster = np.frombuffer(self.booster.encode(), np.uint8)
        learnt = self.center.cpu().numpy(), self.spread.cpu().numpy(), np.array(self.rounds)
        return (*learnt, booster, *state)

    @classmethod
    def decode(cls, task: Task, kind: Extractor, device: torch.device, arrays: Arrays) -> TreeFit:
        """Decode what was fitted to this task with this kind of extractor, from its arrays."""
        center, spread, rounds, text, *state = (torch.from_numpy(each.copy()) for each in arrays)
        planes = len(task.planes)
        extractor = wrap_extractor(
            build_extractor(kind, planes), kind, [0.0] * planes, [1.0] * planes
        )
        names = sorted(extractor.state_dict())
        extractor.load_state_dict(dict(zip(names, state, strict=True)))
        booster = text.numpy().tobytes().decode()
        return cls(
            task,
            extractor.to(device),
            center.to(device),
            spread.to(device),
            booster,
            Trees.parse_booster(booster, len(center)),
            int(rounds),
        )

    def standardise_features(self, rows: Rows, some: Array) -> Tensor:
        """Standardise features ``(m, d)`` of some rows, to the bit those of the detector."""
        return (compute_features(self.extractor, self.task, rows, some) - self.center) / self.spread

    def predict_scores(self, rows: Rows, some: Array) -> Array:
        """Score some rows ``(m,)``."""
        return self.trees.predict_scores(self.standardise_features(rows, some).cpu().numpy())


def compute_features(extractor: Classifier, task: Task, rows: Rows, some: Array) -> Tensor:
    """Compute features and statistics ``(m, d)`` of some rows."""
    planes, columns = list(task.planes), list(task.columns)
    found = []
    with torch.no_grad():
        for part in np.array_split(some, max(1, -(-len(some) // 256))):
            stacks = torch.from_numpy(np.ascontiguousarray(rows.stacks[part][:, planes]))
            statistics = torch.from_numpy(rows.statistics[part][:, columns])
            features = extractor(stacks.to(extractor.device))
            found.append(torch.cat([features, statistics.to(features)], 1))
    return torch.cat(found)


def fit_task(
    rows: Rows,
    task: Task,
    kind: Extractor,
    seed: int,
    device: torch.device,
    start: nn.Module | None = None,
    epochs: int = EPOCHS,
    advance: Callable[[int], object] = lambda _: None,
    settings: TreeSettings = DEFAULT,
) -> TreeFit:
    """Fit extractor and trees to a task."""
    planes = list(task.planes)
    stacks = rows.stacks
    if planes != list(range(stacks.shape[1])):
        stacks = stacks[:, planes]
    examples = Examples(stacks, task.label, task.weight, task.train, task.validation)
    extractor = train_extractor(
        kind, examples, seed=seed, device=device, start=start, epochs=epochs, advance=advance
    )
    known = np.concatenate([task.train, task.validation])
    found = compute_features(extractor, task, rows, known)
    learnt = found[: len(task.train)].double()
    center, spread = learnt.mean(0), learnt.std(0)
    center, spread = center.float(), torch.where(spread > 1e-6, spread, 1.0).float()
    x = ((found - center) / spread).cpu().numpy()
    here = np.arange(len(known))
    booster, rounds = fit_trees(
        x,
        task.label[known],
        task.weight[known],
        here[: len(task.train)],
        here[len(task.train) :],
        seed,
        settings,
    )
    trees = Trees.parse_booster(booster, len(center))
    return TreeFit(task, extractor, center, spread, booster, trees, rounds)


def weigh_rows(rows: Rows, negatives: Array, positives: Array) -> Array:
    """Weigh rows: ``(rows,)`` whose mean is one on the rows that count.

    Both labels weigh the same; so do all attacks; clean images weigh as much as all that is
    otherwise no attack.
    """
    weights = np.zeros(len(rows.variant))
    clean = rows.names.index("clean")
    variants = rows.variant[negatives]
    kinds = [variants == clean, variants != clean]
    for some in (negatives[kind] for kind in kinds if kind.any()):
        weights[some] = 1 / len(some) / sum(kind.any() for kind in kinds)
    attacks = np.unique(rows.variant[positives])
    for each in attacks:
        mine = positives[rows.variant[positives] == each]
        weights[mine] = 1 / len(mine) / len(attacks)
    return weights * (len(negatives) + len(positives)) / 2


@dataclass
class Fitter:
    """Fits extractors and trees to tasks on one set of rows, each once.

    Attributes
    ----------
    rows : Rows
        What is fitted to.
    kind : {"raw", "small_cnn", "vgg16"}
        The extractor.
    seed : int
        Decides everything that is drawn.
    device : torch.device
        Where extractors are trained.
    start : Module or None
        VGG-16 with weights, for `vgg16`.
    advance : callable
        Told how many epochs are done; `EPOCHS` for each fit.
    facts : list
        JSON-able: all that the rows depend on.
    done : WorkCache
        Keeps fits.
    settings : TreeSettings
        How trees grow.
    """

    rows: Rows
    kind: Extractor
    seed: int
    device: torch.device
    start: nn.Module | None = None
    advance: Callable[[int], object] = lambda _: None
    facts: list[Any] = field(default_factory=list)
    done: WorkCache = field(default_factory=WorkCache)
    settings: TreeSettings = DEFAULT

    def fit_once(self, task: Task) -> TreeFit:
        """Fit to a task, or take what was fitted to it before a stop."""
        told: list[int] = []

        def advance(epochs: int) -> None:
            told.append(epochs)
            self.advance(epochs)

        def work() -> Arrays:
            return fit_task(
                self.rows,
                task,
                self.kind,
                self.seed,
                self.device,
                start=self.start,
                advance=advance,
                settings=self.settings,
            ).encode()

        given = (task.label, task.weight, task.train, task.validation, self.content)
        facts = [*self.facts, describe_xgboost(), self.kind, task.planes, task.columns]
        facts.append(list(self.settings))
        arrays = self.done.compute(facts, given, work)
        self.advance(EPOCHS - sum(told))
        return TreeFit.decode(task, self.kind, self.device, arrays)

    def choose_settings(self, task: Task) -> list[float]:
        """Choose how trees grow, for this and all further fits, by grouped cross-validation.

        Within the images to fit on and to stop by, on features of an extractor that has seen the
        former. Returns the AUCs of `GRID` in its order.
        """
        fit = self.fit_once(task)
        known = np.concatenate([task.train, task.validation])

        def work() -> Arrays:
            x = fit.standardise_features(self.rows, known).cpu().numpy()
            given = (x, task.label[known], task.weight[known], self.rows.group[known], self.seed)
            found = []
            for settings in GRID:
                found.append(cross_validate_trees(*given, settings))
                self.advance(EPOCHS)
            return (np.array(found),)

        facts = [*self.facts, describe_xgboost(), self.kind, "grid", [list(each) for each in GRID]]
        arrays = (task.label, task.weight, task.train, task.validation, self.content)
        (areas,) = self.done.compute(facts, arrays, work)
        best = int(np.argmax(np.nan_to_num(areas, nan=-1.0)))
        self.settings = GRID[best]
        return [float(area) for area in areas]

    @cached_property
    def content(self) -> Array:
        """SHA-256 of everything that is fitted to."""
        content = hashlib.sha256()
        for array in (self.rows.stacks, self.rows.statistics):
            content.update(np.ascontiguousarray(array).data)
        if self.start is not None:
            absorb(content, self.start.state_dict())
        return np.frombuffer(content.digest(), np.uint8)
