"""How many images a network is called with at a time, where that changes no bit of what it says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.weak import WeakIdKeyDictionary

from robusteval.models.forward_modes import (
    find_float_type,
    is_observed,
    is_twice_differentiable,
    list_modules,
)
from robusteval.models.layouts import list_tensors
from robusteval.models.seeds import kept_random_states

PATIENCE = 300  # images of a kind for each one that larger calls are tried with
LARGEST = 8  # blocks in a call
ROUNDS = 3  # in which a larger call is timed; products are joined in the first ones
GAIN = 0.98  # of the time, which a larger call must stay below
LOOK = 8  # images in a block, from which a first look says whether larger calls are slower
# made-up images that a smaller size would have saved, for each one of its trial: this takes them
# through as many passes as three made-up ones go through, but what saved much will save more
WORTH = 2

Call = Callable[[Tensor], Tensor]  # normalised images (n, c, h, w) -> logits (n, k)


def cut_into_blocks(n: int, block: int) -> list[int]:
    """Sizes of the calls for `n` images in blocks of one size, the last one padded."""
    return [block] * max(1, -(-n // block))


@dataclass
class Kind:
    """What is known of calls with images of one kind.

    Attributes
    ----------
    block : int
        Images in the call that decides what the bits are.
    same : set of int
        Sizes of calls that give these bits.
    others : set of int
        Sizes that give others, or none.
    best : int
        The fastest size, as far as is known.
    largest : int
        That was tried.
    images : int
        That went through so far.
    padded : Counter
        How often a call was padded since a size was tried last, by the number of images in it.
    twice : bool
        Whether derivatives are derived again, for which larger calls would take much memory.
    """

    block: int
    twice: bool = False
    same: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    best: int = 0
    largest: int = 0
    images: int = 0
    padded: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.same.add(self.block)
        self.best = self.largest = self.block

    def cut(self, n: int) -> list[int]:
        """Sizes of the calls for `n` images; the last one may have to be padded."""
        sizes = []
        usable = sorted(size for size in self.same if size <= self.best)
        while n > 0:
            if n >= self.block:
                sizes.append(max(size for size in usable if size <= n))
            else:
                sizes.append(min(size for size in usable if size >= n))
            n -= sizes[-1]
        return sizes

    def choose_trial(self, n: int) -> int | None:
        """The size that is worth trying now that there are `n` images more, if there is one.

        A smaller one once what it would have saved so far comes near what trying it costs: of
        batches that become smaller with each step one in the middle, of one that stays its own.
        """
        self.images += n
        larger = 2 * self.largest
        room = self.block if self.twice else LARGEST * self.block
        if larger <= min(n, room) and self.images >= PATIENCE * larger:
            self.largest = larger
            return larger
        *full, size = self.cut(n)
        # what derives twice may hand derivatives into the middle of the network, and with one image
        # kernels do not see how these lie in memory
        rest = max(n - sum(full), 2 if self.twice else 1)
        untried = [trial for trial in range(rest, size) if trial not in self.others]
        if not untried:
            return None
        self.padded[rest] += 1
        below = max((known for known in self.same if known < rest), default=0)
        served = [*accumulate(self.padded[i] for i in range(below + 1, size))]  # by each size
        gains = {
            trial: served[trial - below - 1] * (size - trial) - WORTH * (trial + size)
            for trial in untried
        }
        chosen = max(gains, key=lambda trial: gains[trial])
        if gains[chosen] <= 0:
            return None
        for i in range(below + 1, chosen + 1):
            del self.padded[i]  # the next size has its own trial to earn
        return chosen


class CallSizes:
    """Sizes of a network's calls that give the same bits as calls of one block do.

    Which kernels run depends on the size of a batch, but many sizes get kernels that sum alike. A
    size is tried on images half made up, when it would have saved as much as trying it costs: if
    logits, derivatives and what every module gives for all images are those from blocks bit by bit,
    calls may have that size from then on. So padding is only what is left where sizes differ, and
    what is found out here, which another machine may find out otherwise, decides about time alone.
    Where rounding could hide differences from a trial, as in half precision, all calls are blocks.
    """

    def __init__(self) -> None:
        self.kinds: dict[tuple[Any, ...], Kind] = {}
        # by those alone who take each image's values as its own: whether they derive twice
        self.watched_twice: bool | None = None

    def __reduce__(self) -> tuple[type[CallSizes], tuple[()]]:
        return CallSizes, ()  # what was seen of a network says nothing of its copy elsewhere

    def cut(self, x: Tensor, block: int, network: nn.Module, call: Call) -> list[int]:
        """Sizes of the calls for normalised images ``(n, c, h, w)``, n at least 1.

        Parameters
        ----------
        x : Tensor
            The images.
        block : int
            Images in the call that decides what the bits are.
        network : nn.Module
            What is called. While somebody looks on or changes what it does, every call is a block;
            while `watched`, a size that was found before. `Pointwise` changes do not count.
        call : callable
            Its logits for as many images as it is given.
        """
        if len(x) == block or hides_digits(x.device, network):
            return cut_into_blocks(len(x), block)
        observed = is_observed(network, pointwise=False)
        if observed and self.watched_twice is None:
            return cut_into_blocks(len(x), block)
        twice = is_twice_differentiable() if self.watched_twice is None else self.watched_twice
        arithmetic = describe_arithmetic(x.device, network)
        key = (tuple(x.shape[1:]), x.dtype, block, twice, *arithmetic)
        if key not in self.kinds:
            self.kinds = {k: v for k, v in self.kinds.items() if k[4:] == arithmetic}
        kind = self.kinds.setdefault(key, Kind(block, twice))
        trial = None if observed else kind.choose_trial(len(x))
        if trial is not None:
            try_size(kind, trial, x, call)
        return kind.cut(len(x))

    @contextmanager
    def watched(self, network: nn.Module, twice: bool) -> Iterator[None]:
        """While hooks see only what the network computes, and make of each image's its own.

        They may be set inside, and what they see be derived `twice`. If somebody else looks on
        already, every call remains a block.
        """
        before = self.watched_twice
        if before is None and not is_observed(network, pointwise=False):
            self.watched_twice = twice
        try:
            yield
        finally:
            self.watched_twice = before


def describe_arithmetic(device: torch.device, network: nn.Module) -> tuple[Any, ...]:
    """What the kernels that run depend on besides the images: another value, another kernel."""
    modules = list_modules(network)
    state = [
        describe_state(each)
        for module in modules
        for each in (*module._parameters.values(), *module._buffers.values())
        if each is not None
    ]
    cudnn = torch.backends.cudnn
    return (
        hash(tuple((id(each), type(each)) for each in modules)),
        hash(tuple(state)),
        device,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    )


def describe_state(weights: Tensor) -> tuple[int, ...]:
    """What changes with parameters or buffers; a network that changes them is never tried."""
    try:
        return id(weights), weights._version, weights.data_ptr()
    except RuntimeError:  # of inference mode, or without memory of its own
        return (id(weights),)


def hides_digits(device: torch.device, network: nn.Module) -> bool:
    """Whether numbers are rounded so that other sums can look the same in a trial."""
    return (
        find_float_type(network) != torch.float32
        or torch.is_autocast_enabled(device.type)
        or torch.get_float32_matmul_precision() != "highest"
        or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    )


def try_size(kind: Kind, size: int, x: Tensor, call: Call) -> None:
    """Find out whether calls of a size give the bits of the block and, if larger, are faster."""
    sizes = kind.cut(size)
    try:
        with kept_random_states(x.device), torch.inference_mode(False), torch.enable_grad():
            images, given = make_up_images(x, size)
            is_same, ratio = False, 1.0
            # of few large images products may only be joined in the second and third call
            if size > kind.block >= LOOK and is_slower(images, sizes, call):
                kind.largest = LARGEST * kind.block  # nor are larger ones tried
                return
            if all(agree(each, sizes, call) for each in (images, given)):
                is_same, ratio = compare_calls(images, sizes, call, kind, size > kind.block)
    except Exception:
        is_same, ratio = False, 1.0  # it takes no other size, or has no derivative
    if is_same:
        kind.same.add(size)
    else:
        kind.others.add(size)
    if size > kind.block:
        if is_same and ratio < GAIN:
            kind.best = size
        elif not is_same or ratio > 1 / GAIN:
            kind.largest = LARGEST * kind.block  # larger ones are not tried


def is_slower(images: Tensor, sizes: list[int], call: Call) -> bool:
    """Whether one call with all images takes longer than calls of these sizes, at a first look."""

    def take(sizes: list[int]) -> float:
        started = time.perf_counter()
        z = images.clone().requires_grad_()
        torch.autograd.grad(call_in_parts(z, sizes, call).sum(), z)
        return time.perf_counter() - started

    return take([len(images)]) > take(sizes)


def make_up_images(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """So many images between those given and noise, nowhere flat, of the same range; and those."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, *x.shape[1:], generator=generator)
    rows = torch.arange(size, device=x.device) % len(x)
    given = x.detach()[rows]
    return given + noise.to(x) / 2, given


