"""What an attacker lowers: one value per image, from logits ``(n, k)`` and classes ``(n,)``.

Cross-entropy as it is usually written loses its direction in float32 once a model is sure: its
derivative in the label's logit is p_y - 1, which is zero from a logit gap of about 17 on, while
those in the other logits are not. What stands here keeps it. Values of an image are the same bits
in any batch: exponentials and logarithms are taken by softmax alone, which works row by row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Loss = Literal["ce", "margin", "pm", "dlr"]

LEAST = 2.0**-24  # the least weight of a direction: the smallest 1 - p that float32 can hold


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of class `y` minus the best other logit: negative where `y` is not predicted."""
    return _pick(logits, y) - _drop(logits, y).amax(1)


def soft_margin(logits: Tensor, y: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Logit of class `y` minus the smooth maximum of the others, T log sum exp(z / T).

    At T = 1 minus the log odds of leaving `y`: cross-entropy is its softplus with the sign turned
    and has, as long as it has any, the same direction. The lower T, the nearer to `margin`. With
    each image's gap between its first two logits for T it is the direction of MIFPE (Yu and Xu,
    Efficient Loss Function by Minimizing the Detrimental Effect of Floating-Point Errors on
    Gradient-Based Attacks, CVPR 2023).

    Parameters
    ----------
    logits : Tensor
        ``(n, k)``, of two classes at least.
    y : Tensor
        Classes ``(n,)``.
    temperature : float or Tensor
        Positive, in units of the logits, or one per image ``(n,)``; it is not differentiated.

    Returns
    -------
    Tensor
        ``(n,)``, in units of the logits.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(logits).unsqueeze(1)  # (n, 1)
    smooth = temperature * _add_exponentials(_drop(logits, y) / temperature)  # (n, 1)
    return _pick(logits, y) - smooth.squeeze(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, with a gradient that keeps its direction however sure the model is.

    For sums with other losses, where its value and its weight count. It is softplus(-g) with g the
    `soft_margin`, and its gradient that of -g times 1 - p_y; of 1 - p_y no less than 2 ** -24
    counts, so that a step that looks at directions only has one.

    Parameters
    ----------
    logits : Tensor
        ``(n, k)``, of two classes at least.
    y : Tensor
        Classes ``(n,)``.

    Returns
    -------
    Tensor
        ``(n,)`` float32, in nats. It cannot be differentiated twice.
    """
    gap = soft_margin(_enter(logits), y)
    pair = torch.stack([gap, torch.zeros_like(gap)], 1).detach()  # (n, 2), as the odds of y
    missing = pair.softmax(1)[:, 1]  # 1 - p_y
    # near zero its series, as the logarithm sees no difference to one
    series = missing * (1 + missing * (1 / 2 + missing / 3))
    value = torch.where(missing < 1e-3, series, -pair.log_softmax(1)[:, 0])
    return value - missing.clamp_min(LEAST) * (gap - gap.detach())


class CrossEntropy(nn.CrossEntropyLoss):
    """`cross_entropy` where a module is asked for, of classes ``(n,)``, reduced as by torch's."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean of the images' values, their sum, or one value per image ``(n,)``."""
        if target.is_floating_point() or input.ndim != 2 or input.shape[1] < 2:
            return super().forward(input, target)
        value = cross_entropy(input, target)
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()


def replace_cross_entropy(loss: nn.Module) -> None:
    """Put `CrossEntropy` where a loss of other people's code has torch's inside."""
    for name, inside in loss.named_children():
        if type(inside) is nn.CrossEntropyLoss and inside.weight is None:
            setattr(loss, name, CrossEntropy(reduction=inside.reduction))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Kullback-Leibler divergence of predictions, with a gradient as that of `cross_entropy`.

    What TRADES raises in its search (Theoretically Principled Trade-off between Robustness and
    Accuracy, arXiv:1901.08573, Eq. 5). Its derivative in the logits is p' - p: where both are sure
    of one class, the difference of two ones. The derivatives sum to zero, so that of this class is
    what the others leave.

    Parameters
    ----------
    before, after : Tensor
        Logits ``(n, k)``; the gradient is that in `after`.

    Returns
    -------
    Tensor
        ``(n,)`` float32, in nats. It cannot be differentiated twice.
    """
    after = _enter(after)
    log_p, log_q = before.detach().float().log_softmax(1), after.detach().log_softmax(1)
    value = (log_p.softmax(1) * (log_p - log_q)).sum(1)
    sure = torch.minimum(log_p, log_q).argmax(1, keepdim=True)  # (n, 1)
    # what both predictions leave to the other classes: its size, and how it is shared out
    rest = torch.cat([each.scatter(1, sure, -torch.inf) for each in (log_q, log_p)], 1)
    size = torch.cat([log_q.softmax(1), log_p.softmax(1)], 1)
    size = size.where(rest.isfinite(), 0.0).sum(1, keepdim=True).clamp_min(LEAST)  # (n, 1)
    q, p = rest.softmax(1).chunk(2, dim=1)  # (n, k) each
    slope = (q - p).scatter(1, sure, (p - q).sum(1, keepdim=True))
    return _follow(value, slope * size, after)


def probability_margin(logits: Tensor, y: Tensor, other: Tensor | None = None) -> Tensor:
    """The probability of class `y` minus that of another, to be differentiated, not compared.

    Probabilistic Margins for Instance Reweighting in Adversarial Training, arXiv:2106.07904, and as
    an attack's loss PMA, arXiv:2411.15210. The gradient is that of the probabilities divided by a
    positive number, image by image: it neither vanishes nor turns where a class is sure. The value
    is the `margin` of the two classes, which says better than probabilities how near the goal is.

    Parameters
    ----------
    logits : Tensor
        ``(n, k)``, of two classes at least.
    y : Tensor
        Classes ``(n,)``.
    other : Tensor, optional
        Classes ``(n,)``; the likeliest besides `y` if not given.

    Returns
    -------
    Tensor
        ``(n,)``, in units of the logits; it cannot be differentiated twice.
    """
    z = logits.detach()
    if other is None:
        other = _drop(z, y).argmax(1)
    pair = torch.stack([y, other], 1)  # (n, 2)
    # derivatives of p_y - p_t as logarithms, from what does not cancel:
    #   p_y (1 - p_y + p_t) in z_y, -p_t (1 - p_t + p_y) in z_t, -p_k (p_y - p_t) in each other
    log_p = z.log_softmax(1)
    own = log_p.gather(1, pair)
    both = _add_exponentials(own)  # (n, 1), of p_y + p_t
    ends = []
    for this, that in ((0, 1), (1, 0)):
        gap = soft_margin(z, pair[:, this])
        missing = torch.stack([-gap, torch.zeros_like(gap)], 1).log_softmax(1)[:, :1]  # of 1 - p
        ends.append(
            own[:, this, None] + _add_exponentials(torch.cat([missing, own[:, that, None]], 1))
        )
    size = (log_p + both).scatter(1, pair, torch.cat(ends, 1)).softmax(1)  # (n, k)
    share = z.gather(1, pair).softmax(1)
    sign = (share[:, 1:] - share[:, :1]).expand_as(z)  # -(p_y - p_t) / (p_y + p_t)
    one = torch.ones_like(z[:, 0])
    sign = sign.scatter(1, pair, torch.stack([one, -one], 1))
    slope = size * sign
    # they sum to zero, in float32 too
    top = slope.abs().argmax(1, keepdim=True)
    slope = slope.scatter(1, top, -slope.scatter(1, top, 0.0).sum(1, keepdim=True))
    gap = z.gather(1, pair)
    return _follow(gap[:, 0] - gap[:, 1], slope, logits)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Margin over the gap between the first and third logit, which no rescaling can saturate.

    Difference of logits ratio, arXiv:2003.01690, Eq. 6, with the sign of `margin`. Of two classes,
    where it would be constant, the margin itself.
    """
    return margin(logits, y) / _spread(logits, (2, 2))


def attacker_loss(logits: Tensor, y: Tensor, *, targeted: bool, loss: Loss) -> Tensor:
    """The named loss, lower where the attacker is closer to the goal.

    Parameters
    ----------
    logits : Tensor
        ``(n, k)``, of two classes at least.
    y : Tensor
        Classes ``(n,)``: to leave or, `targeted`, to reach.
    targeted : bool
        The mirror image: towards class `y`. Of `dlr` with the denominator of `aimed_loss`.
    loss : {"ce", "margin", "pm", "dlr"}
        `soft_margin`, the stable form of cross-entropy; `margin`; `probability_margin`; `dlr`.
        For a target that is far `pm` is weak: it lowers the likeliest class, by way of any other.

    Returns
    -------
    Tensor
        ``(n,)`` float32.

    Raises
    ------
    ValueError
        If the loss is unknown, or there is one class only.
    """
    logits = _enter(logits)
    if loss == "ce":
        value = soft_margin(logits, y)
    elif loss == "margin":
        value = margin(logits, y)
    elif loss == "pm":
        value = probability_margin(logits, y)
    elif loss == "dlr":
        value = margin(logits, y) / _spread(logits, (2, 3)) if targeted else dlr(logits, y)
    else:
        raise ValueError(f"unknown loss {loss!r}: use ce, margin, pm or dlr")
    return -value if targeted else value


def aimed_loss(logits: Tensor, y: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The named loss of leaving class `y` by way of another; lower where that is closer.

    Parameters
    ----------
    logits : Tensor
        ``(n, k)``, of two classes at least.
    y, target : Tensor
        Classes to leave and to head for ``(n,)``.
    loss : {"ce", "margin", "pm", "dlr"}
        `margin`: the gap of their logits. `pm`: of their probabilities, see `probability_margin`.
        `dlr`: the first over the gap between the first logit and the mean of the third and
        fourth (arXiv:2003.01690, Eq. 7), of three classes that of the second and third, as the
        third may be the target; of two classes over one. `ce`: the target's own, against all
        others.

    Returns
    -------
    Tensor
        ``(n,)`` float32.

    Raises
    ------
    ValueError
        If the loss is unknown, or there is one class only.
    """
    logits = _enter(logits)
    gap = _pick(logits, y) - _pick(logits, target)
    if loss == "margin":
        return gap
    if loss == "pm":
        return probability_margin(logits, y, target)
    if loss == "dlr":
        return gap / _spread(logits, (2, 3))
    return attacker_loss(logits, target, targeted=True, loss=loss)


def _enter(logits: Tensor) -> Tensor:
    """Logits of any float type in that of all losses; ValueError if there is one class only."""
    if logits.shape[1] < 2:
        raise ValueError("there is no other class: the model has only one")
    return logits.float()


def _pick(logits: Tensor, y: Tensor) -> Tensor:
    """Logits ``(n,)`` of classes `y`."""
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def _drop(logits: Tensor, y: Tensor) -> Tensor:
    """Logits ``(n, k)`` with those of classes `y` at minus infinity."""
    return logits.scatter(1, y.unsqueeze(1), -torch.inf)


def _add_exponentials(values: Tensor) -> Tensor:
    """Logarithm of each row's sum of exponentials ``(n, 1)``."""
    return values.amax(1, keepdim=True) - values.log_softmax(1).amax(1, keepdim=True)


def _spread(logits: Tensor, ranks: tuple[int, int]) -> Tensor:
    """Gap ``(n,)`` of the first logit and the mean of two, ranked from 0; of two classes one."""
    classes = logits.shape[1]
    if classes == 2:
        return torch.ones_like(logits[:, 0])
    short = max(ranks[1] + 1 - classes, 0)  # with fewer classes, the last ones
    top = logits.topk(ranks[1] + 1 - short, dim=1).values
    low = (top[:, ranks[0] - short] + top[:, ranks[1] - short]) / 2
    return (top[:, 0] - low).clamp_min(1e-12)


def _follow(value: Tensor, slope: Tensor, logits: Tensor) -> Tensor:
    """Values ``(n,)`` whose derivatives in the logits are `slope` ``(n, k)``."""
    return value + (slope * (logits - logits.detach())).sum(1)
