"""Trees, thresholds and simpler rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from robusteval.defenses.boosting import (
    DEFAULT,
    GRID,
    ColumnRule,
    Logistic,
    Trees,
    TreeSettings,
    check_both_labels,
    choose_threshold,
    cross_validate_trees,
    fit_trees,
    smooth_odds,
)
from robusteval.errors import UsageError

Array = np.ndarray[Any, Any]


def noisy(n: int, d: int, seed: int) -> tuple[Array, Array]:
    """Features of which the first two say something of the label."""
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(n, d)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + 0.5 * draws.normal(size=n) > 0).astype(np.int64)
    return x, y


@pytest.fixture(scope="module")
def fitted() -> tuple[str, Array]:
    """A model of XGBoost as JSON, and features."""
    x, y = noisy(600, 8, 0)
    text, rounds = fit_trees(x, y, np.ones(600), np.arange(400), np.arange(400, 600), 0)
    assert json.loads(text)["learner"]["gradient_booster"]["model"]["gbtree_model_param"][
        "num_trees"
    ] == str(rounds)
    return text, x


def test_trees_answer_as_xgboost_does(fitted: tuple[str, Array]) -> None:
    xgboost = pytest.importorskip("xgboost")
    text, x = fitted
    x = x.copy()
    x[3, 2] = np.nan
    x[4] = np.nan
    booster = xgboost.Booster()
    booster.load_model(bytearray(text.encode()))

    expected = booster.predict(xgboost.DMatrix(x))

    np.testing.assert_allclose(Trees.parse_booster(text, 8).predict_scores(x), expected, atol=1e-6)


def test_score_does_not_depend_on_the_batch(fitted: tuple[str, Array]) -> None:
    text, x = fitted
    trees = Trees.parse_booster(text, 8)

    whole = trees.predict_scores(x)

    alone = np.concatenate([trees.predict_scores(each[None]) for each in x])
    np.testing.assert_array_equal(alone, whole)
    assert len(trees.predict_scores(x[:0])) == 0


def test_fit_with_the_same_seed_is_the_same(fitted: tuple[str, Array]) -> None:
    x, y = noisy(600, 8, 0)

    again, _ = fit_trees(x, y, np.ones(600), np.arange(400), np.arange(400, 600), 0)

    assert again == fitted[0]


def change_name(model: Any) -> None:
    model["learner"]["gradient_booster"]["name"] = "dart"


def change_features(model: Any) -> None:
    model["learner"]["learner_model_param"]["num_feature"] = "9"


def change_prior(model: Any) -> None:
    model["learner"]["learner_model_param"]["base_score"] = "[1E0]"


def first(model: Any) -> Any:
    return model["learner"]["gradient_booster"]["model"]["trees"][0]


def change_child(model: Any) -> None:
    first(model)["left_children"][0] = 10**6


def change_way(model: Any) -> None:
    """The second node leads back to the first."""
    tree = first(model)
    inner = next(i for i, child in enumerate(tree["left_children"]) if i and child >= 0)
    tree["left_children"][inner] = 0


def change_feature(model: Any) -> None:
    first(model)["split_indices"][0] = 8


def change_length(model: Any) -> None:
    first(model)["split_conditions"].pop()


def change_value(model: Any) -> None:
    first(model)["split_conditions"][-1] = float("nan")


def change_huge(model: Any) -> None:
    first(model)["split_indices"][0] = 10**30


def change_trees(model: Any) -> None:
    model["learner"]["gradient_booster"]["model"]["trees"] = []


def change_kind(model: Any) -> None:
    first(model)["split_type"][0] = 1


def change_shape(model: Any) -> None:
    model["learner"] = []


CHANGES = [change_name, change_features, change_prior, change_child, change_way, change_feature]
CHANGES += [change_length, change_value, change_huge, change_trees, change_kind, change_shape]


@pytest.mark.parametrize("change", CHANGES)
def test_model_that_is_not_sound_is_refused(
    fitted: tuple[str, Array], change: Callable[[Any], None]
) -> None:
    model = json.loads(fitted[0])
    change(model)

    with pytest.raises(ValueError, match=r"."):
        Trees.parse_booster(json.dumps(model), 8)


def test_threshold_lets_no_more_through_than_asked_for() -> None:
    scores = np.random.default_rng(0).random(200)

    for fpr in (0.05, 0.01):
        threshold = choose_threshold(scores, fpr)
        assert (scores > threshold).sum() == fpr * 200
    assert choose_threshold(scores[:50], 0.01) == scores[:50].max()
    assert (np.ones(100) > choose_threshold(np.ones(100), 0.05)).sum() == 0


def test_best_rule_finds_the_column_and_its_sign() -> None:
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(300, 4)), np.arange(300) % 2
    x[:, 2] -= 2 * y

    rule = ColumnRule.choose_best(x, y, range(4))

    assert rule == (2, -1.0)
    np.testing.assert_array_equal(rule.predict_scores(x), -x[:, 2])


def test_logistic_regression_is_that_of_raw_columns() -> None:
    from sklearn.linear_model import LogisticRegression

    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(300, 3)), np.arange(300) % 2
    x[:, 1] = 10 * x[:, 1] + 3 * y
    x[:, 2] = 7

    rule = Logistic.fit_rows(x, y, np.ones(300))

    scaled = (x[:, :2] - x[:, :2].mean(0)) / x[:, :2].std(0)
    expected = LogisticRegression(max_iter=2000).fit(scaled, y).decision_function(scaled)
    np.testing.assert_allclose(rule.predict_scores(x), expected, atol=1e-4)
    assert rule.slope[2] == 0


def test_too_few_of_one_kind_are_refused() -> None:
    y = np.array([0, 0, 0, 1])

    check_both_labels(y, np.arange(4), "the fit", 1)
    with pytest.raises(UsageError, match="only 1 attacked images of 4 for the fit"):
        check_both_labels(y, np.arange(4), "the fit", 2)


def test_a_grid_begins_with_the_default_and_has_each_setting_once() -> None:
    assert GRID[0] == DEFAULT
    assert len(set(GRID)) == len(GRID) == 12


def test_trees_grow_as_they_are_told() -> None:
    x, y = noisy(300, 4, 1)
    rows = np.arange(300)
    for depth in (1, 3):
        settings = TreeSettings(depth=depth, rate=0.3, columns=1.0)
        text, _ = fit_trees(x, y, np.ones(300), rows[:200], rows[200:], 0, settings)
        assert Trees.parse_booster(text, 4).depth == depth


def test_rows_of_one_group_are_never_parted() -> None:
    """Features that name the group tell nothing of others; those that name the label tell all."""
    draws = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    of_group = draws.normal(size=(60, 3)).astype(np.float32)[groups]
    label = draws.integers(0, 2, 60)[groups]
    told = np.concatenate([of_group, label[:, None].astype(np.float32)], 1)
    weights, fast = np.ones(240), TreeSettings(rate=0.5, columns=1.0)

    blind = cross_validate_trees(of_group, label, weights, groups, 0, fast)

    assert blind == pytest.approx(0.5, abs=0.2)
    assert cross_validate_trees(told, label, weights, groups, 0, fast) == 1.0


def test_a_smooth_stand_in_nears_the_trees_and_has_a_derivative(
    fitted: tuple[str, Array],
) -> None:
    """With a narrow blur the same odds away from thresholds; with a wide one a slope that helps."""
    text, x = fitted
    trees = Trees.parse_booster(text, 8)
    scores = trees.predict_scores(x[:50])
    odds = smooth_odds(trees, torch.from_numpy(x[:50]), 1e-6)
    np.testing.assert_allclose(torch.sigmoid(odds).numpy(), scores, atol=1e-4)

    z = torch.from_numpy(x[:50]).requires_grad_()
    (slope,) = torch.autograd.grad(smooth_odds(trees, z, 0.25).sum(), z)

    moved = (z - 0.3 * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-9)).detach()
    assert trees.predict_scores(moved.numpy()).mean() < scores.mean() - 0.005
    stump = Trees.parse_booster(text, 8)._replace(base=0.0)
    known = smooth_odds(stump, torch.from_numpy(x[:50]), 1e9)  # half of each way
    assert float(known.std()) < 1e-4
