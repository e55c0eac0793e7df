"""From rows of maps to features and trees that tell one label from the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.evaluation.work_cache import Arrays
from robusteval.models.classifier import Classifier

from .boosting import Trees, boosted
from .map_features import Examples, Extractor, extractor_for, structure, wrapped
from .variants import Array

EPOCHS = 20


class Rows(NamedTuple):
    """All variants of all images as the detector sees them, a row for each."""

    stacks: Array  # (rows, k, side, side) float32
    statistics: Array  # (rows, d) float32
    probability: Array  # (rows,) of the predicted class
    variant: Array  # (rows,) place among the names
    image: Array  # (rows,) place among the sources
    group: Array
    right: Array  # (rows,) bool: predicted as labelled
    fooled: Array  # (rows,) bool: an attack that reached its goal
    names: tuple[str, ...]

    def of(self, *names: str) -> Array:
        """Rows of variants by name, in order."""
        wanted = [self.names.index(name) for name in names]
        return np.flatnonzero(np.isin(self.variant, wanted))


class Task(NamedTuple):
    """Which rows are told from which, on what grounds, and who may see them."""

    label: Array  # (rows,)
    weight: Array  # (rows,)
    train: Array  # rows
    validation: Array
    planes: tuple[int, ...]
    columns: tuple[int, ...]  # of the statistics


class Fitted(NamedTuple):
    """One extractor and its trees."""

    task: Task
    extractor: Classifier
    center: Tensor
    spread: Tensor
    booster: str  # as XGBoost writes it
    trees: Trees  # the same
    rounds: int

    def arrays(self) -> Arrays:
        """All that `restored` needs."""
        state = [value.cpu().numpy() for _, value in sorted(self.extractor.state_dict().items())]
        booster = np.frombuffer(self.booster.encode(), np.uint8)
        learnt = self.center.cpu().numpy(), self.spread.cpu().numpy(), np.array(self.rounds)
        return (*learnt, booster, *state)

    @classmethod
    def restored(cls, task: Task, kind: Extractor, device: torch.device, arrays: Arrays) -> Fitted:
        """What was fitted to this task with this kind of extractor, from its `arrays`."""
        center, spread, rounds, text, *state = (torch.from_numpy(each.copy()) for each in arrays)
        planes = len(task.planes)
        extractor = wrapped(structure(kind, planes), kind, [0.0] * planes, [1.0] * planes)
        names = sorted(extractor.state_dict())
        extractor.load_state_dict(dict(zip(names, state, strict=True)))
        booster = text.numpy().tobytes().decode()
        return cls(
            task,
            extractor.to(device),
            center.to(device),
            spread.to(device),
            booster,
            Trees.read(booster, len(center)),
            int(rounds),
        )

    def features(self, rows: Rows, some: Array) -> Tensor:
        """Standardised features ``(m, d)`` of some rows, to the bit those of the detector."""
        return (vectors(self.extractor, self.task, rows, some) - self.center) / self.spread

    def scores(self, rows: Rows, some: Array) -> Array:
        """Scores ``(m,)`` of some rows."""
        return self.trees.scores(self.features(rows, some).cpu().numpy())


def vectors(extractor: Classifier, task: Task, rows: Rows, some: Array) -> Tensor:
    """Features and statistics ``(m, d)`` of some rows."""
    planes, columns = list(task.planes), list(task.columns)
    found = []
    with torch.no_grad():
        for part in np.array_split(some, max(1, -(-len(some) // 256))):
            stacks = torch.from_numpy(np.ascontiguousarray(rows.stacks[part][:, planes]))
            statistics = torch.from_numpy(rows.statistics[part][:, columns])
            features = extractor(stacks.to(extractor.device))
            found.append(torch.cat([features, statistics.to(features)], 1))
    return torch.cat(found)


def fitted(
    rows: Rows,
    task: Task,
    kind: Extractor,
    seed: int,
    device: torch.device,
    start: nn.Module | None = None,
    epochs: int = EPOCHS,
    advance: Callable[[int], object] = lambda _: None,
) -> Fitted:
    """Extractor and trees for a task."""
    planes = list(task.planes)
    stacks = rows.stacks
    if planes != list(range(stacks.shape[1])):
        stacks = stacks[:, planes]
    examples = Examples(stacks, task.label, task.weight, task.train, task.validation)
    extractor = extractor_for(
        kind, examples, seed=seed, device=device, start=start, epochs=epochs, advance=advance
    )
    known = np.concatenate([task.train, task.validation])
    found = vectors(extractor, task, rows, known)
    learnt = found[: len(task.train)].double()
    center, spread = learnt.mean(0), learnt.std(0)
    center, spread = center.float(), torch.where(spread > 1e-6, spread, 1.0).float()
    x = ((found - center) / spread).cpu().numpy()
    here = np.arange(len(known))
    booster, rounds = boosted(
        x,
        task.label[known],
        task.weight[known],
        here[: len(task.train)],
        here[len(task.train) :],
        seed,
    )
    trees = Trees.read(booster, len(center))
    return Fitted(task, extractor, center, spread, booster, trees, rounds)


def weighed(rows: Rows, negatives: Array, positives: Array) -> Array:
    """Weights ``(rows,)`` whose mean is one on the rows that count.

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
