"""The runs that a paper takes on a network: which there are, and the plan of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from robusteval.analysis.papers.declaration import Paper, Size
from robusteval.art.field_names import check_attack
from robusteval.datasets.chosen import choose_images
from robusteval.datasets.class_names import match_classes
from robusteval.datasets.dataset import Data, Positions, draw
from robusteval.evaluation.plan import Plan, prepare_plan
from robusteval.evaluation.shares import Share
from robusteval.models.classifier import Classifier
from robusteval.progress import Progress, Silent
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.types import Spec


class PaperRun(NamedTuple):
    """One of the runs of a paper; `again` are those with another seed on the same images."""

    kind: Literal["run", "hardened", "again"]
    seed: int

    @property
    def folder(self) -> str:
        """Where it is kept below the folder of the paper."""
        return f"seeds/{self.seed}" if self.kind == "again" else self.kind


@dataclass(frozen=True)
class Subject:
    """A paper, and the network that it is measured on.

    Parameters
    ----------
    paper : Paper
        See `robusteval.analysis.papers.declaration.read_paper`.
    classifier : Classifier
        What is attacked.
    data : Data
        The images.
    size : {"small", "paper"}
        How much is run.
    samples : int, optional
        Images; as the size says if not given, which also says how many of them are explained.
    seed : int
        Decides the draw and every random number.
    targets : mapping of str to Classifier
        Other networks that the images are shown to; tables of transfer are of the first.
    hardened : mapping of str to Classifier
        One network by its name that was trained as the paper proposes, or none: what has rows of
        such a one attacks it as well, on the same images.
    share : Share, optional
        Of the images, which alone are attacked; all if not given.
    """

    paper: Paper
    classifier: Classifier
    data: Data
    size: str = "small"
    samples: int | None = None
    seed: int = 0
    targets: Mapping[str, Classifier] = field(default_factory=dict)
    hardened: Mapping[str, Classifier] = field(default_factory=dict)
    share: Share | None = None

    @property
    def scale(self) -> Size:
        """What is run at this size."""
        return self.paper.choose_size(self.size)

    @property
    def attacks(self) -> dict[str, tuple[str, ...]]:
        """The attacks by short name, several of a sweep, for images of this size."""
        return self.paper.list_attacks(self.size, int(np.prod(self.data.shape)))

    def name_attacks(self) -> dict[str, tuple[str, ...]]:
        """The attacks by short name, as they are called in the run."""
        return {
            name: tuple(str(check_attack(parse(text))) for text in each)
            for name, each in self.attacks.items()
        }

    def draw_images(self) -> tuple[Data, Positions]:
        """The images with labels as the network counts them, and which of them every run takes."""
        model = self.classifier
        data = match_classes(self.data, model.num_classes, model.class_names)
        return data, draw(len(data), self.samples or self.scale.samples, self.seed)

    def list_runs(self) -> Iterator[PaperRun]:
        """The runs, the one that tables are filled from first."""
        yield PaperRun("run", self.seed)
        if self.hardened and self.paper.compares_hardened:
            yield PaperRun("hardened", self.seed)
        for other in range(1, self.scale.seeds if self.paper.chaotic else 1):
            yield PaperRun("again", self.seed + other)

    def prepare(
        self,
        run: PaperRun,
        *,
        fingerprint: str | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """The plan of a run, see `prepare_plan`; what the network cannot have is left out."""
        if run.kind == "again":
            return self._prepare_again(run.seed, fingerprint, progress)
        named = dict.fromkeys(text for each in self.name_attacks().values() for text in each)
        attacks = [parse(text) for text in named]
        interpreters = [
            INTERPRETERS.check_spec(parse(text)) for text in self.paper.list_interpreters(self.size)
        ]
        plain = run.kind == "run"
        return prepare_plan(
            self.classifier if plain else next(iter(self.hardened.values())),
            self.data,
            attacks,
            samples=self.samples or self.scale.samples,
            seed=run.seed,
            probes=False,
            interpreters=interpreters,
            optional=(*attacks, *interpreters),
            receivers=self.targets if plain else None,
            share=self.share,
            fingerprint=fingerprint,
            progress=progress or Silent(),
        )

    def _prepare_again(self, seed: int, fingerprint: str | None, progress: Progress | None) -> Plan:
        """The plan of the attacks that are a matter of luck, on the images of the first run."""
        attacks = self.attacks
        chaotic = [check_attack(parse(text)) for n in self.paper.chaotic for text in attacks[n]]
        return prepare_plan(
            self.classifier,
            choose_images(*self.draw_images()),  # which another seed would draw otherwise
            chaotic,
            seed=seed,
            probes=False,
            optional=chaotic,
            share=self.share,
            fingerprint=fingerprint,
            progress=progress or Silent(),
        )


def list_left_out(plan: Plan) -> dict[str, str]:
    """What the network cannot have, by attack or interpreter, with the reason."""
    return {
        finding.cell: finding.message
        for finding in plan.findings
        if finding.code == "left-out" and finding.cell is not None
    }


def list_specs_of(paper: Paper, size: str) -> list[Spec]:
    """All attacks and interpreters of a paper, to see what they need."""
    attacks = [text for each in paper.list_attacks(size).values() for text in each]
    wanted = paper.choose_size(size).detectors
    theirs = () if wanted is None else (*wanted.interpreters, *wanted.attacks.values())
    return [parse(text) for text in (*attacks, *paper.list_interpreters(size), *theirs)]
