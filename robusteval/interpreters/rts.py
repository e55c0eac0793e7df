"""What a network trained for it thinks a class rests on: a map in one forward pass (RTS).

Follows the form of `robusteval.interpreters.gradient`, except that its values are shares in [0, 1]
that must not be stretched. An interpreter has no data, so the mask network is trained beforehand
(`train_rts`) and kept in the cache folder under the hash of the network that it explains. One that
finds nothing is never kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robusteval.datasets.sources import Data, draw
from robusteval.errors import RunError, UsageError
from robusteval.interpreters.cam import ATTENTION, AVERAGES, CONVOLUTIONS, network_of
from robusteval.interpreters.gradient import class_scores, differentiated
from robusteval.interpreters.meaningful_perturbation import LARGE, blurred, mixed
from robusteval.models.admission import check_labels, wrapped
from robusteval.models.classifier import Classifier, absorb, frozen, predictions
from robusteval.models.failures import raise_as_usage_error
from robusteval.progress import Progress, Silent
from robusteval.registry import INTERPRETERS
from robusteval.runs.cache_folder import cache_folder
from robusteval.runs.storage import digest, write_atomically
from robusteval.search.losses import margin

FORMAT = 1  # of the file and of the network in it
NOTES = "robusteval_rts"  # key of the file's header

BATCH = 32  # images
SCALES = 4  # resolutions of feature maps, at most
HELD_OUT = 256  # images, at most, for the area, and as many for the test
AREA = (0.28, 0.35)  # share of the image that masks are steered to
MOST_AREA = 0.5  # of the test
LEAST_GAP = 0.3  # between both accuracies of the test
LONGER = 4  # times as many steps for a mask network that missed it


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
        If no mask network has been trained for this model.
    ValueError
        If the images are of another size than those it was trained on, or a class does not exist.
    """
    return mask_network(model).explain(model, x, y, confidence)[0]


class Useless(RunError):
    """A mask network missed its test and was not kept."""


