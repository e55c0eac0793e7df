"""Attacks on a classifier together with the maps that explain it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.classifier import predict_classes
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.descent import Found, Stop, keep_best
from robusteval.search.edges import Edges, Variant, weigh_edges
from robusteval.search.moves import Base, Flow, Search, Signed, Tanh

from .dual_objective import (
    BestImages,
    DualObjective,
    Target,
    attack_in_parts,
    check_goals,
    choose_classes,
)
from .dual_plan import DualPlan, MapClass, Settings, Smoothing

Stage = Literal["preset", "warmup", "all"]


@ATTACKS.add(
    "advedge",
    norms=("linf",),
    knowledge="white-box",
    unbounded={"search": {"cw": "l2", "stadv": "none"}},
    needs={
        "eps": {"search": ("pgd",)},
        # where edges act in the warm-up alone and it has no steps, all variants are ADV2, but for
        # other budgets in `released`, which nobody could ask for in this way
        "variant": (
            {"variant": ("adv2",)},
            {"edge_stage": ("all",)},
            {"settings": ("paper",), "edge_stage": ("preset",)},
            {"warmup": {"not": (0,)}},
        ),
        "alpha": {"variant": ("advedge_plus",)},
        "edges": {"variant": ("advedge", "advedge_plus")},
        "edge_normalise": {"variant": ("advedge", "advedge_plus")},
        "edge_stage": {"variant": ("advedge", "advedge_plus")},
        "target": {"targeted": (False,)},
        "confidence": {"stop": ("8bit", "float")},
        "every": {"stop": ("8bit", "float")},
        "rounds": {"search": ("cw",), "settings": ("fast", "paper")},
        "smoothing": (
            {"search": ("pgd", "stadv"), "interpreter": {"not": ("mask",)}},
            {"settings": ("released",), "interpreter": {"not": ("mask",)}},
        ),
    },
)
@attack_in_parts
def advedge(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    variant: Variant = "advedge",
    search: Base = "pgd",
    interpreter: str = "grad",
    settings: Settings = "fast",
    eps: float = 8 / 255,
    step: float | None = None,
    warmup: int | None = None,
    steps: int | None = None,
    weight: float = 1.0,
    edge_stage: Stage = "preset",
    alpha: float | None = None,
    edges: Edges = "sobel",
    edge_normalise: bool = False,
    smoothing: Smoothing = "preset",
    target: Target = "runner_up",
    map_class: MapClass = "preset",
    confidence: float | None = None,
    every: int | None = None,
    rounds: int | None = None,
    mask_iterations: int | None = None,
    stop: Stop = "8bit",
) -> Tensor:
    """Reach a class while the explanation stays as it was: ADV2, AdvEdge and AdvEdge+.

    Interpretable Deep Learning under Fire, arXiv:1812.00891 (ADV2), and Hardening Interpretable
    Deep Learning Systems, arXiv:2211.15926 (AdvEdge, Eq. 7 to 15; reconstructed from it and the
    code published with it). A warm-up towards the class alone, then class and map together; the
    result is the image of the nearest map among those that are predicted as the class. C&W lowers
    the squared l2 distance, the map's by its weight, and a constant times the hinge of the margin
    (arXiv:1608.04644, section V); the constant of each image is searched by halving over `rounds`
    searches from the start (`robusteval.search.constants`), whose result is the image of least
    distance and map together; its learning rate falls to zero. Departs from the published code in
    choosing for each image by itself, in projecting every step to [0, 1], and in unrolling MASK
    within one loss instead of bisecting its step; `released` keeps all else that it does.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Reach class `y`; otherwise the class that `target` picks for each image.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for all that is drawn; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    variant : {"adv2", "advedge", "advedge_plus"}
        Where the image may change: anywhere alike, in proportion to the strength of its edges, or
        only where that exceeds `alpha`; see `robusteval.search.edges.weigh_edges`.
    search : {"pgd", "cw", "stadv"}
        Signed steps in the linf ball of radius `eps`; or, without a radius, at a cost of the
        squared l2 distance (C&W, arXiv:1608.04644) or of moving neighbouring pixels differently
        (StAdv, arXiv:1801.02612). See `robusteval.search.moves`.
    interpreter : str
        Name of a differentiable interpreter, or several joined by ``+``, all fooled at once.
    settings : {"fast", "released", "paper"}
        What decides where a parameter is None or ``preset``. `released`: as the published code,
        pair by pair: edges in the warm-up only, unequal budgets, losses of the warm-up, a fixed
        weight of the class in C&W, the last image of some pairs as their result, and of C&W on
        CAM the nearest image that misses the class, so that it never succeeds; ADV2 by PGD as its
        own authors' code. `paper`: equal budgets for all variants, edges in every step, smoothing
        that sums to one. `fast`: a tenth of the steps, edges in the warm-up. Maps of Grad are
        pooled as published, of `fast` on images of 112 pixels and more.
    eps : float
        Radius of the ball of `search=pgd`, in units of the [0, 1] pixel range; no other search
        has one.
    step : float, optional
        Length of a step: for `pgd` in units of the [0, 1] pixel range, eps / 8 if not given; else
        the learning rate, for `stadv` in pixels.
    warmup : int, optional
        Steps towards the class alone; if not given as many for each of `steps` as in the preset,
        at least one.
    steps : int, optional
        Steps towards class and map.
    weight : float
        Factor on the preset's weights of the map; 0 leaves the map out of the steps, not out of
        the choice of the result.
    edge_stage : {"preset", "warmup", "all"}
        Whether edges restrict the warm-up, as in the published code, or every step, as in the
        formulas. With `all`, `advedge_plus` changes nothing off the edges. Where edges
        restrict the warm-up alone, it must have steps.
    alpha : float, optional
        Least strength of an edge for `advedge_plus`, in units of the [0, 1] pixel range; 0.1 if
        not given, of `released` on RTS by PGD 0.05.
    edges : {"sobel", "random", "inverse"}
        Edges, or as controls equally many random places or those without an edge.
    edge_normalise : bool
        Divide the strength of edges by the image's largest.
    smoothing : {"preset", "none", "fixed", "uniform", "published"}
        Target probabilities of the cross-entropy: one; 0.95 as in ADV2's code; from U(0.95, 1) at
        first to U(0.99, 1), in both the rest shared by the other classes; or, as published, a
        ninth of the rest to each of them, which for k classes sums to more than one if k is above
        10. Not beside `interpreter=mask` alone, of which the margin is lowered.
    target : {"runner_up", "random", "least_likely"}
        Without `targeted`, the class to reach: the most likely one besides the label, a random
        one besides it, or the least likely one.
    map_class : {"preset", "predicted", "target"}
        Class of the benign map: the one that the image is taken for, or the one to reach, as is
        preset of `released` on RTS alone. The map of the attacked image is that of the class to
        reach.
    confidence : float, optional
        Least probability of the class for an image to be chosen.
    every : int, optional
        Steps between one comparison of maps and the next.
    rounds : int, optional
        Searches of C&W, each from the start with another constant: 3 of `fast`, 9 of `paper`.
    mask_iterations : int, optional
        Iterations in which `interpreter=mask` makes a mask from the start, as it does of the
        benign image, every 50 steps and of all that is compared: 300, or 500 of flavour `v1`.
    stop : {"8bit", "float", "never"}
        What is compared: images rounded to 8 bits inside the ball, or as they are; `never`
        returns the last image. All steps are taken in any case, as the map still improves.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; the last ones where the class was not reached.

    Raises
    ------
    ValueError
        If a parameter is out of range, an interpreter is unknown, has no derivative or does not
        fit the network, or a target is no class.
    """
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step must be positive, not {step:g}")
    plan = DualPlan.from_preset(
        interpreter.split("+"),
        settings,
        search,
        variant,
        smoothing,
        min(x.shape[2:]),
        mask_iterations,
    ).override(
        warmup=warmup,
        steps=steps,
        weight=weight,
        confidence=confidence,
        every=every,
        rounds=rounds,
    )

    # where the image may change, and how far each step goes there
    throughout = edge_stage == "all" or (edge_stage == "preset" and settings == "paper")
    alpha = plan.alpha if alpha is None else alpha
    edge = weigh_edges(x, variant, alpha=alpha, edges=edges, normalise=edge_normalise, seeds=seeds)
    free = torch.ones_like(x, dtype=torch.bool) if mask is None else (mask != 0).expand_as(x)
    if throughout and variant == "advedge_plus":
        free = free & (edge != 0)  # exactly, whatever a step or rounding would do
    ball = Ball.around(x, "linf", eps if search == "pgd" else 1.0, free)

    def start() -> Search:
        if search == "pgd":
            return Signed(ball, eps / 8 if step is None else step)
        if search == "cw":
            return Tanh(x, free, step or plan.rate)
        rate = step or plan.rate
        return Flow(x, free, rate, seeds, tau=plan.tau, neighbours=plan.neighbours)

    if len(x) == 0:
        for explainer in plan.explainers:
            explainer.trace_maps(model, x, y, seeds)  # for its checks
            if explainer.spec.name != "mask":  # which is optimised on its own graph, at a cost
                explainer.check_derivative(model, x.shape[1:])
        return x.clone()
    with torch.no_grad():
        logits = model(x)
    goal = check_goals(y, logits) if targeted else choose_classes(logits, y, target, seeds)
    shown_class = plan.map_class if map_class == "preset" else map_class
    shown = logits.argmax(1) if shown_class == "predicted" else goal
    dual = DualObjective(model, x, goal, shown, plan, seeds)
    moves = start()
    best = BestImages(dual.judge_images, moves.round_images, x, stop)
    missed = Found.nothing(x)  # of `keep="missed"`
    if plan.bisects:
        slack = 1 / 255 if stop == "8bit" else 0.0  # beyond what rounding does to a margin
        dual.search_constants(slack, logits.shape[1])
    here: Tensor | None = None
    total = plan.warmup + plan.steps
    x_adv = x
    for turn in range(plan.rounds):
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if turn:
            moves = start()
            dual.begin()
        for i in range(-plan.warmup, plan.steps):  # below zero: towards the class alone
            tell_step(turn * total + plan.warmup + i, plan.rounds * total)
            if plan.begins_phase(i):
                moves.restart()
            if plan.bisects and isinstance(moves, Tanh):
                moves.slow_down(1 - (plan.warmup + i) / total)
            here = edge if throughout else plan.pace * edge if i < 0 else None
            point = moves.point.detach().requires_grad_()
            x_adv = moves.make_images(point, here)
            loss, is_adv = dual.measure_loss(x_adv, i)
            cost = moves.price_change(point, x_adv)
            grad = autograd.grad((loss if cost is None else loss + cost).sum(), point)[0]
            found = x_adv.detach()
            if plan.keep == "missed" and i >= 0:
                far = (found - x).square().flatten(1).sum(1)
                everyone = torch.arange(len(x), device=x.device)
                keep_best(missed, everyone, Found(found, far, ~is_adv, ~is_adv))
            if i >= 0 and i % plan.every == 0:
                reached[best.take(found[is_adv], is_adv.nonzero().flatten())] = True
            moves.step(grad, here)

        x_adv = moves.make_images(moves.point, here).detach()
        if plan.keep == "missed":
            return torch.where(missed.is_adv.view(-1, 1, 1, 1), missed.x_adv, x_adv)
        if plan.keep == "last" or (stop == "never" and turn == plan.rounds - 1):
            return x_adv
        with torch.no_grad():
            is_adv = predict_classes(model(x_adv)) == goal
        reached[best.take(x_adv[is_adv], is_adv.nonzero().flatten())] = True
        if dual.constants is not None:
            dual.constants.halve(reached)
    return best.fill_with(x_adv)


def __getattr__(name: str) -> Any:
    """`AdvEdge`, an ART evasion attack."""
    return make_art_class(name, AdvEdge=advedge)
