"""Weights in a network: what differs, in words, and how many classes would explain it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from robusteval.errors import UsageError
from robusteval.models.architecture import (
    Built,
    State,
    build_network,
    escape,
    raise_as_architecture_error,
)

PREFIXES = ("module.", "_orig_mod.", "model.")
MOST_LINES = 8


def build_with_weights(arch: str, num_classes: int | None, state: State, file: str) -> Built:
    """The architecture with the weights in it; its class count is found from theirs."""
    built, weights, misfit = _build_fitting(arch, num_classes, state)
    if misfit:
        raise UsageError(*misfit.describe(file, built.name))
    for name, tensor in weights.items():
        if not bool(tensor.float().isfinite().all()):
            raise UsageError(
                f"tensor {escape(name)} in {file} contains NaN or infinity: the model would "
                "answer nothing"
            )
    network = built.network.float().eval()
    complete = network.state_dict()  # with the format versions that some modules look up
    complete.update(weights)
    with raise_as_architecture_error(built.name):
        network.load_state_dict(complete)
    return built


def fits_network(arch: str, num_classes: int | None, state: State) -> bool:
    """Whether the architecture takes the weights; what is wrong otherwise is not said."""
    try:
        return not _build_fitting(arch, num_classes, state)[2]
    except UsageError:
        return False


def _build_fitting(arch: str, num_classes: int | None, state: State) -> tuple[Built, State, Misfit]:
    """The architecture with as many classes as the weights have, these, and how they differ."""
    built = build_network(arch, num_classes, state)
    weights, misfit = _compare_weights(built.network, state)
    if num_classes is None and (classes := misfit.find_classes()):
        other = build_network(arch, classes, state)
        if not _compare_weights(other.network, state)[1]:
            built, misfit = other, Misfit([], [], [])
    return built, weights, misfit


class Misfit(NamedTuple):
    """How weights differ from a network's: names with shapes, and shapes in file and network."""

    missing: list[tuple[str, torch.Size]]
    unexpected: list[tuple[str, torch.Size]]
    shapes: list[tuple[str, torch.Size, torch.Size]]

    def __bool__(self) -> bool:
        return any(self)

    def find_classes(self) -> int | None:
        """The class count that could explain the whole difference."""
        counts = {(inside[0], wanted[0]) for _, inside, wanted in self.shapes if inside and wanted}
        alike = all(inside[1:] == wanted[1:] for _, inside, wanted in self.shapes)
        if self.missing or self.unexpected or len(counts) != 1 or not alike:
            return None
        return int(counts.pop()[0])

    def describe(self, file: str, arch: str) -> tuple[str, list[str]]:
        """A readable difference: one sentence, and lines below it."""
        sentence = (
            f"the weights in {file} do not fit {arch}: {len(self.missing)} tensors missing, "
            f"{len(self.unexpected)} unexpected, {len(self.shapes)} of another shape"
        )
        lines = _some("missing", (f"{escape(n)} {tuple(s)}" for n, s in self.missing))
        lines += _some("unexpected", (f"{escape(n)} {tuple(s)}" for n, s in self.unexpected))
        shapes = (
            f"{escape(name)} is {tuple(inside)} in the file, {tuple(wanted)} in the architecture"
            for name, inside, wanted in self.shapes
        )
        return sentence, lines + _some("shape", shapes)


def _some(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"  {title}: {item}" for item in items]
    rest = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"  {title}: and {rest} more"] if rest > 0 else [])


def _compare_weights(network: nn.Module, state: State) -> tuple[State, Misfit]:
    """The state without wrappers' prefixes, and how it differs from the network's."""
    wanted = network.state_dict()
    stripped = [state]
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in stripped[-1])), None):
        stripped.append({n.removeprefix(prefix): t for n, t in stripped[-1].items()})
    state = max(stripped, key=lambda names: len(wanted.keys() & names.keys()))
    missing = [
        (name, tensor.shape)
        for name, tensor in wanted.items()
        # a counter that checkpoints from before 2018 lack and eval mode never reads
        if name not in state and not name.endswith("num_batches_tracked")
    ]
    unexpected = [(name, state[name].shape) for name in sorted(state.keys() - wanted.keys())]
    shapes = [
        (name, state[name].shape, tensor.shape)
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return state, Misfit(missing, unexpected, shapes)
