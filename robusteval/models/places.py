"""Where in the image the values of a layer belong: channels, places and tokens that are neither.

Feature maps are written as ``(n, channels, h, w)``, ``(n, h, w, channels)`` or tokens, in front of
which others may stand that belong to no place (class and register tokens). Which of these a tensor
is cannot be read from its shape. It is found out: bands of an image are changed one after the
other, and a row of places is what changes most with a certain band of rows. Where the network also
takes images of other sizes, the axes must grow as the image does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robusteval.models.classifier import frozen
from robusteval.models.forward_modes import find_float_type
from robusteval.models.scripted import is_scripted

Form = Literal["first", "last", "tokens", "columns"]
Shape = tuple[int, ...]
T = TypeVar("T")

BANDS = 4  # into which each side of the image is cut
MOST_PREFIX = 16  # tokens that belong to no place
# Of 1. Seen with random weights where the axes are right: mostly 0.5 to 1, and lower where all
# places attend to one another; where they are not, below 0.05.
LEAST_SLOPE = 0.15
LEAST_CORRELATION = 0.8


class Places(NamedTuple):
    """How a tensor is spread over the image.

    Attributes
    ----------
    form : {"first", "last", "tokens", "columns"}
        ``(n, channels, h, w)``, ``(n, h, w, channels)``, ``(n, prefix + h * w, channels)`` or
        ``(n, channels, prefix + h * w)``.
    height, width : int
        Places.
    prefix : int
        Tokens in front of them.
    """

    form: Form
    height: int
    width: int
    prefix: int = 0

    @property
    def unit_axis(self) -> int:
        """The axis of channels."""
        return 1 if self.form in ("first", "columns") else -1

    def read_maps(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(n, channels, h, w)``, without the tokens in front; on its graph."""
        if self.form == "first":
            return tensor
        if self.form == "last":
            return tensor.permute(0, 3, 1, 2)
        tokens = tensor.transpose(1, 2) if self.form == "tokens" else tensor
        places = tokens[:, :, self.prefix :]
        return places.reshape(*places.shape[:2], self.height, self.width)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor can be one of this kind."""
        shape = tuple(tensor.shape)
        if self.form in ("tokens", "columns"):
            axis = 1 if self.form == "tokens" else 2
            return len(shape) == 3 and shape[axis] == self.prefix + self.height * self.width
        sides = (2, 3) if self.form == "first" else (1, 2)
        return len(shape) == 4 and tuple(shape[i] for i in sides) == (self.height, self.width)


class Survey(NamedTuple):
    """What is known of the layers of a network on images of one size."""

    places: dict[str, Places]  # of modules whose values belong to places, in the order they end
    layer: str | None  # the last of them through which all goes and whose places count
    tokens: bool  # whether there are any in it: values (n, tokens, channels) or attention


_known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def remember(network: nn.Module, key: tuple[Any, ...], find: Callable[[], T]) -> T:
    """What was found out once about a network, however its weights change afterwards.

    A network that draws at random does so from the same seed, and not from global state: what it
    answers afterwards does not depend on whether this was known.
    """
    known = _known.setdefault(network, {})
    if key not in known:
        devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.default_generator.manual_seed(0)
            known[key] = find()
    found: T = known[key]
    return found


def survey_network(network: nn.Module, shape: Shape) -> Survey:
    """Find out, once for each size of images ``(c, h, w)``, which layers have places.

    The network, which is given normalised images, runs in eval mode on up to 12 images of noise,
    and comes out as it went in.
    """
    return remember(network, ("survey", tuple(shape)), partial(_survey, network, tuple(shape)))


def find_places(network: nn.Module, layer: str, shape: Shape) -> Places | None:
    """The places of the named module of a network, None if it has none that could be found."""
    return survey_network(network, shape).places.get(layer)


def _survey(network: nn.Module, shape: Shape) -> Survey:
    # whoever watches the network is not to see this
    with torch._C.DisableTorchFunction(), frozen(network):
        probes = make_probes(network, shape)
        watch = LayerWatch(len(probes))
        with torch.no_grad(), watch.hooks(network):
            network(probes)
        arranged = {id(seen): seen for seen in watch.seen.values()}
        known = {key: seen.find_places(shape) for key, seen in arranged.items()}
        found = {
            name: places
            for name, seen in watch.seen.items()
            if watch.runs[name] == 1 and (places := known[id(seen)]) is not None
        }
        found = {name: found[name] for name in check_sizes(network, shape, found)}
        layer = find_last_layer(network, probes[:1], found)
    return Survey(found, layer, watch.tokens)


def make_probes(network: nn.Module, shape: Shape) -> Tensor:
    """Noise ``(1 + 2 * BANDS, c, h, w)``: an image, and it with each band of rows and columns new.

    Its values are spread like those of normalised photographs.
    """
    generator = torch.Generator().manual_seed(0)
    both = torch.randn((2, *shape), generator=generator)
    base, other = both[0], both[1]
    probes: Tensor = base.repeat(1 + 2 * BANDS, 1, 1, 1)
    for i in range(BANDS):
        rows, columns = (find_band(i, side) for side in shape[1:])
        probes[1 + i, :, rows] = other[:, rows]
        probes[1 + BANDS + i, :, :, columns] = other[:, :, columns]
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return probes.to(device=device, dtype=find_float_type(network))


def find_band(i: int, side: int) -> slice:
    """The pixels of a band."""
    return slice(i * side // BANDS, (i + 1) * side // BANDS)


class Seen(NamedTuple):
    """How much a layer's values changed with each band, squared and summed over one axis."""

    shape: Shape
    by_axis: dict[int, Tensor]  # the axis that was summed over: (2 * BANDS, …) float64

    def find_places(self, image: Shape) -> Places | None:
        """The arrangement that explains the changes best, if one explains them."""
        best, places = LEAST_SLOPE, None
        for candidate in list_arrangements(self.shape, image):
            changes = self.by_axis[candidate.unit_axis % len(self.shape)]
            flat = changes.reshape(2, BANDS, -1)
            grid = flat[:, :, candidate.prefix :]
            slope = measure_order(grid.reshape(2, BANDS, candidate.height, candidate.width))
            if slope > best and not has_own_band(flat[:, :, : candidate.prefix], grid):
                best, places = slope, candidate
        return places