def agree(images: Tensor, sizes: list[int], call: Call) -> bool:
    """Whether each module gives the same in one call with all images as in calls of these sizes.

    Rounding, or the mean of many values, hides most differences from the logits of a few images.
    """
    together = look_inside(images, [len(images)], call)
    apart = look_inside(images, sizes, call)
    if len(together) != len(apart):
        return False
    pairs = zip(together, apart, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)


def look_inside(images: Tensor, sizes: list[int], call: Call) -> list[Tensor | None]:
    """For each tensor that a module takes or gives, in order, a number ``(n,)`` for each image.

    None in the place of a tensor without rows for each image.
    """
    seen: list[list[Tensor | None]] = []

    def watched(part: Tensor) -> Tensor:
        found: list[Tensor | None] = []
        versions: Any = WeakIdKeyDictionary()  # of tensors that were seen, as they are handed on
        rows = min(len(part), len(images) - sum(sizes[: len(seen)]))  # which are no padding

        def look(_module: nn.Module, args: Any, output: Any) -> None:
            for each in list_tensors((args, output)):
                if versions.get(each) != each._version:
                    versions[each] = each._version
                    found.append(sum_bits(each, len(part), rows))

        handle = register_module_forward_hook(look)
        try:
            logits = call(part)
        finally:
            handle.remove()
        seen.append([*found, sum_bits(logits, len(part), rows)])
        return logits

    with torch.no_grad():
        call_in_parts(images, sizes, watched)
    together: list[Tensor | None] = []
    for parts in zip(*seen, strict=True):
        known = [part for part in parts if part is not None]
        whole = len(known) == len(parts)
        together.append(torch.cat(known) if whole else None)
    return together


