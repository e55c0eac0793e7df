"""Typed records from JSON and back: nothing is lost, and nothing that does not fit is taken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from robusteval.runs.plain import from_plain, to_plain


@dataclass(frozen=True)
class Part:
    share: float
    name: str | None


@dataclass(frozen=True)
class Whole:
    count: int
    sure: bool
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    rest: Any


PLAIN = {
    "count": 3,
    "sure": True,
    "parts": [{"share": 1, "name": None}, {"share": 0.5, "name": "x"}],
    "by_name": {"a": {"share": 0.25, "name": "y"}},
    "rest": {"anything": [1, None]},
}


def test_there_and_back_is_the_same_text() -> None:
    """Whole numbers among floats stay whole."""
    made = from_plain(Whole, PLAIN)

    assert made.parts[1] == Part(0.5, "x")
    assert json.dumps(PLAIN) == json.dumps(to_plain(made))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": "3"}, "Whole.count is '3', not of type int"),
        ({"count": True}, "Whole.count is True, not of type int"),
        ({"sure": 1}, "Whole.sure is 1, not of type bool"),
        ({"sure": None}, "Whole.sure is None"),
        ({"more": 1}, "Whole.more is unknown"),
        ({"parts": [{"share": 1}]}, r"Whole.parts\[0\].name is missing"),
        ({"parts": 7}, "Whole.parts is 7"),
        ({"by_name": {"a": {"share": "1", "name": None}}}, "Whole.by_name.a.share is '1'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_plain(Whole, {**PLAIN, **change})
