"""Accuracy and maps of checkpoints under attack, over the radius. Run by hand.

    python tests/benchmarks/bench_training.py CHECKPOINT... --data DATA [--arch SPEC …]

The shape of Table VII of Hardening Interpretable Deep Learning Systems, arXiv:2211.15926, with
intervals, an attack whose result counts wherever it was reached, and all images:

- accuracy on images as they are, at half, the whole and 1.25 of the radius: right under PGD with
  cross-entropy and with the difference of logits ratio, each restarted
- Kendall's tau of the class activation map of the label with that of the same image under an
  attack on the map (arXiv:2006.14748, section 5): it lowers the sum over the cells that were the
  highest, in the same ball. Images whose prediction changes count, too.
"""

from __future__ import annotations

import math

import click
import numpy as np
import torch
from scipy import stats
from torch import Tensor, autograd

from robusteval.commands.shell import read_numbers, read_radius
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.interpreters.cam import cam
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.seeds import per_image, sample_seeds
from robusteval.runs.metrics import accuracy, worst_case
from robusteval.runs.statistics import Rate
from robusteval.search.balls import Ball

TOP = 8  # cells of the map that the attack lowers, as in the paper's code
FACTORS = (0.5, 1.0, 1.25)


def moved(model: Classifier, x: Tensor, y: Tensor, ids: np.ndarray, eps: float) -> Tensor:
    """Images whose map for `y` is as low as it gets where it was highest."""
    ball = Ball.around(x, "linf", eps)
    with torch.no_grad():
        top = cam(model, x, y).flatten(1).topk(TOP, dim=1).indices
    noise = 2 * per_image(sample_seeds(0, ids), x.shape[1:]).to(x) - 1
    z = ball.project(x + eps * noise)
    for _ in range(20):
        z = z.detach().requires_grad_()
        value = cam(model, z, y).flatten(1).gather(1, top).sum()
        z = ball.project(z.detach() - eps / 5 * autograd.grad(value, z)[0].sign())
    return z.detach()


def taus(model: Classifier, data: Data, index: np.ndarray, eps: float) -> np.ndarray:
    """Kendall's tau of the maps before and after ``(n,)``."""
    found = []
    for start in range(0, len(index), 64):
        batch = data.batch(index[start : start + 64])
        changed = moved(model, batch.x, batch.y, batch.ids, eps)
        with torch.no_grad():
            maps = [cam(model, z, batch.y).flatten(1).numpy() for z in (batch.x, changed)]
        pairs = zip(*maps, strict=True)
        found += [float(np.asarray(stats.kendalltau(one, other))[0]) for one, other in pairs]
    return np.array(found)


def shown(rate: Rate) -> str:
    """In per cent, with the interval."""
    low, high = rate.interval
    return f"{100 * rate.value:5.1f} ({100 * low:.1f}-{100 * high:.1f})"


def right(model: Classifier, data: Data, samples: int, eps: float) -> tuple[Rate, Rate]:
    """Clean accuracy, and what is left under the attacks."""
    specs = [f"pgd:eps={eps!r},steps=50,restarts=2,loss={loss}" for loss in ("ce", "dlr")]
    run = evaluate(model, data, specs, samples=samples, probes=False)
    return accuracy(run.clean), worst_case(run.attacks)


@click.command()
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--data", required=True)
@click.option("--arch")
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--images", default=500)
@click.option("--eps", callback=read_radius, default="8/255")
def main(
    checkpoints: tuple[str, ...],
    data: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    images: int,
    eps: float,
) -> None:
    """Print a line for each checkpoint and radius."""
    for path in checkpoints:
        model = load(path, arch=arch, mean=mean, std=std)
        source = open_data(data, channels=model.identity["input_channels"])
        index = np.random.default_rng(0).permutation(len(source))[:images]
        click.echo(f"\n{path}\n{'radius / 255':>14}{'right, %':>22}{'tau, mean':>20}")
        for factor in FACTORS:
            clean, robust = right(model, source, images, factor * eps)
            if factor == FACTORS[0]:
                click.echo(f"{0:14}{shown(clean):>22}{1:>20}")
            with frozen(model):
                tau = taus(model, source, index, factor * eps)
            tau = tau[np.isfinite(tau)]
            half = 1.96 * tau.std(ddof=1) / math.sqrt(len(tau))
            text = f"{tau.mean():.3f} ± {half:.3f}"
            click.echo(f"{255 * factor * eps:14.3g}{shown(robust):>22}{text:>20}")


if __name__ == "__main__":
    main()
