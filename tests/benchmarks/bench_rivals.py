"""How long `pgd` and `sigma_zero` take beside the same attacks elsewhere. Run by hand.

With `torchattacks`, `foolbox` and `adv-lib` installed beside the suite, of which those that are
missing are left out:

    python tests/benchmarks/bench_rivals.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]
    python tests/benchmarks/bench_rivals.py … --sparse 60

The first form runs twenty steps of `pgd` at 8/255 from the image, with and without leaving finished
images alone, a hand-written loop of the same steps and the attacks of others, on 128 images after
the other, all in turns, and compares the sums. The loop is run in batches of several sizes; the
best is what others are compared with. The second form compares `sigma_zero` with adv-lib's, per
pass forward or back, as the two need not take as many. Processor seconds of all threads in one
process; the network is frozen for all, which spares others the derivatives of its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import click
import torch
from bench_pgd import (
    BATCH,
    EPS,
    STEP,
    STEPS,
    Shift,
    attack_by_art,
    correct_images,
    in_batches,
    plain_loop,
)
from networks import network_options
from torch import Tensor, nn

from robusteval.attacks.pgd import pgd
from robusteval.attacks.sigma_zero import sigma_zero
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.descent import Stop, count_changes

LOOPS = (32, 128)  # sizes of the loop's batches

Attack = Callable[[Tensor, Tensor], Tensor]


def list_rivals(model: Classifier, network: nn.Module) -> dict[str, Attack]:
    """The attacks of others that are installed, with the settings of `plain_loop`."""

    def call_art(x: Tensor, y: Tensor) -> Tensor:
        return attack_by_art(model, x, y)

    def call_torchattacks(x: Tensor, y: Tensor) -> Tensor:
        made = import_module("torchattacks").PGD(network, EPS, STEP, STEPS, random_start=False)
        found: Tensor = made(x, y)
        return found

    def call_foolbox(x: Tensor, y: Tensor) -> Tensor:
        foolbox = import_module("foolbox")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=False)
        _, found, _ = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), x, y, epsilons=EPS)
        done: Tensor = found
        return done

    def call_adv_lib(x: Tensor, y: Tensor) -> Tensor:
        attack = import_module("adv_lib.attacks").pgd_linf
        found: Tensor = attack(
            network,
            x,
            y,
            EPS,
            steps=STEPS,
            random_init=False,
            loss_function="ce",
            absolute_step_size=STEP,
        )
        return found

    others = {
        "torchattacks": call_torchattacks,
        "foolbox": call_foolbox,
        "adv_lib": call_adv_lib,
    }
    return {"ART": call_art, **{name: run for name, run in others.items() if find_spec(name)}}


def sum_times(
    x: Tensor, y: Tensor, jobs: dict[str, Attack], rounds: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Processor seconds of each job on all images, batch by batch in turns, and its images.

    Of each batch the fewest of all rounds.
    """
    seconds = dict.fromkeys(jobs, 0.0)
    images: dict[str, list[Tensor]] = {name: [] for name in jobs}
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):  # type: ignore[no-untyped-call]
        best = dict.fromkeys(jobs, float("inf"))
        found = {}
        for _ in range(rounds):
            for name, job in jobs.items():
                started = time.process_time()
                found[name] = job(a, b)
                best[name] = min(best[name], time.process_time() - started)
        for name in jobs:
            seconds[name] += best[name]
            images[name].append(found[name])
    return seconds, {name: torch.cat(parts) for name, parts in images.items()}


