"""How the maps that explain a classifier fare under an attack on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.change_places import (
    ORDERS,
    PLACES,
    describe_thresholds,
    map_changes,
    measure_orders,
    measure_places,
)
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.quality import (
    correlate_ranks,
    measure_deletion,
    measure_insertion,
    shuffle_parameters,
)
from robusteval.interpreters.scaling import highest_cells
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.seeds import Ids, per_image, sample_seeds
from robusteval.runs.types import Columns
from robusteval.search.edges import sobel
from robusteval.search.noise import add_equal_noise_in_box

TOP = 0.2  # share of a map's cells that the intersection over union compares
EDGE = 0.1  # strength from which a pixel is on an edge, as for AdvEdge+ (arXiv:2211.15926)
CHANGES = ("map_distance", "map_iou", "map_noise")
PORTIONS = 32  # in which pixels appear or go, for that
ROOM = 256 * 2**20  # bytes of benign maps that are kept from one attack to the next

# what is drawn for an image, apart from its attack: no attack can know it
BENIGN, CHANGED, NOISE, CHANCE = (
    np.uint64(salt) for salt in (0xB5297A4D, 0x68E31DA4, 0x1B56C4E9, 0x7FEB352D)
)

Values = np.ndarray[Any, Any]


def describe_interpreters(interpreters: Sequence[Interpreter]) -> dict[str, Any]:
    """What decides the numbers of a run besides its attacks; nothing without interpreters."""
    if not interpreters:
        return {}
    return {
        "interpreters": [str(each.spec) for each in interpreters],
        "maps": {
            "top": TOP,
            "edge": EDGE,
            **describe_thresholds(),
            "interpreters": [each.describe() for each in interpreters],
        },
    }


class Measurement:
    """Measures what attacks do to maps, and what noise and another seed do to them.

    Parameters
    ----------
    model : Classifier
        What is explained, in eval mode.
    interpreters : sequence of Interpreter
        Whose maps are looked at.
    seed : int
        That of the run.
    """

    def __init__(self, model: Classifier, interpreters: Sequence[Interpreter], seed: int) -> None:
        self.model = model
        self.interpreters = interpreters
        self.seed = seed
        self.benign = BenignMaps(model, seed)

    def name_columns(self) -> list[str]:
        """The columns that `measure_columns` gives."""
        each = [
            f"{what}:{i.spec}"
            for i in self.interpreters
            for what in (*CHANGES, *ORDERS, *PLACES, *(["map_floor"] * i.seeded))
        ]
        return [*each, "edge_energy", "edge_area"]

    def measure_columns(
        self, x: Tensor, x_adv: Tensor, ids: Ids, pred: Values, pred_adv: Values
    ) -> Columns:
        """Measure what became of the maps of some images.

        Parameters
        ----------
        x, x_adv : Tensor
            Images ``(n, c, h, w)`` before and after an attack.
        ids : ndarray
            Content ids ``(n,)``.
        pred, pred_adv : ndarray
            Predicted classes ``(n,)`` before and after: those whose maps are compared. Where it
            is -1 there is no map, and nan in its columns.

        Returns
        -------
        Columns
            Arrays ``(n,)`` by `name_columns`: mean absolute difference of the two maps and
            intersection over union of their highest cells; the former under noise of the same l2
            size, and between two seeds without any change; how the two maps are ordered, and
            whether the change lies where the benign one is high, see
            `robusteval.evaluation.change_places`; share of the squared change on edges, and of
            the pixels that are on edges. And for pictures the maps themselves
            ``(n, h', w')``, as ``benign:NAME`` and ``changed:NAME``.
        """
        seeds = sample_seeds(self.seed, ids ^ CHANGED)
        z = add_equal_noise_in_box(x_adv, x, sample_seeds(self.seed, ids ^ NOISE))
        with torch.no_grad():
            pred_noisy = predict_classes(self.model(z)).cpu().numpy()
        found = measure_edges(x, x_adv)
        changes = map_changes(x, x_adv, z)
        for each in self.interpreters:
            benign, floors = self.benign.draw(each, x, ids, pred)
            changed = explain_predictions(each, self.model, x_adv, pred_adv, seeds)
            under_noise = explain_predictions(each, self.model, z, pred_noisy, seeds)
            found |= {
                f"map_distance:{each.spec}": measure_distances(changed, benign),
                f"map_iou:{each.spec}": measure_overlaps(changed, benign),
                f"map_noise:{each.spec}": measure_distances(under_noise, benign),
                f"benign:{each.spec}": benign,
                f"changed:{each.spec}": changed,
            }
            more = measure_orders(changed, benign)
            more |= measure_places(x, x_adv, z, benign, changes)
            found |= {f"{name}:{each.spec}": values for name, values in more.items()}
            if each.seeded:
                found[f"map_floor:{each.spec}"] = floors
        return found

    def name_worth(self) -> list[str]:
        """The columns that `measure_worth` gives."""
        whats = ("insertion", "deletion", "chance_insertion", "chance_deletion", "forgotten")
        return [f"{what}:{each.spec}" for each in self.interpreters for what in whats]

    def measure_worth(self, x: Tensor, ids: Ids, pred: Values) -> Columns:
        """Measure whether the maps of images as they are say anything about the network.

        Parameters
        ----------
        x : Tensor
            Images ``(n, c, h, w)``.
        ids : ndarray
            Content ids ``(n,)``.
        pred : ndarray
            Predicted classes ``(n,)``, none of them -1.

        Returns
        -------
        Columns
            Arrays ``(n,)`` by `name_worth`: insertion and deletion AUC of each map and, by chance,
            of random cells of the same resolution; and the rank correlation with the map that the
            network has when its parameters are shuffled (nan for masks of a network that only its
            content names: they are not made for any other). See
            `robusteval.interpreters.quality`.
        """
        y = torch.from_numpy(pred).to(x.device)
        forgetful = shuffle_parameters(self.model, self.seed)
        found: Columns = {}
        by_chance: dict[tuple[int, ...], tuple[Values, Values]] = {}
        for each in self.interpreters:
            maps, _ = self.benign.draw(each, x, ids, pred)
            size = maps.shape[1:]
            if size not in by_chance:
                drawn = per_image(sample_seeds(self.seed, ids ^ CHANCE), torch.Size(size))
                by_chance[size] = self.measure_areas(x, y, drawn.numpy())
            insertion, deletion = self.measure_areas(x, y, maps)
            found |= {
                f"insertion:{each.spec}": insertion,
                f"deletion:{each.spec}": deletion,
                f"chance_insertion:{each.spec}": by_chance[size][0],
                f"chance_deletion:{each.spec}": by_chance[size][1],
                f"forgotten:{each.spec}": self.measure_likeness(
                    each, forgetful, x, ids, pred, maps
                ),
            }
        return found

    def measure_areas(self, x: Tensor, y: Tensor, maps: Values) -> tuple[Values, Values]:
        """Insertion and deletion AUC ``(n,)`` of maps ``(n, h', w')``."""
        given = self.model, x, y, torch.from_numpy(maps).to(x.device).unsqueeze(1)
        steps = min(PORTIONS, x.shape[2] * x.shape[3])
        insertion, deletion = (
            measure_insertion(*given, steps=steps),
            measure_deletion(*given, steps=steps),
        )
        return insertion.double().cpu().numpy(), deletion.double().cpu().numpy()

    def measure_likeness(
        self,
        interpreter: Interpreter,
        forgetful: Classifier,
        x: Tensor,
        ids: Ids,
        pred: Values,
        maps: Values,
    ) -> Values:
        """Rank correlation ``(n,)`` of maps with those of a network that forgot."""
        y, seeds = torch.from_numpy(pred).to(x.device), sample_seeds(self.seed, ids ^ BENIGN)
        try:
            others = interpreter.compute_maps(forgetful, x, y, seeds)
        except UsageError:
            return np.full(len(x), math.nan)
        one, other = (torch.from_numpy(values).unsqueeze(1) for values in (maps, others))
        likeness: Values = correlate_ranks(one, other).numpy()
        known = np.isfinite(maps).all((1, 2)) & np.isfinite(others).all((1, 2))
        return np.where(known, likeness, math.nan)


class BenignMaps:
    """The maps of images as they are: the same for all attacks of a run.

    As many as there is room for are made once.

    Parameters
    ----------
    model : Classifier
        What is explained, in eval mode.
    seed : int
        That of the run.
    """

    def __init__(self, model: Classifier, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.room = ROOM  # bytes that are left
        self._kept: dict[tuple[str, int], tuple[Values, float]] = {}

    def draw(
        self, interpreter: Interpreter, x: Tensor, ids: Ids, pred: Values
    ) -> tuple[Values, Values]:
        """Maps ``(n, h', w')`` for predicted classes, and how far another seed takes each ``(n,)``.

        Parameters
        ----------
        interpreter : Interpreter
            Whose maps.
        x : Tensor
            Images ``(n, c, h, w)``.
        ids : ndarray
            Content ids ``(n,)``.
        pred : ndarray
            Predicted classes ``(n,)``; a map is nan where it is -1.
        """
        name = str(interpreter.spec)
        new = np.array([(name, content) not in self._kept for content in ids.tolist()])
        made: dict[int, tuple[Values, float]] = {}
        if new.any():
            some = x[torch.from_numpy(new).to(x.device)]
            seeds = sample_seeds(self.seed, ids[new] ^ BENIGN)
            maps = explain_predictions(interpreter, self.model, some, pred[new], seeds)
            floors = np.zeros(len(maps))
            if interpreter.seeded:
                seeds = sample_seeds(self.seed, ids[new] ^ CHANGED)
                other = explain_predictions(interpreter, self.model, some, pred[new], seeds)
                floors = measure_distances(other, maps)
            made = dict(
                zip(ids[new].tolist(), zip(maps, floors.tolist(), strict=True), strict=True)
            )
        whole = [self._kept.get((name, content)) or made[content] for content in ids.tolist()]
        for content, (values, floor) in made.items():
            if values.nbytes <= self.room:
                self.room -= values.nbytes
                self._kept[name, content] = (values.copy(), floor)
        return np.stack([values for values, _ in whole]), np.array([floor for _, floor in whole])


def explain_predictions(
    interpreter: Interpreter, model: Classifier, x: Tensor, pred: Values, seeds: Tensor
) -> Values:
    """Maps ``(n, h', w')`` of images ``(n, c, h, w)`` for the classes predicted on them ``(n,)``.

    nan where the class is -1, that is where there is none.
    """
    y = torch.from_numpy(pred).to(x.device)
    maps = interpreter.compute_maps(model, x, y.clamp_min(0), seeds)
    if (pred < 0).any():
        maps = np.where((pred < 0)[:, None, None], np.float32(np.nan), maps)
    return maps


def measure_distances(maps: Values, benign: Values) -> Values:
    """Mean absolute difference ``(n,)`` of maps ``(n, h', w')``, in float64.

    Image by image, so that the order of no sum depends on the batch.
    """
    pairs = zip(maps, benign, strict=True)
    return np.array([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs])


def measure_overlaps(maps: Values, benign: Values, share: float = TOP) -> Values:
    """Intersection over union ``(n,)`` of the highest cells of maps ``(n, h', w')``.

    1 where neither map has any, nan where one is not finite. See `highest_cells`.
    """
    found = np.full(len(maps), math.nan)
    for i, (a, b) in enumerate(zip(maps, benign, strict=True)):
        if np.isfinite(a).all() and np.isfinite(b).all():
            flat = torch.from_numpy(np.stack([a.ravel(), b.ravel()]))
            one, other = highest_cells(flat, share)
            union = int((one | other).sum())
            found[i] = int((one & other).sum()) / union if union else 1.0
    return found


def measure_edges(x: Tensor, x_adv: Tensor) -> Columns:
    """Share of the squared change on edges, nan without a change, and of the pixels there."""
    edges = (sobel(x) > EDGE).squeeze(1).cpu().numpy()  # (n, h, w)
    energy, area = np.full(len(x), math.nan), np.zeros(len(x))
    for i, on in enumerate(edges):
        squares = (x_adv[i].double() - x[i].double()).square().sum(0).cpu().numpy()
        if squares.any():
            energy[i] = squares[on].sum() / squares.sum()
        area[i] = on.mean()
    return {"edge_energy": energy, "edge_area": area}
