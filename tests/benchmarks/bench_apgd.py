"""What a step of `apgd` costs and how strong it is. Run by hand; nothing fails on a clock.

    python tests/benchmarks/bench_apgd.py
    python tests/benchmarks/bench_apgd.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]

For each norm the time of a step on images that hold, against one forward and one backward pass of
the same images with nothing around them: the best of several alternating rounds. With `--eps` also
what one search leaves of the images, beside ART's AutoProjectedGradientDescent and, where it is
installed, torchattacks' APGD with as many steps, and `pgd` with five restarts of half of them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import click
import torch
from art.attacks.evasion import AutoProjectedGradientDescent
from bench_pgd import best_of, correct_images, in_batches
from networks import network_options
from torch import Tensor

from robusteval.art.to_art import as_estimator
from robusteval.attacks.apgd import apgd
from robusteval.attacks.pgd import pgd
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import Norm

SMALL: dict[Norm, float] = {"linf": 1e-5, "l2": 1e-4, "l1": 1e-3}  # nothing falls


@click.command()
@network_options
@click.option("--images", default=128)
@click.option("--steps", default=20)
@click.option("--rounds", default=3, help="0: no times.")
@click.option("--eps", type=float)
def main(
    model: Classifier,
    data: str,
    images: int,
    steps: int,
    rounds: int,
    eps: float | None,
) -> None:
    """Print the ratios."""
    x, y = correct_images(model, data, images)
    click.echo(f"{len(x)} correctly classified images, {torch.get_num_threads()} threads")

    def pass_through() -> None:
        for _ in range(steps):
            z = x.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(model(z), y, reduction="sum")
            torch.autograd.grad(loss, z)
        with torch.no_grad():
            model(x)

    for norm, small in SMALL.items() if rounds else ():

        def search(norm: Norm = norm, small: float = small) -> None:
            apgd(model, x, y, norm=norm, eps=small, steps=steps)

        mine, plain = best_of(rounds, search, pass_through)
        click.echo(f"{norm}: {mine:.2f} s, passes alone {plain:.2f} s, ratio {mine / plain:.3f}")
    if eps is not None:
        compare(model, x, y, eps, steps)


def compare(model: Classifier, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    """Print what each attack leaves, and for how many passes."""
    _, c, h, w = x.shape

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        attack = AutoProjectedGradientDescent(
            as_estimator(model, input_shape=(c, h, w)),
            eps=eps,
            eps_step=2 * eps,
            max_iter=steps,
            nb_random_init=1,
            loss_type="cross_entropy",
            batch_size=len(a),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(a.numpy(), b.numpy()))

    def torchattacks(a: Tensor, b: Tensor) -> Tensor:
        attack = import_module("torchattacks").APGD(model, eps=eps, steps=steps, loss="ce")
        found: Tensor = attack(a, b)
        return found

    attacks = {
        "apgd": lambda a, b: apgd(model, a, b, eps=eps, steps=steps, stop="float"),
        "ART": theirs,
        **({"torchattacks": torchattacks} if find_spec("torchattacks") else {}),
        "pgd": lambda a, b: pgd(model, a, b, eps=eps, steps=steps // 2, restarts=5, stop="float"),
    }
    ours: Tensor | None = None
    for name, attack in attacks.items():
        with count_passes(model, len(x), x.device) as passes:
            x_adv = in_batches(attack, x, y)
        with torch.no_grad():
            left = predict_classes(model(x_adv)) == y
        ours = left if ours is None else ours
        click.echo(
            f"{name}: leaves {int(left.sum())} of {len(x)},"
            f" {int((left & ~ours).sum())} that apgd breaks, breaks {int((ours & ~left).sum())}"
            f" that it leaves,"
            f" {passes.forwards.mean():.1f} passes forward, {passes.backwards.mean():.1f} back"
        )


if __name__ == "__main__":
    main()
