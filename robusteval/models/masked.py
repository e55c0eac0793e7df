"""A network some of whose units are switched off, the same for every image or class by class.

Masking the units that an attack moves most is an analysis of arXiv:1904.02057, masks for each class
are the defense of arXiv:2409.15190. Both are to be judged by attacks that know the mask.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier
from robusteval.models.scripted import refuse_scripted

SHARPNESS = 100.0  # of the softmax that weighs the masks of classes, as in arXiv:2409.15190


class Masked(nn.Module):
    """A network with the channels of one layer's output multiplied by masks.

    With one mask for all images this costs nothing. With one for each class there are two passes:
    the first, unmasked, says how much each class's mask counts in the second, by a softmax of
    `SHARPNESS` times its logits. Departs from Interpretability-Guided Test-Time Adversarial
    Defense, arXiv:2409.15190, in that no noise is added to the input of the first pass, so that a
    prediction is deterministic. Derivatives go through both passes.

    Parameters
    ----------
    network : nn.Module
        Maps images ``(n, c, h, w)`` to logits ``(n, C)``.
    layer : str
        Name of one of its modules, whose output is ``(n, K)`` or ``(n, K, h', w')`` and which runs
        once in a pass.
    masks : Tensor
        ``(K,)`` or ``(C, K)``, ones for units that are kept and zeros for others.
    seen : ndarray, optional
        Content ids uint64 of the images by which units were chosen.

    Raises
    ------
    UsageError
        There is no such layer, the masks are not of this form, or do not fit (in a forward pass).
    """

    masks: Tensor
    shared: Tensor

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        masks: Tensor,
        seen: np.ndarray[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        if masks.ndim not in (1, 2) or not masks.numel():
            raise UsageError(
                "masks must be (units,) or (classes, units) with at least one unit, not"
                f" {tuple(masks.shape)}"
            )
        if not bool(((masks == 0) | (masks == 1)).all()):
            raise UsageError("masks must be of zeros and ones")
        find_layer(network, layer)
        self.network = network
        self.layer = layer
        self.seen = np.zeros(0, np.uint64) if seen is None else seen
        masks = masks.detach().float()
        self.register_buffer("masks", masks)
        # of units on which all classes agree: no rounding of weights may touch them
        self.register_buffer("shared", (masks == masks[:1]).all(0) if masks.ndim == 2 else masks)
        self.training = network.training

    @property
    def per_class(self) -> bool:
        """Whether each class has a mask of its own."""
        return self.masks.ndim == 2

    @property
    def forwards(self) -> float:
        """Forward passes of the network for a prediction."""
        return 2.0 if self.per_class else 1.0

    @property
    def mask_facts(self) -> dict[str, Any]:
        """JSON-able: layer, per_class, units, and how many are masked (of each class, a mean)."""
        mask_units = float((self.masks == 0).float().sum(-1).mean())
        return {
            "layer": self.layer,
            "per_class": self.per_class,
            "units": self.masks.shape[-1],
            "masked": int(mask_units) if mask_units.is_integer() else mask_units,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, C)``."""
        mask = self.weigh_masks(self.network(x)) if self.per_class else self.masks
        with self.apply_mask(mask):
            logits: Tensor = self.network(x)
        return logits

    def weigh_masks(self, logits: Tensor) -> Tensor:
        """The mask ``(n, K)`` for each image, by the logits ``(n, C)`` of the first pass."""
        if logits.shape[1:] != self.masks.shape[:1]:
            raise UsageError(
                f"there are masks for {len(self.masks)} classes, the network has {logits.shape[1]}"
            )
        weights = (SHARPNESS * logits).softmax(1)
        mask = F.linear(weights, self.masks.t())  # no product: a `Classifier` does these by image
        return torch.where(self.shared, self.masks[0], mask)

    @contextmanager
    def apply_mask(self, mask: Tensor) -> Iterator[None]:
        """Multiply what the layer gives by a mask ``(K,)`` or ``(n, K)``."""

        def scale_units(output: Tensor) -> Tensor:
            units = mask.shape[-1]
            if output.shape[1] != units:
                raise UsageError(
                    f"the masks are for {units} units, layer {self.layer!r} has {output.shape[1]}"
                )
            if mask.ndim == 2 and len(mask) != len(output):
                raise UsageError(
                    f"layer {self.layer!r} does not run image by image: name another for masks of"
                    " classes"
                )
            return output * mask.view(-1, units, *[1] * (output.ndim - 2))

        with intercept_layer(self.network, self.layer, scale_units):
            yield


def mask_units(
    classifier: Classifier, layer: str, masks: Tensor, seen: np.ndarray[Any, Any] | None = None
) -> Classifier:
    """The classifier with masks in it, see `Masked`; the network is shared."""
    network = Masked(classifier.network, layer, masks, seen)
    return classifier.derive(network, mask=network.mask_facts)


class Units(nn.Module):
    """A network that answers with the means of a layer's units ``(n, K)`` over the image."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        """Mean activations ``(n, K)``."""
        found: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            found.append(output.flatten(2).mean(2) if output.ndim == 4 else output)
            return output.clone()  # a ReLU in place would change what was kept

        with intercept_layer(self.network, self.layer, keep):
            self.network(x)
        if len(found[0]) != len(x):
            raise UsageError(f"layer {self.layer!r} does not run image by image: name another")
        return found[0]


def measure_activations(classifier: Classifier, x: Tensor, layer: str) -> Tensor:
    """Mean activation ``(n, K)`` of each unit of a layer on images ``(n, c, h, w)``.

    UsageError if the layer is none of `Masked`'s.
    """
    find_layer(classifier.network, layer)
    units: Tensor = classifier.derive(Units(classifier.network, layer))(x)
    return units


@contextmanager
def intercept_layer(
    network: nn.Module, layer: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Put a function of units ``(n, K)`` or ``(n, K, h', w')`` behind a layer, for one pass.

    UsageError if the layer gives something else, or does not run exactly once.
    """
    runs = 0

    def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        nonlocal runs
        runs += 1
        if not isinstance(output, Tensor) or output.ndim not in (2, 4):
            raise UsageError(
                f"layer {layer!r} gives no units (n, units) or (n, units, h, w): name another"
            )
        if runs > 1:
            raise UsageError(f"layer {layer!r} runs several times per image: name another")
        return change(output)

    handle = find_layer(network, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not runs:
        raise UsageError(f"layer {layer!r} does not run in a forward pass: name another")


def find_layer(network: nn.Module, layer: str) -> nn.Module:
    """The module of that name; UsageError with suggestions if there is none."""
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if layer and layer in modules:
        refuse_scripted(network, modules[layer])
        return modules[layer]
    close = difflib.get_close_matches(layer, modules, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close and close[0] else ""
    known = ", ".join(name for name, _ in network.named_children())
    raise UsageError(
        f"the network has no layer {layer!r}{hint}: there are {known or 'none'} and what is inside"
    )
