"""What calling a network with equal bits costs beside a plain loop. Run by hand.

    python tests/benchmarks/bench_calls.py CHECKPOINT --data DATA --arch SPEC [--mean … --std …]
    python tests/benchmarks/bench_calls.py CHECKPOINT … --eps .5/255 --eps 1/255
    python tests/benchmarks/bench_calls.py --network vit_b_16 --network resnet50

The first form attacks images of which some hold and as many fall at once, as in the later steps of
a strong evaluation of 1,000 images of which 50, 5 and 1 % survive: `pgd` on all of them in one
batch, per image that holds and step, against a plain loop over those that hold in batches of the
size that is best for it. The second form runs whole attacks of 20 steps, in batches as `evaluate`
makes them, per gradient that was taken, against the same loop: once with no size of a call known,
then again. The third one takes 16 random
images of 224x224 through a network of torchvision with random weights and back, after sizes of
calls have been found, against the same without a classifier around. Processor seconds of all
threads, the best of alternating rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
from bench_pgd import Shift, correct_images
from networks import network_options
from torch import Tensor, nn

from robusteval.attacks.pgd import pgd
from robusteval.models import call_sizes
from robusteval.models.classifier import (
    Classifier,
    choose_batch_size,
    count_passes,
    frozen,
    predict_classes,
)
from robusteval.models.environment import keep_freed_memory
from robusteval.registry.signatures import read_number

STEPS, EPS = 10, 1e-5  # so small a ball that nothing falls in it
WHOLE = 20  # steps of a whole attack
HOLD = (500, 50, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def take_turns(rounds: int, *jobs: Callable[[], object]) -> list[float]:
    """Fewest processor seconds of each job; the jobs take turns."""
    best = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for i, job in enumerate(jobs):
            started = time.process_time()
            job()
            best[i] = min(best[i], time.process_time() - started)
    return best


def go_back_and_forth(network: nn.Module, x: Tensor, size: int) -> None:
    """Forward and gradient, so many images at a time."""
    for part in x.split(size):  # type: ignore[no-untyped-call]
        z = part.clone().requires_grad_()
        torch.autograd.grad(network(z).logsumexp(1).sum(), z)


def compare_survivors(model: Classifier, x: Tensor, y: Tensor, some: int, rounds: int) -> str:
    """A line on images of which some hold."""
    wrong = torch.where(torch.arange(len(x)) < some, y, (y + 1) % model.num_classes)
    plain = nn.Sequential(Shift(model), model.network)

    def attack(steps: int) -> None:
        pgd(model, x, wrong, eps=EPS, step=EPS, steps=steps, random_start=False)

    attack(STEPS)  # finds sizes of calls
    sizes = [size for size in SIZES if size < some] + [some]
    few, many, *loops = take_turns(
        rounds,
        lambda: attack(1),
        lambda: attack(1 + STEPS),
        *(lambda size=size: go_back_and_forth(plain, x[:some], size) for size in sizes),
    )
    ours, best = (many - few) / STEPS, min(loops)
    return (
        f"{some:3d} images hold: {1e3 * ours / some:.2f} ms per image and step, plain loop"
        f" {1e3 * best / some:.2f} in batches of {sizes[loops.index(best)]}, ratio"
        f" {ours / best:.3f}"
    )


def compare_whole(model: Classifier, x: Tensor, y: Tensor, eps: float, rounds: int) -> str:
    """A line on attacks of so many steps as it takes, in which most images leave on the way."""
    begin = 2 * choose_batch_size(x.shape[1:].numel(), x.device)
    sizes = [begin]
    while (rest := len(x) - sum(sizes)) > 0:  # as where the first one was quick
        sizes.append(min(rest, 4 * begin))
    pairs = list(zip(x.split(sizes), y.split(sizes), strict=True))  # type: ignore[no-untyped-call]
    plain = nn.Sequential(Shift(model), model.network)

    def attack() -> Tensor:
        return torch.cat([pgd(model, a, b, eps=eps, steps=WHOLE) for a, b in pairs])

    model.call_sizes = call_sizes.CallSizes()
    started = time.process_time()
    with count_passes(model, max(sizes), x.device) as passes:
        x_adv = attack()
    first = time.process_time() - started  # in which sizes of calls are tried
    with torch.no_grad():
        left = int((predict_classes(model(x_adv)) == y).sum())
    taken = float(passes.backwards.sum())
    some = x[: max(left, 1)]
    tried = [size for size in SIZES if size < len(some)] + [len(some)]
    loops = take_turns(
        rounds, *(lambda size=size: go_back_and_forth(plain, some, size) for size in tried)
    )
    size = tried[loops.index(min(loops))]
    times = max(1, round(taken / len(some)))

    def repeat() -> None:  # for as long as the attack takes: slow moments of a machine meet both
        for _ in range(times):
            go_back_and_forth(plain, some, size)

    ours, loop = take_turns(rounds, attack, repeat)
    mine, best = ours / taken, loop / times / len(some)
    return (
        f"eps {eps:.5f}: {left} of {len(x)} images hold, {taken / len(x):.1f} gradients each and"
        f" {float(passes.forwards.sum()) / taken:.2f} calls for each of these;"
        f" {1e3 * mine:.2f} ms per image and step, plain loop {1e3 * best:.2f} in batches of"
        f" {size}, ratio {mine / best:.3f}, the first time {first / taken / best:.3f}"
    )


def compare_network(name: str, images: int, rounds: int) -> str:
    """A line on a network of torchvision."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # what is zero says nothing
    model = Classifier(network, num_classes=1000).eval()
    x = torch.rand(images, 3, 224, 224)
    with frozen(model):
        patience, call_sizes.PATIENCE = call_sizes.PATIENCE, 0
        for _ in range(4):
            go_back_and_forth(model, x, images)
        call_sizes.PATIENCE = patience
        sizes = [size for size in SIZES if size <= images]
        ours, *loops = take_turns(
            rounds,
            lambda: go_back_and_forth(model, x, images),
            *(lambda size=size: go_back_and_forth(network, x, size) for size in sizes),
        )
    best = min(loops)
    (kind,) = model.call_sizes.kinds.values()
    return (
        f"{name}: {1e3 * ours / images:.0f} ms per image in calls of {kind.cut(images)}, plain loop"
        f" {1e3 * best / images:.0f} in batches of {sizes[loops.index(best)]}, ratio"
        f" {ours / best:.3f}"
    )


@click.command()
@network_options
@click.option("--network", "networks", multiple=True)
@click.option("--eps", "radii", multiple=True)
@click.option("--images", type=int)
@click.option("--rounds", default=3)
def main(
    model: Classifier,
    data: str,
    networks: tuple[str, ...],
    radii: tuple[str, ...],
    images: int | None,
    rounds: int,
) -> None:
    """Print the ratios."""
    keep_freed_memory()  # as commands do
    click.echo(f"{torch.get_num_threads()} threads")
    for name in networks:
        click.echo(compare_network(name, images or 16, rounds))
    if radii:
        x, y = correct_images(model, data, images or 2 * HOLD[0])
        with frozen(model):
            for eps in radii:
                click.echo(compare_whole(model, x, y, float(read_number(eps)), rounds))
    if networks or radii:
        return
    for some in (images,) if images else HOLD:
        x, y = correct_images(model, data, 2 * some)
        with frozen(model):
            click.echo(compare_survivors(model, x, y, some, rounds))


if __name__ == "__main__":
    main()
