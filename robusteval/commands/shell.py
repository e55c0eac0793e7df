"""What every command shares: exit codes, options with headings, reading values, writing."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import click

from robusteval.errors import (
    Interrupted,
    RobustevalError,
    RunError,
    UsageError,
    speak_of_options,
)
from robusteval.registry.signatures import read_number
from robusteval.runs.types import spell_line

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group that ends in the documented exit codes, whatever happens."""

    verbose = False  # whether errors are told with all their details

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; code of a user or of ART has no say in how the process ends."""
        try:
            with speak_of_options():
                return super().invoke(ctx)
        except SystemExit:
            raise RunError("the network or an attack tried to end the program") from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and leave; a foreseeable failure becomes one sentence and its code."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # it is None where the stream is closed
                stream.reconfigure(errors="backslashreplace")
        self.verbose = False
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            show_refusal(error)
            code = UsageError.exit_code
        except (click.Abort, Interrupted) as error:
            tell(str(error) or "Stopped.")
            code = Interrupted.exit_code
        except RobustevalError as error:
            tell(f"Error: {error.message}", *error.lines, *(error.details if self.verbose else ()))
            code = error.exit_code
        except SystemExit:
            code = 0  # Click's way out when the reader of its help has left
        except OSError as error:
            tell(f"Error: the system says: {error}")
            code = RunError.exit_code
        except Exception as error:
            if os.environ.get("ROBUSTEVAL_TRACEBACK"):
                traceback.print_exc()
            tell(
                f"Error: internal error ({type(error).__name__}: {error}). This is a bug in"
                " robusteval: please report it, with what ROBUSTEVAL_TRACEBACK=1 prints."
            )
            code = RunError.exit_code
        sys.exit(code)


def show_refusal(error: click.ClickException) -> None:
    """What Click says of a mistake in the options, with what the user gave in one line."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or error.message != context.get_help():  # help in place of a mistake
        vars(error)["message"] = spell_line(error.message)  # Click would say that it is final
    with suppress(OSError):
        error.show()


def tell(*lines: str) -> None:
    """Lines on stderr, if anybody still reads it; a line break in one of them is spelled out."""
    with suppress(OSError):
        click.echo("\n".join(map(spell_line, lines)), err=True)


def command_runner(lines: Iterable[str]) -> None:
    """Commands to a CI runner on stderr, already escaped as the runner asks for it."""
    with suppress(OSError):
        for line in lines:
            click.echo(line, err=True)


class Option(click.Option):
    """An option below a heading of its own in the help."""

    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class Command(click.Command):
    """A command whose help has its options below headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in their order."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row and isinstance(parameter, click.Option):
                rows.setdefault(getattr(parameter, "heading", "Help"), []).append(row)
        for heading, pairs in rows.items():
            with formatter.section(heading):
                formatter.write_dl(pairs)


def ask_for_details(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Option callback: errors are told with all their details."""
    group = ctx.find_root().command
    if value and isinstance(group, Commands):
        group.verbose = True


class Whole(click.IntRange):
    """A whole number with a least value."""

    name = "whole number"


def read_numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> list[float] | None:
    """Option callback: numbers or fractions separated by commas."""
    return None if value is None else [read_value(ctx, param, item) for item in value.split(",")]


def read_value(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A number or a fraction."""
    try:
        return read_number(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not {error}", ctx, param) from None


def read_factor(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: a number or a fraction."""
    return None if value is None else read_value(ctx, param, value)


def read_radius(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: a number or a fraction, not negative."""
    if value is None:
        return None
    eps = read_value(ctx, param, value)
    if eps < 0:
        raise click.BadParameter(f"{value!r} is negative")
    return eps


def read_batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Option callback: a positive whole number, or auto."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a whole number above 0 nor 'auto'")
    return int(value)


def option(heading: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """An option below a heading."""
    return click.option(*names, cls=Option, heading=heading, **attributes)


def emit_lines(lines: Iterable[str]) -> None:
    """Write lines of plain text to stdout; a line break in one of them is spelled out."""
    emit("".join(f"{spell_line(line)}\n" for line in lines))


def emit(text: str) -> None:
    """Write to stdout what its format has escaped."""
    with writing_stdout():
        click.echo(text, nl=False, color=True)  # or Click would undo what rich has decided


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Say what is wrong with stdout; that its reader has left, as `head` does, is not."""
    try:
        yield
    except BrokenPipeError:
        # or Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise RunError(f"cannot write to stdout: {error.strerror}") from None
