"""What is attacked: the classifier as it is or behind a defense, and its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from robusteval.errors import RunError, UsageError
from robusteval.evaluation.company import choose_company
from robusteval.evaluation.defense import Defense, Detector, name_kind
from robusteval.evaluation.map_changes import Measurement
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.unmasking import Examination, examine
from robusteval.evaluation.votes import Voted
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.classifier import Classifier
from robusteval.models.failures import raise_as_run_error
from robusteval.models.seeds import Ids, sample_seeds
from robusteval.runs.storage import digest
from robusteval.runs.types import Columns, Defended, Finding, Spec, name_cell
from robusteval.search.stand_ins import Accompanied, known_company, known_network

WATCHED = np.uint64(0x5CA1AB1E0DDBA11)  # parts what a detector draws from what attacks draw


class DefenseBroke(RunError):
    """What an attack on the classifier did could not be judged behind a defense."""

    def __init__(self, message: str, target: Target) -> None:
        super().__init__(message)
        self.target = target


@dataclass
class Target:
    """A classifier as it is, or behind a defense.

    Attributes
    ----------
    model : Classifier
        What answers.
    defense : Defense, optional
        None: the classifier as it is.
    measurement : Measurement, optional
        Measures the maps of the model, where that was asked for and it can have them.
    detector : Detector, optional
        Watches the model, which then answers like the undefended one.
    clean : Columns
        The images of the run as the model sees them, ``(n,)`` each; empty until it has seen them.
    found : Examination
        What in the model leads attacks astray; nothing until it was examined.
    company : Tensor, optional
        Other images ``(m, c, h, w)`` beside which it judges each, where they change its answers.
    receives : bool
        It is no defense, but another network: what was made on the classifier is judged on it.
    """

    model: Classifier
    defense: Defense | None = None
    measurement: Measurement | None = None
    detector: Detector | None = None
    clean: Columns = field(default_factory=dict)
    found: Examination = field(default_factory=Examination)
    company: Tensor | None = None
    receives: bool = False

    @property
    def judge(self) -> nn.Module:
        """What gives verdicts: the model, or most of its answers where it answers at random.

        Where other images change its answers, it is asked beside the same ones each time.
        """
        if self.company is not None:
            return Accompanied(self.model, self.company)
        return Voted(self.model) if self.found.is_random else self.model

    def examine_model(self, plan: Plan, undefended: Examination) -> None:
        """Look for what leads attacks on the images of a plan astray; fills `found`.

        Behind a detector the network is the undefended one, and all that counts there is whether
        its answers are random or other images change them; so it is of a network that is not
        attacked.
        """
        if self.detector is None:
            self.found = examine(self.model, plan.data, plan.index)
        if self.detector is not None or self.receives:
            known = self.found if self.receives else undefended
            self.found = Examination(is_random=known.is_random, is_mixed=known.is_mixed)
        if self.found.is_mixed:
            self.company = choose_company(plan.data).to(self.model.device)

    @property
    def identity(self) -> Any:
        """What a cell's numbers depend on because of the defense, JSON-able; None without one."""
        return None if self.defense is None else self.defense.identity

    @property
    def spec(self) -> Spec | None:
        """The defense; None without one."""
        return None if self.defense is None else self.defense.spec

    @property
    def defended(self) -> Defended | None:
        """The defense, and what it does to the images as they are; None without one."""
        if self.defense is None:
            return None
        kind = "receiver" if self.receives else name_kind(self.defense)
        return Defended(self.defense.spec, kind, self.clean, self.defense.facts)

    @property
    def kind(self) -> str | None:
        """That of `defended`; None without a defense."""
        return None if self.defended is None else self.defended.kind

    @property
    def suffix(self) -> str:
        """Says in titles and messages behind which defense; nothing without one."""
        if self.defense is None:
            return ""
        return f" {'on' if self.receives else 'behind'} {self.defense.spec}"

    def name_cell(self, attack: Spec) -> str:
        """Name the cell of an attack that knows nothing of it where it has no result."""
        return f"{attack}{self.suffix}" if self.receives else name_cell(attack, self.spec, False)

    def score_images(self, x: Tensor, seed: int, ids: Ids) -> Columns:
        """Ask the detector about images ``(n, c, h, w)``: columns `score` and `flagged` ``(n,)``.

        Nothing if there is none.
        """
        if self.detector is None:
            return {}
        with raise_as_run_error("the detector broke"):
            score = self.detector.score(self.model, x, sample_seeds(seed, ids ^ WATCHED))
        columns = {"score": score.double(), "flagged": score > self.detector.threshold}
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def name_defense(self, finding: Finding) -> Finding:
        """Say in a finding behind which defense it was made."""
        if self.defense is None:
            return finding
        cell = finding.cell and f"{finding.cell}{self.suffix}"
        where = "On" if self.receives else "Behind"
        text = f"{where} {self.defense.spec}: {finding.message}"
        return finding._replace(message=text, cell=cell)


def list_targets(plan: Plan) -> list[Target]:
    """List what a plan attacks: the classifier as it is, then behind each defense."""
    targets = [Target(plan.classifier, measurement=build_measurement(plan, plan.classifier))]
    for each in plan.defenses:
        measurement = build_measurement(plan, each.model) if each.detector is None else None
        targets.append(Target(each.model, each, measurement, each.detector))
    return targets


def list_receivers(plan: Plan) -> list[Target]:
    """List the networks that what is made on the classifier as it is is judged on as well."""
    return [Target(each.model, each, receives=True) for each in plan.receivers]


def choose_other(targets: Sequence[Target], target: Target) -> tuple[str, Classifier | None]:
    """The network whose gradient may lead to what a target hides, and its name.

    For one behind a defense the undefended one; for that the first defended one, if there is one.
    """
    undefended, *defended = targets
    if target is not undefended:
        return "undefended", undefended.model
    for each in defended:
        if each.detector is None:
            return f"defended-{digest(each.identity)[:8]}", each.model
    return "", None


@contextmanager
def known_surroundings(targets: Sequence[Target], target: Target) -> Iterator[None]:
    """Let attacks inside know the other network, and the images beside which a target judges."""
    _, other = choose_other(targets, target)
    with known_network(other), known_company(target.company):
        yield


def build_measurement(plan: Plan, model: Classifier) -> Measurement | None:
    """Build what measures the maps of a model; None if nobody asked, or it cannot have them."""
    try:
        interpreters = [
            each
            if model is plan.classifier
            else Interpreter.build(each.spec, model, plan.data.shape)
            for each in plan.interpreters
        ]
    except UsageError:
        return None
    return Measurement(model, interpreters, plan.seed) if interpreters else None
