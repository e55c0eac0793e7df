"""How a network is called in eval mode, so that an image's logits are its own and derivable."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from robusteval.models.products import (
    ALIGNMENT,
    apply_image_by_image,
    apply_layer,
    is_large_product,
    is_transformed,
    multiply_together,
)


class ImageByImage(TorchFunctionMode):
    """Linear layers as one product per image, smooth activations image by image.

    In a product of the whole batch the rows at its end can be summed in another order than the
    others (seen with MKL for odd widths), and the last values of a tensor that do not fill a vector
    register go through another implementation of a sigmoid or an exponential than the others: an
    image's last digits would depend on its place.

    Parameters
    ----------
    images : int
        In this call of the network.
    block : int
        In the call whose bits are wanted.
    """

    def __init__(self, images: int, block: int) -> None:
        super().__init__()
        self.images = images
        self.block = block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and self.is_batch(*args[:2]):
            return self.linear(*args, **kwargs)
        if func is F.conv2d and len(args) >= 2 and is_small_product(*args[:2]):
            if args[0].ndim == 4 and len(args[0]) == self.images:
                parts = args[0].split(1)
                return torch.cat([func(part.clone(), *args[1:], **kwargs) for part in parts])
        if func is F.scaled_dot_product_attention:
            apart = is_twice_differentiable() or self.is_uneven_product(args, -2)
            return self.attention(*args, **kwargs) if apart else func(*args, **kwargs)
        if func in PRODUCTS and self.is_uneven_product(args) and not kwargs:
            return apply_image_by_image(func, self.images, *args)
        if func is F.multi_head_attention_forward and self.is_large_attention(args, kwargs):
            return self.attend_to_itself(args)
        name = getattr(func, "__name__", "")
        if (
            name.rstrip("_") in SMOOTH
            and args
            and "out" not in kwargs
            and not self.fills_registers(args[0])
        ):
            in_place = name.endswith("_") or kwargs.get("inplace", False)
            return self.pointwise(func, args, kwargs, in_place)
        return func(*args, **kwargs)

    def is_batch(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a linear layer is given a row or more of each image, not a vector of its own."""
        return x.ndim > 1 and weight.ndim == 2 and len(x) == self.images

    def is_uneven_product(self, args: tuple[Any, ...], outputs: int = -1) -> bool:
        """Whether rows of matrices ``(m * k, …)`` and of their products both fill no registers.

        Then the order of the sums depends on the place. `outputs` is the axis of the second that
        remains. Not where somebody looks on, nor under a transform of `torch.func`.
        """
        if len(args) < 2 or not all(
            isinstance(each, Tensor) and each.ndim > 2 for each in args[:2]
        ):
            return False
        left, right = args[:2]
        uneven = left.shape[-1] % 4 and right.shape[outputs] % 4
        if not uneven or len(left) != len(right) or len(left) % self.images:
            return False
        return not has_strange_modes() and not is_transformed()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of ``(m, …, k)`` as m products."""
        if is_large_product(x[:1], weight.shape[0]):
            return apply_layer(x, weight, bias)
        rows = x.reshape(len(x), -1, x.shape[-1])  # (m, rows, k)
        out = multiply_together(rows, weight)
        out = out.reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention step by step, of each of m equal parts of ``(m * k, …)``."""
        given = [query, key, value]
        split = attn_mask is not None and attn_mask.ndim == query.ndim and len(attn_mask) > 1
        if attn_mask is not None and split:
            given.append(attn_mask)

        def attend(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
            mask = masks[0] if masks else attn_mask
            return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)

        if any(len(each) != len(query) or len(each) % self.images for each in given):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
        return apply_image_by_image(attend, self.images, *given)

    def is_large_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether tokens ``(t, m, k)`` attend to one another, whose products are large, unseen."""
        x = args[0] if len(args) == 13 else None
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != self.images:
            return False
        masks = [kwargs.get("key_padding_mask"), kwargs.get("attn_mask")]
        alone = args[1] is x and args[2] is x and masks == [None, None]
        added = args[5] is None or args[7] is not None or args[8] is not None or args[9]
        changed = kwargs.get("training", True) or kwargs.get("is_causal")
        seen = kwargs.get("need_weights", True) or has_modes()
        is_plain = alone and not added and not changed and not seen
        return is_plain and is_large_product(x[:, :1], 3 * x.shape[2])

    def attend_to_itself(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        """`F.multi_head_attention_forward` of ``(t, m, k)``, its products as of linear layers."""
        x, heads = args[0].transpose(0, 1), args[4]  # (m, t, k)
        mixed = self.linear(x, *args[5:7]).view(*x.shape[:2], 3, heads, -1)  # (m, t, 3, heads, d)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # (m, heads, t, d)
        # image by image where each would begin at another place in memory
        apart = is_twice_differentiable() or mixed[0].nbytes % ALIGNMENT
        attend = self.attention if apart else F.scaled_dot_product_attention
        done = attend(query, key, value).transpose(1, 2).flatten(2)  # (m, t, k)
        return self.linear(done, *args[11:13]).transpose(0, 1), None

    def fills_registers(self, x: Tensor) -> bool:
        """Whether a tensor fills vector registers to its end, here and in a block."""
        if self.images == self.block or x.ndim == 0 or len(x) % self.images:
            return fills_registers(x, x.numel())
        of_block = x.numel() // self.images * self.block
        return fills_registers(x, x.numel()) and fills_registers(x, of_block)

    def pointwise(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Any, in_place: bool
    ) -> Tensor:
        """A function of one value at a time, of each of m equal parts of ``(m * k, …)``.

        Of blocks, the last one padded, where these fill registers.
        """
        x: Tensor = args[0]
        if x.ndim == 0 or len(x) % self.images:
            return func(*args, **kwargs)
        rows = len(x) // self.images  # of an image
        padded = x
        if fills_registers(x, x.numel() // self.images * self.block):
            rows *= self.block
            padded = torch.cat([x, x.new_zeros(-len(x) % rows, *x.shape[1:])])
        parts = padded.split(rows)  # type: ignore[no-untyped-call]
        if in_place:
            parts = [part.clone() for part in parts]
        done = torch.cat([func(part, *args[1:], **kwargs) for part in parts])[: len(x)]
        return x.copy_(done) if in_place else done


def is_small_product(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is a product over places and images whose rows fill no registers.

    Seen on processors with kernels of one pixel, such as those that give the classes.
    """
    single = weight.ndim == 4 and tuple(weight.shape[2:]) == (1, 1)
    return single and weight.shape[0] % 8 != 0 and x.device.type == "cpu"


PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}

# activations whose vectorised and scalar implementations round differently
SMOOTH = {
    *("sigmoid", "logsigmoid", "log_sigmoid", "silu", "gelu", "mish", "softplus", "expit"),
    *("elu", "selu", "celu", "tanh", "exp", "expm1", "erf"),
}


def fills_registers(x: Tensor, values: int) -> bool:
    """Whether so many values as in `x` fill vector registers to their end, in any thread."""
    if x.device.type != "cpu":
        return True
    lanes, grain = 64, 2**15  # four registers of floats at once; what one thread does alone
    threads = max(1, min(torch.get_num_threads(), math.ceil(values / grain)))
    return values % lanes == 0 and math.ceil(values / threads) % lanes == 0


class Pointwise(TorchFunctionMode):
    """Changes nothing but functions of one value at a time."""


def has_modes() -> bool:
    """Whether functions are looked at or changed."""
    return bool(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def has_strange_modes() -> bool:
    """Whether functions are looked at or changed by others than `Pointwise` modes."""
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(not isinstance(mode, Pointwise) for mode in stack)


def is_observed(network: nn.Module, *, pointwise: bool = True) -> bool:
    """Whether somebody looks on at a network's calls or changes them, or compiled them.

    `Pointwise` changes count only if `pointwise`.
    """
    if has_strange_modes() or (pointwise and has_modes()):
        return True
    if _get_current_dispatch_mode_stack() or modules._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or isinstance(module, torch.jit.ScriptModule)
        or "_orig_mod" in module._modules
        for module in list_modules(network)
    )


def list_modules(network: nn.Module) -> list[nn.Module]:
    """All modules of a network, each once, in no order to rely on.

    `nn.Module.modules` takes a generator for each level, and every call of a network asks several
    times: where few images are left that would be felt.
    """
    found: dict[int, nn.Module] = {}
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [part for part in module._modules.values() if part is not None]
    return list(found.values())


@contextmanager
def twice_differentiable(x: Tensor) -> Iterator[None]:
    """Where images are on a graph: attention by the kernel whose derivative has a derivative.

    The fused ones that torch prefers have only the first, and what is made of the derivatives of a
    network could not be attacked or trained.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def is_twice_differentiable() -> bool:
    """Whether attention is computed so that its derivative has a derivative."""
    cuda: Any = torch.backends.cuda
    fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
    return bool(cuda.math_sdp_enabled() and not fused)


def find_float_type(network: nn.Module) -> torch.dtype:
    """The type of the images that a network takes: that of its parameters, if all have the same."""
    kinds = {
        parameter.dtype
        for module in list_modules(network)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.is_floating_point()
    }
    return kinds.pop() if len(kinds) == 1 else torch.float32


# how torch.utils.checkpoint makes a backward pass compute activations again
RECOMPUTING = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",  # the same from torch 2.14 on
)


class Kept:
    """In the place of the checkpointing that `torch.autograd.grad` cannot pass through."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        """The function's result; its activations are kept."""
        return function(*args)


def keep_activations(*_: Any, **__: Any) -> Iterator[None]:
    """Neither before nor after the function is there anything to do."""
    yield


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Keep activations where the network asks torch.utils.checkpoint not to.

    They would be computed again in the backward pass, outside of `ImageByImage` and hence by other
    operations, which torch refuses. Values and derivatives are the same, for more memory.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    with ExitStack() as stack:
        for name in RECOMPUTING:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, keep_activations))
        if hasattr(module, "CheckpointFunction"):
            stack.enter_context(patch.object(module, "CheckpointFunction", Kept))
        yield