def see_changes(tensor: Tensor) -> Seen:
    """What the bands changed in values for all probes, ``(n, a, b)`` or ``(n, a, b, c)``."""
    squares = (tensor[1:] - tensor[:1]).float().square_()
    axes = (1, 3) if tensor.ndim == 4 else (1, 2)
    return Seen(tuple(tensor.shape), {i: squares.sum(i).double().cpu() for i in axes})


def list_arrangements(shape: Shape, image: Shape) -> Iterator[Places]:
    """What a tensor ``(n, a, b)`` or ``(n, a, b, c)`` could be, for images ``(c, h, w)``."""
    if len(shape) == 4:
        for form, height, width in (("first", *shape[2:]), ("last", *shape[1:3])):
            if min(height, width) > 1:
                yield Places(form, height, width)  # type: ignore[arg-type]
        return
    forms: tuple[Form, Form] = ("tokens", "columns")
    for form, count in zip(forms, shape[1:], strict=True):
        for prefix in range(min(MOST_PREFIX, count - 4) + 1):
            for height, width in list_grids(count - prefix, image):
                yield Places(form, height, width, prefix)


def list_grids(count: int, image: Shape) -> Iterator[tuple[int, int]]:
    """Sides of grids with so many places that are as far apart down as across, up to rounding."""
    rows, columns = image[1:]
    ideal = math.sqrt(count * rows / columns)
    for height in range(max(2, math.floor(ideal) - 1), math.ceil(ideal) + 2):
        width = count // height
        if height * width == count and width > 1:
            skew = abs(height * columns - width * rows)
            if height <= rows and width <= columns and skew <= max(rows, columns):
                yield height, width


