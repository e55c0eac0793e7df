"""What a network does on its way to the logits, and the features that maps are made of.

Which features are meant is not guessed from names or shapes. In a network of convolutions, axes
are followed from function to function (`robusteval.models.layouts`); in one with tokens or
attention, a layer is found whose values belong to places (`robusteval.models.places`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robusteval.models.classifier import Classifier, frozen
from robusteval.models.forward_modes import find_float_type, twice_differentiable
from robusteval.models.layouts import (
    ATTENTION,
    CONVOLUTIONS,
    SOFTMAX,
    Layouts,
    measure_extent,
)
from robusteval.models.masked import LayoutWatch, Masked
from robusteval.models.places import (
    Places,
    find_tensor,
    has_bypass,
    make_probes,
    remember,
    replace_tensor,
    survey_network,
)
from robusteval.models.precision import refuse_rounded
from robusteval.models.scripted import refuse_scripted


class LinearCall(NamedTuple):
    """One call of a linear layer, or of a convolution of one place."""

    input: Tensor  # (m, channels)
    weight: Tensor  # (k, channels)
    output: Tensor  # (m, k)


class NormCall(NamedTuple):
    """One call of a normalisation of vectors."""

    module: nn.Module
    input: Tensor  # (m, channels)
    output: Tensor  # (m, channels)


class Call(NamedTuple):
    """One call of the network inside a model, on m images."""

    logits: Tensor  # (m, k)
    features: Tensor | None  # of m images, of the named layer or the last there are
    places: Places | None  # how they are spread over the image
    linear: LinearCall | None  # the last one
    norm: NormCall | None  # the last one
    chosen: bool  # whether all goes through the features, as is known
    image: Tensor | None  # what the network was given
    origin: Any  # its node of the graph, if it has a history

    def read_maps(self) -> Tensor | None:
        """The features as ``(m, channels, h, w)``."""
        if self.features is None or self.places is None:
            return None
        return self.places.read_maps(self.features)

    def is_bypassed(self) -> bool:
        """Whether the logits depend on the image in a way that leads past the features."""
        if self.features is None or self.chosen:
            return False
        leaf = self.image if self.origin is None else None
        return has_bypass(self.logits, self.features, self.origin, leaf)


def observe_calls(
    model: nn.Module, x: Tensor, layer: str | None = None
) -> tuple[Tensor, list[Call]]:
    """Logits ``(n, k)`` and what the network did, call by call.

    A `Classifier` calls its network in blocks, the last one padded: the rows of all calls together
    are the batch and then padding. On the graph of images that ask for derivatives, these have
    derivatives of their own. Without any images, the network is shown one of noise: on a black one
    much holds that does not hold for others.
    """
    network = get_network(model)
    refuse_rounded(network)
    shape = tuple(x.shape[1:])
    if isinstance(network, Masked):
        network.prepare(x[:0].to(find_float_type(network)))
    if layer is None:
        watch = CallRecorder(network, None, choose_layer(network, shape))
    else:
        watch = CallRecorder(network, layer, None)
        watch.module = find_layer(model, network, layer)
        refuse_scripted(network, watch.module)
        watch.known = find_places_of(network, watch.module, shape)
    shown = x if len(x) else draw_noise(x)
    with twice_differentiable(x), watched(model, shown), watch.hooks(), watch:
        logits = model(shown)
    assert isinstance(logits, Tensor), "the model must return one tensor of logits"
    logits = logits[: len(x)]
    rows = [len(call.logits) for call in watch.calls]
    if not len(x) <= sum(rows) < max(1, len(x)) + max(1, *rows):
        raise ValueError(
            f"the model runs its network on {sum(rows)} images for a batch of {len(x)}:"
            " maps are defined for one pass per image"
        )
    return logits, watch.calls


def draw_noise(x: Tensor) -> Tensor:
    """One image ``(1, c, h, w)`` of evenly spread pixel values, for a batch of none."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((1, *x.shape[1:]), generator=generator).to(x)


