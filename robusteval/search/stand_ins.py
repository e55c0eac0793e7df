"""Gradients in the place of those that a network withholds: what it answers stays its own.

Backward Pass Differentiable Approximation and Expectation over Transformation, arXiv:1802.00420.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robusteval.models.classifier import Classifier, choose_block_size
from robusteval.models.seeds import kept_random_states, seed_everything
from robusteval.models.steps import book_rows

# operations whose derivative is zero wherever there is one
STEPS = frozenset({"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"})
JUMPS = {"round": 0.5, "floor": 0.0, "ceil": 0.0, "trunc": 0.0, "fix": 0.0}  # beyond integers
NEAR = 0.1  # units from a jump, up to which a value can be expected to cross it
COMPARISONS = {"gt": 1.0, "ge": 1.0, "lt": -1.0, "le": -1.0}  # with the sign of their left side
CASTS = frozenset({"float", "to", "type", "type_as", "double", "half", "bfloat16"})
LIMITS = frozenset({"clamp", "clip"})
LEAST = 1e-30  # a probability that is taken for zero


class _PassOn(torch.autograd.Function):
    """The value of one tensor with the gradient of another of the same shape."""

    @staticmethod
    def forward(ctx: Any, guide: Tensor, value: Tensor) -> Tensor:
        """The second one."""
        del ctx, guide
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """All of it to the first."""
        del ctx
        return grads[0], None


def pass_on(guide: Tensor, value: Tensor) -> Tensor:
    """The values of `value` with the gradient of `guide`, of the same shape."""
    found: Tensor = _PassOn.apply(guide, value.detach())
    return found


def hold_far(name: str, x: Tensor, decimals: int = 0) -> Tensor:
    """Values that are rounded by the named operation, on the graph only near where it jumps."""
    if name not in JUMPS:
        return x
    scaled = x.detach() * 10.0**decimals - JUMPS[name]
    return torch.where((scaled - scaled.round()).abs() <= NEAR, x, x.detach())


@cache
def hides_ends() -> bool:
    """Whether in this version of torch a value at a limit of a clamp has no gradient."""
    x = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(torch.clamp(x, 0, 1), x, torch.ones(1))
    return not bool(slope)


class StraightSteps(TorchFunctionMode):
    """Rounding, signs and comparisons with the gradient of the identity.

    A comparison counts as the difference of its sides, once it is made a number. A clamp between
    two limits passes the gradient on where it changes nothing, at the limits too: of an image's
    black and white pixels an attack would see none otherwise.

    Parameters
    ----------
    rows : int, optional
        How many rows of a batch are images, as others only fill it up and may be black, where it
        is asked whether a clamp has values at its limits.
    near : bool
        Of values that are rounded only those near a jump get a gradient: where a radius is too
        small to move the others across, no step is spent on them.
    """

    def __init__(self, rows: int | None = None, *, near: bool = False) -> None:
        super().__init__()
        self.rows, self.near = rows, near
        self.met: set[str] = set()  # names of the operations that were given a gradient
        self._sides: dict[int, tuple[Tensor, Tensor]] = {}  # of comparisons, with their result
        self._trusted = False

    @contextmanager
    def trust_gates(self, layer: nn.Module) -> Iterator[None]:
        """Leave comparisons in a layer as they are: gates, as of a ReLU written by hand."""

        def switch(to: bool) -> Callable[..., None]:
            return lambda *_args: setattr(self, "_trusted", to)

        with ExitStack() as stack:
            stack.callback(layer.register_forward_pre_hook(switch(True)).remove)
            stack.callback(layer.register_forward_hook(switch(False)).remove)
            yield

    def _guide(self, name: str, x: Tensor, kwargs: Any) -> Tensor:
        """Whose derivative the named operation of `x` takes."""
        return hold_far(name, x, kwargs.get("decimals", 0)) if self.near else x

    @staticmethod
    def _read_limits(args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any] | None:
        """The two limits of a clamp; None where it has one alone."""
        given = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        low, high = given.get("min"), given.get("max")
        return None if low is None or high is None else (low, high)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, before = getattr(func, "__name__", ""), None
        if name.rstrip("_") in STEPS and name.endswith("_") and not name.startswith("_"):
            # in place: what there was is needed for the gradient
            before = args[0].clone() if args and args[0].requires_grad else None
        out = func(*args, **kwargs)
        name = name.strip("_")
        if not args or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            return out
        x = args[0]
        if name in STEPS and isinstance(before, Tensor):
            self.met.add(name)
            return x.copy_(pass_on(self._guide(name, before, kwargs), out))
        if name in STEPS and x.requires_grad and out is not x:
            self.met.add(name)
            return pass_on(self._guide(name, x, kwargs), out)
        limits = self._read_limits(args, kwargs) if name in LIMITS and hides_ends() else None
        if limits is not None and x.requires_grad and out is not x and x.is_floating_point():
            kept = out == x
            if self.rows is not None:  # asked for once, not at each step of a search
                ends = kept & ((x == limits[0]) | (x == limits[1]))
                if bool(ends[: self.rows].any()):
                    self.met.add(f"{name} at its limits")
            return pass_on(torch.where(kept, x, x.detach()), out)
        is_gate = self._trusted or not x.is_floating_point()
        if name in COMPARISONS and x.requires_grad and not is_gate:
            side = COMPARISONS[name] * (x - (args[1] if len(args) > 1 else kwargs["other"]))
            self._sides[id(out)] = (out, side)  # the result as well, or another gets its number
        elif name in CASTS and out.is_floating_point() and id(x) in self._sides:
            self.met.add("comparison")
            return pass_on(self._sides[id(x)][1].to(out), out)
        return out


def match_layers(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names or, for all of a kind, of these classes.

    Of modules whose paths end in a name those nearest to the top, so that a place in a network is
    the same inside whatever stands around it. ValueError for a name that none has.
    """
    found: list[nn.Module] = []
    parts = dict(model.named_modules())
    for name in names:
        some = [part for part in parts.values() if type(part).__name__ == name]
        paths = [path for path in parts if f".{path}".endswith(f".{name}")]
        depth = min((path.count(".") for path in paths), default=0)
        some += [parts[path] for path in paths if path.count(".") == depth]
        if not some:
            raise ValueError(f"layers: the network has no layer {name!r}, by name or class")
        found += some
    return list(dict.fromkeys(found))


