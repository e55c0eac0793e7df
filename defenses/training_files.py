"""The files of a training: its history, and the state from which the next epoch starts."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import Timeout
from torch import Tensor, nn

from robusteval.errors import RunError, UsageError
from robusteval.models.weights import read_sealed, serialise_safetensors
from robusteval.runs.reading import WEIGHTS, check_regular
from robusteval.runs.storage import differences
from robusteval.runs.writing import hold_lock, remove_leftovers, write_atomically

from .weight_noise import WeightAverage


class Epoch(NamedTuple):
    """One line of the history."""

    epoch: int  # from 1 on
    loss: float  # mean over the training images, of all terms
    rate: float  # of the last step
    eps: float  # of the last step
    clean: int  # right of the images held out
    robust: int  # right of them under attack
    held_out: int
    below_bound: int | None  # see `HeldOut`
    bound_ratio: float | None
    seconds: float  # training and judging
    images_per_second: float  # of the training alone


def is_helper() -> bool:
    """Whether `torchrun` started this process beside the one that writes."""
    return int(os.environ.get("RANK", "0")) > 0


class TrainingFiles(NamedTuple):
    """What a training writes, all beside its checkpoint."""

    checkpoint: Path
    state: Path  # as long as it is unfinished
    history: Path
    curve: Path
    lock_file: Path

    @classmethod
    def name_beside(cls, path: Path) -> TrainingFiles:
        """Name all files by the checkpoint; UsageError if its name does not end as that of one."""
        if path.suffix != ".safetensors":
            raise UsageError(f"--out {path} must end in .safetensors")
        names = ("state.safetensors", "history.json", "curve.png")
        others = [path.with_name(f"{path.stem}.{name}") for name in names]
        return cls(path, others[0], others[1], others[2], path.with_name(f".{path.name}.lock"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes away; UsageError or RunError if that cannot be."""
        if is_helper():
            yield
            return
        with ExitStack() as stack:
            try:
                self.lock_file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_lock(self.lock_file))
            except Timeout:
                raise RunError(
                    f"another process is training {self.checkpoint}: wait for it, or choose another"
                    " --out"
                ) from None
            except OSError as error:
                raise UsageError(
                    f"cannot write to {self.lock_file.parent} ({error.strerror or error}): choose"
                    " another --out"
                ) from None
            for path in (self.checkpoint, self.state, self.history, self.curve):
                remove_leftovers(path.parent, re.escape(path.name))
            yield


class TrainingState:
    """What an unfinished training keeps after each epoch, and how the next call takes it up.

    Parameters
    ----------
    files : TrainingFiles
        Where it is kept.
    network : nn.Module
        Whose weights are kept.
    optimiser : Optimizer
        Whose memory is kept.
    config : dict
        JSON-able: all that the weights depend on; another training is not continued.
    average : WeightAverage, optional
        The average of the weights, if there is one.
    """

    def __init__(
        self,
        files: TrainingFiles,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        config: dict[str, Any],
        average: WeightAverage | None = None,
    ) -> None:
        self.files = files
        self.average = average
        self.network = network
        self.optimiser = optimiser
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it will be read again

    def restore(self) -> list[Epoch]:
        """Put weights and the optimiser's memory back as they were; the epochs so far.

        UsageError if the file is damaged, or of another training.
        """
        path = self.files.state
        check_regular(path, WEIGHTS)
        try:
            tensors, notes = read_sealed(path)
            config, history = json.loads(notes["config"]), json.loads(notes["history"])
            epochs = [Epoch(**line) for line in history]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"{path} is damaged, so that this training cannot go on from it: put back a copy"
                " of it, or add --fresh to begin anew"
            ) from None
        if lines := list(differences(config, self.config)):
            raise UsageError(
                f"{path} holds an unfinished training of another kind; choose another --out, or"
                " --fresh to throw it away:",
                (f"  {line}" for line in lines[:8]),
            )
        self._load_tensors(tensors)
        return epochs

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        network: dict[str, Tensor] = {}
        average: dict[str, Tensor] = {}
        memory: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                network[rest] = tensor
            elif kind == "average":
                average[rest] = tensor
            else:
                row, _, key = rest.partition(".")
                memory.setdefault(int(row), {})[key] = tensor
        self.network.load_state_dict(network)
        if self.average is not None:
            for name, value in self.average.state.items():
                value.copy_(average[name])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": memory})

    def keep(self, history: Sequence[Epoch]) -> None:
        """Write the state from which the next epoch starts, and the history so far."""
        if is_helper():
            return
        network = self.network.state_dict()
        tensors = {f"network.{name}": tensor for name, tensor in network.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state.items()}
        for row, memory in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{row}.{key}": tensor for key, tensor in memory.items()}
        lines = [epoch._asdict() for epoch in history]
        notes = {"config": json.dumps(self.config), "history": json.dumps(lines)}
        write_atomically(self.files.state, serialise_safetensors(tensors, notes))
        self.write_history(history)

    def write_history(self, history: Sequence[Epoch]) -> None:
        """Write the history for people to read; a kill may have come between it and the state."""
        if is_helper():
            return
        report = {**self.config, "epochs": [epoch._asdict() for epoch in history]}
        write_atomically(self.files.history, (json.dumps(report, indent=1) + "\n").encode())


def draw_curve(history: Sequence[Epoch], best: Epoch) -> bytes:
    """Draw loss, and accuracy on the images held out, over the epochs: a picture in PNG."""
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
