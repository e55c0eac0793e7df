"""How near to the best known distances our attacks come, as AttackBench measures it.

AttackBench: Evaluating Gradient-based Attacks for Adversarial Examples, arXiv:2404.19460. Run by
hand, with `attackbenchlib`, `adv-lib` and `foolbox` installed beside the suite:

    python tests/benchmarks/bench_attackbench.py CHECKPOINT --data DATA --arch SPEC --images 20

The benchmark's wrapper of the model counts passes, ends an attack after `--budget` of them
(forward plus backward, per image), and keeps the nearest success seen along the path. Local
optimality holds an attack's curve against the envelope of all attacks that were run here, so it
is only as good as their company and falls when a better one joins. Results are kept in `--out`:
a second call runs what is missing, and prints all.

One thing differs from the published protocol: images outside of [0, 1] are clamped here by
`limit_to_box`, not by the wrapper. The clamp of torch 2.14 gives a value that lies at a limit no
gradient, so that behind the wrapper's black and white pixels, most of MNIST, could not be moved by
any attack that starts at the image; before, and here, they have one. And an attack that goes on
when its budget is spent is ended: nothing that it asks then is answered.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robusteval.commands.shell import read_numbers
from robusteval.datasets.dataset import draw
from robusteval.datasets.sources import open_data
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.registry import ATTACKS, parse

# half of the passes are forward ones, and the last iterate takes one more
OURS = {
    "linf": (
        "fmn:norm=linf,images=float,steps=999",
        "fab:norm=linf,images=float,steps=110,targets=9",
    ),
    "l2": (
        "ddn:images=float,steps=999",
        "fmn:norm=l2,images=float,steps=999",
        "fab:norm=l2,images=float,steps=110,targets=9",
    ),
    "l1": (
        "fmn:norm=l1,images=float,steps=999",
        "fab:norm=l1,images=float,steps=110,targets=9",
    ),
    "l0": ("sigma_zero:steps=970", "fmn:norm=l0,steps=999"),
}
# the leaders of the published table, and what our attacks are forms of
OTHERS = {
    "linf": ("original:apgd_t_minimal", "original:apgd_minimal", "adv_lib:fmn_linf"),
    "l2": ("adv_lib:ddn_NQ", "original:apgd_minimal", "adv_lib:fmn"),
    "l1": ("adv_lib:pdpgd", "original:apgd_minimal_l1", "adv_lib:fmn"),
    "l0": ("original:sigma_zero", "adv_lib:fmn"),
}


def name_as_ours(text: str) -> Callable[..., Tensor]:
    """One of our attacks with the arguments that the benchmark gives."""
    spec = ATTACKS.check_spec(parse(text))
    attack = ATTACKS.load(spec.name)

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = attack(model, inputs, labels, **spec.parameters)
        return found

    return run


def name_as_theirs(library: str, name: str, norm: str) -> Callable[..., Tensor]:
    """An attack of another library as the benchmark configures it."""
    configs = import_module(f"attackbench.attacks.{library}.configs")
    settings = getattr(configs, f"{library}_{name}")() | {"threat_model": norm}
    build = getattr(configs, f"get_{library}_{settings.pop('name')}")
    settings.pop("source")
    asked = inspect.signature(build).parameters
    call = build(**{key: value for key, value in settings.items() if key in asked})
    if library != "original":
        return partial(configs._wrapper, attack=call)
    taken = inspect.signature(call).parameters

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        given = {"model": model, "inputs": inputs, "labels": labels, "threat_model": norm}
        given |= {"norm": norm, "targeted": False}
        found: Tensor = call(**{key: value for key, value in given.items() if key in taken})
        return found

    return run


class Plain(nn.Module):
    """A network with its normalisation and nothing else: other libraries are measured on such."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.network((x - self.model.mean) / self.model.std)
        return logits


class BudgetSpent(Exception):
    """No image of the batch may be asked about again."""


