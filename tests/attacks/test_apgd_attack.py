"""`apgd` where its result is known: linear models, logits in other clothes, few classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Affine, draw_uniform

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, Norm, quantise
from robusteval.search.descent import build_aimed_objective
from robusteval.search.hyperplane import measure_to_hyperplane

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def apgd(*args: object, **options: object) -> Tensor:
    found = ATTACKS.load("apgd")(*args, **options)
    assert isinstance(found, Tensor)
    return found


def linear_model(classes: int, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 1, 6, 5, generator=generator)
    return Affine(weight).requires_grad_(False).eval()


def images(n: int, *, edges: bool = False, seed: int = 0) -> Tensor:
    """Images ``(n, 1, 6, 5)``, some with half of the values at 0 or 1."""
    x = draw_uniform(n, 1, 6, 5, seed=seed)
    return torch.where(draw_uniform(n, 1, 6, 5, seed=seed + 1) < 0.5, x.round(), x) if edges else x


def find_optimum(network: Affine, x: Tensor, norm: Norm) -> float:
    """The least distance at which an image ``(1, 1, 6, 5)`` reaches another class, in the box."""
    logits = network(x)
    y = int(logits.argmax())
    others = [k for k in range(logits.shape[1]) if k != y]
    return min(
        float(
            measure_to_hyperplane(
                x, (network.weight[k] - network.weight[y])[None], logits[:, y] - logits[:, k], norm
            )
        )
        for k in others
    )


class Dressed(nn.Module):
    """A network whose logits are multiplied, shifted and rounded to another type."""

    def __init__(
        self, network: nn.Module, scale: float, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network, self.scale, self.shift, self.dtype = network, scale, shift, dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x) * self.scale + self.shift
        return logits if self.dtype is None else logits.to(self.dtype)


def count_fooled(model: nn.Module, x: Tensor, norm: Norm, eps: float, **options: Any) -> int:
    y = model(x).argmax(1)
    found = apgd(model, x, y, norm=norm, eps=eps, stop="float", **options)
    return int((model(found).argmax(1) != y).sum())


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_a_linear_model_is_reached_and_no_more(
    norm: Norm, classes: int, edges: bool
) -> None:
    """A percent short of the distance it fails, a percent beyond it succeeds, box included."""
    network, x = linear_model(classes), images(1, edges=edges, seed=classes)
    optimum = find_optimum(network, x, norm)

    assert count_fooled(network, x, norm, 0.99 * optimum, steps=30, loss="margin") == 0
    assert count_fooled(network, x, norm, 1.01 * optimum, loss="margin") == 1
    # of a linear model the first target is the nearest class
    assert count_fooled(network, x, norm, 1.01 * optimum, loss="margin", targets=1) == 1


@pytest.mark.parametrize("loss", ["margin", "pm", "dlr"])
@pytest.mark.parametrize("targets", [0, 9])
def test_every_loss_reaches_the_optimum(loss: str, targets: int) -> None:
    """Aimed or not, of two, three or ten classes."""
    for classes in (2, 3, 10):
        network, x = linear_model(classes, seed=3), images(1, seed=classes)
        optimum = find_optimum(network, x, "linf")
        options = {"loss": loss, "targets": min(targets, classes - 1)}
        assert count_fooled(network, x, "linf", 1.01 * optimum, **options) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "pm"])
def test_verdicts_do_not_depend_on_the_size_of_the_logits(loss: str, norm: Norm) -> None:
    """Multiplied by up to 100, with 10,000 added, in half precision."""
    # of more classes, how much cross-entropy minds the distant ones depends on the size
    network, x = linear_model(10 if loss == "pm" else 2), images(1, seed=7)
    optimum = find_optimum(network, x, norm)
    forms = [
        *(Dressed(network, scale) for scale in (0.01, 1.0, 20.0, 100.0)),
        Dressed(network, 1.0, 1e4),
        Dressed(network, 1.0, dtype=torch.float16),
        Dressed(network, 100.0, dtype=torch.bfloat16),
    ]

    for model in forms:
        assert count_fooled(model, x, norm, 0.9 * optimum, steps=10, loss=loss) == 0
        assert count_fooled(model, x, norm, 1.1 * optimum, steps=50, loss=loss) == 1


@pytest.mark.parametrize("options", [{}, {"targets": 2}, {"targets": 2, "by": "logits"}])
def test_classes_in_another_order_give_the_same_images(
    bands: Classifier, options: dict[str, Any]
) -> None:
    """To the bit, with a loss that adds nothing up."""
    x = draw_uniform(4, 3, 12, 12, seed=5)
    y, order = predict_classes(bands(x)), torch.tensor([2, 0, 1])

    class Permuted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = bands(x)
            assert isinstance(logits, Tensor)
            return logits[:, order]

    straight = apgd(bands, x, y, eps=0.01, steps=10, loss="margin", **options)
    permuted = apgd(Permuted(), x, order.argsort()[y], eps=0.01, steps=10, loss="margin", **options)

    assert torch.equal(straight, permuted)


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_classes_that_are_equal_or_constant_do_no_harm(norm: Norm, targets: int) -> None:
    """Two equal rows of weights, which no image tells apart, and a row of zeros."""
    network, x = linear_model(5), images(1, seed=2)
    with torch.no_grad():
        y = int(network(x).argmax())
        network.weight[(y + 1) % 5] = network.weight[(y + 2) % 5]
        network.weight[(y + 3) % 5] = 0
    optimum = find_optimum(network, x, norm)

    assert count_fooled(network, x, norm, 1.01 * optimum, targets=targets, loss="margin") == 1


@pytest.mark.parametrize("norm", NORMS)
def test_few_steps_and_no_radius_work(bands: Classifier, norm: Norm) -> None:
    """One, two and five steps cost as many passes and one more; in a ball of zero nothing moves."""
    x = quantise(draw_uniform(3, 3, 12, 12, seed=4))
    y = predict_classes(bands(x))
    for steps in (1, 2, 5):
        with count_passes(bands, 3, x.device) as passes:
            found = apgd(bands, x, y, norm=norm, eps=1e-4, steps=steps)
        ball = Ball.around(x, norm, 1e-4)
        assert bool(ball.holds(found).all())
        assert passes.backwards.tolist() == [steps] * 3
        assert passes.forwards.min() >= steps + 1
        assert torch.equal(apgd(bands, x, y, norm=norm, eps=0.0, steps=steps), x)


@pytest.mark.parametrize(
    "options",
    [
        {"start": "odi", "restarts": 2, "steps": 8},
        {"targets": 2, "steps": 8, "loss": "dlr"},
        {"targets": 1, "steps": 8, "start": "odi", "norm": "l1", "eps": 4.0, "loss": "pm"},
    ],
)
def test_an_image_is_attacked_the_same_in_any_company(
    bands: Classifier, options: dict[str, Any]
) -> None:
    """Starts and targets, too: one by one and 64 together, the same bits."""
    x = quantise(draw_uniform(64, 3, 12, 12, seed=6))
    y, seeds = predict_classes(bands(x)), torch.arange(64)
    options = {"eps": 6 / 255, **options}

    together = apgd(bands, x, y, seeds=seeds, **options)

    for i in range(0, 64, 21):
        row = slice(i, i + 1)
        assert torch.equal(apgd(bands, x[row], y[row], seeds=seeds[row], **options), together[row])


def test_aims_cost_a_backward_pass_per_class_and_one_forward_pass() -> None:
    """And a search for each target that is left."""
    network = Classifier(linear_model(4), num_classes=4).eval()
    x = images(2)
    y = predict_classes(network(x))
    with count_passes(network, 2, x.device) as passes:
        apgd(network, x, y, eps=1e-4, steps=5, targets=3)

    assert passes.backwards.tolist() == [3 + 3 * 5] * 2
    assert passes.forwards.tolist() == [1 + 3 * 6] * 2


def test_a_hit_of_another_class_than_the_target_counts() -> None:
    """Whatever a search heads for, an image is done when it is fooled."""
    network, x = linear_model(3), images(1, seed=3)
    far, near, y = network(x).argsort(1).unbind(1)
    objective = build_aimed_objective(network, y, far, "margin")

    towards = x + 0.5 * (network.weight[near] - network.weight[y]).sign()
    score = objective(towards, torch.arange(1))

    assert network(towards).argmax(1).tolist() == near.tolist()
    assert score.is_adv.tolist() == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"start": "odi", "odi_steps": 0}, "odi_steps must be at least 1"),
        ({"targets": 1, "candidates": 0}, "candidates must be at least 1"),
        ({"targets": -1}, "targets must be 0 or more"),
        ({"targets": 2, "targeted": True}, "0 with targeted"),
        ({"targets": 3}, "targets must be at most 2, not 3: the model has 3 classes"),
        ({"norm": "l0"}, "norm must be one of linf, l2, l1"),
        ({"norm": "l1", "eps": -1.0}, "eps must be 0 or more for l1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_pass(
    options: dict[str, Any], message: str
) -> None:
    """In one sentence."""
    x, y = torch.empty(0, 1, 6, 5), torch.empty(0, dtype=torch.int64)

    with pytest.raises(ValueError, match=message):
        apgd(linear_model(3), x, y, **options)


def test_a_network_of_one_class_has_no_target() -> None:
    """One sentence, not an error of indices."""
    with pytest.raises(ValueError, match="the model has only one"):
        apgd(linear_model(1), images(1), torch.zeros(1, dtype=torch.int64), targets=1)


def test_more_targets_than_classes_are_refused_with_images_too() -> None:
    """The number of classes that may be aimed at is said."""
    x, y = images(2), torch.zeros(2, dtype=torch.int64)

    with pytest.raises(ValueError, match="at most 2, not 3"):
        apgd(linear_model(3), x, y, targets=3)


def test_a_ball_between_two_grey_levels_is_done_at_the_first_success() -> None:
    """No 8-bit image but the original lies in it, so none is waited for."""
    network = Classifier(linear_model(2), num_classes=2).eval()
    x = quantise(images(64))
    y = predict_classes(network(x))
    with count_passes(network, 64, x.device) as passes:
        found = apgd(network, x, y, eps=0.9 / 255, steps=20)
    fooled = predict_classes(network(found)) != y

    assert 0 < int(fooled.sum()) < 32
    assert bool((passes.backwards[fooled] < 20).all())
    assert set(passes.forwards[~fooled].tolist()) == {21}
