"""Attack functions by name in `art.metrics`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from art.estimators.classification import PyTorchClassifier
from art.metrics import metrics

from robusteval.art.art_classes import NAMES
from robusteval.art.to_art import Array, ArtAttack
from robusteval.registry import ATTACKS

PREFIX = "robusteval:"
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}  # norms as NumPy calls them


def register_attacks() -> list[str]:
    """Let ART's metrics know the attacks, and return the names that they have there.

    ``adversarial_accuracy(estimator, x, y, "robusteval:pgd", {"eps": 0.03})`` and
    ``empirical_robustness(estimator, x, "robusteval:sigma_zero")`` then work like with ART's own
    names. The last one is the size of the change that an attack needed: an attack without a radius
    looks for the least, one with a radius goes as far as it may and overestimates it.
    """
    found = {PREFIX + name: attack for name, attack in list_attack_classes()}
    for name, attack in found.items():
        metrics.SUPPORTED_METHODS[name] = {"class": partial(Measured, attack)}
    return list(found)


def list_attack_classes() -> Iterator[tuple[str, type[ArtAttack]]]:
    """Name and ART class of every registered attack that has one."""
    for name, entry in ATTACKS.entries.items():
        if entry.detector:  # ART's metrics have no detector to give to it
            continue
        function = ATTACKS.load(name)
        module = sys.modules[function.__module__]
        for class_name in getattr(module, NAMES, ()):
            getattr(module, class_name)  # from then on it stands there, as one that was written
        for each in list(vars(module).values()):
            if isinstance(each, type) and getattr(each, "perturb", None) is function:
                yield name, each


class Measured:
    """An attack in the form that `art.metrics` measures with.

    Parameters
    ----------
    attack : type of ArtAttack
        Its class.
    estimator : PyTorchClassifier
        What is attacked.
    """

    def __init__(self, attack: type[ArtAttack], estimator: PyTorchClassifier) -> None:
        self.attack = attack(estimator, verbose=False)

    @property
    def norm(self) -> float:
        """The norm as NumPy numbers it; AttributeError, for which ART takes l2, if it has none."""
        name = getattr(self.attack, "norm", None)
        if name not in ORDERS:
            raise AttributeError(f"{type(self.attack).__name__} has no norm with a number")
        return ORDERS[name]

    def set_params(self, **kwargs: Any) -> None:
        """Change parameters; `minimal`, which the metrics set, changes nothing."""
        kwargs.pop("minimal", None)
        if "norm" in kwargs:
            words = {order: name for name, order in ORDERS.items()}
            kwargs["norm"] = words.get(kwargs["norm"], kwargs["norm"])
        self.attack.set_params(**kwargs)

    def generate(self, x: Array) -> Array:
        """Adversarial images, of what the estimator predicts."""
        return self.attack.generate(x)
