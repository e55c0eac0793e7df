"""How far a long job is: bars on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress(Protocol):
    """Where a long job says how far it is."""

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` images starts."""

    def advance(self, n: int) -> None:
        """So many more images are done."""

    def end(self) -> None:
        """The stage is over."""

    def say(self, text: str) -> None:
        """A line for the reader."""


class Silent:
    """Says nothing."""

    def begin(self, what: str, total: int) -> None:
        """Say nothing."""

    def advance(self, n: int) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""


class Bars:
    """Progress for people; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.bars = rich_progress.Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bars.add_task("Loading", total=None, visible=True)
        self.what, self.total, self.done = "", 0, 0
        self.told = time.monotonic()

    def __enter__(self) -> Bars:
        if self.live:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live:
            self.bars.stop()

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` images starts."""
        self.what, self.total, self.done = what, total, 0
        self.bars.reset(self.task, description=short(what), total=total or None, visible=True)

    def advance(self, n: int = 1) -> None:
        """So many more images are done."""
        self.done += n
        self.bars.advance(self.task, n)
        if not self.live and time.monotonic() - self.told > PLAIN_EVERY:
            self.say(f"{self.what}: {self.done} of {self.total}")

    def end(self) -> None:
        """The stage is over."""
        self.bars.update(self.task, visible=False)
        if not self.live and self.done:
            self.say(f"{self.what}: done")

    def say(self, text: str) -> None:
        """A line for the reader."""
        self.told = time.monotonic()
        self.console.print(Text(text), soft_wrap=True)


def short(text: str, width: int = 34) -> str:
    """The text cut to a width, the cut shown."""
    return text if len(text) <= width else text[: width - 1] + "…"
