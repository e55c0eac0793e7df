"""Typed records from plain JSON types and back: a missing, unknown or mistyped key is an error."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Typed = TypeVar("Typed")


def to_plain(value: Any) -> Any:
    """A record of dataclasses as dicts, in the order of their fields, and tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Typed], value: Any) -> Typed:
    """The dataclass `kind`, and those inside it, from plain JSON types: the reverse of `to_plain`.

    Numbers stay as they are, so that what is written again is the same text. ValueError with the
    path of the first key that is missing, unknown or of another type.
    """
    made: Typed = build_value(kind, value, kind.__name__)
    return made


@cache
def read_hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass."""
    return get_type_hints(kind)


def build_value(kind: Any, value: Any, path: str) -> Any:
    """A value as a type says, which a dataclass, `Any`, a plain type, or a container of them is."""
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (each for each in inner if each is not type(None))
        return build_value(kind, value, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(build_value(inner[0], each, f"{path}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: build_value(inner[1], each, f"{path}.{key}") for key, each in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = read_hints(kind)
        for key in (*value, *hints):
            if key not in hints or key not in value:
                raise ValueError(f"{path}.{key} is {'missing' if key in hints else 'unknown'}")
        made = {key: build_value(hint, value[key], f"{path}.{key}") for key, hint in hints.items()}
        return kind(**made)
    accepted = (int, float) if kind is float else kind
    if origin is None and isinstance(value, accepted):
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{path} is {value!r}, not of type {kind.__name__}")
        return value
    raise ValueError(f"{path} is {value!r}, not of type {getattr(kind, '__name__', kind)}")
