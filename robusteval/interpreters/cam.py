"""Class activation maps: which feature maps of a network spoke for a class.

Features may be those of convolutions or tokens, see `robusteval.interpreters.observing`. All
follow the form of `robusteval.interpreters.gradient`. Maps come at the resolution of the feature
maps. On a network that ends in average pooling and one linear layer, `cam`, `gradcam` at the last
features and most of their relatives carry the same information.
"""

from __future__ import annotations

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.interpreters.gradient import is_differentiated, select_scores
from robusteval.interpreters.heads import Head, observe_head
from robusteval.interpreters.observing import check_read, observe_calls
from robusteval.models.products import apply_image_by_image
from robusteval.registry import INTERPRETERS


@INTERPRETERS.add(
    "cam",
    differentiable=True,
    cost="1 forward",
    alike=("gradcam", "hirescam", "library:method=gradcam", "library:method=hirescam"),
)
def cam(model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None) -> Tensor:
    """Feature maps before the pooling, weighted as the final layer weights them for the class.

    Learning Deep Features for Discriminative Localization, arXiv:1512.04150, Eq. 2. For networks
    that end in global average pooling and a linear layer, or in a convolution with one channel per
    class and pooling. The mean of a map plus the class's bias is the logit. One forward pass. Where
    a layer or batch normalisation stands between, each place is normalised as the mean is. A head
    that reads a class token is no mean over places, and refused.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, negative where the features speak against the class.

    Raises
    ------
    ValueError
        If the network ends in another way, or a class does not exist.
    """
    keep = is_differentiated(x)
    with torch.set_grad_enabled(keep):
        return compute_class_maps(observe_head(model, x), y)


def compute_class_maps(head: Head, y: Tensor) -> Tensor:
    """The `cam` ``(n, 1, h', w')`` of classes `y` ``(n,)``, without another forward pass."""
    select_scores(head.logits, y)  # for its checks
    n, _, height, width = head.features.shape
    weight = head.weight[y].unsqueeze(1)  # (n, 1, channels)
    maps = apply_image_by_image(torch.bmm, n, weight, head.features.flatten(2))
    return maps.view(n, 1, height, width)


@INTERPRETERS.add(
    "gradcam",
    differentiable=True,
    cost="1 forward, 1 backward",
    alike=("cam", "hirescam", "library:method=gradcam", "library:method=hirescam"),
)
def gradcam(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    """Feature maps of a layer weighted by the logit's mean derivative, where positive.

    Grad-CAM, arXiv:1610.02391, Eq. 1 and 2. One forward and one backward pass.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.
    layer : str, optional
        Name of the module whose output is explained, such as ``layer4``. If not given, the last
        feature maps of at least 2x2 before the head, functional activations included; in a network
        with tokens or attention, the last layer with places through which all goes: of a network
        with a class token what its last block is given, as nothing is read from the places after.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0.

    Raises
    ------
    ValueError
        If there is no such layer, it gives no feature maps, runs several times per image or is read
        by the head only beside its places, or a class does not exist.
    """
    features, slopes = compute_features_and_slopes(model, x, y, layer)
    weight = slopes.mean((2, 3), keepdim=True)  # Eq. 1
    return F.relu((weight * features).sum(1, keepdim=True))


@INTERPRETERS.add(
    "hirescam",
    differentiable=True,
    cost="1 forward, 1 backward",
    alike=("cam", "gradcam", "library:method=gradcam", "library:method=hirescam"),
)
def hirescam(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    """Feature maps of a layer times the logit's derivative at each place, where positive.

    HiResCAM, arXiv:2011.08891, section 3: Grad-CAM without the mean of the derivative, so that a
    place is not bright for what the same feature does elsewhere. One forward and one backward pass.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.
    layer : str, optional
        See `gradcam`.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0.

    Raises
    ------
    ValueError
        As `gradcam`.
    """
    features, slopes = compute_features_and_slopes(model, x, y, layer)
    return F.relu((slopes * features).sum(1, keepdim=True))


@INTERPRETERS.add("gradcam_plus_plus", differentiable=True, cost="1 forward, 1 backward")
def gradcam_plus_plus(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    layer: str | None = None,
    floor: float = 1e-6,
) -> Tensor:
    """Feature maps of a layer weighted by the logit's positive derivatives, evened out by size.

    Grad-CAM++, arXiv:1710.11063, Eq. 7 and 19. One forward and one backward pass.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.
    layer : str, optional
        See `gradcam`. Its features should be at least 0, as after a ReLU.
    floor : float
        Added to the denominator of Eq. 19, in units of squared derivatives. The default is the
        package grad-cam's, for maps comparable with those published; the paper has 0. Channels
        whose derivatives are below its root lose their weight, so it matters for large feature
        maps and small logits.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0.

    Raises
    ------
    ValueError
        As `gradcam`, or if `floor` is negative.
    """
    if not floor >= 0:
        raise ValueError(f"floor must be at least 0, not {floor:g}")
    features, slopes = compute_features_and_slopes(model, x, y, layer)
    rise = F.relu(slopes)
    mass = features.sum((2, 3), keepdim=True)
    below = 2 * rise**2 + mass * rise**3 + floor
    share = rise**2 / torch.where(rise > 0, below, 1)  # Eq. 19
    weight = (share * rise).sum((2, 3), keepdim=True)  # Eq. 7
    return F.relu((weight * features).sum(1, keepdim=True))


def compute_features_and_slopes(
    model: nn.Module, x: Tensor, y: Tensor, layer: str | None
) -> tuple[Tensor, Tensor]:
    """Feature maps and the logit's derivatives with respect to them, both ``(n, k, h', w')``."""
    keep = is_differentiated(x)
    with torch.enable_grad():
        logits, calls = observe_calls(model, x if keep else x.detach(), layer)
        scores = select_scores(logits, y)
        if len(x) == 0:  # what is read from a layer shows on the image of noise
            scores = calls[0].logits.square().sum(1)
        parts = [call.features for call in calls if call.features is not None]
        if len(parts) < len(calls):
            raise ValueError(
                "the network has no feature maps of at least 2x2 before its head: name a layer"
            )
        if layer is None and any(call.is_bypassed() for call in calls):
            raise ValueError(
                "the logits do not depend on the last feature maps alone, as after several passes"
                " or branches: name a layer, or explain each part by itself"
            )
        wanted = [part for part in parts if part.requires_grad]
        slopes = (
            autograd.grad(scores.sum(), wanted, create_graph=keep, allow_unused=True)
            if scores.requires_grad and len(wanted) == len(parts)
            else (None,)
        )
    found = [slope for slope in slopes if slope is not None]
    if len(found) < len(parts):
        raise ValueError("the logits have no derivative with respect to the layer's feature maps")
    places = calls[0].places
    assert places is not None
    features = places.read_maps(torch.cat(parts)[: len(x)])
    # of these images before they are read, as what is derived comes back the same way
    derivative = places.read_maps(torch.cat(found)[: len(x)])
    shown = derivative if len(x) else places.read_maps(torch.cat(found))  # of the one of noise
    check_read(model, x, places, shown, layer)
    return (features, derivative) if keep else (features.detach(), derivative)
