"""What pruning must keep, and how little it leaves where that is known."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from toys import Linear, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import quantise
from robusteval.search.descent import Count, count_changes, find_cheapest, prune, round_changes

if TYPE_CHECKING:
    from robusteval.attacks.pgd import pgd
else:
    pgd = late("robusteval.attacks.pgd", "pgd")


def labels_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def dense(bands: Classifier, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Images, their labels, and 8-bit images everywhere different, most of them adversarial."""
    x = quantise(torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(5)))
    y = labels_of(bands, x)
    return x, y, pgd(bands, x, y, eps=0.2, steps=20, loss="margin")


def fewest(linear: Linear, x: Tensor, x_adv: Tensor) -> int:
    """How many values of one image must be those of `x_adv` to cross the hyperplane."""
    side = float(((x * linear.weight).sum() + linear.bias).detach())
    gain = (-side * linear.weight.detach() * (x_adv - x)).flatten() / abs(side)
    for n in range(1, len(gain) + 1):
        if gain.sort(descending=True).values[:n].sum() > abs(side):
            return n
    raise AssertionError("x_adv is not on the other side")


def test_of_a_linear_model_the_fewest_possible_values_remain(
    linear: Classifier, grey_images: Tensor
) -> None:
    """Those of largest weight times change."""
    network, y = linear.network, labels_of(linear, grey_images)
    assert isinstance(network, Linear)
    away = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1) * network.weight.detach()
    x_adv = torch.where(away > 0, 0.9, 0.1)

    pruned = prune(linear, grey_images, x_adv, y)

    assert labels_of(linear, pruned).ne(y).all()
    for x, given, left in zip(grey_images, x_adv, pruned, strict=True):
        assert int((left != x).sum()) == fewest(network, x, given)


@pytest.mark.parametrize("count", ["l0", "l0_pixels"])
def test_no_success_is_lost_and_no_count_grows(bands: Classifier, count: Count) -> None:
    """Round by round; what succeeds after some rounds is kept by all further ones."""
    x, y, x_adv = dense(bands)
    fooled = labels_of(bands, x_adv) != y
    given = before = count_changes(x_adv, x, count)
    assert fooled.sum() >= 6

    for rounds in (0, 1, 2, 5, 10, 30, 100):
        pruned = prune(bands, x, x_adv, y, rounds=rounds, count=count)
        after = count_changes(pruned, x, count)
        assert torch.equal(labels_of(bands, pruned) != y, fooled)
        assert bool((after <= before).all())
        before = after
    assert bool((before < 0.25 * given)[fooled].all())


def test_in_the_end_no_single_value_can_be_spared(bands: Classifier) -> None:
    """Given rounds enough each was tried."""
    x, y, x_adv = dense(bands)
    pruned = prune(bands, x, x_adv, y, rounds=300)

    for image, origin, label in zip(pruned, x, y, strict=True):
        for place in (image != origin).nonzero().tolist():
            without = image.clone()
            without[tuple(place)] = origin[tuple(place)]
            assert labels_of(bands, without[None]) == label


def test_every_value_is_that_of_the_original_or_of_the_result(bands: Classifier) -> None:
    """So that 8-bit images stay such; of a place all channels or none, where places count."""
    x, y, x_adv = dense(bands)

    for count in ("l0", "l0_pixels"):
        pruned = prune(bands, x, x_adv, y, count=count)
        assert bool(((pruned == x) | (pruned == x_adv)).all())
        assert torch.equal(quantise(pruned), pruned)
    assert bool(((pruned == x).all(1) | (pruned == x_adv).all(1)).all())


def test_what_does_not_succeed_comes_back_as_it_is(bands: Classifier) -> None:
    """After one pass each."""
    x, y, _ = dense(bands)
    x_adv = quantise(x + 0.01)
    kept = x_adv.clone()
    hopeless = labels_of(bands, x_adv) == y

    with count_passes(bands, len(x), x.device) as passes:
        pruned = prune(bands, x, x_adv, y)

    assert torch.equal(pruned[hopeless], x_adv[hopeless])
    assert passes.forwards[hopeless].eq(1).all()
    assert torch.equal(x_adv, kept)


