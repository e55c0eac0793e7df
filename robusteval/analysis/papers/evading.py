"""The detector of a paper under attacks that know it: the ordinary evaluation, behind a defense.

The detector learns from some images, one of the attacker's own from others, and both are judged on
images that neither has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robusteval.analysis.papers.declaration import Detectors
from robusteval.art.field_names import check_attack
from robusteval.datasets.chosen import choose_images
from robusteval.datasets.class_names import match_classes
from robusteval.datasets.dataset import Data, draw
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.plan import hide_folders, prepare_plan
from robusteval.models.classifier import Classifier
from robusteval.progress import Progress
from robusteval.registry import parse
from robusteval.runs.storage import hash_file
from robusteval.runs.types import Outcome, Spec

# fits a detector to images and writes its file: what is wanted, images, seed, file
WriteDetector = Callable[[Detectors, Data, int, Path], None]
OTHER = "made_on=other"  # in an attack: on the detector that the attacker has fitted


@dataclass(frozen=True)
class Evasion:
    """What is needed to attack the detector of a paper.

    Attributes
    ----------
    classifier : Classifier
        What is watched.
    data : Data
        All images.
    folder : Path
        Where detectors and the run are kept, and continued.
    seed : int
        Decides which images are for what, and all else that is drawn.
    start : Path, optional
        The weights that the detectors' extractor starts from, in a file. Of other weights nothing
        is continued.
    """

    classifier: Classifier
    data: Data
    folder: Path
    seed: int
    start: Path | None = None

    def run_attacks(
        self,
        wanted: Detectors,
        write: WriteDetector,
        *,
        fresh: bool,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> tuple[dict[str, Outcome], dict[str, str]]:
        """Fit both detectors, attack one, and give what came of it by the attacks' short names.

        Also why an attack has no result. UsageError if there are too few images, or the detectors
        cannot be fitted.
        """
        mine, others, unseen = self.split_images(wanted)
        folder = self.choose_folder()
        watching, other = folder / "watching.safetensors", folder / "other.safetensors"
        for path, images, seed in ((watching, mine, self.seed), (other, others, self.seed + 1)):
            if fresh or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(wanted, images, seed, path)
        plain = {name: wanted.attacks[name] for name in wanted.watching if name in wanted.attacks}
        named = {**plain, **wanted.evasions}
        asked = {name: build_attack(text, other) for name, text in named.items()}
        plan = prepare_plan(
            self.classifier,
            unseen,
            list(asked.values()),
            seed=self.seed,
            probes=False,
            defenses=[Spec("detector", {"file": str(watching)})],
            progress=progress,
        )
        run = execute(plan, folder / "run", fresh=fresh, progress=progress, stopping=stopping)
        behind = [each for each in run.attacks if each.defense is not None]
        found, missing = {}, {}
        for name, spec in asked.items():
            is_adaptive = name not in plain
            shown = hide_folders(spec)
            here = [o for o in behind if o.attack == shown and o.adaptive == is_adaptive]
            if here:
                found[name] = here[0]
            else:
                cells = [cell for cell in run.failures if cell.startswith(str(shown))]
                missing[name] = run.failures[cells[0]] if cells else "not finished"
        return found, missing

    def choose_folder(self) -> Path:
        """Where detectors that start from these weights are kept; UsageError if there are none."""
        if self.start is None:
            return self.folder
        try:  # by the content: a file of the same name may hold others
            return self.folder / hash_file(self.start)[:16]
        except OSError as error:
            raise UsageError(f"{self.start} cannot be read: {error.strerror}") from None

    def split_images(self, wanted: Detectors) -> Sequence[Data]:
        """Images for the detector, for the attacker's own, and for the attacks."""
        model = self.classifier
        data = match_classes(self.data, model.num_classes, model.class_names)
        order = draw(len(data), None, self.seed)
        needed = 2 * wanted.samples + wanted.evaded
        if len(order) < needed:
            raise UsageError(
                f"{len(order)} images are too few for a detector, another of the attacker's own and"
                f" attacks on neither's images: give at least {needed}, or fewer --samples"
            )
        n = wanted.samples
        parts = (order[:n], order[n : 2 * n], order[2 * n : needed])
        return [choose_images(data, part) for part in parts]


def build_attack(text: str, other: Path) -> Spec:
    """An attack as the paper's file has it, with the attacker's detector by its path."""
    bare = text.replace(f",{OTHER}", "")
    spec = check_attack(parse(bare))
    if bare == text:
        return spec
    return check_attack(Spec(spec.name, {**spec.parameters, "made_on": str(other)}))
