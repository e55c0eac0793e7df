"""`robusteval merge`: one run of the shards that several processes computed."""

from __future__ import annotations

from pathlib import Path

import click

from .evaluate import exit_by_run, refuse_file
from .report import RUN, format_option, print_report
from .running import show_bars, spell_command
from .shell import Command, option


@click.command(cls=Command, short_help="Join the shards of an evaluation to one run.")
@click.argument("runs", nargs=-1, required=True, type=RUN, metavar="RUN...")
@option(
    "Run",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the whole run.",
)
@option("Run", "--fresh", is_flag=True, help="Throw away what that folder holds.")
@format_option
def merge(runs: tuple[Path, ...], out: Path, fresh: bool, form: str) -> None:
    """Join the shards of an evaluation to the run that one process would have made.

    RUN... are the folders that `robusteval evaluate ... --shard K/N` has written, all N of them.
    Neither the checkpoint nor the images are needed. The shards stay as they are.

    \b
    Example:
      robusteval evaluate demo --shard 1/2 --out shards/1
      robusteval evaluate demo --shard 2/2 --out shards/2
      robusteval merge shards/1 shards/2 --out run
    """
    refuse_file(out)
    with show_bars() as progress:
        from robusteval.evaluation.merging import merge as merge_runs

        run = merge_runs(runs, out, fresh=fresh, progress=progress, command=spell_command())
    print_report([run], form)
    exit_by_run(run)
