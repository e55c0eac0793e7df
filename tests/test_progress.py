"""Progress: lines where there is no terminal, one bar that fits where there is one."""

from __future__ import annotations

import io
import re
import sys
import time
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from robusteval import progress as module
from robusteval.errors import UsageError
from robusteval.progress import (
    Bars,
    Course,
    Progress,
    Silent,
    Stderr,
    foresee,
    open_progress,
    short,
    take_over,
)


def plain() -> tuple[Bars, io.StringIO]:
    """Progress into a file, and the file."""
    file = io.StringIO()
    return Bars(Console(file=file, width=80)), file


def terminal(width: int = 80) -> tuple[Bars, io.StringIO]:
    """Progress on a terminal of so many columns, and what it gets."""
    file = io.StringIO()
    return Bars(Console(file=file, width=width, force_terminal=True, color_system=None)), file


def frame(bars: Bars) -> list[str]:
    """The lines that a refresh would draw now."""
    with bars.console.capture() as captured:
        bars.console.print(bars.bars.get_renderable())
    return captured.get().rstrip("\n").split("\n")


def test_progress_is_seen_while_an_attack_is_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    """ART's own output is sent nowhere, ours must not be."""
    with Bars(Stderr()) as bars, redirect_stderr(io.StringIO()):
        bars.say("still here")

    assert capsys.readouterr().err == "still here\n"


def test_a_stage_is_one_line_in_a_file() -> None:
    """Nothing moves, nothing is coloured."""
    bars, file = plain()

    with bars:
        bars.begin("Clean accuracy", 3)
        bars.advance(2)
        bars.advance()
        bars.end()

    assert file.getvalue() == "Clean accuracy: done\n"


@pytest.mark.parametrize("done", [0, 2])
def test_a_stage_that_was_cut_short_is_not_called_done(done: int) -> None:
    """What ended it is said elsewhere."""
    bars, file = plain()

    with bars:
        bars.begin("Clean accuracy", 3)
        bars.advance(done)
        bars.end()

    assert file.getvalue() == ""


def test_a_long_stage_says_how_far_it_is_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then."""
    monkeypatch.setattr(module, "PLAIN_EVERY", -1.0)
    bars, file = plain()

    with bars:
        bars.begin("pgd", 60)
        bars.advance(25)

    assert file.getvalue() == "pgd: 25 of 60\n"


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    """Neither by its own codes nor by rich's."""
    bars, file = plain()

    bars.say("[bold]\x1b[31mred\nline\x07")

    assert file.getvalue() == "[bold]\\x1b[31mred\\nline\\x07\n"


def test_lines_for_the_reader_are_not_broken() -> None:
    """So that they can be searched; a terminal wraps them itself."""
    bars, file = plain()

    bars.say("word " * 40)

    assert file.getvalue().count("\n") == 1


def test_the_spinner_turns_from_the_start() -> None:
    """Importing torch takes seconds."""
    bars, file = terminal()

    with bars:
        bars.bars.refresh()

    assert "Loading" in file.getvalue()


def test_there_is_something_to_see_between_stages() -> None:
    """And it does not keep the numbers of the last one."""
    bars, _ = terminal()

    bars.begin("pgd", 60)
    bars.advance(60)
    bars.end()

    (line,) = frame(bars)
    assert "Preparing" in line
    assert "60" not in line


@pytest.mark.parametrize("width", [30, 40, 79, 80, 120])
def test_the_bar_is_one_line_of_any_terminal(width: int) -> None:
    """Long names are cut, numbers are not."""
    bars, _ = terminal(width)

    bars.begin("art:AutoProjectedGradientDescent:" + "eps=8/255," * 20, 50_000)
    bars.advance(12_345)

    (line,) = frame(bars)
    assert len(line.rstrip()) <= width
    assert "12345/50000" in line
    assert "…" in line


def test_the_bar_moves_within_a_batch_and_names_the_stage() -> None:
    """By estimate, until the batch is done; a long name gives way to the stage."""
    bars, _ = terminal()
    bars.begin("standard:" + "eps=8/255," * 20, 60)
    bars.advance(10)

    bars.estimate(7.5, "stage 3 of 9: square")

    (line,) = frame(bars)
    assert "17/60" in line
    assert "stage 3 of 9: square" in line
    assert len(line.rstrip()) <= 80
    bars.advance(20)
    (line,) = frame(bars)
    assert "30/60" in line
    assert "stage" not in line


def test_a_stage_of_a_batch_is_named_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the images that are done by estimate."""
    monkeypatch.setattr(module, "PLAIN_EVERY", -1.0)
    bars, file = plain()

    with bars:
        bars.begin("pgd", 60)
        bars.estimate(2.5, "stage 1 of 2: near")
        bars.estimate(3.5, "")

    assert file.getvalue() == "pgd: 2 of 60, stage 1 of 2: near\npgd: 3 of 60\n"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_the_whole_job_is_told_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are done, images a second, and the time left of all stages by their costs."""
    clock = Clock(monkeypatch)
    bars, _ = terminal()
    bars.foresee({"Clean accuracy": 0.0, "pgd": 60 * 10.0, "square": 60 * 50.0})
    bars.begin("Clean accuracy", 60)
    clock.wait(70)
    bars.advance(30)
    assert frame(bars)[1].strip() == "whole run: 0 of 3 parts done, 0.43 images/s"
    bars.advance(30)
    bars.end()
    bars.begin("pgd", 60)
    clock.wait(300)
    bars.advance(30)

    first, second = frame(bars)
    assert "30/60" in first
    # a pass took a second on the whole: half of pgd is left, and 3,000 passes of the other
    assert second.strip() == "whole run: 1 of 3 parts done, 0.1 images/s, about 55 minutes left"