def end_when_spent(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attack; the images themselves, with what was seen along the path, if it was ended."""

    def run(**given: Any) -> Tensor:
        try:
            return attack(**given)
        except BudgetSpent:
            images: Tensor = given["inputs"]
            return images.clone()

    run.__signature__ = inspect.signature(attack)  # type: ignore[attr-defined]  # what it is given
    return run


def stop_at_budget(counted: Any, _args: object) -> None:
    """Forward hook of the benchmark's wrapper: an attack that has nothing left ends here."""
    if counted._benchmark_mode and counted.is_out_of_query_budget:
        raise BudgetSpent


def limit_to_box(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Forward hook: images in [0, 1], with a gradient for values at its ends but none outside."""
    (x,) = args
    return (torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1)),)


def run_one(
    name: str, norm: str, network: nn.Module, x: Tensor, y: Tensor, budget: int
) -> dict[str, Any]:
    """Distances of one attack as the benchmark sees them, and the passes it took."""
    run_attack = import_module("attackbench.run").run_attack
    library, _, attack = name.partition(":")
    theirs = library in ("original", "adv_lib")
    call = name_as_theirs(library, attack, norm) if theirs else name_as_ours(name)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    build = import_module("attackbench.models.benchmodel_wrapper").BenchModel
    counted = build(network, enforce_box=False)
    counted.register_forward_pre_hook(limit_to_box)
    counted.register_forward_pre_hook(stop_at_budget)
    found = run_attack(
        counted,
        loader,
        end_when_spent(call),
        norm,
        torch.device("cpu"),
        query_budget=budget,
        debug=True,
    )
    return {
        "distances": [float(value) for value in found["distances"][norm]],
        "forwards": float(np.mean(found["num_forwards"])),
        "backwards": float(np.mean(found["num_backwards"])),
        "seconds": float(np.sum(found["times"])),
    }


def measure_optimality(distances: dict[str, list[float]]) -> dict[str, float]:
    """The local optimality of each attack against the envelope of all."""
    eval_optimality = import_module("attackbench.metrics.distances").eval_optimality
    best = np.min([np.array(values) for values in distances.values()], 0)
    return {name: eval_optimality(values, best, 1.0) for name, values in distances.items()}


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True)
@click.option("--arch")
@click.option("--mean", callback=read_numbers)
@click.option("--std", callback=read_numbers)
@click.option("--images", default=20)
@click.option("--budget", default=2000)
@click.option("--norm", "norms", multiple=True, type=click.Choice(list(OURS)))
@click.option("--only", default="", help="Run attacks whose name begins like this.")
@click.option("--out", default="attackbench.json", type=click.Path(path_type=Path))
def main(
    checkpoint: str,
    data: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    images: int,
    budget: int,
    norms: tuple[str, ...],
    only: str,
    out: Path,
) -> None:
    """Print a table of all attacks, a row each."""
    model = load(checkpoint, arch=arch, mean=mean, std=std)
    source = open_data(data, channels=model.identity["input_channels"])
    batch = source.batch(draw(len(source), 2 * images, 0))
    with torch.no_grad():
        right = predict_classes(model(batch.x)) == batch.y
    x, y = batch.x[right][:images], batch.y[right][:images]
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for norm in norms or OURS:
        for name in (*OTHERS[norm], *OURS[norm]):
            key = f"{norm} {name} {len(x)} {budget}"
            if key not in kept and name.startswith(only):
                with frozen(Plain(model)) as network:
                    kept[key] = run_one(name, norm, network, x, y, budget)
                out.write_text(json.dumps(kept, indent=1))
    for norm in OURS:
        prefix, suffix = f"{norm} ", f" {len(x)} {budget}"
        rows = {
            key.removeprefix(prefix).removesuffix(suffix): row
            for key, row in kept.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
        if not rows:
            continue
        optimality = measure_optimality({name: row["distances"] for name, row in rows.items()})
        for name, row in sorted(rows.items(), key=lambda item: -optimality[item[0]]):
            found = [value for value in row["distances"] if math.isfinite(value)]
            click.echo(
                f"{norm:5} {name:50} {optimality[name]:.3f}  fooled {len(found)} of {len(x)},"
                f" median {np.median(found) if found else math.nan:.4g},"
                f" passes {row['forwards']:.0f} / {row['backwards']:.0f}, {row['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
