"""Every form of the source images that a detector meets: as they are, attacked, and changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from robusteval.errors import UsageError
from robusteval.evaluation.batches import split_evenly
from robusteval.evaluation.perturbing import perturb
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import hash_inputs
from robusteval.interpreters.resampling import blur
from robusteval.models.seeds import sample_seeds
from robusteval.runs.types import Columns
from robusteval.search.noise import add_equal_noise_in_box

from .splits import LEAST, Parts, Sources
from .study import Study
from .transforms import Array, compress_jpeg, crop_and_enlarge, from_bytes, to_bytes

AGAIN = "noise again"  # other noise, for a comparison in which there is nothing to find
# what is drawn for an image, apart from anything else drawn for it
NOISE, CROP = (np.uint64(salt) for salt in (0x9E3779B1, 0x85EBCA77))


class Variant(NamedTuple):
    """The source images in one form."""

    name: str
    rows: Array  # which of them
    images: Array  # (rows, c, h, w) uint8


@dataclass
class VariantMaker:
    """Makes the variants of the source images of a study."""

    study: Study
    sources: Sources
    parts: Parts

    def make_variants(self) -> Iterator[Variant]:
        """Make clean images, what attacks make of them, and what changes them without an attack.

        UsageError if an attack hardly ever succeeds.
        """
        sources = self.sources
        x8 = to_bytes(sources.x)
        everything = np.arange(len(x8))
        yield Variant("clean", everything, x8)
        right = self.study.predict_classes(sources.x) == sources.labels
        changed, moved = x8.copy(), np.zeros(len(x8), dtype=bool)
        for attack in self.study.attacks:
            attacked = self.attack_images(attack, right.nonzero().flatten().numpy())
            hit = self.find_successes(attack, attacked)
            check_success(attack, len(hit), sources.groups[attacked.rows[hit]], self.parts)
            yield attacked
            new = ~moved[attacked.rows] & (attacked.images != x8[attacked.rows]).any((1, 2, 3))
            changed[attacked.rows[new]] = attacked.images[new]
            moved[attacked.rows[new]] = True
        yield from self.make_benign_variants(changed, moved)

    def make_benign_variants(self, changed: Array, moved: Array) -> Iterator[Variant]:
        """Make noise as large as the changes of attacks, where they `moved` an image, and more.

        `changed` are the attacked images ``(n, c, h, w)`` of 8 bits, `moved` bool ``(n,)``.
        """
        sources, seed = self.sources, self.study.seed
        for name, salt in (("noise", NOISE), (AGAIN, ~NOISE)):
            some = np.flatnonzero(moved)
            seeds = sample_seeds(seed, sources.ids[some] ^ salt)
            made = add_equal_noise_in_box(from_bytes(changed[some]), sources.x[some], seeds)
            yield Variant(name, some, to_bytes(made))
        crops = crop_and_enlarge(sources.x, sample_seeds(seed, sources.ids ^ CROP))
        for name, made in (
            ("jpeg", compress_jpeg(sources.x)),
            ("blur", blur(sources.x, 0.6).clamp(0, 1)),
            ("crop", crops),
        ):
            yield Variant(name, np.arange(len(sources.x)), to_bytes(made))

    def attack_images(self, attack: Attack, rows: Array) -> Variant:
        """Attack the images in these rows, and round the results to 8 bits."""
        study, sources = self.study, self.sources
        goals = study.choose_goals(attack, sources, rows)
        facts = [*study.circumstances, attack.spec.name, attack.resolved]
        found = study.batches.map(
            str(attack.spec),
            hash_inputs(facts, (sources.x[rows].numpy(), sources.ids[rows], goals)),
            [rows[places] for places in split_evenly(len(rows), study.batch)],
            lambda some: self.perturb_rows(attack, some),
        )
        nothing = np.empty((0, *study.data.shape), dtype=np.uint8)
        return Variant(str(attack.spec), rows, found.get("images", nothing))

    def perturb_rows(self, attack: Attack, rows: Array) -> Columns:
        """Attack the images in some rows; `images` of 8 bits."""
        study, sources, device = self.study, self.sources, self.study.model.device
        made = perturb(
            attack,
            study.model,
            sources.x[rows].to(device),
            sources.labels[rows].to(device),
            seeds=sample_seeds(study.seed, sources.ids[rows]),
            goal=torch.from_numpy(study.choose_goals(attack, sources, rows)).to(device),
        )
        return {"images": to_bytes(made.x_adv)}

    def find_successes(self, attack: Attack, variant: Variant) -> Array:
        """Find on which images ``(rows,)`` bool the attack has reached its goal."""
        goal = self.study.choose_goals(attack, self.sources, variant.rows)
        pred = self.study.predict_classes(from_bytes(variant.images)).numpy()
        return np.asarray((pred == goal) == attack.threat.targeted)


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
