"""Attacks on explanations part by part: the same bits, the same bookkeeping, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Bands, attackable

from robusteval.attacks.tracked_mask import TrackedMask
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.meaningful_perturbation import build_deletion
from robusteval.models.classifier import Classifier
from robusteval.models.steps import book_rows, count_passes
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise

SEEDS = torch.arange(13) * 1000
NAMES = ("advedge", "evade")


def images() -> Tensor:
    return quantise(torch.rand(13, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def small(network: nn.Module, name: str, block: int) -> Classifier:
    """Calls its network with `block` images, so that parts have four times as many."""
    classifier = Classifier(network, mean=(0.5,), std=(0.25,), num_classes=3, block=block)
    return attackable(name, classifier.eval())


def attacked(name: str, model: Classifier, x: Tensor, seeds: Tensor = SEEDS) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    given: dict[str, Any] = {"eps": 0.05, "warmup": 3, "steps": 6, "every": 2}
    mask = torch.ones(1, 1, 12, 12)
    mask[..., 0] = 0
    found = ATTACKS.load(name)(model, x, y, seeds=seeds, mask=mask, **given)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_large_batch_is_attacked_part_by_part(trained_bands: Bands, name: str) -> None:
    """Never more than four calls' worth at once, with the result of any other way to do it."""
    x, model = images(), small(trained_bands, name, block=2)
    expected = torch.cat([attacked(name, model, x[i : i + 1], SEEDS[i : i + 1]) for i in range(13)])
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    x_adv = attacked(name, model, x)
    handle.remove()

    assert max(seen[1:]) == 8
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_runs_out_halves_the_parts(trained_bands: Bands, name: str) -> None:
    """Down to what still fits; images are attacked as if nothing had been."""
    x, model = images(), small(trained_bands, name, block=2)
    expected = attacked(name, model, x)
    refused: list[int] = []

    def tight(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].requires_grad and len(args[0]) > 3:
            refused.append(len(args[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(tight)
    x_adv = attacked(name, model, x)
    handle.remove()

    assert refused == [8, 4]
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "calls"),
    [(torch.OutOfMemoryError("CUDA out of memory"), 3), (RuntimeError("no such operator"), 1)],
)
def test_what_smaller_parts_do_not_cure_is_passed_on(
    trained_bands: Bands, name: str, error: Exception, calls: int
) -> None:
    """A part of one call of the network is the least, and other errors are none of memory."""
    model, tried = small(trained_bands, name, block=2), []

    def full(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].requires_grad:
            tried.append(len(args[0]))
            raise error

    model.register_forward_pre_hook(full)
    with pytest.raises(type(error), match=str(error)):
        attacked(name, model, images())

    assert tried == [8, 4, 2][:calls]


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_booked_to_images_of_the_whole_batch(trained_bands: Bands, name: str) -> None:
    """Images that reach the class late are judged less often, in whichever part they are."""
    x = images()
    booked = []
    for block in (2, 32):
        model = small(trained_bands, name, block=block)
        with count_passes(model, 13, x.device) as passes:
            attacked(name, model, x)
        booked.append(passes.forwards.tolist())

    assert booked[0] == pytest.approx(booked[1])
    assert len(set(booked[1])) > 1


def test_masks_of_some_images_are_theirs(bands: Classifier) -> None:
    """Distances of a part of the batch are a part of the distances."""
    x, goal = images()[:4], torch.tensor([0, 1, 2, 0])
    deletion = build_deletion(x)
    benign = torch.zeros(4, 1, deletion.grid, deletion.grid)
    some = torch.tensor([3, 1])

    whole = TrackedMask(deletion, x, SEEDS[:4], 3, 0.1)
    whole.measure_distance(bands, x, goal, benign)
    part = whole.restrict(some)

    assert torch.equal(
        part.measure_distance(bands, x[some], goal[some], benign[some]),
        whole.measure_distance(bands, x, goal, benign)[some],
    )


def test_masks_that_were_made_for_these_very_images_are_not_made_again(bands: Classifier) -> None:
    """To the bit those of the interpreter, whose passes are spent on the other images alone."""
    x, goal, some = images()[:4], torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 2])
    explainer = Interpreter.build_differentiable("mask", {"iterations": 5})
    tracked = TrackedMask.from_interpreters([explainer], x, SEEDS[:4], 3, 0.1)
    assert tracked is not None
    tracked.make_maps(bands, x, goal)
    later = x[some].clone()
    later[1] = 1 - later[1]

    with torch.no_grad(), count_passes(bands, 4, x.device) as passes, book_rows(some):
        maps = tracked.explain_images(explainer, bands, later, goal[some], some)
        expected = explainer.trace_maps(bands, later, goal[some], SEEDS[some])[0]

    assert torch.equal(maps, expected)
    assert passes.forwards.tolist() == [0, 10, 5, 5]
    part = tracked.restrict(some).explain_images(
        explainer, bands, later, goal[some], torch.arange(3)
    )
    assert torch.equal(part, expected)
