"""What `advedge` does to classes and maps, and how fast. Run by hand.

    python tests/benchmarks/bench_advedge.py
    python tests/benchmarks/bench_advedge.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

Of correctly classified images, each with a random class to reach:

- success as 8-bit images, mean absolute difference of the scaled maps that are attacked (Grad's
  pooled to 56x56 with published settings), and its paired difference from the baseline with a 95 %
  interval; the baseline is plain targeted PGD with as many steps for the search `pgd`, the same
  search without the map term for the others
- seconds per step of class and map against the forward and backward passes that it must do, the
  least of several alternating rounds; of `rts` those of the mask network on feature maps at hand
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import click
import torch
from bench_pgd import correct_images
from networks import network_options
from torch import Tensor, autograd
from torch.nn import functional as F

from robusteval.attacks.advedge import advedge
from robusteval.attacks.dual_plan import Settings, choose_map_settings, choose_recipe
from robusteval.attacks.pgd import pgd
from robusteval.datasets.sources import open_data
from robusteval.interpreters.explainer import Interpreter, measure_mean_distance
from robusteval.interpreters.rectifiers import smooth_relu
from robusteval.interpreters.rts import collect_features, find_mask_network
from robusteval.interpreters.rts_training import prepare_rts
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.seeds import draw_targets
from robusteval.models.steps import count_passes
from robusteval.search.balls import quantise, ssim
from robusteval.search.edges import Variant

VARIANTS = get_args(Variant)


class Compared:
    """Results of one search on one interpreter beside those of its baseline."""

    def __init__(
        self, model: Classifier, x: Tensor, y: Tensor, goal: Tensor, explainer: Interpreter
    ) -> None:
        self.model, self.x, self.goal = model, x, goal
        self.explainer = explainer
        self.benign = self.explainer.trace_maps(model, x, y, None)[0]
        self.base: Tensor | None = None

    def show(self, name: str, attack: Callable[[], Tensor]) -> None:
        """One line; the first is the baseline."""
        started = time.perf_counter()
        with count_passes(self.model, len(self.x), self.x.device) as passes:
            x_adv = quantise(attack())
        seconds = time.perf_counter() - started
        with torch.no_grad():
            reached = predict_classes(self.model(x_adv)) == self.goal
            maps = self.explainer.trace_maps(self.model, x_adv, self.goal, None)[0]
        far = measure_mean_distance(maps, self.benign)
        line = (
            f"{name:34}{float(reached.double().mean()):8.3f}{float(far.mean()):8.4f}"
            f"{float(ssim(x_adv, self.x).mean()):8.4f}{float(passes.forwards.mean()):8.0f}"
            f"{float(passes.backwards.mean()):7.0f}{seconds / len(self.x):8.2f}"
        )
        if self.base is not None:
            gap = far - self.base
            wide = 1.96 * float(gap.std()) / math.sqrt(len(gap))
            ratio = float(far.mean() / self.base.mean())
            line += f"{float(gap.mean()):10.4f} ± {wide:.4f}{ratio:8.2f}"
        else:
            self.base = far
        click.echo(line)


def print_figures(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    search: str,
    interpreter: str,
    settings: Settings,
    eps: float,
) -> None:
    """Baseline and the three variants."""
    seeds = torch.arange(len(x))
    goal = draw_targets(y, seeds, model.num_classes)
    attacked = choose_map_settings(interpreter, settings, search, "advedge", min(x.shape[2:]))
    table = Compared(model, x, y, goal, Interpreter.build_differentiable(interpreter, attacked))
    click.echo(
        f"\n{search + ' ' + interpreter + ' ' + settings:34}{'reached':>8}{'map':>8}{'SSIM':>8}"
        f"{'forw.':>8}{'backw.':>7}{'s':>8}{'difference':>19}{'ratio':>8}"
    )
    common: dict[str, Any] = {
        "targeted": True,
        "seeds": seeds,
        "search": search,
        "interpreter": interpreter,
        "settings": settings,
        "eps": eps,
    }
    recipe = choose_recipe(interpreter, settings, search, "advedge")
    steps = recipe.warmup + recipe.steps
    if search == "pgd":
        plain: dict[str, Any] = {
            "steps": steps,
            "step": eps / 8,
            "random_start": False,
            "stop": "never",
        }
        table.show(
            "plain targeted pgd",
            lambda: pgd(model, x, goal, targeted=True, eps=eps, **plain),
        )
    table.show(
        "without the map",
        lambda: advedge(model, x, goal, variant="adv2", weight=0.0, **common),
    )
    for variant in VARIANTS:
        table.show(variant, partial(advedge, model, x, goal, variant=variant, **common))


def print_time(model: Classifier, x: Tensor, y: Tensor, names: Sequence[str], rounds: int) -> None:
    """Seconds per step of class and map, every image in every step."""
    steps, goal = 5, (y + 1) % model.num_classes
    settings: dict[str, Any] = {
        "targeted": True,
        "variant": "adv2",
        "warmup": 0,
        "every": 10**6,
        "stop": "never",
    }

    def image() -> Tensor:
        return x.detach().clone().requires_grad_()

    def cam_alone() -> None:
        for _ in range(steps):
            z = image()
            autograd.grad(F.cross_entropy(model(z), goal, reduction="sum"), z)

    def grad_alone() -> None:
        # a pass for the class; a pass, its derivative and that one's derivative for the map
        for _ in range(steps):
            z = image()
            loss = F.cross_entropy(model(z), goal, reduction="sum")
            with smooth_relu():
                score = model(z).gather(1, goal.unsqueeze(1)).sum()
                (slope,) = autograd.grad(score, z, create_graph=True)
            autograd.grad(loss + slope.square().sum(), z)

    def rts_alone() -> None:
        # a pass for the class, and one of the mask network on its feature maps, block by block
        for _ in range(steps):
            z = image()
            autograd.grad(F.cross_entropy(model(z), goal, reduction="sum"), z)
            leaves = [[part.requires_grad_() for part in block] for block in features]
            masks = [network(block, c) for block, c in zip(leaves, classes, strict=True)]
            squares = torch.cat(masks)[: len(x)].square().sum()
            autograd.grad(squares, [part for block in leaves for part in block])

    def run(interpreter: str, count: int) -> Callable[[], object]:
        return lambda: advedge(
            model,
            x,
            goal,
            interpreter=interpreter,
            steps=count,
            **settings,
        )

    if "rts" in names:
        network = find_mask_network(model)
        with torch.no_grad():
            features = collect_features(model, x)[1]
        rows = [len(block[-1]) for block in features]
        classes = torch.split(F.pad(goal, (0, sum(rows) - len(goal))), rows)
    alone = {"cam": cam_alone, "grad": grad_alone, "rts": rts_alone}
    jobs: dict[str, Callable[[], object]] = {}
    for name in names:
        # the difference of two lengths leaves out what is done once
        jobs |= {f"{name} must": alone[name], f"{name} 1": run(name, 1), name: run(name, 1 + steps)}
    best = dict.fromkeys(jobs, math.inf)
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - started)
    click.echo(f"\nper step, {len(x)} images; ratio to the passes it must do")
    for name in names:
        must, does = best[f"{name} must"] / steps, (best[name] - best[f"{name} 1"]) / steps
        click.echo(f"{name:8}{1e3 * must:9.1f} ms{1e3 * does:9.1f} ms{does / must:8.3f}")


@click.command()
@network_options
@click.option("--train", default="digits", help="what the masks of rts are trained on")
@click.option("--images", default=50)
@click.option("--rounds", default=3)
@click.option("--search", default="pgd")
@click.option("--interpreter", multiple=True, default=("cam", "grad", "rts"))
@click.option("--settings", type=click.Choice(get_args(Settings)), default="fast")
@click.option("--eps", default=8.0, help="radius of pgd in grey levels")
@click.option("--part", type=click.Choice(["figures", "time"]), multiple=True)
def main(
    model: Classifier,
    data: str,
    train: str,
    images: int,
    rounds: int,
    search: str,
    interpreter: tuple[str, ...],
    settings: Settings,
    eps: float,
    part: tuple[str, ...],
) -> None:
    """Print the tables."""
    x, y = correct_images(model, data, images)
    if "rts" in interpreter:
        prepare_rts(
            model, open_data(train, split="train", channels=model.identity["input_channels"])
        )
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")
    with frozen(model):
        if not part or "figures" in part:
            for name in interpreter:
                print_figures(model, x, y, search, name, settings, eps / 255)
        if not part or "time" in part:
            timed = [name for name in interpreter if name in ("cam", "grad", "rts")]
            print_time(model, x, y, timed, rounds)


if __name__ == "__main__":
    main()
