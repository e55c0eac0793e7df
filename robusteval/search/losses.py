"""What an attacker lowers: one value per image, from logits ``(n, k)`` and classes ``(n,)``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["ce", "margin", "dlr"]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of class `y` minus the best other logit: negative where `y` is not predicted."""
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    rest = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return own - rest.amax(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Margin over the gap between the first and third logit, which no rescaling can saturate.

    Difference of logits ratio, arXiv:2003.01690, Eq. 6, with the sign of `margin`.
    """
    if logits.shape[1] < 3:
        raise ValueError("the dlr loss needs at least 3 classes: use loss=margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def attacker_loss(logits: Tensor, y: Tensor, *, targeted: bool, loss: Loss) -> Tensor:
    """The named loss, lower where the attacker is closer to the goal.

    Untargeted: away from class `y`. Targeted: towards it.
    """
    if loss == "ce":
        value = -F.cross_entropy(logits, y, reduction="none")
    elif loss == "margin":
        value = margin(logits, y)
    elif loss == "dlr":
        if targeted:
            raise ValueError("the dlr loss is for untargeted attacks: use loss=margin")
        value = dlr(logits, y)
    else:
        raise ValueError(f"unknown loss {loss!r}: use ce, margin or dlr")
    return -value if targeted else value
