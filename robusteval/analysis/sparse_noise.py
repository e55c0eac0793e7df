"""Noise that hides the true class, noise that leads to a wrong one.

Towards Interpretable Adversarial Examples via Sparse Adversarial Attack, arXiv:2506.17250, tells
the two apart by looking at pictures: Grad-CAM and Guided Grad-CAM of the clean image for its label
beside those of the adversarial image for its prediction (`draw_portrait`). Neither paper nor code
puts a number to it; the numbers here are ours. `count_places` counts how much of the noise lies in
either map and sets it against chance. `measure_roles` asks the network instead of a map: put a
place back and see which logit moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusteval.analysis.case import Case
from robusteval.analysis.focus import DISCRIMINATIVE, choose_top
from robusteval.analysis.regions import (
    PROMOTION,
    SUPPRESSION,
    build_grid,
    measure_effects,
)
from robusteval.analysis.summaries import ANYWHERE, OF_SHARES, average_images
from robusteval.interpreters.cam import gradcam
from robusteval.interpreters.gradient import compute_guided_gradient
from robusteval.interpreters.rectifiers import guide_relu
from robusteval.interpreters.scaling import resize
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.runs.explanation_record import (
    MeanOfImages,
    PlaceFigures,
    PlaceRoles,
    SparseNoiseFigures,
)

SPARSE = 0.1  # share of places up to which changes are looked at one by one

REGIONS = ("obscuring", "leading", "both", "neither")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)


class Places(NamedTuple):
    """Where the changed places lie, for several sizes of the maps' regions; see `REGIONS`."""

    share: Tensor  # (n, q, 4), of the changed places; nan without a change
    area: Tensor  # (n, q, 4), share of the image that the region covers

    @property
    def lift(self) -> Tensor:
        """Share over area ``(n, q, 4)``: 1 is what places drawn at random would score."""
        return self.share / self.area


def count_places(
    x: Tensor,
    x_adv: Tensor,
    map_true: Tensor,
    map_wrong: Tensor,
    *,
    shares: Sequence[float] = SHARES,
) -> Places:
    """Count the changed places inside the regions that matter most to either class.

    Parameters
    ----------
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` before and after the attack.
    map_true : Tensor
        Map ``(n, 1, h', w')`` of the clean image for its label; resized if it has another size.
    map_wrong : Tensor
        Map ``(n, 1, h', w')`` of the adversarial image for the class it is predicted as.
    shares : sequence of float
        Sizes of the regions, as shares of the image: the top of each map, equal values together,
        values of zero and below never. The spread of the result over these is how much it
        depends on where the line is drawn.

    Returns
    -------
    Places
        One column per size and region: in the true class's map, in the wrong one's, in both, in
        neither.

    Raises
    ------
    ValueError
        If a share is not from 0 to 1.
    """
    changed = (x != x_adv).any(1, keepdim=True)  # (n, 1, h, w)
    share_in: list[Tensor] = []
    area_of: list[Tensor] = []
    maps = [resize(each, (x.shape[2], x.shape[3])) for each in (map_true, map_wrong)]
    for share in shares:
        hidden, led = (choose_top_positive(each, share) for each in maps)
        for inside in (hidden, led, hidden & led, ~(hidden | led)):
            share_in.append(count_flags(inside & changed) / count_flags(changed))
            area_of.append(count_flags(inside) / (x.shape[2] * x.shape[3]))
    form = (len(x), len(shares), len(REGIONS))
    return Places(torch.stack(share_in, 1).view(form), torch.stack(area_of, 1).view(form))


def choose_top_positive(maps: Tensor, share: float) -> Tensor:
    """The top `share` of each map ``(n, 1, h, w)`` with all ties, as far as it is positive."""
    line = maps.masked_fill(~choose_top(maps, share), torch.inf).amin((1, 2, 3), keepdim=True)
    return (maps >= line) & (maps > 0)


