"""How fast `pgd` is, as ratios measured in one process. Run by hand; nothing fails on a clock.

    python tests/benchmarks/bench_pgd.py
    python tests/benchmarks/bench_pgd.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

Three figures, each the best of several alternating rounds:

- against ART's ProjectedGradientDescentPyTorch with the same settings on images that fall: what
  dropping finished images is worth; and whether every image that ART breaks is broken
- against a hand-written loop of the same steps on images that do not fall: what everything that
  is not the network costs
- forward and backward passes per image, of `pgd` and of ART
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from networks import network_options
from torch import Tensor, nn

from robusteval.art.to_art import as_estimator
from robusteval.attacks.pgd import pgd
from robusteval.datasets.dataset import draw
from robusteval.datasets.sources import open_data
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes

EPS, STEP, STEPS, BATCH = 8 / 255, 2 / 255, 20, 128


def correct_images(model: Classifier, spec: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a seeded draw that the model classifies correctly."""
    data = open_data(spec, channels=model.identity["input_channels"])
    found: list[tuple[Tensor, Tensor]] = []
    index = draw(len(data), None, 0)
    for start in range(0, len(index), BATCH):
        batch = data.batch(index[start : start + BATCH])
        with torch.no_grad():
            right = predict_classes(model(batch.x)) == batch.y
        found.append((batch.x[right], batch.y[right]))
        if sum(len(y) for _, y in found) >= count:
            break
    x, y = (torch.cat(column)[:count] for column in zip(*found, strict=True))
    return x, y


def attack_by_art(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """ART's PGD with the settings of `plain_loop`."""
    _, c, h, w = x.shape
    attack = ProjectedGradientDescentPyTorch(
        as_estimator(model, input_shape=(c, h, w)),
        eps=EPS,
        eps_step=STEP,
        max_iter=STEPS,
        batch_size=BATCH,
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def in_batches(attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The attack on `BATCH` images at a time."""
    starts = range(0, len(x), BATCH)
    return torch.cat([attack(x[i : i + BATCH], y[i : i + BATCH]) for i in starts])


def plain_loop(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Twenty steps with nothing around them."""
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    x_adv = x
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        loss = nn.functional.cross_entropy(network(x_adv), y, reduction="sum")
        grad = torch.autograd.grad(loss, x_adv)[0]
        x_adv = torch.clamp(x_adv.detach() + STEP * grad.sign(), lower, upper)
    return x_adv


def best_of(rounds: int, *jobs: Callable[[], object]) -> list[float]:
    """Shortest time of each job in seconds; the jobs take turns."""
    times = [[] for _ in jobs]  # type: list[list[float]]
    for _ in range(rounds):
        for job, taken in zip(jobs, times, strict=True):
            started = time.perf_counter()
            job()
            taken.append(time.perf_counter() - started)
    return [min(taken) for taken in times]


@click.command()
@network_options
@click.option("--images", default=500)
@click.option("--rounds", default=3)
def main(
    model: Classifier,
    data: str,
    images: int,
    rounds: int,
) -> None:
    """Print the ratios."""
    x, y = correct_images(model, data, images)
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")

    def ours(eps: float, a: Tensor, b: Tensor) -> Tensor:
        return pgd(model, a, b, eps=eps, step=STEP, steps=STEPS, random_start=False)

    def art(a: Tensor, b: Tensor) -> Tensor:
        return attack_by_art(model, a, b)

    broken: dict[str, np.ndarray] = {}
    passes: dict[str, str] = {}
    for name, attack in (("pgd", lambda a, b: ours(EPS, a, b)), ("ART", art)):
        with count_passes(model, len(x), x.device) as count:
            x_adv = in_batches(attack, x, y)
        with torch.no_grad():
            broken[name] = (predict_classes(model(x_adv)) != y).numpy()
        passes[name] = f"{count.forwards.mean():.1f} / {count.backwards.mean():.1f}"
    mine, theirs = best_of(
        rounds,
        lambda: in_batches(lambda a, b: ours(EPS, a, b), x, y),
        lambda: in_batches(art, x, y),
    )
    click.echo(
        f"images that fall:  pgd {mine:.2f} s, ART {theirs:.2f} s, ratio {mine / theirs:.3f};"
        f" broken {broken['pgd'].sum()} and {broken['ART'].sum()},"
        f" by ART alone {(broken['ART'] & ~broken['pgd']).sum()}"
    )
    click.echo(f"passes per image:  pgd {passes['pgd']}, ART {passes['ART']}")

    # so small a ball that nothing falls; the network without our blocks for the plain loop
    eps = 1e-5
    network = nn.Sequential(Shift(model), model.network)
    mine, plain = best_of(
        rounds,
        lambda: in_batches(lambda a, b: ours(eps, a, b), x, y),
        lambda: in_batches(lambda a, b: plain_loop(network, a, b, eps), x, y),
    )
    click.echo(
        f"images that hold:  pgd {mine:.2f} s, plain loop {plain:.2f} s, ratio {mine / plain:.3f}"
    )


class Shift(nn.Module):
    """The normalisation of a classifier alone."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.mean, self.std = model.mean, model.std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


if __name__ == "__main__":
    main()
