"""Attacks that are made for what was found in a network: `unmask` with the right parameters.

They run by themselves and count as any attack does, since the network itself judges the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from robusteval.datasets.dataset import Data, Positions
from robusteval.evaluation.company import COMPANIONS, differ, find_company
from robusteval.evaluation.false_gradients import Suspects, find_false_gradients
from robusteval.evaluation.goals import spell_goal
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.votes import VOTES
from robusteval.models.classifier import Classifier
from robusteval.runs.metrics import find_right
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Columns, Finding, Spec

LOOKED_AT = 4  # images with which layers are tried
SHOWN = 4  # layers that are named
SOFTMAXED = 0.99  # of the images, whose outputs are probabilities
THEN = {
    True: "The attack unmask, made for this, ran by itself and counts.",
    False: "The attack unmask is made for this: add it, or do without --no-probes.",
}
FLAT = 0.05  # of the way from guessing to certainty, that probabilities stay below


class Examination(NamedTuple):
    """What in a network leads attacks astray."""

    suspects: Suspects = Suspects((), ())
    is_random: bool = False
    is_softmaxed: bool = False  # its outputs are probabilities
    is_flat: bool = False  # it answers right with nearly equal logits for all classes
    is_blind: bool = False  # no gradient leads from its logits to any image
    is_mixed: bool = False  # other images in the batch change an image's logits

    @property
    def is_moving(self) -> bool:
        """Whether its answers to one image change, by chance or beside others."""
        return self.is_random or self.is_mixed

    @property
    def parameters(self) -> dict[str, Any] | None:
        """Those of `unmask` for this network, besides the threat; None if it is sound."""
        if self == Examination():
            return None
        names = [name_layer(each.name, each.kind) for each in self.suspects.layers]
        return {
            **({"layers": "+".join(dict.fromkeys(names))} if names else {}),
            **({"outputs": "probabilities"} if self.is_softmaxed else {}),
            **({"draws": VOTES} if self.is_random else {}),
            **({"company": COMPANIONS} if self.is_mixed else {}),
        }

    def add_answers(self, clean: Columns, classes: int) -> Examination:
        """The same with what its answers to all images tell."""
        return self._replace(
            is_softmaxed=bool(clean["probabilities"].mean() > SOFTMAXED),
            is_flat=is_flat(clean, classes),
            is_blind=not np.nan_to_num(clean["slope_margin"]).any(),
        )


def examine(classifier: Classifier, data: Data, index: Positions) -> Examination:
    """Look at a network with the first of some images: six passes of each, and of each layer."""
    x = data.batch(index[:LOOKED_AT]).x.to(classifier.device)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), in_blocks(classifier, LOOKED_AT):
        try:
            is_random = bool(differ(classifier(x), classifier(x)).any())
            is_mixed = not is_random and bool(find_company(classifier, data, index[:LOOKED_AT]))
        except Exception:
            return Examination()  # whoever needs its answers says what is wrong
        return Examination(find_false_gradients(classifier, x), is_random, is_mixed=is_mixed)


@contextmanager
def in_blocks(classifier: Classifier, size: int) -> Iterator[None]:
    """Call the network with blocks of this size: of few images a whole one is mostly padding.

    For questions whose answers need no more than rounding lets them.
    """
    before = classifier.block
    classifier.block = min(before or size, size)
    try:
        yield
    finally:
        classifier.block = before


def is_flat(clean: Columns, classes: int) -> bool:
    """Whether a network answers right with probabilities next to those of guessing."""
    right = find_right(clean)
    if classes < 2 or Rate(int(right.sum()), len(right)).interval.low <= 1 / classes:
        return False
    sure = (clean["confidence_clean"][right] - 1 / classes) / (1 - 1 / classes)
    return float(np.quantile(sure, 0.9)) < FLAT


def name_layer(name: str, kind: str) -> str:
    """By its class, as all of this class are alike; those of torch by their place."""
    return name if hasattr(torch.nn, kind) else kind


def list_unmaskings(
    found: Examination, attacks: Sequence[Attack], other: str = ""
) -> Iterator[Spec]:
    """An attack for each threat of others that follow or question the network.

    With the name of another network it follows that one's gradient as well.
    """
    parameters = found.parameters
    if parameters is None:
        return
    if other:
        parameters["other"] = other
    threats = dict.fromkeys(
        attack.threat
        for attack in attacks
        if attack.threat.norm in ("linf", "l2", "l1")
        and (attack.threat.eps or 0) > 0
        and attack.knowledge != "none"
        and "interpreter" not in attack.resolved
    )
    asked = [attack for attack in attacks if attack.spec.name == "unmask"]
    for threat in threats:
        norm, eps, _ = threat
        wanted = {"norm": norm, "eps": eps, **parameters}
        same = [each.resolved for each in asked if each.threat == threat]
        if any(wanted.items() <= each.items() for each in same):
            continue
        goal = spell_goal(threat, [each.spec for each in attacks if each.threat == threat])
        place = {} if norm == "linf" else {"norm": norm}
        yield Spec("unmask", {**goal, **place, "eps": eps, **parameters})


def describe_masks(found: Examination, *, followed: bool) -> Iterator[Finding]:
    """Say what misleads attacks: grave findings unless `followed` by attacks made for it."""
    layers, steps = found.suspects
    if found.is_flat:
        yield Finding(
            "flat-logits",
            not followed,
            "The logits of all classes are nearly equal, though answers are right: cross-entropy"
            " then follows the mean of all other classes and not the nearest, as with a"
            f" temperature that is too high. {THEN[followed]}",
        )
    if not layers and not steps:
        return
    kinds = list(dict.fromkeys((each.kind, each.blind) for each in layers))
    named = []
    for kind, blind in kinds:
        places = [each for each in layers if (each.kind, each.blind) == (kind, blind)]
        where = ", ".join(each.name for each in places[:SHOWN])
        where += f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        error = "no gradient" if blind else f"a wrong gradient ({write_error(places)})"
        named.append(f"{kind} (layer{'s' if len(places) > 1 else ''} {where}) has {error}")
    if steps:
        named.append(f"{' and '.join(steps)} in a layer's code has no gradient")
    yield Finding(
        "false-gradient",
        not followed,
        f"{'; '.join(named)}: what follows the network's own gradient is misled. {THEN[followed]}",
    )


def write_error(places: Sequence[Any]) -> str:
    """How much of a layer's movement its gradient does not foretell."""
    worst = max(each.error for each in places)
    return f"{worst:.0%} of how the output moves is not foretold"
