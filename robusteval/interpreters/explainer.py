"""An interpreter with its parameters, and how far maps ``(n, 1, h, w)`` of it are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, autograd, nn

from robusteval.errors import UsageError
from robusteval.interpreters.observing import describe_layer, draw_noise
from robusteval.interpreters.scaling import min_max
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.failures import (
    is_out_of_memory,
    raise_as_run_error,
    raise_as_usage_error,
)
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.types import Spec

Values = np.ndarray[Any, Any]


class MapScale(NamedTuple):
    """How an interpreter's maps are compared."""

    stretched: bool  # to [0, 1] first; masks are there already, an empty one would become noise
    summed: bool  # squares over the cells, otherwise their mean


# Published weights of a map term go with these reductions.
SCALES = {
    "grad": MapScale(True, True),
    "mask": MapScale(False, True),
    "rts": MapScale(False, False),
}

# whose maps are made of a layer's features
OF_FEATURES = ("cam", "gradcam", "gradcam_plus_plus", "hirescam", "library")


def choose_scale(interpreter: str) -> MapScale:
    """How ADV2 (arXiv:1812.00891) compares the maps; other interpreters are taken like CAM."""
    return SCALES.get(interpreter, MapScale(True, False))


def scale_maps(interpreter: str, maps: Tensor) -> Tensor:
    """Maps in [0, 1], as they are compared."""
    return min_max(maps) if choose_scale(interpreter).stretched else maps


def measure_squared_distance(interpreter: str, maps: Tensor, benign: Tensor) -> Tensor:
    """Sum or mean of squared differences ``(n,)`` of scaled maps: what an attack lowers."""
    squares = (maps - benign).square().flatten(1)
    return squares.sum(1) if choose_scale(interpreter).summed else squares.mean(1)


