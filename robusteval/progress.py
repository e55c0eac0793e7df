"""How far a long job is: bars on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib import import_module
from types import TracebackType
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console, RenderableType
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


class Course:
    """A job of several stages as a whole: how many are done, and about how long the rest takes.

    The stage under way goes on at its own pace, those that come at that of all before them, in
    seconds for a pass of an image.
    """

    def __init__(self) -> None:
        self.coming: dict[str, float | None] = {}  # stages by name: passes of images, if known
        self.is_foreseen = False  # or nobody has said what comes
        self.done = 0  # stages
        self.name = ""  # of the one under way; empty between two
        self.cost: float | None = None  # of that one
        self.began = 0.0
        self.total, self.images, self.taken = 0, 0.0, 0  # of it; taken over from an earlier call
        self.paces: list[tuple[float, float]] = []  # seconds and passes of those that are done

    def foresee(self, stages: Mapping[str, float | None]) -> None:
        """These come, in this order, with so many passes of images each, None where unknown.

        0 of what is short, and no measure of what comes. If the first of them was foreseen, the
        others come right after it.
        """
        first = next(iter(stages), None)
        if first in self.coming:
            names = list(self.coming)
            names = [each for each in names[: names.index(first)] if each not in stages]
            before = {each: self.coming[each] for each in names}
            self.coming = before | dict(stages) | (self.coming | dict(stages))
        else:
            self.coming |= stages
        self.is_foreseen |= bool(stages)

    def begin(self, name: str, total: int) -> None:
        """A stage begins; those that should have come before it had nothing left to do."""
        self.name, self.cost = name, None
        if name in self.coming:
            for earlier in list(self.coming):
                cost = self.coming.pop(earlier)
                if earlier == name:
                    self.cost = cost
                    break
        self.began = time.monotonic()
        self.total, self.images, self.taken = total, 0.0, 0

    def end(self) -> None:
        """The stage is over."""
        self.paces += self.measure_pace()
        self.done += bool(self.name)
        self.name = ""

    def measure_work(self) -> tuple[float, float]:
        """Seconds that the stage under way has taken, and images that were worked on."""
        return time.monotonic() - self.began, self.images - self.taken

    def measure_pace(self) -> list[tuple[float, float]]:
        """Seconds and passes of the stage under way; none where its cost is not known."""
        spent, worked = self.measure_work()
        if not self.name or not self.cost or worked <= 0:
            return []
        return [(spent, self.cost * worked / max(self.total, 1))]

    def estimate_left(self) -> float | None:
        """Seconds until all is done; None where nobody knows."""
        spent, worked = self.measure_work()
        if self.name and worked < 1:  # by estimate: too early
            return None
        left = spent / worked * (self.total - self.images) if self.name else 0.0
        known = [cost for cost in self.coming.values() if cost is not None]
        if len(known) < len(self.coming):
            return None
        coming = sum(known)
        paces = self.paces + self.measure_pace()
        passes = sum(passes for _, passes in paces)
        if coming and not passes:
            return None
        return left + (sum(seconds for seconds, _ in paces) / passes * coming if coming else 0.0)

    def describe(self) -> str:
        """All that in a few words; empty of a job of one stage, or of nobody knows how many."""
        stages = self.done + bool(self.name) + len(self.coming)
        if stages < 2 or not self.is_foreseen:
            return ""
        words = [f"{self.done} of {stages} parts done"]
        spent, worked = self.measure_work()
        if self.name and worked > 0 and spent >= 1:
            pace = worked / spent  # also of images done by estimate
            words.append(f"{pace:,.0f} images/s" if pace >= 10 else f"{pace:.2g} images/s")
        left = self.estimate_left()
        if left is not None and spent >= 1:
            words.append(f"{write_estimate(left)} left")
        return f"whole run: {', '.join(words)}"


def write_estimate(seconds: float) -> str:
    """A duration as people say it beforehand: ``about 12 minutes``."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 90:
        return f"about {round(minutes)} minute" + ("" if round(minutes) == 1 else "s")
    hours = minutes / 60
    return f"about {hours:.0f} hours" if hours < 48 else f"about {hours / 24:.0f} days"


def foresee(progress: Progress, stages: Mapping[str, float | None]) -> None:
    """Say which stages come, as `Course.foresee`, to whom that can be said."""
    hear = getattr(progress, "foresee", None)
    if hear is not None:
        hear(stages)


def take_over(progress: Progress, n: int) -> None:
    """So many images of a stage were done by an earlier call: they say nothing of the pace."""
    hear = getattr(progress, "take_over", progress.advance)
    hear(n)


class Lines(rich_progress.Progress):
    """Bars, and below them a line about the whole."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        if self.below:
            yield Text(f"  {short(self.below, self.console.width - 2)}", no_wrap=True)


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
        self.bars = Lines(*columns, console=console, transient=True, speed_estimate_period=SLOWEST)
        self.task = self.bars.add_task("Loading", total=None)
        # between spinner, bar, count and times
        self.room = max(console.width - (52 if wide else 22), 10)
        self.what, self.where, self.total, self.done = "", "", 0, 0
        self.told = time.monotonic()
        self.course = Course()

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
        self.course.begin(what, total)
        self.show(short(spell_line(what), self.room), total or None)

    def show(self, description: str, total: int | None) -> None:
        """A new bar in place of the one there is."""
        self.bars.remove_task(self.task)
        self.task = self.bars.add_task(description, total=total)
        self.bars.below = self.course.describe()
        if self.below:
            self.below.draw(description, 0, total or 0, now=True)

    def advance(self, n: int = 1) -> None:
        """So many more images are done."""
        self.done += n
        self.move(self.done, "")

    def take_over(self, n: int) -> None:
        """So many images were done by an earlier call."""
        self.course.taken = n
        self.advance(n)

    def foresee(self, stages: Mapping[str, float | None]) -> None:
        """These stages come, see `Course.foresee`."""
        self.course.foresee(stages)

    def estimate(self, done: float, where: str) -> None:
        """Of the images under way about so many are done, in this part of the work (or "")."""
        self.move(self.done + done, where)

    def move(self, done: float, where: str) -> None:
        """Show how much of the stage is done."""
        self.course.images = done
        whole = self.course.describe()
        self.bars.below = whole
        if where != self.where:
            self.where = where
            what = spell_line(self.what)
            if where:  # which is what changes: rather cut the name
                where = short(f", {spell_line(where)}", self.room - min(len(what), 6))
            self.bars.update(self.task, description=short(what, self.room - len(where)) + where)
        self.bars.update(self.task, completed=done)
        if self.below:
            stage = f", {self.where}" if self.where else ""
            title = spell_line(self.what + stage) + (f"; {whole};" if whole else "")
            self.below.draw(title, done, self.total, now=False)
        elif not self.live and time.monotonic() - self.told > PLAIN_EVERY:
            stage = f", {self.where}" if self.where else ""
            more = f"; {whole}" if whole else ""
            self.say(f"{self.what}: {int(done)} of {self.total}{stage}{more}")

    def end(self) -> None:
        """The stage is over; what comes before the next one must not look like standstill."""
        if not (self.live or self.below) and self.done and self.done >= self.total:
            self.say(f"{self.what}: done")
        self.course.end()
        self.show("Preparing", None)

    def say(self, text: str) -> None:
        """A line for the reader."""
        self.told = time.monotonic()
        self.console.print(Text(spell_line(text)), soft_wrap=True)


def short(text: str, width: int) -> str:
    """The text cut to a width, the cut shown."""
    return text if len(text) <= width else text[: width - 1] + "…"
