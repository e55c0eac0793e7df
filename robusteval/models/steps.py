"""What an attack tells of itself while it runs: how far it is, which stage, whose passes.

Loops tell each step, whoever runs them listens: so bars move within a batch and a stop waits for
one step only. Where nobody listens a step costs a look at one variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from robusteval.errors import Interrupted
from robusteval.progress import Progress

FINEST = 256  # parts of a piece of work, of which progress is told one by one
STOPPED = "stopped; the same command continues where this one ended"


class Listener:
    """Who is told of the steps of some work.

    Parameters
    ----------
    progress : Progress
        Told how many of the images are done, by the share of the steps that are.
    images : int
        That are worked on.
    stopping : callable
        Asked at every step.
    around : Listener, optional
        Whose work this is a part of; its wish to stop counts as well.
    """

    def __init__(
        self,
        progress: Progress,
        images: int,
        stopping: Callable[[], bool],
        around: Listener | None,
    ) -> None:
        self.progress, self.images, self.stopping, self.around = progress, images, stopping, around
        self.told = 0  # parts of FINEST
        self.where = ""  # the stage
        self.stopped = False

    def hear(self, share: float, where: str) -> None:
        """So much of the work is done, in this stage; never less than before."""
        told = max(int(FINEST * min(share, 1.0)), self.told)
        if told != self.told or where != self.where:
            self.told, self.where = told, where
            self.progress.estimate(self.images * told / FINEST, where)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Interrupted if somebody wants the work to stop."""
        listener: Listener | None = self
        while listener is not None:
            if listener.stopping():
                self.stopped = True
                raise Interrupted(STOPPED)
            listener = listener.around


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_window: ContextVar[tuple[float, float]] = ContextVar("window", default=(0.0, 1.0))  # start, width
_where: ContextVar[str] = ContextVar("where", default="")
_rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)
_passes: ContextVar[Passes | None] = ContextVar("passes", default=None)
_stage: ContextVar[str | None] = ContextVar("stage", default=None)


def tell_step(done: int, total: int) -> None:
    """Tell whoever listens that a loop has taken so many of its steps.

    Every loop of an attack calls it once per step. What comes before and after the loop is told
    apart by `part`.

    Raises
    ------
    Interrupted
        If the work is to stop.
    """
    listener = _listener.get()
    if listener is not None:
        start, width = _window.get()
        listener.hear(start + width * done / max(total, 1), _where.get())


def stop_if_asked() -> None:
    """Interrupted if whoever listens wants the work to stop: for loops within a step."""
    listener = _listener.get()
    if listener is not None:
        listener.stop_if_asked()


@contextmanager
def part(start: float, end: float, total: float) -> Iterator[None]:
    """Let steps inside count as those from `start` to `end` of `total` of the loop around."""
    first, width = _window.get()
    total = max(total, 1)
    token = _window.set((first + width * start / total, width * (end - start) / total))
    try:
        yield
    finally:
        _window.reset(token)


class Spent:
    """Passes that were made so far, one per image."""

    def __init__(self) -> None:
        self.passes = 0


@contextmanager
def tell_passes(model: nn.Module, expected: float) -> Iterator[Spent]:
    """Tell steps in place of code that tells none: by its passes, one per image, as expected.

    However many there are in the end, not all of the work is done before it has come back.
    """
    spent = Spent()

    def tell(_module: nn.Module, _args: object, logits: Tensor) -> None:
        spent.passes += len(logits)
        tell_step(int(min(1000 * spent.passes / max(expected, 1), 950)), 1000)

    handle = model.register_forward_hook(tell)
    try:
        yield spent
    finally:
        handle.remove()


@contextmanager
def listen(progress: Progress, images: int, stopping: Callable[[], bool]) -> Iterator[None]:
    """Listen to the steps of some work.

    Parameters
    ----------
    progress : Progress
        Told how many images are done by estimate; whether they are is for the caller to say.
    images : int
        That are worked on.
    stopping : callable
        Asked at every step.

    Raises
    ------
    Interrupted
        If the work was to stop. It has not been done then, whatever it returned: what stopped it
        may have been taken for an error on the way.
    """
    listener = Listener(progress, images, stopping, _listener.get())
    tokens = _listener.set(listener), _window.set((0.0, 1.0)), _where.set("")
    try:
        yield
    except Exception as error:
        if listener.stopped and not isinstance(error, Interrupted):
            raise Interrupted(STOPPED) from error
        raise
    else:
        if listener.stopped:
            raise Interrupted(STOPPED)
    finally:
        _listener.reset(tokens[0])
        _window.reset(tokens[1])
        _where.reset(tokens[2])


