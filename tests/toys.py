"""Small models and images with known answers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.evaluation.defense import WithDetector
from robusteval.interpreters.explainer import Interpreter
from robusteval.models import checkpoint, networks
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise


def late(module: str, name: str) -> Callable[..., Any]:
    """A function or class of a module that is imported when it is called for the first time.

    Attacks bring their ART classes: tests that are only collected need not wait for ART.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


def asked(name: str, **wanted: Any) -> dict[str, Any]:
    """Those of the parameters that the attack has; `eps` only where there is a radius.

    Under l0, where it counts changes, it is 20, or 0 where that is wanted.
    A search without gradients gets five queries for each step, 150 where none are named; one of a
    grid three angles and places.
    """
    known = ATTACKS.entries[name].parameters
    wanted = {"queries": 5 * wanted.get("steps", 30), "angles": 3, "places": 3, **wanted}
    norm = wanted.get("norm") or (known["norm"].default if "norm" in known else None)
    if str(norm).startswith("l0"):
        wanted["eps"] = 20 if wanted.get("eps", 1) else 0
    has_radius = "eps" in known and known["eps"].default is not None
    return {
        key: value
        for key, value in wanted.items()
        if key in known
        and (key != "eps" or has_radius or wanted.get("norm") in ("linf", "l2", "l1"))
    }


def attackable(name: str, classifier: Classifier) -> Classifier:
    """The classifier as this attack needs it: behind a detector if that is what it attacks."""
    return WithDetector(classifier, Watcher()) if name == "evade" else classifier


class Watcher:
    """A detector that is linear in the maps of two interpreters.

    Parameters
    ----------
    threshold : float
        An image is flagged if its score is above.
    slope : Tensor, optional
        What each feature adds to the score's logit ``(4 * interpreters,)``; 20 if not given.
    interpreters : tuple of str
        Whose maps it looks at.
    draw : int
        Seed of the patterns of signs under which the mean of a map is a feature.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        slope: Tensor | None = None,
        interpreters: tuple[str, ...] = ("grad", "input_x_gradient"),
        draw: int = 3,
    ) -> None:
        self.threshold, self.draw = threshold, draw
        self.slope = slope
        self.explainers = tuple(Interpreter.build_differentiable(name, {}) for name in interpreters)
        self.seen = np.zeros(0, np.uint64)
        self.facts: dict[str, Any] = {"threshold": threshold, "fpr": 0.05, "forwards": 4.0}

    def features(self, model: Classifier, maps: list[Tensor], logits: Tensor) -> Tensor:
        """Means of the maps under four patterns of signs each: ``(n, 4 * interpreters)``."""
        found = []
        for some in maps:
            values = some.flatten(1)
            generator = torch.Generator().manual_seed(self.draw)
            draw = torch.rand(4, values.shape[1], generator=generator)
            found += [(values * (pattern - 0.5).sign()).mean(1) for pattern in draw.to(values)]
        return torch.stack(found, 1)

    def score(self, model: Classifier, x: Tensor, seeds: Tensor) -> Tensor:
        """Their weighted sum, squeezed into [0, 1] by what rounds alike anywhere in a batch."""
        x = quantise(x)
        with torch.no_grad():
            logits = model(x)
            y = predict_classes(logits).clamp_min(0)
            maps = [e.trace_maps(model, x, y, seeds)[0] for e in self.explainers]
            features = self.features(model, maps, logits).double()
        slope: Tensor | float = 20.0 if self.slope is None else self.slope
        total = (slope * features).sum(1)
        return (1 + total / (1 + total.abs())) / 2


class Seen(nn.Module):
    """Keeps the sizes of its calls; no hook, which would be noticed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.network(x)
        return logits


class Linear(nn.Module):
    """Two logits from one hyperplane: how far each image is from the other class is known."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(*shape, generator=generator)
        # no weight near zero, so that no coordinate is useless
        self.weight = nn.Parameter(weight.sign() * (0.2 + weight.abs()))
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())

    def forward(self, x: Tensor) -> Tensor:
        side = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([-side, side], 1)

    def distance(self, x: Tensor, norm: str) -> Tensor:
        """Distance ``(n,)`` of each image to the boundary, the box left aside."""
        side = (x * self.weight).flatten(1).sum(1) + self.bias
        dual = self.weight.abs().sum() if norm == "linf" else self.weight.norm()
        return (side.abs() / dual).detach()


class Weighed(nn.Module):
    """Two logits from a weighted sum of the pixels, which may be taken of rounded images."""

    def __init__(self, weight: Tensor, bias: float = 0.0, levels: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.levels = weight, bias, levels

    def forward(self, x: Tensor) -> Tensor:
        if self.levels is not None:
            x = (x * self.levels).round() / self.levels
        side = (x * self.weight).flatten(1).sum(1) - self.bias
        return torch.stack([-side, side], 1)


class Bands(nn.Module):
    """A convolutional network of 1,000 parameters for the synthetic images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, 2, padding=1)
        self.linear = nn.Linear(6 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def synthetic(n: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images ``(n, 12, 12, 3)`` uint8 of three classes: a bright left, middle or right band."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(40, 140, (n, 12, 12, 3))
    for image, label in zip(images, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += 45
    return images.astype(np.uint8), labels.astype(np.int64)


def fit_to_bands(network: nn.Module, steps: int, *, images: int, rate: float) -> None:
    """Train a network on 600 synthetic images, some of them in a step, normalised to [-2, 2]."""
    x, y = synthetic(600, seed=0)
    everything = torch.from_numpy(x).permute(0, 3, 1, 2).float().div(255).contiguous()
    labels = torch.from_numpy(y)
    optimiser = torch.optim.Adam(network.parameters(), rate)
    for step in range(steps):
        rows = torch.arange(step * images, step * images + images) % 600
        logits = network((everything[rows] - 0.5) / 0.25)
        optimiser.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels[rows]))
        optimiser.step()


def trained() -> Bands:
    """`Bands`, trained to near perfection in a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Bands()
    fit_to_bands(network, 80, images=100, rate=0.01)
    network.eval().requires_grad_(False)
    return network


def save_colour_cnn(path: Path, steps: int) -> None:
    """Write a checkpoint of a small network with class activation maps, trained for so long."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.small_cnn(3, channels=3)
    fit_to_bands(network, steps, images=50, rate=0.003)
    checkpoint.save(
        path,
        network.state_dict(),
        arch="robusteval:small_cnn_rgb",
        num_classes=3,
        input_shape=(3, 12, 12),
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )


class Affine(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)  # (k, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x, self.weight)


def draw_uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from 0 to 1, the same for the same seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def change_at_random(bands: Classifier, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Images, results of a strong random change, and their first predictions."""
    x = draw_uniform(n, 3, 12, 12, seed=3)
    y = predict_classes(bands(x)).detach()
    return x, (x + 2 * (draw_uniform(n, 3, 12, 12, seed=4) - 0.5)).clamp(0, 1), y
