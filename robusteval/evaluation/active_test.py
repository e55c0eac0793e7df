"""Whether an attack would have found something: adversarial examples planted on the network.

Increasing Confidence in Adversarial Robustness Evaluations, arXiv:2206.13991, section 3. For each
image a linear read-out of the network's last features is fitted that tells one point on the border
of the ball from many inside of it. What it answers at the border point is by construction an
adversarial example of the image, on the user's own network and within the radius; an attack that
does not find one says nothing by finding none on the network itself.

Departs from the paper in weighing those features alone that change inside the ball: behind a ReLU
many are at rest there, and what is planted on one that only the border wakes no gradient tells, on
the soundest network. Departs from it also where the gradient leads beyond the border point, as on
most networks: the boundary is moved on to what each of several searches reaches, which come as far
as 40 plain steps do, so that it tells searches of few steps from others. Where the gradient leads
nowhere the boundary stays where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.read_outs import (
    LEAST_FEATURES,
    Features,
    ReadOut,
    UnknownRows,
    find_last_linear,
    find_live,
    fit_read_out,
)
from robusteval.evaluation.target import Target
from robusteval.models.classifier import Classifier, choose_block_size, choose_graph_size
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import per_image, sample_seeds
from robusteval.models.steps import book_rows
from robusteval.runs.metrics import worst_case
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Columns, Finding, Outcome, Spec, Threat
from robusteval.search.balls import Ball, measure_distances, psnr, ssim

INSIDE = 0.95  # of the radius, in which the points lie that are no adversarial examples
MOST_POINTS = 60  # inside, and at most three fifths of the features that change there
DRAWS = 25  # points of random search
SEARCH = 10  # steps of ascent, from each of some starts
LONGEST = 0.55  # of the radius, the first of these steps
STARTS = 3
TOGETHER = 4  # images whose points are looked at in one go
REACHABLE = 0.98  # of what the least of these reaches; rounding to 8 bits takes some of the rest
PLANTED = "probe:planted"  # the role of such a test in a run
ENOUGH = 0.95  # of what is planted, that an attack finds
SMALL, LARGE = 50, 10  # images tested, of networks up to so many weights times pixels, and above
WORK = 5e8


def draw_inner(x: Tensor, seed: int, threat: Threat, n: int) -> Tensor:
    """Points ``(n, c, h, w)`` inside the ball of an image ``(c, h, w)``, uniform in it."""
    eps = INSIDE * float(threat.eps or 0)
    generator = torch.Generator().manual_seed(seed)
    if threat.norm == "linf":
        change = (2 * torch.rand(n, *x.shape, generator=generator) - 1) * eps
    else:
        change = torch.randn(n, *x.shape, generator=generator)
        share = torch.rand(n, generator=generator).pow(1 / x.numel())
        change *= (eps * share / change.flatten(1).norm(dim=1)).view(n, 1, 1, 1)
    return (x + change.to(x)).clamp(0, 1)


def choose_points(features: int) -> int:
    """How many inner points are told from a border point by so many features."""
    return min(MOST_POINTS, 3 * features // 5)


def draw_border(x: Tensor, seeds: Tensor, threat: Threat) -> Tensor:
    """A point on the border of the ball of each image ``(n, c, h, w)``: for linf a corner."""
    eps = float(threat.eps or 0)
    change = per_image(seeds, x.shape[1:], normal=True).to(x)
    if threat.norm == "linf":
        change = change.sign()
    else:
        change = change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + eps * change).clamp(0, 1)


def climb(model: ReadOut, ball: Ball, x: Tensor, rows: Tensor, eps: float) -> Tensor:
    """The largest second logit ``(m,)`` in `SEARCH` steps of ascent from images ``(m, c, h, w)``.

    They are of the images `rows` ``(m,)`` that the read-outs are for. Steps become shorter along a
    cosine, so that ten of them come as far as 40 of one length.
    """
    best = torch.full((len(x),), -torch.inf, device=x.device)
    size = choose_graph_size(x.shape[1:].numel(), x.device)
    for i in range(SEARCH + 1):
        grads: list[Tensor] = []
        for begin in range(0, len(x), size):
            part = slice(begin, begin + size)
            z = x[part].detach().requires_grad_()
            with book_rows(rows[part]):
                value = model(z)[:, 1]
            best[part] = torch.maximum(best[part], value.detach())
            grads += torch.autograd.grad(value.sum(), z, allow_unused=True, materialize_grads=True)
        length = LONGEST * eps * (1 + math.cos(math.pi * i / SEARCH)) / 2
        x = ball.project(x + length * ball.find_direction(torch.cat(grads))).detach()
    return best


class Planter:
    """Plants adversarial examples on a network; see the module.

    Parameters
    ----------
    classifier : Classifier
        The network, in eval mode.
    x : Tensor
        A few of its images ``(n, c, h, w)``, to look at the network with.

    Raises
    ------
    UsageError
        Its logits are not those of a linear layer, or this has too few inputs.
    """

    def __init__(self, classifier: Classifier, x: Tensor) -> None:
        layer = find_last_linear(classifier, x)
        self.width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if self.width < LEAST_FEATURES:
            raise UsageError(
                f"the last layer has {self.width} inputs, and {LEAST_FEATURES} are needed"
            )
        values = x[0].numel()
        count = count_images(classifier, values)
        # calls for the few images of a large network are not padded to those of many; calls of half
        # as many took 1.3 times as long on a ResNet-20
        natural = classifier.block or choose_block_size(values, classifier.device)
        self.features = Classifier(
            Features(classifier.network, layer),
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            num_classes=self.width,
            block=count if count < natural else classifier.block,
        ).to(classifier.device)
        self.features.eval()
        # by seeds and radius, with the images: all attacks look for the same
        self._planted: dict[tuple[object, ...], tuple[Tensor, tuple[ReadOut, Tensor]]] = {}

    def plant(self, x: Tensor, seeds: Tensor, threat: Threat) -> tuple[ReadOut, Tensor]:
        """Read-outs for images ``(n, c, h, w)``, and for which of them ``(n,)`` there is one.

        Without one a read-out answers nothing but the first class. What was planted before is not
        planted again.
        """
        key = (*seeds.tolist(), threat.norm, threat.eps)
        known = self._planted.get(key)
        if known is None or not torch.equal(known[0], x):
            known = self._planted[key] = (x.clone(), self._plant(x, seeds, threat))
        return known[1]

    def _plant(self, x: Tensor, seeds: Tensor, threat: Threat) -> tuple[ReadOut, Tensor]:
        border = draw_border(x, seeds, threat)
        weight = x.new_zeros(len(x), self.width)
        bias = x.new_full((len(x),), -1.0)
        ready = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i, found in enumerate(self._find_features(border, x, seeds, threat)):
            finite = bool(found.isfinite().all())
            live = find_live(found[1:])
            found = found[: 2 + choose_points(int(live.sum()))]
            fit = fit_read_out(found[1:, live], found[0, live]) if finite else None
            if fit is not None:
                weight[i, live], bias[i] = fit
                values = found @ weight[i] + bias[i]  # as float32 has them
                ready[i] = bool(values[0] > 0) and bool((values[1:] < 0).all())
        weight[~ready], bias[~ready] = 0.0, -1.0
        model = ReadOut(self.features, weight, bias)
        level = self._find_level(model, x, seeds, threat)
        with torch.no_grad():
            gain = (level - model(x)[:, 1]).clamp_min(1e-12)
        scale = torch.where(ready, 1 / gain, torch.ones_like(gain))
        level = torch.where(ready, level, torch.zeros_like(level))
        moved = ReadOut(self.features, weight * scale.unsqueeze(1), (bias - level) * scale)
        return moved, ready

    def _find_features(
        self, border: Tensor, x: Tensor, seeds: Tensor, threat: Threat
    ) -> Iterator[Tensor]:
        """Features of each image's border point, of itself and of points inside ``(points, d)``."""
        count = choose_points(self.width)
        for begin in range(0, len(x), TOGETHER):
            some = range(begin, min(begin + TOGETHER, len(x)))
            points = [
                torch.cat([border[i : i + 1], x[i : i + 1], draw_inner(x[i], seed, threat, count)])
                for i, seed in zip(some, seeds[begin : begin + TOGETHER].tolist(), strict=True)
            ]
            with torch.no_grad():
                found = self.features(torch.cat(points))
            yield from found.view(len(some), 2 + count, -1)

    def _find_level(self, model: ReadOut, x: Tensor, seeds: Tensor, threat: Threat) -> Tensor:
        """The value ``(n,)`` at which the boundary is to lie; zero is just before the border."""
        eps = float(threat.eps or 0)
        # other starts than the attack's own
        drawn = [per_image(seeds + 7919 * (i + 1), x.shape[1:]) for i in range(STARTS)]
        rows = torch.arange(len(x), device=x.device).repeat(STARTS)
        ball = Ball.around(x[rows], threat.norm, eps)  # type: ignore[arg-type]
        starts = ball.project(x[rows] + eps * (2 * torch.cat(drawn).to(x) - 1))
        reached = climb(model, ball, starts, rows, eps).view(STARTS, len(x)).amin(0)
        with torch.no_grad():
            first = model(x)[:, 1]
        level: Tensor = (first + REACHABLE * (reached - first)).clamp_min(0.0)
        return level


