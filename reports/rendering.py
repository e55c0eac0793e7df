"""The report of some runs in any format: by the name of the format, or by a file's suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robusteval.errors import UsageError
from robusteval.runs.storage import write_atomically
from robusteval.runs.types import Run

from .build import Checked

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "markdown", "json", "html", "junit", "sarif", "csv", "badge")
# what the name of a file says of its format
SUFFIXES = {
    ".txt": "table",
    ".md": "markdown",
    ".json": "json",
    ".html": "html",
    ".htm": "html",
    ".xml": "junit",
    ".sarif": "sarif",
    ".csv": "csv",
}


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run to a file, in the format that its suffix says.

    UsageError if no format has this suffix, RunError if the file cannot be written.
    """
    known = SUFFIXES.get(path.suffix.lower())
    if known is None:
        raise UsageError(
            f"the suffix of {path} does not say a format: end it in {', '.join(SUFFIXES)}"
        )
    write_atomically(path, render_runs([run], known, [None], page=True).encode())


def render_runs(
    runs: Sequence[Run], form: str, checks: Sequence[Checked | None], *, page: bool
) -> str:
    """The report of some runs; as a `page` without the width and colours of this terminal."""
    if form == "table":
        return render_tables(runs, checks, page=page)
    if form == "html":
        from .html import to_html

        return to_html(runs, checks)
    if form == "markdown":
        from .markdown import to_markdown

        return "\n".join(to_markdown(run, check) for run, check in zip(runs, checks, strict=True))
    from . import ci, spreadsheet
    from .build import as_dict, to_json

    if form == "json":
        return to_json(runs, checks) + "\n"
    records = [as_dict(run, check) for run, check in zip(runs, checks, strict=True)]
    if form == "badge":
        if len(records) > 1:
            raise UsageError("a badge is for one run")
        return ci.badge(records[0]) + "\n"
    make = {"junit": ci.to_junit, "sarif": ci.to_sarif, "csv": spreadsheet.to_csv}[form]
    return make(records)


def render_tables(runs: Sequence[Run], checks: Sequence[Checked | None], *, page: bool) -> str:
    """The reports as they stand in a terminal."""
    from .terminal import print_table

    def print_all(console: Console) -> None:
        for number, (run, check) in enumerate(zip(runs, checks, strict=True)):
            if number:
                console.print()
                console.rule()
                console.print()
            print_table(run, console, check)

    return render_console(print_all, page=page)


def render_console(print_it: Callable[[Console], None], *, page: bool) -> str:
    """What is printed on a console; as a `page` without the width and colours of this one."""
    from rich.console import Console

    console = Console(width=100, no_color=True, force_terminal=False) if page else Console()
    with console.capture() as text:
        print_it(console)
    return text.get()