def has_own_band(prefix: Tensor, places: Tensor) -> bool:
    """Whether tokens ``(2, BANDS, p)`` change with one band as much as places ``(2, BANDS, m)``."""
    alone, usual = (
        (changes / changes.sum(1, keepdim=True).clamp_min(1e-300)).amax(1)
        for changes in (prefix, places)
    )
    return bool((alone >= usual.mean(1, keepdim=True)).any())


def measure_order(changes: Tensor) -> float:
    """How far places follow the bands, from `changes` ``(2, BANDS, h, w)`` by rows and columns.

    For each place the mean band, weighted by how much it changed. Of a line through these over the
    places' own rows (and columns), the slope in units of that of the image itself; the lower of
    both, and 0 where rows or columns do not explain the values.
    """
    shares = changes / changes.sum(1, keepdim=True).clamp_min(1e-300)
    band = torch.arange(BANDS, dtype=changes.dtype)
    mean = (shares * band.view(1, -1, 1, 1)).sum(1)  # (2, h, w)
    slopes = []
    for values in (mean[0], mean[1].t()):  # down, then across
        count = len(values)
        place = (torch.arange(count, dtype=changes.dtype) + 0.5) * BANDS / count
        offset = (place - place.mean()).unsqueeze(1).expand_as(values)
        centred = values - values.mean()
        spread = centred.norm() * offset.norm()
        if not float(spread) > 0:
            return 0.0
        joint = (centred * offset).sum()
        if joint / spread < LEAST_CORRELATION:
            return 0.0
        slopes.append(float(joint / offset.square().sum()))
    return min(slopes)


class LayerWatch:
    """Forward hooks that note what the modules of a network give for `count` images."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen: dict[str, Seen] = {}
        self.runs: dict[str, int] = {}
        self.tokens = False
        self._last: tuple[Tensor, int, Seen] | None = None  # an output, its version, what was seen

    def hooks(self, network: nn.Module) -> ExitStack:
        """Watch while the context lasts."""
        stack = ExitStack()
        for name, module in network.named_modules():
            if name and not is_scripted(module):
                hook = partial(self._see, name)
                stack.callback(module.register_forward_hook(hook).remove)
        return stack

    def _see(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        tensor = find_tensor(output)
        self.seen.pop(name, None)  # in the order in which they end
        if tensor is None or tensor.ndim not in (3, 4) or not tensor.is_floating_point():
            return
        if len(tensor) != self.count:
            return
        self.tokens |= tensor.ndim == 3 and min(tensor.shape[1:]) > 1
        if self._last is not None and self._last[0] is tensor:
            if self._last[1] == tensor._version:  # handed on, as by a dropout
                self.seen[name] = self._last[2]
                return
        seen = see_changes(tensor)
        if bool(seen.by_axis[1].isfinite().all()):  # and so are all values, which are far more
            self.seen[name] = seen
            self._last = tensor, tensor._version, seen


def find_tensor(output: Any) -> Tensor | None:
    """What a module gives: a tensor, or the first of a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def replace_tensor(output: Any, tensor: Tensor) -> Any:
    """The same output with another tensor in the place of `find_tensor`'s."""
    if not isinstance(output, tuple | list):
        return tensor
    rest = [tensor, *output[1:]]
    return rest if isinstance(output, list) else tuple(rest)


def check_sizes(network: nn.Module, shape: Shape, found: dict[str, Places]) -> list[str]:
    """Of the layers with places those whose axes grow as the image does, as far as it may."""
    kept = list(found)
    for side in (1, 2):
        larger = list(shape)
        larger[side] *= 2
        shapes = read_shapes(network, tuple(larger))
        kept = [
            name
            for name in kept
            if name not in shapes or grows_along(found[name], shapes[name], side)
        ]
    return kept