def measure_mean_distance(maps: Tensor, benign: Tensor) -> Tensor:
    """Mean absolute difference ``(n,)`` of scaled maps, in [0, 1]: what is reported."""
    return (maps - benign).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Interpreter:
    """A registered interpreter with its parameters, ready to explain."""

    spec: Spec
    resolved: dict[str, Any]  # all its parameters, defaults included
    seeded: bool  # another seed gives another map
    alike: tuple[str, ...]  # those that say the same of a network that ends in pooling
    explain: Callable[..., Tensor]  # (model, x, y, seeds=…): maps as they are made, not scaled
    layer: str = ""  # whose features the maps are made of, where they are made of features

    @classmethod
    def build(
        cls, spec: str | Spec, classifier: Classifier, shape: tuple[int, int, int]
    ) -> Interpreter:
        """The interpreter of a spec, tried on the classifier that it is to explain.

        Parameters
        ----------
        spec : str or Spec
            Such as ``"grad:pool=4"``.
        classifier : Classifier
            What is explained.
        shape : tuple of int
            ``(c, h, w)`` of its images.

        Raises
        ------
        UsageError
            If the spec is wrong or the network cannot have such maps.
        """
        checked = INTERPRETERS.check_spec(parse(spec) if isinstance(spec, str) else spec)
        interpreter = cls._bind(checked)
        nothing = torch.empty(0, *shape, device=classifier.device)
        no_class = torch.empty(0, dtype=torch.int64, device=classifier.device)
        # parameters and network are checked before there is anything to do
        with raise_as_usage_error(checked.name), frozen(classifier):
            interpreter.explain(classifier, nothing, no_class, seeds=no_class.cpu())
            if checked.name in OF_FEATURES:
                layer = describe_layer(classifier, shape, interpreter.resolved.get("layer"))
                interpreter = replace(interpreter, layer=layer)
        return interpreter

    @classmethod
    def build_differentiable(cls, name: str, settings: Mapping[str, Any]) -> Interpreter:
        """An interpreter whose maps can be attacked, not yet tried on any classifier.

        Parameters
        ----------
        name : str
            As registered.
        settings : mapping
            Values by parameter; those that the interpreter does not have are left out.

        Raises
        ------
        ValueError
            If there is none of this name or its maps have no derivative.
        """
        try:
            entry = INTERPRETERS.entry(name)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if not entry.differentiable:
            usable = ", ".join(n for n, e in INTERPRETERS.entries.items() if e.differentiable)
            raise ValueError(
                f"the maps of interpreter {name} have no derivative, so none to attack along:"
                f" those that do are {usable}"
            )
        return cls._bind(
            Spec(name, {key: value for key, value in settings.items() if key in entry.parameters})
        )

    @classmethod
    def _bind(cls, spec: Spec) -> Interpreter:
        entry = INTERPRETERS.entry(spec.name)
        explain = partial(INTERPRETERS.load(spec.name), **spec.parameters)
        return cls(spec, entry.resolve(spec), entry.seeded, entry.alike, explain)

    @property
    def bends_slopes(self) -> bool:
        """Whether on the graph it runs the network with slopes that are not its own."""
        return bool(self.resolved.get("relu", "true") != "true")

    def check_derivative(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Try on one image ``(c, h, w)`` of noise whether a network's maps can be attacked.

        Raises
        ------
        ValueError
            If the network cannot have such maps, or these have no derivative.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        x = draw_noise(torch.empty(0, *shape, device=device)).requires_grad_()
        y = torch.zeros(1, dtype=torch.int64, device=device)
        seeds = torch.zeros(1, dtype=torch.int64)
        advice = (
            f"the maps of {self.spec.name} have no derivative on this network, so none to attack"
            " along: take cam, or attack the class alone"
        )
        try:
            with frozen(model), torch.enable_grad():
                maps, _ = self.trace_maps(model, x, y, seeds)
                if not maps.requires_grad:
                    raise ValueError(advice)
                (slope,) = autograd.grad(maps.square().sum(), x, allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{advice} (torch: {text})") from None
        if slope is None or not bool(slope.isfinite().all()):
            raise ValueError(advice)

    def describe(self) -> dict[str, Any]:
        """What a reader of its numbers must know, JSON-able."""
        return {
            "spec": str(self.spec),
            "name": self.spec.name,
            "parameters": self.resolved,
            "stretched": choose_scale(self.spec.name).stretched,
            "seeded": self.seeded,
            "alike": list(self.alike),
            "layer": self.layer,
        }

    def compute_maps(self, model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Values:
        """Maps for classes `y`, scaled as they are compared.

        Parameters
        ----------
        model : nn.Module
            What is explained.
        x : Tensor
            Images ``(n, c, h, w)`` in [0, 1].
        y : Tensor
            Classes ``(n,)``.
        seeds : Tensor
            One seed per image ``(n,)``.

        Returns
        -------
        ndarray
            ``(n, h', w')``.

        Raises
        ------
        RunError
            If the interpreter breaks.
        """
        with raise_as_run_error(f"the interpreter {self.spec} broke"):
            found = self.explain(model, x, y, seeds=seeds).detach()
        maps: Values = scale_maps(self.spec.name, found).squeeze(1).cpu().numpy()
        return maps

    def trace_maps(
        self, model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled maps ``(n, 1, h', w')`` for classes `y`, and the logits that came with them.

        On the graph if `x` is. No logits ``(n, k)`` if the interpreter does not compute those of
        `x`, or with slopes that are not the network's own. What the interpreter raises is left
        as it is.
        """
        with record_logits(model, x) as heard:
            maps = self.explain(model, x, y, seeds=seeds)
        logits = None if not heard or (self.bends_slopes and x.requires_grad) else heard[0]
        return scale_maps(self.spec.name, maps), logits


@contextmanager
def record_logits(model: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """The logits of every pass of just these images through the model inside."""
    heard: list[Tensor] = []

    def listen(_module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        if args[0] is x:
            heard.append(logits)

    handle = model.register_forward_hook(listen)
    try:
        yield heard
    finally:
        handle.remove()
