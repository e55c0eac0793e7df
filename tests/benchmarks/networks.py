"""The network that a benchmark is run on, as its command line names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from robusteval.commands.shell import read_numbers
from robusteval.models.checkpoint import load
from robusteval.models.demo import demo


def network_options(function: Callable[..., None]) -> Callable[..., None]:
    """Take `CHECKPOINT --data --arch --mean --std`, and give the function `model` and `data`.

    As for `robusteval evaluate`; without any, the demo network and its digits.
    """

    @click.argument("checkpoint", default="demo")
    @click.option("--data", default="digits")
    @click.option("--arch")
    @click.option("--mean", callback=read_numbers)
    @click.option("--std", callback=read_numbers)
    @wraps(function)
    def run(
        checkpoint: str,
        arch: str | None,
        mean: list[float] | None,
        std: list[float] | None,
        **others: Any,
    ) -> None:
        path = str(demo()) if checkpoint == "demo" else checkpoint
        function(model=load(path, arch=arch, mean=mean, std=std), **others)

    return run
