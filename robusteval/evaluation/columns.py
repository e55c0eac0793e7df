"""A batch of images in, columns out: as they are, what their maps are worth, under attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.datasets.dataset import Batch, Positions
from robusteval.datasets.images import choose_shown
from robusteval.errors import RobustevalError, RunError
from robusteval.evaluation.batches import run_in_halves, sort_rows
from robusteval.evaluation.gallery import Gallery, measure_hardness
from robusteval.evaluation.judge import confidence, judge
from robusteval.evaluation.loss_curves import watch_losses
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.perturbing import Perturbed, choose_goals, perturb
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.shortcut_checks import BY_SHORTCUTS
from robusteval.evaluation.target import DefenseBroke, Target
from robusteval.evaluation.votes import SURVIVAL, measure_survival
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.failures import explain_no_gradient, raise_as_run_error
from robusteval.models.seeds import sample_seeds
from robusteval.models.steps import part
from robusteval.runs.types import MADE, STAGE, Columns
from robusteval.search.balls import quantise
from robusteval.search.losses import margin
from robusteval.search.stand_ins import resemble_probabilities

STEADY = 128  # images predicted twice, and under other conventions
PROBED = 64  # images whose gradients and probes are looked at
# what is another's judgement of the same images
JUDGED = ("pred_adv", "pred_8bit", "pred_png", "margin_adv", "confidence_adv", SURVIVAL)


def read_batch(plan: Plan, positions: Positions, model: Classifier) -> tuple[Batch, Tensor, Tensor]:
    """Read the images of a run at some positions ``(n,)``, and give images and labels a device."""
    batch = plan.data.batch(plan.index[positions])
    return batch, send_to(model.device, batch.x), send_to(model.device, batch.y)


def send_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the processor on a device; to a GPU by a copy that nobody waits for.

    Only memory that the system may not move can be copied so.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def measure_clean(plan: Plan, target: Target, known: Columns, positions: Positions) -> Columns:
    """Measure images as they are.

    Parameters
    ----------
    plan : Plan
        What is run.
    target : Target
        What looks at the images.
    known : Columns
        What the undefended classifier makes of all of them: behind a detector the answers are the
        same.
    positions : ndarray
        Which images ``(n,)`` of the run.

    Returns
    -------
    Columns
        Those of `robusteval.runs.types.Run.clean` and what `sanity_checks` needs, ``(n,)`` each.
    """
    model = target.model
    batch, x, y = read_batch(plan, positions, model)
    if target.detector is not None:
        same = {name: column[positions] for name, column in known.items()}
        return {**same, **target.score_images(x, plan.seed, batch.ids)}
    with (
        torch.no_grad(),
        raise_as_run_error(f"the network cannot take images {tuple(x.shape[1:])}"),
    ):
        logits = model(x)
        answers = logits if target.judge is model else target.judge(x)
    pred = predict_classes(answers)
    asked = torch.from_numpy(positions < STEADY).to(x.device)
    steady = torch.full_like(pred, -1)
    with torch.no_grad():
        again = model(x[asked])
    same_bits = (again == logits[asked]) | (again.isnan() & logits[asked].isnan())
    steady[asked] = same_bits.all(1).long()
    probed = torch.from_numpy(positions < PROBED).to(x.device)
    # an image's own slope, where others in its batch would change it
    sloping, own = (model, logits) if target.company is None else (target.judge, answers)
    slopes = measure_slopes(
        sloping, x, y, probed, partial(F.cross_entropy, reduction="sum"), margin
    )
    columns: dict[str, Tensor] = {
        "label": y,
        "pred_clean": pred,
        "margin_clean": margin(answers, y).double(),
        "confidence_clean": confidence(answers, pred),
        "steady": steady,  # 1 same logits twice, 0 not, -1 not asked
        "probabilities": resemble_probabilities(logits),
        "darkest": x.flatten(1).amin(1).double(),
        "brightest": x.flatten(1).amax(1).double(),
        "slope_ce": slopes[0],
        "slope_margin": slopes[1],
        "unsteadiness": measure_unsteadiness(sloping, own, x, y, probed),
    }
    if target.found.is_random:
        columns[SURVIVAL] = measure_survival(answers, y)
    made = {name: column.cpu().numpy() for name, column in columns.items()}
    return {"index": batch.index, "id": batch.ids, **made}


def measure_quality(
    plan: Plan, measurement: Measurement, clean: Columns, positions: Positions
) -> Columns:
    """Measure what the maps of some images are worth, see `Measurement.measure_worth`."""
    batch, x, _ = read_batch(plan, positions, measurement.model)
    return measurement.measure_worth(x, batch.ids, clean["pred_clean"][positions])


@dataclass(frozen=True)
class AttackedColumns:
    """Columns of a target under one attack, and behind defenses that the attack knows nothing of.

    Attributes
    ----------
    plan : Plan
        What is run.
    attack : Attack
        On the target.
    target : Target
        What is attacked.
    defended : sequence of Target
        What else judges the same results.
    measurement : Measurement, optional
        Measures what becomes of the target's maps.
    gallery : Gallery, optional
        Is offered the results, for pictures.
    shrink : callable
        As for `run_in_halves`.
    keep : callable, optional
        Keeps the results ``(n, c, h, w)`` of positions ``(n,)``; called before these are done.
    """

    plan: Plan
    attack: Attack
    target: Target
    defended: Sequence[Target]
    measurement: Measurement | None
    gallery: Gallery | None
    shrink: Callable[[int], object]
    keep: Callable[[Positions, np.ndarray[Any, Any]], object] | None = None

    def measure(self, positions: Positions) -> list[Columns]:
        """Attack the images at some positions ``(n,)`` of the run.

        Columns of `robusteval.runs.types.Outcome` for the target and then for each of `defended`,
        ``(n,)`` each. RunError if the attack broke or the images are others than before;
        DefenseBroke if one of `defended` did.
        """
        plan, target = self.plan, self.target
        batch, x, y = read_batch(plan, positions, target.model)
        if not np.array_equal(batch.ids, target.clean["id"][positions]):
            raise RunError(f"images of {plan.data.name} changed while they were evaluated")
        seeds = sample_seeds(plan.seed, batch.ids)
        goal = choose_goals(self.attack, y, seeds, target.model.num_classes, batch.index)
        threat = self.attack.threat
        whole = not self.attack.foreign or self.attack.knowledge == "white-box"
        with (
            part(0, 1, 1 if self.measurement is None else 2),
            watch_losses(target.model, x, goal, threat, whole=whole) as curves,
        ):
            ways = plan.shortcuts
            result = perturb(
                self.attack, target.model, x, y, seeds=seeds, goal=goal, shortcuts=ways
            )
        judged = judge(target.judge, result.x_adv, x, y)
        pred, targeted = judged["pred_adv"], threat.targeted
        is_adv = (pred == result.goal.cpu().numpy()) == targeted
        if targeted:
            is_adv &= (goal != y).cpu().numpy()  # the others are left alone
        columns = {
            **judged,
            **curves.measure(target.judge, is_adv),
            "fault": result.fault.cpu().numpy(),
            "target": result.goal.cpu().numpy() if targeted else np.full(len(x), -1),
            "forwards": result.passes.forwards.double().cpu().numpy(),
            "backwards": result.passes.backwards.double().cpu().numpy(),
            "seconds": np.full(len(x), result.seconds / len(x)),
            **{
                f"{STAGE}{name}": (cost.forwards + cost.backwards).double().cpu().numpy()
                for name, cost in result.passes.stages.items()
            },
            **{
                f"{MADE}{name}": stage.made.cpu().numpy()
                for name, stage in result.passes.stages.items()
            },
        }
        own: Columns = {}
        if result.by_shortcuts is not None:
            own[BY_SHORTCUTS] = result.by_shortcuts.cpu().numpy()
        cells = [columns | own | target.score_images(result.x_adv, plan.seed, batch.ids)]
        cells += [self._judge_behind(each, columns, batch, x, y, result) for each in self.defended]
        maps: Columns = {}
        if self.measurement is not None:
            with part(1, 2, 2):
                found = self._measure_maps(self.measurement, positions, x, result.x_adv, columns)
            cells[0] |= {name: found.pop(name) for name in self.measurement.name_columns()}
            maps = found
        self._offer_pictures(positions, batch, x, result.x_adv, columns, maps)
        if self.keep is not None:
            self.keep(positions, result.x_adv.cpu().numpy())
        return cells

    def _judge_behind(
        self, other: Target, columns: Columns, batch: Batch, x: Tensor, y: Tensor, result: Perturbed
    ) -> Columns:
        """Judge behind a defense what the attack did without knowing it."""
        judged = columns
        try:
            if other.detector is None:  # with one it answers like the classifier itself
                with raise_as_run_error("the defense broke"):
                    judged = judge(other.judge, result.x_adv, x, y)
            scores = other.score_images(result.x_adv, self.plan.seed, batch.ids)
        except RobustevalError as error:
            raise DefenseBroke(str(error), other) from error
        known = {name: column for name, column in columns.items() if name != SURVIVAL}
        return known | {name: judged[name] for name in JUDGED if name in judged} | scores

    def _measure_maps(
        self,
        measurement: Measurement,
        positions: Positions,
        x: Tensor,
        x_adv: Tensor,
        judged: Columns,
    ) -> Columns:
        """Measure what became of maps, and the maps; not booked as the attack's cost."""
        clean = self.target.clean

        def measure(some: Positions) -> Columns:
            rows = positions[some]
            return measurement.measure_columns(
                x[some],
                x_adv[some],
                clean["id"][rows],
                clean["pred_clean"][rows],
                judged["pred_adv"][some],
            )

        everything = np.arange(len(x))
        return sort_rows(run_in_halves(measure, everything, self.shrink), everything)

    def _offer_pictures(
        self,
        positions: Positions,
        batch: Batch,
        x: Tensor,
        x_adv: Tensor,
        columns: Columns,
        maps: Columns,
    ) -> None:
        """Let the gallery choose among the results."""
        if self.gallery is None:
            return

        def images(some: Positions) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            z = x[some]
            grey = to_pixels(quantise(z) * 255).round().astype(np.uint8)
            return grey, to_pixels(x_adv[some] - z)

        hard = measure_hardness(columns, self.attack.threat)
        self.gallery.offer(positions, batch.ids, hard, images, maps)


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Arrays ``(m, h, w, 1 or 3)`` of images ``(m, c, h, w)``, to be looked at."""
    return choose_shown(images).permute(0, 2, 3, 1).cpu().numpy()


def measure_unsteadiness(
    model: nn.Module, logits: Tensor, x: Tensor, y: Tensor, asked: Tensor
) -> Tensor:
    """By what share of itself the margin of images moves under noise of half a grey level ``(n,)``.

    From what it is by their `logits` ``(n, k)``. The noise is the same for all images, so that each
    is a matter of itself; NaN for those that are not asked for.
    """
    out = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
    if not bool(asked.any()):
        return out
    z, label = x[asked], y[asked]
    noise = (torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0)) - 0.5).to(z)
    before = margin(logits[asked], label)
    with torch.no_grad():
        after = margin(model((z + noise / 255).clamp(0, 1)), label)
    out[asked] = ((after - before).abs() / before.abs().clamp_min(1e-12)).double()
    return out


def measure_slopes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    asked: Tensor,
    *losses: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Largest entry of each loss's gradient at the images asked for ``(n,)``; NaN for others.

    Cross-entropy is here as torch has it, which attacks from elsewhere differentiate.
    """
    outs = [torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device) for _ in losses]
    if not bool(asked.any()):
        return outs
    z = x[asked].requires_grad_()
    try:
        logits = model(z).float()
        for out, loss in zip(outs, losses, strict=True):
            value = loss(logits, y[asked]).sum()
            grad = torch.autograd.grad(value, z, retain_graph=True)[0]
            out[asked] = grad.flatten(1).abs().amax(1).double()
    except Exception:
        if explain_no_gradient(model, x[asked]) is None:
            raise
        for out in outs:
            out[asked] = 0.0
    return outs
