"""How near `ddn` and `fmn` come, beside adv-lib's and Foolbox's, at equal steps. Run by hand.

With `adv-lib` and `foolbox` installed beside the suite:

    python tests/benchmarks/bench_distances.py CHECKPOINT --data DATA --arch SPEC --passes 100

A step is one forward and one backward pass; what was really spent is counted at the network. For
each attack the median distance of what it returns, an image that it does not fool at infinity,
and the same of what is left when that is saved: rounded to 256 levels, and fooling still. Ours
and adv-lib's DDN search for either kind by themselves, a row each. Results are kept in `--out`: a
second call runs what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench_attackbench import Plain
from bench_pgd import correct_images
from torch import Tensor, nn

from robusteval.attacks.ddn import ddn
from robusteval.attacks.fmn import fmn
from robusteval.commands.shell import read_numbers
from robusteval.models.checkpoint import load
from robusteval.models.classifier import frozen, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.nearest import measure_norm

Attack = Callable[[nn.Module, Tensor, Tensor, int], Tensor]  # the last: steps


def call_foolbox(name: str) -> Attack:
    """An attack of Foolbox, without a radius."""

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        foolbox = import_module("foolbox")
        attack = getattr(foolbox.attacks, name)(steps=steps)
        _, x_adv, _ = attack(foolbox.PyTorchModel(model.eval(), bounds=(0, 1)), x, y, epsilons=None)
        found: Tensor = x_adv
        return found

    return run


def call_adv_lib(name: str, **given: object) -> Attack:
    """An attack of adv-lib."""

    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        attack = getattr(import_module("adv_lib.attacks"), name)
        found: Tensor = attack(model, x, y, steps=steps, **given)
        return found

    return run


COMPARED: dict[str, dict[str, Attack]] = {
    "l2": {
        "ddn, float": lambda model, x, y, steps: ddn(model, x, y, images="float", steps=steps),
        "ddn, 8 bit": lambda model, x, y, steps: ddn(model, x, y, images="8bit", steps=steps),
        "fmn, float": lambda model, x, y, steps: fmn(
            model, x, y, norm="l2", images="float", steps=steps
        ),
        "adv-lib DDN, float": call_adv_lib("ddn", levels=None),
        "adv-lib DDN, 8 bit": call_adv_lib("ddn", levels=256),
        "adv-lib FMN": call_adv_lib("fmn", norm=2),
        "Foolbox DDN": call_foolbox("DDNAttack"),
        "Foolbox FMN": call_foolbox("L2FMNAttack"),
    },
    "linf": {
        "fmn, float": lambda model, x, y, steps: fmn(
            model, x, y, norm="linf", images="float", steps=steps
        ),
        "fmn, 8 bit": lambda model, x, y, steps: fmn(
            model, x, y, norm="linf", images="8bit", steps=steps
        ),
        "adv-lib FMN": call_adv_lib("fmn", norm=float("inf")),
        "Foolbox FMN": call_foolbox("LInfFMNAttack"),
    },
}


def measure(
    attack: Attack, norm: str, model: nn.Module, x: Tensor, y: Tensor, steps: int
) -> dict[str, Any]:
    """Distances of what an attack returns, as it is and when saved, and what it cost."""
    started = time.perf_counter()
    with count_passes(model, len(x), x.device) as passes:
        x_adv = attack(model, x, y, steps).detach().clamp(0, 1)
    row: dict[str, Any] = {
        "forwards": float(passes.forwards.mean()),
        "backwards": float(passes.backwards.mean()),
        "seconds": time.perf_counter() - started,
    }
    for name, image in (("float", x_adv), ("saved", (x_adv * 255).round() / 255)):
        with torch.no_grad():
            fooled = predict_classes(model(image)) != y
        size = measure_norm(image - x, "l2" if norm == "l2" else "linf")
        row[name] = torch.where(fooled, size, torch.inf).tolist()
    return row


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True)
@click.option("--arch")
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--images", default=200)
@click.option("--passes", default=100, help="Forward and backward ones, of which a step takes two.")
@click.option("--out", default="distances.json", type=click.Path(path_type=Path))
def main(
    checkpoint: str,
    data: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    images: int,
    passes: int,
    out: Path,
) -> None:
    """Print a table of all attacks, a row each."""
    model = load(checkpoint, arch=arch, mean=mean, std=std)
    x, y = correct_images(model, data, images)
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for norm, attacks in COMPARED.items():
        for name, attack in attacks.items():
            key = f"{norm}: {name}, {len(x)} images, {passes} passes"
            if key not in kept:
                with frozen(Plain(model)) as network:
                    kept[key] = measure(attack, norm, network, x, y, passes // 2)
                out.write_text(json.dumps(kept, indent=1))
            row = kept[key]
            found, saved = np.array(row["float"]), np.array(row["saved"])
            click.echo(
                f"{key}: median {np.median(found):.5f}, fooled {np.isfinite(found).sum()}; saved"
                f" {np.median(saved):.5f}, {np.isfinite(saved).sum()};"
                f" passes {row['forwards']:.0f} / {row['backwards']:.0f}, {row['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
