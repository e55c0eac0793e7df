"""`robusteval report` and `robusteval compare`: what run folders say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.errors import RunError, UsageError
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.folder import load_run
from robusteval.runs.types import Run
from robusteval.runs.writing import write_atomically

from .shell import F, Option, emit, tell, writing_stdout

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from robusteval.reports.gate import Check
    from robusteval.reports.trend_record import TrendRecord

# the formats that come with the package, as the help lists them; others come behind them
SHIPPED = (
    *("table", "markdown", "json", "html", "junit", "sarif", "csv", "images", "badge"),
    *("cyclonedx", "spdx", "model-card"),
)
# a trend has a place in these; formats of other packages are given it in the record
HAVE_HISTORY = ("table", "markdown", "json", "html")
WITHOUT_HISTORY = tuple(name for name in SHIPPED if name not in HAVE_HISTORY)
COMPARED = ("table", "markdown", "json")
TRACKERS = ("mlflow", "wandb")
RUN = click.Path(path_type=Path)


def list_formats() -> tuple[str, ...]:
    """The names of all registered formats."""
    return tuple(dict.fromkeys([*SHIPPED, *REPORT_FORMATS.entries]))


class FormatName(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # not in all Clicks
    """The name of a report format; of all that are registered unless some are named."""

    name = "format"

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)

    def list_names(self) -> tuple[str, ...]:
        """The names to choose from."""
        return self.names or list_formats()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name itself, if it is one."""
        if value in (self.names or SHIPPED):  # no need to look what else there is
            return value
        return click.Choice(self.list_names()).convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin like this."""
        return click.Choice(self.list_names()).shell_complete(ctx, param, incomplete)


class FormatOption(Option):
    """An option whose help lists the formats: what is registered is only looked up to show it."""

    _help = ""

    @property
    def help(self) -> str:
        """What the option says, with the names put in."""
        assert isinstance(self.type, FormatName)
        *names, last = self.type.list_names()
        return self._help.replace("FORMATS", f"{', '.join(names)} or {last}")

    @help.setter
    def help(self, text: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._help = text


format_option = click.option(
    "--format",
    "form",
    cls=FormatOption,
    heading="Report",
    type=FormatName(),
    default="table",
    show_default=True,
    metavar="FORMAT",
    help="How to print the report on stdout: FORMATS.",
)


def output_options(formats: Sequence[str] = ()) -> Callable[[F], F]:
    """The options that say where a report goes, and in which form."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--force", is_flag=True, help="Write over the file of --out if it is there."
            ),
            click.option(
                "--out",
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="FILE",
                help="Write to FILE, not to stdout; its suffix says the format unless --format"
                " does.",
            ),
            click.option(
                "--format",
                "form",
                cls=FormatOption,
                heading="Report",
                type=FormatName(formats),
                metavar="FORMAT",
                help="FORMATS. [default: table]",
            ),
        ):
            function = option(function)
        return function

    return decorate


def log_option(option: Callable[..., Callable[[Any], Any]] = click.option) -> Callable[[F], F]:
    """The option that names trackers of experiments."""
    return option(
        "--log",
        "logs",
        multiple=True,
        type=click.Choice(TRACKERS),
        help="Hand the numbers on to MLflow or Weights & Biases, where they are installed; both"
        " know from their own environment variables where to keep them. May be repeated.",
    )


def require_trackers(logs: Sequence[str]) -> None:
    """UsageError if one of these is not installed."""
    if logs:
        from robusteval.reports.trackers import require_tracker

        for name in logs:
            require_tracker(name)


def log_runs(
    runs: Sequence[Run], logs: Sequence[str], checks: Sequence[Check | None] = ()
) -> list[RunError]:
    """Hand runs on to trackers; what could not be handed on, so that verdicts come first."""
    missed: list[RunError] = []
    if not logs:
        return missed
    from robusteval.reports.build import build_record
    from robusteval.reports.trackers import track

    for run, check in zip(runs, checks or [None] * len(runs), strict=True):
        record = build_record(run, None if check is None else check.to_gates())
        for name in logs:
            tell(f"Handing the run on to {name}.")
            try:
                with redirect_stdout(sys.stderr):  # stdout is the report's alone
                    track(record, name)
            except RunError as error:
                missed.append(error)
    return missed


def choose_format(form: str | None, out: Path | None, formats: Sequence[str] = ()) -> str:
    """The format asked for, by name or by the file's suffix; UsageError if neither tells."""
    if form is not None:
        return form
    if out is None:
        return "table"
    from robusteval.reports.rendering import find_format

    named = find_format(out)
    formats = formats or list_formats()
    if named is None or named not in formats:
        raise UsageError(
            f"the suffix of {out} does not say a format: add --format {', '.join(formats)}"
        )
    return named


