"""Searches along gradients in the place of those that a network withholds."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.errors import RunError
from robusteval.models.failures import explain_no_gradient
from robusteval.models.steps import book_rows
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import Stop
from robusteval.search.ensemble import Ensemble, Work
from robusteval.search.stand_ins import (
    JUMPS,
    Accompanied,
    Bypassed,
    Expected,
    Guided,
    LogOutputs,
    Straight,
    find_known_company,
    find_known_network,
    match_layers,
)

Outputs = Literal["logits", "probabilities"]


def list_searches(stop: Stop) -> dict[str, Work]:
    """What is done along each gradient, by name; each ends with a success as `search_apgd`."""
    return {
        "apgd": lambda stage: stage.descend("ce", 50, stop=stop),
        "diverse": lambda stage: stage.descend("margin", 18, 2, odi=True, stop=stop),
        "targets": lambda stage: stage.descend("margin", 30, targets=3, stop=stop),
    }


@ATTACKS.add("unmask", norms=("linf", "l2", "l1"), knowledge="white-box")
def unmask(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    layers: str = "",
    outputs: Outputs = "logits",
    draws: int = 1,
    other: str = "",
    company: int = 0,
) -> Tensor:
    """Auto-PGD along stand-ins for gradients that are zero, wrong or random.

    Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420: what the network answers
    is always its own, its gradient that of the network with other layers. First the gradient of
    the identity in the place of the layers' own (BPDA), then that of the network without them, and
    where something is rounded that of the values alone that are near to the next level. A
    network that answers at random is followed in its mean over draws (EOT), and on beyond the
    first success, which fresh answers might undo.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Reach class `y` instead of leaving it.
    seeds : Tensor, optional
        One seed per image ``(n,)``; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1"}
        Norm of the ball.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    layers : str
        Layers that mislead, by name or class and joined by ``+``, with outputs of the shape of
        their inputs. Rounding, signs and comparisons get a gradient wherever they are.
    outputs : {"logits", "probabilities"}
        What the model returns; of probabilities the logarithms are followed.
    draws : int
        Answers over which a model that answers at random is averaged.
    other : str
        Name of another network whose gradient is followed as well: in an evaluation the same
        classifier without its defense, or with one. Elsewhere there is none.
    company : int
        Other images beside which a model is asked whose answers depend on these: in an evaluation
        those beside which it is judged. Elsewhere there are none.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range, or there is no such layer.
    RunError
        If no gradient of any kind leads to the images.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    if company < 0:
        raise ValueError(f"company must be at least 0, not {company}")
    ball = Ball.around(x, norm, eps, mask)
    found = match_layers(model, layers.split("+") if layers else [])
    if len(x) == 0:
        return x.clone()
    answers = model if outputs == "logits" else LogOutputs(model)
    guides: dict[str, nn.Module] = {"straight": Straight(answers, found)}
    if found:
        guides["bypass"] = Bypassed(answers, found)
    known = find_known_network()
    if other and known is not None:
        guides["transfer"] = Guided(answers, known)
    others = find_known_company()
    near = Straight(answers, [], near=True)
    guides["near"] = near
    if company and others is not None:
        guides = {name: Accompanied(guide, others[:company]) for name, guide in guides.items()}
    with book_rows(torch.zeros(1, dtype=torch.int64)):  # the first image's passes
        reasons = {name: explain_no_gradient(guide, x[:1]) for name, guide in guides.items()}
    if JUMPS.keys().isdisjoint(near.met):  # nothing is rounded
        del guides["near"]
    guides = {name: guide for name, guide in guides.items() if reasons[name] is None}
    if not guides:
        raise RunError(str(reasons["straight"]))
    searches = list_searches("8bit" if draws == 1 else "never")
    ensemble = Ensemble(
        model, ball, y, seeds, targeted=targeted, stages=len(guides) * len(searches)
    )
    for name, guide in guides.items():
        ensemble.model = guide if draws == 1 else Expected(guide, draws)
        for search, work in searches.items():
            ensemble.run(f"{name} {search}", work)
    return ensemble.best.x_adv


def __getattr__(name: str) -> Any:
    """`Unmask`, an ART evasion attack."""
    return make_art_class(name, Unmask=unmask)
