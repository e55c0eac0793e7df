"""Class activation maps: which feature maps of a convolutional network spoke for a class.

All follow the form of `robusteval.interpreters.gradient`. Maps come at the resolution of the
feature maps. On a network that ends in average pooling and one linear layer, `cam`, `gradcam`
at the last features and most of their relatives carry the same information.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robusteval.interpreters.gradient import is_differentiated, select_scores
from robusteval.interpreters.layouts import (
    ATTENTION,
    CONVOLUTIONS,
    SOFTMAX,
    Layout,
    Layouts,
    guess_layout,
    has_bypass,
    measure_extent,
    put_channels_first,
)
from robusteval.models.classifier import Classifier
from robusteval.models.masked import Masked
from robusteval.models.scripted import refuse_scripted
from robusteval.registry import INTERPRETERS


@INTERPRETERS.add(
    "cam",
    differentiable=True,
    cost="1 forward",
    alike=("gradcam", "library:method=gradcam", "library:method=hirescam"),
)
def cam(model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None) -> Tensor:
    """Feature maps before the pooling, weighted as the final layer weights them for the class.

    Learning Deep Features for Discriminative Localization, arXiv:1512.04150, Eq. 2. For networks
    that end in global average pooling and a linear layer, or in a convolution with one channel per
    class and pooling. The mean of a map plus the class's bias is the logit. One forward pass.

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


class Head(NamedTuple):
    """What a network's logits are made of: means of feature maps times weights."""

    features: Tensor  # (n, channels, h', w')
    weight: Tensor  # (k, channels)
    logits: Tensor  # (n, k)


def compute_class_maps(head: Head, y: Tensor) -> Tensor:
    """The `cam` ``(n, 1, h', w')`` of classes `y` ``(n,)``, without another forward pass."""
    select_scores(head.logits, y)  # for its checks
    n, _, height, width = head.features.shape
    weight = head.weight[y].unsqueeze(1)  # (n, 1, channels)
    return torch.bmm(weight, head.features.flatten(2)).view(n, 1, height, width)


def observe_head(model: nn.Module, x: Tensor) -> Head:
    """One forward pass: the logits, and the features and weights that they are made of.

    On the graph like any forward pass. Which features they are is not guessed from names: their
    means must be what the final layer was given, or the logits themselves.

    Raises
    ------
    ValueError
        If the logits are not made that way.
    """
    other = (
        "cam needs a network that ends in global average pooling and one linear layer,"
        " or in one channel per class and pooling: use gradcam"
    )
    logits, calls = observe_calls(model, x)
    parts, weights = [], []
    for call in calls:
        features = call.read_maps()
        if features is None:
            raise ValueError(other)
        means = features.detach().mean((2, 3))  # (m, channels)
        linear = call.linear
        if linear is not None and agree(linear.output, call.logits) and agree(means, linear.input):
            weights.append(linear.weight)
        elif agree(means, call.logits):
            weights.append(torch.eye(means.shape[1]).to(means))
        else:
            raise ValueError(other)
        parts.append(features)
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


@INTERPRETERS.add(
    "gradcam",
    differentiable=True,
    cost="1 forward, 1 backward",
    alike=("cam", "library:method=gradcam", "library:method=hirescam"),
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
        feature maps of at least 2x2 before the head, functional activations included.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0.

    Raises
    ------
    ValueError
        If there is no such layer, it gives no feature maps or runs several times per image, or a
        class does not exist.
    """
    features, slopes = compute_features_and_slopes(model, x, y, layer)
    weight = slopes.mean((2, 3), keepdim=True)  # Eq. 1
    return F.relu((weight * features).sum(1, keepdim=True))


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
    layout = calls[0].layout
    features = put_channels_first(torch.cat(parts)[: len(x)], layout)
    derivative = put_channels_first(torch.cat(found)[: len(x)], layout)
    return (features, derivative) if keep else (features.detach(), derivative)


class LinearCall(NamedTuple):
    """One call of a linear layer."""

    input: Tensor
    weight: Tensor
    output: Tensor


class Call(NamedTuple):
    """One call of the network inside a model, on m images."""

    logits: Tensor  # (m, k)
    features: Tensor | None  # feature maps of m images, of the named layer or the last there are
    layout: Layout  # theirs
    linear: LinearCall | None  # the last one
    image: Tensor | None  # what the network was given
    origin: Any  # its node of the graph, if it has a history

    def read_maps(self) -> Tensor | None:
        """The features as ``(m, channels, h', w')``."""
        return None if self.features is None else put_channels_first(self.features, self.layout)

    def is_bypassed(self) -> bool:
        """Whether the logits depend on the image in a way that leads past the features."""
        if self.features is None:
            return False
        leaf = self.image if self.origin is None else None
        return has_bypass(self.logits, self.features, self.origin, leaf)


def observe_calls(
    model: nn.Module, x: Tensor, layer: str | None = None
) -> tuple[Tensor, list[Call]]:
    """Logits ``(n, k)`` and what the network did, call by call.

    A `Classifier` calls its network in blocks, the last one padded: the rows of all calls together
    are the batch and then padding.
    """
    network = get_network(model)
    watch = CallRecorder(
        network, layer, None if layer is None else find_layer(model, network, layer)
    )
    with watch.hooks(), watch:
        logits = model(x)
    assert isinstance(logits, Tensor), "the model must return one tensor of logits"
    rows = [len(call.logits) for call in watch.calls]
    if not len(x) <= sum(rows) < max(1, len(x)) + max(1, *rows):
        raise ValueError(
            f"the model runs its network on {sum(rows)} images for a batch of {len(x)}:"
            " maps are defined for one pass per image"
        )
    return logits, watch.calls


def get_network(model: nn.Module) -> nn.Module:
    """The network whose features are meant: a `Classifier`'s, or the model itself."""
    inner = [part for part in model.modules() if isinstance(part, Classifier)]
    if len(inner) > 1:
        raise ValueError("an ensemble has no feature maps of its own: explain its members")
    return inner[0].network if inner else model


def find_layer(model: nn.Module, network: nn.Module, layer: str) -> nn.Module:
    """The module of that name, counted from the network or from the model around it."""
    inner = network.network if isinstance(network, Masked) else network
    for root in (inner, network, model):
        modules: dict[str, nn.Module] = dict(root.named_modules())
        if layer and layer in modules:
            return modules[layer]
    known = [
        name
        for name, child in inner.named_children()
        if any(isinstance(part, nn.Conv2d) for part in child.modules())
    ]
    close = difflib.get_close_matches(layer, dict(inner.named_modules()), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"the network has no layer {layer!r}{hint}: with convolutions there are"
        f" {', '.join(known) or 'none'} and what is inside"
    )


AVERAGES = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, Tensor.mean)  # belong to the head


