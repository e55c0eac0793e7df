"""How sparse the sparse attacks are, and how fast. Run by hand; nothing fails on a clock.

    python tests/benchmarks/bench_sparse.py
    python tests/benchmarks/bench_sparse.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

Of correctly classified images, for every attack: share of successes as 8-bit images; median number
of changed values and places over all images, a failure counted as infinite; their mean over the
successes; passes per image; time against plain forward and backward passes of the same active
batches, the least of several alternating rounds (`--rounds 0` leaves it out).
"""

from __future__ import annotations

from collections.abc import Callable

import click
import numpy as np
import torch
from bench_pgd import best_of, correct_images
from networks import network_options
from torch import Tensor, autograd

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS, parse
from robusteval.search.balls import quantise
from robusteval.search.descent import count_changes

SPECS = (
    "sigma_zero",
    "sigma_zero:polish=0",
    "sigma_zero:norm=l0_pixels",
    "sparse",
    "sparse:variant=paper",
    "sparse:variant=paper,polish=30",
    "jsma",
    "sparsefool",
    "sparsefool:polish=0",
)

Attack = Callable[[], Tensor]


def watched(model: Classifier, attack: Attack) -> tuple[Tensor, list[tuple[int, bool]]]:
    """The attack's result; images of every call of the model, and whether gradients follow."""
    calls: list[tuple[int, bool]] = []
    handle = model.register_forward_hook(
        lambda _module, args, logits: calls.append((len(args[0]), logits.requires_grad))
    )
    x_adv = attack()
    handle.remove()
    return x_adv, calls


def plain(model: Classifier, x: Tensor, calls: list[tuple[int, bool]]) -> None:
    """The same passes with nothing around them."""
    for n, backward in calls:
        z = x[:n].clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            logits = model(z)
        if backward:
            autograd.grad(logits.sum(), z)


@click.command()
@network_options
@click.option("--images", default=100)
@click.option("--rounds", default=1)
@click.option("--attack", "specs", multiple=True, default=SPECS)
def main(
    model: Classifier,
    data: str,
    images: int,
    rounds: int,
    specs: tuple[str, ...],
) -> None:
    """Print one line per attack."""
    x, y = correct_images(model, data, images)
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")
    for text in specs:
        spec = ATTACKS.check_spec(parse(text))
        function = ATTACKS.load(spec.name)

        def attack() -> Tensor:
            found: Tensor = function(model, x, y, seeds=torch.arange(len(x)), **spec.parameters)  # noqa: B023
            return found

        with count_passes(model, len(x), x.device) as passes:
            x_adv, calls = watched(model, attack)
        with torch.no_grad():
            fooled = predict_classes(model(quantise(x_adv))) != y
        values, places = (count_changes(x_adv, x, count).float() for count in ("l0", "l0_pixels"))
        reached = [np.where(fooled, size, np.inf) for size in (values, places)]
        click.echo(
            f"{text}: success {fooled.float().mean():.3f};"
            f" values, median {np.median(reached[0]):g} mean {values[fooled].mean():.2f};"
            f" places, median {np.median(reached[1]):g} mean {places[fooled].mean():.2f};"
            f" passes {passes.forwards.mean():.0f} / {passes.backwards.mean():.0f},"
            f" most {passes.forwards.max():.0f} / {passes.backwards.max():.0f}"
        )
        if rounds:
            mine, bare = best_of(rounds, attack, lambda: plain(model, x, calls))  # noqa: B023
            click.echo(f"  {mine:.1f} s, plain passes {bare:.1f} s, ratio {mine / bare:.3f}")


if __name__ == "__main__":
    main()
