"""Training a classifier to be right under attack, one epoch at a time, each kept on disk.

The result is a checkpoint like any other: it is attacked itself, as everything else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from robusteval.datasets.dataset import Data
from robusteval.errors import RunError, UsageError
from robusteval.models import checkpoint
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, absorb, derive_identity
from robusteval.models.failures import is_out_of_memory, raise_as_run_error
from robusteval.models.steps import listen
from robusteval.progress import Progress, Silent
from robusteval.runs.writing import write_atomically

from .held_out import hold_out_images, judge_held_out
from .training_files import Epoch, TrainingFiles, TrainingState, draw_curve, is_helper
from .training_loop import NotFinite, TrainingLoop
from .training_settings import TrainingSettings
from .training_start import check_extra, check_trainable

FORMAT = 1  # of the file an unfinished training is kept in


class TrainingResult(NamedTuple):
    """Where the best epoch is, and how good it was on the images held out."""

    path: Path
    best: Epoch
    history: list[Epoch]


@contextmanager
def join_processes(device: torch.device) -> Iterator[None]:
    """Join the other processes that `torchrun` has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(
    classifier: Classifier,
    data: Data,
    out: Path,
    settings: TrainingSettings,
    *,
    extra: Data | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train a classifier, and keep the epoch that is most often right under attack.

    After each epoch everything is on disk: the same call continues a training that was stopped or
    killed, and ends with the same weights, bit for bit on the same CPU and number of threads. On
    CUDA, objectives without maps compute in bfloat16. Started by `torchrun`, each process takes
    its share of every batch; batch normalisation then sees one share at a time.

    Parameters
    ----------
    classifier : Classifier
        With the weights to start from and an architecture in its identity; changed in place, and
        with the weights of the last epoch afterwards, no longer under the hash of its file.
    data : Data
        Images and labels, some of which are held out to judge epochs on.
    out : Path
        The checkpoint to write, NAME.safetensors; a history, a curve and, until the end, the
        state go beside it.
    settings : TrainingSettings
        How to train.
    extra : Data, optional
        More images of the same form and classes, all of which are trained on.
    fresh : bool
        Begin anew where `out` or an unfinished training is there already.
    progress : Progress, optional
        Told how far it is.
    stopping : callable, optional
        Asked after every batch and every step of a search whether to stop.

    Returns
    -------
    TrainingResult
        The best epoch: the most images right under attack (of the objective `standard`, right as
        they are), of equal ones the last. It was chosen by the images it is counted on, so the
        figures flatter it a little.

    Raises
    ------
    UsageError
        Data that cannot be split, an architecture without the maps of the objective or for other
        images, or a file in the way.
    RunError
        The loss or a weight was not finite, or memory ran out; the best epoch so far is kept.
    Interrupted
        Stopped; the epochs so far are kept.
    """
    files = TrainingFiles.name_beside(Path(out))
    trained, held_out = hold_out_images(data, settings.held_out, settings.seed)
    check_trainable(classifier, data, trained, settings)
    if extra is not None:
        check_extra(extra, data, held_out)
        check_trainable(classifier, extra, np.arange(len(extra)), settings)
    with join_processes(classifier.device), files.lock(), exact_arithmetic():
        loop = TrainingLoop(classifier, data, trained, settings, classifier.device, extra)
        training = TrainingRun(loop, classifier, held_out, files, progress or Silent(), stopping)
        training.take_over(fresh)
        # from now on its weights are not those of its file: caches must not take it for that one
        classifier.identity = derive_identity(classifier)
        return training.run_remaining_epochs()


class TrainingRun:
    """A training on its way through its epochs, and the files that it leaves."""

    def __init__(
        self,
        loop: TrainingLoop,
        classifier: Classifier,
        held_out: np.ndarray,
        files: TrainingFiles,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        self.loop = loop
        self.classifier = classifier
        known = classifier.identity
        # of the file that the weights come from
        self.origin = known.get("sha256", known.get("head_of"))
        self.held_out = held_out
        self.files = files
        self.progress = progress
        self.stopping = stopping
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        own = loop.positions[loop.positions < len(loop.data)]
        positions = np.concatenate([own, held_out])
        config = {
            "format": FORMAT,
            "settings": asdict(loop.settings),
            "arch": classifier.identity.get("arch"),
            "start": hash_weights(classifier.state_dict()),
            "data": loop.data.fingerprint(positions),
        }
        if loop.extra is not None:
            config["extra"] = loop.extra.fingerprint(np.arange(len(loop.extra)))
        self.state = TrainingState(files, classifier.network, loop.optimiser, config, loop.average)

    def take_over(self, fresh: bool) -> None:
        """Continue what is there, or begin; UsageError if it is something else."""
        begins = fresh or not self.files.state.exists()
        taken = self.files.checkpoint.exists() and not fresh
        if self.loop.processes > 1:
            dist.barrier()  # all have looked before one writes
        if not begins:
            self.history = self.state.restore()
            self.state.write_history(self.history)
            self.remove_foreign_checkpoint()
            self.best = choose_best_epoch(self.history, self.loop.settings)
            self.progress.say(f"Continuing after epoch {len(self.history)}.")
            return
        if taken:
            raise UsageError(
                f"{self.files.checkpoint} is there already: choose another --out, or --fresh"
                " to replace it"
            )
        # in this order: a kill between the two must not leave the state of an older training, whose
        # checkpoint is gone
        self.state.keep(self.history)
        self.remove_foreign_checkpoint()

    def remove_foreign_checkpoint(self) -> None:
        """Before there is an epoch a checkpoint is not of this training, and would pass for it."""
        if not self.history and not is_helper():
            self.files.checkpoint.unlink(missing_ok=True)

    def run_remaining_epochs(self) -> TrainingResult:
        """Run the epochs that are left, and keep each."""
        loop, epochs = self.loop, self.loop.settings.epochs
        images = loop.steps * loop.batch
        self.progress.begin("Training", epochs * images)
        self.progress.advance(len(self.history) * images)
        for number in range(len(self.history), epochs):
            with self.explain_failures():
                line = self.train_epoch(number)
            self.history.append(line)
            self.best = choose_best_epoch(self.history, loop.settings)
            # first the checkpoint: were it the other way round, a kill in between would lose it
            if self.best is line and not is_helper():
                self.save_checkpoint(line)
            self.state.keep(self.history)
            self.report_epoch(line)
        self.progress.end()
        assert self.best is not None
        if not is_helper():
            write_atomically(self.files.curve, draw_curve(self.history, self.best))
            self.files.state.unlink()
        return TrainingResult(self.files.checkpoint, self.best, self.history)

    def train_epoch(self, number: int) -> Epoch:
        """Train on every image once, and judge."""
        loop = self.loop
        last = (number + 1) * loop.steps - 1
        begun = time.monotonic()
        # several processes stop together, between two steps of the optimiser
        alone = loop.processes == 1
        with listen(Silent(), 0, self.stopping) if alone else nullcontext():
            loss = loop.run_epoch(number, self.progress.advance, self.stopping)
            trained = time.monotonic()
            with loop.averaged():
                judged = judge_held_out(
                    loop.model, loop.data, self.held_out, loop.settings, loop.device
                )
        return Epoch(
            epoch=number + 1,
            loss=loss,
            rate=loop.compute_rate(last),
            eps=loop.compute_radius(last),
            clean=judged.clean.k,
            robust=judged.robust.k,
            held_out=len(self.held_out),
            below_bound=judged.below,
            bound_ratio=judged.ratio,
            seconds=time.monotonic() - begun,
            images_per_second=loop.steps * loop.batch / max(trained - begun, 1e-9),
        )

    @contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Turn what breaks into a sentence: what is left of the training, and what to do."""
        kept = "nothing was kept"
        if self.best is not None:
            kept = f"{self.files.checkpoint} holds the best epoch so far, number {self.best.epoch}"
        try:
            with raise_as_run_error("training broke"):
                yield
        except NotFinite as error:
            raise RunError(
                f"{error}: {kept}; train with a lower --rate or a longer --warmup, and --fresh"
            ) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"memory ran out: {kept}; train with a smaller --batch-size, and --fresh"
            ) from None

    def save_checkpoint(self, line: Epoch) -> None:
        """Write the checkpoint."""
        identity, settings = self.classifier.identity, self.loop.settings
        with self.loop.averaged():
            state = {k: v.clone() for k, v in self.classifier.network.state_dict().items()}
        checkpoint.save(
            self.files.checkpoint,
            state,
            arch=identity["arch"],
            num_classes=self.classifier.num_classes,
            input_shape=self.loop.data.shape,
            mean=identity.get("mean"),
            std=identity.get("std"),
            data=self.loop.data.name,
            **self.name_classes(),
            training={**asdict(settings), "epoch": line.epoch, "from": self.origin},
            validation={"images": line.held_out, "clean": line.clean, "robust": line.robust},
        )

    def name_classes(self) -> dict[str, list[str]]:
        """What the outputs are called, as far as the classifier or the data say it for all."""
        names = self.classifier.class_names or self.loop.data.class_names
        known = names is not None and len(names) == self.classifier.num_classes
        return {"class_names": list(names)} if known and names else {}

    def report_epoch(self, line: Epoch) -> None:
        """Say how the epoch went and how long the others may take."""
        epochs = self.loop.settings.epochs
        left = (epochs - line.epoch) * line.seconds
        clean, robust = (100 * k / line.held_out for k in (line.clean, line.robust))
        self.progress.say(
            f"Epoch {line.epoch} of {epochs}: loss {line.loss:.4g}, held out {clean:.1f} % right,"
            f" {robust:.1f} % under attack, {line.images_per_second:.0f} images/s, about"
            f" {format_duration(left)} left"
        )


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Hash the names and values of a state dict by SHA-256."""
    digest = hashlib.sha256()
    absorb(digest, state)
    return digest.hexdigest()


def choose_best_epoch(history: Sequence[Epoch], settings: TrainingSettings) -> Epoch | None:
    """Choose the epoch that is most often right under attack; of equal ones the last.

    Right at all where the training has no attack; None if there is no epoch yet.
    """

    def merit(line: Epoch) -> tuple[int, int, int]:
        if settings.terms[0].keys() == {"clean"}:
            return line.clean, line.robust, line.epoch
        return line.robust, line.clean, line.epoch

    return max(history, key=merit, default=None)


def format_duration(seconds: float) -> str:
    """Format a time to come, roughly."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
