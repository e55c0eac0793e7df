"""Training a classifier to be right under attack, one epoch at a time, each kept on disk.

The result is a checkpoint like any other: it is attacked itself, as everything else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn

from robusteval.datasets.sources import Data
from robusteval.errors import RunError, UsageError
from robusteval.interpreters.cam import head
from robusteval.models import checkpoint
from robusteval.models.architecture import build
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, absorb, frozen
from robusteval.models.failures import out_of_memory, sentence
from robusteval.progress import Progress, Silent
from robusteval.runs.storage import differences, write_atomically

from .training_loop import Course, NotFinite, split
from .training_settings import TrainingSettings

MEASURED = 2000  # images that mean and deviation are taken from
FORMAT = 1  # of the file an unfinished training is kept in


def untrained(
    arch: str,
    data: Data,
    settings: TrainingSettings,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> Classifier:
    """An architecture with random weights, for these images.

    Parameters
    ----------
    arch : str
        As in `robusteval.models.checkpoint.load`.
    data : Data
        What it will be trained on.
    settings : TrainingSettings
        How; they decide the images that are measured.
    num_classes : int, optional
        Number of logits; as many as there are class names or labels if not given.
    mean, std : sequence of float, optional
        Normalisation per channel or one for all, both or neither; if not given, those of the
        first 2,000 images to train on.
    device : torch.device, optional
        Where it goes.

    Raises
    ------
    UsageError
        There is no such architecture, or one of mean and std is missing.
    """
    if (mean is None) != (std is None):
        raise UsageError("give both --mean and --std, or neither")
    labels = int(data.labels.max()) + 1 if len(data) else 0
    classes = num_classes or max(len(data.class_names or ()), labels, 2)
    built = build(arch, classes, {}, seed=settings.seed)
    if mean is None or std is None:
        x = data.batch(split(data, settings.held_out, settings.seed)[0][:MEASURED]).x
        mean = [round(value, 4) for value in x.mean((0, 2, 3)).tolist()]
        std = [max(round(value, 4), 1e-4) for value in x.std((0, 2, 3)).tolist()]
    return Classifier(
        built.network,
        mean=mean,
        std=std,
        num_classes=classes,
        input_shape=data.shape,
        identity={"arch": built.name, "arch_sha256": built.sha256, "mean": mean, "std": std},
    ).to(device)


def channels_of(arch: str) -> int | None:
    """Channels of the images that an architecture takes, where its first convolution says so."""
    network = build(arch, 2, {}).network
    first = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 3) else None


class Epoch(NamedTuple):
    """One line of the history."""

    epoch: int  # from 1 on
    loss: float  # mean over the training images, of all terms
    rate: float  # of the last step
    eps: float  # of the last step
    clean: int  # right of the images held out
    robust: int  # right of them under attack
    held_out: int
    below_bound: int | None  # see `Judged`
    bound_ratio: float | None
    seconds: float  # training and judging
    images_per_second: float  # of the training alone


class Trained(NamedTuple):
    """Where the best epoch is, and how good it was on the images held out."""

    path: Path
    best: Epoch
    history: list[Epoch]


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Together with the other processes that `torchrun` has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_helper() -> bool:
    """Whether `torchrun` started this process beside the one that writes."""
    return int(os.environ.get("RANK", "0")) > 0


class Files(NamedTuple):
    """What a training writes, all beside its checkpoint."""

    checkpoint: Path
    state: Path  # as long as it is unfinished
    history: Path
    curve: Path
    lock: Path

    @classmethod
    def beside(cls, path: Path) -> Files:
        """UsageError if the name does not end as that of a checkpoint."""
        if path.suffix != ".safetensors":
            raise UsageError(f"--out {path} must end in .safetensors")
        names = ("state.safetensors", "history.json", "curve.png")
        others = [path.with_name(f"{path.stem}.{name}") for name in names]
        return cls(path, others[0], others[1], others[2], path.with_name(f".{path.name}.lock"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For this process alone; UsageError or RunError if that cannot be."""
        if is_helper():
            yield
            return
        lock = FileLock(self.lock)
        try:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is training {self.checkpoint}: wait for it, or choose another"
                " --out"
            ) from None
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.lock.parent} ({error.strerror or error}): choose another"
                " --out"
            ) from None
        try:
            yield
        finally:
            lock.release()


