"""Losses against their formulas, in numbers of any length where float64 does not reach."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.search.losses import (
    CrossEntropy,
    Loss,
    aimed_loss,
    attacker_loss,
    cross_entropy,
    divergence,
    dlr,
    margin,
    probability_margin,
    soft_margin,
)

LOGITS = torch.tensor([[3.0, 1.0, -1.0, 0.0], [0.0, 2.0, 5.0, 4.0]])
Y = torch.tensor([0, 1])
LOSSES: tuple[Loss, ...] = ("ce", "margin", "pm", "dlr")


def draw(classes: int, scale: float, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(n, k)``, classes, and classes other than those."""
    generator = torch.Generator().manual_seed(classes)
    z = scale * torch.randn(n, classes, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    step = 1 + torch.randint(classes - 1, (n,), generator=generator)
    return z, y, (y + step) % classes


def slope(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Derivatives ``(n, k)`` in the logits."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0].double()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one.double(), other.double(), dim=1, eps=1e-300)


def softmax(row: Tensor) -> list[Decimal]:
    powers = [Decimal(value).exp() for value in row.tolist()]
    total = sum(powers, Decimal(0))
    return [power / total for power in powers]


def unit(row: list[Decimal]) -> list[float]:
    """A direction: divided by its largest size, as that may be beyond any float."""
    most = max(abs(value) for value in row)
    return [float(value / most) for value in row]


def test_margin_is_the_gap_to_the_best_other_logit() -> None:
    """Positive where the class is predicted."""
    assert [2.0, -3.0] == margin(LOGITS, Y).tolist()


def test_dlr_is_the_formula_of_the_paper() -> None:
    """(z_y - max other) / (first - third); its sign is that of the margin."""
    assert [2 / 3, -3 / 3] == pytest.approx(dlr(LOGITS, Y).tolist())


def test_dlr_does_not_change_when_logits_are_rescaled() -> None:
    """Nor when they are shifted."""
    torch.testing.assert_close(dlr(100 * LOGITS - 7, Y), dlr(LOGITS, Y))


def test_losses_fall_as_the_attacker_gains() -> None:
    """Untargeted: as the label loses. Targeted: as the target wins. Aimed: as the gap closes."""
    better = LOGITS.clone()
    better[:, 0] -= 1  # label of the first image loses, target of none
    y, target = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    for loss in ("ce", "margin", "pm"):
        untargeted = [attacker_loss(z, y, targeted=False, loss=loss) for z in (LOGITS, better)]
        targeted = [attacker_loss(z, y, targeted=True, loss=loss) for z in (LOGITS, better)]
        aimed = [aimed_loss(z, y, target, loss) for z in (LOGITS, better)]
        assert bool((untargeted[1] < untargeted[0]).all())
        assert bool((targeted[1] > targeted[0]).all())
        assert bool((aimed[1] < aimed[0]).all())


def test_an_unknown_loss_is_refused() -> None:
    """The message names the known ones."""
    with pytest.raises(ValueError, match="ce, margin, pm or dlr"):
        attacker_loss(LOGITS, Y, targeted=False, loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ce, margin, pm or dlr"):
        aimed_loss(LOGITS, Y, 1 - Y, "hinge")  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_single_class_is_refused(loss: Loss) -> None:
    """There is nothing to reach."""
    one, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    for targeted in (False, True):
        with pytest.raises(ValueError, match="the model has only one"):
            attacker_loss(one, y, targeted=targeted, loss=loss)
    with pytest.raises(ValueError, match="the model has only one"):
        aimed_loss(one, y, y, loss)


def test_the_soft_margin_lies_between_its_two_ends() -> None:
    """At T = 1 minus the log odds of leaving; near T = 0 the margin; per image a T of its own."""
    z, y, _ = draw(5, 2.0)
    p = z.double().softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)

    torch.testing.assert_close(soft_margin(z.double(), y), (p / (1 - p)).log())
    torch.testing.assert_close(soft_margin(z, y, 1e-4), margin(z, y))
    each = torch.linspace(0.1, 3.0, len(z))
    alone = [soft_margin(z[i : i + 1], y[i : i + 1], float(each[i])) for i in range(len(z))]
    torch.testing.assert_close(soft_margin(z, y, each), torch.cat(alone))
    assert bool((soft_margin(z, y, 2.0) < margin(z, y)).all())


def test_mifpe_is_a_temperature() -> None:
    """Cross-entropy of logits divided by their first gap, which is not differentiated."""
    z, y, _ = draw(6, 3.0)
    top = z.topk(2, dim=1).values
    gap = top[:, 0] - top[:, 1]

    other = slope(
        lambda z: -F.cross_entropy(z / gap.unsqueeze(1).double(), y, reduction="none"), z.double()
    )

    assert cosine(slope(lambda z: soft_margin(z, y, gap), z), other).min() > 1 - 1e-9


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 100.0, 170.0])
def test_cross_entropy_keeps_value_and_direction(classes: int, scale: float) -> None:
    """Of float64, which reaches gaps of 700; sizes as well, where 1 - p is not below float32's."""
    z, y, _ = draw(classes, scale)
    wide = z.double().scatter(1, y.unsqueeze(1), -torch.inf).logsumexp(1)
    reference = F.softplus(wide - z.double().gather(1, y.unsqueeze(1)).squeeze(1), threshold=1e6)

    value = cross_entropy(z, y)

    torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=1e-37)

    def exact(z: Tensor) -> Tensor:
        others = z.scatter(1, y.unsqueeze(1), -torch.inf).logsumexp(1)
        return F.softplus(others - z.gather(1, y.unsqueeze(1)).squeeze(1), threshold=1e6)

    mine, true = slope(lambda z: cross_entropy(z, y), z), slope(exact, z.double())
    near = margin(z, y) < 690
    assert near.sum() > 0.7 * len(z)
    assert cosine(mine, true)[near].min() > 1 - 1e-8
    seen = margin(z, y) < 15
    torch.testing.assert_close(mine[seen], true[seen], rtol=2e-5, atol=1e-6)
    assert bool((mine.abs().amax(1) >= 2.0**-24).all())


