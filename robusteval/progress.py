"""How far a long job is: bars on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from types import TracebackType
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from robusteval.errors import UsageError
from robusteval.runs.types import spell_line

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
NOTEBOOK_EVERY = 0.3  # seconds between changes of a bar in a notebook
WIDE = 80  # columns a bar and the time left need
PROGRESS = ("begin", "advance", "end", "say")  # what `Progress` can do
SLOWEST = 3600.0  # seconds between steps from which the time left can still be told


class Progress(Protocol):
    """Where a long job says how far it is."""

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` images starts."""

    def advance(self, n: int) -> None:
        """So many more images are done."""

    def estimate(self, done: float, where: str) -> None:
        """Of the images under way about so many are done, in this part of the work (or "").

        What `advance` says next is in place of it.
        """

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

    def estimate(self, done: float, where: str) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""


@contextmanager
def open_progress(progress: Progress | bool | None) -> Iterator[Progress]:
    """Where a call from Python says how far it is: True for bars on stderr, None for nowhere.

    UsageError for what is neither, nor has the methods of `Progress`.
    """
    if progress is True:
        with Bars(Stderr()) as bars:
            yield bars
    elif progress is None or progress is False:
        yield Silent()
    elif all(callable(getattr(progress, name, None)) for name in PROGRESS):
        yield progress
    else:
        raise UsageError(
            f"progress cannot be {type(progress).__name__}: give True for bars on stderr, or an"
            f" object with the methods {', '.join(PROGRESS)}"
        )


class Stderr(Console):
    """The console for progress: a job goes on when nobody reads about it any more."""

    def __init__(self) -> None:
        # this very stream: while an attack of ART runs, `sys.stderr` leads nowhere
        super().__init__(file=sys.stderr)

    def on_broken_pipe(self) -> None:
        """Say no more; rich would end the process."""
        self.quiet = True


class Count(MofNCompleteColumn):
    """How many of how many, once that is known."""

    def render(self, task: Task) -> Text:
        """The two numbers, or nothing."""
        return Text() if task.total is None else super().render(task)


class NotebookBar:
    """A bar below the cell of a notebook, changed in place.

    By what every front end knows, where rich's own bars need ipywidgets.
    """

    def __init__(self) -> None:
        self.display = import_module("IPython.display").display
        self.id = uuid.uuid4().hex
        self.there, self.told = False, 0.0

    def draw(self, what: str, done: float, total: int, *, now: bool) -> None:
        """Show how much is done; unless `now`, no more often than can be followed."""
        if not now and time.monotonic() - self.told < NOTEBOOK_EVERY:
            return
        count = f"{int(done):,} of {total:,}" if total else ""
        bar = f'max="{total}" value="{min(done, total):.6g}"' if total else ""
        self.put(f"<progress {bar}></progress> {escape(what)} {count}", f"{what} {count}".strip())

    def put(self, html: str, text: str) -> None:
        """Place it, or change what is there."""
        bundle = {"text/html": html, "text/plain": text}
        self.display(bundle, raw=True, display_id=self.id, update=self.there)
        self.there, self.told = True, time.monotonic()

    def clear(self) -> None:
        """Leave nothing behind."""
        if self.there:
            self.put("", "")


class Bars:
    """Progress for people; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.below = NotebookBar() if console.is_jupyter else None
        wide = console.width >= WIDE
        fixed = Column(no_wrap=True)
        columns = [
            SpinnerColumn(table_column=fixed),
            TextColumn("{task.description}", markup=False),
            *([BarColumn(bar_width=20, table_column=fixed)] if wide else []),
            Count(table_column=fixed),
            TimeElapsedColumn(table_column=fixed),
            *([TimeRemainingColumn(table_column=fixed)] if wide else []),
        ]
        self.bars = rich_progress.Progress(
            *columns, console=console, transient=True, speed_estimate_period=SLOWEST
        )
        self.task = self.bars.add_task("Loading", total=None)
        # between spinner, bar, count and times
        self.room = max(console.width - (52 if wide else 22), 10)
        self.what, self.where, self.total, self.done = "", "", 0, 0
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
        if self.below:
            self.below.clear()

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` images starts."""
        self.what, self.where, self.total, self.done = what, "", total, 0
        self.show(short(spell_line(what), self.room), total or None)

    def show(self, description: str, total: int | None) -> None:
        """A new bar in place of the one there is."""
        self.bars.remove_task(self.task)
        self.task = self.bars.add_task(description, total=total)
        if self.below:
            self.below.draw(description, 0, total or 0, now=True)

    def advance(self, n: int = 1) -> None:
        """So many more images are done."""
        self.done += n
        self.move(self.done, "")

    def estimate(self, done: float, where: str) -> None:
        """Of the images under way about so many are done, in this part of the work (or "")."""
        self.move(self.done + done, where)

    def move(self, done: float, where: str) -> None:
        """Show how much of the stage is done."""
        if where != self.where:
            self.where = where
            what = spell_line(self.what)
            if where:  # which is what changes: rather cut the name
                where = short(f", {spell_line(where)}", self.room - min(len(what), 6))
            self.bars.update(self.task, description=short(what, self.room - len(where)) + where)
        self.bars.update(self.task, completed=done)
        if self.below:
            stage = f", {self.where}" if self.where else ""
            self.below.draw(spell_line(self.what + stage), done, self.total, now=False)
        elif not self.live and time.monotonic() - self.told > PLAIN_EVERY:
            stage = f", {self.where}" if self.where else ""
            self.say(f"{self.what}: {int(done)} of {self.total}{stage}")

    def end(self) -> None:
        """The stage is over; what comes before the next one must not look like standstill."""
        if not (self.live or self.below) and self.done and self.done >= self.total:
            self.say(f"{self.what}: done")
        self.show("Preparing", None)

    def say(self, text: str) -> None:
        """A line for the reader."""
        self.told = time.monotonic()
        self.console.print(Text(spell_line(text)), soft_wrap=True)


def short(text: str, width: int) -> str:
    """The text cut to a width, the cut shown."""
    return text if len(text) <= width else text[: width - 1] + "…"
