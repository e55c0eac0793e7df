"""A file of PyTorch is read as torch reads it, and its tensors share the memory of its bytes."""

import io
import zipfile
from typing import Any

import pytest
import torch
from torch import Tensor

from robusteval.models.archive import Buffer
from robusteval.models.weights import parse_tensors

BASE = torch.arange(24.0).view(4, 6)
CONTENTS: dict[str, Any] = {
    "plain": {"a": BASE, "n": 3, "s": "text"},
    "views of one": {"a": BASE, "row": BASE[1], "turned": BASE.t(), "step": BASE[::2, 1::3]},
    "nothing": {"a": torch.zeros(0, 3), "scalar": torch.tensor(2.5)},
    "types": {
        str(kind): torch.arange(4).to(kind)
        for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
    },
    "parameter": torch.nn.Parameter(BASE),
    "pair": (BASE, torch.arange(4)),
}


def save(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return type(a) is type(b) and alike and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_content_is_what_torch_reads(name: str, kind: type) -> None:
    raw = save(CONTENTS[name])

    found, _ = parse_tensors(kind(raw), "x.pt")
    assert same(found, torch.load(io.BytesIO(raw), weights_only=True))


def test_tensors_share_the_memory_of_the_file() -> None:
    raw = bytearray(save({"a": BASE}))
    found = parse_tensors(raw, "x.pt")[0]["a"]
    place = raw.index(BASE.numpy().tobytes())
    raw[place : place + 4] = b"\0\0\x80\xbf"

    assert float(found[0, 0]) == -1.0


def pack(raw: bytes, order: bytes | None = None) -> bytes:
    """The same archive with its entries packed, or with another byte order stated."""
    out = io.BytesIO()
    how = zipfile.ZIP_STORED if order else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", how) as new:
        for entry in old.namelist():
            content = old.read(entry)
            new.writestr(entry, order if order and entry.endswith("byteorder") else content)
    return out.getvalue()


@pytest.mark.parametrize("order", [None, b"big"])
def test_what_cannot_be_viewed_is_read_by_torch(order: bytes | None) -> None:
    raw = pack(save({"a": BASE}), order)

    found = parse_tensors(raw, "x.pt")[0]
    assert same(found, torch.load(io.BytesIO(raw), weights_only=True))


def test_buffer_is_a_file() -> None:
    file = Buffer(b"0123456789")

    assert file.read(3) == b"012"
    assert (file.seek(-2, io.SEEK_END), file.read()) == (8, b"89")
    assert (file.seek(20), file.read(1)) == (20, b"")
    assert file.seek(-3, io.SEEK_CUR) == 17
