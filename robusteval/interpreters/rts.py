"""What a network trained for it thinks a class rests on: a map in one forward pass (RTS).

Follows the form of `robusteval.interpreters.gradient`, except that its values are shares in [0, 1]
that must not be stretched. An interpreter has no data, so the mask network is trained beforehand
(see `robusteval.interpreters.rts_training`) and kept in the cache folder under the hash of the
network that it explains. One that finds nothing is never kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robusteval.errors import UsageError
from robusteval.interpreters.gradient import is_differentiated, select_scores
from robusteval.interpreters.meaningful_perturbation import LARGE
from robusteval.interpreters.observing import (
    AVERAGES,
    ChosenLayer,
    choose_layer,
    draw_noise,
    get_network,
    get_unmasked,
)
from robusteval.models.identity import hash_answers
from robusteval.models.layouts import ATTENTION, CONVOLUTIONS
from robusteval.models.places import find_tensor, replace_tensor, survey_network
from robusteval.models.precision import refuse_rounded
from robusteval.models.scripted import refuse_scripted
from robusteval.models.weights import read_sealed
from robusteval.registry import INTERPRETERS
from robusteval.runs.cache_folder import cache_folder
from robusteval.runs.reading import WEIGHTS, check_regular

FORMAT = 1  # of the file and of the network in it
NOTES = "robusteval_rts"  # key of the file's header

SCALES = 4  # resolutions of feature maps, at most
MOST_AREA = 0.5  # of the test
LEAST_GAP = 0.3  # between both accuracies of the test


@INTERPRETERS.add("rts", differentiable=True, cost="1 forward, and a small network")
def rts(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    confidence: float = 0.0,
) -> Tensor:
    """Region that a network trained on this classifier says the class rests on (RTS).

    Real Time Image Saliency for Black Box Classifiers, arXiv:1705.07857. One forward pass; the mask
    network reads the explained network's own feature maps, as the published one for ResNet-50 does.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.
    confidence : float
        How sure the mask network must be that the class is there, in units of its logit: larger
        values leave only the most salient parts. Its test was made with 0; the authors look at
        their own networks with 5 or 6.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')`` in [0, 1].

    Raises
    ------
    UsageError
        If no mask network has been trained for this model, or none can be.
    ValueError
        If the images are of another size than those it was trained on, a class does not exist, or
        the network has no feature maps.
    """
    try:
        network = find_mask_network(model)
    except UsageError:
        collect_features(model, draw_noise(x))  # a network that can have none is no untrained one
        raise
    return network.draw_masks(model, x, y, confidence)[0]


class FeatureScale(NamedTuple):
    """Feature maps of one resolution."""

    channels: int
    height: int
    width: int


class Acceptance(NamedTuple):
    """What a mask network can do, on images that it was not trained on."""

    preserved: float  # accuracy where only what the masks show is left
    destroyed: float  # accuracy where that is gone
    area: float  # mean share of the image that the masks show
    images: int

    @property
    def passed(self) -> bool:
        """Whether the masks show what the classifier looks at, and not everything."""
        return self.preserved - self.destroyed >= LEAST_GAP and self.area < MOST_AREA


class MaskNetwork(nn.Module):
    """Decoder from a classifier's feature maps to masks, with a gate for the class.

    Parameters
    ----------
    shape : tuple of int
        ``(c, h, w)`` of the images.
    scales : sequence of Scale
        Of the feature maps, finest first; masks have the resolution of the finest.
    num_classes : int
        Classes there are.
    """

    acceptance: Acceptance

    def __init__(
        self, shape: tuple[int, int, int], scales: Sequence[FeatureScale], num_classes: int
    ) -> None:
        super().__init__()
        self.shape = shape
        self.scales = tuple(scales)
        base = 64 if min(shape[1:]) >= LARGE else 16
        widths = [base * 2**i for i in range(len(scales) - 1)]
        deepest = scales[-1].channels
        self.selector = nn.ModuleDict(
            {
                "norm": nn.BatchNorm2d(deepest, affine=False),
                "classes": nn.Embedding(num_classes, deepest),
            }
        )
        self.up = nn.ModuleList()
        for scale, width in zip(scales[-2::-1], widths[::-1], strict=True):
            self.up.append(Upsampler(deepest, scale, width))
            deepest = width
        self.last = nn.Conv2d(deepest, 2, 1)
        nn.init.normal_(self._classes.weight, std=self._classes.embedding_dim**-0.5)

    @property
    def _classes(self) -> nn.Embedding:
        table = self.selector["classes"]
        assert isinstance(table, nn.Embedding)
        return table

    def score_class(self, features: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Deepest features, standardised, and how much each place speaks for the class."""
        deep = self.selector["norm"](features[-1])
        return deep, (deep * self._classes(y)[:, :, None, None]).sum(1, keepdim=True)

    def score_presence(self, features: Sequence[Tensor], y: Tensor) -> Tensor:
        """Logit ``(m,)`` that the image shows the class."""
        return self.score_class(features, y)[1].mean((1, 2, 3))

    def forward(self, features: Sequence[Tensor], y: Tensor, confidence: float = 0.0) -> Tensor:
        """Masks ``(m, 1, h', w')`` from feature maps, finest first, and classes ``(m,)``."""
        deep, score = self.score_class(features, y)
        # image by image: the last values of a tensor pass through another sigmoid, which rounds
        # differently, and whose they are depends on the batch
        gate = torch.stack([torch.sigmoid(each) for each in (score - confidence).unbind()])
        deep = deep * gate
        for up, finer in zip(self.up, features[-2::-1], strict=True):
            deep = up(deep, finer)
        shown, hidden = self.last(deep).abs().chunk(2, 1)
        masks: Tensor = shown / (shown + hidden + 1e-6)  # the summand, as both may be zero
        return masks

    def draw_masks(
        self, model: nn.Module, x: Tensor, y: Tensor, confidence: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Masks ``(n, 1, h', w')`` and logits ``(n, k)`` of the same forward pass.

        On the graph exactly if `x` is; errors as of `rts`.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"the mask network was trained on images {self.shape}, not {tuple(x.shape[1:])}"
            )
        self.to(x.device, x.dtype)
        with torch.set_grad_enabled(is_differentiated(x)):
            logits, calls = collect_features(model, x)
            select_scores(logits, y)  # for its checks
            rows = [len(call[-1]) for call in calls]
            classes = torch.split(F.pad(y, (0, sum(rows) - len(y))), rows)
            # call by call: a convolution's last digits depend on the size of the batch
            masks = [
                self(self.check_features(call), each, confidence)
                for call, each in zip(calls, classes, strict=True)
            ]
        return torch.cat(masks)[: len(x)], logits

    def check_features(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The feature maps themselves, if they are what this network was made for."""
        if tuple(measure_scale(each) for each in features) != self.scales:
            raise ValueError("the model's feature maps have changed: train the mask network anew")
        return features


class Upsampler(nn.Module):
    """Features at twice the resolution, joined with those that the encoder has there."""

    def __init__(self, channels: int, finer: FeatureScale, width: int) -> None:
        super().__init__()
        self.wider = build_convolution(channels, 4 * width, 3)
        self.norm = nn.BatchNorm2d(finer.channels, affine=False)
        joined = width + finer.channels
        self.shortcut = build_convolution(joined, width, 1)
        self.bottleneck = nn.Sequential(
            build_convolution(joined, max(joined // 4, 4), 1),
            nn.ReLU(),
            build_convolution(max(joined // 4, 4), max(joined // 4, 4), 3),
            nn.ReLU(),
            build_convolution(max(joined // 4, 4), width, 1),
        )

    def forward(self, deep: Tensor, finer: Tensor) -> Tensor:
        deep = F.relu(F.pixel_shuffle(F.relu(self.wider(deep)), 2))
        if deep.shape[2:] != finer.shape[2:]:  # of networks that do not halve exactly
            deep = F.interpolate(deep, finer.shape[2:], mode="bilinear", align_corners=False)
        both = torch.cat([deep, self.norm(finer)], 1)
        return F.relu(self.shortcut(both) + self.bottleneck(both))


def build_convolution(channels: int, width: int, side: int) -> nn.Sequential:
    """A convolution and batch normalisation."""
    convolution = nn.Conv2d(channels, width, side, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def measure_scale(features: Tensor) -> FeatureScale:
    """Channels and resolution of feature maps."""
    return FeatureScale(*features.shape[1:])


def collect_features(model: nn.Module, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits ``(n, k)`` and, call by call of the network, its feature maps, finest first.

    Of each resolution the last maps, up to four resolutions counted from the deepest; of large
    images none finer than a quarter of their side, as published for ResNet-50. In a network with
    tokens or attention those of layers with places, up to the last through which all goes; where
    all have one resolution, those of the patches and those of that layer.
    """
    network = get_network(model)
    layers = choose_scales(network, tuple(x.shape[1:]))
    watch = FeatureRecorder(network, x.shape[-2], x.shape[-1], layers)
    with watch.hooks(), watch:
        logits = model(x)
    assert isinstance(logits, Tensor), "the model must return one tensor of logits"
    rows = [len(call[-1]) if call else 0 for call in watch.calls]
    if not all(rows):
        raise ValueError("the network has no feature maps that a mask could be made of")
    if not len(x) <= sum(rows) < max(1, len(x)) + max(1, *rows):
        raise ValueError("the model runs its network several times per image: maps need one pass")
    return logits, watch.calls


def choose_scales(network: nn.Module, shape: tuple[int, ...]) -> list[ChosenLayer]:
    """Layers of a network with tokens or attention whose places masks are drawn from, finest first.

    Empty where features of convolutions come last, which are followed from function to function.
    """
    deepest = choose_layer(network, shape)
    if deepest is None:
        return []
    inner = get_unmasked(network)
    known = survey_network(inner, shape).places
    names = list(known)[: list(known).index(deepest.name) + 1]
    last = {(known[name].height, known[name].width): name for name in names}
    finest = 4 if min(shape[1:]) >= LARGE else 1
    sizes = sorted(last, reverse=True)
    coarser = [last[size] for size in sizes if finest * size[0] <= shape[1]]
    kept = [name for name in coarser if known[name].height >= 1.5 * deepest.places.height]
    kept = kept[1 - SCALES :] or [names[0]]
    chosen = [ChosenLayer(name, inner.get_submodule(name), known[name]) for name in kept]
    return [*(each for each in chosen if each.name != deepest.name), deepest]


class FeatureRecorder(TorchFunctionMode):
    """Keeps, of each call of a network, the last feature maps of each resolution.

    Parameters
    ----------
    network : nn.Module
        Whose calls.
    height, width : int
        Of images.
    layers : sequence of ChosenLayer
        Whose maps are meant, if it is not those that convolutions lead to.
    """

    def __init__(
        self, network: nn.Module, height: int, width: int, layers: Sequence[ChosenLayer]
    ) -> None:
        super().__init__()
        self.network = network
        self.sides = height, width
        self.layers = layers
        self._maps: dict[int, Tensor] = {}
        self.calls: list[list[Tensor]] = []
        self._begin()

    def _begin(self, *_: object) -> None:
        self._features: dict[torch.Size, Tensor] = {}
        self._maps = {}
        self._convolved = False

    def _end(self, *_: object) -> None:
        maps = [self._maps[i] for i in sorted(self._maps)]
        self.calls.append(maps if self.layers else self._chosen())

    def _see_layer(self, i: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = find_tensor(output)
        assert tensor is not None
        self._maps[i] = self.layers[i].places.read_maps(tensor)
        return replace_tensor(output, tensor.clone())  # a change in place would change the maps

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch where calls begin and end."""
        refuse_scripted(self.network)
        refuse_rounded(self.network)
        with ExitStack() as stack:
            stack.callback(self.network.register_forward_pre_hook(self._begin).remove)
            stack.callback(self.network.register_forward_hook(self._end).remove)
            for i, layer in enumerate(self.layers):
                hook = partial(self._see_layer, i)
                stack.callback(layer.module.register_forward_hook(hook).remove)
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.layers:
            return output
        self._convolved |= func in CONVOLUTIONS
        if self._convolved and isinstance(output, Tensor) and output.ndim == 4:
            if func not in AVERAGES and func not in ATTENTION and self._is_picture(output):
                self._features[output.shape[2:]] = output
        return output

    def _is_picture(self, output: Tensor) -> bool:
        # of the image's proportions: tensors with channels last have other ones
        (height, width), (h, w) = self.sides, output.shape[2:]
        finest = 4 if min(self.sides) >= LARGE else 1
        fits = finest * h <= height and finest * w <= width and min(h, w) >= 2
        return fits and round(height / h) == round(width / w)

    def _chosen(self) -> list[Tensor]:
        deepest_first = sorted(self._features.values(), key=lambda each: each.shape[2])
        chosen: list[Tensor] = []
        for features in deepest_first:
            if not chosen or features.shape[2] >= 1.5 * chosen[0].shape[2]:
                chosen.insert(0, features)
        return chosen[-SCALES:]


# Mask networks by file, device and type, so that an attack does not read one in every step.
_loaded: dict[tuple[Path, int, str, torch.dtype], MaskNetwork] = {}


def find_mask_network(model: nn.Module) -> MaskNetwork:
    """The mask network trained for this model; UsageError if there is none.

    In eval mode, parameters frozen.
    """
    path = locate_mask_network(model)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        raise UsageError(
            "no mask network has been trained for this model: call"
            " robusteval.interpreters.rts_training.train_rts(model, data) with training images"
            f" first (there is no file {path.name} in the cache folder {path.parent})"
        ) from None
    first = next(iter(model.state_dict().values()), torch.empty(0))
    place = path, changed, str(first.device), first.dtype
    if place not in _loaded:
        for old in [each for each in _loaded if each[0] == path and each[1] != changed]:
            del _loaded[old]
        _loaded[place] = read_mask_network(path, hash_answers(model))
    return _loaded[place]


def locate_mask_network(model: nn.Module) -> Path:
    """Where the mask network of a model is kept, named by the model's hash."""
    return cache_folder() / f"rts-{hash_answers(model)[:32]}.safetensors"


def read_mask_network(path: Path, model: str) -> MaskNetwork:
    """The mask network in a file, trained for the model of this hash; UsageError if it is not."""
    check_regular(path, WEIGHTS)
    try:
        state, texts = read_sealed(path)
        notes = json.loads(texts[NOTES])
        if notes["model"] != model:
            raise ValueError("of another model")
        c, h, w = notes["shape"]
        network = MaskNetwork(
            (c, h, w), [FeatureScale(*s) for s in notes["scales"]], notes["classes"]
        )
        network.load_state_dict(state)
        network.acceptance = Acceptance(**notes["acceptance"])
    except Exception:  # whatever a file that is not ours makes of this
        raise UsageError(
            f"{path} is damaged, or of another model: remove it and train the mask network anew"
        ) from None
    return network.eval().requires_grad_(False)
