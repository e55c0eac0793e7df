"""What an attack saw of each image on its way: whether it was still getting on when it ended, and
whether it passed by a success.

Indicators of Attack Failure, arXiv:2106.09947, "incomplete optimization" and "silent success". The
losses of all passes are looked at while the attack runs; two numbers of each image are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import find_rows
from robusteval.runs.types import Columns, Finding, Outcome, Threat, Values
from robusteval.search.descent import Count, count_changes
from robusteval.search.losses import margin

LATE, PASSED = "late_rise", "passed_by"  # columns
CURVES = (LATE, PASSED)
END = 0.1  # of the passes
RISING = 0.05  # of the whole rise, in its last tenth: arXiv:2106.09947, table 1
FEWEST = 10  # passes, of which a tenth is something
OFTEN = 0.5  # of the images that hold, whose losses still rise
ROUNDING = 1e-5  # of float32, beyond a radius
ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}
COUNTS: dict[str, Count] = {"l0": "l0", "l0_pixels": "l0_pixels"}  # norms that count changes


class LossCurves:
    """The least margins of a batch so far, pass by pass.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` before the attack.
    goal : Tensor
        Classes ``(n,)`` to leave or, of a targeted attack, to reach.
    threat : Threat
        Inside which a success counts.
    whole : bool
        Whether a pass of as many images as there are, booked to none, is one of each. Of attacks
        that ask many questions about one image it may be of that one alone.
    """

    def __init__(self, x: Tensor, goal: Tensor, threat: Threat, *, whole: bool = True) -> None:
        self.x, self.goal, self.threat, self.whole = x, goal, threat, whole
        self.best = torch.full((len(x),), torch.inf, device=x.device)
        self.met = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # a success
        self.successes = x.clone()  # the last one of each image
        self.curve: list[Tensor] = []  # (n,) after each pass
        self.counts: list[Tensor] = []  # (n,), passes of each image until then
        self.count = torch.zeros(len(x), device=x.device)

    def watch(self, _model: object, args: tuple[Tensor, ...], logits: Tensor) -> None:
        """Forward hook. What was booked to no image of the batch is left out."""
        rows, z, logits = find_rows(), args[0].detach(), logits.detach().float()
        if rows is None and self.whole and len(z) == len(self.x):
            rows = torch.arange(len(z))
        if rows is None or len(rows) != len(z) or len(z) == 0:
            return
        rows = rows.to(z.device)
        goal, sign = self.goal[rows], -1.0 if self.threat.targeted else 1.0
        value = (sign * margin(logits, goal)).nan_to_num(torch.inf)
        reached = (predict_classes(logits) == goal) == self.threat.targeted
        inside = self._lies_inside(z, rows)
        value = torch.where(inside, value, torch.inf)
        hit = reached & inside
        for turn in list_turns(rows):  # some may be of one image: as if they came one by one
            here, won = rows[turn], turn[hit[turn]]
            self.met[rows[won]] = True
            self.successes[rows[won]] = z[won]
            self.best = self.best.scatter_reduce(0, here, value[turn], "amin")
            self.count = self.count.index_add(0, here, torch.ones_like(value[turn]))
            self.curve.append(self.best)
            self.counts.append(self.count)

    def _lies_inside(self, z: Tensor, rows: Tensor) -> Tensor:
        """Which images ``(m, c, h, w)`` an attack may return for some of the batch."""
        threat = self.threat
        if threat.eps is not None and threat.norm in COUNTS:
            return count_changes(z, self.x[rows], COUNTS[threat.norm]) <= threat.eps
        if threat.eps is None or threat.norm not in ORDERS:
            return torch.ones(len(z), dtype=torch.bool, device=z.device)
        change = (z - self.x[rows]).flatten(1)
        far: Tensor = torch.linalg.vector_norm(change, ORDERS[threat.norm], dim=1)
        return far <= threat.eps * (1 + ROUNDING) + ROUNDING

    def measure(self, judge: nn.Module, is_adv: Values) -> Columns:
        """Columns ``(n,)`` of images of which some ``(n,)`` are successes in the end.

        `late_rise` : the share of the whole fall of the margin that came in the last tenth of an
        image's passes, nan of few passes; `passed_by` : whether a success was met and none
        returned, as the judge confirms.
        """
        passed = (self.met.cpu() & ~torch.from_numpy(is_adv)).to(self.x.device)
        if bool(passed.any()):
            rows = passed.nonzero().flatten()
            with torch.no_grad():
                pred = predict_classes(judge(self.successes[rows]))
            passed[rows] = (pred == self.goal[rows]) == self.threat.targeted
        late = torch.full_like(self.best, torch.nan)
        if self.curve:
            curve, counts = torch.stack(self.curve), torch.stack(self.counts)  # (passes, n)
            first = curve.gather(0, (counts >= 1).float().argmax(0, keepdim=True))[0]
            near_end = ((1 - END) * self.count).clamp_min(1)
            then = curve.gather(0, (counts >= near_end).float().argmax(0, keepdim=True))[0]
            whole = first - self.best
            share = torch.where(whole > 0, (then - self.best) / whole, torch.zeros_like(whole))
            late = torch.where(self.count >= FEWEST, share, late)
        columns = {LATE: late.double(), PASSED: passed}
        return {name: column.cpu().numpy() for name, column in columns.items()}


def list_turns(rows: Tensor) -> list[Tensor]:
    """Places ``(k,)`` in `rows` ``(m,)``: where a row stands first, then second, and so on."""
    order = rows.argsort(stable=True)
    known = rows[order]
    turn = torch.empty_like(rows)
    turn[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(known, known)
    return [(turn == i).nonzero().flatten() for i in range(int(turn.max()) + 1)]


@contextmanager
def watch_losses(
    model: Classifier, x: Tensor, goal: Tensor, threat: Threat, *, whole: bool = True
) -> Iterator[LossCurves]:
    """Watch the passes of an attack on a batch; see `LossCurves`."""
    curves = LossCurves(x, goal, threat, whole=whole)
    handle = model.register_forward_hook(curves.watch)
    try:
        yield curves
    finally:
        handle.remove()


def check_curves(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """What the losses of attacks say of these: that they ended early, or passed by successes."""
    for outcome in outcomes:
        columns = outcome.columns
        if outcome.role != "attack" or LATE not in columns:
            continue
        name = str(outcome.attack)
        passed = int((columns[PASSED].astype(bool) & outcome.attacked).sum())
        if passed:
            yield Finding(
                "silent-success",
                True,
                f"{name} passed by adversarial images of {passed} of {int(outcome.attacked.sum())}"
                " images and returned others, which are none: it is less successful than what it"
                " saw.",
                name,
            )
        held = outcome.attacked & ~outcome.success() & np.isfinite(columns[LATE])
        late = int((columns[LATE][held] > RISING).sum())
        if late > max(OFTEN * held.sum(), 1) and outcome.knowledge == "white-box":
            yield Finding(
                "incomplete",
                False,
                f"{name} ended while it was getting on: of {int(held.sum())} images that hold, the"
                f" loss of {late} made more than {RISING:.0%} of its way in the last tenth of the"
                " passes; more steps may break some.",
                name,
            )