@contextmanager
def stage(name: str, rows: Tensor, number: int = 0, of: int = 0) -> Iterator[None]:
    """The named part of an attack that follows, on some rows of its batch.

    Parameters
    ----------
    name : str
        What it is called, for people and in `Passes.stages`; inside another stage with that one's
        name in front, as in ``near/square``.
    rows : Tensor
        Of the batch ``(m,)`` that this part works on. What is called inside counts its rows among
        them.
    number, of : int
        That it is the first, second, … of how many, if that is known.
    """
    told = f"stage {number} of {of}: {name}" if of else name
    around = _stage.get()
    tokens = _where.set(told), _stage.set(name if around is None else f"{around}/{name}")
    try:
        with part(number - 1, number, of) if of else part(0, 1, 1), book_rows(rows):
            passes, index = _passes.get(), _rows.get()
            if passes is not None and index is not None:
                passes.see(index)
            tell_step(0, 1)
            yield
    finally:
        _where.reset(tokens[0])
        _stage.reset(tokens[1])


@contextmanager
def book_rows(index: Tensor) -> Iterator[None]:
    """Book the passes inside to these rows ``(m,)`` of the batch.

    An attack that drops finished images tells the counter this way whose passes it saves. Inside
    another one, of that one's rows.
    """
    around = _rows.get()
    token = _rows.set(index if around is None else around[index.to(around.device)])
    try:
        yield
    finally:
        _rows.reset(token)


def credit_stage(index: Tensor) -> None:
    """The successes that are kept of these rows ``(m,)`` are from the stage there is now.

    Of rows as `book_rows` counts them; where nobody counts passes, nothing happens.
    """
    passes, around = _passes.get(), _rows.get()
    if passes is not None:
        passes.credit(index if around is None else around[index.to(around.device)])


def rebook_stage(index: Tensor, name: str) -> None:
    """What the stage there is now was for these rows ``(m,)`` is told under another name.

    For stages that do the same to images of two kinds, in one go. Of rows as `credit_stage`.
    """
    passes, around = _passes.get(), _rows.get()
    if passes is not None:
        passes.rebook(index if around is None else around[index.to(around.device)], name)


class Stage:
    """What one stage of an attack did to each image of a batch, columns ``(n,)``."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.seen = torch.zeros(n, dtype=torch.bool, device=device)
        self.made = torch.zeros(n, dtype=torch.bool, device=device)  # the success that is kept
        self.forwards = torch.zeros(n, device=device)
        self.backwards = torch.zeros(n, device=device)

    def list_columns(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.seen, self.made, self.forwards, self.backwards


def find_rows() -> Tensor | None:
    """The rows ``(m,)`` of the batch that passes are booked to; None outside of `book_rows`."""
    return _rows.get()


class Passes:
    """Forward and backward passes of each image of a batch, columns ``(n,)``.

    Attributes
    ----------
    forwards, backwards : Tensor
        All of them.
    stages : dict
        Of each `stage`, by name and in their order, which images it saw and their passes in it;
        those of a stage inside are not counted for the one around.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.forwards = torch.zeros(n, device=device)
        self.backwards = torch.zeros(n, device=device)
        self.stages: dict[str, Stage] = {}

    def see(self, index: Tensor) -> None:
        """The stage there is now works on rows `index` ``(m,)``."""
        name = _stage.get()
        if name is not None:
            here = self.stages.setdefault(name, Stage(len(self.forwards), self.forwards.device))
            here.seen[index.to(here.seen.device)] = True

    def credit(self, index: Tensor) -> None:
        """The successes that are kept of rows `index` ``(m,)`` are from the stage there is now."""
        for name, each in self.stages.items():
            each.made[index.to(each.made.device)] = name == _stage.get()

    def rebook(self, index: Tensor, name: str) -> None:
        """What the stage there is now was for rows `index` ``(m,)`` is that of another `name`."""
        here = self.stages.get(_stage.get() or "")
        if here is None:
            return
        other = self.stages.setdefault(name, Stage(len(self.forwards), self.forwards.device))
        index = index.to(self.forwards.device)
        for mine, its in zip(here.list_columns(), other.list_columns(), strict=True):
            its[index], mine[index] = mine[index], 0

    def watch(self, _module: nn.Module, _args: object, logits: Tensor) -> None:
        """Forward hook: book this pass, and the backward pass through it if there comes one."""
        index, n = _rows.get(), len(logits)
        if index is None or len(index) != n:
            index = None  # whose pass it was is not known: shared evenly
        here = self.stages.get(_stage.get() or "")
        self._book(self.forwards, index, n)
        if here is not None:
            self._book(here.forwards, index, n)
        if logits.requires_grad:

            def book_backward(_grad: Tensor) -> None:
                self._book(self.backwards, index, n)
                if here is not None:
                    self._book(here.backwards, index, n)

            logits.register_hook(book_backward)  # type: ignore[no-untyped-call]
        listener = _listener.get()
        if listener is not None:  # in attacks that tell no steps, too
            listener.stop_if_asked()

    def _book(self, column: Tensor, index: Tensor | None, n: int) -> None:
        if index is None:
            column += n / max(len(column), 1)
        else:
            column.index_add_(0, index.to(column.device), column.new_ones(n))


@contextmanager
def count_passes(model: nn.Module, n: int, device: torch.device) -> Iterator[Passes]:
    """Count the passes of a batch of `n` images through the model."""
    passes = Passes(n, device)
    handle = model.register_forward_hook(passes.watch)
    token = _passes.set(passes)
    try:
        yield passes
    finally:
        _passes.reset(token)
        handle.remove()
