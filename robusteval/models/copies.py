"""Which of the state dicts in a file is meant: training scripts keep more than one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.models.built import State, escape

WRAPPERS = (  # in the order in which they are tried
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "ema",
    "state_dict_ema",
    "model_ema",
)
TOP = "."  # what the outermost level of a file is called
DEPTH = 3  # a hostile file can wrap itself
MOST_LISTED = 12
MOST_PLACES = 8  # of one dict in the others; a hostile file can name it a thousand times at each
MOST_TRIED = 20  # different layouts, of each of which a network is built


class Choice(NamedTuple):
    """A state dict of a file, its key there, and whether others there would fit as well."""

    state: State
    key: str
    several: bool


def list_states(content: Any) -> dict[str, State]:
    """The state dicts in what `torch.save` was given by their keys, well-known keys first."""
    return dict(_list_states(content, "", DEPTH, Counter()))


def _list_states(
    content: Any, place: str, depth: int, seen: Counter[int]
) -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping) or seen[id(content)] == MOST_PLACES:
        return
    seen[id(content)] += 1
    known = [name for name in WRAPPERS if name in content]
    others = [name for name in content if isinstance(name, str) and name not in known]
    own = {name: content[name] for name in others if isinstance(content[name], Tensor)}
    for name in [*known, *others] if depth else ():
        yield from _list_states(
            content[name], f"{place}.{name}" if place else name, depth - 1, seen
        )
    if own:
        yield place or TOP, {name: tensor.detach() for name, tensor in own.items()}


def choose_state(
    states: Mapping[str, State], wanted: str | None, fits: Callable[[State], bool], file: str
) -> Choice:
    """The state dict that is asked for, or the one that fits.

    Parameters
    ----------
    states : mapping
        As from `list_states`; not empty.
    wanted : str, optional
        The key that the user names, or a prefix of names in a state dict without its dot.
    fits : callable
        Whether a network of the architecture takes a state dict.
    file : str
        What to call the file in messages.

    Raises
    ------
    UsageError
        There is none of that key, or nothing is asked for and two that differ fit.
    """
    if wanted is not None and wanted not in states:
        for state in states.values():
            prefix = f"{wanted}."
            part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            if part:
                return Choice(part, wanted, several=True)
        known = list(states) if len(states) > 1 else _list_twins(next(iter(states.values())))
        advice = f"--weights can be {_enumerate(known)}" if known else "leave out --weights"
        raise UsageError(f"{file} holds no state dict {escape(wanted)}: {advice}")
    if len(states) == 1:
        key, state = next(iter(states.items()))
        return Choice(state, key, several=False)
    fitting = _list_fitting(states, fits, file, wanted is not None)
    first = wanted or next(iter(fitting), next(iter(states)))
    several = any(not _are_equal(states[first], states[key]) for key in fitting)
    if several and wanted is None:
        raise UsageError(
            f"{file} holds more than one state dict that fits, and they differ:"
            f" choose with --weights {_enumerate(fitting)}"
        )
    return Choice(states[first], first, several)


def _list_twins(state: State) -> list[str]:
    """First parts of all names, if behind each of them stand the same as behind another."""
    behind: dict[str, set[str]] = {}
    for name in state:
        first, _, rest = name.partition(".")
        behind.setdefault(first, set()).add(rest)
    known = list(behind.values())
    return list(behind) if all(known.count(names) > 1 for names in known) else []


def _list_fitting(
    states: Mapping[str, State], fits: Callable[[State], bool], file: str, chosen: bool
) -> list[str]:
    """Keys of the state dicts that fit; equal layouts are tried once."""
    known: dict[frozenset[tuple[str, torch.Size]], bool] = {}
    fitting = []
    for key, state in states.items():
        layout = frozenset((name, tensor.shape) for name, tensor in state.items())
        if layout not in known:
            if len(known) == MOST_TRIED:
                if chosen:
                    break
                raise UsageError(
                    f"{file} holds {len(states)} groups of tensors: choose with --weights"
                    f" {_enumerate(list(states))}"
                )
            known[layout] = fits(state)
        if known[layout]:
            fitting.append(key)
    return fitting


def _are_equal(a: State, b: State) -> bool:
    return a is b or (a.keys() == b.keys() and all(_are_same(a[name], b[name]) for name in a))


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _enumerate(keys: Any) -> str:
    listed = [escape(key) for key in keys]
    more = f" ({len(listed) - MOST_LISTED} more)" if len(listed) > MOST_LISTED else ""
    return " or ".join(listed[:MOST_LISTED]) + more
