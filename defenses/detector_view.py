"""What a detector looks at: whose maps, in which form, and what that costs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.rts import locate_mask_network
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.failures import raise_as_usage_error
from robusteval.models.steps import count_passes
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.reading import WEIGHTS, read_bytes
from robusteval.runs.types import Spec

from .map_features import (
    Channels,
    Extractor,
    choose_channels,
    choose_side,
    compute_statistics,
    count_features,
    list_statistics,
    stack_maps,
)


@dataclass(frozen=True)
class View:
    """What a detector looks at: whose maps, and in which form."""

    interpreters: tuple[str, ...]  # specs
    channels: Channels
    extractor: Extractor
    side: int  # cells
    confidence: bool  # whether how sure the classifier is counts too
    shape: tuple[int, int, int]  # of the images

    @cached_property
    def specs(self) -> tuple[Spec, ...]:
        """The interpreters, their parameters read."""
        return tuple(INTERPRETERS.check_spec(parse(text)) for text in self.interpreters)

    @cached_property
    def differentiable(self) -> tuple[Interpreter, ...]:
        """The interpreters as attacks on a detector need them."""
        return tuple(
            Interpreter.build_differentiable(spec.name, spec.parameters) for spec in self.specs
        )

    @property
    def planes(self) -> int:
        """Channels of a stack."""
        return 2 if self.channels == "pair" else 3

    @property
    def statistic_names(self) -> list[str]:
        """The names of the statistics."""
        return list_statistics([spec.name for spec in self.specs], self.confidence)

    @property
    def feature_count(self) -> int:
        """How many features there are."""
        return count_features(self.extractor, self.planes) + len(self.statistic_names)

    def compute_maps(
        self, model: Classifier, x: Tensor, seeds: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Compute maps ``(n, 1, h', w')`` for the classes predicted, and the logits.

        Of images ``(n, c, h, w)`` of 8 bits, each interpreter with `seeds` ``(n,)``.
        """
        with torch.no_grad():
            logits = model(x)
            y = predict_classes(logits).clamp_min(0)
            maps = [each.trace_maps(model, x, y, seeds)[0].detach() for each in self.differentiable]
        return maps, logits

    def measure_maps(self, maps: Sequence[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Stack maps ``(n, k, side, side)`` and compute statistics ``(n, d)``, on the graph."""
        stack = stack_maps(maps, self.channels, self.side)
        return stack, compute_statistics(stack, len(maps), logits if self.confidence else None)

    def check_network(self, model: Classifier) -> None:
        """Raise UsageError if the network cannot have such maps, or none that could be attacked."""
        for spec in self.specs:
            Interpreter.build(spec, model, self.shape)
        with raise_as_usage_error():
            list(self.differentiable)


def choose_view(
    interpreters: Sequence[str],
    channels: Channels | None,
    extractor: Extractor,
    confidence: bool,
    shape: tuple[int, int, int],
) -> View:
    """Choose what will be looked at; UsageError if it does not go together."""
    try:
        made = choose_channels(len(interpreters), channels)
    except ValueError as error:
        raise UsageError(f"{error}: give --interpreters and --channels that go together") from None
    view = View(
        tuple(interpreters), made, extractor, choose_side(extractor, shape), confidence, shape
    )
    if len({spec.name for spec in view.specs}) < len(view.specs):
        raise UsageError(f"interpreters must be different ones, not {', '.join(interpreters)}")
    return view


def parse_view(facts: dict[str, Any]) -> View:
    """Parse a view of a detector's file; any exception if it is not sound."""
    c, h, w = (int(side) for side in facts["shape"])
    texts = tuple(map(str, facts["interpreters"]))
    channels = choose_channels(len(texts), facts["channels"])
    if facts["extractor"] not in get_args(Extractor) or not 1 <= facts["side"] <= 224:
        raise ValueError("an extractor that does not exist")
    view = View(
        texts,
        channels,
        facts["extractor"],
        int(facts["side"]),
        bool(facts["confidence"]),
        (c, h, w),
    )
    list(view.differentiable)
    return view


def hash_mask_network(view: View, model: Classifier) -> str | None:
    """Hash the mask network that a view looks through by SHA-256, None if it does not."""
    if all(spec.name != "rts" for spec in view.specs):
        return None
    return hashlib.sha256(read_bytes(locate_mask_network(model), WEIGHTS)).hexdigest()


def count_forwards(view: View, model: Classifier, x: Tensor, seeds: Tensor) -> float:
    """Count forward passes per image of a score, its prediction included; a backward is two."""
    with frozen(model), count_passes(model, len(x), x.device) as passes:
        view.compute_maps(model, x, seeds)
    return float((passes.forwards + 2 * passes.backwards).mean())