class CallRecorder(TorchFunctionMode):
    """Keeps, of each call of a network, what the maps are made of.

    Every function that the network calls passes here, so features count that no module returns.
    """

    def __init__(self, network: nn.Module, layer: str | None, module: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.module = module
        self.calls: list[Call] = []
        self.layouts = Layouts()
        self._image: Tensor | None = None
        self._origin: Any = None
        self._begin()

    def _begin(self) -> None:
        self._features: Tensor | None = None
        self._layout: Layout = "first"
        self._linear: LinearCall | None = None
        self._convolved = False  # whether what comes by are images still

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the network's modules inside."""
        refuse_scripted(self.network, self.module)
        with ExitStack() as stack:
            stack.callback(self.network.register_forward_pre_hook(self._start).remove)
            stack.callback(self.network.register_forward_hook(self._end).remove)
            if isinstance(self.network, Masked):  # of two passes the second gives the logits
                inner = self.network.network
                stack.callback(inner.register_forward_pre_hook(self._again).remove)
            for part in self.network.modules():
                if isinstance(part, nn.Linear):
                    stack.callback(part.register_forward_hook(self._see_linear).remove)
            if self.module is not None:
                stack.callback(self.module.register_forward_hook(self._see_layer).remove)
            yield

    def _again(self, _module: nn.Module, _args: Any) -> None:
        self._begin()

    def _start(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        self._begin()
        self._image = args[0]
        self._origin = args[0].grad_fn
        if not torch.is_grad_enabled() or args[0].requires_grad:
            return None
        # something must ask for derivatives; a copy, as a network may change its input in place
        image = args[0].detach().requires_grad_().clone()
        self._image, self._origin = image, image.grad_fn
        return (image, *args[1:])

    def _end(self, _module: nn.Module, _args: Any, logits: Tensor) -> None:
        if self.layer is not None and self._features is None:
            raise ValueError(f"layer {self.layer!r} does not run in a forward pass")
        self.calls.append(
            Call(logits, self._features, self._layout, self._linear, self._image, self._origin)
        )

    def _see_linear(self, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        self._linear = LinearCall(args[0], module.weight, output)

    def _see_layer(self, _module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"layer {self.layer!r} gives no feature maps (n, channels, h, w)")
        if self._features is not None:
            raise ValueError(f"layer {self.layer!r} runs several times per image: name another")
        assert self._image is not None
        layout = self.layouts.find(output) or guess_layout(
            tuple(output.shape), tuple(self._image.shape[2:])
        )
        if layout is None:
            raise ValueError(
                f"layer {self.layer!r} gives a tensor {tuple(output.shape)}, of which it is not"
                " known what are channels and what are places: name another"
            )
        self._features, self._layout = output, layout
        return output.clone()  # a ReLU in place would change what was kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.layouts.follow(func, args, kwargs, output)
        if self.module is None:
            self._see_output(func, output)
        return output

    def _see_output(self, func: Any, output: Any) -> None:
        ndim = output.ndim if isinstance(output, Tensor) else 0
        if func in ATTENTION or (func in SOFTMAX and ndim > 2):
            self._features, self._convolved = None, False
        self._convolved |= func in CONVOLUTIONS
        if not self._convolved or ndim != 4 or func in AVERAGES:
            return
        layout = self.layouts.find(output)
        if layout is not None and min(measure_extent(output, layout)) > 1:
            self._features, self._layout = output, layout