def read_shapes(network: nn.Module, shape: Shape) -> dict[str, Shape]:
    """What each module gives for one image of another size; nothing where it takes none."""
    shapes: dict[str, Shape] = {}

    def see(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        tensor = find_tensor(output)
        if tensor is not None:
            shapes[name] = tuple(tensor.shape)

    with ExitStack() as stack, torch.no_grad():
        for name, module in network.named_modules():
            if not is_scripted(module):
                stack.callback(module.register_forward_hook(partial(see, name)).remove)
        try:
            network(make_probes(network, shape)[:1])
        except Exception:  # of any kind: the network is the user's, and made for one size
            return {}
    return shapes


def grows_along(places: Places, shape: Shape, side: int) -> bool:
    """Whether a layer has more places in its shape for images twice as high (`side` 1) or wide (2).

    As many as before are no contradiction: there are layers that bring all images to one size.
    """
    height, width = places.height * (2 if side == 1 else 1), places.width * (2 if side == 2 else 1)
    if places.form in ("tokens", "columns"):
        if len(shape) != 3:
            return False
        before = places.height * places.width
        now = shape[1 if places.form == "tokens" else 2] - places.prefix
        return now == before or abs(now - height * width) <= max(height, width)
    if len(shape) != 4:
        return False
    sides = shape[2:] if places.form == "first" else shape[1:3]
    same = sides == (places.height, places.width)
    return same or (abs(sides[0] - height) <= 1 and abs(sides[1] - width) <= 1)


def find_last_layer(network: nn.Module, image: Tensor, found: dict[str, Places]) -> str | None:
    """The last layer with places through which all of the image goes to the logits.

    And whose places count: what a class token has gathered before is no longer read from them.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = find_tensor(output)
        assert tensor is not None
        outputs.pop(name, None)
        outputs[name] = tensor
        return replace_tensor(output, tensor.clone())  # a change in place would change what is kept

    generator = torch.Generator().manual_seed(1)
    filled = fill_zeros(network, generator)
    with ExitStack() as stack, torch.enable_grad():
        for name, module in network.named_modules():
            if name in found:
                stack.callback(module.register_forward_hook(partial(keep, name)).remove)
        leaf = image.detach().clone().requires_grad_()
        logits = find_tensor(torch.func.functional_call(network, filled, (leaf.clone(),)))
        wanted = {name: t for name, t in outputs.items() if t.requires_grad}
        if logits is None or not logits.requires_grad or not wanted:
            return None
        weight = torch.randn(logits.shape, generator=generator).to(logits)
        slopes = torch.autograd.grad(
            (logits * weight).sum(), list(wanted.values()), retain_graph=True, allow_unused=True
        )
    for name, slope in reversed(list(zip(wanted, slopes, strict=True))):
        if slope is not None and bool((found[name].read_maps(slope) != 0).any()):
            if not has_bypass(logits, wanted[name], None, leaf):
                return name
    return None


def fill_zeros(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values for parameters that are all zero, by name.

    Such as the last layer of a network that was not trained yet: nothing would come through it.
    """
    return {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in network.named_parameters()
        if p.is_floating_point() and not bool(p.any())
    }


def has_bypass(logits: Tensor, features: Tensor, image: Any, leaf: Tensor | None = None) -> bool:
    """Whether logits depend on the image in a way that leads past some features.

    Parameters
    ----------
    logits, features : Tensor
        On one graph.
    image : Node, optional
        Of the graph, where the image comes from; or None, and `leaf` is the image.
    leaf : Tensor, optional
        An image without a history.
    """
    left, seen = [logits.grad_fn], {features.grad_fn, None}
    while left:
        node: Any = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is image or (leaf is not None and getattr(node, "variable", None) is leaf):
            return True
        left += [following for following, _ in node.next_functions]
    return False
