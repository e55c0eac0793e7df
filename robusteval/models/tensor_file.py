"""Images and labels as tensors in a file of PyTorch or safetensors, opened as weights are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import Span, convert_to_array
from robusteval.datasets.dataset import ArraySource
from robusteval.datasets.npz import NPZ_KEYS
from robusteval.errors import UsageError
from robusteval.models.built import escape
from robusteval.models.weights import check_plain_tensors, parse_tensors, read_checkpoint_file
from robusteval.registry import DATA_SOURCES

MORE_KEYS = (("data", "targets"), ("data", "labels"), ("inputs", "targets"), ("inputs", "labels"))
MOST_LISTED = 6  # keys, in a message


@DATA_SOURCES.add("tensors", suffix=(".pt", ".pth", ".safetensors"), written="FILE.pt")
def open_tensors(
    path: Path, split: str, bands: int | None = None, span: Span | None = None
) -> ArraySource:
    """tensors x and y, by name or as a pair; nothing in the file is executed."""
    raw = read_checkpoint_file(path)
    content, _ = parse_tensors(raw, path.name)
    x, y, name = _find_pair(content, split, path)
    check_plain_tensors({"x": x, "y": y}, len(raw), path.name)
    # NumPy has neither bfloat16 nor the floats of 8 bits
    small = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    x, y = (t.float() if t.dtype in small else t for t in (x, y))
    arrays = convert_to_array(x.contiguous()), convert_to_array(y)
    return build_array_source(f"{path.name} ({name})", *arrays, bands=bands, span=span)


def _find_pair(content: Any, split: str, path: Path) -> tuple[Tensor, Tensor, str]:
    """Images, labels, and what the images are called."""
    if isinstance(content, tuple | list) and len(content) in (2, 3):
        x, y = content[:2]  # data sets of torchvision keep a third part
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x, y, "the first of a pair"
    pairs = (*NPZ_KEYS[split], *MORE_KEYS)
    if isinstance(content, Mapping):
        for x, y in pairs:
            if isinstance(content.get(x), Tensor) and isinstance(content.get(y), Tensor):
                return content[x], content[y], x
    keys = [escape(str(key)) for key in content] if isinstance(content, Mapping) else []
    found = ", ".join(keys[:MOST_LISTED]) or type(content).__name__
    wanted = ", ".join("/".join(pair) for pair in pairs)
    raise UsageError(
        f"{path} holds no images with labels but {found}: save a pair (x, y) of tensors, or a dict"
        f" with one of the pairs {wanted}"
    )
