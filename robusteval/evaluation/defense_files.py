"""Files as arguments: what one stands for, and what of its path a report shows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.registry import DEFENSES, parse
from robusteval.runs.reading import RECORD, WEIGHTS, check_regular, open_regular, raise_limit
from robusteval.runs.types import Spec


def parse_defense(text: str) -> Spec:
    """Parse a spec, or make the one that stands for a file."""
    path = Path(text)
    if not os.path.isdir(path):
        check_regular(path, WEIGHTS)
    if not os.path.isfile(path):
        if path.suffix and text.partition(":")[0] not in DEFENSES.entries:
            raise UsageError(f"there is no file {text}; `robusteval list defenses` shows the forms")
        return parse(text)
    return Spec("detector" if is_detector(path) else "checkpoint", {"file": text})


def is_detector(path: Path) -> bool:
    """Whether a file is one that `robusteval defend detector` wrote, by its first bytes."""
    with open_regular(path, WEIGHTS) as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= raise_limit(RECORD) else b""
    try:
        return "detector" in json.loads(text)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def hide_folder(value: Any) -> Any:
    """Take the folder of a file out of a parameter: it is of no concern to a reader."""
    if not isinstance(value, str):
        return value
    head, suffix, function = value.partition(".py:")
    if suffix:
        return Path(head).name + suffix + function
    return Path(value).name if os.path.isfile(value) else value