@contextmanager
def replace_layers(
    layers: Sequence[nn.Module], change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Let layers give what `change` makes of their input and output, where shapes are the same.

    They are given their input without a graph, which NumPy inside would refuse.
    """
    given: list[Any] = []

    def before(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if args else None
        given.append(x.clone() if isinstance(x, Tensor) else x)  # a layer may work in place
        return cut_graph(_layer, args)

    def after(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        x = given.pop()
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape:
            return change(x, output)
        return None

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        yield


def cut_graph(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a layer: its input without a graph."""
    return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)


class Straight(nn.Module):
    """A model with the gradient of the identity through some layers, and through all steps.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    layers : sequence of nn.Module
        Of the model.
    near : bool
        See `StraightSteps`.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], *, near: bool = False
    ) -> None:
        super().__init__()
        self.model, self.layers, self.near = model, tuple(layers), near
        self.met: set[str] = set()  # names of the operations that were given a gradient

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``, those of the model."""
        with replace_layers(self.layers, pass_on), StraightSteps(near=self.near) as steps:
            logits: Tensor = self.model(x)
        self.met |= steps.met
        return logits


class Guided(nn.Module):
    """A model with the gradient of another one that takes the same images.

    Parameters
    ----------
    model, guide : nn.Module
        Map images in [0, 1] to logits ``(n, k)``.
    """

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``, those of the model."""
        with torch.no_grad():
            logits: Tensor = self.model(x)
        return pass_on(self.guide(x), logits) if torch.is_grad_enabled() else logits


_other: ContextVar[nn.Module | None] = ContextVar("other", default=None)


@contextmanager
def known_network(other: nn.Module | None) -> Iterator[None]:
    """Let attacks inside know another network for the same images, see `find_known_network`."""
    token = _other.set(other)
    try:
        yield
    finally:
        _other.reset(token)


def find_known_network() -> nn.Module | None:
    """The same classifier without its defense, or with one; None where there is none."""
    return _other.get()


class Bypassed(nn.Module):
    """A model with the gradient of what it is without some layers.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    layers : sequence of nn.Module
        Of the model. In their place stands the identity or, where no output is negative, a ReLU.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self.layers = model, tuple(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``, those of the model."""
        with torch.no_grad():
            logits: Tensor = self.model(x)
        if not torch.is_grad_enabled():
            return logits
        with replace_layers(self.layers, leave_out), StraightSteps():
            guide = self.model(x)
        return pass_on(guide, logits)


def leave_out(x: Tensor, output: Tensor) -> Tensor:
    """What goes into a layer, cut off below zero for images ``(n, …)`` whose output is."""
    cut = (output >= 0).flatten(1).all(1).view(-1, *(1,) * (x.ndim - 1))
    return torch.where(cut, torch.relu(x), x)


_company: ContextVar[Tensor | None] = ContextVar("company", default=None)


@contextmanager
def known_company(images: Tensor | None) -> Iterator[None]:
    """Let attacks inside know beside which images ``(m, c, h, w)`` each image is judged."""
    token = _company.set(images)
    try:
        yield
    finally:
        _company.reset(token)


def find_known_company() -> Tensor | None:
    """The images beside which each is judged; None where they change no answer."""
    return _company.get()


class Accompanied(nn.Module):
    """A model whose answer to an image depends on others, beside the same ones each time.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    company : Tensor
        The other images ``(m, c, h, w)``. With one image they are a call of the network.
    """

    def __init__(self, model: nn.Module, company: Tensor) -> None:
        super().__init__()
        self.model, self.company = model, company

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``, each row of a pass of its own."""
        size = len(self.company) + 1
        rows = [x.new_empty(0)] * len(x)
        with call_with(self.model, size):
            for i in range(len(x)):
                together = torch.cat([x[i : i + 1], self.company.to(x)])
                with book_rows(torch.full((size,), i)):
                    rows[i] = self.model(together)[0]
        return torch.stack(rows) if rows else self.model(x)


@contextmanager
def call_with(model: nn.Module, images: int) -> Iterator[None]:
    """Let the networks of classifiers inside a model be called with so many images at a time."""
    inside = [part for part in model.modules() if isinstance(part, Classifier)]
    blocks = [part.block for part in inside]
    try:
        for part in inside:
            part.block = images
        yield
    finally:
        for part, block in zip(inside, blocks, strict=True):
            part.block = block


@contextmanager
def call_in_blocks(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Let classifiers inside a model be called with blocks alone, for images ``(n, c, h, w)``.

    What a network draws may depend on the sizes of its calls, and these on what was seen before.
    """
    free = [part for part in model.modules() if isinstance(part, Classifier) and part.block is None]
    try:
        for part in free:
            part.block = choose_block_size(x.shape[1:].numel(), x.device)
        yield
    finally:
        for part in free:
            part.block = None


class LogOutputs(nn.Module):
    """A model whose outputs are probabilities, with their logarithms for logits.

    Where they are none, as of a model whose last layer is left out, they stay what they are.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to probabilities ``(n, k)``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``, whose softmax are the probabilities."""
        outputs: Tensor = self.model(x)
        logits = outputs.clamp_min(LEAST).log()
        return torch.where(resemble_probabilities(outputs).unsqueeze(1), logits, outputs)


def resemble_probabilities(outputs: Tensor) -> Tensor:
    """Which rows ``(n,)`` of outputs ``(n, k)`` lie in [0, 1] and sum to one."""
    return (outputs.sum(1) - 1).abs().lt(1e-3) & outputs.ge(0).all(1) & outputs.le(1).all(1)


class Expected(nn.Module):
    """A model that answers at random, as its mean over some draws.

    Draws are seeded by the image itself, so that an image has one answer, in any batch.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``, with random numbers from torch, from the global
        state of NumPy or from Python's `random`.
    draws : int
        Answers to each image.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms ``(n, k)`` of the mean probabilities."""
        return torch.stack([answer.log_softmax(1).logsumexp(0) for answer in self.draw(x)])

    def draw(self, x: Tensor, salt: int = 0) -> Iterator[Tensor]:
        """Answers ``(draws, k)`` to each of the images ``(n, c, h, w)``; others by another salt."""
        with kept_random_states(x.device):
            for i, image in enumerate(x):
                seed_everything(hash_image(image, salt), x.device)
                copies = image.expand(self.draws, *image.shape)
                with book_rows(torch.full((self.draws,), i)), call_in_blocks(self.model, x):
                    answers = self.model(copies)
                yield answers


def hash_image(image: Tensor, salt: int) -> int:
    """A seed from the bits of an image ``(c, h, w)``."""
    bits = image.detach().float().cpu().contiguous().numpy().tobytes()
    return zlib.crc32(bits, salt)
