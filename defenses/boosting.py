"""Boosted trees that tell attacked images from others, and the simpler rules they must beat."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.runs.statistics import roc_auc

Array = np.ndarray[Any, Any]

ROUNDS = 2000
PATIENCE = 50
FOLDS = 5
FPRS = (0.05, 0.01)
MOST_NODES = 2**22


class TreeSettings(NamedTuple):
    """How trees grow."""

    depth: int = 4
    rate: float = 0.05  # by which each tree is scaled
    columns: float = 0.3  # share of the features that a tree may look at


DEFAULT = TreeSettings()
# what a grouped cross-validation chooses from, the default first
GRID = (
    DEFAULT,
    *(
        each
        for each in starmap(TreeSettings, product((3, 4, 6), (0.05, 0.1), (0.3, 0.6)))
        if each != DEFAULT
    ),
)


class Trees(NamedTuple):
    """Regression trees side by side, shorter ones filled up.

    They are evaluated here, not by XGBoost: so a file from anywhere is read without trusting it,
    and an image's score is the same in every batch.
    """

    left: Array  # (trees, nodes) int64, the node itself at a leaf
    right: Array
    feature: Array  # (trees, nodes) int64
    threshold: Array  # (trees, nodes) float32
    missing_left: Array  # (trees, nodes) bool: where a value goes that is none
    value: Array  # (trees, nodes) float64, at leaves
    base: float  # log odds to start from
    features: int
    depth: int

    @classmethod
    def parse_booster(cls, text: str, features: int) -> Trees:
        """Parse the trees of a model that XGBoost has written as JSON.

        Raises
        ------
        ValueError
            If it is not a sound one for so many features and two classes.
        """
        try:
            learner = json.loads(text)["learner"]
            booster, facts = learner["gradient_booster"], learner["learner_model_param"]
            if booster["name"] != "gbtree" or learner["objective"]["name"] != "binary:logistic":
                raise ValueError("another kind of model")
            if int(facts["num_feature"]) != features:
                raise ValueError("made for other features")
            prior = facts["base_score"]
            prior = float(prior.strip("[]") if isinstance(prior, str) else prior)
            trees = [Tree.parse_tree(tree, features) for tree in booster["model"]["trees"]]
            if not 0 < prior < 1:
                raise ValueError("a prior that is no probability")
            base = math.log(prior / (1 - prior))
        except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"no model of XGBoost: {error}") from None
        if not trees:
            raise ValueError("no trees")
        most = max(len(tree.left) for tree in trees)
        if most * len(trees) > MOST_NODES:
            raise ValueError("too many nodes")
        columns = [
            np.stack([pad_column(c, most) for c in each]) for each in zip(*trees, strict=True)
        ]
        left, right, feature, threshold, missing_left, value = columns
        depth = max(tree.measure_depth() for tree in trees)
        return cls(
            left,
            right,
            feature,
            threshold,
            missing_left,
            value,
            base,
            features,
            depth,
        )

    def predict_scores(self, x: Array) -> Array:
        """Predict how probable ``(n,)`` float64 an attack is, by features ``(n, d)``."""
        n = len(x)
        trees = np.arange(len(self.left))[None]
        node = np.zeros((n, len(self.left)), dtype=np.int64)
        for _ in range(self.depth):
            found = x[np.arange(n)[:, None], self.feature[trees, node]]
            goes_left = np.where(
                np.isnan(found), self.missing_left[trees, node], found < self.threshold[trees, node]
            )
            node = np.where(goes_left, self.left[trees, node], self.right[trees, node])
        # one sum per image, as the order of a sum depends on the shape
        odds = [self.base + math.fsum(row) for row in self.value[trees, node]]
        return np.array([1 / (1 + math.exp(-min(max(o, -700.0), 700.0))) for o in odds])


def smooth_odds(trees: Trees, x: Tensor, width: float) -> Tensor:
    """Log odds ``(n,)`` of features ``(n, d)`` on the graph, every split blurred.

    A split sends a row left by the share sigmoid((threshold - value) / width), so that there is a
    derivative; as the width goes to zero these are the odds of the trees themselves, but at the
    thresholds.
    """
    n, (count, nodes) = len(x), trees.left.shape
    left, right, feature = (torch.from_numpy(each).to(x.device) for each in trees[:3])
    threshold, value = (torch.from_numpy(each).to(x) for each in (trees.threshold, trees.value))
    reach = x.new_zeros(n, count, nodes)
    reach[:, :, 0] = 1  # share of a row at each node
    odds = x.new_full((n,), trees.base)
    for node in range(nodes):  # children come after their parents
        here = reach[:, :, node]
        leaf = left[:, node] == node
        odds = odds + (here * value[:, node] * leaf).sum(1)
        goes = torch.sigmoid((threshold[:, node] - x[:, feature[:, node]]) / width)  # (n, trees)
        inner = here * (left[:, node] > node)
        for child, share in ((left, goes), (right, 1 - goes)):
            index = child[:, node].expand(n, -1).unsqueeze(2)
            reach = reach.scatter_add(2, index, (inner * share).unsqueeze(2))
    return odds


class Tree(NamedTuple):
    """The columns of one tree ``(nodes,)``; see `Trees`."""

    left: Array
    right: Array
    feature: Array
    threshold: Array
    missing_left: Array
    value: Array

    @classmethod
    def parse_tree(cls, tree: dict[str, Any], features: int) -> Tree:
        """Parse and check a tree: nodes lead on to later ones or nowhere, every feature exists."""
        left = np.array(tree["left_children"], dtype=np.int64)
        right = np.array(tree["right_children"], dtype=np.int64)
        feature = np.array(tree["split_indices"], dtype=np.int64)
        # of a leaf its value
        threshold = np.array(tree["split_conditions"], dtype=np.float32)
        missing_left = np.array(tree["default_left"], dtype=np.int64) != 0
        if np.any(np.array(tree.get("split_type", []), dtype=np.int64)):
            raise ValueError("a split by categories")
        own = np.arange(len(left))
        leaf = left < 0
        left, right = np.where(leaf, own, left), np.where(leaf, own, right)
        columns = (left, right, feature, threshold, missing_left)
        sound = (
            left.ndim == 1
            and len(left) > 0
            and all(column.shape == left.shape for column in columns)
            and np.all((left > own) | leaf)
            and np.all((right > own) | leaf)
            and max(left.max(), right.max()) < len(left)
            and np.all((feature >= 0) & (feature < features))
            and np.isfinite(threshold).all()
        )
        if not sound:
            raise ValueError("a tree that leads nowhere")
        return cls(*columns, np.where(leaf, threshold, 0).astype(np.float64))

    def measure_depth(self) -> int:
        """Measure the steps from the first node to the last leaf."""
        depths = np.zeros(len(self.left), dtype=np.int64)
        for node in range(len(self.left)):
            for child in (self.left[node], self.right[node]):
                if child != node:
                    depths[child] = depths[node] + 1
        return int(depths.max())


def pad_column(column: Array, length: int) -> Array:
    """Pad a column with zeros at its end."""
    return np.concatenate([column, np.zeros(length - len(column), dtype=column.dtype)])


def describe_xgboost() -> str:
    """Describe which XGBoost it is."""
    import xgboost

    return f"xgboost {xgboost.__version__}"


def fit_trees(
    x: Array,
    y: Array,
    weights: Array,
    train: Array,
    validation: Array,
    seed: int,
    settings: TreeSettings = DEFAULT,
) -> tuple[str, int]:
    """Fit trees by XGBoost to some rows, as many as the others ask for.

    Parameters
    ----------
    x : ndarray
        Features of all rows ``(rows, d)``, float32.
    y : ndarray
        ``(rows,)``, 1 for attacked images.
    weights : ndarray
        ``(rows,)``.
    train, validation : ndarray
        Rows; no source image may be in both.
    seed : int
        Of the rows and features drawn for each tree.
    settings : TreeSettings
        How trees grow.

    Returns
    -------
    tuple
        XGBoost's own JSON, up to the best round, and how many rounds that are.
    """
    import xgboost

    fitted = xgboost.XGBClassifier(
        tree_method="hist",
        n_estimators=ROUNDS,
        learning_rate=settings.rate,
        max_depth=settings.depth,
        min_child_weight=5,
        subsample=0.8,
        colsample_bytree=settings.columns,
        reg_lambda=1.0,
        eval_metric=["logloss", "auc"],
        early_stopping_rounds=PATIENCE,
        random_state=seed % 2**31,
        n_jobs=1,  # another number can change the last digits of a sum
    )
    fitted.fit(
        x[train],
        y[train],
        sample_weight=weights[train],
        eval_set=[(x[validation], y[validation])],
        sample_weight_eval_set=[weights[validation]],
        verbose=False,
    )
    rounds = fitted.best_iteration + 1
    best = fitted.get_booster()[:rounds]
    return best.save_raw("json").decode(), rounds


def cross_validate_trees(
    x: Array, y: Array, weights: Array, groups: Array, seed: int, settings: TreeSettings
) -> float:
    """The mean AUC of trees on groups of rows that had no say, each fifth in turn.

    Rows of one group, `groups` ``(rows,)``, are never parted; the next fifth decides when to stop.
    nan where a fifth has rows of one label alone.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(np.unique(groups))
    parts = [np.flatnonzero(np.isin(groups, part)) for part in np.array_split(order, FOLDS)]
    found = []
    for i, test in enumerate(parts):
        stop = parts[(i + 1) % FOLDS]
        train = np.concatenate([p for j, p in enumerate(parts) if j not in (i, (i + 1) % FOLDS)])
        booster, _ = fit_trees(x, y, weights, train, stop, seed, settings)
        score = Trees.parse_booster(booster, x.shape[1]).predict_scores(x[test])
        found.append(roc_auc(score[y[test] == 0], score[y[test] == 1]))
    return float(np.mean(found))


