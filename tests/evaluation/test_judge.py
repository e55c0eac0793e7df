"""The verdict is ours: whatever an attack returns is measured again."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusteval.errors import RunError
from robusteval.evaluation.computation import place_columns
from robusteval.evaluation.judge import (
    LEFT_BALL,
    LEFT_BOX,
    NOT_FINITE,
    fill_untouched,
    judge,
    repair,
)
from robusteval.models.classifier import Classifier
from robusteval.runs.types import Columns, Threat
from robusteval.search.balls import ssim

THREAT = Threat("linf", 0.1, False)


class Brightness(nn.Module):
    """Class 1 for images brighter than 0.5 on average, NaN for white ones."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.flatten(1).mean(1)
        logits = torch.stack([0.5 - level, level - 0.5], 1)
        return torch.where(level.unsqueeze(1) > 0.999, torch.nan, logits)


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(Brightness(), num_classes=2).eval()


def grey(*levels: float) -> Tensor:
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


def judge_result(
    classifier: Classifier, returned: Tensor, x: Tensor, y: Tensor, threat: Threat
) -> Columns:
    """Judge what an attack returned, and what had to be brought back."""
    x_adv, fault = repair(returned, x, threat)
    return {**judge(classifier, x_adv, x, y), "fault": fault.numpy()}


def test_predictions_are_made_anew(classifier: Classifier) -> None:
    """As the result is, rounded to 8 bit, and read back from a PNG file."""
    x, y = grey(0.45, 0.45), torch.zeros(2, dtype=torch.int64)
    # 0.5005 fools, but the nearest of 127 and 128 grey levels does so too; 0.4985 does not
    columns = judge_result(classifier, grey(0.5005, 0.4985), x, y, THREAT)

    assert columns["pred_adv"].tolist() == [1, 0]
    assert columns["pred_8bit"].tolist() == [1, 0]
    assert columns["pred_png"].tolist() == [1, 0]
    assert columns["margin_adv"] == pytest.approx([-0.001, 0.003], abs=1e-6)
    assert columns["linf"] == pytest.approx([0.0505, 0.0485], abs=1e-6)


def test_rounding_can_undo_a_success(classifier: Classifier) -> None:
    """On average 127.7 grey levels fool, what they are rounded to, 127.25, does not."""
    x, y = grey(0.45), torch.zeros(1, dtype=torch.int64)
    x_adv = torch.full((1, 3, 4, 4), 127.45 / 255)
    x_adv[..., 0] = 128.45 / 255

    columns = judge_result(classifier, x_adv, x, y, THREAT)

    assert columns["pred_adv"].tolist() == [1]
    assert columns["pred_8bit"].tolist() == [0]
    assert columns["pred_png"].tolist() == [0]


def test_images_that_left_the_ball_are_brought_back(classifier: Classifier) -> None:
    """And judged there: success outside does not count."""
    x, y = grey(0.3), torch.zeros(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(0.9), x, y, THREAT)

    assert columns["fault"].tolist() == [LEFT_BALL]
    assert columns["pred_adv"].tolist() == [0]
    assert columns["linf"] == pytest.approx([0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "eps"),
    # of 48 values, each changed by d: d, 48 d, sqrt(48) d
    [("linf", 0.1), ("l1", 4.8), ("l2", 48**0.5 * 0.1), ("l0", 24), ("l0_pixels", 8)],
)
def test_the_ball_ends_at_its_radius_in_every_norm(norm: str, eps: float) -> None:
    """What lies on it stays as it is, what is a thousandth outside does not."""
    x, inside, outside = grey(0.3), grey(0.4), grey(0.4001)
    if norm.startswith("l0"):  # half of the places, then one more
        inside, outside = x.clone(), x.clone()
        inside[:, :, :2] = outside[:, :, :2] = 0.4
        outside[:, 0, 2, 0] = 0.4

    kept, fault = repair(inside, x, Threat(norm, eps, False))
    assert fault.tolist() == [0]
    assert torch.equal(kept, inside)
    back, fault = repair(outside, x, Threat(norm, eps, False))
    assert fault.tolist() == [LEFT_BALL]
    assert repair(back, x, Threat(norm, eps, False))[1].tolist() == [0]


