"""The type that a network computes in, and derivatives that half precision does not lose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, autograd, nn

from robusteval.errors import UsageError
from robusteval.models.built import escape

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def set_precision(network: nn.Module, precision: str, file: str) -> None:
    """Let a network in float32 compute in another type, its weights and buffers rounded to that.

    UsageError if a value would become infinite in it.
    """
    dtype: torch.dtype = getattr(torch, precision)
    if dtype == torch.float32:
        return
    most = torch.finfo(dtype).max
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if bool(((tensor.abs() > most) & tensor.isfinite()).any()):
                raise UsageError(
                    f"tensor {escape(name)} in {file} holds values beyond {most:g}, the largest of"
                    f" {precision}: take bfloat16 or float32"
                )
    network.to(dtype)


def name_precision(dtype: str | torch.dtype) -> Precision:
    """The name of a type that a network may compute in; UsageError for others."""
    name = str(dtype).removeprefix("torch.")
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise UsageError(f"dtype must be one of {', '.join(PRECISIONS)}, not {escape(str(dtype))}")


def describe_precision(stored: Iterable[Tensor], precision: str) -> str:
    """What is computed in and what the weights are stored in; empty where both are float32."""
    kinds = {str(t.dtype).removeprefix("torch.") for t in stored if t.is_floating_point()}
    if kinds <= {precision}:
        return "" if precision == "float32" else f"{precision}, as the weights are stored"
    if precision == "float32":
        return f"{precision}, the weights are stored in {' and '.join(sorted(kinds))}"
    return f"{precision}, the weights are rounded from {' and '.join(sorted(kinds))}"


def refuse_rounded(network: nn.Module) -> None:
    """UsageError if a network computes in half precision, of whose layers no maps are made.

    What layers give is compared with the logits there, which rounding would keep from agreeing.
    """
    for part in network.parameters():
        if part.dtype == torch.bfloat16 or part.dtype == torch.float16:
            raise UsageError(
                "maps that are made of a network's layers need it in float32, and this one computes"
                f" in {str(part.dtype).removeprefix('torch.')}: explain it without --dtype, or by"
                " grad, smoothgrad or mask, which see its answers alone"
            )


class Scales:
    """Powers of two ``(n,)`` that the derivatives of n images are multiplied by on their way.

    None of them for good once derivatives were put on a graph: derivatives of these reach the
    images without passing the logits, so that nobody has multiplied them.
    """

    value: Tensor | None = None
    is_off = False


class Scaled(autograd.Function):
    """Logits ``(n, k)`` whose derivatives are brought to between 1 and 2, image by image.

    Those of images that a network is sure of are so small that float16 takes them for zero, and
    attacks would find a robustness that is none. A power of two changes no digit.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scales: Scales) -> Tensor:
        """The logits."""
        ctx.scales = scales
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> Any:
        """The derivatives in their new size."""
        (grad,) = upper
        if ctx.scales.is_off or torch.is_grad_enabled():
            ctx.scales.is_off, ctx.scales.value = True, None
            return grad, None
        largest = grad.detach().abs().amax(1)
        _, exponent = torch.frexp(largest)  # largest = mantissa * 2 ** exponent, from .5 up
        usable = (largest > 0) & largest.isfinite()
        scale = torch.where(usable, torch.ldexp(torch.ones_like(largest), 1 - exponent), 1.0)
        ctx.scales.value = scale
        return grad * scale.unsqueeze(1), None


class Unscaled(autograd.Function):
    """Images ``(n, c, h, w)``, whose derivatives get the size back that `Scaled` took from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Scales) -> Tensor:
        """The images."""
        ctx.scales = scales
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> Any:
        """The derivatives in float32, in their own size."""
        (grad,) = upper
        scale = ctx.scales.value
        return (grad if scale is None else grad / scale.view(-1, 1, 1, 1)), None
