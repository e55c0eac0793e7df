"""Output that the READMEs show: made by the commands that stand beside it.

A block is marked by a comment above it, ``<!-- output: COMMAND | until: TEXT -->``: what COMMAND
prints at 80 columns, up to the first line with TEXT. `python tests/pasted.py` makes them anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("attacks", "defenses", "reports")),
        *(ROOT / "robusteval").glob("*/README.md"),
    ]
)
BLOCK = re.compile(
    r"<!-- output: (?P<command>.*?)(?: \| until: (?P<until>.*?))? -->\n```\n(?P<text>.*?)\n```\n",
    re.DOTALL,
)


class Pasted(NamedTuple):
    """A block of output in a page."""

    page: Path
    command: str
    until: str | None
    text: str


def find_pasted(page: Path) -> Iterator[Pasted]:
    """The marked blocks of a page."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Pasted(page, found["command"], found["until"], found["text"])


def print_output(command: str, until: str | None) -> str:
    """What a command prints at 80 columns, up to the first line with a text."""
    words = command.split()
    assert words[0] == "robusteval", command
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
            cwd=folder,
            env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    last = next((i for i, line in enumerate(lines) if until and until in line), len(lines))
    return "\n".join(lines[:last]).strip("\n")


def main() -> None:
    """Write every block anew."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in find_pasted(page):
            text = text.replace(block.text, print_output(block.command, block.until))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