def test_likeness_that_may_be_lost_is_a_radius_too() -> None:
    """1 - SSIM, beyond which the attack has failed."""
    draw = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    x, x_adv = 0.2 + 0.6 * draw, 0.2 + 0.6 * draw.flip(3)
    lost = float(1 - ssim(x_adv, x))
    assert 0.5 < lost < 1.5

    kept, fault = repair(x_adv, x, Threat("ssim", lost + 1e-3, False))
    assert (fault.tolist(), torch.equal(kept, x_adv)) == ([0], True)
    kept, fault = repair(x_adv, x, Threat("ssim", lost - 1e-3, False))
    assert (fault.tolist(), torch.equal(kept, x)) == ([LEFT_BALL], True)


def test_images_that_left_the_box_are_clipped(classifier: Classifier) -> None:
    """A pixel beyond white is white."""
    x, y = grey(0.95), torch.ones(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(1.04), x, y, THREAT)

    assert columns["fault"].tolist() == [LEFT_BOX]
    assert columns["linf"] == pytest.approx([0.05], abs=1e-6)


def test_a_pixel_that_is_not_finite_fails_the_attack(classifier: Classifier) -> None:
    """The image is judged as if it had not been attacked."""
    x, y = grey(0.4, 0.4), torch.zeros(2, dtype=torch.int64)
    x_adv = grey(0.45, 0.45)
    x_adv[0, 0, 0, 0], x_adv[1, 0, 0, 0] = math.nan, math.inf

    columns = judge_result(classifier, x_adv, x, y, THREAT)

    assert columns["fault"].tolist() == [NOT_FINITE, NOT_FINITE]
    assert columns["l0"].tolist() == [0, 0]


def test_logits_that_are_not_finite_are_never_robust(classifier: Classifier) -> None:
    """The prediction is -1, which is no label."""
    x, y = grey(0.95), torch.ones(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(1.0), x, y, THREAT)

    assert columns["pred_adv"].tolist() == [-1]


def test_a_result_of_another_shape_is_an_error(classifier: Classifier) -> None:
    """One sentence, with both shapes."""
    x, y = grey(0.4), torch.zeros(1, dtype=torch.int64)

    with pytest.raises(RunError, match=r"\(1, 3, 4, 3\).*\(1, 3, 4, 4\)"):
        judge_result(classifier, x[..., :3], x, y, THREAT)


def test_a_minimum_norm_attack_has_no_ball(classifier: Classifier) -> None:
    """Any distance is allowed, and measured."""
    x, y = grey(0.1), torch.zeros(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(0.9), x, y, Threat("l2", None, False))

    assert columns["fault"].tolist() == [0]
    assert columns["l2"] == pytest.approx([0.8 * math.sqrt(48)], rel=1e-6)


def test_png_is_not_judged_where_it_cannot_hold_the_image() -> None:
    """Two channels: -2."""
    classifier = Classifier(Brightness(), num_classes=2).eval()
    x, y = torch.full((1, 2, 4, 4), 0.4), torch.zeros(1, dtype=torch.int64)

    assert judge_result(classifier, x, x, y, THREAT)["pred_png"].tolist() == [-2]


def test_what_is_too_far_in_l1_comes_back_into_the_ball(classifier: Classifier) -> None:
    """And is named."""
    x, y = grey(0.3, 0.3), torch.zeros(2, dtype=torch.int64)
    x_adv = grey(0.9, 0.3)
    x_adv[1, 0, 0, 0] += 0.5

    columns = judge_result(classifier, x_adv, x, y, Threat("l1", 1.0, False))

    assert columns["fault"].tolist() == [LEFT_BALL, 0]
    assert columns["l1"] == pytest.approx([1, 0.5])
    assert (columns["l1"] <= 1).all()


def test_a_ball_without_a_projection_fails_the_attack(classifier: Classifier) -> None:
    """What changes too many values goes back to the original."""
    x, y = grey(0.3, 0.3), torch.zeros(2, dtype=torch.int64)
    x_adv = grey(0.9, 0.3)
    x_adv[1, 0, 0, 0] += 0.5

    columns = judge_result(classifier, x_adv, x, y, Threat("l0", 4.0, False))

    assert columns["fault"].tolist() == [LEFT_BALL, 0]
    assert columns["l1"] == pytest.approx([0, 0.5])


