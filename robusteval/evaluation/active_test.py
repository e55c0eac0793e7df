"""Whether an attack would have found something: adversarial examples planted on the network.

Increasing Confidence in Adversarial Robustness Evaluations, arXiv:2206.13991, section 3. For each
image a linear read-out of the network's last features is fitted that tells one point on the border
of the ball from many inside of it. What it answers at the border point is by construction an
adversarial example of the image, on the user's own network and within the radius; an attack that
does not find one says nothing by finding none on the network itself.

Departs from the paper in weighing those features alone that change inside the ball: behind a ReLU
many are at rest there, and what is planted on one that only the border wakes no gradient tells, on
the soundest network. Departs from it also where the gradient leads beyond the border point, as on
most networks: the boundary is moved on to what each of several searches of 40 plain steps reaches,
so that it tells searches of few steps from others. Where the gradient leads nowhere the boundary
stays where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from warnings import catch_warnings

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.target import Target
from robusteval.models.classifier import Classifier
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import per_image, sample_seeds
from robusteval.models.steps import find_rows
from robusteval.runs.metrics import worst_case
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Columns, Finding, Outcome, Spec, Threat
from robusteval.search.balls import Ball, measure_distances, psnr, ssim

INSIDE = 0.95  # of the radius, in which the points lie that are no adversarial examples
BEYOND = 0.999  # of the border point's margin: how far short of it the boundary lies
MOST_POINTS = 60  # inside, and at most three fifths of the features that change there
LEAST_FEATURES = 16
AT_REST = 1e-5  # of the largest feature: what rounding alone changes
DRAWS = 100  # points of random search
SEARCH = 40  # steps of ascent, from each of some starts
STARTS = 3
REACHABLE = 0.98  # of what the least of these reaches; rounding to 8 bits takes some of the rest
PLANTED = "probe:planted"  # the role of such a test in a run
ENOUGH = 0.95  # of what is planted, that an attack finds
SMALL, LARGE = 50, 10  # images tested, of networks up to so many weights times pixels, and above
WORK = 5e8


def find_last_linear(classifier: Classifier, x: Tensor) -> nn.Linear | nn.Conv2d:
    """The layer that gives the logits of images ``(n, c, h, w)``; UsageError if none does.

    A convolution gives them by its mean over all places, perhaps of what is left of it by a ReLU.
    """
    called: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []

    def keep(part: nn.Linear | nn.Conv2d, _args: object, out: Tensor) -> None:
        called.append((part, out))

    linear = [p for p in classifier.network.modules() if isinstance(p, nn.Linear | nn.Conv2d)]
    handles = [part.register_forward_hook(keep) for part in linear]
    try:
        with torch.no_grad():
            logits = classifier(x)
    finally:
        for handle in handles:
            handle.remove()
    if called:
        layer, out = called[-1]
        again = out[: len(x)].float()
        for given in (again, again.relu()) if again.ndim == 4 else (again,):
            pooled = pool_places(given)
            if pooled.shape == logits.shape and torch.allclose(pooled, logits, 1e-4, 1e-4):
                return layer
    raise UsageError(
        "the logits are not those of a linear layer, before which one could be planted"
    )


def pool_places(x: Tensor) -> Tensor:
    """Means ``(n, d)`` over all places of ``(n, d, h, w)``; ``(n, d)`` as it is."""
    return x.mean((2, 3)) if x.ndim == 4 else x


class Features(nn.Module):
    """What goes into a layer of a network ``(n, d)``, of a convolution its mean over all places."""

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.layer = [layer]  # a module of the network already

    def forward(self, x: Tensor) -> Tensor:
        """Features of normalised images ``(n, c, h, w)``."""
        seen: list[Tensor] = []
        handle = self.layer[0].register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        try:
            self.network(x)
        finally:
            handle.remove()
        return pool_places(seen[-1])


class ReadOut(Classifier):
    """A classifier of two classes for each image of a batch: the features, weighed for it alone.

    Parameters
    ----------
    features : Classifier
        Gives `Features`.
    weight : Tensor
        ``(n, d)``, of each image of the batch that is attacked.
    bias : Tensor
        ``(n,)``.
    """

    def __init__(self, features: Classifier, weight: Tensor, bias: Tensor) -> None:
        super().__init__(features.network, num_classes=2, block=features.block)
        self.features = features
        self.weight, self.bias = weight, bias
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(m, 2)``, the second one larger beyond the boundary.

        Whose images they are is what the attack books its passes to, see `book_rows`.
        """
        features = self.features(x)  # (m, d)
        rows = find_rows()
        if len(self.weight) == 1:
            weight, bias = self.weight, self.bias
        elif rows is not None and len(rows) == len(x):
            rows = rows.to(x.device)
            weight, bias = self.weight[rows], self.bias[rows]
        elif rows is None and len(x) == len(self.weight):
            weight, bias = self.weight, self.bias
        else:
            raise UnknownRows
        side = (features * weight).sum(1) + bias
        return torch.stack([-side, side], 1)


