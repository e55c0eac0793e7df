"""Which axis of a tensor inside a network holds the channels, and whether all goes through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

Layout = Literal["first", "last"]  # (n, channels, h, w) or (n, h, w, channels)

CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)
# attention mixes places: what comes after it are no features of a place
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MOVING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
# what gives axes another meaning, unless the shape stays
FOLDING = {"view", "reshape", "view_as", "reshape_as", "unflatten", "squeeze", "unsqueeze"}
FOLDING |= {"expand", "stack", "einsum", "__get__"}
PRODUCTS = {"linear", "matmul", "bmm", "__matmul__", "mm"}  # over the last axis
SIZES: dict[Layout, tuple[int, ...]] = {"first": (2, 3, 4, 5), "last": (2, 4, 5, 3)}


class Layouts:
    """Remembers the layout of tensors that come from a convolution, function by function."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def find(self, tensor: Tensor) -> Layout | None:
        """The layout of a tensor, if it is known."""
        layout: Layout | None = self._known.get(tensor)
        return layout

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Take note of a function that was called."""
        sources = [t for t in list_tensors((args, kwargs)) if t.ndim == 4]
        layouts: set[Layout] = {known for t in sources if (known := self.find(t)) is not None}
        for made in list_tensors(output):
            if made.ndim != 4:
                continue
            layout: Layout | None = None
            if func in CONVOLUTIONS:
                layout = "first"
            elif len(layouts) == 1:
                same = any(made.shape == t.shape for t in sources)
                layout = follow_layout(func, args, kwargs, next(iter(layouts)), same=same)
            if layout is not None:
                self._known[made] = layout
            elif made in self._known:
                del self._known[made]


def list_tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, also in lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from list_tensors(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from list_tensors(value)


def follow_layout(
    func: Any, args: tuple[Any, ...], kwargs: Any, layout: Layout, *, same: bool
) -> Layout | None:
    """The layout after a function; `same` says whether the shape stayed."""
    name = getattr(func, "__name__", "")
    if name in MOVING:
        if not args:
            return None
        sizes = tuple(func(torch.empty(SIZES[layout], device="meta"), *args[1:], **kwargs).shape)
        # rows and columns swapped are no layout
        return next((kind for kind, known in SIZES.items() if known == sizes), None)
    if name in FOLDING:
        return layout if same else None
    if name in PRODUCTS:
        return layout if layout == "last" else None
    return layout


def put_channels_first(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor as ``(n, channels, h, w)``."""
    return tensor.permute(0, 3, 1, 2) if layout == "last" else tensor


def measure_extent(tensor: Tensor, layout: Layout) -> tuple[int, int]:
    """Height and width of feature maps."""
    height, width = put_channels_first(tensor, layout).shape[2:]
    return height, width
