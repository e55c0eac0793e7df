"""Names of tensors in a file against those of a network: what the wrappers around it add to them.

Training scripts put a network inside others, whose parts stand before its names (``module.``,
``model.``, ``net.backbone.``), and keep more beside it. A reading of the names is taken only where
it gives every tensor of the network, in its shape, and leaves nothing out that an answer could
depend on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robusteval.errors import UsageError
from robusteval.models.built import State, escape
from robusteval.models.layer_forms import rewrite_layers
from robusteval.models.misfit import Misfit

# parts that DataParallel, DistributedDataParallel, FSDP, torch.compile and checkpointing put in
# front of the names of whatever they wrap, at any depth
WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# parts of names of what is kept beside a network and takes no part in its answer
FOREIGN = re.compile(
    r"criterion|.*loss.*|.*metrics?|.*_acc|.*accuracy|n_averaged|optimizers?|.*scheduler"
    r"|(.*_)?ema(_.*)?|teacher|total_ops|total_params|current_epoch|epoch|(global_)?step"
)
# a mean and a deviation of pixels, as layers that normalise images call them
NORMALISERS = {
    "mean": "std",
    "_mean": "_std",
    "mu": "sigma",
    "new_mean": "new_std",
    "means": "sds",
    "pixel_mean": "pixel_std",
}
COUNTER = "num_batches_tracked"  # that checkpoints from before 2018 lack and eval mode never reads
MOST_READINGS = 20  # that give all names of the network
MOST_PREFIXES = 2000  # that are tried, each of them a comparison of names
ANCHORS = 8  # names of the network that are looked for
MOST_NAMED = 4  # foreign tensors in a sentence


@dataclass(frozen=True)
class Match:
    """A reading of a file's names.

    Attributes
    ----------
    state : dict
        The tensors under the network's names.
    misfit : Misfit
        How they differ from the network's, and what else the file holds.
    part : str
        The names of the file that are meant begin so; without a dot at its end.
    used : set of str
        Names in the file of the tensors in `state`.
    outside : tuple of str
        Names of other tensors in the file that an answer could depend on.
    remarks : tuple of str
        What was done to the names, in words.
    normaliser : tuple, optional
        Mean and deviation of pixels that the file keeps in a layer of its own.
    """

    state: State
    misfit: Misfit
    part: str = ""
    used: frozenset[str] = frozenset()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    normaliser: tuple[list[float], list[float]] | None = None


def match_names(network: nn.Module, state: State) -> list[Match]:
    """The readings under which a file fits a network; the nearest one where none does.

    Of several that fit there is one for each set of tensors, the shortest prefix first.

    Raises
    ------
    UsageError
        The network keeps something else than tensors among its weights.
    """
    wanted = network.state_dict()
    odd = next((n for n, v in wanted.items() if not isinstance(v, Tensor) and n not in state), None)
    if odd is not None:
        raise UsageError(
            f"the network keeps {escape(odd)} among its weights, which is no tensor and not read"
            " from files: load it in Python and give robusteval.evaluate the network"
        )
    names = Names(wanted)
    readings = names.list_readings(state)
    if all(reading.misfit for reading in readings):
        rewritten, remark = rewrite_layers(state, wanted)
        if rewritten is not None:
            readings += names.list_readings(rewritten, remark)
    fitting = [reading for reading in readings if not reading.misfit]
    if not fitting:
        return [min(readings, key=lambda reading: reading.misfit.distance)]
    # what stands beside one reading may be nothing but the others, such as copies of the network
    used = set().union(*(reading.used for reading in fitting))
    fitting = [replace(r, outside=tuple(n for n in r.outside if n not in used)) for r in fitting]
    return _keep_different(sorted(fitting, key=lambda r: (len(r.outside), len(r.part), r.part)))


def choose_match(matches: Sequence[Match], file: str, arch: str) -> Match:
    """The one reading that fits; UsageError where there is none, or two that differ."""
    first = matches[0]
    if first.misfit:
        raise first.misfit.build_error(file, arch)
    if len(matches) == 1 and not first.outside:
        return first
    parts = " or ".join(f"--weights {escape(match.part or '.')}" for match in matches)
    others = sorted({name for match in matches for name in match.outside})
    if not others:
        raise UsageError(
            f"{file} holds more than one set of weights that fits {arch}, and they differ: choose"
            f" {parts}"
        )
    raise UsageError(
        f"the weights in {file} do not fit {arch} as a whole, a part of them does: choose {parts},"
        f" which leaves out {len(others)} tensors (such as {escape(others[0])}) that an answer may"
        " depend on"
    )


@dataclass
class Names:
    """The names of a network's tensors, with and without what wraps its parts."""

    wanted: Mapping[str, Any]
    known: dict[str, Tensor] = field(init=False)
    plain: dict[str, str] = field(init=False)  # a name without wrappers: the name
    twins: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {n: t for n, t in self.wanted.items() if isinstance(t, Tensor)}
        self.plain = _drop_wrappers(self.known)
        self.twins = _find_twins(self.known)

    def list_readings(self, state: State, *remarks: str) -> list[Match]:
        """The readings of a file's names that give all of the network's, or the best of them."""
        inside = _drop_wrappers(state)
        least = sum(not name.endswith(COUNTER) for name in self.known)
        least -= sum(len(names) for names in self.twins.values())
        pairs = list(self.list_prefixes(inside))
        counts = [len(self.find(inside, *pair)) for pair in pairs]
        chosen = [pair for pair, n in zip(pairs, counts, strict=True) if n >= least]
        chosen = chosen[:MOST_READINGS] or [pairs[counts.index(max(counts))]]
        return [self.read(state, inside, *pair, *remarks) for pair in chosen]

    def list_prefixes(self, inside: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Pairs of what to take from the front of a file's names and what to put there instead."""
        yield "", ""
        seen = {("", "")}
        fronts = list(_list_fronts(list(self.plain)))
        alone = [n for n, name in self.plain.items() if not self.twins[name]] or list(self.plain)
        alone = [name for name in alone if not name.endswith(COUNTER)] or alone
        anchors = alone[:: max(1, len(alone) // ANCHORS)][:ANCHORS]
        for anchor in anchors:
            for front in fronts:
                tail = anchor.removeprefix(front)
                for name in inside:
                    if name != tail and not name.endswith(f".{tail}"):
                        continue
                    pair = name.removesuffix(tail), front
                    if pair in seen or (front and pair[0].endswith(front)):
                        continue
                    seen.add(pair)
                    if len(seen) > MOST_PREFIXES:
                        return
                    yield pair

    def find(self, inside: Mapping[str, str], prefix: str, front: str) -> dict[str, str]:
        """The network's names and the file's, where these have `front` in place of `prefix`."""
        found = {}
        for plain, name in self.plain.items():
            held = inside.get(prefix + plain.removeprefix(front))
            if held is not None and plain.startswith(front):
                found[name] = held
        return found

    def read(
        self, state: State, inside: Mapping[str, str], prefix: str, front: str, *remarks: str
    ) -> Match:
        """The file's tensors under one reading of its names, see `find`."""
        found = self.find(inside, prefix, front)
        used = frozenset(found.values())
        normaliser, rest = _take_normaliser(state, [name for name in state if name not in used])
        originals = {name: plain for plain, name in inside.items()}
        foreign = [n for n in rest if _is_foreign(originals[n], state[n], prefix)]
        rest = [n for n in rest if not _is_foreign(originals[n], state[n], prefix)]
        below = [n for n in rest if originals[n].startswith(prefix)]
        missing = [
            (name, torch.Size() if is_lazy(tensor) else tensor.shape)
            for name, tensor in self.known.items()
            if name not in found
            and not name.endswith(COUNTER)
            and not any(twin in found for twin in self.twins[name])
        ]
        shapes = [
            (name, state[held].shape, self.known[name].shape)
            for name, held in found.items()
            if not is_lazy(self.known[name]) and state[held].shape != self.known[name].shape
        ]
        unexpected = sorted((name, state[name].shape) for name in below)
        said = [*_describe_names(found, prefix, front), *remarks, *_describe_foreign(foreign)]
        return Match(
            {name: state[held] for name, held in found.items()},
            Misfit(missing, unexpected, shapes, len(found)),
            _spell_part(originals, found, prefix),
            used,
            tuple(n for n in rest if n not in below),
            tuple(said),
            normaliser,
        )


def _is_foreign(name: str, tensor: Tensor, prefix: str) -> bool:
    """Whether a tensor that is not the network's takes no part in its answer.

    Its first part that is not also in the prefix decides; deeper names are of layers.
    """
    parts, known = name.split("."), prefix.split(".")
    while len(parts) > 1 and known and parts[0] == known[0]:
        parts, known = parts[1:], known[1:]
    counter = tensor.ndim == 0 and not tensor.is_floating_point()
    return counter or FOREIGN.fullmatch(parts[0].lower()) is not None


def _describe_names(found: Mapping[str, str], prefix: str, front: str) -> Iterator[str]:
    """What differs between the network's names and the file's, in words."""
    wrappers: dict[str, None] = {}
    for name, held in found.items():
        theirs, ours = held.split("."), name.split(".")
        for part in WRAPPER_PARTS & (set(theirs) ^ set(ours)):
            wrappers[f"{part}."] = None
    taken = [f"`{escape(part)}`" for part in (*sorted(wrappers), prefix) if part]
    if taken:
        yield f"names read without {' and '.join(taken)}"
    if front:
        yield f"names read with `{front}` in front"


def _describe_foreign(names: Sequence[str]) -> Iterator[str]:
    """What was left out, in words."""
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        listed = ", ".join(escape(name) for name in names[:MOST_NAMED])
        yield f"left out, as no answer depends on it: {listed}{more}"


def _spell_part(originals: Mapping[str, str], found: Mapping[str, str], prefix: str) -> str:
    """The prefix as the file writes it, with wrappers inside, without a dot at its end."""
    if not prefix or not found:
        return ""
    name = next(iter(found.values()))
    length = 0
    wanted = prefix.rstrip(".").split(".")
    parts = name.split(".")
    for part in parts:
        if not wanted:
            break
        length += 1
        if part == wanted[0] and (part not in WRAPPER_PARTS or name == originals[name]):
            wanted = wanted[1:]
    return ".".join(parts[:length])


def _drop_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Each name without the parts of wrappers: the name; as they are where two become one."""
    names = list(names)
    short = [".".join(p for p in name.split(".") if p not in WRAPPER_PARTS) for name in names]
    if len(set(short)) < len(names) or "" in short:
        return {name: name for name in names}
    return dict(zip(short, names, strict=True))


def _list_fronts(names: Sequence[str]) -> Iterator[str]:
    """Nothing, then what all names begin with, by parts that end in a dot."""
    front = ""
    while names:
        yield front
        part, dot, _ = names[0].removeprefix(front).partition(".")
        front += part + dot
        if not dot or not all(name.startswith(front) for name in names):
            return


def _find_twins(known: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name the others of the same tensor, of which some files hold one."""
    places: dict[Any, list[str]] = {}
    for name, tensor in known.items():
        lazy = is_lazy(tensor) or tensor.numel() == 0
        place = name if lazy else (tensor.data_ptr(), tensor.shape, tensor.stride())
        places.setdefault(place, []).append(name)
    return {name: [n for n in names if n != name] for names in places.values() for name in names}


def _take_normaliser(
    state: State, rest: Sequence[str]
) -> tuple[tuple[list[float], list[float]] | None, list[str]]:
    """Mean and deviation of pixels among tensors, and the other names.

    Several of them that differ are left where they are: which of them is meant is not known.
    """
    pairs, taken = [], set()
    for name in rest:
        parent, _, short = name.rpartition(".")
        partner = f"{parent}.{NORMALISERS.get(short, '')}".removeprefix(".")
        if short not in NORMALISERS or partner not in rest:
            continue
        mean, std = state[name], state[partner]
        # one number for each channel, along a single axis
        plain = mean.shape == std.shape and mean.numel() == max((1, *mean.shape))
        if plain and mean.is_floating_point() and std.is_floating_point():
            pairs.append((mean.flatten().tolist(), std.flatten().tolist()))
            taken |= {name, partner}
    if not pairs or any(pair != pairs[0] for pair in pairs):
        return None, list(rest)
    means, stds = ([round(value, 7) for value in values] for values in pairs[0])
    return (means, stds), [name for name in rest if name not in taken]


def _keep_different(matches: Sequence[Match]) -> list[Match]:
    """The first reading of each set of tensors."""
    kept: list[Match] = []
    for match in matches:
        if not any(_are_equal(match.state, other.state) for other in kept):
            kept.append(match)
    return kept


def _are_equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(_are_same(a[name], b[name]) for name in a)


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
