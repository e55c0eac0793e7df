"""Types of what a record says freely: of model, data, settings, defenses and maps.

Everything here may be absent; what is there must be of its kind, so that whatever lays it out can
rely on that. What no one knows of is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]

DEEPEST = 60  # tables within tables
LONGEST = 10.0**11  # seconds, of which time is not counted


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true is none."""
    return type(value) in (int, float) and abs(value) < math.inf


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 up."""
    return type(value) is int and 0 <= value < 2**63


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_time(value: Any) -> bool:
    """Whether a value is a number of seconds."""
    return is_number(value) and 0 <= value < LONGEST


def is_rate(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_plain(value: Any) -> bool:
    """Whether a value is a parameter as a user writes it: a text, a number, true or false."""
    return is_text(value) or is_flag(value) or is_number(value)


def is_dict(value: Any) -> bool:
    """Whether a value is a table."""
    return isinstance(value, dict)


def each(test: Test) -> Test:
    """Whether a value is a list of these."""
    return lambda value: isinstance(value, list | tuple) and all(map(test, value))


def is_range(value: Any) -> bool:
    """Whether a value is a least and a largest number."""
    return each(is_number)(value) and len(value) == 2


MODEL: dict[str, Test] = {
    **dict.fromkeys(
        (
            *("file", "sha256", "arch", "weights", "reading", "outputs", "normalisation"),
            *("dtype", "precision"),
        ),
        is_text,
    ),
    **dict.fromkeys(("mean", "std"), each(is_number)),
    "num_classes": is_count,
}
DATA: dict[str, Test] = {
    **dict.fromkeys(("name", "sha256", "transform", "labels"), is_text),
    **dict.fromkeys(("total", "samples"), is_count),
    "shape": each(is_count),
    "range": is_range,
    "class_names": each(is_text),
}
CONFIG: dict[str, Test] = {
    **dict.fromkeys(("attacks", "cells", "defenses", "interpreters"), each(is_text)),
    **dict.fromkeys(("samples", "seed"), is_count),
    "probes": is_flag,
    "command": is_text,
    "shard": is_text,
    "resolved": each(is_dict),
    "shields": each(lambda value: True),
    "maps": is_dict,
    "shortcuts": lambda value: is_dict(value) and all(map(is_text, value.values())),
    "slices": is_dict,
}
DEFENSE: dict[str, Test] = {
    **dict.fromkeys(("forwards", "threshold"), is_number),
    "fpr": is_rate,
    **dict.fromkeys(("sha256", "arch", "dtype"), is_text),
}
MAPS: dict[str, Test] = {
    **dict.fromkeys(("top", "edge"), is_rate),
    "interpreters": each(is_dict),
}
INTERPRETER: dict[str, Test] = {
    **dict.fromkeys(("spec", "name", "layer"), is_text),
    **dict.fromkeys(("stretched", "seeded"), is_flag),
    "parameters": is_dict,
    "alike": each(is_text),
}


def check_facts(facts: Mapping[str, Any], kinds: Mapping[str, Test], title: str) -> None:
    """ValueError if something that is there is not of its kind; None counts as absent."""
    for name, test in kinds.items():
        value = facts.get(name)
        if value is not None and not test(value):
            raise ValueError(f"{title} has a {name} of another kind")


def check_maps(maps: Any) -> None:
    """Whether a value says what was measured of maps; nothing in it may be absent."""
    if not maps:
        return
    check_all(maps, MAPS, "the setting maps")
    for facts in maps["interpreters"]:
        check_all(facts, INTERPRETER, "an interpreter")
    specs = [facts["spec"] for facts in maps["interpreters"]]
    if not specs:
        raise ValueError("the setting maps names no interpreter")
    if len(set(specs)) < len(specs):
        raise ValueError("an interpreter is there twice")


def check_all(facts: Any, kinds: Mapping[str, Test], title: str) -> None:
    """ValueError if one of these is absent or not of its kind."""
    if not isinstance(facts, dict):
        raise ValueError(f"{title} is no table")
    for name, test in kinds.items():
        if not test(facts.get(name)):
            raise ValueError(f"{title} has no {name}, or one of another kind")


def check_depth(value: Any) -> None:
    """ValueError if tables and lists are nested deeper than anything that we write."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")
