"""What `pgap` and `fpgap` change, how visibly, where, and how fast. Run by hand.

    python tests/benchmarks/bench_pgap.py
    python tests/benchmarks/bench_pgap.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

Of correctly classified images, all attacks by their own parameter:

- fooling rate against SSIM and PSNR: steps to the SSIM ball and plain l2 steps of the same
  length, both ended at the first success, as published (`float`) and so that it survives rounding
  (`8bit`); l2 balls of one radius for all images
- where the change lies, against Grad-CAM++: precision at the paper's threshold and at equal area,
  energy ratio, and the same of noise of equal length
- seconds per step against one forward and backward pass of the same images, the least of several
  alternating rounds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import torch
from bench_pgd import correct_images
from networks import network_options
from torch import Tensor

from robusteval.attacks.pgap import fpgap, pgap
from robusteval.attacks.pgd import fgsm, pgd
from robusteval.evaluation.localisation import (
    average_known,
    map_noise,
    measure_energy,
    measure_overlap,
    measure_overlap_at,
)
from robusteval.interpreters.cam import gradcam_plus_plus
from robusteval.interpreters.scaling import min_max, resize
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import psnr, quantise, ssim
from robusteval.search.losses import margin
from robusteval.search.noise import add_equal_noise

BATCH = 128
SHARES = (0.02, 0.05, 0.2)

Attack = Callable[[Classifier, Tensor, Tensor], Tensor]


def l2_steps(eps2: float, stop: str) -> Attack:
    """Plain l2 steps of the length of `fpgap`'s, in a ball that does not bind."""

    def attack(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        deviation = x.flatten(1).std(1).mean().item()
        step = 2**0.5 * eps2 * deviation * x[0].numel() ** 0.5
        settings = {"norm": "l2", "eps": 60 * step, "step": step, "steps": 50}
        return pgd(model, x, y, random_start=False, loss="margin", stop=stop, **settings)  # type: ignore[arg-type]

    return attack


def rivals(x: Tensor) -> dict[str, Attack]:
    """Every attack of the sweep; l2 radii in proportion to the edge of an image."""
    found: dict[str, Attack] = {}
    for stop in ("float", "8bit"):
        for eps2 in (0.001, 0.002, 0.005, 0.01, 0.02):
            found[f"fpgap {eps2:g} {stop}"] = partial(fpgap, eps2=eps2, stop=stop)
            found[f"pgap {eps2:g} {stop}"] = partial(pgap, eps2=eps2, stop=stop)
            found[f"l2 steps {eps2:g} {stop}"] = l2_steps(eps2, stop)
    found["pgap 0.01 original"] = partial(pgap, eps2=0.01, reference="original")
    found["fpgap 0.005 as printed"] = partial(
        fpgap, eps2=0.005, stop="float", printed_constants=True
    )
    for eps in (0.1, 0.2, 0.4):
        eps *= (x[0].numel() / 3072) ** 0.5
        found[f"pgd l2 {eps:.2g}"] = partial(
            pgd, norm="l2", eps=eps, steps=50, random_start=False, loss="margin", stop="never"
        )
    return found


def print_sweep(model: Classifier, x: Tensor, y: Tensor) -> None:
    """Fooling rate against similarity."""
    click.echo(f"\n{'attack':28}{'fooled':>8}{'8-bit':>8}{'SSIM':>9}{'PSNR':>7}{'steps':>7}")
    for name, attack in rivals(x).items():
        with count_passes(model, len(x), x.device) as passes:
            x_adv = attack(model, x, y)
        with torch.no_grad():
            found = [predict_classes(model(z)) != y for z in (x_adv, quantise(x_adv))]
        fooled, kept = (float(mask.double().mean()) for mask in found)
        changed = psnr(x_adv, x)
        click.echo(
            f"{name:28}{fooled:8.3f}{kept:8.3f}{ssim(x_adv, x).mean():9.5f}"
            f"{changed[changed.isfinite()].mean():7.2f}{passes.backwards.mean() - 1:7.2f}"
        )


def print_localisation(model: Classifier, x: Tensor, y: Tensor) -> None:
    """Where the change lies."""
    relevance = min_max(resize(gradcam_plus_plus(model, x, y), (x.shape[2], x.shape[3])))
    attacks: dict[str, Attack] = {
        "fpgap 0.005": partial(fpgap, stop="float"),
        "pgap 0.005": partial(pgap, stop="float"),
        "l2 steps": l2_steps(0.005, "float"),
        "pgd l2 0.4": partial(
            pgd, norm="l2", eps=0.4 * (x[0].numel() / 3072) ** 0.5, steps=50, stop="never"
        ),
        "pgd linf 2/255": partial(pgd, eps=2 / 255, stop="never"),
        "pgd linf 8/255": partial(pgd, eps=8 / 255, stop="never"),
        "fgsm 8/255": fgsm,
    }
    click.echo(f"\nrelevant share of the image {float((relevance > 0.75).double().mean()):.3f}")
    shares = "".join(f"{share:>8.0%}" for share in SHARES)
    click.echo(f"{'precision at':28}{'noise>.11':>12}{'empty':>7}{shares}{'energy':>8}{'ratio':>8}")
    seeds = torch.arange(len(x))
    for name, attack in attacks.items():
        x_adv = attack(model, x, y)
        for label, z in (
            (name, x_adv),
            ("  noise of equal length", add_equal_noise(x_adv, x, seeds)),
        ):
            noise, sent = map_noise(z, x), measure_energy(z, x, relevance)
            fixed = average_known(measure_overlap(noise, relevance).precision)
            equal = [
                average_known(measure_overlap_at(noise, relevance, s).precision).value
                for s in SHARES
            ]
            click.echo(
                f"{label:28}{fixed.value:12.3f}{fixed.empty:7}"
                + "".join(f"{value:8.3f}" for value in equal)
                + f"{average_known(sent.inside).value:8.3f}{average_known(sent.ratio).value:8.2f}"
            )


def print_time(model: Classifier, x: Tensor, y: Tensor, rounds: int) -> None:
    """Seconds per step, with every image in every step."""
    steps = 10

    def plain() -> None:
        for _ in range(steps):
            z = x.detach().requires_grad_()
            torch.autograd.grad(margin(model(z), y).sum(), z)

    def judged() -> None:
        with torch.no_grad():
            model(x)

    settings = {"steps": steps, "stop": "never"}
    jobs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "judged": judged,
        "fpgap": lambda: fpgap(model, x, y, **settings),  # type: ignore[arg-type]
        "pgap closed": lambda: pgap(model, x, y, solver="closed", **settings),  # type: ignore[arg-type]
        "pgap box": lambda: pgap(model, x, y, **settings),  # type: ignore[arg-type]
        "pgap original": lambda: pgap(model, x, y, reference="original", **settings),  # type: ignore[arg-type]
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - started)
    # the attacks end on one forward pass more, which judges the last step
    last = best.pop("judged")
    click.echo(f"\nper step, {len(x)} images; ratio to a plain forward and backward pass")
    for name, seconds in best.items():
        seconds -= 0 if name == "plain" else last
        click.echo(f"{name:28}{1e3 * seconds / steps:8.1f} ms{seconds / best['plain']:8.3f}")


@click.command()
@network_options
@click.option("--images", default=200)
@click.option("--rounds", default=5)
@click.option("--part", type=click.Choice(["sweep", "where", "time"]), multiple=True)
def main(
    model: Classifier,
    data: str,
    images: int,
    rounds: int,
    part: tuple[str, ...],
) -> None:
    """Print the tables."""
    x, y = correct_images(model, data, images)
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")
    with frozen(model):
        if not part or "sweep" in part:
            print_sweep(model, x, y)
        if not part or "where" in part:
            print_localisation(model, x, y)
        if not part or "time" in part:
            print_time(model, x[:BATCH], y[:BATCH], rounds)


if __name__ == "__main__":
    main()
