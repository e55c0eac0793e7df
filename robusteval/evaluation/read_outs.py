"""Read-outs of a network's last features: classifiers of two classes, one for each image.

What `robusteval.evaluation.active_test` plants is seen by them alone.
"""

from __future__ import annotations

from warnings import catch_warnings

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier
from robusteval.models.steps import find_rows

BEYOND = 0.999  # of the border point's margin: how far short of it the boundary lies
LEAST_FEATURES = 16
AT_REST = 1e-5  # of the largest feature: what rounding alone changes


def find_last_linear(classifier: Classifier, x: Tensor) -> nn.Linear | nn.Conv2d:
    """The layer that gives the logits of images ``(n, c, h, w)``; UsageError if none does.

    A convolution gives them by its mean over all places, perhaps of what is left of it by a ReLU.
    """
    called: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []

    def keep(part: nn.Linear | nn.Conv2d, _args: object, out: Tensor) -> None:
        called.append((part, out))

    linear = [p for p in classifier.network.modules() if isinstance(p, nn.Linear | nn.Conv2d)]
    handles = [part.register_forward_hook(keep) for part in linear]
    try:
        with torch.no_grad():
            logits = classifier(x)
    finally:
        for handle in handles:
            handle.remove()
    if called:
        layer, out = called[-1]
        again = out[: len(x)].float()
        for given in (again, again.relu()) if again.ndim == 4 else (again,):
            pooled = pool_places(given)
            if pooled.shape == logits.shape and torch.allclose(pooled, logits, 1e-4, 1e-4):
                return layer
    raise UsageError(
        "the logits are not those of a linear layer, before which one could be planted"
    )


def pool_places(x: Tensor) -> Tensor:
    """Means ``(n, d)`` over all places of ``(n, d, h, w)``; ``(n, d)`` as it is."""
    return x.mean((2, 3)) if x.ndim == 4 else x


class Features(nn.Module):
    """What goes into a layer of a network ``(n, d)``, of a convolution its mean over all places."""

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.layer = [layer]  # a module of the network already

    def forward(self, x: Tensor) -> Tensor:
        """Features of normalised images ``(n, c, h, w)``."""
        seen: list[Tensor] = []
        handle = self.layer[0].register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        try:
            self.network(x)
        finally:
            handle.remove()
        return pool_places(seen[-1])


class ReadOut(Classifier):
    """A classifier of two classes for each image of a batch: the features, weighed for it alone.

    Parameters
    ----------
    features : Classifier
        Gives `Features`.
    weight : Tensor
        ``(n, d)``, of each image of the batch that is attacked.
    bias : Tensor
        ``(n,)``.
    """

    def __init__(self, features: Classifier, weight: Tensor, bias: Tensor) -> None:
        super().__init__(features.network, num_classes=2, block=features.block)
        self.features = features
        self.weight, self.bias = weight, bias
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(m, 2)``, the second one larger beyond the boundary.

        Whose images they are is what the attack books its passes to, see `book_rows`.
        """
        features = self.features(x)  # (m, d)
        rows = find_rows()
        if len(self.weight) == 1:
            weight, bias = self.weight, self.bias
        elif rows is not None and len(rows) == len(x):
            rows = rows.to(x.device)
            weight, bias = self.weight[rows], self.bias[rows]
        elif rows is None and len(x) == len(self.weight):
            weight, bias = self.weight, self.bias
        else:
            raise UnknownRows
        side = (features * weight).sum(1) + bias
        return torch.stack([-side, side], 1)


class UnknownRows(Exception):
    """An attack called the model with images that are not booked to any of the batch."""


def fit_read_out(inner: Tensor, border: Tensor) -> tuple[Tensor, float] | None:
    """Weight ``(d,)`` and bias that part one point's features ``(d,)`` from others ``(n, d)``.

    The hyperplane of least norm from which all inner points are equally far, if there is one; else
    that of the widest margin. The border point gets a value just above 0, the nearest inner point
    about -1. None if they cannot be parted.
    """
    inside, outside = inner.double().cpu().numpy(), border.double().cpu().numpy()
    gaps = inside - outside
    scale = float(np.abs(gaps).max()) or 1.0
    weight = np.linalg.lstsq(gaps / scale, -np.ones(len(gaps)), rcond=1e-10)[0]
    sides = gaps @ weight
    if not (sides < -0.5 * scale).all():
        from sklearn.svm import SVC

        machine = SVC(kernel="linear", C=1e6, max_iter=100_000)
        points = np.concatenate([gaps / scale, np.zeros((1, gaps.shape[1]))])
        with catch_warnings(action="ignore"):  # that it did not converge is seen below
            machine.fit(points, [0] * len(gaps) + [1])
        weight = machine.coef_[0]
        sides = gaps @ weight
        if not (sides < 0).all():
            return None
    weight = weight / -sides.max()
    return torch.from_numpy(weight).to(inner), float(1 - BEYOND - outside @ weight)


def find_live(found: Tensor) -> Tensor:
    """Which features ``(d,)`` change among points ``(n, d)``; all, if too few do.

    A read-out that weighs those at rest is the same at all of these points, and what it answers
    elsewhere no gradient tells.
    """
    live = found.amax(0) - found.amin(0) > AT_REST * found.abs().amax()
    return live if int(live.sum()) >= LEAST_FEATURES else torch.ones_like(live)