def look_for_planted(
    planter: Planter, attack: Attack, x: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let an attack look for what is planted around images ``(n, c, h, w)``.

    Returns
    -------
    tuple of Tensor
        What it returned, inside the ball; whether that is one ``(n,)``; by how much ``(n,)``; and
        for which images one could be planted ``(n,)``.
    """
    model, ready = planter.plant(x, seeds, attack.threat)
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    goal = y + 1 if attack.threat.targeted else y

    def run(model: ReadOut, rows: slice) -> Tensor:
        return attack.perturb(
            model,
            x[rows].clone(),
            goal[rows].clone(),
            targeted=attack.threat.targeted,
            seeds=seeds[rows],
        )

    with raise_as_run_error("the attack broke on planted examples"):
        try:
            returned = run(model, slice(None))
        except UnknownRows:  # one by one there is no doubt whose image it is
            parts = [
                run(ReadOut(planter.features, model.weight[i : i + 1], model.bias[i : i + 1]), some)
                for i in range(len(x))
                for some in [slice(i, i + 1)]
            ]
            returned = torch.cat(parts)
    x_adv, _ = repair(returned, x, attack.threat)
    with torch.no_grad():
        value = model(x_adv)[:, 1]
    return x_adv, (value > 0) & ready, value, ready


def count_images(classifier: Classifier, values: int) -> int:
    """How many images of so many values are tested: fewer where each takes long."""
    weights = sum(p.numel() for p in classifier.parameters())
    return SMALL if weights * values <= WORK else LARGE


def measure_planted(
    plan: Plan, target: Target, planter: Planter, attack: Attack, positions: Positions
) -> Columns:
    """Let an attack look for what is planted around the images at some positions ``(n,)``.

    Columns of `robusteval.runs.types.Outcome`, where another class than the label stands for an
    example that was found, and the label for none. A margin of nan says that none could be planted.
    """
    batch = plan.data.batch(plan.index[positions])
    x, y = batch.x.to(target.model.device), batch.y.to(target.model.device)
    seeds = sample_seeds(plan.seed, batch.ids)
    started = time.perf_counter()
    x_adv, found, value, ready = look_for_planted(planter, attack, x, seeds)
    seconds = time.perf_counter() - started
    n = len(x)
    wrong = (y + 1) % target.model.num_classes
    pred = torch.where(found, wrong, y).cpu().numpy()
    columns = {name: column.cpu().numpy() for name, column in measure_distances(x_adv, x).items()}
    return {
        **{name: pred for name in ("pred_adv", "pred_8bit", "pred_png")},
        **columns,
        "ssim": ssim(x_adv, x).double().cpu().numpy(),
        "psnr": psnr(x_adv, x).cpu().numpy(),
        "margin_adv": np.where(ready.cpu(), -value.double().nan_to_num().cpu().numpy(), np.nan),
        "target": np.where(attack.threat.targeted, wrong.cpu().numpy(), -1),
        "seconds": np.full(n, seconds / n),
    }


def list_active_tests(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The attacks of a run that are tested: ours in a linf or l2 ball that fool the class alone."""
    return [
        outcome
        for outcome in outcomes
        if outcome.role == "attack"
        and outcome.threat.norm in ("linf", "l2")
        and (outcome.threat.eps or 0) > 0
        and outcome.knowledge != "none"
        and "interpreter" not in outcome.resolved
        and not outcome.attack.name.startswith("art:")
    ]


def list_planted_searches(outcomes: Sequence[Outcome]) -> list[Spec]:
    """The attacks of a run that look for what is planted, and random search, each once."""
    tested = list_active_tests(outcomes)
    specs = [outcome.attack for outcome in tested]
    specs += [build_random_search(outcome.threat) for outcome in tested]
    return list({str(spec): spec for spec in specs}.values())


def build_random_search(threat: Threat) -> Spec:
    """The attack that must not find what is planted, or the test says nothing."""
    return Spec("noise", {"norm": threat.norm, "eps": threat.eps, "tries": DRAWS})


def check_active_tests(outcomes: Sequence[Outcome]) -> list[Finding]:
    """Name the threats for which no attack finds what is planted often enough.

    Not where every image has fallen, in float and in 8 bit: no attack could lower that number.
    """
    tests = [outcome for outcome in outcomes if outcome.role == PLANTED]
    found = []
    for threat in dict.fromkeys(test.threat for test in tests if test.knowledge != "none"):
        mine = [test for test in tests if test.threat == threat and test.knowledge != "none"]
        drawn = threat._replace(targeted=False)
        chance = [test for test in tests if test.threat == drawn and test.knowledge == "none"]
        best = max(mine, key=lambda test: int(test.success().sum()))
        rate = Rate(int(best.success().sum()), len(best.attacked))
        made = [each for each in outcomes if each.role == "attack" and each.threat == threat]
        if not any(worst_case(made, pred).k for pred in ("pred_adv", "pred_8bit")):
            continue
        if rate.n == 0:
            text = f"Nothing could be planted at {threat.norm} eps {threat.eps:.3g}: the network's"
            text += " last features do not tell the border of the ball from its inside."
            found.append(Finding("nothing-planted", False, text))
        elif rate.interval.high < ENOUGH:
            random = f" ({DRAWS} random points: {chance[0].success().mean():.0%})" if chance else ""
            text = f"{best.attack} finds {rate.k} of {rate.n} adversarial examples that were"
            text += (
                f" planted on this network{random}, and should find {ENOUGH:.0%}: the evaluation"
            )
            text += " is too weak, by too few steps or by gradients that mislead; add steps,"
            text += " restarts or --preset standard."
            found.append(Finding("attack-too-weak", True, text, str(best.attack)))
    return found
