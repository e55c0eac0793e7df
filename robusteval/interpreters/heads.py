"""How the logits of a network are made of its last features, where they are means of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusteval.interpreters.observing import Call, NormCall, observe_calls

# A class token's logit is a sum over what the token holds. What it holds comes from the places by
# attention and then through hidden layers and normalisations, which no sum over places passes.
TOKEN = " (this one reads its classes from a token, whose values are no sum over places)"


class Head(NamedTuple):
    """What a network's logits are made of: means of feature maps times weights."""

    features: Tensor  # (n, channels, h', w'), normalised where the head does that to their means
    weight: Tensor  # (k, channels)
    logits: Tensor  # (n, k)


def observe_head(model: nn.Module, x: Tensor) -> Head:
    """One forward pass: the logits, and the features and weights that they are made of.

    On the graph like any forward pass. Which features they are is not guessed from names: their
    means must be what the final layer was given, or the logits themselves. Between the two may
    stand a layer or batch normalisation: with its deviations as they are for an image, it is linear
    in the means, and so it is done to each place.

    Raises
    ------
    ValueError
        If the logits are not made that way.
    """
    logits, calls = observe_calls(model, x)
    parts, weights = [], []
    for call in calls:
        head = read_head(call)
        if head is None:
            raise ValueError(
                "cam needs a network that ends in global average pooling and one linear layer,"
                f" or in one channel per class and pooling{TOKEN if reads_token(call) else ''}:"
                " use gradcam"
                f"{', rollout or attention_relevance' if reads_token(call) else ''}"
            )
        parts.append(head.features)
        weights.append(head.weight)
    if not agree(torch.cat([call.logits for call in calls])[: len(x)], logits):
        raise ValueError("the model changes the logits of its network: use gradcam")
    return Head(torch.cat(parts)[: len(x)], weights[0], logits)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, up to the order of a sum."""
    if one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach().to(one)
    slack = 1e-4 * float(other.abs().amax()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=slack, equal_nan=True)


def read_head(call: Call) -> Head | None:
    """Features and weights whose product is the logits, None if they are not made that way."""
    features, linear, norm = call.read_maps(), call.linear, call.norm
    if features is None:
        return None
    means = features.mean((2, 3))  # (m, channels)
    if linear is not None and agree(linear.output, call.logits):
        if agree(means, linear.input):
            return Head(features, linear.weight, call.logits)
        between = norm is not None and agree(norm.output, linear.input)
        if norm is not None and between and agree(means, norm.input):
            normalised = normalise_places(norm, features)
            if normalised is not None:
                return Head(normalised, linear.weight, call.logits)
    if agree(means, call.logits):
        return Head(features, torch.eye(means.shape[1]).to(means), call.logits)
    return None


def normalise_places(norm: NormCall, features: Tensor) -> Tensor | None:
    """What it does to the means of features ``(m, channels, h, w)``, done to each place.

    With the mean and deviation that it found, and without what it adds to every image alike;
    None if it is none of those known.
    """
    module = norm.module
    if isinstance(module, nn.LayerNorm):
        spread = norm.input.var(1, correction=0, keepdim=True)
        scale = (spread + module.eps).rsqrt()  # (m, 1)
        gain = scale if module.weight is None else scale * module.weight  # (m, channels)
        centred = features - features.mean(1, keepdim=True)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is not None:
        gain = (module.running_var + module.eps).rsqrt().expand_as(norm.input)
        gain = gain if module.weight is None else gain * module.weight
        centred = features
    else:
        return None
    scaled = gain * centred.mean((2, 3))
    if not agree(scaled + (norm.output - scaled)[:1], norm.output):
        return None  # as by a batch normalisation in train mode
    return centred * gain[:, :, None, None]


def reads_token(call: Call) -> bool:
    """Whether there are tokens besides those of places, which the head might read."""
    return call.places is not None and call.places.prefix > 0
