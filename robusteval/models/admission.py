"""Whether a classifier and the images belong together, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.class_names import check_folders
from robusteval.datasets.dataset import Data, Positions
from robusteval.errors import RunError, UsageError, check_argument
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.failures import raise_as_run_error


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
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with frozen(module), torch.no_grad(), raise_as_run_error("the network cannot take the images"):
        logits = module(data.batch([0]).x.to(device))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UsageError("the model must return one tensor of logits (n, k)")
    return Classifier(module, num_classes=logits.shape[1]).to(device)


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
    """Refuse images that the network cannot take, before anything is written."""
    x = data.batch(index[:1]).x.to(classifier.device)
    what = f"the network cannot take images {tuple(x.shape[1:])}"
    try:
        with frozen(classifier), torch.no_grad(), raise_as_run_error(what):
            classifier(x)
    except RunError as error:
        raise UsageError(f"{error}: bring them to another size with --size") from None
    except Exception:
        return  # memory ran out, which is dealt with batch by batch
