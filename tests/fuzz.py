"""Bytes and JSON values with a few things changed, as strategies of Hypothesis."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

EDGES = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (
    *("", "a", "linf", "pgd:eps=8/255", "\x1b[31m::error::x\n", "\u202e|<b>", "../../up", "\x00"),
    *("0" * 64, "9" * 400, "[[", "{", '"', "nan", "1e999", "-1", "0.5", "true", ",", "\r\n", "="),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((-1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, -(10**20))),
    st.sampled_from((-1.5, 0.0, 0.5, 1.0, 1e-300, 1e300)),
    st.sampled_from(WORDS),
)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.dictionaries(st.sampled_from(WORDS[:7]), PLAIN, max_size=2),
)


class Sound(bytes):
    """A sound file, which is not spelled out where a strategy is named."""

    def __repr__(self) -> str:
        return f"Sound({len(self)} bytes)"


@st.composite
def change_bytes(draw: st.DrawFn, base: bytes, most: int = 4) -> bytes:
    """The bytes with one to `most` changes: bits, numbers, pieces cut out, moved or repeated."""
    content = bytearray(base)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((1, 2, 4, 8, 30, 200)))
        piece = bytes(content[at : at + length])
        kind = draw(st.sampled_from(("bits", "number", "cut", "repeat", "insert", "end", "move")))
        if kind == "bits" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            size = min(length, 8)
            value = draw(st.sampled_from(EDGES)) % 256**size
            content[at : at + size] = value.to_bytes(size, "little")
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = piece * draw(st.sampled_from((1, 2, 50)))
        elif kind == "insert":
            content[at:at] = draw(st.sampled_from(WORDS)).encode()
        elif kind == "end":
            del content[at:]
        else:
            del content[at : at + length]
            to = draw(st.integers(0, len(content)))
            content[to:to] = piece
    return bytes(content)


@st.composite
def change_json(draw: st.DrawFn, base: Any, most: int = 3) -> Any:
    """The value with one to `most` parts replaced, taken out, or doubled."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        places = list(list_places(value))
        if not places:
            return draw(VALUES)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "more")))
        if kind == "replace":
            holder[key] = draw(VALUES)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[draw(st.sampled_from(WORDS))] = holder[key]
    return value


def list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All tables and lists with the keys of what they hold."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield value, key
        if isinstance(each, dict | list):
            yield from list_places(each)


def read_members(content: bytes) -> dict[str, bytes]:
    """The members of a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(members: dict[str, bytes]) -> bytes:
    """A zip file of these members, with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@st.composite
def change_archive(draw: st.DrawFn, base: bytes) -> bytes:
    """A zip file with other bytes, or a sound one with other members."""
    if draw(st.booleans()):
        return draw(change_bytes(base))
    members = read_members(base)
    name = draw(st.sampled_from(sorted(members)))
    kind = draw(st.sampled_from(("change", "change", "remove", "rename", "exchange")))
    content = members.pop(name)
    if kind == "change":
        members[name] = draw(change_bytes(content))
    elif kind == "rename":
        members[draw(st.sampled_from(("x.npy", "../y.npy", "net/data/7")))] = content
    elif kind == "exchange" and members:
        other = draw(st.sampled_from(sorted(members)))
        members[name], members[other] = members[other], content
    return write_members(members)


@st.composite
def change_safetensors(draw: st.DrawFn, base: bytes) -> bytes:
    """A safetensors file with other bytes, or a header of other values."""
    if draw(st.booleans()):
        return draw(change_bytes(base))
    end = 8 + int.from_bytes(base[:8], "little")
    header = draw(change_json(json.loads(base[8:end])))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + base[end:]
