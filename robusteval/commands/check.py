"""`robusteval check` and `robusteval baseline`: whether a run may pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.errors import UsageError
from robusteval.runs.folder import load_run
from robusteval.runs.types import Run
from robusteval.runs.writing import write_atomically

from .report import RUN, choose_format, output_options, print_report, refuse_existing
from .shell import F, command_runner, emit_lines, tell

if TYPE_CHECKING:
    from robusteval.reports.baseline import Baseline
    from robusteval.reports.gate import Check
    from robusteval.reports.gate_config import Settings

BASELINE = Path("robustness-baseline.json")
FILE = click.Path(path_type=Path, dir_okay=False)


def gate_options(option: Callable[..., Callable[[Any], Any]] = click.option) -> Callable[[F], F]:
    """The options that say what a run is held against."""

    def decorate(function: F) -> F:
        for add in (
            option(
                "--config",
                type=FILE,
                metavar="FILE",
                help="Gates: a TOML file. [default: robusteval.toml, else [tool.robusteval] in"
                " pyproject.toml]",
            ),
            option(
                "--baseline",
                type=FILE,
                metavar="FILE",
                help="What drops are measured against, as `robusteval baseline update` wrote it."
                " [default: the one that the gates name]",
            ),
        ):
            function = add(function)
        return function

    return decorate


def read_gates(baseline: Path | None, config: Path | None) -> tuple[Settings, Baseline | None]:
    """The gates and the baseline; UsageError if they cannot be read, or there is neither."""
    from robusteval.reports.baseline_file import read_baseline
    from robusteval.reports.gate_config import find_settings, read_settings

    settings = find_settings(Path()) if config is None else read_settings(config)
    if baseline is not None:
        settings = replace(settings, baseline=baseline)
    found = None if settings.baseline is None else read_baseline(settings.baseline)
    return settings, found


def judge_runs(runs: Sequence[Run], settings: Settings, baseline: Baseline | None) -> list[Check]:
    """The verdicts on some runs; inside a GitHub workflow also a summary and annotations."""
    from robusteval.reports.build import build_record
    from robusteval.reports.gate import check
    from robusteval.reports.github import write_github

    checks = [check(run, settings, baseline) for run in runs]
    records = [build_record(run, found.to_gates()) for run, found in zip(runs, checks, strict=True)]
    command_runner(write_github(records, os.environ))
    return checks


def exit_by_verdicts(checks: Sequence[Check]) -> None:
    """End with the exit code of the worst of these: failed before inconclusive."""
    codes = {check.exit_code for check in checks} - {0}
    if codes:
        raise click.exceptions.Exit(min(codes))


@click.command(short_help="Hold runs against gates, as CI does.")
@click.argument("runs", metavar="RUN...", type=RUN, nargs=-1, required=True)
@gate_options()
@output_options()
def check(
    runs: tuple[Path, ...],
    baseline: Path | None,
    config: Path | None,
    form: str | None,
    out: Path | None,
    force: bool,
) -> None:
    """Hold each RUN, a run folder, against the gates, and print the report with their verdicts.

    Gates are tables in robusteval.toml or pyproject.toml:

    \b
      [[tool.robusteval.gate]]     # [[gate]] in robusteval.toml
      floor = 0.40                 # the interval's lower end must reach it
      max_drop = 0.01              # against the baseline, image by image

    Without any, a baseline alone holds every worst case and clean accuracy to a drop of one point.

    \b
    Exit codes: 0 passed, 1 failed, 5 inconclusive: the run is too small to tell.

    \b
    Examples:
      robusteval check runs/demo-0123abcd
      robusteval check runs/demo-0123abcd --out gates.xml \\
        --baseline robustness-baseline.json
    """
    form = choose_format(form, out)
    refuse_existing(out, force)
    settings, before = read_gates(baseline, config)
    read = [load_run(run) for run in runs]
    checks = judge_runs(read, settings, before)
    print_report(read, form, checks, out=out)
    if out is not None:
        from robusteval.reports.gate_words import summarise_gates

        for run, found in zip(read, checks, strict=True):
            tell(f"{run.folder}: {summarise_gates(found.to_gates())}")
    exit_by_verdicts(checks)


@click.group(name="baseline", short_help="Keep the verdicts of a run for later checks.")
def baseline_() -> None:
    """Keep the verdicts of a run for `robusteval check` to compare with."""


@baseline_.command()
@click.argument("run", type=RUN)
@click.option(
    "--baseline",
    type=FILE,
    metavar="FILE",
    help=f"The file to write. [default: the one that the gates name, else {BASELINE}]",
)
@click.option(
    "--config",
    type=FILE,
    metavar="FILE",
    help="Where the gates are. [default: robusteval.toml, else pyproject.toml]",
)
@click.option("--dry-run", is_flag=True, help="Say what would change, and write nothing.")
def update(run: Path, baseline: Path | None, config: Path | None, dry_run: bool) -> None:
    """Write the verdicts of RUN, a run folder, to the baseline, and print what changes.

    The file is small and meant for the repository. Nothing else ever writes it.

    \b
    Example:
      robusteval baseline update runs/demo-0123abcd
    """
    from robusteval.reports.baseline import build_baseline, list_changes
    from robusteval.reports.baseline_file import read_baseline, render_baseline
    from robusteval.reports.gate_config import find_settings, read_settings

    if baseline is None:
        settings = find_settings(Path()) if config is None else read_settings(config)
        baseline = settings.baseline or BASELINE
    new = build_baseline(load_run(run))
    if os.path.isdir(baseline):
        raise UsageError(f"{baseline} is a folder: name a file with --baseline")
    old = read_baseline(baseline) if os.path.exists(baseline) else None
    text = render_baseline(new)
    changes = list_changes(old, new)
    emit_lines(changes or ["nothing changes"])
    if dry_run:
        tell(f"{baseline} was not written: --dry-run.")
    elif not changes:
        tell(f"{baseline} was left as it is.")
    else:
        write_atomically(baseline, text.encode())
        tell(f"{baseline} was written.")
