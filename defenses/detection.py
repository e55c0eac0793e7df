"""Fitting a detector: what it sees of images as they are, attacked, and changed without attack."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.sources import Data, draw
from robusteval.errors import RunError, UsageError
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances
from robusteval.interpreters.resampling import blur
from robusteval.models.admission import check_images, check_labels
from robusteval.models.arithmetic import exact_arithmetic
from robusteval.models.classifier import Classifier, block_size, frozen, predictions
from robusteval.models.failures import is_out_of_memory, raise_as_run_error
from robusteval.models.seeds import random_targets, sample_seeds
from robusteval.progress import Progress, Silent
from robusteval.search.balls import quantise
from robusteval.search.noise import add_equal_noise_in_box

from .detector import Fit, MapDetector, View, cost_of, mask_network_of, named
from .detector_metrics import Record, share
from .detector_report import AGAIN, Judgement, remarks
from .fitting import EPOCHS, Fitted, Rows
from .map_features import Channels, Extractor, channels_for, side_for
from .variants import (
    SHARES,
    Array,
    Parts,
    Sources,
    Variant,
    alike,
    cropped,
    floats,
    in_bytes,
    jpegs,
    parted,
)

LEAST = (20, 5, 5)  # images on which an attack succeeds, in each part
IN_MEMORY = 2**29  # bytes of stacks; more of them go to a file

# what is drawn for an image, apart from anything else drawn for it
SEEN, NOISE, CROP = (np.uint64(salt) for salt in (0x165667B1, 0x9E3779B1, 0x85EBCA77))


class Found(NamedTuple):
    """What came of a fit."""

    detector: MapDetector
    report: Record  # JSON-able


def fit_detector(
    model: Classifier,
    data: Data,
    interpreters: Sequence[str],
    attacks: Sequence[Attack],
    *,
    channels: Channels | None = None,
    extractor: Extractor = "small_cnn",
    confidence: bool = False,
    samples: int | None = 600,
    seed: int = 0,
    start: nn.Module | None = None,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> Found:
    """Fit a detector of attacked images, and judge it on images that had no say.

    Source images are parted first, alike ones together; every variant of an image stays in its
    part. Trees and features are fitted on 60 % of them, rounds and thresholds are decided by 20 %,
    and the last 20 % are looked at once.

    Parameters
    ----------
    model : Classifier
        What is attacked.
    data : Data
        Images that the detector will never be judged on again.
    interpreters : sequence of str
        Two or three, such as ``"grad"`` or ``"mask:blur=15"``.
    attacks : sequence of Attack
        From `robusteval.evaluation.plan.prepare_attack`; the detector learns from all of them.
    channels : {"pair", "pair_product", "triple"}, optional
        By the number of interpreters if not given.
    extractor : {"raw", "small_cnn", "vgg16"}
        What makes features of maps, besides the statistics of how they agree.
    confidence : bool
        Let it also look at how sure the classifier is, which is no explanation.
    samples : int, optional
        Source images, drawn at random; all if None.
    seed : int
        Decides everything that is drawn.
    start : Module, optional
        VGG-16 with weights, for `vgg16`.
    done : WorkCache, optional
        Keeps attacked images, maps and fits, so that the same call after a stop goes on from there.
    progress : Progress, optional
        Where to say how far it is.

    Returns
    -------
    Found
        The detector, and the report on it.

    Raises
    ------
    UsageError
        If there are too few images or classes, an attack that succeeds too seldom, or an
        interpreter that the network cannot have.
    """
    progress = progress or Silent()
    if not attacks:
        raise UsageError("a detector needs at least one attack to learn from")
    if (extractor == "vgg16") != (start is not None):
        raise UsageError(
            "the extractor vgg16, and no other, needs VGG-16 with weights to start from"
        )
    names = [str(attack.spec) for attack in attacks]
    if len(set(names)) < len(names):
        raise UsageError(f"the same attack is asked for twice: {', '.join(names)}")
    view = viewed(interpreters, channels, extractor, confidence, data.shape)
    view.check(model)
    study = Study(model, data, view, attacks, samples, seed, start, progress, done or WorkCache())
    with frozen(model), exact_arithmetic():
        return study.run()


def viewed(
    interpreters: Sequence[str],
    channels: Channels | None,
    extractor: Extractor,
    confidence: bool,
    shape: tuple[int, int, int],
) -> View:
    """What will be looked at; UsageError if it does not go together."""
    try:
        made = channels_for(len(interpreters), channels)
    except ValueError as error:
        raise UsageError(f"{error}: give --interpreters and --channels that go together") from None
    view = View(tuple(interpreters), made, extractor, side_for(extractor, shape), confidence, shape)
    if len({spec.name for spec in view.specs}) < len(view.specs):
        raise UsageError(f"interpreters must be different ones, not {', '.join(interpreters)}")
    return view


@dataclass
class Study:
    """One detector from images to verdict."""

    model: Classifier
    data: Data
    view: View
    attacks: Sequence[Attack]
    samples: int | None
    seed: int
    start: nn.Module | None
    progress: Progress
    done: WorkCache = field(default_factory=WorkCache)

    def run(self) -> Found:
        """Everything, one after the other."""
        sources = self.sources()
        parts = parted(sources, self.seed)
        with self.looked(sources, parts) as rows:
            judgement = Judgement(
                rows,
                parts,
                sources,
                self.view,
                tuple(str(attack.spec) for attack in self.attacks),
                self.seed,
                self.model.device,
                self.start,
                self.progress.advance,
                self.facts,
                self.done,
            )
            self.progress.begin("Fitting, and looking for leaks", EPOCHS * judgement.fits)
            main, thresholds, figures = judgement.made()
            self.progress.end()
            detector = self.detector(main, thresholds, sources, parts)
            report = self.described(detector, sources, parts, rows) | figures
            return Found(detector, {**report, "remarks": remarks(report)})

    def detector(
        self, main: Fitted, thresholds: dict[str, float], sources: Sources, parts: Parts
    ) -> MapDetector:
        """What goes into the file."""
        known = np.isin(sources.groups, np.concatenate(parts[:2]))
        fit = Fit(
            model=named(self.model),
            rts=mask_network_of(self.view, self.model),
            thresholds=thresholds,
            forwards=cost_of(self.view, self.model, *self.few(sources)),
            attacks=tuple(str(attack.spec) for attack in self.attacks),
            data=self.data.name,
            train=int(np.isin(sources.groups, parts.train).sum()),
            validation=int(np.isin(sources.groups, parts.validation).sum()),
            rounds=main.rounds,
            seed=self.seed,
        )
        return MapDetector(
            self.view,
            fit,
            main.extractor,
            main.center,
            main.spread,
            main.booster,
            np.unique(sources.ids[known]),
        )

    def described(
        self, detector: MapDetector, sources: Sources, parts: Parts, rows: Rows
    ) -> Record:
        """What was done, before any figure."""
        facts = detector.facts
        counts = [int(np.isin(sources.groups, part).sum()) for part in parts[:3]]
        found = []
        for attack in self.attacks:
            mine = rows.of(str(attack.spec))
            found.append({"attack": str(attack.spec), **share(rows.fooled[mine])})
        return {
            "detector": {
                name: facts[name]
                for name in ("interpreters", "channels", "extractor", "confidence")
            },
            "model": detector.fit.model,
            "data": self.data.name,
            "seed": self.seed,
            "images": {
                "total": len(sources.x),
                "alike": len(sources.x) - len(np.unique(sources.groups)),
                **dict(zip(("train", "validation", "test"), counts, strict=True)),
            },
            "attacks": found,
            "features": len(detector.center),
            "cost": {"forwards": detector.fit.forwards, "times": self.slower(detector, sources)},
        }

    def sources(self) -> Sources:
        """The images drawn, rounded to 8 bits."""
        index = draw(len(self.data), self.samples, self.seed)
        least = math.ceil(max(n / part for n, part in zip(LEAST, SHARES, strict=True)))
        if len(index) < least:
            raise UsageError(
                f"{len(index)} images cannot be parted into those to fit, to set thresholds and to"
                f" judge: give at least {least}"
            )
        check_labels(self.data, index, self.model)
        check_images(self.data, index, self.model)
        self.progress.begin("Reading images", len(index))
        found = []
        for places in batches(len(index), self.batch):
            found.append(self.data.batch(index[places]))
            self.progress.advance(len(places))
        self.progress.end()
        labels = torch.cat([batch.y for batch in found])
        if len(np.unique(labels.numpy())) < 2:
            raise UsageError(
                f"all images of {self.data.name} are of one class: an attack on them, and what it"
                " does to maps, would always be the same; give images of several classes"
            )
        x = quantise(torch.cat([batch.x for batch in found]))
        ids = np.concatenate([batch.ids for batch in found])
        return Sources(x, labels, ids, alike(x, ids))

    @property
    def batch(self) -> int:
        """Images at a time."""
        return 4 * block_size(int(np.prod(self.data.shape)), self.model.device)

    @contextmanager
    def looked(self, sources: Sources, parts: Parts) -> Iterator[Rows]:
        """Every variant of every image as the detector sees it."""
        variants = list(self.variants(sources, parts))
        total = sum(len(variant.rows) for variant in variants)
        shape = (total, self.view.planes, self.view.side, self.view.side)
        with room(shape) as stacks:
            yield self.filled(sources, variants, stacks)

    def variants(self, sources: Sources, parts: Parts) -> Iterator[Variant]:
        """Clean images, what attacks make of them, and what is no attack but changes them, too."""
        x8 = in_bytes(sources.x)
        everything = np.arange(len(x8))
        yield Variant("clean", everything, x8)
        right = self.answers(sources.x) == sources.labels
        changed, moved = x8.copy(), np.zeros(len(x8), dtype=bool)
        for attack in self.attacks:
            attacked = self.attacked(attack, sources, right.nonzero().flatten().numpy())
            hit = self.reached(attack, sources, attacked)
            check_success(attack, len(hit), sources.groups[attacked.rows[hit]], parts)
            yield attacked
            new = ~moved[attacked.rows] & (attacked.images != x8[attacked.rows]).any((1, 2, 3))
            changed[attacked.rows[new]] = attacked.images[new]
            moved[attacked.rows[new]] = True
        for name, salt in (("noise", NOISE), (AGAIN, ~NOISE)):
            some = np.flatnonzero(moved)
            seeds = sample_seeds(self.seed, sources.ids[some] ^ salt)
            made = add_equal_noise_in_box(floats(changed[some]), sources.x[some], seeds)
            yield Variant(name, some, in_bytes(made))
        crops = cropped(sources.x, sample_seeds(self.seed, sources.ids ^ CROP))
        for name, made in (
            ("jpeg", jpegs(sources.x)),
            ("blur", blur(sources.x, 0.6).clamp(0, 1)),
            ("crop", crops),
        ):
            yield Variant(name, everything, in_bytes(made))

    def answers(self, x: Tensor) -> Tensor:
        """Predicted classes ``(n,)``."""
        with torch.no_grad(), raise_as_run_error("the network broke"):
            parts = [predictions(self.model(part.to(self.model.device))) for part in self.split(x)]
        return torch.cat(parts).cpu()

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """In batches."""
        return torch.split(x, self.batch)

    def attacked(self, attack: Attack, sources: Sources, rows: Array) -> Variant:
        """What an attack makes of images that were right, rounded to 8 bits."""
        self.progress.begin(str(attack.spec), len(rows))
        images = np.empty((len(rows), *self.data.shape), dtype=np.uint8)
        facts = [*self.facts, attack.spec.name, attack.resolved]
        for places in batches(len(rows), self.batch):
            some = rows[places]
            made = self.done.compute(
                facts,
                (sources.x[some].numpy(), sources.ids[some], self.goals(attack, sources, some)),
                partial(roomy, partial(self.perturbed, attack, sources), some),
            )
            images[places] = made[0]
            self.progress.advance(len(places))
        self.progress.end()
        return Variant(str(attack.spec), rows, images)

    @cached_property
    def facts(self) -> list[Any]:
        """What all results depend on."""
        return describe_circumstances(self.model, self.seed)

    def perturbed(self, attack: Attack, sources: Sources, rows: Array) -> tuple[Array]:
        """The results for some images, as bytes."""
        model, targeted = self.model, attack.threat.targeted
        x, seeds = sources.x[rows].to(model.device), sample_seeds(self.seed, sources.ids[rows])
        goal = torch.from_numpy(self.goals(attack, sources, rows)).to(model.device)
        with raise_as_run_error("the attack broke"):
            x_adv = attack.perturb(model, x.clone(), goal, targeted=targeted, seeds=seeds)
        x_adv, _ = repair(x_adv.detach().to(x), x, attack.threat)
        return (in_bytes(x_adv),)

    def filled(self, sources: Sources, variants: Sequence[Variant], stacks: Array) -> Rows:
        """The rows, worked out batch by batch."""
        n = len(stacks)
        names = tuple(variant.name for variant in variants)
        rows = Rows(
            stacks=stacks,
            statistics=np.empty((n, len(self.view.names)), dtype=np.float32),
            probability=np.empty(n),
            variant=np.repeat(np.arange(len(names)), [len(v.rows) for v in variants]),
            image=np.concatenate([v.rows for v in variants]),
            group=sources.groups[np.concatenate([v.rows for v in variants])],
            right=np.empty(n, dtype=bool),
            fooled=np.zeros(n, dtype=bool),
            names=names,
        )
        by_name = {str(attack.spec): attack for attack in self.attacks}
        self.progress.begin(f"Maps of {' and '.join(self.view.interpreters)}", n)
        start = 0
        for i, variant in enumerate(variants):
            salt = SEEN + np.uint64(i)  # another seed for an image and its twin
            for places in batches(len(variant.rows), self.batch):
                here = start + places
                seen = self.done.compute(
                    [*self.facts, asdict(self.view), int(salt)],
                    (variant.images[places], sources.ids[variant.rows[places]]),
                    partial(roomy, partial(self.seen, sources, variant, salt), places),
                )
                rows.stacks[here], rows.statistics[here], rows.probability[here], pred = seen
                rows.right[here] = pred == sources.labels[variant.rows[places]].numpy()
                if variant.name in by_name:
                    attack = by_name[variant.name]
                    goal = self.goals(attack, sources, variant.rows[places])
                    rows.fooled[here] = (pred == goal) == attack.threat.targeted
                self.progress.advance(len(places))
            start += len(variant.rows)
        self.progress.end()
        return rows

    def reached(self, attack: Attack, sources: Sources, variant: Variant) -> Array:
        """On which images ``(rows,)`` bool the attack has reached its goal."""
        goal = self.goals(attack, sources, variant.rows)
        pred = self.answers(floats(variant.images)).numpy()
        return np.asarray((pred == goal) == attack.threat.targeted)

    def goals(self, attack: Attack, sources: Sources, rows: Array) -> Array:
        """The classes to reach, or to leave."""
        labels = sources.labels[rows]
        if attack.threat.targeted:
            seeds = sample_seeds(self.seed, sources.ids[rows])
            labels = random_targets(labels, seeds, self.model.num_classes)
        return np.asarray(labels.numpy())

    def seen(
        self, sources: Sources, variant: Variant, salt: np.uint64, places: Array
    ) -> tuple[Array, ...]:
        """Stacks, statistics, probability of the predicted class and that class."""
        seeds = sample_seeds(self.seed, sources.ids[variant.rows[places]] ^ salt)
        x = floats(variant.images[places]).to(self.model.device)
        with raise_as_run_error("an interpreter broke"), torch.no_grad():
            maps, logits = self.view.maps(self.model, x, seeds)
            stack, found = self.view.looked(maps, logits)
        probability = logits.softmax(1).amax(1)
        pred = predictions(logits)
        return tuple(each.cpu().numpy() for each in (stack, found, probability, pred))

    def few(self, sources: Sources) -> tuple[Tensor, Tensor]:
        """Images to measure on, and seeds."""
        x = sources.x[: self.batch // 4].to(self.model.device)
        return x, sample_seeds(self.seed, sources.ids[: len(x)] ^ SEEN)

    def slower(self, detector: MapDetector, sources: Sources) -> float:
        """Duration of a score as a multiple of that of a prediction."""
        x, seeds = self.few(sources)

        def seconds(work: Callable[[], object]) -> float:
            taken: list[float] = []
            while len(taken) < 3 and sum(taken) < 1:
                started = time.perf_counter()
                work()
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                taken.append(time.perf_counter() - started)
            return min(taken)

        with torch.no_grad():
            alone = seconds(lambda: self.model(x))
        return seconds(lambda: detector.score(self.model, x, seeds)) / alone


def check_success(attack: Attack, n: int, groups: Array, parts: Parts) -> None:
    """Refuse to learn from an attack of `n` images that hardly ever succeeds."""
    counts = [int(np.isin(groups, part).sum()) for part in parts[:3]]
    if any(count < least for count, least in zip(counts, LEAST, strict=True)):
        raise UsageError(
            f"{attack.spec} succeeds on {len(groups)} of {n} images: {counts[0]} among those to"
            f" fit on, {counts[1]} to set thresholds and {counts[2]} to judge, where at least"
            f" {LEAST[0]}, {LEAST[1]} and {LEAST[2]} are needed; give more --samples, or a"
            " stronger attack"
        )


def batches(n: int, size: int) -> list[Array]:
    """The numbers up to n in parts of at most so many."""
    return np.array_split(np.arange(n), max(1, -(-n // size)))


@contextmanager
def room(shape: tuple[int, ...]) -> Iterator[Array]:
    """An array of float32, in a file that goes away if it is large."""
    if 4 * np.prod(shape) <= IN_MEMORY:
        yield np.empty(shape, dtype=np.float32)
        return
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def roomy(work: Callable[[Array], tuple[Array, ...]], places: Array) -> tuple[Array, ...]:
    """The work on some places, in halves where memory runs out."""
    try:
        return work(places)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(places) == 1:
            raise RunError("memory runs out even for one image: use a machine with more") from None
    halves = [roomy(work, half) for half in np.array_split(places, 2)]
    return tuple(np.concatenate(each) for each in zip(*halves, strict=True))
