"""The columns of cells, computed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.evaluation.active_test import PLANTED
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.batches import ResumableMap, take_rows
from robusteval.evaluation.columns import (
    PROBED,
    STEADY,
    AttackedColumns,
    measure_clean,
    measure_quality,
)
from robusteval.evaluation.division import Division
from robusteval.evaluation.gallery import Gallery, measure_hardness
from robusteval.evaluation.judge import fill_untouched
from robusteval.evaluation.loss_curves import CURVES
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.pieces import ROUNDS, HandingOut, Task
from robusteval.evaluation.plan import Attack, Plan, needs_detector
from robusteval.evaluation.planting import Planting, keep_planted
from robusteval.evaluation.shortcut_checks import BY_SHORTCUTS, describe_differences
from robusteval.evaluation.target import Target
from robusteval.models.classifier import Classifier, choose_batch_size, choose_block_size
from robusteval.runs import metrics
from robusteval.runs.folder import Store
from robusteval.runs.pictures import check_pictures
from robusteval.runs.types import MADE, STAGE, TRANSFER, Columns, Outcome, Picture
from robusteval.runs.validation import check_clean, check_outcome


class Shrinking:
    """What is done where memory runs out: the networks are called with fewer images at a time."""

    def __init__(self, models: Sequence[Classifier], values: int) -> None:
        self.models = list(models)
        self.values = values  # of an image
        self.notes: list[str] = []

    def shrink_blocks(self, half: int) -> None:
        """Let no network be called with more than so many images at a time.

        This can change a logit's last digits, so it is noted.
        """
        large = [
            model
            for model in self.models
            if half < (model.block or choose_block_size(self.values, model.device))
        ]
        for model in large:
            model.block = half
        if large:
            self.notes.append(
                f"memory ran out: the network was called with {half} images at a time"
            )


# attacks that finish most images soon, or give few to their last stages
THINNING = ("standard", "thorough", "quick", "autoattack", "unmask", "pgd", "apgd")


class BatchSizes(NamedTuple):
    """How many images are worked on at a time."""

    natural: int  # by their size and the device
    asked: int | None  # by the user

    @property
    def usual(self) -> int:
        """What was asked for, or the natural size."""
        return self.asked or self.natural

    def choose_size(self, attack: Attack) -> int:
        """Choose the size for an attack: less of images that take seconds each.

        So progress is seen; more for attacks of which most time goes into the few images that are
        left, so that these share calls of the network, but see `choose_most`. For foreign attacks
        batches are part of the result, never the user's choice.
        """
        if attack.foreign:
            return self.natural
        if self.asked is not None:
            return self.asked
        if attack.spec.name in THINNING:
            return 2 * self.natural
        slow = "interpreter" in attack.resolved or needs_detector(attack.spec)
        return self.natural // 4 if slow else self.natural

    def choose_most(self, attack: Attack) -> int:
        """Choose how many images may be worked on where that is quick; 0 for no more than usual.

        What is under way at a stop is done again, so this depends on how long batches took.
        """
        joined = attack.spec.name in THINNING and self.asked is None
        return 8 * self.natural if joined else 0


class Computation:
    """Computes the columns of one cell after the other, under the keys that it is given.

    Parameters
    ----------
    plan : Plan
        What is run.
    store : Store
        Keeps parts of cells, and candidates for pictures.
    targets : sequence of Target
        The classifier as it is, then behind each defense.
    batches : ResumableMap
        Over the parts of the store; told here what to do where memory runs out.
    batch_size : int, optional
        Images at a time; by size and device if not given.
    answers : Answers, optional
        Of the networks, where they were asked already.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        targets: Sequence[Target],
        batches: ResumableMap,
        batch_size: int | None,
        answers: Answers | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.targets = list(targets)
        self.undefended = targets[0]
        self.batches = batches
        values = int(np.prod(plan.data.shape))
        self.shrinking = Shrinking([target.model for target in targets], values)
        batches.shrink = self.shrinking.shrink_blocks
        batches.expect = lambda rows: plan.data.expect(plan.index[rows])
        self.sizes = BatchSizes(choose_batch_size(values, plan.classifier.device), batch_size)
        self.planting = Planting(plan, answers or Answers(), self.shrinking.models.append)
        self.division = Division(plan, self.undefended)
        self.handing = HandingOut(self.targets, self.shrinking.notes, self.sizes.natural // 4)

    def measure_clean(self, key: str, target: Target) -> Columns:
        """Every image as it is."""
        found = self.batches.map(
            f"Clean accuracy{target.suffix}",
            key,
            self.division.split_all(self.sizes.usual, STEADY),
            partial(measure_clean, self.plan, target, self.undefended.clean),
            run=self.handing.hand_out(Task("clean", self.targets.index(target))),
        )
        check_clean(found, target.kind, self.plan.index)
        if self.plan.share is not None:
            self.plan.share.check_images(found["id"])
        return found

    def measure_quality(self, key: str, measurement: Measurement, most: int) -> Columns:
        """What maps are worth: of the first images that were right, nan for the others."""
        clean = self.undefended.clean
        rows = self.division.own(np.flatnonzero(metrics.find_right(clean))[:most])
        found = self.batches.map(
            "What the maps are worth",
            key,
            self.division.split(rows, self.sizes.usual),
            partial(measure_quality, self.plan, measurement, clean),
            run=self.handing.hand_out(Task("quality", 0)),
        )
        columns = {name: np.full(len(clean["id"]), np.nan) for name in measurement.name_worth()}
        for name, values in found.items():
            columns[name][rows] = values
        return columns

    def run_attack(
        self,
        keys: Sequence[str],
        attack: Attack,
        target: Target,
        defended: Sequence[Target],
        measurement: Measurement | None,
    ) -> tuple[list[Outcome], Sequence[Picture]]:
        """Outcomes for the target and for each of `defended`, and pictures of the first.

        A probe runs on the first few of the images that were right alone.
        """
        shown = attack.role == "attack"
        rows = np.flatnonzero(metrics.find_right(target.clean))  # positions attacked
        some = rows if shown else rows[:PROBED]
        size = self.sizes.choose_size(attack)
        batches = self.division.split_attacked(some, size, whole=attack.foreign)
        rows = np.sort(np.concatenate([*batches, rows[:0]]))
        gallery = Gallery(self.store.read_candidates(keys[0])) if shown else None
        self.shrinking.notes.clear()
        if shown:
            check_images(self.store, keys)
        found = self._attack_rows(attack, target, defended, measurement, gallery, keys, batches)
        # before the columns are placed, which empties them
        notes = list_notes(attack, found[0], target, rows, self.shrinking)
        hard = measure_hardness(found[0], attack.threat) if len(rows) else rows
        outcomes = []
        for i, each in enumerate((target, *defended)):
            positions = self.division.list_judged(target, rows) if shown else rows
            maps = measurement.name_columns() if measurement and not i else ()
            outcome = Outcome(
                attack=attack.spec,
                threat=attack.threat,
                knowledge=attack.knowledge,
                columns=place_columns(each.clean, positions, rows, found[i], maps),
                role=TRANSFER if each.receives else attack.role,
                notes=() if i else notes,
                resolved=attack.resolved,
                defense=each.spec,
                adaptive=i == 0,
            )
            check_outcome(outcome, take_judged(each.clean, positions) if shown else each.clean)
            outcomes.append(outcome)
        if gallery is None or not len(rows) or self.plan.share is not None:
            return outcomes, ()
        pictures = gallery.choose_pictures(hard)
        check_pictures(pictures, outcomes[0].columns)
        return outcomes, pictures

    def run_active_test(self, key: str, attack: Attack, target: Target) -> Outcome:
        """What an attack finds of what is planted on the network; UsageError if nothing can be."""
        rows = self.division.own(self.planting.choose_rows(target))
        title = f"Planted examples, {attack.spec}{target.suffix}"
        batches = self.division.split(rows, self.sizes.usual)
        look = partial(self.planting.measure, attack, target)
        task = Task("planted", self.targets.index(target), attack.asked or attack.spec)
        run = self.handing.hand_out(task, rounds=1, least=1)
        rows, found = keep_planted(rows, self.batches.map(title, key, batches, look, run=run))
        return Outcome(
            attack=attack.spec,
            threat=attack.threat,
            knowledge=attack.knowledge,
            columns=place_columns(target.clean, rows, rows, found),
            role=PLANTED,
            resolved=attack.resolved,
            defense=target.spec,
        )

    def _attack_rows(
        self,
        attack: Attack,
        target: Target,
        defended: Sequence[Target],
        measurement: Measurement | None,
        gallery: Gallery | None,
        keys: Sequence[str],
        batches: Sequence[Positions],
    ) -> list[Columns]:
        """Columns of the attacked images alone, for each key."""

        def keep_candidates() -> None:
            if gallery is not None and gallery.candidates:
                self.store.save_candidates(keys[0], gallery.candidates)

        title = str(attack.spec) if attack.role == "attack" else f"Trust check {attack.spec}"
        work = AttackedColumns(
            self.plan, attack, target, defended, measurement, gallery, self.batches.shrink
        )
        if self.store.images is not None and attack.role == "attack":
            work = replace(work, keep=partial(self.store.images.keep_batch, keys[0]))
        return self.batches.map_cells(
            f"{title}{target.suffix}",
            keys,
            batches,
            work.measure,
            whole=attack.foreign,
            most=self.sizes.choose_most(attack),
            run=self.handing.hand_out(
                Task(
                    "attack",
                    self.targets.index(target),
                    attack.asked or attack.spec,
                    attack.role,
                    tuple(self.targets.index(each) for each in defended),
                    maps=measurement is not None,
                ),
                gallery,
                whole=attack.foreign,
                rounds=count_rounds(attack),
            ),
            # before the columns: what these say is done is not offered again
            before_saving=keep_candidates,
        )


def count_rounds(attack: Attack) -> int:
    """How many pieces of an attack each worker gets, at least where there are few images.

    One where few are left in the end: these share calls if they are of one piece.
    """
    return 1 if attack.spec.name in THINNING else ROUNDS


def list_notes(
    attack: Attack, found: Columns, target: Target, rows: Positions, shrinking: Shrinking
) -> tuple[str, ...]:
    """What is to be said of a cell: what memory did, and images of the class to reach."""
    notes = list(dict.fromkeys(shrinking.notes))
    if attack.goals is not None and len(rows):
        same = int((found["target"] == target.clean["label"][rows]).sum())
        if same:
            of = f"{same} of {len(rows)} images are"
            notes.append(f"{of} of the class to reach: left alone, they count as held")
    if BY_SHORTCUTS in found and len(rows):
        notes += describe_differences(found)
    return tuple(notes)


def check_images(store: Store, keys: Sequence[str]) -> None:
    """Throw away what is finished of cells if images of it are to be kept and were not."""
    parts, images = store.parts, store.images
    if images is None:
        return
    found = [part["row"] for part in parts.read_parts(keys[0])]
    if found and not images.holds(keys[0], np.concatenate(found)):
        for key in keys:
            parts.remove_parts(key)


def take_judged(clean: Columns, positions: Positions) -> Columns:
    """Columns of the images at some positions ``(n,)``, in order; no copies where that is all."""
    return clean if len(positions) == len(clean["id"]) else take_rows(clean, positions)


def place_columns(
    clean: Columns,
    positions: Positions,
    rows: Positions,
    found: Columns,
    maps: Sequence[str] = (),
) -> Columns:
    """Columns of a cell from those of the images that were attacked.

    Parameters
    ----------
    clean : Columns
        All images of the run before the attack.
    positions : ndarray
        The images ``(n,)`` of the cell.
    rows : ndarray
        Those that were attacked ``(m,)``, among them.
    found : Columns
        What became of these, ``(m,)`` each. Comes back empty: of a million images there is no room
        for columns twice.
    maps : sequence of str
        Those of `found` that say something of maps; nan for the others.
    """
    here = take_judged(clean, positions)
    place = np.searchsorted(positions, rows)
    open_ = metrics.find_right(here)[place]  # the attack changed no image that was lost before
    more = [name for name in found if name.startswith((STAGE, MADE, *CURVES, BY_SHORTCUTS))]
    columns: Columns = {}
    for name, values in chain(
        fill_untouched(here),
        ((name, np.full(len(positions), np.nan)) for name in maps),
        ((name, np.zeros(len(positions), found[name].dtype)) for name in more),
    ):
        if name in found:
            values = values.copy()  # the images before the attack have it as well
            values[place[open_]] = found.pop(name)[open_]
        columns[name] = values
    if found:
        raise KeyError(f"columns that no cell has: {', '.join(found)}")
    return columns
