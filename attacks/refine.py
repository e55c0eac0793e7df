"""Another attack's changes, kept only where a map says that they matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.errors import UsageError
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.scaling import resize
from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows, part
from robusteval.registry import ATTACKS
from robusteval.runs.types import Spec
from robusteval.search.balls import Ball
from robusteval.search.refinement import rank_pixels
from robusteval.search.refinement import refine as keep_where_it_matters

Where = Literal["both", "label", "reached"]
OWN = ("norm", "eps", "targeted", "target")  # parameters that this attack sets for the other


@ATTACKS.add(
    "refine",
    norms=("linf", "l2", "l1"),
    knowledge="white-box",
    unbounded={"norm": {"none": "none"}},
    needs={"eps": {"norm": ("linf", "l2", "l1")}, "where": {"guide": {"not": ("change",)}}},
)
def refine(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    attack: str = "apgd",
    guide: str = "grad",
    where: Where = "both",
    norm: Literal["linf", "l2", "l1", "none"] = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
) -> Tensor:
    """Put back what another attack changed where a map of importance is low, as far as it fools.

    Interpreting Adversarial Examples by Activation Promotion and Suppression, arXiv:1904.02057,
    section 5, refines attacks by class activation maps; the procedure is ours, as its details
    could not be checked: bisection on the share of the map that is kept, image by image, and the
    smallest result that was seen to fool. Values that stay changed keep their change.

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
        One seed per image ``(n,)`` for the attack and the map; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    attack : str
        Name of the attack to refine, with parameters of it behind plus signs:
        ``pgd+steps=20+stop=float``. Norm and radius are those given here.
    guide : str
        Name of a differentiable interpreter; or ``change``, which is no map: the size of the
        change, as a control.
    where : {"both", "label", "reached"}
        Which map guides: that of `x` for the class it is taken for, that of the attacked image
        for the class it has reached, or at each pixel the higher rank of both. Not beside
        `guide=change`.
    norm : {"linf", "l2", "l1", "none"}
        Norm of the ball of the attack; `none` for one that has no radius.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    steps : int
        Halvings of the share that is kept, a forward pass each.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; those of the attack where nothing smaller fools.

    Raises
    ------
    ValueError
        If there is no such attack or map, or a parameter is out of range.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    perturb = build_attack(attack, norm, eps)
    explainer = None if guide == "change" else Interpreter.build_differentiable(guide, {})
    if norm != "none":
        Ball.around(x, norm, eps, mask)  # for its checks
    masked = {} if mask is None else {"mask": mask}
    with part(0, 3, 4):  # the attack takes most of the passes
        x_adv = perturb(model, x, y, targeted=targeted, seeds=seeds, **masked)
    if len(x) == 0:
        if explainer is not None:
            explainer.trace_maps(model, x, y, seeds)  # for its checks
        return x.clone()

    with torch.no_grad():
        before, after = predict_classes(model(x)), predict_classes(model(x_adv))
    open_ = (before != y) == targeted  # the others are right for the attacker as they are
    hit = (open_ & ((after == y) == targeted)).nonzero().flatten()
    if len(hit) == 0:
        return x_adv
    some, some_adv = x[hit], x_adv[hit]
    with torch.no_grad(), book_rows(hit):
        if explainer is None:
            importance = (some_adv - some).abs().sum(1, keepdim=True)
        else:
            drawn = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
            mine, (h, w) = drawn[hit.to(drawn.device)], x.shape[2:]
            views = {"label": (some, before[hit]), "reached": (some_adv, after[hit])}
            ranks = [
                rank_pixels(resize(explainer.trace_maps(model, *view, mine)[0], (h, w)))
                for name, view in views.items()
                if where in ("both", name)
            ]
            importance = torch.stack(ranks).amax(0)
    with part(3, 4, 4), book_rows(hit):
        found = keep_where_it_matters(
            model, some, some_adv, y[hit], importance, targeted=targeted, steps=steps
        )
    refined = x_adv.clone()
    refined[hit] = found.x_adv
    return refined


def build_attack(text: str, norm: str, eps: float) -> Callable[..., Tensor]:
    """The attack that is refined, from its name and parameters; ValueError if there is none."""
    name, *given = text.split("+")
    usable = [
        each
        for each, entry in ATTACKS.entries.items()
        if each != "refine" and "targeted" in entry.parameters and not entry.detector
        and (norm in entry.norms or norm == "none") and entry.norms != ("corruption",)
    ]  # fmt: skip
    if name not in usable:
        least = "" if norm == "none" else ", or, of those without a radius, any with norm=none"
        raise ValueError(f"attack must be one of {', '.join(usable)}{least}, not {name}")
    parameters = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or key in OWN:
            raise ValueError(
                f"attack is written NAME+key=value, without {', '.join(OWN)}: {text!r}"
            )
        parameters[key] = value
    entry = ATTACKS.entries[name]
    ball = {"norm": norm, "eps": eps} if norm != "none" else {}
    reach = {key: value for key, value in ball.items() if key in entry.parameters}
    try:
        checked = ATTACKS.check_spec(Spec(name, {**parameters, **reach}))
    except UsageError as error:
        raise ValueError(str(error)) from None
    threat = entry.threat(checked)
    if threat.eps is not None and norm == "none":
        raise ValueError(f"{name} has a radius: give norm={threat.norm} and eps")
    if threat.eps is None and norm != "none":
        raise ValueError(f"{name} has no radius: give norm=none")
    return partial(ATTACKS.load(name), **checked.parameters)


def __getattr__(name: str) -> Any:
    """`Refine`, an ART evasion attack."""
    return make_art_class(name, Refine=refine)
