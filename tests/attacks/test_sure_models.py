"""Attacks on one model with logits of any size: what it answers is the same, and so what falls."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from toys import asked, late

from robusteval.art.from_art import from_art
from robusteval.art.to_art import as_estimator
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.registry import ATTACKS
from robusteval.search.losses import CrossEntropy

if TYPE_CHECKING:
    from robusteval.attacks.pgd import pgd
else:
    pgd = late("robusteval.attacks.pgd", "pgd")

N, CLASSES, EPS = 40, 5, 0.04
SEEDS = torch.arange(N)
FORMS = ("x3", "x10", "x30", "x100", "+10000", "float16")


class Scaled(nn.Module):
    """One linear layer whose logits are multiplied, shifted, or of another type."""

    def __init__(self, form: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(CLASSES, 48, generator=generator))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        weight = self.get_buffer("weight")
        logits = 3 * (x.flatten(1).unsqueeze(1) * (weight - weight.mean(0))).sum(2)
        if self.form == "float16":
            return logits.half()
        if self.form.startswith("x"):
            return logits * float(self.form[1:])
        return logits + float(self.form)


def build(form: str) -> Classifier:
    return Classifier(Scaled(form), num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Eight-bit images and what the model says of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(60, 196, (N, 3, 4, 4), generator=generator) / 255
    return x, predict_classes(build("x1")(x))


def fooled(form: str, x_adv: Tensor, y: Tensor) -> list[bool]:
    return (predict_classes(build(form)(x_adv)) != y).tolist()


@pytest.mark.parametrize("loss", ["ce", "margin", "pm", "dlr"])
def test_pgd_fools_the_same_images_at_every_scale(images: tuple[Tensor, Tensor], loss: Any) -> None:
    """Some and not all."""
    x, y = images

    def verdicts(form: str) -> list[bool]:
        x_adv = pgd(build(form), x, y, seeds=SEEDS, eps=EPS, steps=20, loss=loss)
        return fooled(form, x_adv, y)

    expected = verdicts("x1")

    assert 0.2 < sum(expected) / N < 0.9
    assert [verdicts(form) for form in FORMS] == [expected] * len(FORMS)


def test_targets_are_reached_at_every_scale(images: tuple[Tensor, Tensor]) -> None:
    """The class after the label: by losses without a scale the same images, by `ce` no fewer.

    What is soft at small logits nears the margin at large ones.
    """
    x, y = images
    goal = (y + 1) % CLASSES

    def reached(form: str, loss: Any) -> list[bool]:
        given: dict[str, Any] = {"eps": 3 * EPS, "steps": 20, "loss": loss}
        x_adv = pgd(build(form), x, goal, targeted=True, seeds=SEEDS, **given)
        return (predict_classes(build(form)(x_adv)) == goal).tolist()

    for loss in ("margin", "dlr"):
        expected = reached("x1", loss)
        assert 0.2 < sum(expected) / N < 0.9
        assert [reached(form, loss) for form in FORMS] == [expected] * len(FORMS)
    least = sum(reached("x1", "margin"))
    assert all(sum(reached(form, "ce")) >= least for form in ("x1", *FORMS))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_fools_the_same_images_at_every_scale(
    images: tuple[Tensor, Tensor], norm: str
) -> None:
    """Where the runner-up is not in doubt, as one step has one direction only."""
    x, y = images
    sure = build("x1")(x).topk(3).values
    x, y = x[sure[:, 1] - sure[:, 2] > 2], y[sure[:, 1] - sure[:, 2] > 2]
    attack = ATTACKS.load("fgsm")

    def verdicts(form: str) -> list[bool]:
        given: dict[str, Any] = {"norm": norm, "eps": EPS if norm == "linf" else EPS * 6}
        return fooled(form, attack(build(form), x, y, **given), y)

    expected = verdicts("x3")

    assert True in expected
    assert False in expected
    assert [verdicts(form) for form in FORMS] == [expected] * len(FORMS)


@pytest.mark.parametrize("name", ["sparse", "sigma_zero", "isi", "pgap", "advedge"])
def test_other_attacks_fool_as_many_at_every_scale(
    images: tuple[Tensor, Tensor], name: str
) -> None:
    """Those that look for the least change, and one that has maps to mind."""
    x, y = images
    given = asked(name, **({"eps": 0.3} if name == "advedge" else {}))

    def count(form: str) -> int:
        return sum(fooled(form, ATTACKS.load(name)(build(form), x, y, seeds=SEEDS, **given), y))

    expected = count("x1")

    assert expected > 0.9 * N
    assert [count(form) for form in ("x30", "x100", "+10000")] == [expected] * 3


def test_art_is_given_a_loss_that_does_not_vanish(images: tuple[Tensor, Tensor]) -> None:
    """Its attacks differentiate the estimator's loss."""
    x, y = images
    attack = from_art("ProjectedGradientDescentPyTorch", {"eps": EPS, "eps_step": 0.01})

    def verdicts(form: str) -> list[bool]:
        return fooled(form, attack(build(form), x, y), y)

    expected = verdicts("x1")

    assert 0.2 < sum(expected) / N < 0.9
    assert [verdicts(form) for form in ("x30", "x100")] == [expected] * 2


def test_cross_entropy_that_art_builds_itself_does_not_vanish(
    images: tuple[Tensor, Tensor],
) -> None:
    """Auto-PGD puts around the network an estimator with a loss of its own."""
    x, y = images
    given = {"eps": EPS, "eps_step": 0.01, "max_iter": 10, "nb_random_init": 1}
    attack = from_art("AutoProjectedGradientDescent", {**given, "loss_type": "cross_entropy"})

    expected = sum(fooled("x1", attack(build("x1"), x, y), y))

    assert 0.2 < expected / N < 0.9
    for form in ("x30", "x100"):
        assert sum(fooled(form, attack(build(form), x, y), y)) == pytest.approx(expected, abs=1)


def test_the_parts_of_arts_autoattack_have_losses_that_do_not_vanish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them that differentiates cross-entropy. It asks for a package that only runs them."""
    absent = ModuleType("multiprocess")
    absent.__spec__ = ModuleSpec("multiprocess", None)
    monkeypatch.setitem(sys.modules, "multiprocess", absent)
    made: Any = from_art("AutoAttack", {"eps": EPS, "eps_step": 0.01})._build(
        as_estimator(build("x1"), input_shape=(3, 4, 4)), 1, False
    )

    losses = [part for each in made.attacks for part in each.estimator.loss.modules()]
    kinds = {type(part) for part in losses if isinstance(part, nn.CrossEntropyLoss)}
    assert kinds == {CrossEntropy}
