"""The verdict on a network that answers at random: what most of its answers say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.runs.metrics import group_by_threat
from robusteval.runs.statistics import mean_interval
from robusteval.runs.types import Columns, Finding, Outcome
from robusteval.search.stand_ins import Expected

VOTES = 20
SALT = 0x5EED  # parts these draws from those that an attack has seen
SURVIVAL = "survival"  # the column of the share of answers that are right


class Voted(Classifier):
    """A classifier that answers at random, by the votes of some of its answers.

    Its logits are the logarithms of the shares of the votes, so that their softmax are the shares.

    Parameters
    ----------
    classifier : Classifier
        Whose network is shared.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(
            classifier.network,
            num_classes=classifier.num_classes,
            identity=classifier.identity,
            block=classifier.block,
        )
        self.draws = Expected(classifier, VOTES)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms ``(n, k)`` of the shares; nan for an image with an answer that is not finite.

        A share of zero is taken for one of a thousandth of a vote.
        """
        rows = []
        for answers in self.draws.draw(x, SALT):
            pred = predict_classes(answers)
            votes = torch.bincount(pred.clamp_min(0), minlength=answers.shape[1])
            shares = votes.clamp_min(1e-3) / len(pred)
            rows.append(torch.where((pred < 0).any(), torch.nan, shares.log()))
        return torch.stack(rows) if rows else x.new_empty(0, self.num_classes)


def measure_survival(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right answers ``(n,)`` by logits of `Voted` ``(n, k)``."""
    share = logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1).double()
    return share.nan_to_num(0.0)


def check_survival(clean: Columns, outcomes: Sequence[Outcome]) -> list[Finding]:
    """Say how often a single answer of a random network is right, before and after the attacks."""
    attacks = [outcome for outcome in outcomes if outcome.role == "attack"]
    if SURVIVAL not in clean or not attacks:
        return []
    found = []
    for threat, group in group_by_threat(attacks).items():
        least = np.minimum.reduce([outcome.columns[SURVIVAL] for outcome in group])
        rate = mean_interval(least)
        before = mean_interval(clean[SURVIVAL])
        found.append(
            Finding(
                "random-answers",
                False,
                f"Verdicts are those of most of {VOTES} answers. A single answer is right with"
                f" probability {before.value:.1%} on images as they are and, at {threat},"
                f" {rate.value:.1%} ({max(rate.low, 0):.1%} to {min(rate.high, 1):.1%}) after the"
                " attack that leaves least of it.",
            )
        )
    return found