def refuse_existing(out: Path | None, force: bool) -> None:
    """UsageError if the file is there and may not be written over."""
    if out is not None and out.exists() and not force:
        raise UsageError(f"{out} is there already: choose another --out, or --force to replace it")


def print_report(
    runs: Sequence[Run],
    form: str,
    checks: Sequence[Check | None] = (),
    *,
    out: Path | None = None,
    trend: TrendRecord | None = None,
) -> None:
    """Print the report on stdout, or write it to a file."""
    from robusteval.reports.rendering import render_runs

    text: str | bytes = ""  # where the reader of stdout has left before there was any
    with writing_stdout():  # a console that is captured writes to it, if only nothing
        asked = checks or [None] * len(runs)
        text = render_runs(runs, form, asked, page=out is not None, trend=trend)
    deliver(text, out)


def deliver(text: str | bytes, out: Path | None) -> None:
    """Print on stdout, or write to a file."""
    if out is not None:
        write_atomically(out, text if isinstance(text, bytes) else text.encode())
    elif isinstance(text, bytes):
        click.echo(text, nl=False)
    else:
        emit(text)


@click.command(short_help="Print the report of runs, or write it in another form.")
@click.argument("runs", metavar="RUN...", type=RUN, nargs=-1, required=True)
@output_options()
@log_option()
@click.option(
    "--history",
    type=RUN,
    multiple=True,
    metavar="PATH",
    help="What the same network held before: a baseline, a run folder, or a folder of them; may be"
    " repeated. The report of the one RUN has a trend over time.",
)
def report(
    runs: tuple[Path, ...],
    form: str | None,
    out: Path | None,
    force: bool,
    logs: tuple[str, ...],
    history: tuple[Path, ...],
) -> None:
    """Print the report of each RUN, a run folder.

    Everything is read from the folders; nothing is computed again. With gates: `robusteval check`.

    \b
    Examples:
      robusteval report runs/demo-0123abcd
      robusteval report runs/demo-0123abcd --out report.html
      robusteval report runs/old runs/new --format csv
      robusteval report runs/demo-0123abcd --log mlflow
      robusteval report runs/demo-0123abcd --history baselines/
    """
    form = choose_format(form, out)
    refuse_existing(out, force)
    require_trackers(logs)
    first, *others = runs
    if history and others:
        raise UsageError("--history is what one network held before: give one RUN")
    if history and form in WITHOUT_HISTORY:
        raise UsageError(
            f"the format {form} has no place for --history: choose"
            f" {', '.join(HAVE_HISTORY[:-1])} or {HAVE_HISTORY[-1]}, or leave --history out"
        )
    read = [load_run(run) for run in runs]
    refuse_same(read)
    print_report(read, form, out=out, trend=read_trend(read[0], history, first))
    for error in log_runs(read, logs):
        raise error


def refuse_same(runs: Sequence[Run]) -> None:
    """UsageError where one folder is named twice: its numbers would count twice."""
    places = [Path(str(run.folder)).resolve() for run in runs]
    for place, run in zip(places, runs, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"the run {run.folder} is given twice: name each once")


def read_trend(run: Run, history: Sequence[Path], place: Path) -> TrendRecord | None:
    """The run in this folder beside what was before it; None where no history is given."""
    if not history:
        return None
    from robusteval.reports.trend import build_trend, read_history

    return build_trend(run.keep_different(), read_history(history, place))


@click.command(short_help="Compare two runs image by image.")
@click.argument("run_a", type=RUN)
@click.argument("run_b", type=RUN)
@output_options(COMPARED)
def compare(run_a: Path, run_b: Path, form: str | None, out: Path | None, force: bool) -> None:
    """Compare two runs image by image: what changed from RUN_A to RUN_B.

    Both must have attacked the same images in the same way; what differs is said.

    \b
    Example:
      robusteval compare runs/before runs/after
    """
    form = choose_format(form, out, COMPARED)
    refuse_existing(out, force)
    from robusteval.reports import compare as comparing
    from robusteval.reports.comparison import build_comparison, render_comparison_json
    from robusteval.reports.comparison_layout import print_comparison, render_comparison_markdown

    record = build_comparison(comparing.compare(load_run(run_a), load_run(run_b)))
    if form == "json":
        text = render_comparison_json(record) + "\n"
    elif form == "markdown":
        text = render_comparison_markdown(record)
    else:
        from robusteval.reports.rendering import render_console

        text = ""
        with writing_stdout():
            text = render_console(
                lambda console: print_comparison(record, console), page=out is not None
            )
    deliver(text, out)
