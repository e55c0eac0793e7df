"""Networks whose rectifiers keep their values and have another derivative for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from robusteval.models.forward_modes import Pointwise

Slope = Literal["smooth", "adv2", "true"]


@contextmanager
def smooth_relu(kind: Literal["smooth", "adv2"] = "smooth", tau: float = 1e-4) -> Iterator[None]:
    """ReLUs inside keep their values, to the bit, and get a slope that itself has a slope.

    The derivative of a ReLU network is constant almost everywhere, so a map made of it cannot be
    attacked by its own derivative, which is zero. ReLU, ReLU6, hardtanh and leaky ReLU are caught,
    as modules, functions, methods and in place; one spelt as a clamp or a maximum is not, nor is
    anything inside a scripted module. Derivatives exist up to the second.

    Parameters
    ----------
    kind : {"smooth", "adv2"}
        `smooth`: slope ``(1 + z / sqrt(z² + tau)) / 2``, which rises from 0 to 1. `adv2`: as
        published with the attack ADV2 (arXiv:1812.00891), ``z / sqrt(z² + tau)``, plus 1 below
        zero: not monotone, with a unit jump down at zero.
    tau : float
        Squared width of the bend, in units of the activations.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if kind not in ("smooth", "adv2") or not tau > 0:
        raise ValueError(f"kind must be smooth or adv2 and tau positive, not {kind!r} and {tau:g}")

    def rule(z: Tensor, upper: Tensor, bends: Bends) -> Tensor:
        down: Tensor = Bent.apply(z, upper, bends, kind, tau)
        return down

    with Rectifiers(rule):
        yield


@contextmanager
def guide_relu() -> Iterator[Rectifiers]:
    """ReLUs inside keep their values and hand down only positive derivatives; they are counted."""

    def rule(z: Tensor, upper: Tensor, bends: Bends) -> Tensor:
        return upper.clamp_min(0) * bends.slope(z, lambda z: (z > 0).to(z))

    with Rectifiers(rule) as rectifiers:
        yield rectifiers


class Bends(NamedTuple):
    """A piecewise linear function by its slope on the left and the jumps of its slope."""

    start: float
    jumps: tuple[tuple[float, float], ...]  # (place, change of slope)

    def slope(self, z: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
        """The slope of the function, or any sum of steps at its bends."""
        (place, jump), *more = self.jumps
        slope = step(z - place if place else z)
        if jump != 1:
            slope = slope * jump
        for place, jump in more:
            slope = slope + jump * step(z - place)
        return slope + self.start if self.start else slope


class Bent(autograd.Function):
    """Derivative times smooth slope, as one operation with a derivative of its own.

    Spelt out for speed: left to autograd, each slope costs a dozen passes over the activations.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, upper: Tensor, bends: Bends, kind: Slope, tau: float
    ) -> Tensor:
        """``upper * slope(z)``."""

        def step(z: Tensor) -> Tensor:
            rise = z.square().add_(tau).rsqrt_().mul_(z)
            return rise.mul_(0.5).add_(0.5) if kind == "smooth" else rise.add_(z < 0)

        slope = bends.slope(z, step)
        ctx.save_for_backward(z, upper, slope)
        ctx.bends, ctx.kind, ctx.tau = bends, kind, tau
        return upper * slope

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, outer: Tensor
    ) -> Any:
        """The derivative of the slope, ``tau / (z² + tau)**1.5``, halved for `smooth`."""
        z, upper, slope = ctx.saved_tensors
        factor = ctx.tau / 2 if ctx.kind == "smooth" else ctx.tau

        def bump(z: Tensor) -> Tensor:
            root = z.square().add_(ctx.tau).rsqrt_()
            return root.square().mul_(root).mul_(factor)

        curve = ctx.bends._replace(start=0.0).slope(z, bump)
        return curve.mul_(upper).mul_(outer), outer * slope, None, None, None


# (values before the rectifier, derivative from above, rectifier) -> derivative handed down
Rule = Callable[[Tensor, Tensor, Bends], Tensor]


class Rectifiers(Pointwise):
    """Gives every rectifier that is called inside another derivative."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.met = 0  # rectifiers that were called

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        reader = RECTIFIERS.get(func)
        if reader is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.met += 1
        z, bends, inplace = reader(*args, **kwargs)
        # the rule needs the values that in place would be overwritten
        before = z.clone() if inplace else z
        after: Tensor = Ruled.apply(before, bends, self.rule)
        return z.copy_(after) if inplace else after


class Ruled(autograd.Function):
    """A rectifier whose derivative is what a rule says."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bends: Bends, rule: Rule) -> Tensor:
        """The values of the rectifier."""
        ctx.save_for_backward(z)
        ctx.bends, ctx.rule = bends, rule
        if bends.start:
            return F.leaky_relu(z, bends.start)
        if len(bends.jumps) == 1:
            return torch.relu(z)
        return F.hardtanh(z, bends.jumps[0][0], bends.jumps[1][0])

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> Any:
        """The derivative by the rule, differentiable as the rule is."""
        (z,) = ctx.saved_tensors
        return ctx.rule(z, upper[0], ctx.bends), None, None


Called = tuple[Tensor, Bends, bool]  # input, function, in place


def _relu(input: Tensor, inplace: bool = False) -> Called:
    return input, Bends(0.0, ((0.0, 1.0),)), inplace


def _relu_in_place(input: Tensor) -> Called:
    return _relu(input, inplace=True)


def _hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Called:
    return input, Bends(0.0, ((min_val, 1.0), (max_val, -1.0))), inplace


def _relu6(input: Tensor, inplace: bool = False) -> Called:
    return _hardtanh(input, 0.0, 6.0, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Called:
    return input, Bends(negative_slope, ((0.0, 1.0 - negative_slope),)), inplace


RECTIFIERS: dict[Any, Callable[..., Called]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_in_place,
    Tensor.relu_: _relu_in_place,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky_relu,
}
