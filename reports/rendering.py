"""The report of some runs in any format: by the name of the format, or by a file's suffix.

A format is a function registered in `REPORT_FORMATS`, in a file here or in another package. It
takes the records of runs and returns the text, or the bytes, of one report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from robusteval.errors import RobustevalError, RunError, UsageError
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import Run
from robusteval.runs.writing import write_atomically

from .build import build_record
from .record import GatesRecord, RunRecord
from .trend_record import TrendRecord

if TYPE_CHECKING:
    from rich.console import Console


class Checked(Protocol):
    """What the gates said of a run."""

    def to_gates(self) -> GatesRecord:
        """Their outcome, and each gate with its numbers."""
        ...


def find_format(path: Path) -> str | None:
    """The format that the suffix of a file says; None if it says none."""
    entry = REPORT_FORMATS.find_suffix(path.suffix)
    return entry.name if entry and path.suffix else None


def list_suffixes() -> list[str]:
    """The suffixes of all formats."""
    return [suffix for entry in REPORT_FORMATS.entries.values() for suffix in entry.suffixes]


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run to a file, in the format that its suffix says.

    UsageError if no format has this suffix, RunError if the file cannot be written.
    """
    known = find_format(path)
    if known is None:
        raise UsageError(
            f"the suffix of {path} does not say a format: end it in {', '.join(list_suffixes())}"
        )
    content = render_runs([run], known, [None], page=True)
    write_atomically(path, content if isinstance(content, bytes) else content.encode())


def render_runs(
    runs: Sequence[Run],
    form: str,
    checks: Sequence[Checked | None],
    *,
    page: bool,
    trend: TrendRecord | None = None,
) -> str | bytes:
    """The report of some runs; as a `page` without the width and colours of this terminal.

    The `trend` is that of the only run.
    """
    records = [
        build_record(run, None if check is None else check.to_gates(), trend)
        for run, check in zip(runs, checks, strict=True)
    ]
    return render_records(records, form, page=page)


def render_records(records: Sequence[RunRecord], form: str, *, page: bool) -> str | bytes:
    """The report of these records; as a `page` without the width and colours of this terminal."""
    if form == "table" and not page:
        from .terminal import print_reports

        return render_console(lambda console: print_reports(records, console), page=False)
    render = REPORT_FORMATS.load(form)
    if render.__module__.startswith(f"{__package__}."):
        ours: str | bytes = render(records)
        return ours
    try:
        made: str | bytes = render(records)
    except RobustevalError:
        raise
    except Exception as error:  # code of another package
        from robusteval.models.user_code import describe_exception

        raise RunError(f"the report format {form} broke ({describe_exception(error)})") from error
    if not isinstance(made, str | bytes):
        raise RunError(f"the report format {form} gave {type(made).__name__}, not text or bytes")
    return made


def render_console(print_it: Callable[[Console], None], *, page: bool) -> str:
    """What is printed on a console; as a `page` without the width and colours of this one."""
    from rich.console import Console

    console = (
        Console(width=100, no_color=True, force_terminal=False, force_jupyter=False)
        if page
        else Console()
    )
    with console.capture() as text:
        print_it(console)
    return text.get()
