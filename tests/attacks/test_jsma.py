"""`jsma`: the saliency map by hand, both directions, and the best of all classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from toys import late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import quantise

if TYPE_CHECKING:
    from robusteval.attacks.jsma import choose_values, jsma
else:
    jsma = late("robusteval.attacks.jsma", "jsma")
    choose_values = late("robusteval.attacks.jsma", "choose_values")


def images(n: int = 6) -> Tensor:
    return quantise(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def classes_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def choose(toward: list[float], away: list[float], **given: Any) -> tuple[list[int], float]:
    """Places and bound of one image of a row of values, all grey."""
    shape = (1, 1, 1, len(toward))
    free = torch.ones(shape, dtype=torch.bool)
    chosen = choose_values(
        torch.tensor(toward).view(shape),
        torch.tensor(away).view(shape),
        given.pop("z", torch.full(shape, 0.5)),
        given.pop("free", free),
        given.pop("direction", "both"),
        **given,
    )
    return chosen.mask.flatten().nonzero().flatten().tolist(), float(chosen.bound)


def test_one_value_speaks_for_the_class_and_against_the_others() -> None:
    """Eq. 8 up, Eq. 9 down; whatever speaks for both or against both is out."""
    toward, away = [3.0, 1.0, -2.0, 9.0, -9.0], [-1.0, -2.0, 4.0, 5.0, -5.0]

    assert choose(toward, away, direction="up", pairs=False) == ([0], 1.0)
    assert choose(toward, away, direction="down", pairs=False) == ([2], 0.0)
    assert choose(toward, away, pairs=False) == ([2], 0.0)  # 8 against 3
    assert choose([1.0], [1.0], pairs=False)[0] == []


def test_a_pair_is_the_best_of_all_by_the_sums_of_its_slopes() -> None:
    """As by trying all of them; a value on its bound is not in one."""
    generator = torch.Generator().manual_seed(1)
    toward, away = (torch.randn(20, generator=generator) for _ in range(2))
    pairs = [(i, j) for i in range(20) for j in range(i)]

    def worth(pair: tuple[int, int], sign: int) -> float:
        a, b = (float(sign * s[list(pair)].sum()) for s in (toward, away))
        return -a * b if a > 0 > b else 0.0

    for direction, sign in (("up", 1), ("down", -1)):
        expected = max(pairs, key=lambda pair: worth(pair, sign))
        found, _ = choose(toward.tolist(), away.tolist(), direction=direction, pairs=True)
        assert sorted(expected) == found
    z = torch.full((1, 1, 1, 20), 0.5)
    z[..., expected[0]] = 0.0
    found, _ = choose(toward.tolist(), away.tolist(), direction="down", pairs=True, z=z)
    assert expected[0] not in found


def test_the_best_of_all_classes_has_the_fewest_changes(bands: Classifier) -> None:
    """Never more than that towards any one class, and at its cost."""
    x = images()
    y = classes_of(bands, x)
    both = jsma(bands, x, y, polish=0)
    count = (both != x).flatten(1).sum(1)
    assert (classes_of(bands, both) != y).all()
    assert bool(((both == x) | (both == 0) | (both == 1)).all())

    for k in (1, 2):
        goal = (y + k) % 3
        one = jsma(bands, x, goal, targeted=True, polish=0)
        reached = classes_of(bands, one) == goal
        assert reached.any()
        assert (count <= (one != x).flatten(1).sum(1))[reached].all()
        assert torch.equal(one[~reached], x[~reached])
    pruned = jsma(bands, x, y)
    assert ((pruned != x).flatten(1).sum(1) <= count).all()
    assert (classes_of(bands, pruned) != y).all()


def test_a_step_costs_one_pass_forward_and_two_back(bands: Classifier) -> None:
    x = images()
    y = classes_of(bands, x)
    with count_passes(bands, 6, x.device) as passes:
        jsma(bands, x, y, targets=1, steps=3, values="one", direction="up", polish=0)

    steps = passes.forwards - 1  # beside the one that asks for the likeliest class
    assert (passes.backwards <= 2 * steps).all()
    assert (passes.backwards >= 2 * (steps - 1)).all()  # the last one is judged alone
    assert steps.max() <= 4


@pytest.mark.parametrize("settings", [{"steps": 0}, {"targets": 0}, {"polish": -1}])
def test_odd_settings_are_refused(bands: Classifier, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        jsma(bands, torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64), **settings)
