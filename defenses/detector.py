"""A detector of attacked images by the maps of several interpreters, and the file it is kept in."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.defense import WithDetector
from robusteval.evaluation.defense_files import is_detector
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.classifier import MADE_FROM, Classifier, absorb
from robusteval.models.identity import hash_model
from robusteval.models.seeds import Ids
from robusteval.models.weights import (
    CHECKSUM,
    compute_checksum,
    serialise_safetensors,
    split_safetensors,
)
from robusteval.registry import DEFENSES
from robusteval.runs.reading import WEIGHTS, check_regular, read_bytes
from robusteval.runs.writing import write_atomically
from robusteval.search.balls import quantise

from .boosting import FPRS, Trees, smooth_odds
from .detector_view import View, hash_mask_network, parse_view
from .imitation import Imitator
from .map_features import (
    build_extractor,
    wrap_extractor,
)

NOTES = "detector"  # in the header of the file: settings as JSON
BOOSTER = "booster"  # and the trees as XGBoost writes them
FORMAT = 1
WIDTH = 0.25  # over which the splits of the stand-in are blurred, in deviations of a feature


@DEFENSES.add("detector")
def attach_detector(model: Classifier, *, file: str = "", fpr: float = 0.05) -> Classifier:
    """Flag images whose explanations are not like those of images as they are.

    The "adversarial detector" of arXiv:2211.15926, section VII: maps of several interpreters as
    channels of one image, features of a convolutional network, gradient boosting. Reconstructed,
    as no code was published; the statistics of how maps agree are an addition. What is predicted
    stays the same.

    Parameters
    ----------
    model : Classifier
        The one it was fitted on.
    file : str
        Written by `robusteval defend detector`.
    fpr : float
        Share of images as they are that may be flagged, 0.05 or 0.01: which of the thresholds
        found at the fit is used.

    Returns
    -------
    Classifier
        The same one, `WithDetector`.

    Raises
    ------
    ValueError
        If no file is given or there is no threshold for `fpr`.
    UsageError
        If the file is missing, damaged, or was fitted on another model.
    """
    if not file:
        raise ValueError("say which file: detector:file=FILE")
    if fpr not in FPRS:
        known = " or ".join(f"{each:g}" for each in FPRS)
        raise ValueError(f"fpr must be {known}, not {fpr:g}")
    found = MapDetector.load_file(file)
    found.check_model(model, Path(file).name)
    return WithDetector(model, replace(found, fpr=fpr).to(model.device))


@dataclass(frozen=True)
class Fit:
    """What a detector was made from, and where it raises the alarm."""

    model: dict[str, Any]  # sha256, mean and std of the classifier
    rts: str | None  # SHA-256 of the mask network of rts, if its maps are looked at
    thresholds: dict[str, float]  # by false-positive rate
    forwards: float  # per prediction, its own included; a backward pass counts two
    attacks: tuple[str, ...]
    data: str
    train: int  # source images that trees and features were fitted on
    validation: int  # and those that decided when to stop, and the thresholds
    rounds: int
    seed: int


@dataclass(frozen=True)
class MapDetector:
    """Says how suspicious an image is by its maps; a `robusteval.evaluation.defense.Detector`."""

    view: View
    fit: Fit
    extractor: Classifier  # from stacks to features
    center: Tensor  # (d,), of all features on the images it was fitted on
    spread: Tensor
    booster: str  # XGBoost's JSON
    seen: Ids  # content of all images that had a say
    fpr: float = FPRS[0]
    sha256: str = ""  # of its file
    imitator: Imitator | None = None  # of its trees, for those who attack it

    @property
    def explainers(self) -> tuple[Interpreter, ...]:
        """The interpreters whose maps it looks at."""
        return self.view.differentiable

    @property
    def threshold(self) -> float:
        """An image is flagged if its score is above."""
        return self.fit.thresholds[f"{self.fpr:g}"]

    @cached_property
    def trees(self) -> Trees:
        """What makes scores of features."""
        return Trees.parse_booster(self.booster, len(self.center))

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of it."""
        return {
            "threshold": self.threshold,
            "fpr": self.fpr,
            "forwards": self.fit.forwards,
            "interpreters": list(self.view.interpreters),
            "channels": self.view.channels,
            "extractor": self.view.extractor,
            "confidence": self.view.confidence,
            "attacks": list(self.fit.attacks),
            "data": self.fit.data,
            "images": {"train": self.fit.train, "validation": self.fit.validation},
            "sha256": self.sha256,
        }

    def features(self, model: Classifier, maps: list[Tensor], logits: Tensor) -> Tensor:
        """Compute all that decides the score ``(n, d)``, each on the same scale, on the graph.

        Parameters
        ----------
        model : Classifier
            Not used: maps and logits say it all.
        maps : list of Tensor
            ``(n, 1, h', w')`` of each interpreter, scaled.
        logits : Tensor
            ``(n, classes)`` that came with them.
        """
        del model
        stack, found = self.view.measure_maps(maps, logits)
        return (torch.cat([self.extractor(stack), found], 1) - self.center) / self.spread

    def smooth_odds(self, features: Tensor) -> Tensor:
        """A stand-in of the score with a derivative: log odds ``(n,)`` of features ``(n, d)``."""
        return smooth_odds(self.trees, features, WIDTH)

    @property
    def imitate_odds(self) -> Callable[[Tensor], Tensor] | None:
        """Another stand-in, a network that was fitted to the score; None if there is none."""
        return None if self.imitator is None else self.imitator.imitate_odds

    def score(self, model: Classifier, x: Tensor, seeds: Tensor) -> Tensor:
        """Score how likely images ``(n, c, h, w)`` are attacked, ``(n,)`` float64 in [0, 1]."""
        if len(x) == 0:
            return torch.zeros(0, dtype=torch.float64, device=x.device)
        with torch.no_grad():
            maps, logits = self.view.compute_maps(model, quantise(x), seeds)
            found = self.features(model, maps, logits)
        return torch.from_numpy(self.trees.predict_scores(found.cpu().numpy())).to(x.device)

    def to(self, device: torch.device) -> MapDetector:
        """Move the detector to a device."""
        self.extractor.to(device)
        if self.imitator is not None:
            self.imitator.to(device)
        return replace(self, center=self.center.to(device), spread=self.spread.to(device))

    def check_model(self, model: Classifier, name: str) -> None:
        """Raise UsageError if the detector in the file `name` was not fitted on this model."""
        if identify_classifier(model) != self.fit.model:
            raise UsageError(
                f"{name} is a detector for another model: it was fitted on the checkpoint with"
                f" SHA-256 {str(self.fit.model['sha256'])[:16]} and its normalisation, and says"
                " nothing of others; fit one with `robusteval defend detector`"
            )
        self.view.check_network(model)
        if hash_mask_network(self.view, model) != self.fit.rts:
            raise UsageError(
                f"{name} was fitted with another mask network of rts than the one in the cache"
                " folder, so it would see other maps: fit it anew"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; equal detectors give equal bytes."""
        state = self.extractor.state_dict()
        tensors = {f"extractor.{name}": value for name, value in state.items()}
        tensors |= {"center": self.center, "spread": self.spread}
        if self.imitator is not None:
            tensors |= {f"imitator.{n}": value for n, value in self.imitator.state_dict().items()}
        tensors["seen"] = torch.from_numpy(self.seen.view(np.int64))
        settings = {"format": FORMAT, "view": asdict(self.view), "fit": asdict(self.fit)}
        notes = {
            NOTES: json.dumps(settings, sort_keys=True, allow_nan=False),
            BOOSTER: self.booster,
        }
        write_atomically(Path(path), serialise_safetensors(tensors, notes))

    @classmethod
    def load_file(cls, path: str | os.PathLike[str]) -> MapDetector:
        """Load the detector in a file; nothing in it is executed.

        Raises
        ------
        UsageError
            If there is none, or it is damaged.
        """
        path = Path(path)
        check_regular(path, WEIGHTS)
        if not os.path.isfile(path):
            raise UsageError(f"there is no file {path}")
        if not is_detector(path):
            raise UsageError(f"{path} is no detector: `robusteval defend detector` writes them")
        try:
            raw = read_bytes(path, WEIGHTS)
            header, body = split_safetensors(raw)
            notes = header["__metadata__"]
            if notes.get(CHECKSUM) != compute_checksum(header, body):
                raise ValueError("other bytes than were written")
            settings = json.loads(notes[NOTES])
            if settings["format"] != FORMAT:
                raise UsageError(
                    f"{path} was written by another version of robusteval: fit it anew"
                )
            found = assemble_detector(settings, safetensors.torch.load(raw), notes)
            return replace(found, sha256=hashlib.sha256(raw).hexdigest())
        except UsageError:
            raise
        except Exception:  # whatever a file that is not ours makes of this
            raise UsageError(f"{path} is truncated or damaged; fit or copy it again") from None


def assemble_detector(
    settings: dict[str, Any], tensors: Mapping[str, Tensor], notes: Mapping[str, str]
) -> MapDetector:
    """Assemble a detector from the parts of a file; any exception if they do not fit."""
    view = parse_view(settings["view"])
    fit = parse_fit(settings["fit"])
    state, imitated = (
        {n.removeprefix(part): value for n, value in tensors.items() if n.startswith(part)}
        for part in ("extractor.", "imitator.")
    )
    mean, std = (state[name].flatten().tolist() for name in ("mean", "std"))
    extractor = wrap_extractor(
        build_extractor(view.extractor, view.planes), view.extractor, mean, std
    )
    extractor.load_state_dict(state)
    imitator = None
    if imitated:  # files from before have none
        imitator = Imitator(view.feature_count).requires_grad_(False).eval()
        imitator.load_state_dict(imitated)
    found = MapDetector(
        view,
        fit,
        extractor,
        tensors["center"],
        tensors["spread"],
        notes[BOOSTER],
        tensors["seen"].numpy().view(np.uint64),
        imitator=imitator,
    )
    every = [*state.values(), *imitated.values(), found.center, found.spread]
    sound = (
        len(mean) == view.planes
        and found.center.shape == found.spread.shape == (view.feature_count,)
        and found.seen.ndim == 1
        and all(bool(value.isfinite().all()) for value in every)
        and bool((found.spread > 0).all())
        and len(found.trees.left) > 0
    )
    if not sound:
        raise ValueError("tensors of other shapes")
    return found


def parse_fit(facts: dict[str, Any]) -> Fit:
    """Parse a fit of a detector's file; any exception if it is not sound."""
    fit = Fit(**{**facts, "attacks": tuple(map(str, facts["attacks"]))})
    numbers = [*fit.thresholds.values(), fit.forwards]
    if set(fit.thresholds) != {f"{fpr:g}" for fpr in FPRS} or not all(map(math.isfinite, numbers)):
        raise ValueError("thresholds that are none")
    return fit


def identify_classifier(model: Classifier) -> dict[str, Any]:
    """Identify a classifier: by the hash of its file or, without one, of its tensors."""
    sha256 = model.identity.get("sha256")
    if MADE_FROM in model.identity:
        sha256 = hash_model(model)
    elif sha256 is None:
        content = hashlib.sha256()
        absorb(content, model.network.state_dict())
        sha256 = content.hexdigest()
    mean, std = (value.flatten().tolist() for value in (model.mean, model.std))
    return {"sha256": sha256, "mean": mean, "std": std}
