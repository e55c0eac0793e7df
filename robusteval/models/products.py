"""Linear layers whose rows have the same bits in any company, at the price of one product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import functional as F

LARGE_PRODUCT = 2**24  # multiplications, beside which a call of its own is nothing
LARGE_IN_OTHER_TYPES = 2**27  # where products are never joined, so that two copies must be nothing
PATIENCE = 2  # products of a shape for the one that joining them is tried with
PATTERN = 61  # rows of noise: a prime, so that a row of noise comes to many places
ALIGNMENT = 64  # bytes, at whose multiples torch places what it makes
ALIKE = 16  # bytes: products of rows that begin at its multiples are added up alike, as was seen


class Aligned(autograd.Function):
    """A copy at the start of memory of its own, whose derivative is such a copy, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The copy."""
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> Any:
        """A copy of the derivative, differentiable itself."""
        return upper[0].clone(memory_format=torch.contiguous_format)


def multiply_together(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows ``(m, rows, k)`` of m images times weights ``(n, k)``, in one call for all images.

    Which kernel adds up an image's product depends on where its rows and their results begin in
    memory. Zeros are added such that all begin alike, in the derivatives as well.
    """
    outputs, step = len(weight), ALIKE // rows.element_size()
    more = -rows.shape[2] % step if rows.shape[1:].numel() % step else 0
    beyond = -outputs % step if rows.shape[1] * outputs % step else 0
    if more or beyond:
        rows, weight = F.pad(rows, (0, more)), F.pad(weight, (0, more, 0, beyond))
    products = torch.bmm(rows, weight.t().expand(len(rows), -1, -1))
    return products[..., :outputs].contiguous() if beyond else products


def apply_image_by_image(function: Callable[..., Tensor], images: int, *tensors: Tensor) -> Tensor:
    """A function of tensors ``(images * k, …)``, of each k rows by itself; so its derivatives.

    The order of the sums in a product of matrices depends on where in memory these begin.
    """
    if not images:
        return function(*tensors)
    size = len(tensors[0]) // images
    parts = [[each[i * size : (i + 1) * size] for each in tensors] for i in range(images)]
    done = [Aligned.apply(function(*(Aligned.apply(each) for each in part))) for part in parts]
    return torch.cat(done)


def is_large_product(x: Tensor, outputs: int) -> bool:
    """Whether the product of one image's rows ``(…, k)`` is large enough to be called by itself.

    MKL takes half as long again for a batch of such products, as in a ViT-B/16, as for one after
    the other. Never under a transform of `torch.func`, which knows nothing of the calls below.
    """
    if is_transformed():
        return False
    least = LARGE_PRODUCT if x.dtype == torch.float32 else LARGE_IN_OTHER_TYPES
    return x.device.type == "cpu" and x.numel() * outputs >= least


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, in which tensors are not what they seem."""
    return bool(torch._C._are_functorch_transforms_active())


def apply_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of ``(m, …, k)`` with the bits of m calls, and so its derivatives.

    In one call where that was seen to give these bits.
    """
    if is_joinable(x, weight, bias):
        rows = x.reshape(len(x), -1, x.shape[-1])  # (m, rows, k)
        done: Tensor = LargeProduct.apply(rows, weight, bias)
        return done.view(*x.shape[:-1], -1)

    def multiply(part: Tensor) -> Tensor:
        return F.linear(part.flatten(0, -2), weight, bias).view(*part.shape[:-1], -1)

    return apply_image_by_image(multiply, len(x), x)


def is_joinable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer may be computed by `LargeProduct`, without looking at its shape.

    Its parameters have no derivative there, and where numbers are rounded, other sums could look
    the same in a trial.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in given[1:])
    exact = torch.get_float32_matmul_precision() == "highest"
    is_plain = all(each.dtype == torch.float32 for each in given) and exact
    packed = weight.is_contiguous() or weight.t().is_contiguous()
    is_plain &= packed and type(x) is Tensor
    return is_plain and not learns and not torch.is_autocast_enabled("cpu")


class LargeProduct(autograd.Function):
    """Rows ``(m, rows, k)`` of m images times weights ``(n, k)``, plus a bias ``(n,)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The products ``(m, rows, n)``."""
        ctx.save_for_backward(weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> Any:
        """The derivative for the rows, differentiable itself."""
        (weight,) = ctx.saved_tensors
        # asked for in a batch, as `torch.autograd.grad` does for many outputs at once
        if is_transformed() or is_legacy_batchedtensor(upper[0]):
            return upper[0] @ weight, None, None
        return LargeProduct.apply(upper[0], weight.t(), None), None, None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows ``(m, rows, k)`` times weights ``(n, k)``, with the bits of m products."""
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    if len(x) == 1 or known.are_joined(x, weight, bias):
        return multiply_rows(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)
    return multiply_each(x, weight, bias)


def multiply_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product ``(r, n)`` of rows ``(r, k)``."""
    if bias is None:
        return rows @ weight.t()
    return torch.addmm(bias, rows, weight.t())


def multiply_each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product ``(m, rows, n)`` for each image's rows, each from the start of memory."""
    return torch.stack([multiply_rows(part.clone(), weight, bias) for part in x])


class JoinedShapes:
    """Of which shapes one product of all rows gives the bits of a product for each image.

    Which kernel runs, and hence the order of sums, depends on shapes, threads and places in memory,
    never on values: one trial with noise is enough. It is made when a shape is met for the second
    time. What is found out decides about time alone.
    """

    def __init__(self) -> None:
        self.met: Counter[tuple[Any, ...]] = Counter()
        self.joined: dict[tuple[Any, ...], bool] = {}

    def are_joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the products of m images are one."""
        begin = weight.data_ptr() % ALIGNMENT
        key = (*x.shape, *weight.shape, weight.stride(), begin, bias is None)
        key = (*key, torch.get_num_threads(), torch.backends.mkldnn.enabled)
        if key not in self.joined:
            self.met[key] += 1
            if self.met[key] < PATIENCE:
                return False
            self.joined[key] = try_to_join(x, weight, bias)
        return self.joined[key]


known = JoinedShapes()


def try_to_join(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether one product of noise has the bits of a product for each image, at these shapes."""
    generator = torch.Generator().manual_seed(0)
    images, rows, width = x.shape
    pattern = torch.randn(PATTERN, width, generator=generator)
    noise = pattern[torch.arange(images * rows) % PATTERN].view(images, rows, width)
    room = torch.randn(weight.numel() + ALIGNMENT, generator=generator)
    begin = (weight.data_ptr() - room.data_ptr()) % ALIGNMENT // room.element_size()
    likeness = room.as_strided(weight.shape, weight.stride(), begin)  # begins where weights do
    shift = None if bias is None else torch.randn(len(bias), generator=generator)
    together = multiply_rows(noise.flatten(0, 1), likeness, shift)
    return torch.equal(together.view(images, rows, -1), multiply_each(noise, likeness, shift))
