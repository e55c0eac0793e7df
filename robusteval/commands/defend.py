"""`robusteval defend`: what can be put before a model, or made of it, against attacks."""

from __future__ import annotations

import click

from .detector import detector
from .mask import mask


@click.group(short_help="Make a detector or a mask for a checkpoint.")
def defend() -> None:
    """Make a defense of a checkpoint; see also `robusteval train`.

    What it is worth is told by `robusteval evaluate CHECKPOINT --defense FILE`.
    """


for command in (detector, mask):
    defend.add_command(command)
