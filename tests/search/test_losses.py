"""Losses against their formulas."""

import pytest
import torch

from robusteval.search.losses import attacker_loss, dlr, margin

LOGITS = torch.tensor([[3.0, 1.0, -1.0, 0.0], [0.0, 2.0, 5.0, 4.0]])
Y = torch.tensor([0, 1])


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
    """Untargeted: as the label loses. Targeted: as the target wins."""
    better = LOGITS.clone()
    better[:, 0] -= 1  # label of the first image loses, target of none
    y = torch.zeros(2, dtype=torch.int64)
    for loss in ("ce", "margin"):
        untargeted = [attacker_loss(z, y, targeted=False, loss=loss) for z in (LOGITS, better)]
        targeted = [attacker_loss(z, y, targeted=True, loss=loss) for z in (LOGITS, better)]
        assert bool((untargeted[1] < untargeted[0]).all())
        assert bool((targeted[1] > targeted[0]).all())


def test_dlr_needs_three_classes_and_no_target() -> None:
    """The messages say what to use instead."""
    with pytest.raises(ValueError, match="loss=margin"):
        dlr(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="loss=margin"):
        attacker_loss(LOGITS, Y, targeted=True, loss="dlr")


def test_an_unknown_loss_is_refused() -> None:
    """The message names the known ones."""
    with pytest.raises(ValueError, match="ce, margin or dlr"):
        attacker_loss(LOGITS, Y, targeted=False, loss="hinge")  # type: ignore[arg-type]