class Scale(NamedTuple):
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
        self, shape: tuple[int, int, int], scales: Sequence[Scale], num_classes: int
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

    def score(self, features: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Deepest features, standardised, and how much each place speaks for the class."""
        deep = self.selector["norm"](features[-1])
        return deep, (deep * self._classes(y)[:, :, None, None]).sum(1, keepdim=True)

    def presence(self, features: Sequence[Tensor], y: Tensor) -> Tensor:
        """Logit ``(m,)`` that the image shows the class."""
        return self.score(features, y)[1].mean((1, 2, 3))

    def forward(self, features: Sequence[Tensor], y: Tensor, confidence: float = 0.0) -> Tensor:
        """Masks ``(m, 1, h', w')`` from feature maps, finest first, and classes ``(m,)``."""
        deep, score = self.score(features, y)
        # image by image: the last values of a tensor pass through another sigmoid, which rounds
        # differently, and whose they are depends on the batch
        gate = torch.stack([torch.sigmoid(each) for each in (score - confidence).unbind()])
        deep = deep * gate
        for up, finer in zip(self.up, features[-2::-1], strict=True):
            deep = up(deep, finer)
        shown, hidden = self.last(deep).abs().chunk(2, 1)
        masks: Tensor = shown / (shown + hidden + 1e-6)  # the summand, as both may be zero
        return masks

    def explain(
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
        with torch.set_grad_enabled(differentiated(x)):
            logits, calls = looked(model, x)
            class_scores(logits, y)  # for its checks
            rows = [len(call[-1]) for call in calls]
            classes = torch.split(F.pad(y, (0, sum(rows) - len(y))), rows)
            # call by call: a convolution's last digits depend on the size of the batch
            masks = [
                self(self.chosen(call), each, confidence)
                for call, each in zip(calls, classes, strict=True)
            ]
        return torch.cat(masks)[: len(x)], logits

    def chosen(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The feature maps themselves, if they are what this network was made for."""
        if tuple(scale_of(each) for each in features) != self.scales:
            raise ValueError("the model's feature maps have changed: train the mask network anew")
        return features


class Upsampler(nn.Module):
    """Features at twice the resolution, joined with those that the encoder has there."""

    def __init__(self, channels: int, finer: Scale, width: int) -> None:
        super().__init__()
        self.wider = normalised(channels, 4 * width, 3)
        self.norm = nn.BatchNorm2d(finer.channels, affine=False)
        joined = width + finer.channels
        self.shortcut = normalised(joined, width, 1)
        self.bottleneck = nn.Sequential(
            normalised(joined, max(joined // 4, 4), 1),
            nn.ReLU(),
            normalised(max(joined // 4, 4), max(joined // 4, 4), 3),
            nn.ReLU(),
            normalised(max(joined // 4, 4), width, 1),
        )

    def forward(self, deep: Tensor, finer: Tensor) -> Tensor:
        deep = F.relu(F.pixel_shuffle(F.relu(self.wider(deep)), 2))
        if deep.shape[2:] != finer.shape[2:]:  # of networks that do not halve exactly
            deep = F.interpolate(deep, finer.shape[2:], mode="bilinear", align_corners=False)
        both = torch.cat([deep, self.norm(finer)], 1)
        return F.relu(self.shortcut(both) + self.bottleneck(both))


def normalised(channels: int, width: int, side: int) -> nn.Sequential:
    """A convolution and batch normalisation."""
    convolution = nn.Conv2d(channels, width, side, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def scale_of(features: Tensor) -> Scale:
    """Channels and resolution of feature maps."""
    return Scale(*features.shape[1:])


def looked(model: nn.Module, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits ``(n, k)`` and, call by call of the network, its feature maps, finest first.

    Of each resolution the last maps, up to four resolutions counted from the deepest; of large
    images none finer than a quarter of their side, as published for ResNet-50.
    """
    watch = Scales(network_of(model), x.shape[-2], x.shape[-1])
    with watch.hooks(), watch:
        logits = model(x)
    assert isinstance(logits, Tensor), "the model must return one tensor of logits"
    rows = [len(call[-1]) if call else 0 for call in watch.calls]
    if not all(rows):
        raise ValueError("the network has no feature maps that a mask could be made of")
    if not len(x) <= sum(rows) < max(1, len(x)) + max(1, *rows):
        raise ValueError("the model runs its network several times per image: maps need one pass")
    return logits, watch.calls


class Scales(TorchFunctionMode):
    """Keeps, of each call of a network, the last feature maps of each resolution."""

    def __init__(self, network: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.network = network
        self.sides = height, width
        self.calls: list[list[Tensor]] = []
        self._begin()

    def _begin(self, *_: object) -> None:
        self._features: dict[torch.Size, Tensor] = {}
        self._convolved = False

    def _end(self, *_: object) -> None:
        self.calls.append(self._chosen())

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch where calls begin and end."""
        with ExitStack() as stack:
            stack.callback(self.network.register_forward_pre_hook(self._begin).remove)
            stack.callback(self.network.register_forward_hook(self._end).remove)
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
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


def mask_network(model: nn.Module) -> MaskNetwork:
    """The mask network trained for this model; UsageError if there is none.

    In eval mode, parameters frozen.
    """
    path = file_for(model)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        raise UsageError(
            "no mask network has been trained for this model: call"
            " robusteval.interpreters.rts.train_rts(model, data) with training images first"
            f" (there is no file {path.name} in the cache folder {path.parent})"
        ) from None
    first = next(iter(model.state_dict().values()), torch.empty(0))
    place = path, changed, str(first.device), first.dtype
    if place not in _loaded:
        for old in [each for each in _loaded if each[0] == path and each[1] != changed]:
            del _loaded[old]
        _loaded[place] = opened(path)
    return _loaded[place]


def file_for(model: nn.Module) -> Path:
    """Where the mask network of a model is kept, named by the model's hash."""
    return cache_folder() / f"rts-{hash_of(model)[:32]}.safetensors"


def hash_of(model: nn.Module) -> str:
    """SHA-256 of what a classifier computes: file and normalisation, or all its tensors."""
    if isinstance(model, Classifier) and "sha256" in model.identity:
        normalisation = [model.mean.flatten().tolist(), model.std.flatten().tolist()]
        arch = model.identity.get("arch_sha256")
        return digest([FORMAT, model.identity["sha256"], arch, normalisation])
    content = hashlib.sha256(f"{FORMAT} {network_of(model)}".encode())
    absorb(content, model.state_dict())
    return content.hexdigest()


def opened(path: Path) -> MaskNetwork:
    """The mask network in a file; UsageError if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()[NOTES])
            state = {name: file.get_tensor(name) for name in file.keys()}
        c, h, w = notes["shape"]
        network = MaskNetwork((c, h, w), [Scale(*s) for s in notes["scales"]], notes["classes"])
        network.load_state_dict(state)
        network.acceptance = Acceptance(**notes["acceptance"])
    except Exception:  # whatever a file that is not ours makes of this
        raise UsageError(f"{path} is damaged: remove it and train the mask network anew") from None
    return network.eval().requires_grad_(False)


def ready_rts(
    model: nn.Module,
    data: Data,
    *,
    seed: int = 0,
    steps: int = 300,
    progress: Progress | None = None,
) -> MaskNetwork:
    """The mask network kept for this model, or one trained on the spot; see `train_rts`.

    One that misses its test is trained anew, once, with four times as many steps.
    """
    if file_for(model).exists():
        return mask_network(model)
    progress = progress or Silent()
    try:
        return train_rts(model, data, seed=seed, steps=steps, progress=progress)
    except Useless:
        progress.say(
            f"The masks of rts miss their test at {steps:,} training steps: they get"
            f" {LONGER * steps:,}."
        )
    return train_rts(model, data, seed=seed, steps=LONGER * steps, progress=progress)


def train_rts(
    model: nn.Module,
    data: Data,
    *,
    seed: int = 0,
    steps: int = 300,
    progress: Progress | None = None,
) -> MaskNetwork:
    """Train a mask network for a model, test it on images held out, and keep it.

    In two phases, losses and their weights as in the authors' code, from which they are
    reconstructed: first the gate learns which classes an image shows, then the decoder learns masks
    whose content is enough for the class and whose rest is not. Departs from it in two points. The
    weight of the area is not fixed at 8: on other images held out it is steered until masks show
    28 to 35 %. Of images below 112 pixels the alternative is blurred more, as a kernel of the
    published proportions would leave a digit legible.

    Parameters
    ----------
    model : nn.Module
        Maps images ``(n, c, h, w)`` in [0, 1] to logits; it must have convolutions. Not changed.
    data : Data
        Training images with labels: 100 at least, thousands better. Up to 512 are held out.
    seed : int
        Decides the draw, the start and all noise. The difference between the maps of two seeds is
        the noise floor of RTS.
    steps : int
        Of each phase, with 32 images each: one forward pass in the first phase, three and two
        backward in the second. 300 do for digits, ResNet-20 on CIFAR-10 needs 1,200; published
        were 8,500 and 3,000 for ImageNet.
    progress : Progress, optional
        Told images done.

    Returns
    -------
    MaskNetwork
        In eval mode, frozen, its figures in `acceptance`.

    Raises
    ------
    UsageError
        If there are too few images, labels that the model does not have, or no feature maps.
    Useless
        If the network fails its test: without the region the accuracy must be at least 30 points
        below that with the region alone, and the mean area below one half. Nothing is kept.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, not {steps}")
    if len(data) < 100:
        raise UsageError(f"a mask network needs at least 100 images to train on, not {len(data)}")
    classifier = model if isinstance(model, Classifier) else wrapped(model, data)
    check_labels(data, draw(len(data), None, seed), classifier)
    with frozen(model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        training = Training(model, data, classifier.num_classes, seed)
        training.learn_classes(steps, progress or Silent())
        training.learn_masks(steps, progress or Silent())
        network = training.network.eval().requires_grad_(False)
        network.acceptance = training.accepted()
    found = network.acceptance
    if not found.passed:
        raise Useless(
            f"the mask network is useless and was not kept: on {found.images} images held out the"
            f" accuracy is {found.preserved:.1%} with the masked region alone and"
            f" {found.destroyed:.1%} without it, where 30 points are asked for, and masks cover"
            f" {found.area:.1%} of the image, where less than half is: train with more steps or"
            " more images"
        )
    notes = {
        "shape": list(data.shape),
        "scales": [list(scale) for scale in network.scales],
        "classes": classifier.num_classes,
        "acceptance": found._asdict(),
        "area_weight": training.area_weight,
        "data": data.name,
        "seed": seed,
        "steps": steps,
    }
    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    header = {NOTES: json.dumps(notes, sort_keys=True)}
    write_atomically(file_for(model), safetensors.torch.save(tensors, header))
    return network


class Training:
    """A mask network on its way.

    Parameters
    ----------
    model : nn.Module
        The model that it is to explain, frozen.
    data : Data
        Images to learn from, some of them held out.
    num_classes : int
        Classes there are, two at least.
    seed : int
        Of draw and noise.
    """

    def __init__(self, model: nn.Module, data: Data, num_classes: int, seed: int) -> None:
        self.model = model
        self.data = data
        self.num_classes = num_classes
        self.seed = seed
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.draws = torch.Generator().manual_seed(seed)
        order = draw(len(data), None, seed)
        held = min(HELD_OUT, len(data) // 5)
        self.validation, self.test, self.index = (
            order[:held],
            order[held : 2 * held],
            order[2 * held :],
        )
        self.area_weight = 8.0
        side = min(data.shape[1:])
        self.sigma = 11 / 224 * side if side >= LARGE else side / 8  # of the blur, in pixels
        x, _ = self.images(self.index[:2])
        with raise_as_usage_error(), torch.no_grad():
            _, calls = looked(model, x)
        scales = [scale_of(features) for features in calls[0]]
        self.network = MaskNetwork(data.shape, scales, num_classes).to(self.device)

    def images(self, index: Any) -> tuple[Tensor, Tensor]:
        """Images and labels at these positions."""
        batch = self.data.batch(index)
        return batch.x.to(self.device), batch.y.to(self.device)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches, in an order drawn anew whenever the images are used up."""
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(self.index), generator=self.draws)])
            yield self.images(self.index[order[:BATCH].numpy()])
            order = order[BATCH:]

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of a batch, finest first."""
        with torch.no_grad():
            _, calls = looked(self.model, x)
        return [torch.cat(parts)[: len(x)] for parts in zip(*calls, strict=True)]

    def wrong(self, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Classes ``(n,)``, that share of them not the labels, and which are the labels."""
        real = torch.rand(len(y), generator=self.draws).to(y.device) >= share
        other = torch.randint(1, self.num_classes, (len(y),), generator=self.draws).to(y.device)
        return torch.where(real, y, (y + other) % self.num_classes), real

    def learn_classes(self, steps: int, progress: Progress) -> None:
        """The gate: whether an image shows a class."""
        self.network.train()
        progress.begin("Training RTS: classes", steps * BATCH)
        optimiser = Optimiser(self.network.selector, 1e-2, steps)
        for x, y in self.batches(steps):
            asked, real = self.wrong(y, 0.5)
            presence = self.network.presence(self.features(x), asked)
            optimiser.lower(F.binary_cross_entropy_with_logits(presence, real.to(presence)))
            progress.advance(BATCH)
        progress.end()
        self.network.selector.eval().requires_grad_(False)

    def learn_masks(self, steps: int, progress: Progress) -> None:
        """The decoder: masks whose content decides the class."""
        progress.begin("Training RTS: masks", steps * BATCH)
        optimiser = Optimiser(self.network, 1e-2, steps)
        for step, (x, y) in enumerate(self.batches(steps)):
            asked, real = self.wrong(y, 0.3)
            masks = self.network(self.features(x), asked)
            optimiser.lower(self.loss(x, y, masks, real))
            progress.advance(BATCH)
            if step % 10 == 9:
                self.steer()
        progress.end()

    def loss(self, x: Tensor, y: Tensor, masks: Tensor, real: Tensor) -> Tensor:
        """What a batch of masks costs, on average."""
        shown, hidden = self.parted(x, masks, self.draws)
        margins = margin(self.model(torch.cat([shown, hidden])), y.repeat(2))
        with_region, without = margins.chunk(2)
        # of a class that is not there the mask must show nothing, and nothing must be missing
        preserver = torch.where(real, F.relu(1 - with_region), F.relu(with_region + 1))
        destroyer = torch.where(real, F.relu(without + 5), F.relu(1 - without))
        area = (masks + 5e-4) ** 0.3
        return (
            destroyer.mean()
            + self.area_weight * area.mean()
            + 0.005 * unevenness(masks).mean()
            + 0.3 * preserver.mean()
        )

    def parted(self, x: Tensor, masks: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images ``(n, c, h, w)`` where only the region is left, and where only it is gone.

        What is gone is blurred in half of the images and an even colour with noise in the others.
        """
        n, c, h, w = x.shape

        def normal(deviation: float) -> Tensor:
            return deviation * torch.randn(x.shape, generator=draws).to(x)

        # half of the published figures: those are for pixels in [-1, 1]
        colour = 0.5 + 0.165 * (2 * torch.rand(n, c, 1, 1, generator=draws) - 1)
        flat = colour.to(x) + normal(0.055)
        is_flat = torch.rand(n, 1, 1, 1, generator=draws).to(x) < 0.5
        other = torch.where(is_flat, flat, blurred(x, self.sigma))
        noisy = (x + normal(0.015)).clamp(0, 1)
        masks = F.interpolate(masks, (h, w), mode="bilinear", align_corners=False)
        return mixed(noisy, other, masks), mixed(noisy, other, 1 - masks)

    def steer(self) -> None:
        """Weigh the area so that masks of images held out get neither too large nor too small."""
        area = float(self.masks(*self.images(self.validation[:BATCH])).mean())
        low, high = AREA
        if area > high:
            self.area_weight *= 1.2
        elif area < low:
            self.area_weight /= 1.2

    def masks(self, x: Tensor, y: Tensor) -> Tensor:
        """Masks as `rts` will give them, off the graph."""
        self.network.up.eval()
        with torch.no_grad():
            masks: Tensor = self.network(self.features(x), y)
        self.network.up.train()
        return masks

    def accepted(self) -> Acceptance:
        """What the masks are worth on images that decided nothing."""
        right_with, right_without, area = 0, 0, 0.0
        draws = torch.Generator().manual_seed(self.seed)
        for start in range(0, len(self.test), BATCH):
            x, y = self.images(self.test[start : start + BATCH])
            masks = self.masks(x, y)
            with torch.no_grad():
                parts = [predictions(self.model(part)) for part in self.parted(x, masks, draws)]
            right_with += int((parts[0] == y).sum())
            right_without += int((parts[1] == y).sum())
            area += float(masks.mean((1, 2, 3)).sum())
        self.network.eval()
        n = len(self.test)
        area = area / n if math.isfinite(area) else 1.0
        return Acceptance(right_with / n, right_without / n, area, n)


class Optimiser:
    """Adam on those parameters of a module that are free, its rate a cosine to zero."""

    def __init__(self, module: nn.Module, rate: float, steps: int) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.parameters, rate, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)

    def lower(self, loss: Tensor) -> None:
        """One step."""
        for parameter, grad in zip(
            self.parameters, autograd.grad(loss, self.parameters), strict=True
        ):
            parameter.grad = grad
        self.adam.step()
        self.schedule.step()


def unevenness(masks: Tensor) -> Tensor:
    """Half the squared differences between neighbours, and of the border to nothing, ``(n,)``."""
    across, down = masks[..., 1:] - masks[..., :-1], masks[..., 1:, :] - masks[..., :-1, :]
    border = [masks[..., 0], masks[..., -1], masks[..., 0, :], masks[..., -1, :]]
    parts = [(across, 1.0), (down, 1.0), *((each, 0.3) for each in border)]
    return torch.stack([w * part.square().flatten(1).sum(1) for part, w in parts]).sum(0) / 2
