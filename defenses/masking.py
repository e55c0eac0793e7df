"""Which units of a layer to switch off, and what that is worth.

Units are ranked on some images and judged on others: under an attack made for the unmasked network
and under one made for the masked network, beside a random mask of equal size.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.sources import Batch, Data, draw, from_arrays
from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.evaluation.defense import ReadyDefense
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack, prepare_attack
from robusteval.evaluation.work_cache import Arrays, WorkCache, describe_circumstances
from robusteval.interpreters.cam import agree, observe_calls, observe_head
from robusteval.models.admission import check_images, check_labels
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, block_size, frozen, predictions
from robusteval.models.failures import raise_as_run_error
from robusteval.models.masked import Masked, activations, masked
from robusteval.models.seeds import random_targets, sample_seeds
from robusteval.progress import Progress, Silent
from robusteval.runs.metrics import accuracy, find_right, robust_accuracy
from robusteval.runs.statistics import Rate, count_pairs, sign_test
from robusteval.runs.types import Finding, Flags, Outcome, Spec

Rank = Literal["sensitivity", "importance", "random"]
LEAST = 10  # images to rank by, and as many to judge on
LEVEL = 0.05  # of the tests behind the verdict
LISTED = 5  # layers that a message names


class Chosen(NamedTuple):
    """Masks, and on what they were chosen."""

    layer: str
    masks: Tensor  # (K,) or (C, K)
    control: Tensor  # of the same shape, as many units masked at random
    ranked: int  # images that units were ranked by
    ranking: Batch  # images that must not be judged on
    judging: Batch

    @property
    def masked(self) -> int:
        """Units that are masked; of each class, if classes have masks."""
        return int((self.masks == 0).sum(-1).max())


class Figures(NamedTuple):
    """What a network is worth: images right as they are, and after two attacks."""

    clean: Rate
    static: Rate  # made for the unmasked network
    adaptive: Rate  # made for this one


class Judgement(NamedTuple):
    """Figures of the same images, and what they amount to."""

    plain: Figures
    masked: Figures
    control: Figures
    verdict: str
    findings: tuple[Finding, ...]  # what a reader must know of the attacks


def choose(
    classifier: Classifier,
    data: Data,
    *,
    rank: Rank = "sensitivity",
    units: int | Fraction,
    layer: str | None = None,
    per_class: bool = False,
    attack: str | Spec = "pgd:eps=1/255,steps=20,stop=never",
    samples: int = 500,
    seed: int = 0,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> Chosen:
    """Choose the units of a layer to mask.

    Parameters
    ----------
    classifier : Classifier
        Unmasked; it comes out as it went in.
    data : Data
        Where the images come from; of those drawn the first half is ranked by.
    rank : {"sensitivity", "importance", "random"}
        What is masked: the units that the attack moves most, in standard deviations of what they
        do on unchanged images (reconstructed after arXiv:1904.02057); those whose removal changes
        the logit of the true class least (as in arXiv:2409.15190); or any.
    units : int or Fraction
        How many are masked, or what share of the layer's; with `per_class`, of each class.
    layer : str, optional
        Name of a module; the last feature maps before pooling and the final linear layer if not
        given.
    per_class : bool
        Rank units by the images of each class, for masks ``(C, K)``.
    attack : str or Spec
        What moves the units.
    samples : int
        Images, to rank by and to judge on.
    seed : int
        Decides the draw and every random number.
    done : WorkCache, optional
        Keeps attacked images, so that the same call after a stop goes on from there.
    progress : Progress, optional
        Where to say how far it is.

    Raises
    ------
    UsageError
        For a mistake in what was asked.
    NothingEvaluated
        No image to rank by is classified correctly.
    RunError
        The network or the attack broke.
    """
    progress = progress or Silent()
    if per_class and rank == "random":
        raise UsageError(
            "random units know of no class: leave --per-class away (a random mask is judged beside"
            " every other one anyway)"
        )
    if isinstance(classifier.network, Masked):
        raise UsageError("the checkpoint has masks already: start from the one that it was made of")
    index = draw(len(data), samples, seed)
    check_labels(data, index, classifier)
    check_images(data, index, classifier)
    ready = prepare_attack(attack, classifier, data.shape)
    ranking, judging = halves(data, index, progress)
    k = classifier.num_classes
    with frozen(classifier), exact_arithmetic():
        x, y = (part.to(classifier.device) for part in ranking[:2])
        with raise_as_run_error("the network broke"):
            layer = penultimate(classifier, x) if layer is None else layer
            width = activations(classifier, x[:2], layer).shape[1]
        count = counted(units, width, layer)
        if per_class:
            check_classes(y, k)
        if rank == "sensitivity":
            x, x_adv, y = attacked(classifier, ranking, ready, seed, done or WorkCache(), progress)
            scores = -moved(classifier, x, x_adv, layer)
        elif rank == "importance":
            scores = importance(classifier, x, y, layer, progress)
        else:
            scores = torch.zeros(len(x), 0)
    shape = (k, width) if per_class else (width,)
    control = random_masks(shape, count, seed, 1)
    if rank == "random":
        masks = random_masks(shape, count, seed, 0)
    elif per_class:
        check_classes(y, k)
        masks = lowest_masked(torch.stack([scores[y == c].mean(0) for c in range(k)]), count)
    else:
        masks = lowest_masked(scores.mean(0), count)
    return Chosen(layer, masks, control, len(scores), ranking, judging)


def halves(data: Data, index: np.ndarray[Any, Any], progress: Progress) -> tuple[Batch, Batch]:
    """Images to rank by and others to judge on, none of them in both."""
    progress.begin("Reading data", len(index))
    middle = len(index) // 2
    ranking, judging = data.batch(index[:middle]), data.batch(index[middle:])
    progress.advance(len(index))
    progress.end()
    fresh = ~np.isin(judging.ids, ranking.ids)
    if min(middle, int(fresh.sum())) < LEAST:
        raise UsageError(
            f"{len(index)} images of {data.name} are too few: half of them rank the units, the"
            f" others judge the mask, and each needs {LEAST} different ones"
        )
    if bool((ranking.y == ranking.y[0]).all()):
        raise UsageError(
            f"the images of {data.name} are all of class {int(ranking.y[0])}: masks need several"
        )
    rows = torch.from_numpy(fresh)
    kept = Batch(judging.x[rows], judging.y[rows], judging.ids[fresh], judging.index[fresh])
    return ranking, kept


def penultimate(classifier: Classifier, x: Tensor) -> str:
    """The layer whose units are averaged and given to the final linear layer.

    It is not guessed from names: masking it must do to what the final layer is given what it says.
    UsageError, with the layers there are, if the network ends in another way.
    """
    x = x[:2]  # one call of the network
    with torch.no_grad():
        _, calls = observe_calls(classifier, x)
        features, linear = calls[0].features, calls[0].linear
        layers = layers_of(classifier, x)
        if features is not None and linear is not None and agree(linear.output, calls[0].logits):
            means = features.mean((2, 3))
            if agree(means, linear.input):
                keep = (torch.arange(means.shape[1]) % 2).to(means)
                for name, shape in reversed(layers.items()):
                    if shape != features.shape[1:]:
                        continue
                    _, tried = observe_calls(masked(classifier, name, keep), x)
                    if tried[0].linear and agree(means * keep, tried[0].linear.input):
                        return name
    known = [f"{name} ({shape[0]} units)" for name, shape in layers.items()][-LISTED:]
    raise UsageError(
        "the network does not end in average pooling of a layer and one linear layer: say which"
        f" units are meant with --layer; the last ones there are: {', '.join(known) or 'none'}"
    )


def layers_of(classifier: Classifier, x: Tensor) -> dict[str, torch.Size]:
    """The layers that run once in a pass, in the order in which they end.

    With the shape of what they give of one image, ``(K,)`` or ``(K, h', w')``.
    """
    found: dict[str, torch.Size] = {}
    runs: dict[str, int] = {}

    def see(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(output, Tensor) and output.ndim in (2, 4) and output.shape[1] > 1:
            found[name] = output.shape[1:]

    network = classifier.network
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name:
                stack.callback(module.register_forward_hook(partial(see, name)).remove)
        classifier(x[:1])
    return {name: shape for name, shape in found.items() if runs[name] == 1}


def counted(units: int | Fraction, width: int, layer: str) -> int:
    """How many units are masked; UsageError if that is none or all, or no number of units."""
    if not isinstance(units, int) and units > 1:
        raise UsageError(
            f"{float(units):g} is no number of units: give a whole one, or a share of the layer"
            " below 1"
        )
    count = units if isinstance(units, int) else round(units * width)
    asked = f"{float(units):g} for the number of masked units means"
    if count < 1:
        raise UsageError(f"{asked} none of the {width} of layer {layer}")
    if count >= width:
        raise UsageError(f"{asked} all of the {width} of layer {layer}: leave at least one")
    return count


def check_classes(y: Tensor, classes: int) -> None:
    """Refuse masks for classes of which nothing is known."""
    missing = sorted(set(range(classes)) - set(y.tolist()))
    if missing:
        raise UsageError(
            f"no image to rank by is of class {missing[0]}"
            f"{f' or {len(missing) - 1} others' if len(missing) > 1 else ''} (or none is classified"
            " correctly): give more --samples, or leave --per-class away"
        )


def attacked(
    classifier: Classifier,
    batch: Batch,
    attack: Attack,
    seed: int,
    done: WorkCache,
    progress: Progress,
) -> tuple[Tensor, Tensor, Tensor]:
    """The images that are classified correctly, what the attack makes of them, and labels."""
    device = classifier.device
    x, y, seeds = batch.x.to(device), batch.y.to(device), sample_seeds(seed, batch.ids)
    with torch.no_grad(), raise_as_run_error("the network broke"):
        fine = predictions(classifier(x)) == y
    if not bool(fine.any()):
        raise NothingEvaluated(
            f"none of {len(x)} images is classified correctly: check that data and checkpoint"
            " belong together, and the normalisation"
        )
    x, y, seeds = x[fine], y[fine], seeds[fine.cpu()].to(device)
    targeted = attack.threat.targeted
    goal = random_targets(y, seeds, classifier.num_classes) if targeted else y

    def perturbed(z: Tensor, goal: Tensor, seeds: Tensor) -> Arrays:
        with raise_as_run_error("the attack broke"):
            z_adv = attack.perturb(classifier, z, goal, targeted=targeted, seeds=seeds)
        return (repair(z_adv.detach().to(z), z, attack.threat)[0].cpu().numpy(),)

    facts = [*describe_circumstances(classifier, seed), attack.spec.name, attack.resolved]
    parts = []
    progress.begin(f"{attack.spec}, to rank units", len(x))
    for rows in torch.split(torch.arange(len(x)), 4 * block_size(x[0].numel(), device)):
        some = rows.to(device)
        given = x[some], goal[some], seeds[some]
        arrays = tuple(each.cpu().numpy() for each in given)
        parts.append(torch.from_numpy(done.compute(facts, arrays, partial(perturbed, *given))[0]))
        progress.advance(len(rows))
    progress.end()
    return x, torch.cat(parts).to(x), y


@torch.no_grad()
def moved(classifier: Classifier, x: Tensor, x_adv: Tensor, layer: str) -> Tensor:
    """How far an attack moves each unit ``(n, K)``, in standard deviations over the images.

    Reconstructed, see above. Without the deviation, units of large values would always come first.
    """
    before, after = (activations(classifier, z, layer).double().cpu() for z in (x, x_adv))
    natural = before.std(0) if len(x) > 1 else torch.ones_like(before[0])
    # of a unit that never moves by itself nothing can be said
    return (after - before).abs() / torch.where(natural > 0, natural, torch.inf)


@torch.no_grad()
def importance(
    classifier: Classifier, x: Tensor, y: Tensor, layer: str, progress: Progress
) -> Tensor:
    """By how much the logit of class `y` ``(n,)`` changes without each unit: ``(n, K)``.

    arXiv:2409.15190, the ranking by leaving one out: a forward pass of each image per unit. Where
    the units are averaged for the final linear layer, one pass in all: their share of the logit.
    """
    with suppress(UsageError):
        if layer == penultimate(classifier, x):
            features, weight, _ = observe_head(classifier, x)
            return (features.double().mean((2, 3)) * weight[y]).abs().cpu()
    width = activations(classifier, x[:1], layer).shape[1]

    def logit(model: Classifier) -> Tensor:
        logits: Tensor = model(x)
        return logits.double().gather(1, y.unsqueeze(1))

    whole = logit(classifier)
    columns = []
    progress.begin("Leaving out units", width)
    for unit in range(width):
        keep = torch.ones(width)
        keep[unit] = 0
        columns.append((logit(masked(classifier, layer, keep)) - whole).abs())
        progress.advance(1)
    progress.end()
    return torch.cat(columns, 1).cpu()


def lowest_masked(scores: Tensor, count: int) -> Tensor:
    """Masks with zeros at the `count` lowest of scores ``(…, K)``; of equal ones the first."""
    masks = torch.ones(scores.shape)
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return masks.scatter(-1, lowest, 0.0)


def random_masks(shape: tuple[int, ...], count: int, seed: int, stream: int) -> Tensor:
    """Masks of this shape ``(…, K)`` with `count` zeros in each, wherever."""
    scores = np.random.default_rng([seed, stream]).random(shape)
    return lowest_masked(torch.from_numpy(scores), count)


def judge_masks(
    classifier: Classifier,
    data: Data,
    chosen: Chosen,
    *,
    attack: str | Spec = "pgd:eps=1/255,steps=20,stop=never",
    seed: int = 0,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> Judgement:
    """What masks are worth on images that they were not chosen by; see `choose`.

    Raises
    ------
    RunError
        An attack broke.
    """
    images = from_arrays(chosen.judging.x.numpy(), chosen.judging.y.numpy(), name=data.name)
    shields = [
        ReadyDefense(
            Spec(name, {}),
            masked(classifier, chosen.layer, masks),
            {"name": name, "mask": masks.tolist()},  # chance may choose the same units
        )
        for name, masks in (("mask", chosen.masks), ("control", chosen.control))
    ]
    facts = [
        *describe_circumstances(classifier, seed),
        *(each.tolist() for each in (chosen.judging.ids, chosen.masks, chosen.control)),
        *(chosen.layer, str(attack)),
    ]
    run = evaluate(
        classifier,
        images,
        [attack],
        seed=seed,
        out=(done or WorkCache()).name_run_folder(facts),
        probes=False,
        defenses=shields,
        progress=progress,
    )
    if run.failures:
        raise RunError("; ".join(run.failures.values()))
    cells = {(o.defense and o.defense.name, o.adaptive): o for o in run.attacks}
    clean = {defended.spec.name: defended.clean for defended in run.defenses}

    def both(name: str) -> Cells:
        return Cells(cells[name, False], cells[name, True])

    def figures(name: str) -> Figures:
        return Figures(accuracy(clean[name]), *map(robust_accuracy, both(name)))

    plain = cells[None, True]
    found = verdict(plain, both("mask"), both("control"))
    price = cost(find_right(run.clean), find_right(clean["mask"]))
    return Judgement(
        Figures(accuracy(run.clean), robust_accuracy(plain), robust_accuracy(plain)),
        figures("mask"),
        figures("control"),
        f"{found} {price}",
        tuple(finding for finding in run.findings if finding.grave),
    )


class Cells(NamedTuple):
    """One network under both attacks."""

    static: Outcome
    adaptive: Outcome


def verdict(plain: Outcome, mask: Cells, control: Cells) -> str:
    """What the figures amount to: of the network as it is, masked, and masked at random.

    Who knows the mask can still use the attack that was made without it, so what remains is what
    holds under both.
    """
    undefended, unaware, own = map(held, (plain, *mask))
    hindered = (
        " The attack made for the masked network does less than the other one: something hinders"
        " it, and stronger attacks may do more."
        if gains(unaware, own)
        else ""
    )
    aware, chance = unaware & own, held(control.static) & held(control.adaptive)
    return what_remains(undefended, unaware, aware, chance) + hindered


def what_remains(undefended: Flags, unaware: Flags, aware: Flags, chance: Flags) -> str:
    """What is left of a gain under attacks that know the mask; each ``(n,)``, what holds."""
    if not gains(undefended, aware):
        if gains(undefended, unaware):
            return "The gain disappears under an attack that knows the mask: this is no robustness."
        return (
            "The mask gains nothing that could be told from chance, whether or not the attack"
            " knows it."
        )
    left = -100 * count_pairs(undefended, aware).drop
    promised = -100 * count_pairs(undefended, unaware).drop
    gain = f"Of a gain of {promised:.1f} points {left:.1f} remain"
    if not gains(aware, unaware):
        gain = f"A gain of {left:.1f} points remains"
    if gains(chance, aware):
        return (
            f"{gain} under an attack that knows the mask, more than with random units: see whether"
            " stronger attacks leave any of it."
        )
    return (
        f"{gain} under an attack that knows the mask, which is no more than what a random mask"
        " gives: it does not come from the choice of units."
    )


def held(outcome: Outcome) -> Flags:
    """The images ``(n,)`` that are right at first and after the attack."""
    kept: Flags = outcome.attacked & ~outcome.success()
    return kept


def gains(before: Flags, after: Flags) -> bool:
    """Whether more images hold after a change, by an exact sign test at `LEVEL`."""
    pairs = count_pairs(before, after)
    return sign_test(pairs.gained, pairs.lost) < LEVEL


def cost(before: Flags, after: Flags) -> str:
    """What a mask does to images that nobody attacks."""
    drop = 100 * count_pairs(before, after).drop
    if gains(after, before):
        return f"It costs {drop:.1f} points of clean accuracy."
    if drop == 0:
        return "Clean accuracy stays as it is."
    return f"Clean accuracy changes by {-drop:+.1f} points, which can be chance."