def train(
    classifier: Classifier,
    data: Data,
    out: Path,
    settings: TrainingSettings,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a classifier, and keep the epoch that is most often right under attack.

    After each epoch everything is on disk: the same call continues a training that was stopped or
    killed, and ends with the same weights, bit for bit on the same CPU and number of threads. On
    CUDA, objectives without maps compute in bfloat16. Started by `torchrun`, each process takes
    its share of every batch; batch normalisation then sees one share at a time.

    Parameters
    ----------
    classifier : Classifier
        With the weights to start from and an architecture in its identity; changed in place, and
        with the weights of the last epoch afterwards.
    data : Data
        Images and labels, some of which are held out to judge epochs on.
    out : Path
        The checkpoint to write, NAME.safetensors; a history, a curve and, until the end, the
        state go beside it.
    settings : TrainingSettings
        How.
    fresh : bool
        Begin anew where `out` or an unfinished training is there already.
    progress : Progress, optional
        Told how far it is.
    stopping : callable, optional
        Asked after every batch whether to stop.

    Returns
    -------
    Trained
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
    files = Files.beside(Path(out))
    trained, held_out = split(data, settings.held_out, settings.seed)
    check_fit(classifier, data, trained, settings)
    with joined(classifier.device), files.locked(), exact_arithmetic():
        course = Course(classifier, data, trained, settings, classifier.device)
        training = Training(course, classifier, held_out, files, progress or Silent(), stopping)
        training.take_over(fresh)
        return training.finished()


def check_fit(
    classifier: Classifier, data: Data, positions: np.ndarray, settings: TrainingSettings
) -> None:
    """UsageError if the network cannot be trained on these images in this way."""
    arch = str(classifier.identity.get("arch") or type(classifier.network).__name__)
    images = data.batch(positions[:2])
    x = images.x.to(classifier.device)
    with frozen(classifier), torch.no_grad():
        try:
            classes = classifier(x).shape[1]
        except Exception as error:  # whatever a network does on images it was not made for
            shape = "x".join(map(str, data.shape))
            text = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{arch} cannot take the images of {data.name} ({shape}): {text}"
            ) from None
        if int(data.labels.max()) >= classes:
            raise UsageError(
                f"{data.name} has labels up to {int(data.labels.max())}, {arch} has {classes}"
                " outputs: give --num-classes, or another checkpoint"
            )
        if classes != classifier.num_classes:
            raise UsageError(
                f"{arch} has {classes} outputs, not {classifier.num_classes}: give --num-classes"
                f" {classes}"
            )
        if settings.has_maps:
            try:
                head(classifier, x)
            except ValueError:
                raise UsageError(
                    f"--objective {settings.objective} needs a network that ends in global average"
                    f" pooling and one linear layer, which {arch} does not: use adv or trades, or"
                    " such an architecture (robusteval:digits_cnn, torchvision:resnet18, ...)"
                ) from None