def choose_threshold(benign: Array, fpr: float) -> float:
    """Choose the lowest score of `benign` ``(n,)`` that at most this share of them are above.

    With fewer than 1 / `fpr` of them, their highest.
    """
    ordered = np.sort(benign)[::-1]
    return float(ordered[math.floor(fpr * len(ordered) + 1e-9)])


class ColumnRule(NamedTuple):
    """One number of an image, and which way it is suspicious."""

    column: int
    sign: float

    @classmethod
    def choose_best(cls, x: Array, y: Array, columns: Sequence[int]) -> ColumnRule:
        """Choose the column that alone tells most on these rows."""
        found = [(roc_auc(x[y == 0, c], x[y == 1, c]), c) for c in columns]
        reached, column = max(found, key=lambda each: abs(each[0] - 0.5))
        return cls(column, 1.0 if reached >= 0.5 else -1.0)

    def predict_scores(self, x: Array) -> Array:
        """Score rows ``(n,)``: higher is more suspicious."""
        return np.asarray(self.sign * x[:, self.column], dtype=np.float64)


class Logistic(NamedTuple):
    """Logistic regression on standardised columns."""

    slope: Array
    offset: float

    @classmethod
    def fit_rows(cls, x: Array, y: Array, weights: Array) -> Logistic:
        """Fit to these rows; columns that say nothing there are left out."""
        from sklearn.linear_model import LogisticRegression

        mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        std = np.where(std > 0, std, np.inf)
        model = LogisticRegression(max_iter=2000).fit((x - mean) / std, y, weights)
        slope = model.coef_[0] / std
        return cls(slope, float(model.intercept_[0] - slope @ mean))

    def predict_scores(self, x: Array) -> Array:
        """Score rows ``(n,)`` by their log odds."""
        return np.asarray(x @ self.slope + self.offset, dtype=np.float64)


def check_both_labels(y: Array, rows: Array, what: str, least: int) -> None:
    """Refuse a part of the images that has too few of either label."""
    attacked = int(y[rows].sum())
    if min(attacked, len(rows) - attacked) < least:
        raise UsageError(
            f"only {attacked} attacked images of {len(rows)} for {what}, where at least {least} of"
            " both kinds are needed: give more --samples, or an attack that succeeds more often"
        )