def count_flags(flags: Tensor) -> Tensor:
    """How many places of each image are flagged ``(n,)``."""
    return flags.flatten(1).sum(1).double()


class Roles(NamedTuple):
    """What putting places back does to the two logits; maps are zero where nothing changed."""

    suppression: Tensor  # (n, h, w) float64, how far a place's group holds the true logit down
    promotion: Tensor  # (n, h, w) float64, how far it holds the predicted wrong logit up
    kinds: Tensor  # (n, h, w) int64, index into robusteval.analysis.regions.KINDS
    obscuring: Tensor  # (n,), share of changed places that mostly suppress; nan without a change
    leading: Tensor  # (n,), share of those that mostly promote
    fall: Tensor  # (n,), of the true logit under the whole perturbation
    rise: Tensor  # (n,), of the wrong logit
    side: Tensor  # (n,) int64, pixels of a group's side
    failed: Tensor  # (n,) bool, the true class is still predicted: nothing obscures or leads


def measure_roles(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, groups: int = 256, chunk: int = 128
) -> Roles:
    """Tell obscuring from leading noise by what the network does without it.

    Places are put back one by one or, where more than `groups` changed, in squares of the smallest
    side (1, 2, 4, … pixels) that leaves no more. The scores and types are those of
    `robusteval.analysis.regions.measure_effects`: a place obscures if it mostly suppresses, and
    leads if it mostly promotes.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``, in eval mode.
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` before and after the attack.
    y : Tensor
        True classes ``(n,)``.
    groups : int
        Forward passes per image at most, two for the whole image aside.
    chunk : int
        Images per call of the model.

    Raises
    ------
    ValueError
        If `groups` is not positive.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, not {groups}")
    n, _, h, w = x.shape
    changed = (x != x_adv).any(1)  # (n, h, w)
    side = torch.tensor([choose_side(each, groups) for each in changed], device=x.device)
    maps = torch.zeros(2, n, h, w, dtype=torch.float64, device=x.device)
    kinds = torch.zeros(n, h, w, dtype=torch.int64, device=x.device)
    whole = torch.zeros(n, 2, dtype=torch.float64, device=x.device)
    failed = torch.zeros(n, dtype=torch.bool, device=x.device)
    for size in sorted(set(side.tolist())):
        some, regions = (side == size).nonzero().flatten(), build_grid(h, w, size).to(x.device)
        found = measure_effects(model, x[some], x_adv[some], y[some], regions, chunk=chunk)
        scores = torch.stack([found.suppression, found.promotion])  # (2, m, regions)
        maps[:, some] = scores[:, :, regions] * changed[some]
        kinds[some] = found.kinds[:, regions] * changed[some]
        whole[some] = scores.sum(2).T - found.residual
        failed[some] = found.failed
    return Roles(
        suppression=maps[0],
        promotion=maps[1],
        kinds=kinds,
        obscuring=count_flags(kinds == SUPPRESSION) / count_flags(changed),
        leading=count_flags(kinds == PROMOTION) / count_flags(changed),
        fall=whole[:, 0],
        rise=whole[:, 1],
        side=side,
        failed=failed,
    )


def choose_side(changed: Tensor, groups: int) -> int:
    """Side of the smallest squares of which at most `groups` hold a change ``(h, w)``."""
    h, w = changed.shape
    side = 1
    while side < min(h, w):
        regions = build_grid(h, w, side).to(changed.device)
        if len(set(regions[changed].tolist())) <= groups:
            return side
        side *= 2
    return min(h, w)


class Portrait(NamedTuple):
    """The picture of the paper as data, at the size of the images and not rescaled."""

    clean: Tensor  # (n, 1, h, w), Grad-CAM of the clean image for its label
    adversarial: Tensor  # (n, 1, h, w), of the adversarial image for its prediction
    clean_guided: Tensor  # (n, c, h, w), signed: the map times guided back-propagation
    adversarial_guided: Tensor  # (n, c, h, w)


def draw_portrait(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, layer: str | None = None
) -> Portrait:
    """Clean and adversarial Grad-CAM and Guided Grad-CAM, as the authors of the paper draw them.

    As in their code, guided back-propagation is that of the predicted class, also on the clean
    image.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``, in eval mode.
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` before and after the attack.
    y : Tensor
        True classes ``(n,)``.
    layer : str, optional
        Where Grad-CAM looks, see `robusteval.interpreters.cam.gradcam`.

    Raises
    ------
    ValueError
        If the network has no such layer, or no feature maps.
    """
    size = (x.shape[2], x.shape[3])
    with torch.no_grad():
        seen, fooled = (predict_classes(model(each)).clamp_min(0) for each in (x, x_adv))
    clean = resize(gradcam(model, x, y, layer=layer), size)
    adversarial = resize(gradcam(model, x_adv, fooled, layer=layer), size)
    return Portrait(
        clean,
        adversarial,
        clean * compute_guided_gradient(model, x, seen),
        adversarial * compute_guided_gradient(model, x_adv, fooled),
    )


def measure_noise(
    model: Classifier,
    case: Case,
    maps: dict[str, dict[str, Tensor]],
    fooled: Tensor,
) -> SparseNoiseFigures | None:
    """Measure whether sparse noise obscures the true class or leads to the wrong one.

    See arXiv:2506.17250. None where changes are not sparse: then every place is one of them.
    """
    x, x_adv, y = case.x[fooled], case.x_adv[fooled], case.y[fooled]
    changed = (x != x_adv).any(1).flatten(1).double().mean(1)
    if "gradcam" not in maps or not len(x) or float(changed.median()) > SPARSE:
        return None
    views = maps["gradcam"]
    lying = count_places(
        x,
        x_adv,
        views["clean, label"][fooled],
        views["adversarial, predicted"][fooled],
        shares=[DISCRIMINATIVE],
    )
    acting = measure_roles(model, x, x_adv, y)

    def average(values: Tensor, within: tuple[float, float] = ANYWHERE) -> MeanOfImages:
        return average_images(values.cpu().numpy(), within)

    return SparseNoiseFigures(
        top=DISCRIMINATIVE,
        places={
            name: PlaceFigures(
                share=average(lying.share[:, 0, column], OF_SHARES),
                lift=average(lying.lift[:, 0, column], (0.0, math.inf)),
            )
            for column, name in enumerate(REGIONS)
        },
        roles=PlaceRoles(
            obscuring=average(acting.obscuring, OF_SHARES),
            leading=average(acting.leading, OF_SHARES),
            fall=average(acting.fall),
            rise=average(acting.rise),
        ),
    )


def calls_rectifiers(model: nn.Module, x: Tensor) -> bool:
    """Whether a network has ReLUs that guided back-propagation follows."""
    with guide_relu() as rectifiers, torch.enable_grad():
        model(x.detach().requires_grad_())
    return bool(rectifiers.met)


def draw_portraits(
    model: Classifier, case: Case, maps: dict[str, dict[str, Tensor]], layer: str | None
) -> dict[str, Tensor]:
    """Draw Grad-CAM and Guided Grad-CAM before and after, each on the scale of both.

    Empty for a network without such maps, or without ReLUs to guide, as most transformers are.
    """
    if "gradcam" not in maps or not calls_rectifiers(model, case.x[:1]):
        return {}
    drawn = draw_portrait(model, case.x, case.x_adv, case.y, layer=layer)
    found = {}
    for one, other in (("clean", "adversarial"), ("clean_guided", "adversarial_guided")):
        pair = [getattr(drawn, name) for name in (one, other)]
        largest = torch.maximum(*(z.abs().amax((1, 2, 3), keepdim=True) for z in pair))
        for name, z in zip((one, other), pair, strict=True):
            found[name] = z / largest.clamp_min(1e-12)
    return found
