"""What attacks find of what the active test plants, on a sound network and on masked ones.

    python tests/benchmarks/bench_active.py
    python tests/benchmarks/bench_active.py CHECKPOINT --data DATA --arch SPEC --eps 0.3

On a sound network few steps must find too little and `standard` enough; where a layer hides the
gradient, an attack that follows it nonetheless must find too little. Run by hand.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from bench_defects import Scaled, list_defects
from bench_pgd import correct_images
from torch import Tensor

from robusteval.commands.shell import read_numbers, read_radius
from robusteval.datasets.arrays import from_arrays
from robusteval.evaluation.active_test import DRAWS, Planter, look_for_planted
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.demo import demo
from robusteval.runs.statistics import Rate

from toys import synthetic, trained  # isort: skip  # found by way of bench_defects

NETWORKS = ("none", "rounding", "k-winners", "JPEG")
FEW, LONG = ("noise:tries={draws}", "fgsm", "pgd:steps=5"), ("pgd:steps=40", "apgd")
ADAPTED = ("quick", "standard")  # Square among them, which no gradient misleads


def choose_images(
    checkpoint: str,
    source: str | None,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    count: int,
) -> tuple[Classifier, Tensor]:
    """A network and images ``(n, c, h, w)`` that it has right."""
    if checkpoint == "bands":
        model = Classifier(trained(), mean=(0.5,), std=(0.25,), num_classes=3).eval()
        batch = from_arrays(*synthetic(2 * count, seed=7)).batch(range(2 * count))
        with torch.no_grad():
            right = predict_classes(model(batch.x)) == batch.y
        return model, batch.x[right][:count]
    path = str(demo()) if checkpoint == "demo" else checkpoint
    model = load(path, arch=arch, mean=mean, std=std)
    return model, correct_images(model, source or "digits", count)[0]


@click.command()
@click.argument("checkpoint", default="bands")
@click.option("--data", "source", default=None, help="As for evaluate.")
@click.option("--arch", default=None)
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--eps", default="32/255", show_default=True, callback=read_radius)
@click.option("--images", default=50, show_default=True)
@click.option("--network", "names", multiple=True, type=click.Choice(NETWORKS))
@click.option("--out", type=click.Path(path_type=Path), help="Also written there.")
def main(
    checkpoint: str,
    source: str | None,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    eps: float,
    images: int,
    names: tuple[str, ...],
    out: Path | None,
) -> None:
    """Print a row for each network and attack."""
    model, x = choose_images(checkpoint, source, arch, mean, std, images)
    defects = dict(list_defects(float(x.mean()), float(x.std())))
    for name in names or NETWORKS:
        network = defects[name](Scaled(model)).eval().requires_grad_(False)
        classifier = Classifier(network, num_classes=model.num_classes).eval()
        planter = Planter(classifier, x[:2])
        for text in (*FEW, *LONG, *(ADAPTED if name == "none" else ())):
            started = time.perf_counter()
            spec = text.format(draws=DRAWS)
            spec += f"{',' if ':' in spec else ':'}eps={eps}"
            attack = prepare_attack(spec, classifier, (x.shape[1], x.shape[2], x.shape[3]))
            _, found, _, ready = look_for_planted(planter, attack, x, torch.arange(len(x)))
            rate = Rate(int(found.sum()), int(ready.sum()))
            row = f"{name:10} {text.format(draws=DRAWS):18} finds {rate.k:3} of {rate.n}"
            row += f" ({rate.interval.low:.2f} to {rate.interval.high:.2f})"
            click.echo(f"{row}  {time.perf_counter() - started:.0f} s")
            if out is not None:
                with out.open("a") as file:
                    file.write(f"{Path(checkpoint).name} {row}\n")


if __name__ == "__main__":
    main()
