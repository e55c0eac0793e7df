"""The command line: parse, call, print.

Nothing heavy is imported before it is needed, so that help, lists and reports come at once.
"""

from __future__ import annotations

import click

from robusteval import __version__
from robusteval.commands.check import baseline_, check
from robusteval.commands.defend import defend
from robusteval.commands.evaluate import evaluate
from robusteval.commands.explain import explain
from robusteval.commands.export import export
from robusteval.commands.listing import list_
from robusteval.commands.merge import merge
from robusteval.commands.report import compare, report
from robusteval.commands.reproduce import reproduce
from robusteval.commands.shell import Commands
from robusteval.commands.train import train


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="robusteval")
def cli() -> None:
    """Robustness evaluation of image classifiers, with numbers that can be believed.

    Start with `robusteval evaluate demo`.

    \b
    Exit codes: 0 done, 1 a gate failed, 2 a mistake in what was asked, 3
    something broke or a run is incomplete (finished parts are saved), 4
    checkpoint refused for safety, 5 nothing evaluated or too little to decide, 6
    numbers not to be used, as the model is probably not fed as it was trained,
    130 stopped.
    """


for command in (
    *(evaluate, merge, report, check, compare, baseline_, export),
    *(explain, reproduce, train, defend, list_),
):
    cli.add_command(command)
