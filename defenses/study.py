"""What a detector is fitted for: one classifier, some images of its own, and some attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.dataset import Data
from robusteval.evaluation.batches import ResumableMap
from robusteval.evaluation.perturbing import choose_goals
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances
from robusteval.models.classifier import Classifier, choose_block_size, predict_classes
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import sample_seeds
from robusteval.progress import Progress, Silent

from .detector_view import View
from .splits import Sources
from .transforms import Array

SEEN = np.uint64(0x165667B1)  # parts what interpreters draw from what else is drawn for an image


@dataclass
class Study:
    """A classifier, the images and attacks a detector learns from, and how work is kept.

    Attributes
    ----------
    model : Classifier
        What is attacked, in eval mode.
    data : Data
        Where images come from.
    view : View
        What the detector looks at.
    attacks : sequence of Attack
        Whose results it learns to flag.
    seed : int
        Decides everything that is drawn.
    progress : Progress
        Told how far it is.
    done : WorkCache
        Keeps what is finished.
    """

    model: Classifier
    data: Data
    view: View
    attacks: Sequence[Attack]
    seed: int
    progress: Progress = field(default_factory=Silent)
    done: WorkCache = field(default_factory=WorkCache)

    @property
    def batch(self) -> int:
        """Images that are attacked and scored at a time: four calls of the network."""
        return 4 * choose_block_size(int(np.prod(self.data.shape)), self.model.device)

    @cached_property
    def circumstances(self) -> list[Any]:
        """What all results depend on."""
        return describe_circumstances(self.model, self.seed)

    @property
    def batches(self) -> ResumableMap:
        """The map over batches that keeps what is finished."""
        return ResumableMap(self.done.parts, self.progress)

    def predict_classes(self, x: Tensor) -> Tensor:
        """Predict the classes ``(n,)`` of images ``(n, c, h, w)``."""
        with torch.no_grad(), raise_as_run_error("the network broke"):
            parts = [
                predict_classes(self.model(part.to(self.model.device)))
                for part in torch.split(x, self.batch)
            ]
        return torch.cat(parts).cpu()

    def choose_goals(self, attack: Attack, sources: Sources, rows: Array) -> Array:
        """Choose the classes ``(rows,)`` that an attack is to reach, or to leave."""
        seeds = sample_seeds(self.seed, sources.ids[rows])
        goals = choose_goals(attack, sources.labels[rows], seeds, self.model.num_classes)
        return np.asarray(goals.numpy())

    def draw_few(self, sources: Sources) -> tuple[Tensor, Tensor]:
        """Take a few images to measure costs on, and their seeds."""
        x = sources.x[: self.batch // 4].to(self.model.device)
        return x, sample_seeds(self.seed, sources.ids[: len(x)] ^ SEEN)