def test_a_job_of_one_stage_has_no_second_line() -> None:
    bars, _ = terminal()
    bars.foresee({"pgd": 10.0})
    bars.begin("pgd", 60)

    assert len(frame(bars)) == 1


def test_of_a_job_whose_stages_nobody_foresees_no_number_is_told() -> None:
    """Two that were begun are not all that come."""
    bars, file = plain()
    bars.begin("Reading data", 60)
    bars.advance(60)
    bars.end()
    bars.begin("Dissecting units", 60)

    assert bars.course.describe() == ""
    assert "whole run" not in file.getvalue()


def test_stages_that_take_the_place_of_one_come_before_those_after_it() -> None:
    """What is known of the first checks does not drop the second ones."""
    course = Course()
    course.foresee({"pgd": 10.0, "checks": 5.0, "checks, behind a mask": 5.0})
    course.begin("pgd", 60)
    course.end()
    course.foresee({"checks": 0.0, "noise": 2.0, "twice": 3.0})
    course.begin("noise", 60)

    assert course.coming == {"twice": 3.0, "checks, behind a mask": 5.0}
    assert list(course.coming) == ["twice", "checks, behind a mask"]
    assert course.describe() == "whole run: 1 of 4 parts done"


@pytest.mark.parametrize("width", [30, 80])
def test_the_line_of_the_whole_job_is_one(width: int) -> None:
    bars, _ = terminal(width)
    bars.foresee({"pgd": 10.0, "square": None})
    bars.begin("pgd", 60)

    assert len(frame(bars)) == 2
    assert all(len(line.rstrip()) <= width for line in frame(bars))


def test_the_time_left_is_not_told_where_nobody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage of unknown cost it is known as soon as this one runs."""
    clock = Clock(monkeypatch)
    course = Course()
    course.foresee({"pgd": 600.0, "art:Strange": None})
    course.begin("pgd", 60)
    clock.wait(60)
    course.images = 30
    assert course.estimate_left() is None
    course.end()
    course.begin("art:Strange", 60)
    clock.wait(10)
    course.images = 6

    assert course.estimate_left() == pytest.approx(90)


def test_what_an_earlier_call_has_done_is_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither images that are taken over, nor stages that have nothing left to do."""
    clock = Clock(monkeypatch)
    bars, file = plain()
    monkeypatch.setattr(module, "PLAIN_EVERY", -1.0)
    bars.foresee({"Clean accuracy": 60.0, "pgd": 600.0, "square": 600.0})
    bars.begin("pgd", 60)
    bars.take_over(40)
    clock.wait(100)
    bars.advance(10)

    assert bars.course.estimate_left() == pytest.approx(100 + 600)
    assert "whole run: 0 of 2 parts done, 0.1 images/s, about 12 minutes left" in file.getvalue()


def test_objects_that_know_of_no_whole_are_told_stages_alone() -> None:
    """Such as a user's own."""
    told: list[int] = []
    own = cast(Progress, SimpleNamespace(advance=told.append))

    foresee(own, {"pgd": 1.0})
    take_over(own, 3)

    assert told == [3]


def test_nothing_of_the_bar_is_left_at_the_end() -> None:
    """The line is erased and the cursor shown."""
    bars, file = terminal()

    with bars:
        bars.begin("pgd", 60)

    assert file.getvalue().endswith("\x1b[2K")
    assert re.findall(r"\x1b\[\?25[hl]", file.getvalue())[-1] == "\x1b[?25h"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the one inside an editor."""
    monkeypatch.setenv("TERM", "dumb")
    bars, file = terminal()

    with bars:
        bars.begin("pgd", 1)
        bars.advance()
        bars.end()

    assert file.getvalue() == "pgd: done\n"


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_job_goes_on_when_its_reader_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`robusteval evaluate … 2>&1 | head` must not kill an evaluation."""
    monkeypatch.setattr("sys.stderr", Gone())
    bars = Bars(Stderr())

    bars.say("one")
    bars.say("two")

    assert bars.console.quiet


def test_silence_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The default of the Python interface."""
    silent = Silent()

    silent.begin("pgd", 3)
    silent.advance(3)
    silent.estimate(1.5, "near")
    silent.say("word")
    silent.end()

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("text", "expected"), [("abcd", "abcd"), ("abcde", "abc…")])
def test_a_cut_is_shown(text: str, expected: str) -> None:
    """With its mark the text has the width."""
    assert short(text, 4) == expected


def test_a_call_from_python_shows_bars_where_true_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing for None and False, an object of one's own as it is, a sentence for the rest."""
    with open_progress(True) as bars:
        bars.say("hello")
    assert capsys.readouterr().err == "hello\n"
    for nothing in (None, False):
        with open_progress(nothing) as silent:
            silent.say("hello")
    assert not capsys.readouterr().err
    own = Silent()
    with open_progress(own) as same:
        assert same is own
    with (
        pytest.raises(UsageError, match="progress cannot be int: give True"),
        open_progress(3),  # type: ignore[arg-type]
    ):
        pass


def test_a_notebook_has_one_bar_that_is_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is left; needs IPython alone, no widgets."""
    shown: list[tuple[str, bool]] = []

    def display(bundle: dict[str, str], *, raw: bool, display_id: str, update: bool) -> None:
        shown.append((bundle["text/html"], update))

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(module, "NOTEBOOK_EVERY", 0)
    with Bars(Console(file=io.StringIO(), force_jupyter=True)) as bars:
        bars.begin("pgd <b>", 40)
        bars.advance(10)
        bars.estimate(5, "restart 2")

    assert [update for _, update in shown] == [False, True, True, True]
    assert 'max="40" value="10"' in shown[1][0]
    assert "pgd &lt;b&gt;, restart 2 15 of 40" in shown[2][0]
    assert shown[-1][0] == ""
