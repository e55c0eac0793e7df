"""Whether a classifier and the images belong together, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.class_names import check_folders
from robusteval.datasets.dataset import Data, Positions
from robusteval.errors import RunError, UsageError, check_argument
from robusteval.models.built import escape
from robusteval.models.classifier import Classifier, check_logits, frozen
from robusteval.models.failures import is_out_of_memory, raise_as_run_error
from robusteval.models.forward_modes import find_float_type
from robusteval.models.outputs import LogitsOf, read_output, refuse_probabilities
from robusteval.models.user_code import suggest_image_shape


def wrap_module(module: nn.Module, data: Data) -> Classifier:
    """A user's module as a classifier that knows its number of classes.

    UsageError if it is no module, or no classifier.
    """
    check_argument(
        "the classifier",
        module,
        nn.Module,
        "give an nn.Module, or what robusteval.load makes of a file",
    )
    check_data(data)
    x = data.batch([0]).x
    what = "the network cannot take the images"
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    x = x.to(device, find_float_type(module))
    with refuse_changes(module), frozen(module), torch.no_grad(), raise_as_run_error(what):
        network, words = find_logits(module, x)
        block = find_batch_size(network, x)
        logits = check_logits(network(repeat_image(x, block or 1)), block or 1)
    facts = {"outputs": words} if words else None
    made = Classifier(network, num_classes=logits.shape[1], block=block, identity=facts)
    return made.to(device)


def find_logits(module: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """A module that gives logits, and how they are found in what the given one returns.

    Parameters
    ----------
    module : nn.Module
        In eval mode.
    x : Tensor
        An image ``(1, c, h, w)``.
    """
    try:
        reading = read_output(module(repeat_image(x, 2)), 2)
    except RuntimeError:  # it may take another number of images, and says so when that is tried
        return module, ""
    if reading is None or not (words := reading.describe()):
        return module, ""
    refuse_probabilities(module, reading, x)
    return LogitsOf(module, reading), words


# images at a time that a network may be made for
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 10, 20, 50, 100, 200)


def repeat_image(x: Tensor, n: int) -> Tensor:
    """An image ``(1, c, h, w)`` n times, in memory of its own: networks may write to it."""
    return x.repeat(n, 1, 1, 1)


def find_batch_size(module: nn.Module, x: Tensor) -> int | None:
    """The number of images that a network wants at a time; None if it takes the image alone.

    Whatever it raises for one image ``(1, c, h, w)`` is raised where no other number will do.
    """
    try:
        module(repeat_image(x, 1))
        return None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        for size in BATCHES:
            try:
                check_logits(module(repeat_image(x, size)), size)
                return size
            except Exception:  # of another batch it says nothing
                continue
        raise


@contextmanager
def refuse_changes(module: nn.Module) -> Iterator[None]:
    """Refuse a model whose answers change it, and leave it as it was.

    Raises
    ------
    UsageError
        A buffer is another after the passes inside, which were made in eval mode: the model would
        come out changed, and every answer would depend on what was asked before.
    """
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    changed = [
        name
        for name, buffer in module.named_buffers()
        if name in before and not is_same(buffer, before[name])
    ]
    if not changed:
        return
    buffers = dict(module.named_buffers())
    for name in changed:
        buffers[name].data = before[name]
    raise UsageError(
        f"the model changes while it answers, in eval mode too: {escape(changed[0])} is another"
        " after one batch, so that its answers depend on what was asked before; see to it that"
        " eval() reaches this layer (a train or eval of your own must call torch's), or change it"
        " only where self.training is true"
    )


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers hold the same, NaN for NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def check_data(data: object) -> None:
    """Refuse what is no `Data`; UsageError."""
    check_argument(
        "data",
        data,
        Data,
        "open a name or path with robusteval.open_data, arrays with robusteval.from_arrays, a torch"
        " data set with robusteval.from_dataset",
    )


def check_labels(data: Data, index: np.ndarray[Any, Any], classifier: Classifier) -> None:
    """Refuse labels that the network cannot answer with."""
    k = classifier.num_classes
    check_folders(data, k)
    labels = data.labels[index]
    if labels.min() < 0 or labels.max() >= k:
        raise UsageError(
            f"the labels of {data.name} run from {labels.min()} to {labels.max()}, the network"
            f" answers with classes 0 to {k - 1}: check that data and checkpoint belong together"
        )


def check_images(data: Data, index: Positions, classifier: Classifier) -> None:
    """Refuse images that the network cannot take, before anything is written.

    One that takes a fixed number at a time is called with as many from here on.
    """
    x = data.batch(index[:1]).x.to(classifier.device)
    what = f"the network cannot take images {tuple(x.shape[1:])}"
    try:
        with refuse_changes(classifier), frozen(classifier), torch.no_grad():
            with raise_as_run_error(what):
                classifier(x)
    except RunError as error:
        block = find_other_block(classifier, x)
        if block is None:
            raise UsageError(f"{error}{suggest_image_shape(error.__cause__)}") from None
        classifier.block = block
    except UsageError:
        raise
    except Exception:
        return  # memory ran out, which is dealt with batch by batch


def find_other_block(classifier: Classifier, x: Tensor) -> int | None:
    """The block in which a classifier that fails takes an image ``(1, c, h, w)``, if there is."""
    images = (x - classifier.mean) / classifier.std
    network = classifier.network
    try:
        with frozen(classifier), torch.no_grad():
            return find_batch_size(network, images.to(find_float_type(network)))
    except Exception:
        return None