def test_targets_stay_reached(bands: Classifier) -> None:
    """And not just any class other than the label."""
    x, y, _ = dense(bands)
    target = (y + 1) % 3
    x_adv = pgd(bands, x, target, targeted=True, eps=0.4, steps=40)
    reached = labels_of(bands, x_adv) == target
    assert reached.sum() >= 6

    pruned = prune(bands, x, x_adv, target, targeted=True)

    assert torch.equal(labels_of(bands, pruned) == target, reached)
    assert bool((count_changes(pruned, x, "l0") < count_changes(x_adv, x, "l0"))[reached].all())


def test_one_forward_and_one_backward_pass_a_round(bands: Classifier) -> None:
    """The first judges what was given, the last needs no gradient; who is done pays no more."""
    x, y, x_adv = dense(bands)
    x_adv[0] = x[0]
    x_adv[0, 0, 0, 0] = 1 - x[0, 0, 0, 0]  # a single change
    wrong = torch.where(torch.arange(len(y)) == 0, (y + 1) % 3, y)

    for rounds in (1, 3, 30):
        with count_passes(bands, len(x), x.device) as passes:
            prune(bands, x, x_adv, wrong, rounds=rounds)
        assert passes.forwards[0] == 1
        assert passes.forwards.max() <= rounds
        assert passes.backwards.max() <= max(rounds - 1, 1)


def test_the_batch_does_not_matter(bands: Classifier) -> None:
    """Bit for bit."""
    x, y, x_adv = dense(bands)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])

    for count in ("l0", "l0_pixels"):
        together = prune(bands, x, x_adv, y, count=count)
        alone = [
            prune(bands, x[i : i + 1], x_adv[i : i + 1], y[i : i + 1], count=count)
            for i in range(8)
        ]
        assert torch.equal(torch.cat(alone), together)
        moved = prune(bands, x[order], x_adv[order], y[order], count=count)
        assert torch.equal(moved, together[order])


def test_no_images_are_no_problem(bands: Classifier) -> None:
    nothing = torch.empty(0, 3, 12, 12)

    assert prune(bands, nothing, nothing, torch.empty(0, dtype=torch.int64)).shape == nothing.shape


def test_mistaken_settings_are_refused(bands: Classifier) -> None:
    x, y, x_adv = dense(bands, 1)

    with pytest.raises(ValueError, match="rounds must be 0 or more"):
        prune(bands, x, x_adv, y, rounds=-1)
    with pytest.raises(ValueError, match="count must be l0 or l0_pixels"):
        prune(bands, x, x_adv, y, count="l2")  # type: ignore[arg-type]


def test_the_cheapest_are_picked_image_by_image() -> None:
    """Infinite costs come last, equal ones in their order."""
    cost = torch.tensor([[3.0, 1, torch.inf, 2], [0, 0, 0, 0]]).view(2, 1, 2, 2)

    picked = find_cheapest(cost, torch.tensor([2, 1]))

    assert picked.flatten(1).tolist() == [[False, True, False, True], [True, False, False, False]]


def test_only_changed_values_are_rounded() -> None:
    """An image between the grey levels keeps the rest to the bit."""
    x = torch.tensor([0.1234, 0.5, 0.75])
    z = torch.tensor([0.1234, 0.9, 0.75])

    assert round_changes(z, x).tolist() == [x[0].item(), quantise(z)[1].item(), 0.75]


def test_values_and_places_are_counted_as_they_differ() -> None:
    """Counted on the images: no more places than values, no more values than channels allow."""
    x = torch.zeros(4, 3, 2, 2)
    z = x.clone()
    for i, channel in itertools.product(range(1, 4), range(3)):
        z[i, channel, 0, : min(i, 2)] = float(channel < i)

    values, places = count_changes(z, x, "l0"), count_changes(z, x, "l0_pixels")

    assert values.tolist() == [0, 1, 4, 6]
    assert places.tolist() == [0, 1, 2, 2]
