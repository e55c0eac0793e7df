"""Maps made of the derivative of a class's score with respect to the image.

All follow one form: ``(model, x, y, *, seeds=None, …) -> maps``. `model` maps images
``(n, c, h, w)`` in [0, 1] to logits, `x` are images, `y` ``(n,)`` int64 the class that each map is
for. Maps are ``(n, 1, h', w')``, larger where more important, not scaled. They stay on the graph
exactly when `x` requires a gradient, and are detached otherwise; the parameters may be frozen.
The model runs in the mode it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.interpreters.rectifiers import Slope, guide_relu, smooth_relu
from robusteval.models.classifier import Classifier, choose_block_size
from robusteval.models.forward_modes import twice_differentiable
from robusteval.models.seeds import per_image
from robusteval.models.steps import stop_if_asked
from robusteval.registry import INTERPRETERS


@INTERPRETERS.add("grad", differentiable=True, cost="1 forward, 1 backward")
def grad(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    score: Literal["logit", "logprob"] = "logit",
    pool: int = 1,
    relu: Slope = "smooth",
) -> Tensor:
    """Size of the class score's derivative at each pixel (saliency).

    Deep Inside Convolutional Networks, arXiv:1312.6034, section 3. The score there is the logit.
    Attacks on maps used the log-probability, whose derivative vanishes as the probability goes to
    one: after scaling, the map of a confident image is then mostly rounding.

    Parameters
    ----------
    model, x, y
        See the module.
    seeds : Tensor, optional
        Not used: nothing is random.
    score : {"logit", "logprob"}
        What is differentiated.
    pool : int
        Side of the squares that are averaged, in pixels: 1 keeps full resolution. Published
        attacks used 4 for images of 224 pixels and 2 for 32.
    relu : {"smooth", "adv2", "true"}
        Slope of the network's ReLUs while the map stays on the graph, see `smooth_relu`. Off the
        graph it is always the true one.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h // pool, w // pool)``, at least 0.

    Raises
    ------
    ValueError
        If a parameter is out of range, a class does not exist or the logits have no derivative.
    """
    if not 1 <= pool <= min(x.shape[2:]):
        raise ValueError(f"pool must be between 1 and the image's side, not {pool}")
    with replace_slope(x, relu):
        derivative = compute_input_gradient(model, x, y, score=score)
    return F.avg_pool2d(derivative.abs().amax(1, keepdim=True), pool)


@INTERPRETERS.add("smoothgrad", differentiable=True, seeded=True, cost="25 forwards, 25 backwards")
def smoothgrad(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    samples: int = 25,
    sigma: float = 0.1,
    relu: Slope = "smooth",
) -> Tensor:
    """Size of the logit's derivative averaged over noisy copies of the image.

    SmoothGrad: removing noise by adding noise, arXiv:1706.03825, section 2. The signed derivatives
    are averaged, then their size is taken as in `grad`. Noisy copies may leave [0, 1].

    Parameters
    ----------
    model, x, y
        See the module.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for the noise; zeros if not given.
    samples : int
        Noisy copies of each image; each costs one forward and one backward pass.
    sigma : float
        Standard deviation of the noise, in units of the [0, 1] pixel range.
    relu : {"smooth", "adv2", "true"}
        See `grad`.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h, w)``, at least 0.

    Raises
    ------
    ValueError
        If a parameter is out of range, a class does not exist or the logits have no derivative.
    """
    if samples < 1 or sigma < 0:
        raise ValueError(
            f"samples must be at least 1 and sigma at least 0, not {samples} and {sigma:g}"
        )
    drawn = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds

    def noisy(sample: int) -> Tensor:
        return x + sigma * per_image(drawn + sample, x.shape[1:], normal=True).to(x)

    with replace_slope(x, relu):
        derivative = compute_mean_gradient(model, noisy, samples, y)
    return derivative.abs().amax(1, keepdim=True)


@INTERPRETERS.add("integrated_gradients", differentiable=True, cost="32 forwards, 32 backwards")
def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    steps: int = 32,
    baseline: float = 0.0,
    relu: Slope = "smooth",
) -> Tensor:
    """What each pixel adds to the logit on the straight way from an even grey image.

    Axiomatic Attribution for Deep Networks, arXiv:1703.01365, Eq. 3, by the midpoint rule. The
    map's sum approaches the logit's gain from the baseline to the image as `steps` grows.

    Parameters
    ----------
    model, x, y
        See the module.
    seeds : Tensor, optional
        Not used: nothing is random.
    steps : int
        Points on the way; each costs one forward and one backward pass.
    baseline : float
        Grey level of the image at the start, in units of the [0, 1] pixel range.
    relu : {"smooth", "adv2", "true"}
        See `grad`.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h, w)``, negative where a pixel speaks against the class.

    Raises
    ------
    ValueError
        If a parameter is out of range, a class does not exist or the logits have no derivative.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    way = (x if is_differentiated(x) else x.detach()) - baseline
    with replace_slope(x, relu):
        derivative = compute_mean_gradient(
            model, lambda step: baseline + (step + 0.5) / steps * way, steps, y
        )
    return (way * derivative).sum(1, keepdim=True)


