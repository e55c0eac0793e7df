"""A network some of whose units are switched off, the same for every image or class by class.

Masking the units that an attack moves most is an analysis of arXiv:1904.02057, masks for each class
are the defense of arXiv:2409.15190. Both are to be judged by attacks that know the mask.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.layouts import FOLDING, MOVING, Layouts, list_tensors
from robusteval.models.places import find_places, find_tensor, remember, replace_tensor
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
        Name of one of its modules, which runs once in a pass and whose output is ``(n, K)``, maps
        of K channels, wherever their axis is, or tokens of K values; see `find_unit_axis`.
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
        self.prepare(x)
        mask = self.weigh_masks(self.network(x)) if self.per_class else self.masks
        with self.apply_mask(mask, x):
            logits: Tensor = self.network(x)
        return logits

    def prepare(self, x: Tensor) -> None:
        """Find out, once for each size of images, where the units are; only sizes of `x` matter.

        The network runs for this, which those must not see who are to watch how it runs for `x`.
        UsageError if the masks cannot be applied.
        """
        find_unit_axis(self.network, self.layer, x)
        if self.per_class:
            check_rows(self.network, self.layer, x)

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
    def apply_mask(self, mask: Tensor, x: Tensor) -> Iterator[None]:
        """Multiply what the layer gives for images `x` by a mask ``(K,)`` or ``(n, K)``."""
        axis = find_unit_axis(self.network, self.layer, x)

        def scale_units(output: Tensor) -> Tensor:
            units = mask.shape[-1]
            if output.shape[axis] != units:
                raise UsageError(
                    f"the masks are for {units} units, layer {self.layer!r} has"
                    f" {output.shape[axis]}"
                )
            if mask.ndim == 2 and len(mask) != len(output):
                raise UsageError(NO_ROWS.format(self.layer))
            others = [1] * (output.ndim - 2)
            return output * mask.view(-1, *((units, *others) if axis == 1 else (*others, units)))

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
        axis = find_unit_axis(self.network, self.layer, x)
        check_rows(self.network, self.layer, x)

        def keep(output: Tensor) -> Tensor:
            first = output.movedim(axis, 1)
            found.append(first.flatten(2).mean(2) if output.ndim > 2 else first)
            return output.clone()  # a ReLU in place would change what was kept

        with intercept_layer(self.network, self.layer, keep):
            self.network(x)
        if len(found[0]) != len(x):
            raise UsageError(NO_ROWS.format(self.layer))
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
    """Put a function of what a layer gives behind it, for one pass.

    UsageError if the layer gives no tensor of units, or does not run exactly once.
    """
    runs = 0

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal runs
        runs += 1
        tensor = find_tensor(output)
        if tensor is None or tensor.ndim not in (2, 3, 4):
            raise UsageError(f"layer {layer!r} gives no {UNITS}: name another")
        if runs > 1:
            raise UsageError(f"layer {layer!r} runs several times per image: name another")
        return replace_tensor(output, change(tensor))

    handle = find_layer(network, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not runs:
        raise UsageError(f"layer {layer!r} does not run in a forward pass: name another")


NO_ROWS = "layer {!r} does not run image by image: name another"
UNITS = "units (n, units), (n, tokens, units) or (n, units, h, w)"


def find_unit_axis(network: nn.Module, layer: str, x: Tensor) -> int:
    """The axis of units in what a layer gives for images like `x` ``(n, c, h, w)``: 1 or -1.

    That on which a linear layer or a normalisation of vectors works; of anything else the one that
    is left besides the places of the image, found out once for each size of images.

    Raises
    ------
    UsageError
        If there is no such layer, it gives something else or it is not known which axis that is.
    """
    module = find_layer(network, layer)
    vectors = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
    if vectors and isinstance(module, nn.Linear | nn.LayerNorm | nn.MultiheadAttention):
        return -1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d):
        return 1
    shape = tuple(x.shape[1:])
    return remember(network, ("units", layer, shape), partial(_find_unit_axis, network, layer, x))


def _find_unit_axis(network: nn.Module, layer: str, x: Tensor) -> int:
    seen: list[tuple[tuple[int, ...], str | None]] = []
    watch = LayoutWatch()

    def look(output: Tensor) -> Tensor:
        axis = watch.axes.get(output)
        layout = watch.layouts.find(output) if axis is None else "last" if axis < 0 else "first"
        seen.append((tuple(output.shape), layout))
        return output

    with watch:
        show_one_image(network, layer, x, look)
    ((shape, layout),) = seen
    if len(shape) == 2 or layout == "first" or (len(shape) == 4 and shape[2:] == (1, 1)):
        return 1
    if layout == "last":
        return -1
    places = find_places(network, layer, tuple(x.shape[1:]))
    if places is None:
        raise UsageError(
            f"layer {layer!r} gives a tensor {shape}, of which it is not known what are units and"
            " what are places: name another"
        )
    return places.unit_axis


def check_rows(network: nn.Module, layer: str, x: Tensor) -> None:
    """UsageError if a layer gives other rows than one for each image, such as one for each token.

    In a whole batch there can be as many of these as images.
    """

    def count_rows() -> int:
        rows: list[int] = []

        def look(output: Tensor) -> Tensor:
            rows.append(len(output))
            return output

        show_one_image(network, layer, x, look)
        return rows[0]

    if remember(network, ("rows", layer, tuple(x.shape[1:])), count_rows) != 1:
        raise UsageError(NO_ROWS.format(layer))


def show_one_image(
    network: nn.Module, layer: str, x: Tensor, look: Callable[[Tensor], Tensor]
) -> None:
    """Run a network on a black image like those of `x`, and show what a layer gives."""
    with frozen(network), torch.no_grad(), intercept_layer(network, layer, look):
        network(x.new_zeros(1, *x.shape[1:]))


# what gives units another axis, or none
UNITED = MOVING | FOLDING | {"conv2d", "conv_transpose2d"}
VECTORS = {"linear", "layer_norm"}  # over the last axis
SEQUENCES = {"conv1d", "conv_transpose1d"}  # of which units are the second axis


class LayoutWatch(TorchFunctionMode):
    """Follows where channels are from function to function."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts = Layouts()
        self.axes: Any = WeakIdKeyDictionary()  # of units that a layer made, 1 or -1, by tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.layouts.follow(func, args, kwargs, output)
        name = getattr(func, "__name__", "")
        if not isinstance(output, Tensor) or name in UNITED:
            return output
        if name in SEQUENCES:
            self.axes[output] = 1
        elif name in VECTORS and (name == "linear" or len(args[1]) == 1):
            self.axes[output] = -1
        else:
            same = [t for t in list_tensors(args) if t in self.axes and t.shape == output.shape]
            axes = {self.axes[t] for t in same}
            if len(axes) == 1:
                self.axes[output] = axes.pop()
        return output


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
