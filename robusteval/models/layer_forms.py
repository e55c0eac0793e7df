"""Weights that a layer computes from others: normalised, pruned and parametrised ones.

`torch.nn.utils` keeps a weight ``w`` as the tensors that it is computed from, under names of an
older and of a newer form. In eval mode the result is constant, so that a network without these
wrappers takes it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robusteval.models.built import State

# tensors of a weight in each form: what is put behind the layer's and the weight's name
Parts = tuple[str, ...]
OLD_NORM: Parts = ("{w}_g", "{w}_v")
NEW_NORM: Parts = ("parametrizations.{w}.original0", "parametrizations.{w}.original1")
OLD_SPECTRAL: Parts = ("{w}_orig", "{w}_u", "{w}_v")
NEW_SPECTRAL: Parts = (
    "parametrizations.{w}.original",
    "parametrizations.{w}.0._u",
    "parametrizations.{w}.0._v",
)
PRUNED: Parts = ("{w}_orig", "{w}_mask")
FORMS: dict[Parts, tuple[Parts | None, str]] = {
    OLD_NORM: (NEW_NORM, "weight_norm"),
    NEW_NORM: (OLD_NORM, "weight_norm"),
    OLD_SPECTRAL: (NEW_SPECTRAL, "spectral_norm"),
    NEW_SPECTRAL: (OLD_SPECTRAL, "spectral_norm"),
    PRUNED: (None, "pruning"),
}


def rewrite_layers(state: State, wanted: Mapping[str, Any]) -> tuple[State | None, str]:
    """The state with weights in the form that a network has, and what was done in words.

    Parameters
    ----------
    state : dict
        Tensors of a file.
    wanted : mapping
        The state dict of the network, under names that may lack or have a prefix.

    Returns
    -------
    dict or None
        None where the file holds nothing of the kind.
    """
    made = dict(state)
    done: dict[str, None] = {}
    for parts, (other, word) in FORMS.items():
        pattern = re.compile(re.escape(parts[0]).replace(r"\{w\}", r"(\w+?)"))
        renamed = other is not None and any(
            re.search(rf"(^|\.){_find_tail(other[0])}$", name) for name in wanted
        )
        for name in state:
            found = re.fullmatch(rf"((?:.*\.)?){pattern.pattern}", name)
            if found is None:
                continue
            layer, weight = found[1], found[2]
            names = [layer + part.format(w=weight) for part in parts]
            if not all(part in made for part in names):
                continue
            tensors = [made.pop(part) for part in names]
            if not FITTING[word](*tensors):
                return None, ""  # of a parametrisation that is not known
            done[word] = None
            if renamed and other is not None:
                made |= {layer + p.format(w=weight): t for p, t in zip(other, tensors, strict=True)}
            else:
                made[layer + weight] = COMPUTED[word](*tensors)
    if not done:
        return None, ""
    return made, f"weights as {' and '.join(done)} keeps them were put into the network's form"


def _find_tail(part: str) -> str:
    return re.escape(part).replace(r"\{w\}", r"\w+?")


def is_length(g: Tensor, v: Tensor) -> bool:
    """Whether a tensor can hold the lengths of the parts of another along one axis."""
    if g.ndim == 0:
        return True
    pairs = list(zip(g.shape, v.shape, strict=False))
    alike = g.ndim == v.ndim and all(a in (1, b) for a, b in pairs)
    return alike and sum(a != 1 for a, _ in pairs) <= 1


def compute_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """``g v / |v|``; the norm is taken over all axes on which `g` has the length 1.

    Weight Normalization: A Simple Reparameterization, arXiv:1602.07868, equation 2.
    """
    axes = [axis for axis in range(v.ndim) if g.ndim == 0 or g.shape[axis] == 1]
    norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()
    return (v * (g / norm)).to(v.dtype)


def compute_spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``W / (u' W v)``, W as a matrix whose rows belong to the axis that `u` has the length of.

    Spectral Normalization for Generative Adversarial Networks, arXiv:1802.05957, equation 8.
    """
    products = [weight.movedim(axis, 0).flatten(1).mv(v) for axis in find_axes(weight, u, v)]
    # of a square weight both axes fit: u was made of the product along the right one
    slopes = [torch.dot(u, product) for product in products]
    best = max(range(len(slopes)), key=lambda i: float(slopes[i] / products[i].norm()))
    return weight / slopes[best]


def find_axes(weight: Tensor, u: Tensor, v: Tensor) -> list[int]:
    """The axes, 0 or 1, along which a weight is a matrix with rows as `u` and columns as `v`."""
    if len({weight.dtype, u.dtype, v.dtype}) > 1 or not weight.is_floating_point():
        return []
    return [
        axis
        for axis in range(min(2, weight.ndim))
        if u.shape == weight.shape[axis : axis + 1]
        and v.shape == (weight.numel() // max(1, len(u)),)
    ]


def compute_pruned(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight where its mask is one."""
    return weight * mask.to(weight.dtype)


FITTING: dict[str, Callable[..., bool]] = {
    "weight_norm": is_length,
    "spectral_norm": lambda weight, u, v: bool(find_axes(weight, u, v)),
    "pruning": lambda weight, mask: weight.shape == mask.shape,
}
COMPUTED: dict[str, Callable[..., Tensor]] = {
    "weight_norm": compute_weight_norm,
    "spectral_norm": compute_spectral_norm,
    "pruning": compute_pruned,
}
