"""What weather, cameras and files do to images, as an attack that sees nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS

from . import distortions, weather
from .severities import KINDS, SEVERITIES, Kind, find_constants

Corrupt = Callable[
    [distortions.Pixels, distortions.Constants, np.random.Generator], distortions.Pixels
]
CORRUPTIONS: dict[Kind, Corrupt] = {
    "gaussian_noise": distortions.add_gaussian_noise,
    "shot_noise": distortions.add_shot_noise,
    "impulse_noise": distortions.add_impulse_noise,
    "defocus_blur": distortions.blur_defocus,
    "glass_blur": distortions.blur_glass,
    "motion_blur": distortions.blur_motion,
    "zoom_blur": distortions.blur_zoom,
    "snow": weather.add_snow,
    "frost": weather.add_frost,
    "fog": weather.add_fog,
    "brightness": distortions.brighten,
    "contrast": distortions.lower_contrast,
    "elastic_transform": distortions.bend,
    "pixelate": distortions.pixelate,
    "jpeg_compression": distortions.compress,
    "speckle_noise": distortions.add_speckle_noise,
    "gaussian_blur": distortions.blur_gaussian,
    "spatter": weather.add_spatter,
    "saturate": distortions.saturate,
}
# nothing in them is drawn, so that a generator need not be made for each image
STILL: frozenset[Kind] = frozenset(
    (
        *("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "saturate"),
        *("pixelate", "jpeg_compression"),
    )
)


@ATTACKS.add("corruption", norms=("corruption",), knowledge="none", radius="severity")
def corruption(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Kind = "gaussian_noise",
    severity: int = 3,
) -> Tensor:
    """One of the corruptions of ImageNet-C: no attacker, but what happens to images anyway.

    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
    arXiv:1903.12261, with the constants of ImageNet-C and CIFAR-10-C and what lies between them,
    see `attacks.severities`. The network is not asked. Results are 8-bit images, rounded where the
    authors' program cuts off. Of one kind the same is drawn at every severity. Frost is drawn and
    no photograph; movement is that of the package imagecorruptions, not of ImageMagick.

    Parameters
    ----------
    model : nn.Module
        Not used.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1], of any size and number of channels.
    y : Tensor
        Not used.
    targeted : bool
        Not used: a corruption has no goal.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for all that is random; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    kind : str
        Which corruption. The first fifteen are those that are counted; speckle noise, Gaussian
        blur, spatter and saturate are the extra ones.
    severity : int
        1 to 5: no radius in units of the [0, 1] pixel range, but a step of the published scale.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1].

    Raises
    ------
    ValueError
        If the severity is out of range.
    """
    if not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity must be from 1 to {SEVERITIES}, not {severity}")
    if len(x) == 0:
        return x.clone()
    constants = find_constants(kind, severity, min(x.shape[2:]))
    drawn = [0] * len(x) if seeds is None else seeds.tolist()
    corrupted = torch.empty(x.shape)
    rng = np.random.default_rng()
    images = x.detach().cpu().float().contiguous().numpy()
    for i, (image, seed, row) in enumerate(zip(images, drawn, corrupted.numpy(), strict=True)):
        if kind not in STILL:
            rng = np.random.default_rng((seed, KINDS.index(kind)))
        found = distortions.round_to_levels(CORRUPTIONS[kind](image, constants, rng))
        np.divide(found, np.float32(255), out=row)
        tell_step(i + 1, len(x))
    corrupted = corrupted.to(x)
    return corrupted if mask is None else torch.where(mask.to(x.device) != 0, corrupted, x)


def __getattr__(name: str) -> Any:
    """`Corruption`, an ART evasion attack."""
    return make_art_class(name, Corruption=corruption)
