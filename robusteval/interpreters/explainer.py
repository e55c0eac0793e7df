"""How far maps ``(n, 1, h, w)`` of one interpreter are apart, and what an attack on them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.interpreters.scaling import min_max
from robusteval.registry import INTERPRETERS


class Scale(NamedTuple):
    """How an interpreter's maps are compared."""

    stretched: bool  # to [0, 1] first; masks are there already, an empty one would become noise
    summed: bool  # squares over the cells, otherwise their mean


# Published weights of a map term go with these reductions.
SCALES = {"grad": Scale(True, True), "mask": Scale(False, True), "rts": Scale(False, False)}


def scale_of(interpreter: str) -> Scale:
    """That of ADV2 (arXiv:1812.00891); other interpreters are taken like CAM."""
    return SCALES.get(interpreter, Scale(True, False))


def scaled(interpreter: str, maps: Tensor) -> Tensor:
    """Maps in [0, 1], as they are compared."""
    return min_max(maps) if scale_of(interpreter).stretched else maps


def squared_distance(interpreter: str, maps: Tensor, benign: Tensor) -> Tensor:
    """Sum or mean of squared differences ``(n,)`` of scaled maps: what an attack lowers."""
    squares = (maps - benign).square().flatten(1)
    return squares.sum(1) if scale_of(interpreter).summed else squares.mean(1)


def mean_distance(maps: Tensor, benign: Tensor) -> Tensor:
    """Mean absolute difference ``(n,)`` of scaled maps, in [0, 1]: what is reported."""
    return (maps - benign).abs().flatten(1).mean(1)


class Explainer(NamedTuple):
    """One interpreter as an attack on its maps needs it."""

    name: str
    interpreter: Callable[..., Tensor]
    settings: dict[str, Any]
    bent: bool  # on the graph it runs the network with other slopes

    @classmethod
    def named(cls, name: str, settings: dict[str, Any]) -> Explainer:
        """That of a name; ValueError if there is none or its maps have no derivative."""
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
        settings = {key: value for key, value in settings.items() if key in entry.parameters}
        bent = "relu" in entry.parameters and settings.get("relu") != "true"
        return cls(name, INTERPRETERS.load(name), settings, bent)

    def maps(
        self, model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled maps ``(n, 1, h', w')`` for classes `y`, and the logits that came with them.

        On the graph if `x` is. No logits ``(n, k)`` if the interpreter does not compute those of
        `x`, or with slopes that are not the network's own.
        """
        with overheard(model, x) as heard:
            maps = self.interpreter(model, x, y, seeds=seeds, **self.settings)
        logits = None if not heard or (self.bent and x.requires_grad) else heard[0]
        return scaled(self.name, maps), logits


@contextmanager
def overheard(model: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
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
