"""Layers whose gradient is not that of what they do: found by trying, whatever their class.

A layer is given a small change and asked how its output moves; its gradient must foretell that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, autograd, nn

from robusteval.models.classifier import Classifier
from robusteval.models.seeds import kept_random_states, seed_everything
from robusteval.search.stand_ins import StraightSteps, cut_graph

JITTER = 0.05  # of a layer's input, by its root mean square: 8-bit images lie beside all steps
CHANGE = 0.003  # by which a gradient is put to the test, in the same unit
SHOVES = 8  # at most, until it moves
SHOVE = 2.0  # that a layer without any gradient must notice, or it is constant
BLIND = 1e-4  # of the movement, that a gradient must foretell not to count as none
WRONG = 0.3  # share of the movement that the gradient does not foretell; sound layers: below 0.15
DRAWS = 2  # directions
ROUNDING = 1e-6  # of an output, that may be taken for movement
SEED = 20


class FalseLayer(NamedTuple):
    """A layer whose gradient misleads."""

    name: str  # in the network
    kind: str  # its class
    blind: bool  # there is no gradient at all
    error: float  # share of the movement that it does not foretell


class Suspects(NamedTuple):
    """What was found in a network."""

    layers: tuple[FalseLayer, ...]
    steps: tuple[str, ...]  # operations without a derivative outside of these layers


def find_false_gradients(classifier: Classifier, x: Tensor) -> Suspects:
    """Look for layers whose gradient is none of theirs, on a few images ``(n, c, h, w)``.

    Those without layers inside, and those of classes that are not torch's own, where the output has
    the shape of the input: others have no stand-in. The network is called once, and each layer some
    times inside of this call.
    """
    network, n = classifier.network, len(x)
    found: dict[str, FalseLayer] = {}
    sound: set[str] = set()
    busy = False

    def look(name: str, layer: nn.Module, before: Tensor, output: Any) -> None:
        nonlocal busy
        if busy or name in found or not isinstance(output, Tensor):
            return
        if before.shape != output.shape or not before.is_floating_point():
            return
        busy = True
        try:
            with torch.enable_grad():
                verdict = try_layer(layer, before[:n])
        except Exception:
            return
        finally:
            busy = False
        if verdict is None:
            sound.add(name)
        else:
            found[name] = FalseLayer(name, type(layer).__name__, *verdict)

    with ExitStack() as stack:
        for name, layer in network.named_modules():
            if name and is_worth_trying(layer):
                stack.enter_context(watch_layer(name, layer, look))
        with torch.no_grad():
            classifier(x)
    inner = tuple(each for each in found.values() if not any_inside(each.name, found))
    layers = {name: layer for name, layer in network.named_modules()}
    mode = StraightSteps(len(x))
    with ExitStack() as stack:
        for each in inner:
            layer = layers[each.name]
            stack.callback(layer.register_forward_pre_hook(cut_graph).remove)
            stack.callback(layer.register_forward_hook(begin_graph).remove)
        for name in sound - found.keys():
            if next(layers[name].children(), None) is None:
                stack.enter_context(mode.trust_gates(layers[name]))
        with suppress(Exception), mode, torch.enable_grad():  # without a gradient there is no step
            classifier(x.clone().requires_grad_())
    return Suspects(inner, tuple(sorted(mode.met)))


def begin_graph(_layer: nn.Module, _args: object, output: Any) -> Any:
    """Behind a layer: its output at the beginning of a graph, for the steps that come later."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output.detach().requires_grad_().clone()
    return None


@contextmanager
def watch_layer(name: str, layer: nn.Module, look: Any) -> Iterator[None]:
    """Call `look` with a layer's input, as it was before the layer, and with its output.

    Without hooks that came during the pass, such as those of masks, which count runs.
    """
    kept: list[Tensor] = []
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    known = {kind: {**getattr(layer, kind)} for kind in kinds}

    def look_alone(output: Any) -> None:
        with ExitStack() as stack:
            for hooks, own in known.items():
                stack.enter_context(patch.object(layer, hooks, own))
            look(name, layer, kept.pop(), output)

    def before(_layer: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            kept.append(args[0].detach().clone())

    def after(_layer: nn.Module, _args: object, output: Any) -> None:
        if kept:
            look_alone(output)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback(layer.register_forward_hook(after).remove)
        yield


def try_layer(layer: nn.Module, x: Tensor) -> tuple[bool, float] | None:
    """Whether the gradient of a layer at its inputs ``(n, …)`` misleads: blind, and how wrong it
    is; None if it does not."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    def call(z: Tensor) -> Tensor:
        with kept_random_states(z.device):
            seed_everything(SEED, z.device)
            out: Tensor = layer(z.clone())
        return out

    def follow(z: Tensor) -> tuple[Tensor, Tensor]:
        """Its output, and the gradient of a random sum of it."""
        z = z.requires_grad_()
        try:
            out = call(z)
        except Exception:  # NumPy inside, perhaps
            out = call(z.detach())
        grad = None
        if out.requires_grad:
            (grad,) = autograd.grad((out * w).sum(), z, allow_unused=True)
        return out.detach(), torch.zeros_like(z) if grad is None else grad

    size = x.square().mean().sqrt().clamp_min(1e-12)
    z = x + JITTER * size * draw()
    w = draw().sign()
    out, grad = follow(z.clone())

    def foretells_nothing(grad: Tensor) -> bool:
        return float((grad * shove).abs().sum()) <= BLIND * moved

    with torch.no_grad():
        shove, moved = torch.zeros_like(z), 0.0
        for _ in range(SHOVES):
            shove = SHOVE * size * draw()
            moved = float((call(z + shove) - out).abs().sum())
            if moved > 0:
                break
        if moved > 0 and foretells_nothing(grad):
            with torch.enable_grad():  # or it only rests here
                if foretells_nothing(follow(z + shove)[1]):
                    return True, 1.0
        if out.dtype not in (torch.float32, torch.float64):
            return None  # steps of the type itself are as large as the change
        h = CHANGE * size
        noise = ROUNDING * out.flatten(1).norm(dim=1) / h
        missed = total = 0.0
        for _ in range(DRAWS):
            v = draw()
            rise = ((call(z + h * v) - call(z - h * v)) * w).flatten(1).sum(1) / (2 * h)
            told = (grad * v).flatten(1).sum(1)
            missed += float(((rise - told).abs() - noise).clamp_min(0).sum())
            total += float((rise.abs() + told.abs()).sum())
    error = missed / total if total else 0.0
    return (False, error) if error > WRONG else None


def is_worth_trying(layer: nn.Module) -> bool:
    """Whether a layer may have another gradient than it should: of torch's own those alone that
    have neither layers nor weights inside. A ReLU is what it is, and a small one may rest."""
    if isinstance(layer, nn.ReLU):
        return False
    if not type(layer).__module__.startswith(("torch.", "torchvision.")):
        return True
    return next(layer.children(), None) is None and next(layer.parameters(), None) is None


def any_inside(name: str, names: dict[str, FalseLayer]) -> bool:
    """Whether one of these layers lies inside the layer of a name."""
    return any(other.startswith(f"{name}.") for other in names)
