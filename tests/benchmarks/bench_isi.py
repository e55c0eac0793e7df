"""What `isi` changes and what it costs. Run by hand; nothing fails on a clock.

    python tests/benchmarks/bench_isi.py
    python tests/benchmarks/bench_isi.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

Of correctly classified images:

- success and changed values, over all images (a failure counts as infinitely many), with passes
  and seconds, beside `jsma` and `sigma_zero`. Last bits of a logit can lead such a search to other
  values, so each runs with calls of several sizes: of each image the median of its counts is
  taken, and the last column says on how many images they differ
- seconds of all steps against plain forward and backward passes of the same numbers of images,
  the least of several alternating rounds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import torch
from bench_pgd import best_of, correct_images
from networks import network_options
from torch import Tensor

from robusteval.attacks.isi import isi
from robusteval.attacks.jsma import jsma
from robusteval.attacks.sigma_zero import sigma_zero
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import measure_distances
from robusteval.search.losses import margin

Attack = Callable[..., Tensor]

greedy = partial(isi, values=1, undo=False, prune=False)
SPARSE: dict[str, Attack] = {
    "paper, relevance": partial(isi, variant="paper"),
    "paper, sensitivity": partial(isi, variant="paper", indicator="sensitivity"),
    "gain and margin, one value": greedy,
    "and steps undone": partial(greedy, undo=True),
    "and pruned": partial(greedy, undo=True, prune=True),
    "and two values: the default": isi,
    "pixels": partial(isi, norm="l0_pixels"),
    "jsma, as published, any class": partial(jsma, polish=0),
    "jsma, as published, one class": partial(jsma, polish=0, targets=1),
    "jsma, pruned, any class": jsma,
    "sigma_zero, 30 steps": partial(sigma_zero, steps=30),
    "sigma_zero, 300 steps": sigma_zero,
}
BLOCKS = (8, 16, 32)  # images that the network is called with
STEPPED: dict[str, Attack] = {
    "paper, l0": partial(isi, variant="paper"),
    "l0": partial(isi, prune=False),
    "l0, one value": greedy,
    "l0_pixels": partial(isi, norm="l0_pixels", prune=False),
    "l2": partial(isi, norm="l2", stop="float"),
    "l2, eps 0.5": partial(isi, norm="l2", stop="float", eps=0.5),
    "linf": partial(isi, norm="linf", stop="float"),
}


def print_sparsity(model: Classifier, x: Tensor, y: Tensor, steps: int) -> None:
    """Success against changes, by the median over sizes of calls."""
    click.echo(
        f"{'':30}{'success':>8}{'mean':>7}{'median':>8}{'forw.':>8}{'back':>8}{'seconds':>9}"
        f"{'differ':>8}"
    )
    usual = model.block
    for name, attack in SPARSE.items():
        settings = {} if "sigma" in name or "jsma" in name else {"steps": steps}
        sizes, forwards, backwards, taken = [], 0.0, 0.0, 0.0
        for block in BLOCKS:
            model.block = block
            started = time.perf_counter()
            with count_passes(model, len(x), x.device) as passes:
                x_adv = attack(model, x, y, **settings)
            taken = time.perf_counter() - started
            forwards, backwards = (float(n.mean()) for n in (passes.forwards, passes.backwards))
            with torch.no_grad():
                fooled = predict_classes(model(x_adv)) != y
            size = measure_distances(x_adv, x)["l0_pixels" if name == "pixels" else "l0"]
            sizes.append(torch.where(fooled, size, torch.inf))
        model.block = usual
        counts = torch.stack(sizes)  # (blocks, n)
        size = counts.median(0).values
        differ = int((counts != counts[0]).any(0).sum())
        click.echo(
            f"{name:30}{size.isfinite().double().mean():8.3f}{size[size.isfinite()].mean():7.2f}"
            f"{size.median():8g}{forwards:8.1f}{backwards:8.1f}"
            f"{taken:9.2f}{differ:8}"
        )


def plain_passes(model: Classifier, x: Tensor, y: Tensor, sizes: list[int]) -> None:
    """Forward and backward passes of so many images, one after the other."""
    for size in sizes:
        z = x[:size].detach().requires_grad_()
        torch.autograd.grad(margin(model(z), y[:size]).sum(), z)


def print_ratios(model: Classifier, x: Tensor, y: Tensor, rounds: int, steps: int) -> None:
    """Seconds per step."""
    click.echo("\nsteps against plain passes of the same images")
    for name, attack in STEPPED.items():
        job = partial(attack, model, x, y, steps=steps)
        sizes: list[int] = []
        handle = model.register_forward_hook(lambda *call, found=sizes: found.append(len(call[2])))
        job()
        handle.remove()
        mine, plain = best_of(rounds, job, partial(plain_passes, model, x, y, sizes))
        click.echo(
            f"{name:30}{1000 * mine:8.0f} ms of {1000 * plain:.0f} ms, ratio {mine / plain:.3f};"
            f" {sum(sizes) / len(sizes):.0f} images in {len(sizes)} passes"
        )


@click.command()
@network_options
@click.option("--images", default=200)
@click.option("--steps", default=100)
@click.option("--rounds", default=3)
def main(
    model: Classifier,
    data: str,
    images: int,
    steps: int,
    rounds: int,
) -> None:
    """Print both tables."""
    with frozen(model):
        x, y = correct_images(model, data, images)
        click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads\n")
        print_sparsity(model, x, y, steps)
        print_ratios(model, x, y, rounds, steps)


if __name__ == "__main__":
    main()
