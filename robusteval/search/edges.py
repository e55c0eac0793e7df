"""Where an image has edges, as weights of an attack's steps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.models.seeds import per_image

Variant = Literal["adv2", "advedge", "advedge_plus"]
Edges = Literal["sobel", "random", "inverse"]


def sobel(x: Tensor) -> Tensor:
    """Strength of the edges of images ``(n, c, h, w)``, ``(n, 1, h, w)``.

    Of the plain mean of the channels, with kernels ``[1, 2, 1] / 4`` by ``[1, 0, -1]``, border
    pixels repeated, and the root of the mean of both squares: 0.7071 for a step from 0 to 1, as
    the function of that name in scikit-image.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # sums of slices, not a convolution, whose last digits depend on the size of the batch
    across = (grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]) / 4  # (n, 1, h, w + 2)
    along = (grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]) / 4  # (n, 1, h + 2, w)
    right, down = across[..., 2:] - across[..., :-2], along[:, :, 2:] - along[:, :, :-2]
    return ((right.square() + down.square()) / 2).sqrt()


def weigh_edges(
    x: Tensor,
    variant: Variant,
    *,
    alpha: float = 0.1,
    edges: Edges = "sobel",
    normalise: bool = False,
    seeds: Tensor | None = None,
) -> Tensor:
    """What each pixel's step is multiplied with.

    AdvEdge and AdvEdge+, arXiv:2211.15926.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    variant : {"adv2", "advedge", "advedge_plus"}
        One everywhere, the strength of the edges, or one where that exceeds `alpha` and zero
        elsewhere.
    alpha : float
        Strength of an edge, in units of the [0, 1] pixel range.
    edges : {"sobel", "random", "inverse"}
        `sobel`: as published. The others are controls. `random`: the same weights at places drawn
        at random. `inverse`: weights where there are no edges, for `advedge_plus` the
        complementary mask, for `advedge` the strongest edge's strength minus each.
    normalise : bool
        Divide the strengths by the largest of the image first.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for the drawn places; zeros if not given.

    Returns
    -------
    Tensor
        Weights ``(n, 1, h, w)``, at least 0.

    Raises
    ------
    ValueError
        If a word is unknown or `alpha` is negative or not finite.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be adv2, advedge or advedge_plus, not {variant!r}")
    if edges not in get_args(Edges):
        raise ValueError(f"edges must be sobel, random or inverse, not {edges!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, the strength of an edge, not {alpha:g}")
    strength = sobel(x)
    if variant == "adv2":
        return torch.ones_like(strength)
    if normalise:
        strength = strength / find_strongest(strength).clamp_min(1e-12)
    if edges == "random":
        strength = shuffle_places(strength, seeds)
    if variant == "advedge_plus":
        on_edges = strength > alpha
        return (on_edges if edges != "inverse" else ~on_edges).to(x)
    return strength if edges != "inverse" else find_strongest(strength) - strength


def find_strongest(strength: Tensor) -> Tensor:
    """The greatest value of each image, ``(n, 1, 1, 1)``."""
    return strength.amax((1, 2, 3), keepdim=True)


def shuffle_places(strength: Tensor, seeds: Tensor | None) -> Tensor:
    """The values of each image at other places, drawn from its own seed ``(n,)``."""
    drawn = torch.zeros(len(strength), dtype=torch.int64) if seeds is None else seeds
    order = per_image(drawn, strength.shape[1:]).flatten(1).argsort(dim=1, stable=True)
    places = order.to(strength.device)
    return strength.flatten(1).gather(1, places).view_as(strength)
