"""`robusteval report`: what a run folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robusteval.records import Run, load_run

from .shell import emit, written

FORMAT: dict[str, Any] = {
    "type": click.Choice(("table", "json", "markdown")),
    "default": "table",
    "show_default": True,
    "metavar": "FORMAT",
    "help": "How to print the report on stdout: table, json or markdown.",
}


def show(run: Run, form: str) -> None:
    """Print the report on stdout."""
    if form == "json":
        from robusteval.reports.tables import to_json

        emit(to_json(run) + "\n")
    elif form == "markdown":
        from robusteval.reports.markdown import to_markdown

        emit(to_markdown(run))
    else:
        from rich.console import Console

        from robusteval.reports.terminal import print_table

        console = Console()
        with written(), console.capture() as page:  # leaving it writes, if only nothing
            print_table(run, console)
        emit(page.get())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "form", **FORMAT)
def report(run: Path, form: str) -> None:
    """Print the report of RUN, a run folder, again.

    \b
    Example:
      robusteval report runs/demo-0123abcd --format markdown
    """
    show(load_run(run), form)
