"""The cells of a run: for each its key, what an earlier call finished of it, and its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from robusteval.evaluation.active_test import PLANTED
from robusteval.evaluation.computation import Computation
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.target import Target
from robusteval.runs.folder import Store
from robusteval.runs.keys import QUALITY, hash_attack, hash_clean, hash_oblivious, hash_quality
from robusteval.runs.types import Columns, Outcome, Picture

T = TypeVar("T")


class Cells:
    """Takes the cells of a plan from the store, or has them computed and keeps them there.

    Parameters
    ----------
    plan : Plan
        What is run.
    store : Store
        Keeps the cells; the caller writes the record.
    targets : sequence of Target
        The classifier as it is, then behind each defense.
    computation : Computation
        Of the same plan, store and targets.
    receivers : sequence of Target
        Other networks that what is made on the classifier as it is is judged on.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        targets: Sequence[Target],
        computation: Computation,
        receivers: Sequence[Target] = (),
    ) -> None:
        self.plan = plan
        self.receivers = receivers
        self.store = store
        self.targets = targets
        self.computation = computation
        self.keys: list[str] = []  # of the cells that were finished or found, in their order

    def compute_clean(self, target: Target) -> None:
        """Fill in `target.clean`: every image as it is."""
        plan, defended = self.plan, target.defended
        entry = {"role": "clean"} if defended is None else defended.to_record()
        key = hash_clean(plan.config, target.identity)
        columns = self.store.find_clean(key, plan.index, target.kind)
        if columns is None:
            columns = self._resume([key], partial(self.computation.measure_clean, key, target))
            self.store.save_cell(key, columns, entry)
        self.keys.append(key)
        target.clean = columns

    def compute_quality(self, measurement: Measurement) -> Columns:
        """What maps of the first images that were right are worth, nan for the others."""
        key = hash_quality(self.plan.config, QUALITY)
        columns = self.store.find_cell(key)
        if columns is None:
            columns = self.computation.measure_quality(key, measurement, QUALITY)
            if self.plan.share is None:
                self.store.save_cell(key, columns, {"role": "quality"})
        self.keys.append(key)
        return columns

    def compute_attack(
        self, attack: Attack, target: Target, without: Sequence[Target] = ()
    ) -> list[Outcome]:
        """One attack on every image that was right at first; a probe on the first few of them.

        What it does to the classifier as it is is judged behind the defenses and on the receivers,
        too, but those named in `without`. One outcome for the target and one for each of them.
        """
        shown = attack.role == "attack"
        plain = target.defense is None and shown
        others = [*self.targets[1:], *self.receivers] if plain else []
        defended = [each for each in others if each not in without]
        measurement = target.measurement if shown else None
        keys = hash_cells(self.plan, attack, target, defended, maps=measurement is not None)
        stored = [
            self.store.find_outcome(key, each.clean)
            for key, each in zip(keys, (target, *defended), strict=True)
        ]
        finished = [outcome for outcome in stored if outcome is not None]
        if len(finished) == len(keys) and (not shown or self._has_images(keys[0], finished[0])):
            self.keys += keys
            return finished

        work = partial(self._run_attack, keys, attack, target, defended, measurement)
        outcomes, pictures, images = self._resume(keys, work)
        for key, outcome in zip(keys, outcomes, strict=True):
            self._save(key, outcome, pictures, images)
            pictures, images = (), None  # of the first alone
        self.keys += keys
        # nothing continues these: the attack itself is done
        for each in without:
            self.store.parts.remove_parts(hash_oblivious(keys[0], each.identity))
        return outcomes

    def _run_attack(
        self,
        keys: Sequence[str],
        attack: Attack,
        target: Target,
        defended: Sequence[Target],
        measurement: Measurement | None,
    ) -> tuple[list[Outcome], Sequence[Picture], str | None]:
        """Outcomes and pictures, and the hash of all images where these are kept."""
        work = self.computation.run_attack
        outcomes, pictures = work(keys, attack, target, defended, measurement)
        images, shown = self.store.images, attack.role == "attack"
        if images is None or not shown or not outcomes[0].attacked.any():
            return outcomes, pictures, None
        return outcomes, pictures, images.join(keys[0], outcomes[0], self.plan.data.shape)

    def _has_images(self, key: str, outcome: Outcome) -> bool:
        """Whether the images of a finished cell are kept, where they are to be."""
        if self.store.images is None or not outcome.attacked.any() or self.store.has_images(key):
            return True
        self.store.say(f"{outcome.attack} is run again: its images were not kept.")
        return False

    def compute_active_test(self, attack: Attack, target: Target) -> Outcome:
        """What an attack finds of what is planted around the first images that are right.

        UsageError if nothing can be planted on this network.
        """
        attack = replace(attack, role=PLANTED)
        (key,) = hash_cells(self.plan, attack, target, (), maps=False)
        outcome = self.store.find_outcome(key, target.clean)
        if outcome is None:
            outcome = self.computation.run_active_test(key, attack, target)
            self._save(key, outcome)
        self.keys.append(key)
        return outcome

    def _save(
        self,
        key: str,
        outcome: Outcome,
        pictures: Sequence[Picture] = (),
        images: str | None = None,
    ) -> None:
        """Keep a whole cell; of a share of it the finished rows are kept already."""
        if self.plan.share is None:
            self.store.save_cell(key, outcome.columns, outcome.to_record(), pictures, images)

    def _resume(self, keys: Sequence[str], build: Callable[[], T]) -> T:
        """What `build` makes of rows that are finished and the rest; of none if they mislead it."""
        resumed = any(self.store.parts.locate(key).exists() for key in keys)
        try:
            return build()
        except (KeyError, ValueError, TypeError, IndexError):
            if not resumed:
                raise
        self.store.say("What was finished of a cell does not fit it: it is computed again.")
        for key in keys:
            self.store.parts.remove_parts(key)
        return build()


def hash_cells(
    plan: Plan, attack: Attack, target: Target, defended: Sequence[Target], *, maps: bool
) -> list[str]:
    """Hash what the numbers of an attack's cells depend on: a key for the target, one for each
    of `defended`; `maps` says whether these are measured."""
    key = hash_attack(
        plan.config, attack.role, attack.spec, attack.resolved, target.identity, maps=maps
    )
    return [key, *(hash_oblivious(key, each.identity) for each in defended)]
