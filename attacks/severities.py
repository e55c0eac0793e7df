"""How strong each corruption is: what was published for two sizes of image, carried to any other.

The constants are those with which ImageNet-C and CIFAR-10-C were made (arXiv:1903.12261; the
authors' programs ``make_imagenet_c.py`` and ``make_cifar_c.py``). They differ by more than the
size of the images: on 32 pixels corruptions are gentler, as people recognise less there.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Kind = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the fifteen that are counted, then the four extra ones
SMALL, LARGE = 32, 224  # pixels on a side for which constants were published
SEVERITIES = 5
Five = tuple[float, float, float, float, float]

# measured in pixels, so that they grow with the image beyond the sizes that were published
LENGTHS = frozenset(("sigma", "radius", "reach", "flake", "smooth", "shift", "spread", "bend"))

# for each kind and constant the five severities of CIFAR-10-C, then those of ImageNet-C
PUBLISHED: dict[Kind, dict[str, tuple[Five, Five]]] = {
    "gaussian_noise": {"scale": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))},
    "shot_noise": {"photons": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3))},
    "impulse_noise": {"share": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))},
    "defocus_blur": {
        "radius": ((0.3, 0.4, 0.5, 1, 1.5), (3, 4, 6, 8, 10)),
        "soft": ((0.4, 0.5, 0.6, 0.2, 0.1), (0.1, 0.5, 0.5, 0.5, 0.5)),
    },
    "glass_blur": {
        "sigma": ((0.05, 0.25, 0.4, 0.25, 0.4), (0.7, 0.9, 1, 1.1, 1.5)),
        "reach": ((1, 1, 1, 1, 1), (1, 2, 2, 3, 4)),
        "rounds": ((1, 1, 1, 2, 2), (2, 1, 3, 2, 2)),
    },
    "motion_blur": {
        "radius": ((6, 6, 6, 8, 9), (10, 15, 15, 15, 20)),
        "sigma": ((1, 1.5, 2, 2, 2.5), (3, 5, 8, 12, 15)),
    },
    "zoom_blur": {
        # the last of the factors, and how many there are from 1 on
        # as NumPy's arange gives them, whose end is at times among them
        "last": ((1.06, 1.11, 1.15, 1.2, 1.25), (1.11, 1.15, 1.2, 1.24, 1.3)),
        "factors": ((7, 12, 16, 21, 26), (12, 16, 11, 13, 11)),
    },
    "snow": {
        "mean": ((0.1, 0.1, 0.15, 0.25, 0.3), (0.1, 0.2, 0.55, 0.55, 0.55)),
        "scale": ((0.2, 0.2, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3, 0.3)),
        "flake": ((1, 1, 1.75, 2.25, 1.25), (3, 2, 4, 4.5, 2.5)),
        "least": ((0.6, 0.5, 0.55, 0.6, 0.65), (0.5, 0.5, 0.9, 0.85, 0.85)),
        "radius": ((8, 10, 10, 12, 14), (10, 12, 12, 12, 12)),
        "sigma": ((3, 4, 4, 6, 12), (4, 4, 8, 8, 12)),
        "kept": ((0.95, 0.9, 0.9, 0.85, 0.8), (0.8, 0.7, 0.7, 0.65, 0.55)),
    },
    "frost": {
        "kept": ((1, 1, 0.9, 0.85, 0.75), (1, 0.8, 0.7, 0.65, 0.6)),
        "frozen": ((0.2, 0.3, 0.4, 0.4, 0.45), (0.4, 0.6, 0.7, 0.7, 0.75)),
    },
    "fog": {
        "thick": ((0.2, 0.5, 0.75, 1, 1.5), (1.5, 2, 2.5, 2.5, 3)),
        "decay": ((3, 3, 2.5, 2, 1.75), (2, 2, 1.7, 1.5, 1.4)),
    },
    "brightness": {"added": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))},
    "contrast": {"kept": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))},
    "elastic_transform": {
        # of ImageNet-C in 244ths of the side, a slip of its authors that is part of the data
        "bend": ((0, 1.6, 2.56, 3.2, 3.2), (488, 488, 12.2, 17.08, 29.28)),
        "smooth": ((0, 6.4, 1.92, 1.28, 0.96), (170.8, 19.52, 2.44, 2.44, 2.44)),
        "shift": ((2.56, 2.24, 1.92, 1.6, 0.96), (24.4, 48.8, 4.88, 4.88, 4.88)),
    },
    "pixelate": {"share": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))},
    "jpeg_compression": {"quality": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))},
    "speckle_noise": {"scale": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6))},
    "gaussian_blur": {"sigma": ((0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6))},
    "spatter": {
        "mean": ((0.62, 0.65, 0.65, 0.65, 0.65), (0.65, 0.65, 0.65, 0.65, 0.67)),
        "scale": ((0.1, 0.1, 0.3, 0.1, 0.1), (0.3, 0.3, 0.3, 0.3, 0.4)),
        "smooth": ((0.7, 0.8, 1, 0.7, 0.5), (4, 3, 2, 1, 1)),
        "least": ((0.7, 0.7, 0.69, 0.69, 0.68), (0.69, 0.68, 0.68, 0.65, 0.65)),
        # of water the strength, of mud (severities 4 and 5) the blur in pixels
        "strength": ((0.5, 0.5, 0.5, 0, 0), (0.6, 0.6, 0.5, 0, 0)),
        "spread": ((0, 0, 0, 0.6, 0.6), (0, 0, 0, 1.5, 1.5)),
    },
    "saturate": {
        "factor": ((0.3, 0.1, 1.5, 2, 2.5), (0.3, 0.1, 2, 5, 20)),
        "added": ((0, 0, 0, 0.1, 0.2), (0, 0, 0, 0.1, 0.2)),
    },
}


def find_constants(kind: Kind, severity: int, side: int) -> dict[str, float]:
    """The constants of a corruption for images of a size.

    At 32 pixels those of CIFAR-10-C, at 224 those of ImageNet-C. Between them each goes from one
    to the other by equal factors where the side does (by equal steps where one of the two is
    zero). Above 224 and below 32 lengths in pixels stay the same share of the side, and all else
    stays as it was published.

    Parameters
    ----------
    kind : Kind
        Which corruption.
    severity : int
        1 to 5.
    side : int
        Pixels on the shorter side of the images.

    Returns
    -------
    dict
        Constants by name.
    """
    way = math.log(side / SMALL) / math.log(LARGE / SMALL)
    way = min(max(way, 0.0), 1.0)
    grown = side / min(max(side, SMALL), LARGE)
    found = {}
    for name, (small, large) in PUBLISHED[kind].items():
        value = interpolate(small[severity - 1], large[severity - 1], way)
        found[name] = value * grown if name in LENGTHS else value
    return found


def interpolate(small: float, large: float, way: float) -> float:
    """A value on the way from one to another, by equal factors where both are positive."""
    if way in (0.0, 1.0):
        return large if way else small
    if small > 0 and large > 0:
        return float(small * (large / small) ** way)
    return small + (large - small) * way
