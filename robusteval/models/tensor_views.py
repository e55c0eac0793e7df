"""The tensors of a safetensors file as views of its bytes, so that it is in memory once."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NOTES = "__metadata__"
MOST_AXES = 64  # as torch has; a product of many sizes would take the square of their number


def view_tensors(raw: bytes | bytearray) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file and its header; they share the memory of `raw`.

    The format is that of https://huggingface.co/docs/safetensors: eight bytes with the length of
    a JSON header, the header, and the tensors one behind the other without holes.

    Raises
    ------
    ValueError, TypeError, KeyError
        The file is not of this form.
    """
    begin = 8 + int.from_bytes(raw[:8], "little")
    if begin > len(raw):
        raise ValueError("the header is longer than the file")
    header = json.loads(raw[8:begin], object_pairs_hook=_refuse_twice)
    notes = header.get(NOTES, {})
    if not isinstance(notes, dict) or not all(isinstance(n, str) for n in notes.values()):
        raise ValueError("notes are texts")
    entries = [(name, entry) for name, entry in header.items() if name != NOTES]
    entries.sort(key=lambda item: tuple(item[1]["data_offsets"]))
    place, tensors = 0, {}
    for name, entry in entries:
        kind, shape, (start, end) = TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
        if len(shape) > MOST_AXES or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("sizes are a few whole numbers")
        count = math.prod(shape)
        if start != place or end - start != count * kind.itemsize:
            raise ValueError("tensors stand one behind the other")
        place = end
        if begin + end > len(raw):
            raise ValueError("the file is cut short")
        tensors[name] = _view(raw, kind, count, begin + start).view(shape)
    if begin + place != len(raw):
        raise ValueError("something stands behind the tensors")
    return tensors, header


def _view(raw: bytes | bytearray, kind: torch.dtype, count: int, offset: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=kind)
    with warnings.catch_warnings(action="ignore"):  # that bytes cannot be written to
        return torch.frombuffer(raw, dtype=kind, count=count, offset=offset)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice")
    return made