class Training:
    """A course and the files it leaves."""

    def __init__(
        self,
        course: Course,
        classifier: Classifier,
        held_out: np.ndarray,
        files: Files,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        self.course = course
        self.classifier = classifier
        self.held_out = held_out
        self.files = files
        self.progress = progress
        self.stopping = stopping
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        positions = np.concatenate([course.positions, held_out])
        config = {
            "format": FORMAT,
            "settings": asdict(course.settings),
            "arch": classifier.identity.get("arch"),
            "start": digest_of(classifier.state_dict()),
            "data": course.data.fingerprint(positions),
        }
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read again

    def take_over(self, fresh: bool) -> None:
        """Continue what is there, or begin; UsageError if it is something else."""
        state = self.files.state
        begins = fresh or not state.exists()
        taken = self.files.checkpoint.exists() and not fresh
        if self.course.processes > 1:
            dist.barrier()  # all have looked before one writes
        if begins:
            if taken:
                raise UsageError(
                    f"{self.files.checkpoint} is there already: choose another --out, or --fresh"
                    " to replace it"
                )
            if not is_helper():
                self.files.checkpoint.unlink(missing_ok=True)  # or it would pass for ours
            self.keep()
            return
        try:
            with safetensors.safe_open(state, "pt") as file:
                notes = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            config, history = json.loads(notes["config"]), json.loads(notes["history"])
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            raise UsageError(f"{state} is damaged: add --fresh to begin anew") from None
        if lines := list(differences(config, self.config)):
            raise UsageError(
                f"{state} holds an unfinished training of another kind; choose another --out, or"
                " --fresh to throw it away:\n" + "\n".join(f"  {line}" for line in lines[:8])
            )
        self.history = [Epoch(**line) for line in history]
        self.best = best_of(self.history, self.course.settings)
        self.restore(tensors)
        self.progress.say(f"Continuing after epoch {len(self.history)}.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Weights and the optimiser's memory as they were."""
        network: dict[str, Tensor] = {}
        memory: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                network[rest] = tensor
            else:
                row, _, key = rest.partition(".")
                memory.setdefault(int(row), {})[key] = tensor
        self.classifier.network.load_state_dict(network)
        optimiser = self.course.optimiser
        optimiser.load_state_dict({**optimiser.state_dict(), "state": memory})

    def keep(self) -> None:
        """Write the state from which the next epoch starts, and the history so far."""
        if is_helper():
            return
        network = self.classifier.network.state_dict()
        tensors = {f"network.{name}": tensor for name, tensor in network.items()}
        for row, memory in self.course.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{row}.{key}": tensor for key, tensor in memory.items()}
        # clones, because the format holds no shared memory
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        lines = [epoch._asdict() for epoch in self.history]
        notes = {"config": json.dumps(self.config), "history": json.dumps(lines)}
        write_atomically(self.files.state, safetensors.torch.save(tensors, notes))
        history = {**self.config, "epochs": lines}
        write_atomically(self.files.history, (json.dumps(history, indent=1) + "\n").encode())

    def finished(self) -> Trained:
        """Go through the epochs that are left."""
        course, epochs = self.course, self.course.settings.epochs
        images = course.steps * course.batch
        self.progress.begin("Training", epochs * images)
        self.progress.advance(len(self.history) * images)
        for number in range(len(self.history), epochs):
            with self.explained():
                line = self.epoch(number)
            self.history.append(line)
            self.best = best_of(self.history, course.settings)
            # first the checkpoint: were it the other way round, a kill in between would lose it
            if self.best is line and not is_helper():
                self.save(line)
            self.keep()
            self.tell(line)
        self.progress.end()
        assert self.best is not None
        if not is_helper():
            write_atomically(self.files.curve, curve(self.history, self.best))
            self.files.state.unlink()
        return Trained(self.files.checkpoint, self.best, self.history)

    def epoch(self, number: int) -> Epoch:
        """Train on every image once, and judge."""
        course = self.course
        last = (number + 1) * course.steps - 1
        begun = time.monotonic()
        loss = course.epoch(number, self.progress.advance, self.stopping)
        trained = time.monotonic()
        judged = course.judged(self.held_out)
        return Epoch(
            epoch=number + 1,
            loss=loss,
            rate=course.rate(last),
            eps=course.radius(last),
            clean=judged.clean.k,
            robust=judged.robust.k,
            held_out=len(self.held_out),
            below_bound=judged.below,
            bound_ratio=judged.ratio,
            seconds=time.monotonic() - begun,
            images_per_second=course.steps * course.batch / max(trained - begun, 1e-9),
        )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What went wrong, what is left of the training, and what to do."""
        kept = "nothing was kept"
        if self.best is not None:
            kept = f"{self.files.checkpoint} holds the best epoch so far, number {self.best.epoch}"
        try:
            with sentence("training broke"):
                yield
        except NotFinite as error:
            raise RunError(
                f"{error}: {kept}; train with a lower --rate or a longer --warmup, and --fresh"
            ) from None
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"memory ran out: {kept}; train with a smaller --batch-size, and --fresh"
            ) from None

    def save(self, line: Epoch) -> None:
        """Write the checkpoint."""
        identity, settings = self.classifier.identity, self.course.settings
        checkpoint.save(
            self.files.checkpoint,
            self.classifier.network.state_dict(),
            arch=identity["arch"],
            num_classes=self.classifier.num_classes,
            input_shape=self.course.data.shape,
            mean=identity.get("mean"),
            std=identity.get("std"),
            data=self.course.data.name,
            training={**asdict(settings), "epoch": line.epoch, "from": identity.get("sha256")},
            validation={"images": line.held_out, "clean": line.clean, "robust": line.robust},
        )

    def tell(self, line: Epoch) -> None:
        """Say how the epoch went and how long the others may take."""
        epochs = self.course.settings.epochs
        left = (epochs - line.epoch) * line.seconds
        clean, robust = (100 * k / line.held_out for k in (line.clean, line.robust))
        self.progress.say(
            f"Epoch {line.epoch} of {epochs}: loss {line.loss:.4g}, held out {clean:.1f} % right,"
            f" {robust:.1f} % under attack, {line.images_per_second:.0f} images/s, about"
            f" {minutes(left)} left"
        )


def best_of(history: Sequence[Epoch], settings: TrainingSettings) -> Epoch | None:
    """The epoch that is most often right under attack, or right at all where none was trained on;
    of equal ones the last."""

    def merit(line: Epoch) -> tuple[int, int, int]:
        if settings.terms[0].keys() == {"clean"}:
            return line.clean, line.robust, line.epoch
        return line.robust, line.clean, line.epoch

    return max(history, key=merit, default=None)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    absorb(digest, state)
    return digest.hexdigest()


def minutes(seconds: float) -> str:
    """A time to come, roughly."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def curve(history: Sequence[Epoch], best: Epoch) -> bytes:
    """Loss, and accuracy on the images held out, over the epochs: a picture in PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        epochs = [line.epoch for line in history]
        left.plot(epochs, [line.loss for line in history], marker="o", markersize=3)
        left.set(xlabel="epoch", ylabel="mean training loss")
        for name, label, marker in (("clean", "clean", "o"), ("robust", "under attack", "s")):
            shares = [100 * getattr(line, name) / line.held_out for line in history]
            right.plot(epochs, shares, label=label, marker=marker, markersize=3)
        right.axvline(best.epoch, color="0.6", linestyle=":", label="kept")
        right.set(xlabel="epoch", ylabel=f"% right of {best.held_out} held out", ylim=(0, 102))
        right.legend()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
