"""Whether a model is fed as it was trained: other conventions, tried on a few images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from robusteval.errors import name_in_python
from robusteval.runs.statistics import sign_test
from robusteval.runs.types import Finding

if TYPE_CHECKING:
    from torch import Tensor

    from robusteval.datasets.dataset import Data, Positions
    from robusteval.models.classifier import Classifier

MARGIN = 0.05  # of accuracy, that another convention must be better by
RISK = 0.001  # of naming one by chance
AT_ONCE = 32  # images; a call of a network for small ones takes no fewer


def find_convention(
    classifier: Classifier,
    data: Data,
    index: np.ndarray[Any, Any],
    pred: np.ndarray[Any, Any],
    advance: Callable[[int], object],
) -> list[Finding]:
    """Whether another convention would suit the model better, measured on a few images.

    The first source of wrong results is a model that is fed in another way than it was trained.
    A convention is named if it beats the present one, whose predictions are `pred` ``(n,)``, in
    an exact paired test. The others are tried on images that are wrong as they are given, then on
    the rest, if they mend enough of these to be named at all. `advance` is told how many images are
    done.
    """
    import torch

    from robusteval.models.classifier import predict_classes

    label = data.labels[index]
    base = pred == label
    if base.mean() > 1 - MARGIN:
        return []  # nothing could be that much better
    mean, std = classifier.mean, classifier.std
    photo_mean = torch.tensor((0.485, 0.456, 0.406), device=mean.device).view(3, 1, 1)
    photo_std = torch.tensor((0.229, 0.224, 0.225), device=mean.device).view(3, 1, 1)
    clip_mean = torch.tensor((0.4814547, 0.4578275, 0.4082107), device=mean.device).view(3, 1, 1)
    clip_std = torch.tensor((0.2686295, 0.2613026, 0.2757771), device=mean.device).view(3, 1, 1)

    def undo_normalisation(x: Tensor) -> Tensor:
        return x * std + mean  # so that the network itself sees x

    conventions: dict[str, Callable[[Tensor], Tensor]] = {
        "without the normalisation (drop --mean and --std)": undo_normalisation,
        "with images in [-1, 1] (--mean .5 --std .5)": lambda x: undo_normalisation(2 * x - 1),
        "with images in [0, 255] (--mean 0 --std 0.00392157)": lambda x: undo_normalisation(
            255 * x
        ),
        "with inverted images": lambda x: 1 - x,
    }
    if data.shape[0] == 3:
        conventions |= {
            "with ImageNet's normalisation (--mean .485,.456,.406 --std .229,.224,.225)": (
                lambda x: undo_normalisation((x - photo_mean) / photo_std)
            ),
            "with CLIP's normalisation (--mean .481,.458,.408 --std .269,.261,.276)": (
                lambda x: undo_normalisation((x - clip_mean) / clip_std)
            ),
            "with the channels reversed (it was trained on BGR)": lambda x: x.flip(1),
        }
    if data.shape[1] == data.shape[2]:
        conventions["with rows and columns swapped"] = lambda x: x.transpose(2, 3)

    prepared = dict(list_other_fits(data))
    right = {name: np.zeros(len(index), np.bool_) for name in (*conventions, *prepared)}

    def ask(names: Sequence[str], rows: Positions) -> None:
        """Predict some images ``(m,)`` under these conventions."""
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            x = data.batch(index[part]).x.to(mean.device)
            for name in names:
                other = prepared.get(name)
                z = conventions[name](x) if other is None else other.batch(index[part]).x.to(x)
                there = predict_classes(classifier(z)).cpu().numpy()
                right[name][part] = there == label[part]

    with torch.no_grad():
        ask(list(right), np.flatnonzero(~base))
        advance(int((~base).sum()))
        # what mends too few of the wrong ones is not named, whatever it does to the others
        able = [name for name, there in right.items() if is_better(int(there.sum()), 0, len(base))]
        if able:
            ask(able, np.flatnonzero(base))
        advance(int(base.sum()))
    right = {name: right[name] for name in able}
    right["if every label were 1 less"] = (pred >= 0) & (pred + 1 == label)
    right["if every label were 1 more"] = (pred >= 0) & (pred - 1 == label)

    best = max(right, key=lambda name: int(right[name].sum()))
    there = right[best]
    wins, losses = int((there & ~base).sum()), int((base & ~there).sum())
    if not is_better(wins, losses, len(base)):
        return []
    return [
        Finding(
            "convention",
            True,
            f"{base.mean():.1%} of {len(base)} images are classified correctly as given, but"
            f" {there.mean():.1%} {name_in_python(best)}: the model is probably not fed as it was"
            " trained.",
        )
    ]


def is_better(wins: int, losses: int, n: int) -> bool:
    """Whether a convention that mends and breaks so many of `n` images beats the present one."""
    return wins - losses >= MARGIN * n and sign_test(wins, losses) <= RISK


def list_other_fits(data: Data) -> Iterator[tuple[str, Data]]:
    """The images as other publishers would bring them to their shape, and how, in words."""
    fit = data.fit
    if fit is None:
        return
    other = "bicubic" if fit.interpolation != "bicubic" else "bilinear"
    yield (
        f"with {other} resizing (--interpolation {other})",
        replace(data, fit=fit._replace(interpolation=other)),
    )
    wider = fit.size if fit.resize > fit.size else round(fit.size / 0.875)
    yield (
        f"with {wider} pixels before the crop (--size {fit.size} --resize {wider})",
        replace(data, fit=fit._replace(resize=wider)),
    )
    way = "the shorter side resized, then cropped" if fit.stretch else "both sides resized"
    yield f"with {way}", replace(data, fit=fit._replace(stretch=not fit.stretch))