class UnknownRows(Exception):
    """An attack called the model with images that are not booked to any of the batch."""


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


def draw_border(x: Tensor, seeds: Tensor, threat: Threat) -> Tensor:
    """A point on the border of the ball of each image ``(n, c, h, w)``: for linf a corner."""
    eps = float(threat.eps or 0)
    change = per_image(seeds, x.shape[1:], normal=True).to(x)
    if threat.norm == "linf":
        change = change.sign()
    else:
        change = change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + eps * change).clamp(0, 1)


def fit_read_out(inner: Tensor, border: Tensor) -> tuple[Tensor, float] | None:
    """Weight ``(d,)`` and bias that part one point's features ``(d,)`` from others ``(n, d)``.

    The hyperplane of least norm from which all inner points are equally far, if there is one; else
    that of the widest margin. The border point gets a value just above 0, the nearest inner point
    about -1. None if they cannot be parted.
    """
    inside, outside = inner.double().cpu().numpy(), border.double().cpu().numpy()
    gaps = inside - outside
    scale = float(np.abs(gaps).max()) or 1.0
    weight = np.linalg.lstsq(gaps / scale, -np.ones(len(gaps)), rcond=1e-10)[0]
    sides = gaps @ weight
    if not (sides < -0.5 * scale).all():
        from sklearn.svm import SVC

        machine = SVC(kernel="linear", C=1e6, max_iter=100_000)
        points = np.concatenate([gaps / scale, np.zeros((1, gaps.shape[1]))])
        with catch_warnings(action="ignore"):  # that it did not converge is seen below
            machine.fit(points, [0] * len(gaps) + [1])
        weight = machine.coef_[0]
        sides = gaps @ weight
        if not (sides < 0).all():
            return None
    weight = weight / -sides.max()
    return torch.from_numpy(weight).to(inner), float(1 - BEYOND - outside @ weight)


def find_live(found: Tensor) -> Tensor:
    """Which features ``(d,)`` change among points ``(n, d)``; all, if too few do.

    A read-out that weighs those at rest is the same at all of these points, and what it answers
    elsewhere no gradient tells.
    """
    live = found.amax(0) - found.amin(0) > AT_REST * found.abs().amax()
    return live if int(live.sum()) >= LEAST_FEATURES else torch.ones_like(live)


def climb(model: Classifier, ball: Ball, x: Tensor, steps: int, length: float) -> Tensor:
    """The largest second logit ``(n,)`` in so many steps of ascent from `x`, each of one length."""
    best: Tensor | None = None
    for _ in range(steps + 1):
        z = x.detach().requires_grad_()
        value = model(z)[:, 1]
        best = value.detach() if best is None else torch.maximum(best, value.detach())
        (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True, materialize_grads=True)
        x = ball.project(x + length * ball.find_direction(grad)).detach()
    assert best is not None
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
        self.features = Classifier(
            Features(classifier.network, layer),
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            num_classes=self.width,
            block=classifier.block,
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
        for i, seed in enumerate(seeds.tolist()):
            inner = draw_inner(x[i], seed, threat, MOST_POINTS)
            with torch.no_grad():
                found = self.features(torch.cat([border[i : i + 1], x[i : i + 1], inner]))
            finite = bool(found.isfinite().all())
            live = find_live(found[1:])
            found = found[: 2 + 3 * int(live.sum()) // 5]
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

    def _find_level(self, model: ReadOut, x: Tensor, seeds: Tensor, threat: Threat) -> Tensor:
        """The value ``(n,)`` at which the boundary is to lie; zero is just before the border."""
        eps = float(threat.eps or 0)
        ball = Ball.around(x, threat.norm, eps)  # type: ignore[arg-type]
        reached: Tensor | None = None
        for number in range(STARTS):
            # other starts than the attack's own
            noise = 2 * per_image(seeds + 7919 * (number + 1), x.shape[1:]).to(x) - 1
            found = climb(model, ball, ball.project(x + eps * noise), SEARCH, 2.5 * eps / SEARCH)
            reached = found if reached is None else torch.minimum(reached, found)
        assert reached is not None
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
