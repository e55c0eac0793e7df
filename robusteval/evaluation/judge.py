"""The verdict on what an attack returned. Nothing the attack says of itself counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.images import png_round_trip
from robusteval.errors import RunError
from robusteval.evaluation.votes import SURVIVAL, Voted, measure_survival
from robusteval.models.classifier import predict_classes
from robusteval.runs.metrics import find_right
from robusteval.runs.types import Columns, Threat, Values
from robusteval.search.balls import TOLERANCE, Ball, measure_distances, psnr, quantise, ssim
from robusteval.search.losses import margin

LEFT_BOX, LEFT_BALL, NOT_FINITE = 1, 2, 4


def judge(classifier: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Columns:
    """Judge the results of an attack, brought back by `repair` first.

    Parameters
    ----------
    classifier : nn.Module
        Predicts anew: gives logits ``(n, k)``.
    x_adv, x : Tensor
        Images ``(n, c, h, w)`` after and before the attack.
    y : Tensor
        Their classes ``(n,)``.

    Returns
    -------
    Columns
        Predictions, distances in float64, margin and confidence, ``(n,)`` each; see
        `robusteval.runs.types.Outcome`.
    """
    rounded = quantise(x_adv)
    with torch.no_grad():
        logits = classifier(x_adv)
        pred = predict_classes(logits)
        pred_8bit = predict_again(classifier, rounded, x_adv, pred)
        files = png_round_trip(rounded.cpu())
        if files is None:
            pred_png = torch.full_like(pred, -2)
        else:
            pred_png = predict_again(classifier, files.to(rounded), rounded, pred_8bit)
    survival = {SURVIVAL: measure_survival(logits, y)} if isinstance(classifier, Voted) else {}
    columns = {
        "pred_adv": pred,
        "pred_8bit": pred_8bit,
        "pred_png": pred_png,
        **measure_distances(x_adv, x),
        "ssim": ssim(x_adv, x).double(),
        "psnr": psnr(x_adv, x),
        "margin_adv": margin(logits, y).double(),
        "confidence_adv": confidence(logits, pred),
        **survival,
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}


def repair(x_adv: Tensor, x: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """The result inside box and ball, and what was wrong with each image ``(n,)`` uint8.

    A pixel that is not finite takes the whole image back to the original. RunError for a result of
    another shape.
    """
    if x_adv.shape != x.shape:
        raise RunError(
            f"the attack returned shape {tuple(x_adv.shape)} for images {tuple(x.shape)}"
        )
    x_adv = x_adv.detach().to(x)
    fault = torch.zeros(len(x), dtype=torch.uint8, device=x.device)

    broken = ~x_adv.isfinite().flatten(1).all(1)
    x_adv = torch.where(broken.view(-1, 1, 1, 1), x, x_adv)
    fault[broken] |= NOT_FINITE

    outside = ((x_adv < -TOLERANCE) | (x_adv > 1 + TOLERANCE)).flatten(1).any(1)
    x_adv = x_adv.clamp(0, 1)
    fault[outside] |= LEFT_BOX

    if threat.eps is None:
        return x_adv, fault
    reach = measure_distances(x_adv, x).get(threat.norm)
    if threat.norm == "patch":
        reach = measure_square(x_adv, x)
    if threat.norm == "ssim":  # whose radius is the likeness that may be lost
        reach = 1 - ssim(x_adv, x).double()
    if reach is None:
        return x_adv, fault
    far = (reach > threat.eps * (1 + TOLERANCE) + TOLERANCE).to(x.device)
    fault[far] |= LEFT_BALL
    if bool(far.any()):
        if threat.norm in ("linf", "l2", "l1"):
            near = Ball.around(x[far], threat.norm, threat.eps).project(x_adv[far])  # type: ignore[arg-type]
        else:
            near = x[far]  # no projection is known for this norm: the attack failed
        x_adv = x_adv.clone()
        x_adv[far] = near
    return x_adv, fault


def measure_square(x_adv: Tensor, x: Tensor) -> Tensor:
    """The share ``(n,)`` of each image that the smallest square around its change covers.

    A value has changed if it is more than half a grey level away: results are rounded to 8 bit as
    a whole.
    """
    changed = ((x_adv - x).abs() > 0.5 / 255 + TOLERANCE).any(1)  # (n, h, w)
    sides = []
    for axis in (1, 2):
        places = torch.arange(changed.shape[3 - axis], device=x.device)
        line = changed.any(axis)  # (n, w), then (n, h)
        last = torch.where(line, places, -1).amax(1)
        first = torch.where(line, places, len(places)).amin(1)
        sides.append((last - first + 1).clamp_min(0))
    side = torch.stack(sides).amax(0).double()
    return (side**2 / (changed.shape[1] * changed.shape[2])).cpu()


def predict_again(classifier: nn.Module, z: Tensor, known: Tensor, pred: Tensor) -> Tensor:
    """Predictions ``(n,)`` of images `z`, taken over from `known` where the bits are the same."""
    changed = (z != known).flatten(1).any(1)
    pred = pred.clone()
    if bool(changed.any()):
        pred[changed] = predict_classes(classifier(z[changed]))
    return pred


def confidence(logits: Tensor, pred: Tensor) -> Tensor:
    """Softmax probability of the predicted class ``(n,)``."""
    return logits.softmax(1).gather(1, pred.clamp_min(0).unsqueeze(1)).squeeze(1).double()


def fill_untouched(clean: Columns) -> Iterator[tuple[str, Values]]:
    """The columns of images before an attack: those that were wrong already stay like this.

    One by one, so that who needs all of them decides what is held at a time. Those that `clean` has
    are the same arrays, to be copied before they are written to.
    """
    n = len(clean["id"])
    pred = clean["pred_clean"]
    for name in ("index", "id", "label", "pred_clean"):
        yield name, clean[name]
    yield "attacked", find_right(clean)
    yield "target", np.full(n, -1)
    for name in ("pred_adv", "pred_8bit", "pred_png"):
        yield name, pred
    for name in ("l0", "l0_pixels", "l1", "l2", "linf"):
        yield name, np.zeros(n)
    yield "ssim", np.ones(n)
    yield "psnr", np.full(n, np.inf)
    yield "margin_clean", clean["margin_clean"]
    yield "margin_adv", clean["margin_clean"]
    yield "confidence_adv", clean["confidence_clean"]
    yield "fault", np.zeros(n, np.uint8)
    for name in ("forwards", "backwards", "seconds"):
        yield name, np.zeros(n)
    # what a detector said of them, and how many of random answers were right
    for name in ("score", "flagged", SURVIVAL):
        if name in clean:
            yield name, clean[name]