def compare_pgd(model: Classifier, x: Tensor, y: Tensor, rounds: int) -> None:
    """Print a line for each attack."""
    network = nn.Sequential(Shift(model), model.network).eval()

    def run_loop(size: int) -> Attack:
        def run(a: Tensor, b: Tensor) -> Tensor:
            parts = zip(a.split(size), b.split(size), strict=True)  # type: ignore[no-untyped-call]
            return torch.cat([plain_loop(network, *part, EPS) for part in parts])

        return run

    def ours(a: Tensor, b: Tensor, stop: Stop) -> Tensor:
        return pgd(model, a, b, eps=EPS, step=STEP, steps=STEPS, random_start=False, stop=stop)

    loops = {f"plain loop, batches of {size}": run_loop(size) for size in LOOPS}
    jobs: dict[str, Attack] = {
        "pgd, early stop off": lambda a, b: ours(a, b, "never"),
        "pgd, early stop on": lambda a, b: ours(a, b, "8bit"),
        **loops,
        **list_rivals(model, network),
    }
    in_batches(jobs["pgd, early stop off"], x[:BATCH], y[:BATCH])  # finds sizes of calls
    seconds, images = sum_times(x, y, jobs, rounds)
    plain = min(seconds[name] for name in loops)
    on = seconds["pgd, early stop on"]
    for name, took in seconds.items():
        with torch.no_grad():
            fooled = int((predict_classes(model(images[name].clamp(0, 1))) != y).sum())
        click.echo(
            f"{name}: {took:.2f} s, {took / plain:.3f} of the best plain loop; early stop on takes"
            f" {on / took:.3f} of it; fools {fooled} of {len(x)}"
        )


def compare_sparse(model: Classifier, x: Tensor, y: Tensor, steps: int, rounds: int) -> None:
    """Print what a pass of `sigma_zero` costs, here and in adv-lib."""
    network = nn.Sequential(Shift(model), model.network).eval()

    def pass_through(a: Tensor, b: Tensor) -> Tensor:
        for _ in range(steps):
            z = a.clone().requires_grad_()
            torch.autograd.grad(network(z).sum(), z)
        return a

    jobs: dict[str, tuple[nn.Module, Attack]] = {
        "sigma_zero": (model, lambda a, b: sigma_zero(model, a, b, steps=steps)),
        "passes alone": (network, pass_through),
    }
    if find_spec("adv_lib"):
        theirs = import_module("adv_lib.attacks").sigma_zero
        jobs["adv-lib"] = network, lambda a, b: theirs(network, a, b, num_steps=steps)
    sigma_zero(model, x, y, steps=40)  # finds sizes of calls
    best = dict.fromkeys(jobs, float("inf"))
    lines = {}
    for _ in range(rounds):
        for name, (counted, job) in jobs.items():
            with count_passes(counted, len(x), x.device) as passes:
                started = time.process_time()
                x_adv = job(x, y)
                took = time.process_time() - started
            total = float(passes.forwards.sum() + passes.backwards.sum())
            best[name] = min(best[name], took / total)
            with torch.no_grad():
                fooled = predict_classes(model(x_adv)) != y
            changed = count_changes(x_adv, x, "l0").double()
            changed[~fooled] = torch.inf
            lines[name] = (
                f"{total / len(x):.0f} passes per image, fools {int(fooled.sum())}, median"
                f" {float(changed.median()):g} values"
            )
    for name, each in best.items():
        click.echo(
            f"{name}: {1e3 * each:.3f} ms per pass, {lines[name]}; sigma_zero takes"
            f" {best['sigma_zero'] / each:.3f} of it"
        )


@click.command()
@network_options
@click.option("--images", default=500)
@click.option("--sparse", type=int, help="Compare sigma_zero on so many images.")
@click.option("--steps", default=300, help="Of sigma_zero.")
@click.option("--rounds", default=2)
def main(
    model: Classifier,
    data: str,
    images: int,
    sparse: int | None,
    steps: int,
    rounds: int,
) -> None:
    """Print the ratios."""
    x, y = correct_images(model, data, sparse or images)
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")
    with frozen(model):
        if sparse:
            compare_sparse(model, x, y, steps, rounds)
        else:
            compare_pgd(model, x, y, rounds)


if __name__ == "__main__":
    main()