def test_plain_cross_entropy_loses_its_direction() -> None:
    """What is mended: at a gap of 35 its gradient is at right angles to the true one."""
    z, y = torch.tensor([[40.0, 5.0, 4.0]]), torch.tensor([0])

    plain = slope(lambda z: F.cross_entropy(z, y, reduction="none"), z)

    assert plain[0, 0] == 0
    assert plain[0, 1] > 0
    assert slope(lambda z: cross_entropy(z, y), z)[0, 0] < 0


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0, 170.0])
def test_the_probability_margin_has_the_direction_of_probabilities(
    classes: int, scale: float
) -> None:
    """Of any two classes, however sure of one or of a third, in as many digits as it takes."""
    z, y, other = draw(classes, scale, 8)

    aimed = slope(lambda z: probability_margin(z, y, other), z)
    free = slope(lambda z: probability_margin(z, y), z)

    best = z.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
    with localcontext(prec=60 + 4 * int(scale)):
        for mine, ends in ((aimed, other), (free, best)):
            for row, own, second, found in zip(z, y.tolist(), ends.tolist(), mine, strict=True):
                p = softmax(row)
                true = [-each * (p[own] - p[second]) for each in p]
                true[own] += p[own]
                true[second] -= p[second]
                got = unit([Decimal(value) for value in found.tolist()])
                assert got == pytest.approx(unit(true), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(probability_margin(z, y), margin(z, y))


def test_the_probability_margin_is_its_linear_form() -> None:
    """Coefficients q_t, 1 - s(1 + q_t) and (1 - s)(1 + q_t) of the mixture of two directions."""
    z, y, _ = draw(7, 4.0)
    z = z.double()
    others = z.scatter(1, y.unsqueeze(1), -torch.inf)
    q = others.softmax(1)
    near, at = q.max(1)
    s = torch.sigmoid(-soft_margin(z, y))
    form = q * (1 - s * (1 + near)).unsqueeze(1)
    form[torch.arange(len(z)), at] += near
    form[torch.arange(len(z)), y] -= (1 - s) * (1 + near)

    mine = slope(lambda z: probability_margin(z, y), z)

    assert cosine(mine, -form).min() > 1 - 1e-9


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_no_targeted_ratio_is_constant(classes: int) -> None:
    """Whatever the ranks of the two classes; of two classes it is the margin."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, classes, generator=generator)
    z = torch.cat([z, z.sort(1).values, z.sort(1, descending=True).values])
    y = torch.arange(len(z)) % classes
    target = (y + 1 + torch.arange(len(z)) // classes % (classes - 1)) % classes

    for found in (
        slope(lambda z: aimed_loss(z, y, target, "dlr"), z),
        slope(lambda z: attacker_loss(z, target, targeted=True, loss="dlr"), z),
    ):
        assert bool((found.abs().amax(1) > 1e-4).all())
    if classes == 2:
        torch.testing.assert_close(dlr(z, y), margin(z, y))
    if classes == 10:
        top = z.topk(4, dim=1).values
        gap = z.gather(1, y.unsqueeze(1)) - z.gather(1, target.unsqueeze(1))
        formula = gap.squeeze(1) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
        torch.testing.assert_close(aimed_loss(z, y, target, "dlr"), formula)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
def test_the_divergence_of_two_sure_predictions_has_a_direction(scale: float) -> None:
    """p' - p in as many digits as it takes; its size too, where float32 can hold it."""
    before, _, _ = draw(4, scale, 8)
    after = before + 0.3 * scale * draw(4, 1.0, 8)[0].flip(0)

    mine = slope(lambda z: divergence(before, z), after)

    with localcontext(prec=60 + 4 * int(scale)):
        for one, other, found in zip(before, after, mine, strict=True):
            true = [q - p for p, q in zip(softmax(one), softmax(other), strict=True)]
            got = unit([Decimal(value) for value in found.tolist()])
            assert got == pytest.approx(unit(true), rel=1e-3, abs=1e-4)
            if max(true) > 1e-6:
                expected = [float(each) for each in true]
                assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    kl = F.kl_div(after.log_softmax(1), before.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(divergence(before, after), kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_the_same_bits_in_any_batch(loss: Loss) -> None:
    """Value and derivative, of cross-entropy and divergence too."""
    z, y, other = draw(7, 6.0, 37)
    near = z.roll(1, 1)

    def both(some: slice) -> Tensor:
        found = []
        measures: list[Callable[[Tensor], Tensor]] = [
            lambda v: attacker_loss(v, y[some], targeted=False, loss=loss),
            lambda v: attacker_loss(v, y[some], targeted=True, loss=loss),
            lambda v: aimed_loss(v, y[some], other[some], loss),
            lambda v: cross_entropy(v, y[some]),
            lambda v: divergence(near[some], v),
        ]
        for measure in measures:
            found += [measure(z[some]).unsqueeze(1).double(), slope(measure, z[some])]
        return torch.cat(found, 1)

    alone = torch.cat([both(slice(i, i + 1)) for i in range(len(z))])

    assert torch.equal(both(slice(0, 37)), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_enters(dtype: torch.dtype) -> None:
    """The loss is float32, the gradient of the type that came."""
    z = LOGITS.to(dtype).requires_grad_()
    for loss in LOSSES:
        value = attacker_loss(z, LOGITS.argmax(1), targeted=False, loss=loss)
        (grad,) = torch.autograd.grad(value.sum(), z)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        assert bool(grad.abs().amax(1).gt(0).all())


def test_a_module_has_the_reductions_of_torch() -> None:
    """So that it can stand where cross-entropy stood; soft labels are torch's own."""
    z, y, _ = draw(4, 2.0)
    for reduction in ("none", "mean", "sum"):
        expected = F.cross_entropy(z, y, reduction=reduction)
        torch.testing.assert_close(CrossEntropy(reduction=reduction)(z, y), expected)
    soft = z.flip(0).softmax(1)
    torch.testing.assert_close(CrossEntropy()(z, soft), F.cross_entropy(z, soft))
