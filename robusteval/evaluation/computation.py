"""The columns of cells, computed batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from robusteval.datasets.dataset import Positions
from robusteval.errors import UsageError
from robusteval.evaluation.active_test import PLANTED, Planter, count_images, measure_planted
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.batches import Piece, ResumableMap, Runner, batch_by_id, take_rows
from robusteval.evaluation.columns import PROBED, AttackedColumns, measure_clean, measure_quality
from robusteval.evaluation.gallery import Gallery, measure_hardness
from robusteval.evaluation.judge import fill_untouched
from robusteval.evaluation.loss_curves import CURVES
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.pieces import Pool, Seen, Task, split_finely
from robusteval.evaluation.plan import Attack, Plan, needs_detector
from robusteval.evaluation.target import DefenseBroke, Target
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


# attacks that hold few images on a graph, whatever their batch, and finish most of them soon
WIDE = ("pgd", "apgd")
TOGETHER = 3_200_000  # numbers in the images of their batches
# attacks that give few images to their last stages
THINNING = ("standard", "thorough", "quick", "autoattack", "unmask")


class BatchSizes(NamedTuple):
    """How many images are worked on at a time."""

    natural: int  # by their size and the device
    asked: int | None  # by the user
    values: int  # of an image

    @property
    def usual(self) -> int:
        """What was asked for, or the natural size."""
        return self.asked or self.natural

    def choose_size(self, attack: Attack) -> int:
        """Choose the size for an attack: less of images that take seconds each.

        So progress is seen; more for attacks in stages, of which most time goes into the few
        images that reach the last ones, and a block of the network costs as much if it is not
        full. For foreign attacks batches are part of the result and never the user's choice.
        """
        if attack.foreign:
            return self.natural
        if self.asked is not None:
            return self.asked
        if attack.spec.name in WIDE:
            return max(self.natural, min(1024, TOGETHER // self.values))
        if attack.spec.name in THINNING:
            return 2 * self.natural
        slow = "interpreter" in attack.resolved or needs_detector(attack.spec)
        return self.natural // 4 if slow else self.natural


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
        self.answers = answers or Answers()
        self.store = store
        self.targets = list(targets)
        self.undefended = targets[0]
        self.pool: Pool | None = None  # of processes that do the work; this one if None
        self.batches = batches
        values = int(np.prod(plan.data.shape))
        self.shrinking = Shrinking([target.model for target in targets], values)
        batches.shrink = self.shrinking.shrink_blocks
        natural = choose_batch_size(values, plan.classifier.device)
        self.sizes = BatchSizes(natural, batch_size, values)
        self.planters: dict[str, Planter] = {}

    def measure_clean(self, key: str, target: Target) -> Columns:
        """Every image as it is."""
        found = self.batches.map(
            f"Clean accuracy{target.suffix}",
            key,
            self._split(np.arange(len(self.plan.index)), self.sizes.usual),
            partial(measure_clean, self.plan, target, self.undefended.clean),
            run=self._hand_out(Task("clean", self.targets.index(target))),
        )
        kind = None if target.defended is None else target.defended.kind
        check_clean(found, kind, self.plan.index)
        if self.plan.share is not None:
            self.plan.share.check_images(found["id"])
        return found

    def measure_quality(self, key: str, measurement: Measurement, most: int) -> Columns:
        """What maps are worth: of the first images that were right, nan for the others."""
        clean = self.undefended.clean
        right = metrics.find_right(clean)
        rows = self._own(np.flatnonzero(right)[:most])
        found = self.batches.map(
            "What the maps are worth",
            key,
            self._split(rows, self.sizes.usual),
            partial(measure_quality, self.plan, measurement, clean),
            run=self._hand_out(Task("quality", 0)),
        )
        columns = {name: np.full(len(right), np.nan) for name in measurement.name_worth()}
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
        batches = self._split_attacked(attack, rows if shown else rows[:PROBED])
        rows = np.sort(np.concatenate([*batches, rows[:0]]))
        gallery = Gallery(self.store.read_candidates(keys[0])) if shown else None
        self.shrinking.notes = []
        if shown:
            self._check_images(keys)
        found = self._attack_rows(attack, target, defended, measurement, gallery, keys, batches)
        outcomes = []
        for i, each in enumerate((target, *defended)):
            positions = self._list_judged(each, rows) if shown else rows
            maps = measurement.name_columns() if measurement is not None and i == 0 else ()
            outcome = Outcome(
                attack=attack.spec,
                threat=attack.threat,
                knowledge=attack.knowledge,
                columns=place_columns(each.clean, positions, rows, found[i], maps),
                role=TRANSFER if each.receives else attack.role,
                notes=tuple(dict.fromkeys(self.shrinking.notes)) if i == 0 else (),
                resolved=attack.resolved,
                defense=each.spec,
                adaptive=i == 0,
            )
            check_outcome(outcome, take_rows(each.clean, positions) if shown else each.clean)
            outcomes.append(outcome)
        if gallery is None or not len(rows) or self.plan.share is not None:
            return outcomes, ()
        pictures = gallery.choose_pictures(measure_hardness(found[0], attack.threat))
        check_pictures(pictures, outcomes[0].columns)
        return outcomes, pictures

    def run_active_test(self, key: str, attack: Attack, target: Target) -> Outcome:
        """What an attack finds of what is planted around the first images that are right.

        UsageError if nothing can be planted on this network.
        """
        values = int(np.prod(self.plan.data.shape))
        right = np.flatnonzero(metrics.find_right(target.clean))
        if reason := self.answers.explain(f"planting{target.suffix}", lambda: self._try(target)):
            raise UsageError(reason)
        count = self.answers.count(
            f"planted{target.suffix}", lambda: count_images(target.model, values)
        )
        rows = self._own(right[:count])

        def measure(some: Positions) -> Columns:
            planter = self._find_planter(target)
            return measure_planted(self.plan, target, planter, attack, some)

        found = self.batches.map(
            f"Planted examples, {attack.spec}{target.suffix}",
            key,
            self._split(rows, self.sizes.usual),
            measure,
        )
        return Outcome(
            attack=attack.spec,
            threat=attack.threat,
            knowledge=attack.knowledge,
            columns=place_columns(target.clean, rows, rows, found),
            role=PLANTED,
            resolved=attack.resolved,
            defense=target.spec,
        )

    def _try(self, target: Target) -> str:
        """Why nothing can be planted on a network; empty if something can."""
        try:
            self._find_planter(target)
        except UsageError as error:
            return error.message
        return ""

    def _find_planter(self, target: Target) -> Planter:
        """The one of a target, for all its attacks."""
        planter = self.planters.get(target.suffix)
        if planter is None:
            x = self.plan.data.batch(self.plan.index[:2]).x.to(target.model.device)
            planter = self.planters[target.suffix] = Planter(target.model, x)
            # where memory runs out it gets smaller batches as the network itself does
            self.shrinking.models.append(planter.features)
        return planter

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
            run=self._hand_out(
                Task(
                    "attack",
                    self.targets.index(target),
                    attack.spec,
                    attack.role,
                    tuple(self.targets.index(each) for each in defended),
                    maps=measurement is not None,
                ),
                gallery,
                whole=attack.foreign,
            ),
            # before the columns: what these say is done is not offered again
            before_saving=keep_candidates,
        )

    def _check_images(self, keys: Sequence[str]) -> None:
        """Throw away what is finished of cells if images of it are to be kept and were not."""
        parts, images = self.store.parts, self.store.images
        if images is None:
            return
        found = [part["row"] for part in parts.read_parts(keys[0])]
        if found and not images.holds(keys[0], np.concatenate(found)):
            for key in keys:
                parts.remove_parts(key)

    def _hand_out(
        self, task: Task, gallery: Gallery | None = None, *, whole: bool = False
    ) -> Runner | None:
        """Who does a task: the pool, if there is one. Batches are split unless they are `whole`."""
        pool = self.pool
        if pool is None:
            return None

        def run(batches: Sequence[Positions]) -> Iterator[Sequence[Piece]]:
            seen = [
                Seen(each.clean, each.found, each.company, each.model.block)
                for each in self.targets
            ]
            if not whole:
                batches = split_finely(batches, pool.size, self.sizes.natural // 4)
            for computed in pool.compute(task, seen, batches):
                self.shrinking.notes += computed.notes
                if computed.error is not None and computed.broken is not None:
                    raise DefenseBroke(computed.error.message, self.targets[computed.broken])
                if computed.error is not None:
                    raise computed.error
                if gallery is not None and computed.candidates:
                    gallery.join(computed.candidates)
                yield computed.pieces

        return run

    def _own(self, rows: Positions) -> Positions:
        """Those of some rows that are attacked here: of this share, or all of them."""
        share = self.plan.share
        return rows if share is None else share.own(rows, self.undefended.clean["id"])

    def _split_attacked(self, attack: Attack, rows: Positions) -> list[Positions]:
        """Batches of those rows that are attacked here.

        Where batches are part of the result, they are those of the whole run, and a share has some.
        """
        size = self.sizes.choose_size(attack)
        if not attack.foreign:
            return self._split(self._own(rows), size)
        batches = self._split(rows, size)
        return batches if self.plan.share is None else self.plan.share.choose(batches)

    def _list_judged(self, target: Target, attacked: Positions) -> Positions:
        """The images of a cell: those attacked here, and its own that were wrong before."""
        wrong = np.flatnonzero(~metrics.find_right(target.clean))
        return np.sort(np.concatenate([attacked, self._own(wrong)]))

    def _split(self, rows: Positions, size: int) -> list[Positions]:
        """Split rows by content id, where that is known, so that no order of images matters."""
        ids = self.undefended.clean.get("id", np.arange(len(self.plan.index)))
        return batch_by_id(rows, ids, size)


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
        What became of these, ``(m,)`` each.
    maps : sequence of str
        Those of `found` that say something of maps; nan for the others.
    """
    columns = fill_untouched({name: column[positions] for name, column in clean.items()})
    columns |= {name: np.full(len(positions), np.nan) for name in maps}
    columns |= {
        name: np.zeros(len(positions), values.dtype)
        for name, values in found.items()
        if name.startswith((STAGE, MADE, *CURVES))
    }
    place = np.searchsorted(positions, rows)
    open_ = columns["attacked"][place]  # the attack changed no image that was lost before
    for name, values in found.items():
        columns[name][place[open_]] = values[open_]
    return columns
