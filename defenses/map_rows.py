"""All variants of all source images as a detector sees them: maps of interpreters, row by row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from robusteval.evaluation.batches import split_evenly
from robusteval.evaluation.work_cache import hash_inputs
from robusteval.models.classifier import predict_classes
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import sample_seeds
from robusteval.runs.types import Columns

from .image_variants import Variant
from .splits import Sources
from .study import SEEN, Study
from .transforms import Array, from_bytes

IN_MEMORY = 2**29  # bytes of stacks; more of them go to a file


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

    def list_variants(self, *names: str) -> Array:
        """List the rows of variants by name, in order."""
        wanted = [self.names.index(name) for name in names]
        return np.flatnonzero(np.isin(self.variant, wanted))


@dataclass
class RowMaker:
    """Looks at variants through the interpreters of a study."""

    study: Study
    sources: Sources
    variants: Sequence[Variant]

    @contextmanager
    def make_rows(self) -> Iterator[Rows]:
        """Make all rows, in a file that goes away afterwards if they are large."""
        view = self.study.view
        total = sum(len(variant.rows) for variant in self.variants)
        with allocate_stacks((total, view.planes, view.side, view.side)) as stacks:
            yield self.fill_rows(stacks)

    def fill_rows(self, stacks: Array) -> Rows:
        """Compute the rows batch by batch; `stacks` takes those of the maps."""
        rows = self.begin_rows(stacks)
        view = self.study.view
        images = [variant.images for variant in self.variants]
        key = hash_inputs(
            [*self.study.circumstances, asdict(view), [v.name for v in self.variants]],
            (*images, self.sources.ids[rows.image]),
        )
        pieces = self.study.batches.stream(
            f"Maps of {' and '.join(view.interpreters)}",
            [key],
            self.split_batches(),
            lambda some: [self.look_at_rows(rows, some)],
        )
        attacks = {str(attack.spec): attack for attack in self.study.attacks}
        labels = self.sources.labels.numpy()
        for some, (columns,) in pieces:
            rows.stacks[some], rows.statistics[some] = columns["stacks"], columns["statistics"]
            rows.probability[some], pred = columns["probability"], columns["pred"]
            rows.right[some] = pred == labels[rows.image[some]]
            for i, variant in enumerate(self.variants):
                here = rows.variant[some] == i
                if variant.name in attacks and here.any():
                    attack = attacks[variant.name]
                    image = rows.image[some[here]]
                    goal = self.study.choose_goals(attack, self.sources, image)
                    rows.fooled[some[here]] = (pred[here] == goal) == attack.threat.targeted
        return rows

    def begin_rows(self, stacks: Array) -> Rows:
        """Begin the rows with all that is known before any map is computed."""
        n = len(stacks)
        image = np.concatenate([variant.rows for variant in self.variants])
        counts = [len(variant.rows) for variant in self.variants]
        return Rows(
            stacks=stacks,
            statistics=np.empty((n, len(self.study.view.statistic_names)), dtype=np.float32),
            probability=np.empty(n),
            variant=np.repeat(np.arange(len(counts)), counts),
            image=image,
            group=self.sources.groups[image],
            right=np.empty(n, dtype=bool),
            fooled=np.zeros(n, dtype=bool),
            names=tuple(variant.name for variant in self.variants),
        )

    def split_batches(self) -> list[Array]:
        """Split the rows into batches, each of one variant."""
        starts = np.cumsum([0, *(len(variant.rows) for variant in self.variants)])
        return [
            start + places
            for start, variant in zip(starts, self.variants, strict=False)
            for places in split_evenly(len(variant.rows), self.study.batch)
        ]

    def look_at_rows(self, rows: Rows, some: Array) -> Columns:
        """Compute stacks, statistics, probability of the predicted class and that class.

        Of some rows ``(m,)``, all of one variant.
        """
        study, i = self.study, int(rows.variant[some[0]])
        variant = self.variants[i]
        places = some - sum(len(before.rows) for before in self.variants[:i])
        salt = SEEN + np.uint64(i)  # another seed for an image and its twin
        seeds = sample_seeds(study.seed, self.sources.ids[variant.rows[places]] ^ salt)
        x = from_bytes(variant.images[places]).to(study.model.device)
        with raise_as_run_error("an interpreter broke"), torch.no_grad():
            maps, logits = study.view.compute_maps(study.model, x, seeds)
            stack, found = study.view.measure_maps(maps, logits)
        columns = {
            "stacks": stack,
            "statistics": found,
            "probability": logits.softmax(1).amax(1),
            "pred": predict_classes(logits),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}


@contextmanager
def allocate_stacks(shape: tuple[int, ...]) -> Iterator[Array]:
    """Allocate an array of float32, in a file that goes away if it is large."""
    if 4 * np.prod(shape) <= IN_MEMORY:
        yield np.empty(shape, dtype=np.float32)
        return
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
