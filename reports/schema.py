"""The JSON Schema of reports, generated from the classes of their records.

``python -m robusteval.reports.schema`` prints what belongs into ``report.schema.json``; a test says
when that file is stale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .measures import Limits
from .record import RunRecord, RunRecords

Node = dict[str, Any]
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
HEAD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "urn:robusteval:report:1",
    "title": "Report of robusteval",
    "description": (
        "The record of one run, or of several. Numbers that are not finite are null; shares are of"
        " 1; radii and distances in units of the [0, 1] pixel range, l0 in values."
    ),
}


def build_schema() -> Node:
    """The schema of one record or of several, draft 2020-12."""
    definitions: Node = {}
    either = [describe_type(kind, definitions) for kind in (RunRecord, RunRecords)]
    return {**HEAD, "anyOf": either, "$defs": definitions}


def describe_type(kind: Any, definitions: Node) -> Node:
    """The schema of values of one type.

    Parameters
    ----------
    kind : type
        A plain type, a dataclass, a tuple, a mapping with text as keys, a `Literal`, a union, or
        one of them in `Annotated` with `Limits` and a description.
    definitions : dict
        Takes the schemas of dataclasses, by name.

    Raises
    ------
    TypeError
        For any other type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        node = describe_type(parts[0], definitions)
        for said in parts[1:]:
            node = node | (said.keywords if isinstance(said, Limits) else {"description": said})
        return node
    if origin in (Union, UnionType):
        return join_types([describe_type(part, definitions) for part in parts])
    if origin is Literal:
        return {"const": parts[0]} if len(parts) == 1 else {"enum": list(parts)}
    if origin is tuple:
        return describe_tuple(parts, definitions)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        free = parts[1] is Any
        items = {} if free else {"additionalProperties": describe_type(parts[1], definitions)}
        return {"type": "object", **items}
    if is_dataclass(kind) and isinstance(kind, type):
        return refer_to(kind, definitions)
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    raise TypeError(f"a record cannot hold {kind}")


def join_types(nodes: list[Node]) -> Node:
    """The schema of values that fit one of these; of plain ones as one list of types."""
    if any(node.get("type") not in PLAIN.values() for node in nodes):
        return {"anyOf": nodes}
    merged: Node = {}
    for node in nodes:
        merged |= node
    return {**merged, "type": [node["type"] for node in nodes]}


def describe_tuple(parts: tuple[Any, ...], definitions: Node) -> Node:
    """The schema of a list of any length ``tuple[X, ...]``, or of equal items ``tuple[X, X]``."""
    length = {} if parts[1:] == (...,) else {"minItems": len(parts), "maxItems": len(parts)}
    if length and len(set(parts)) > 1:
        raise TypeError(f"a record cannot hold a list of {parts}")
    return {"type": "array", "items": describe_type(parts[0], definitions), **length}


def refer_to(kind: type, definitions: Node) -> Node:
    """A reference to a dataclass, which is defined where it is not yet."""
    name = kind.__name__
    if name not in definitions:
        hints = get_type_hints(kind, include_extras=True)
        shown = [entry.name for entry in fields(kind) if entry.metadata.get("json", True)]
        definitions[name] = {}  # keeps its place before those it refers to
        definitions[name] |= {
            "type": "object",
            "description": (kind.__doc__ or "").partition("\n")[0].rstrip("."),
            "properties": {entry: describe_type(hints[entry], definitions) for entry in shown},
            "required": shown,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def to_text() -> str:
    """The schema as the text of its file."""
    return json.dumps(build_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(to_text(), end="")
