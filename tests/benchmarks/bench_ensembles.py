"""What `quick` and `standard` leave, for how many passes, and what `autoattack` breaks of it.

    python tests/benchmarks/bench_ensembles.py CHECKPOINT --data DATA --arch SPEC --eps 8/255

By hand: for networks that hold, `autoattack` takes seconds for each image. It is run on what
`standard` has left alone, as what is broken is broken, the images nearest to success first, in
portions; results are kept in `--out` after each, and a second call goes on from there.

With `--cross N` instead the first N right images are given to `standard` and `autoattack` and,
image by image beside them, to AutoAttack as ART has it (Auto-PGD on two losses with its own
restarts, DeepFool, Square) and, where it is installed, as torchattacks has it (the original's four
stages).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_attackbench import Plain
from torch import Tensor, nn

from robusteval.art.from_art import from_art
from robusteval.commands.shell import read_numbers, read_radius
from robusteval.datasets.dataset import draw
from robusteval.datasets.sources import open_data
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.demo import demo
from robusteval.models.seeds import sample_seeds
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, Norm
from robusteval.search.losses import margin

Attack = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, labels, seeds
SHORT = ("quick", "standard")


def measure(
    attack: str, network: nn.Module, x: Tensor, y: Tensor, seeds: Tensor, norm: str, eps: float
) -> dict[str, Any]:
    """What one attack does to correctly classified images ``(n, c, h, w)``."""
    search = ATTACKS.load(attack)
    with count_passes(network, len(x), x.device) as passes:
        x_adv = search(network, x, y, seeds=seeds, norm=norm, eps=eps)
    with torch.no_grad():
        logits = network(x_adv)
    return {
        "left": (predict_classes(logits) == y).tolist(),
        "margin": margin(logits, y).tolist(),
        "passes": (passes.forwards + passes.backwards).tolist(),
        "stages": {
            name: [
                int(stage.seen.sum()),
                int(stage.made.sum()),
                float((stage.forwards + stage.backwards).sum()),
            ]
            for name, stage in passes.stages.items()
        },
    }


def show(name: str, row: dict[str, Any], drawn: int) -> None:
    """Print what an attack left of all images that were drawn, and what each stage did."""
    left = np.array(row["left"])
    click.echo(
        f"{name}: leaves {left.sum()} of {len(left)} right ones of {drawn}, robust accuracy"
        f" {left.sum() / drawn:.3f}, {np.mean(row['passes']):.0f} passes per right image"
    )
    for stage, (seen, made, cost) in row["stages"].items():
        click.echo(f"  {stage}: {seen} images, fools {made}, {cost / max(seen, 1):.0f} passes each")


def list_crossed(model: Classifier, norm: Norm, eps: float) -> dict[str, Attack]:
    """Ours, and AutoAttack of other libraries."""

    def ours(name: str) -> Attack:
        search = ATTACKS.load(name)
        return lambda x, y, seeds: search(model, x, y, seeds=seeds, norm=norm, eps=eps)

    def art(x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        given = {"norm": "inf" if norm == "linf" else 2, "eps": eps, "eps_step": 2 * eps}
        found: Tensor = from_art("AutoAttack", given)(model, x, y, seeds=seeds)
        return found

    def original(x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        library, classes = import_module("torchattacks"), model.num_classes
        given = {"norm": "Linf" if norm == "linf" else "L2", "eps": eps, "seed": 0}
        stages = [  # its own AutoAttack takes 10 steps
            library.APGD(model, steps=100, loss="ce", **given),
            library.APGDT(model, steps=100, n_classes=classes, **given),
            library.FAB(model, steps=100, multi_targeted=True, n_classes=classes, **given),
            library.Square(model, n_queries=5000, **given),
        ]
        found: Tensor = library.MultiAttack(stages)(x, y)
        return found

    crossed: dict[str, Attack] = {"standard": ours("standard"), "autoattack": ours("autoattack")}
    crossed |= {"torchattacks": original} if find_spec("torchattacks") else {}
    return crossed | {"ART": art}


def cross(
    out: Path,
    settings: str,
    model: Classifier,
    images: tuple[Tensor, Tensor, Tensor],
    norm: Norm,
    eps: float,
) -> None:
    """Run what is missing of the attacks on the same images, and print who breaks which."""
    x, y, seeds = images
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    left: dict[str, Any] = {}
    for name, attack in list_crossed(model, norm, eps).items():
        key = f"{settings} cross {len(x)} {name}"
        if key not in kept:
            with count_passes(model, len(x), x.device) as passes:
                x_adv = attack(x, y, seeds).detach()
            inside = Ball.around(x, norm, eps).project(x_adv)
            with torch.no_grad():
                robust = predict_classes(model(inside)) == y
            cost = float((passes.forwards + passes.backwards).mean())
            kept[key] = {"left": robust.tolist(), "passes": cost}
            out.write_text(json.dumps(kept))
        left[name] = np.array(kept[key]["left"])
        count = left[name].sum()
        click.echo(f"{name}: leaves {count} of {len(x)}, {kept[key]['passes']:.0f} passes each")
    for one, mine in left.items():
        for other, theirs in left.items():
            only = np.flatnonzero(mine & ~theirs).tolist()
            if only:
                click.echo(f"{one} leaves, {other} breaks: {only}")


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True)
@click.option("--arch")
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--images", default=500, help="Drawn, right and wrong ones.")
@click.option("--norm", default="linf", type=click.Choice(["linf", "l2"]))
@click.option("--eps", required=True, callback=read_radius)
@click.option("--portion", default=50, help="Images that `autoattack` is given at a time.")
@click.option("--portions", default=1000, help="At most so many of them in this call.")
@click.option("--cross", "crossed", default=0, help="Images for all AutoAttacks, and no more.")
@click.option("--out", default="ensembles.json", type=click.Path(path_type=Path))
def main(
    checkpoint: str,
    data: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    images: int,
    norm: Norm,
    eps: float,
    portion: int,
    portions: int,
    crossed: int,
    out: Path,
) -> None:
    """Print what is left, and for how many passes."""
    path = str(demo()) if checkpoint == "demo" else checkpoint
    model = load(path, arch=arch, mean=mean, std=std)
    source = open_data(data, channels=model.identity["input_channels"])
    batch = source.batch(draw(len(source), min(images, len(source)), 0))
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    settings = f"{Path(checkpoint).name} {images} {norm} {eps:.8f}"
    with frozen(Plain(model)) as network:
        with torch.no_grad():
            right = predict_classes(network(batch.x)) == batch.y
        x, y = batch.x[right], batch.y[right]
        seeds = sample_seeds(0, batch.ids)[right]
        if crossed:
            some = (x[:crossed], y[:crossed], seeds[:crossed])
            cross(out, settings, model, some, norm, eps)
            return
        for name in SHORT:
            key = f"{settings} {name}"
            if key not in kept:
                kept[key] = measure(name, network, x, y, seeds, norm, eps)
                out.write_text(json.dumps(kept))
            show(name, kept[key], len(batch.y))
        row = kept[f"{settings} standard"]
        nearest = np.argsort(row["margin"], kind="stable")
        nearest = nearest[np.array(row["left"])[nearest]]
        tried = broken = 0
        for start in range(0, len(nearest), portion):
            key, some = f"{settings} autoattack {portion} {start}", nearest[start : start + portion]
            if key not in kept:
                if portions == 0:
                    break
                portions -= 1
                kept[key] = measure("autoattack", network, x[some], y[some], seeds[some], norm, eps)
                out.write_text(json.dumps(kept))
            show("autoattack", kept[key], len(some))
            tried += len(some)
            broken += int((~np.array(kept[key]["left"])).sum())
    click.echo(f"of the {len(nearest)} left by standard autoattack breaks {broken} of {tried}")


if __name__ == "__main__":
    main()