def test_a_radius_in_no_known_norm_is_not_checked(classifier: Classifier) -> None:
    """Some attacks of ART have a radius of their own kind."""
    x, y = grey(0.3), torch.zeros(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(0.9), x, y, Threat("none", 0.1, False))

    assert columns["fault"].tolist() == [0]


def test_files_that_differ_from_rounding_are_judged_by_themselves(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG file loses nothing, and if it did it would show."""
    monkeypatch.setattr("robusteval.evaluation.judge.png_round_trip", lambda x: x * 0)
    x, y = grey(0.45), torch.zeros(1, dtype=torch.int64)

    columns = judge_result(classifier, grey(0.52), x, y, THREAT)

    assert columns["pred_8bit"].tolist() == [1]
    assert columns["pred_png"].tolist() == [0]


def test_images_that_are_not_attacked_stay_as_the_model_saw_them() -> None:
    """Attacked are those that were right, and raised no alarm."""
    clean: Columns = {
        "index": np.arange(4),
        "id": np.arange(4, dtype=np.uint64),
        "label": np.array([0, 1, 1, -1]),
        "pred_clean": np.array([0, 0, 1, -1]),
        "margin_clean": np.array([0.5, -0.5, 0.25, np.nan]),
        "confidence_clean": np.array([0.9, 0.8, 0.7, np.nan]),
    }

    plain = dict(fill_untouched(clean))
    watched = dict(fill_untouched({**clean, "flagged": np.arange(4) == 2, "score": np.zeros(4)}))

    assert plain["attacked"].tolist() == [True, False, True, False]
    assert watched["attacked"].tolist() == [True, False, False, False]
    for name in ("pred_adv", "pred_8bit", "pred_png"):
        assert plain[name].tolist() == [0, 0, 1, -1]
    assert plain["target"].tolist() == [-1] * 4
    assert plain["ssim"].tolist() == [1] * 4
    assert not any(plain[name].any() for name in ("l0", "l1", "l2", "linf", "fault", "forwards"))
    np.testing.assert_array_equal(plain["margin_adv"], clean["margin_clean"])
    np.testing.assert_array_equal(plain["confidence_adv"], clean["confidence_clean"])


def test_a_cell_shares_what_an_attack_does_not_change() -> None:
    """Of a million images there is no room for a column twice; what is known of them stays."""
    clean: Columns = {
        "index": np.arange(3),
        "id": np.arange(3, dtype=np.uint64),
        "label": np.array([0, 1, 1]),
        "pred_clean": np.array([0, 0, 1]),
        "margin_clean": np.array([0.5, -0.5, 0.25]),
        "confidence_clean": np.array([0.9, 0.8, 0.7]),
    }
    before = {name: column.copy() for name, column in clean.items()}
    found: Columns = {"pred_adv": np.array([1, 0]), "margin_adv": np.array([-1.0, -2.0])}

    placed = place_columns(clean, np.arange(3), np.array([0, 2]), found)

    assert placed["pred_adv"].tolist() == [1, 0, 0]
    assert placed["margin_adv"].tolist() == [-1.0, -0.5, -2.0]
    for name, column in clean.items():
        np.testing.assert_array_equal(column, before[name])
    assert all(placed[name] is clean[name] for name in ("index", "id", "label", "margin_clean"))


def test_the_square_of_a_patch_is_measured(classifier: Classifier) -> None:
    """Two pixels far apart are a large square; what rounding moves is none."""
    x = grey(0.3, 0.3, 0.3)
    x_adv = x + 0.4 / 255
    x_adv[0, 0, 1:3, 0:2] = 0.9
    x_adv[1, 0, 0, 0] = x_adv[1, 0, 2, 1] = 0.9
    share = 4 / (x.shape[2] * x.shape[3])

    fault = repair(x_adv, x, Threat("patch", share, False))[1]

    assert fault.tolist() == [0, LEFT_BALL, 0]
