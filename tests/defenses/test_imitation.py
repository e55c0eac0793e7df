"""A network in the place of a detector's trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robusteval.defenses.imitation import (
    MOST,
    Imitator,
    find_odds,
    fit_imitator,
    measure_fidelity,
)
from robusteval.defenses.transforms import Array


def draw_rows(n: int) -> tuple[Array, Array]:
    """Features, and a score that depends on two of them by steps, as that of trees does."""
    x = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)
    odds = 2.0 * np.floor(x[:, 0]) - 1.5 * (x[:, 1] > 0.3)
    return x, 1 / (1 + np.exp(-odds))


@pytest.fixture(scope="module")
def imitator() -> Imitator:
    x, scores = draw_rows(600)
    return fit_imitator(x, scores, np.arange(400), np.arange(400, 500), seed=0)


def test_an_imitator_orders_unseen_rows_as_the_score_does(imitator: Imitator) -> None:
    """And its derivative points where the score rises."""
    x, scores = draw_rows(600)
    assert measure_fidelity(imitator, x[500:], scores[500:]) > 0.9

    seen = torch.from_numpy(x[500:]).requires_grad_()
    grad = torch.autograd.grad(imitator.imitate_odds(seen).sum(), seen)[0].mean(0)
    assert grad[0] > 1
    assert grad[1] < 0
    assert grad[2:].abs().max() < 0.3 * grad[0]


def test_odds_on_the_graph_are_those_of_the_network_alone_and_in_any_batch(
    imitator: Imitator,
) -> None:
    x = torch.from_numpy(draw_rows(40)[0])

    together = imitator.imitate_odds(x)

    assert torch.allclose(together, imitator(x), atol=1e-5)
    assert torch.equal(together[7:8], imitator.imitate_odds(x[7:8]))


def test_the_same_seed_gives_the_same_imitator(imitator: Imitator) -> None:
    x, scores = draw_rows(600)
    again = fit_imitator(x, scores, np.arange(400), np.arange(400, 500), seed=0)

    assert all(torch.equal(v, again.state_dict()[n]) for n, v in imitator.state_dict().items())


def test_odds_are_those_of_probabilities_within_what_counts() -> None:
    found = find_odds(np.array([0.5, 1 / (1 + np.exp(-3.0)), 0.0, 1.0]))
    assert found == pytest.approx([0.0, 3.0, -MOST, MOST])


def test_what_never_changes_cannot_be_imitated() -> None:
    x, _ = draw_rows(20)
    flat = np.full(20, 0.5)
    found = fit_imitator(x, flat, np.arange(10), np.arange(10, 15), seed=0)
    assert np.isnan(measure_fidelity(found, x[15:], flat[15:]))
