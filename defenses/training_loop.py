"""A network on its way through its epochs: what one epoch does, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from robusteval.datasets.sources import Data, draw
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.models.classifier import frozen, predictions
from robusteval.models.seeds import sample_seeds
from robusteval.runs.statistics import Rate
from robusteval.search.balls import Ball
from robusteval.search.descent import class_objective, restarted

from .objectives import bounded, training_loss, worst_images
from .training_settings import (
    Augment,
    TrainingSettings,
    schedule_rate,
    warm_up_radius,
)

FEWEST = 20  # images that can still be split
MOST_HELD_OUT = 1000  # images that each epoch is judged on, unless asked for
AT_A_TIME = 250  # of them


def split(data: Data, held_out: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and positions held out: fixed by the seed, none in both.

    UsageError if there are too few images or classes.
    """
    n = len(data)
    if n < FEWEST:
        raise UsageError(
            f"{data.name} has {n} images: training needs at least {FEWEST}, of which some are"
            " held out to judge it on"
        )
    if held_out is None:
        held_out = min(MOST_HELD_OUT, max(n // 10, min(200, n // 5)))
    if not 1 <= held_out <= n // 2:
        raise UsageError(f"--held-out must be from 1 to {n // 2}, half the images, not {held_out}")
    order = draw(n, None, seed)
    trained, kept = np.sort(order[held_out:]), np.sort(order[:held_out])
    if len(np.unique(data.labels[trained])) < 2:
        raise UsageError(
            f"the images of {data.name} to train on are all of one class: at least two are needed"
        )
    return trained, kept


class NotFinite(RunError):
    """Training went astray: a loss or a weight is not a number."""


class Judged(NamedTuple):
    """What a network does on the images held out."""

    clean: Rate
    robust: Rate
    # of the attacks that succeeded, where the objective has maps: how often the discrepancy of
    # the maps fell below its bound (never, but for rounding), and the median of their ratio
    below: int | None
    ratio: float | None


class Course:
    """A network on its way through its epochs; what an epoch does is decided by its number.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits; changed in place.
    data : Data
        Images and labels.
    positions : ndarray
        Those to train on.
    settings : TrainingSettings
        How.
    device : torch.device
        Where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        positions: np.ndarray,
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self.model = model.requires_grad_(True)
        self.data = data
        self.positions = positions
        self.settings = settings
        self.device = device
        self.lowered, self.raised = settings.terms
        # each process takes its share of every batch, and all take the same step
        together = dist.is_available() and dist.is_initialized()
        self.processes = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self.learner = DistributedDataParallel(model) if self.processes > 1 else model
        whole = min(settings.batch_size, len(positions))
        self.batch = max(whole // self.processes, 1) * self.processes
        self.steps = len(positions) // self.batch  # per epoch
        self.optimiser = torch.optim.Adam(model.parameters(), lr=settings.rate)
        # maps are checked against the logits more finely than bfloat16 counts
        self.mixed = device.type == "cuda" and not settings.has_maps

    def radius(self, step: int) -> float:
        """The radius at a step counted from the first epoch on."""
        start, full = self.settings.warmup or (0.0, self.settings.epochs / 4)
        return warm_up_radius(self.settings.eps, step, start * self.steps, full * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate at a step counted from the first epoch on."""
        done = step / (self.steps * self.settings.epochs)
        return schedule_rate(self.settings.rate, done, self.settings.schedule)

    def epoch(
        self, number: int, advance: Callable[[int], None], stopping: Callable[[], bool]
    ) -> float:
        """Train on every image once, but for an incomplete last batch; the mean loss.

        NotFinite as soon as the loss is; Interrupted when `stopping` says so.
        """
        noise = int(sample_seeds(self.settings.seed, np.array([number], dtype=np.uint64))[0])
        order = draw(len(self.positions), None, noise)
        draws = torch.Generator().manual_seed(noise + self.rank)
        total = 0.0
        with drawing_from(noise + self.rank, self.device):
            for i in range(self.steps):
                if self.mean(stopping()) > 0:
                    raise Interrupted("Stopped.")
                index = self.positions[order[i * self.batch : (i + 1) * self.batch]]
                own = index[self.rank :: self.processes]
                loss = self.mean(self.update(number * self.steps + i, own, noise, draws))
                if not math.isfinite(loss):
                    raise NotFinite(f"the loss is {loss:g} in epoch {number + 1}")
                total += loss
                advance(self.batch)
        if self.processes > 1:
            for buffer in self.model.buffers():  # running statistics, which are each one's own
                dist.broadcast(buffer, 0)
        if not all(bool(p.isfinite().all()) for p in self.model.state_dict().values()):
            raise NotFinite(f"a weight is not finite after epoch {number + 1}")
        return total / self.steps

    def update(self, step: int, index: np.ndarray, noise: int, draws: torch.Generator) -> float:
        """One step of the optimiser on the images at these positions; the loss before it."""
        images = self.data.batch(index)
        x = augmented(images.x, self.settings.augment, draws).to(self.device)
        y = images.y.to(self.device)
        seeds = sample_seeds(noise, index.astype(np.uint64))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(step)
        eps = self.radius(step)
        length = self.settings.step_length * (eps / self.settings.eps if self.settings.eps else 0.0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            x_adv = worst_images(
                self.model,
                x,
                y,
                seeds,
                self.raised,
                eps=eps,
                steps=self.settings.steps,
                step=length,
                weighting=self.settings.weighting,
            )
            self.train_mode()
            values = training_loss(self.learner, x, x_adv, y, self.lowered, self.settings.weighting)
        loss = values.mean()
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        self.optimiser.step()
        return float(loss.detach())

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        if self.processes == 1:
            return float(value)
        total = torch.tensor(float(value), device=self.device)
        dist.all_reduce(total)
        return float(total) / self.processes

    def train_mode(self) -> None:
        """Batch normalisation and dropout as in training.

        Without dropout where maps are compared: two draws of it would differ by themselves, and
        what it leaves of the pooled features is not what the maps sum up to.
        """
        self.learner.train()
        if self.settings.has_maps:
            for part in self.model.modules():
                if isinstance(part, nn.modules.dropout._DropoutNd):
                    part.eval()

    def judged(self, positions: np.ndarray) -> Judged:
        """Accuracy on images as they are, and attacked at the full radius.

        Projected ascent of the cross-entropy with twice the steps of the training, each image's
        start the same in every epoch.
        """
        settings = self.settings
        clean = robust = below = 0
        ratios: list[float] = []
        with frozen(self.model):
            for start in range(0, len(positions), AT_A_TIME):
                images = self.data.batch(positions[start : start + AT_A_TIME])
                x, y = images.x.to(self.device), images.y.to(self.device)
                with torch.no_grad():
                    right = predictions(self.model(x)) == y
                x, y, seeds = x[right], y[right], sample_seeds(settings.seed, images.ids)
                clean += len(x)
                if len(x) == 0:
                    continue
                found = restarted(
                    class_objective(self.model, y, targeted=False, loss="ce"),
                    Ball.around(x, "linf", settings.eps),
                    seeds[right.cpu()],
                    restarts=1,
                    random_start=True,
                    step=settings.step_length / 2
                    if settings.step is None
                    else settings.step_length,
                    steps=2 * settings.steps,
                    stop="float",
                )
                robust += int((~found.success).sum())
                if settings.has_maps and bool(found.success.any()):
                    sides = bounded(self.model, x[found.success], found.x_adv[found.success])
                    slack = 1e-4 * (sides.bound.abs() + 1)
                    below += int((sides.discrepancy < sides.bound - slack).sum())
                    ratios += (sides.discrepancy / sides.bound.clamp_min(1e-6)).tolist()
        n = len(positions)
        if not settings.has_maps:
            return Judged(Rate(clean, n), Rate(robust, n), None, None)
        ratio = float(np.median(ratios)) if ratios else None
        return Judged(Rate(clean, n), Rate(robust, n), below, ratio)


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from this seed; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def augmented(x: Tensor, augment: Augment, draws: torch.Generator) -> Tensor:
    """Images ``(n, c, h, w)``, each shifted and mirrored by chance, black where nothing was."""
    if augment == "none" or (augment == "auto" and x.shape[1] == 1):
        return x
    n, _, h, w = x.shape
    reach = max(h // 8, 1), max(w // 8, 1)
    top = torch.randint(2 * reach[0] + 1, (n, 1), generator=draws)
    left = torch.randint(2 * reach[1] + 1, (n, 1), generator=draws)
    rows, columns = top + torch.arange(h), left + torch.arange(w)  # (n, h), (n, w)
    if augment != "crop":
        mirrored = torch.rand(n, 1, generator=draws) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    wide = F.pad(x, [reach[1], reach[1], reach[0], reach[0]]).permute(0, 2, 3, 1)
    images = torch.arange(n)[:, None, None]
    return wide[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