@INTERPRETERS.add("input_x_gradient", differentiable=True, cost="1 forward, 1 backward")
def input_x_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    centre: float | None = None,
    relu: Slope = "smooth",
) -> Tensor:
    """Image times the logit's derivative: layer-wise relevance (LRP-0) of a ReLU network.

    Relevance propagation with the plain rule (doi:10.1371/journal.pone.0130140, Eq. 56) equals it
    where every nonlinearity is a ReLU or a maximum; elsewhere, with GELU or SiLU, it is just the
    product. The map of a network without biases sums to the logit.

    Parameters
    ----------
    model, x, y
        See the module.
    seeds : Tensor, optional
        Not used: nothing is random.
    centre : float, optional
        Pixel value that counts as zero, in units of the [0, 1] pixel range. If not given, the mean
        that a `Classifier` subtracts, as relevance propagation inside the network has it, and 0
        for any other module.
    relu : {"smooth", "adv2", "true"}
        See `grad`.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h, w)``, negative where a pixel speaks against the class.

    Raises
    ------
    ValueError
        If a class does not exist or the logits have no derivative.
    """
    zero: Tensor | float = 0.0 if centre is None else centre
    if centre is None and isinstance(model, Classifier):
        zero = model.mean
    with replace_slope(x, relu):
        derivative = compute_input_gradient(model, x, y)
    image = x if is_differentiated(x) else x.detach()
    return ((image - zero) * derivative).sum(1, keepdim=True)


@INTERPRETERS.add("guided_backprop", differentiable=False, cost="1 forward, 1 backward")
def guided_backprop(
    model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None
) -> Tensor:
    """Size of the derivative that keeps only what raises the class at every ReLU.

    Striving for Simplicity, arXiv:1412.6806, section 3.4. It shows edges of the image more than
    reasons of the network: randomising the weights hardly changes it (arXiv:1810.03292). ReLU6,
    hardtanh and leaky ReLU are guided like ReLU. Captum guides modules of the class ReLU alone, so
    the two agree on networks of these; on ReLU6 Captum's map is the plain derivative.

    Parameters
    ----------
    model, x, y
        See the module.
    seeds : Tensor, optional
        Not used: nothing is random.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h, w)``, at least 0, never on the graph.

    Raises
    ------
    ValueError
        If a class does not exist, the logits have no derivative or the network calls no ReLU.
    """
    return compute_guided_gradient(model, x, y).abs().amax(1, keepdim=True)


def compute_guided_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Guided derivative ``(n, c, h, w)`` of the logit, signed and per channel, off the graph.

    Times a resized `gradcam` it is Guided Grad-CAM (arXiv:1610.02391, section 3.2).
    """
    with guide_relu() as rectifiers:
        derivative = compute_input_gradient(model, x.detach(), y)
    if not rectifiers.met:
        raise ValueError(
            "guided_backprop needs a network with ReLUs (ReLU, ReLU6, hardtanh or leaky ReLU, not"
            " spelt as a clamp or scripted), and this one calls none: its map would be the plain"
            " derivative, for which there is grad"
        )
    return derivative


def compute_input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, *, score: Literal["logit", "logprob"] = "logit"
) -> Tensor:
    """Derivative ``(n, c, h, w)`` of each image's class score with respect to its raw pixels.

    One forward and one backward pass for the whole batch. On the graph if `x` is.
    """
    keep = is_differentiated(x)
    with torch.enable_grad():
        image = x if keep else x.detach().requires_grad_()
        with twice_differentiable(x):
            logits = model(image)
        scores = select_scores(logits, y, score)
        if not scores.requires_grad:
            raise ValueError("the logits have no derivative with respect to the image")
        (derivative,) = autograd.grad(scores.sum(), image, create_graph=keep)
    return derivative


def compute_mean_gradient(
    model: nn.Module, variant: Callable[[int], Tensor], count: int, y: Tensor
) -> Tensor:
    """Mean `compute_input_gradient` of the variants ``(n, c, h, w)`` of a batch, numbered from 0.

    As many variants travel together as the model runs at once, so that few images are not
    padded `count` times.
    """
    first = variant(0)
    n, shape = len(first), first.shape[1:]
    together = max(1, choose_block_size(shape.numel(), first.device) // max(n, 1))
    total = torch.zeros_like(first)
    for start in range(0, count, together):
        stop_if_asked()
        variants = [variant(i) for i in range(start, min(start + together, count))]
        gradients = compute_input_gradient(model, torch.cat(variants), y.repeat(len(variants)))
        # one by one: the order of the sum must not depend on n
        for gradient in gradients.view(len(variants), n, *shape).unbind():
            total = total + gradient
    return total / count


def select_scores(
    logits: Tensor, y: Tensor, score: Literal["logit", "logprob"] = "logit"
) -> Tensor:
    """The score ``(n,)`` of class `y` ``(n,)`` in logits ``(n, k)``; ValueError if it has none."""
    n, k = logits.shape
    if y.shape != (n,) or y.dtype != torch.int64:
        raise ValueError(f"y must hold one int64 class for each of the {n} images")
    if n and not 0 <= int(y.min()) <= int(y.max()) < k:
        raise ValueError(f"classes must lie between 0 and {k - 1}")
    if score not in ("logit", "logprob"):
        raise ValueError(f"score must be logit or logprob, not {score!r}")
    values = logits if score == "logit" else logits.log_softmax(1)
    return values.gather(1, y.unsqueeze(1)).squeeze(1)


def is_differentiated(x: Tensor) -> bool:
    """Whether maps of these images stay on the graph."""
    return x.requires_grad and torch.is_grad_enabled()


@contextmanager
def replace_slope(x: Tensor, relu: Slope) -> Iterator[None]:
    """The named slope for ReLUs if maps of `x` stay on the graph, the true one if not."""
    with smooth_relu(relu) if is_differentiated(x) and relu != "true" else nullcontext():
        yield
