"""Gaussian noise as large as an attack's changes: the control beside whatever an attack does."""

from __future__ import annotations

from torch import Tensor

from robusteval.models.seeds import per_image

HALVINGS = 30  # of the interval in which the strength of clipped noise is sought
STRONGEST = 16  # times the length of the changes: with less room than that, noise stays shorter


def add_equal_noise(x_adv: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
    """Images with noise of the l2 length that the changes from `x` to `x_adv` have.

    Parameters
    ----------
    x_adv : Tensor
        Changed images ``(n, c, h, w)`` in [0, 1].
    x : Tensor
        Originals of the same shape.
    seeds : Tensor
        One seed per image ``(n,)``.

    Returns
    -------
    Tensor
        ``(n, c, h, w)``, not clipped to [0, 1], which would make the noise shorter.
    """
    draw = per_image(seeds, x.shape[1:], normal=True).to(x)
    length, drawn = (z.flatten(1).norm(dim=1) for z in (x_adv - x, draw))
    noise: Tensor = draw * (length / drawn.clamp_min(1e-12)).view(-1, 1, 1, 1)
    return x + noise


def add_equal_noise_in_box(x_adv: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
    """Images in [0, 1] with noise of the l2 length that the changes from `x` to `x_adv` have.

    Clipped, and made stronger until what is left has that length (or the noise 16 times its own,
    where the box has no room for it). Image by image, so that no result depends on the batch.

    Parameters
    ----------
    x_adv : Tensor
        Changed images ``(n, c, h, w)`` in [0, 1].
    x : Tensor
        Originals of the same shape.
    seeds : Tensor
        One seed per image ``(n,)``.

    Returns
    -------
    Tensor
        ``(n, c, h, w)`` in [0, 1].
    """
    out = x.clone()
    drawn = per_image(seeds, x.shape[1:], normal=True)
    for i in range(len(x)):
        image, noise = x[i].cpu().double(), drawn[i].double()
        length = float((x_adv[i].cpu().double() - image).norm())
        low = length / float(noise.norm())
        high = STRONGEST * low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            reached = float(((image + middle * noise).clamp(0, 1) - image).norm())
            low, high = (middle, high) if reached < length else (low, middle)
        out[i] = (image + low * noise).clamp(0, 1)
    return out
