"""Whether an image's answer depends on the images that are predicted with it, and with which it
is predicted then."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.dataset import Data, Positions
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.failures import raise_as_run_error
from robusteval.runs.types import Finding

TOGETHER = 16  # images whose copies travel together
COMPANIONS = 15  # images beside which each is judged then
ROUNDING = 1e-3  # of the largest logit; more than half precision makes of another order of sums


def find_company(classifier: Classifier, data: Data, index: Positions) -> list[Finding]:
    """Find out on a few images whether other images beside them change their logits.

    Batch normalisation without running statistics and quantisation by the range of a batch do so.
    No accuracy under attack is then one of the model: attacks could even help each other.

    Parameters
    ----------
    classifier : Classifier
        In eval mode.
    data : Data
        Where the images are.
    index : ndarray
        Which images ``(n,)`` of the data; each is predicted three times.

    Returns
    -------
    list of Finding
        One if there are such images, none if a second prediction in the same company differs as
        well: then chance does it.
    """
    moved = changed = 0
    for start in range(0, len(index), TOGETHER):
        x = data.batch(index[start : start + TOGETHER]).x.to(classifier.device)
        with torch.no_grad(), raise_as_run_error("the network failed at a second prediction"):
            first = classifier(x)
            # every other image a negative, so that no block is left in the company it had
            other = classifier(torch.stack([1 - x, x], 1).flatten(0, 1))[1::2]
            rows = differ(first, other)
            if bool(rows.any()) and bool(differ(first, classifier(x)).any()):
                return []
        moved += int(rows.sum())
        changed += int((rows & (predict_classes(first) != predict_classes(other))).sum())
    if not moved:
        return []
    return [
        Finding(
            "company",
            True,
            f"{moved} of {len(index)} images get other logits beside other images ({changed} of"
            " them another class): a layer looks at the whole batch, such as batch normalisation"
            " without running statistics. Each image is judged beside the same few others of the"
            " data: these numbers hold for this company only, not for the model; give the layer"
            " running statistics.",
        )
    ]


def choose_company(data: Data) -> Tensor:
    """The images ``(m, c, h, w)`` beside which each is judged: evenly from all of the data."""
    return data.batch(np.linspace(0, len(data) - 1, COMPANIONS).round().astype(np.int64)).x


def differ(logits: Tensor, other: Tensor) -> Tensor:
    """Which rows ``(n,)`` of two logits ``(n, k)`` differ by more than rounding."""
    size = logits.nan_to_num(posinf=0, neginf=0).abs().amax(1, keepdim=True)
    same = (logits == other) | (logits.isnan() & other.isnan())
    near = (logits - other).abs() <= ROUNDING * size  # never where one is not finite
    return ~(same | near).all(1)