def sum_bits(tensor: Tensor, images: int, rows: int) -> Tensor | None:
    """A number for each of the first images ``(rows,)``, of the bits of its values by place."""
    if tensor.ndim == 0 or len(tensor) % images or not tensor.is_floating_point():
        return None
    if tensor.dtype != torch.float32:
        raise ValueError(f"values of {tensor.dtype} hide differences")
    # a zero has one sign
    values = tensor.detach().reshape(images, -1)[:rows] + 0.0
    bits = values.contiguous().view(torch.int32).long()
    return (bits * (2 * torch.arange(bits.shape[1], device=bits.device) + 1)).sum(1).cpu()


def compare_calls(
    images: Tensor, sizes: list[int], call: Call, kind: Kind, timed: bool
) -> tuple[bool, float]:
    """Whether one call with all images says the same as calls of these sizes, and its time.

    As a share of theirs.
    """
    took = {True: torch.inf, False: torch.inf}
    said: dict[bool, tuple[Tensor, ...]] = {}
    for _ in range(ROUNDS if timed else 1):
        for together in (True, False):
            started = time.perf_counter()
            said[together] = answer(images, [len(images)] if together else sizes, call, kind.twice)
            took[together] = min(took[together], time.perf_counter() - started)
        if not all(map(torch.equal, said[True], said[False])):
            return False, 1.0
    grad = said[True][-1]
    return bool(grad.flatten(1).any(1).all()), took[True] / took[False]


def answer(images: Tensor, sizes: list[int], call: Call, twice: bool = False) -> tuple[Tensor, ...]:
    """Logits off and on the graph, and first or both derivatives, by calls of these sizes."""
    z = images.clone().requires_grad_()
    with torch.no_grad():
        plain = call_in_parts(z, sizes, call)
    logits = call_in_parts(z, sizes, call)
    weights = torch.linspace(0.5, 1.5, logits.shape[1]).to(logits)  # no logit like another
    grad = torch.autograd.grad((logits * weights).sin().sum(), z, create_graph=twice)[0]
    found = [plain, logits, grad]
    if twice:
        found += torch.autograd.grad(grad.square().sum(), z)
    return tuple(each.detach().cpu() for each in found)


def call_in_parts(x: Tensor, sizes: list[int], call: Call) -> Tensor:
    """Logits ``(n, k)`` by calls of these sizes, the last one padded with zeros."""
    n = len(x)
    if sizes == [n]:
        return call(x)
    x = torch.cat([x, x.new_zeros(sum(sizes) - n, *x.shape[1:])]) if sum(sizes) > n else x
    # each a tensor of its own, which the network may change in place
    parts = [part.clone() for part in x.split(sizes)]  # type: ignore[no-untyped-call]
    return torch.cat([call(part) for part in parts])[:n]
