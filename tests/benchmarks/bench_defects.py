"""Defects planted on a network: each is to be named, and broken as the network without it.

    python tests/benchmarks/bench_defects.py
    python tests/benchmarks/bench_defects.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

For each defect the codes of the findings, clean accuracy, what the attack of the user leaves, what
is left after the attacks that ran by themselves, and by how much that is above the network without
the defect. Run by hand.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from robusteval.commands.shell import read_numbers
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier
from robusteval.runs.metrics import accuracy, worst_case
from robusteval.runs.types import Run

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted_defects import (
    BatchStatistics,
    Dropout,
    Function,
    Jpeg,
    KWinners,
    Noise,
    Planted,
    Rounding,
    Threshold,
    plant_inline,
)
from toys import synthetic, trained

Make = Callable[[nn.Module], nn.Module]


def list_defects(mean: float, deviation: float) -> Iterator[tuple[str, Make]]:
    """Names of defects, and what plants them on a network of images of such values."""

    def front(layer: nn.Module) -> Make:
        return lambda network: Planted(network, front=layer)

    def behind(layer: nn.Module) -> Make:
        return lambda network: Planted(network, behind=layer)

    def forget(z: Tensor) -> Tensor:
        return 0 * z + torch.arange(z.shape[1])

    yield "none", front(nn.Identity())
    yield "rounding", front(Rounding(8))
    yield "rounding in the code", lambda network: plant_inline(network, Rounding(8))
    yield "k-winners", front(KWinners(0.5))
    yield "JPEG", front(Jpeg(0.15))
    yield "threshold", front(Threshold(mean))
    yield "temperature 1e-3", behind(Function(lambda z: z / 1e-3))
    yield "temperature 1e3", behind(Function(lambda z: z / 1e3))
    yield "softmax", behind(nn.Softmax(1))
    yield (
        "softmax at 1e-3",
        lambda network: Planted(
            Planted(network, behind=Function(lambda z: z / 1e-3)), behind=nn.Softmax(1)
        ),
    )
    yield "noise", front(Noise(0.25 * deviation))
    yield "dropout", front(Dropout(0.2))
    yield "constant", behind(Function(forget))
    yield "batch statistics", front(BatchStatistics(mean, deviation))
    yield "broken: not finite", behind(Function(lambda z: z / 0))


class Scaled(nn.Module):
    """A network of images in [0, 1] that normalises them itself, behind what is planted."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.network
        self.register_buffer("mean", classifier.mean.clone())
        self.register_buffer("std", classifier.std.clone())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((x - self.get_buffer("mean")) / self.get_buffer("std"))
        return logits


def describe(run: Run, base: float | None) -> tuple[str, float]:
    """A row of the table, and the share of images that is left."""
    asked = run.config["attacks"]
    own = [outcome for outcome in run.attacks if str(outcome.attack) in asked]
    before = f"{worst_case(own).value:.3f}" if own else "no result"
    after = worst_case(run.attacks).value if run.attacks else float("nan")
    gap = "" if base is None else f"{after - base:+.3f}"
    codes = " ".join(dict.fromkeys(f.code for f in run.findings)) or "nothing found"
    planted = [
        f"{outcome.attack.name} {outcome.success().mean():.2f}"
        for outcome in run.outcomes
        if outcome.role == "probe:planted"
    ]
    row = f"{accuracy(run.clean).value:.3f}  {before:9}  {after:.3f}  {gap:6}  {codes}"
    return f"{row}  [{', '.join(planted)}]", after


@click.command()
@click.argument("checkpoint", type=Path, required=False)
@click.option("--data", "source", default=None, help="As for evaluate.")
@click.option("--arch", default=None)
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--eps", default="18/255", show_default=True)
@click.option("--attack", default="apgd", show_default=True, help="The user's.")
@click.option("--samples", default=60, show_default=True)
@click.option("--only", default="", help="Defects with this in their name.")
def main(
    checkpoint: Path | None,
    source: str | None,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    eps: str,
    attack: str,
    samples: int,
    only: str,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    data: Data
    if checkpoint is None:
        data = from_arrays(*synthetic(samples, seed=7))
        model = Classifier(trained(), mean=(0.5,), std=(0.25,), num_classes=3).eval()
    else:
        data = open_data(source or "")
        model = load(checkpoint, arch=arch, mean=mean, std=std)
    x = data.batch(range(min(64, len(data)))).x
    base: float | None = None
    spec = f"{attack}:eps={eps}"
    click.echo("defect                clean  its attack worst  gap     findings  [planted found]")
    for name, make in list_defects(float(x.mean()), float(x.std())):
        if base is not None and only not in name:
            continue
        network = make(Scaled(model)).eval().requires_grad_(False)
        started = time.perf_counter()
        run = evaluate(
            Classifier(network, num_classes=model.num_classes).eval(),
            data,
            [spec],
            samples=min(samples, len(data)),
        )
        row, left = describe(run, base)
        base = left if base is None else base
        click.echo(f"{name:20}  {row}  {time.perf_counter() - started:.0f} s")
        for cell, reason in run.failures.items():
            click.echo(f"    {cell}: {reason}")


if __name__ == "__main__":
    main()