def get_network(model: nn.Module) -> nn.Module:
    """The network whose features are meant: a `Classifier`'s, or the model itself."""
    inner = get_classifier(model)
    return model if inner is None else inner.network


def get_classifier(model: nn.Module) -> Classifier | None:
    """The one `Classifier` that a model is or has inside, if it has one."""
    inner = [part for part in model.modules() if isinstance(part, Classifier)]
    if len(inner) > 1:
        raise ValueError("an ensemble has no feature maps of its own: explain its members")
    return inner[0] if inner else None


def watched(model: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    """While hooks see what a model computes for images; see `Classifier.watched`."""
    inner = get_classifier(model)
    return nullcontext() if inner is None else inner.watched(x)


def get_unmasked(network: nn.Module) -> nn.Module:
    """The network that layers are named from: without the masks, if there are any."""
    return network.network if isinstance(network, Masked) else network


def find_layer(model: nn.Module, network: nn.Module, layer: str) -> nn.Module:
    """The module of that name, counted from the network or from the model around it."""
    inner = get_unmasked(network)
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


class ChosenLayer(NamedTuple):
    """A layer whose features are meant where none is named."""

    name: str
    module: nn.Module
    places: Places


def choose_layer(network: nn.Module, shape: tuple[int, ...]) -> ChosenLayer | None:
    """The layer whose features are meant in a network with tokens or attention.

    None where there are neither, or where the last feature maps are those of a convolution that
    comes later. Found out once for each size of images ``(c, h, w)``.
    """
    inner = get_unmasked(network)
    return remember(inner, ("layer", shape), partial(_choose_layer, inner, shape))


def _choose_layer(network: nn.Module, shape: tuple[int, ...]) -> ChosenLayer | None:
    with frozen(network), torch.enable_grad():
        image = make_probes(network, shape)[:1]
        watch = CallRecorder(network, None, None)
        with watch.hooks(), watch:
            network(image)
        if not watch.has_tokens:
            return None
        survey = survey_network(network, shape)
        if survey.layer is None:
            return None
        module = network.get_submodule(survey.layer)
        before: list[Tensor | None] = []
        watch = CallRecorder(network, None, None)
        handle = module.register_forward_hook(lambda *_: before.append(watch.features))
        try:
            with watch.hooks(), watch:
                network(image)
        finally:
            handle.remove()
    (call,) = watch.calls
    later = call.features is not None and call.features is not before[-1]
    if later and not call.is_bypassed():
        return None
    return ChosenLayer(survey.layer, module, survey.places[survey.layer])


def find_places_of(network: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> Places | None:
    """The places of a module that was named, None where they are known from functions anyway.

    A survey takes the time of some twenty images, and is not made without need.
    """
    inner = get_unmasked(network)
    name = next((name for name, part in inner.named_modules() if part is module), None)
    if not name or remember(
        inner, ("followed", name, shape), partial(_follow, inner, module, shape)
    ):
        return None
    return survey_network(inner, shape).places.get(name)


def _follow(network: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether axes can be followed from function to function up to what a module gives."""
    watch, found = LayoutWatch(), []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = find_tensor(output)
        found.append(tensor is not None and watch.layouts.find(tensor) is not None)

    handle = module.register_forward_hook(look)
    try:
        with frozen(network), torch.no_grad(), watch:
            network(make_probes(network, shape)[:1])
    finally:
        handle.remove()
    return bool(found) and all(found)


def describe_layer(model: nn.Module, shape: tuple[int, ...], layer: str | None) -> str:
    """Name of the layer that is explained where `layer` is asked for, for people to read."""
    if layer is not None:
        return layer
    chosen = choose_layer(get_network(model), shape)
    return "the last feature maps" if chosen is None else chosen.name


def check_read(
    model: nn.Module, x: Tensor, places: Places, slope: Tensor, layer: str | None
) -> None:
    """Refuse a layer of which the logits depend on no place, by their slopes ``(m, c, h, w)``."""
    if places.prefix and not bool((slope != 0).any()):
        chosen = choose_layer(get_network(model), tuple(x.shape[1:]))
        better = f", such as {chosen.name!r}," if chosen is not None else ""
        raise ValueError(
            f"nothing is read from the places that layer {layer!r} gives, only from tokens beside"
            f" them: name an earlier layer{better} or none"
        )


AVERAGES = (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, Tensor.mean)  # belong to the head
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class CallRecorder(TorchFunctionMode):
    """Keeps, of each call of a network, what the maps are made of.

    Every function that the network calls passes here, so features count that no module returns.

    Parameters
    ----------
    network : nn.Module
        Whose calls.
    layer : str, optional
        Name of the layer that the user named.
    chosen : ChosenLayer, optional
        The layer that is meant where none is named.
    """

    def __init__(self, network: nn.Module, layer: str | None, chosen: ChosenLayer | None) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.chosen = chosen
        self.module = None if chosen is None else chosen.module
        self.known = None if chosen is None else chosen.places
        self.calls: list[Call] = []
        self.layouts = Layouts()
        self.has_tokens = False  # or attention: axes cannot be followed through all functions
        self._image: Tensor | None = None
        self._origin: Any = None
        self._begin()

    def _begin(self) -> None:
        self.features: Tensor | None = None
        self._places: Places | None = None
        self._linear: LinearCall | None = None
        self._norm: NormCall | None = None
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
                if isinstance(part, nn.Linear | nn.Conv2d):
                    stack.callback(part.register_forward_hook(self._see_linear).remove)
                elif isinstance(part, NORMS):
                    stack.callback(part.register_forward_hook(self._see_norm).remove)
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
        if self.layer is not None and self.features is None:
            raise ValueError(f"layer {self.layer!r} does not run in a forward pass")
        self.calls.append(
            Call(
                logits,
                self.features,
                self._places,
                self._linear,
                self._norm,
                self.chosen is not None,
                self._image,
                self._origin,
            )
        )

    def _see_linear(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given, made = read_vectors(args[0]), read_vectors(output)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if given is not None and made is not None and weight[0].numel() == given.shape[1]:
            self._linear = LinearCall(given, weight.flatten(1), made)

    def _see_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given, made = read_vectors(args[0]), read_vectors(output)
        if given is not None and made is not None:
            self._norm = NormCall(module, given, made)

    def _see_layer(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = find_tensor(output)
        if tensor is None or tensor.ndim not in (3, 4):
            raise ValueError(f"layer {self.layer!r} gives no feature maps (n, channels, h, w)")
        if self.features is not None:
            raise ValueError(f"layer {self.layer!r} runs several times per image: name another")
        places = self._find_places(tensor)
        if places is None or self._image is None or len(tensor) != len(self._image):
            raise ValueError(
                f"layer {self.layer!r} gives a tensor {tuple(tensor.shape)}, of which it is not"
                " known what are channels and what are places: name another"
            )
        self.features, self._places = tensor, places
        return replace_tensor(output, tensor.clone())  # a ReLU in place would change what was kept

    def _find_places(self, tensor: Tensor) -> Places | None:
        layout = self.layouts.find(tensor) if tensor.ndim == 4 else None
        if layout is not None:
            return Places(layout, *measure_extent(tensor, layout))
        return self.known if self.known is not None and self.known.fits(tensor) else None

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
            self.features, self._convolved, self.has_tokens = None, False, True
        self.has_tokens |= ndim == 3 and min(output.shape[1:]) > 1
        self._convolved |= func in CONVOLUTIONS
        if not self._convolved or ndim != 4 or func in AVERAGES:
            return
        layout = self.layouts.find(output)
        if layout is not None and min(measure_extent(output, layout)) > 1:
            self.features = output
            self._places = Places(layout, *measure_extent(output, layout))


def read_vectors(tensor: Any) -> Tensor | None:
    """A tensor of one vector per image as ``(m, channels)``, None if it is another."""
    if not isinstance(tensor, Tensor) or tensor.ndim not in (2, 4):
        return None
    if tensor.ndim == 4 and tensor.numel() != len(tensor) * tensor.shape[1]:
        return None
    return tensor.flatten(1)
