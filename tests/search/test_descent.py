"""Searches hold a few blocks of images on a graph, however large their batch is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusteval.attacks.apgd import apgd
from robusteval.attacks.pgd import pgd
from robusteval.models.classifier import Classifier, choose_graph_size


class Seen(nn.Module):
    """Gives as many logits as an image has values, and keeps how many images are on a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.most = max(self.most, len(x))
        logits: Tensor = self.model(x)
        return logits


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_a_large_batch_gives_the_bits_of_small_ones(attack: Callable[..., Tensor]) -> None:
    """A part of it at a time is differentiated, whoever is left of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    few = choose_graph_size(36, torch.device("cpu"))
    n = few + 40
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    model = Seen(Classifier(network.eval(), num_classes=3).eval().requires_grad_(False))
    y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 3  # these fall at once
    settings = {"eps": 0.02, "steps": 4, "stop": "never"}

    together = attack(model, x, y, seeds=torch.arange(n), **settings)
    parts = [
        attack(model, x[i : i + 23], y[i : i + 23], seeds=torch.arange(n)[i : i + 23], **settings)
        for i in range(0, n, 23)
    ]

    assert model.most == few
    assert torch.equal(together, torch.cat(parts))
