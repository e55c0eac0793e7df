"""Weights in a network: what differs, in words, and what would explain it.

A class count, a prefix that all names have and the network lacks or the other way round, one
tensor under two names, or a part of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robusteval.errors import UsageError
from robusteval.models.architecture import (
    Built,
    State,
    build_network,
    escape,
    raise_as_architecture_error,
)
from robusteval.models.classifier import switch_to_eval

COMPILED = "_orig_mod."  # torch.compile puts it before the names of any part
MOST_LINES = 8
MOST_PREFIXES = 2000  # that are tried, each of them a comparison of names
STATISTICS = ("running_mean", "running_var")


def build_with_weights(arch: str, num_classes: int | None, state: State, file: str) -> Built:
    """The architecture with the weights in it; its class count is found from theirs."""
    built, weights, misfit = _build_fitting(arch, num_classes, state)
    if misfit:
        _suggest_part(built, state, misfit, file)
        raise UsageError(*misfit.describe(file, built.name))
    network = built.network
    buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
    for name, tensor in weights.items():
        masks = name in buffers and not name.endswith(STATISTICS)  # -inf, added to scores
        wrong = tensor.isnan() if masks else ~tensor.float().isfinite()
        if bool(wrong.any()):
            raise UsageError(
                f"tensor {escape(name)} in {file} contains NaN or infinity: the model would "
                "answer nothing"
            )
    complete = network.state_dict()  # with the format versions that some modules look up
    complete.update(weights)
    with raise_as_architecture_error(built.name):
        network.load_state_dict(complete)  # before float(), which lazy layers do not know
        network.float()
    switch_to_eval(network)
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
    """The state under the network's names, and how it differs from the network's own."""
    wanted = network.state_dict()
    odd = next((n for n, v in wanted.items() if not isinstance(v, Tensor) and n not in state), None)
    if odd is not None:
        raise UsageError(
            f"the network keeps {escape(odd)} among its weights, which is no tensor and not read"
            " from files: load it in Python and give robusteval.evaluate the network"
        )
    known = {name: tensor for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
    state = max(_rename(state, known), key=lambda names: len(known.keys() & names.keys()))
    twins = _find_twins(known)
    missing = [
        (name, torch.Size() if is_lazy(tensor) else tensor.shape)
        for name, tensor in known.items()
        # a counter that checkpoints from before 2018 lack and eval mode never reads
        if name not in state
        and not name.endswith("num_batches_tracked")
        and not any(twin in state for twin in twins[name])
    ]
    unexpected = [(name, state[name].shape) for name in sorted(state.keys() - wanted.keys())]
    shapes = [
        (name, state[name].shape, tensor.shape)
        for name, tensor in known.items()
        if name in state and not is_lazy(tensor) and state[name].shape != tensor.shape
    ]
    return state, Misfit(missing, unexpected, shapes)


def _rename(state: State, known: Mapping[str, Tensor]) -> Iterator[State]:
    """The state as it is, then as it would be called with and without wrappers around it."""
    yield state
    plain = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    if len(plain) == len(state):
        yield plain
    # a counter beside the network, as in torch.optim.swa_utils.AveragedModel
    counters = [name for name, t in state.items() if "." not in name and t.ndim == 0]
    for some in (plain, {n: t for n, t in plain.items() if n not in counters or n in known}):
        names = some
        while names and (prefix := _find_prefix(names)):
            names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
            yield names
    if known and (prefix := _find_prefix(known)):
        yield {prefix + name: tensor for name, tensor in state.items()}


def _find_prefix(names: Mapping[str, Any]) -> str:
    """The first part that all names have before a dot, with the dot; empty if they do not agree."""
    first, dot, _ = next(iter(names)).partition(".")
    prefix = first + dot
    return prefix if dot and all(name.startswith(prefix) for name in names) else ""


def _find_twins(known: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name the others of the same tensor, of which some files hold one."""
    places: dict[Any, list[str]] = {}
    for name, tensor in known.items():
        lazy = is_lazy(tensor) or tensor.numel() == 0
        place = name if lazy else (tensor.data_ptr(), tensor.shape, tensor.stride())
        places.setdefault(place, []).append(name)
    return {name: [n for n in names if n != name] for names in places.values() for name in names}


def _suggest_part(built: Built, state: State, misfit: Misfit, file: str) -> None:
    """UsageError that says which part of the file would fit, if there is one."""
    prefixes = dict.fromkeys(
        name[: i + 1] for name in state for i, letter in enumerate(name) if letter == "."
    )
    if len(prefixes) > MOST_PREFIXES or not misfit.unexpected:
        return
    fitting: dict[str, int] = {}
    for prefix in prefixes:
        part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        nested = any(prefix.startswith(outer) for outer in fitting)
        if not nested and not _compare_weights(built.network, part)[1]:
            fitting[prefix] = len(part)
    if fitting:
        keys = " or ".join(f"--weights {escape(prefix[:-1])}" for prefix in fitting)
        raise UsageError(
            f"the weights in {file} do not fit {built.name} as a whole, a part of them does: choose"
            f" {keys}, which leaves out {len(state) - max(fitting.values())} tensors (a layer that"
            " normalises images is then to be given as --mean and --std)"
        )
