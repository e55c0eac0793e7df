"""A network on its way through its epochs: what one epoch and one step do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from robusteval.datasets.dataset import Data, draw
from robusteval.errors import Interrupted, RunError
from robusteval.models.seeds import sample_seeds

from .objectives import compute_training_loss, find_worst_images
from .training_settings import (
    Augment,
    TrainingSettings,
    schedule_rate,
    warm_up_radius,
)
from .weight_noise import WeightAverage, worst_weights


class NotFinite(RunError):
    """Training went astray: a loss or a weight is not a number."""


class TrainingLoop:
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
        How it is trained.
    device : torch.device
        Where the model is.
    extra : Data, optional
        More images of the same form and classes to train on.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        positions: np.ndarray,
        settings: TrainingSettings,
        device: torch.device,
        extra: Data | None = None,
    ) -> None:
        self.model = model.requires_grad_(True)
        self.data = data
        self.extra = extra
        if extra is not None:  # counted on behind the others
            positions = np.concatenate([positions, len(data) + np.arange(len(extra))])
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
        self.average = WeightAverage(model, settings.average) if settings.average else None
        # maps are checked against the logits more finely than bfloat16 counts
        self.mixed = device.type == "cuda" and not settings.has_maps

    def compute_radius(self, step: int) -> float:
        """Compute the radius at a step counted from the first epoch on."""
        start, full = self.settings.warmup or (0.0, self.settings.epochs / 4)
        return warm_up_radius(self.settings.eps, step, start * self.steps, full * self.steps)

    def compute_rate(self, step: int) -> float:
        """Compute the learning rate at a step counted from the first epoch on."""
        done = step / (self.steps * self.settings.epochs)
        return schedule_rate(self.settings.rate, done, self.settings.schedule)

    def run_epoch(
        self, number: int, advance: Callable[[int], None], stopping: Callable[[], bool]
    ) -> float:
        """Train on every image once, but for an incomplete last batch, and return the mean loss.

        NotFinite as soon as the loss is; Interrupted when `stopping` says so.
        """
        noise = int(sample_seeds(self.settings.seed, np.array([number], dtype=np.uint64))[0])
        order = draw(len(self.positions), None, noise)
        draws = torch.Generator().manual_seed(noise + self.rank)
        total = 0.0
        with seed_dropout(noise + self.rank, self.device):
            for i in range(self.steps):
                if self.average_over_processes(stopping()) > 0:
                    raise Interrupted("Stopped.")
                index = self.positions[order[i * self.batch : (i + 1) * self.batch]]
                own = index[self.rank :: self.processes]
                loss = self.average_over_processes(
                    self.update_weights(number * self.steps + i, own, noise, draws)
                )
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

    def update_weights(
        self, step: int, index: np.ndarray, noise: int, draws: torch.Generator
    ) -> float:
        """Take one step of the optimiser on the images at these positions; the loss before it."""
        images, labels = self.read_images(index)
        x = augment_images(images, self.settings.augment, draws).to(self.device)
        y = labels.to(self.device)
        seeds = sample_seeds(noise, index.astype(np.uint64))
        for group in self.optimiser.param_groups:
            group["lr"] = self.compute_rate(step)
        eps = self.compute_radius(step)
        length = self.settings.step_length * (eps / self.settings.eps if self.settings.eps else 0.0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            x_adv = find_worst_images(
                self.model,
                x,
                y,
                seeds,
                self.raised,
                eps=eps,
                steps=self.settings.steps,
                step=length,
                weighting=self.settings.weighting,
                search=self.settings.search,
            )
            self.set_train_mode()

        def measure_loss(model: nn.Module) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                values = compute_training_loss(
                    model, x, x_adv, y, self.lowered, self.settings.weighting
                )
            return values.mean()

        self.optimiser.zero_grad()
        worst = worst_weights(
            self.model, lambda: measure_loss(self.model), self.settings.awp, self.processes
        )
        with worst:
            loss = measure_loss(self.learner)
            torch.autograd.backward(loss)
        self.optimiser.step()
        if self.average is not None:
            self.average.update(step)
        return float(loss.detach())

    def averaged(self) -> AbstractContextManager[None]:
        """Give the network the averaged weights, where there are any, until it is left."""
        return nullcontext() if self.average is None else self.average.applied()

    def read_images(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read images ``(m, c, h, w)`` and labels ``(m,)`` at these positions, in their order."""
        known = len(self.data)
        if self.extra is None or bool((index < known).all()):
            batch = self.data.batch(index)
            return batch.x, batch.y
        own = index < known
        order = np.argsort(np.concatenate([np.flatnonzero(own), np.flatnonzero(~own)]))
        parts = [self.data.batch(index[own]), self.extra.batch(index[~own] - known)]
        rows = torch.from_numpy(order)
        return (
            torch.cat([part.x for part in parts])[rows],
            torch.cat([part.y for part in parts])[rows],
        )

    def average_over_processes(self, value: float) -> float:
        """Average a number over all processes."""
        if self.processes == 1:
            return float(value)
        total = torch.tensor(float(value), device=self.device)
        dist.all_reduce(total)
        return float(total) / self.processes

    def set_train_mode(self) -> None:
        """Set batch normalisation and dropout as in training.

        Without dropout where maps are compared: two draws of it would differ by themselves, and
        what it leaves of the pooled features is not what the maps sum up to.
        """
        self.learner.train()
        if self.settings.has_maps:
            for part in self.model.modules():
                if isinstance(part, nn.modules.dropout._DropoutNd):
                    part.eval()


@contextmanager
def seed_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Let dropout draw from this seed; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def augment_images(x: Tensor, augment: Augment, draws: torch.Generator) -> Tensor:
    """Shift and mirror images ``(n, c, h, w)`` by chance, black where nothing was."""
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
