"""A small network that imitates the trees of a detector, so that there is a derivative."""

from __future__ import annotations

import copy

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.models.fitting import lower_loss

from .transforms import Array

HIDDEN = 64  # units of a layer
LEAK = 0.1  # slope below zero: a unit that is at rest still shows the way
BATCH = 256
RATE = 2e-3
EPOCHS = 200  # at most
PATIENCE = 20  # epochs without a better one, after which there is no other
NOISE = 0.1  # added to features, in their deviations: the trees are flat between two splits
MOST = 12.0  # log odds, beyond which no difference counts


class Imitator(nn.Module):
    """Log odds that an image is attacked, of a detector's features, by two hidden layers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log odds ``(n,)`` of features ``(n, d)``."""
        x = F.leaky_relu(self.first(x), LEAK)
        odds: Tensor = self.last(F.leaky_relu(self.second(x), LEAK))
        return odds.squeeze(1)

    def imitate_odds(self, x: Tensor) -> Tensor:
        """The same, on the graph, with the same bits for an image in every batch."""
        x = F.leaky_relu(sum_rows(self.first, x), LEAK)
        x = F.leaky_relu(sum_rows(self.second, x), LEAK)
        return sum_rows(self.last, x).squeeze(1)


def sum_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer of ``(n, d)`` image by image: a matrix product sums by how many there are."""
    return (x.unsqueeze(1) * layer.weight).sum(2) + layer.bias


def fit_imitator(x: Array, scores: Array, train: Array, validation: Array, seed: int) -> Imitator:
    """Fit an imitator to the scores of a detector.

    Parameters
    ----------
    x : ndarray
        Features ``(rows, d)`` float32, standardised.
    scores : ndarray
        What the detector says of them ``(rows,)``, from 0 to 1.
    train, validation : ndarray
        Rows to fit to, and those that choose the epoch.
    seed : int
        Decides the first weights, the order and the noise.
    """
    features, wanted = torch.from_numpy(x).float(), torch.from_numpy(find_odds(scores)).float()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Imitator(x.shape[1])
    draws = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(network.parameters(), RATE, weight_decay=1e-4)
    best, kept, waited = np.inf, copy.deepcopy(network.state_dict()), 0
    for _ in range(EPOCHS):
        order = train[torch.randperm(len(train), generator=draws).numpy()]
        for rows in np.array_split(order, max(1, len(order) // BATCH)):
            seen = features[rows]
            noise = torch.randn(seen.shape, generator=draws)
            loss = F.smooth_l1_loss(network(seen + NOISE * noise), wanted[rows])
            lower_loss(loss, adam)
        with torch.no_grad():
            far = float(F.smooth_l1_loss(network(features[validation]), wanted[validation]))
        waited += 1
        if far < best:
            best, kept, waited = far, copy.deepcopy(network.state_dict()), 0
        if waited == PATIENCE:
            break
    network.load_state_dict(kept)
    return network.requires_grad_(False).eval()


def find_odds(scores: Array) -> Array:
    """Log odds ``(n,)`` of probabilities, within what counts."""
    clipped = np.clip(np.asarray(scores, dtype=np.float64), 1e-9, 1 - 1e-9)
    return np.asarray(np.clip(np.log(clipped) - np.log1p(-clipped), -MOST, MOST))


def measure_fidelity(imitator: Imitator, x: Array, scores: Array) -> float:
    """Spearman's correlation of imitated odds and scores; nan where either is constant."""
    with torch.no_grad():
        odds = imitator(torch.from_numpy(x).float()).numpy()
    if np.ptp(odds) == 0 or np.ptp(scores) == 0:
        return float("nan")
    return float(np.asarray(stats.spearmanr(odds, scores)[0]))
