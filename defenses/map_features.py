"""What a detector makes of the maps that several interpreters give for one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.interpreters.resampling import build_enlargement, resample
from robusteval.interpreters.scaling import highest_cells
from robusteval.models.classifier import Classifier
from robusteval.models.fitting import lower_loss
from robusteval.runs.statistics import roc_auc

Channels = Literal["pair", "pair_product", "triple"]
Extractor = Literal["raw", "small_cnn", "vgg16"]

MAPS = {"pair": 2, "pair_product": 2, "triple": 3}
TOP = 0.1  # share of a map's cells whose overlap with another's is measured
TINY = 1e-8  # below any value of a map that means something
RAW = 16  # cells a side
BATCH = 64
RATE = 1e-3


def choose_channels(maps: int, asked: Channels | None) -> Channels:
    """Choose the channels asked for, or those for so many maps; ValueError if they do not fit."""
    if asked is not None and asked not in get_args(Channels):
        raise ValueError(f"channels must be one of {', '.join(MAPS)}, not {asked!r}")
    if maps not in MAPS.values():
        raise ValueError(
            f"a detector looks at the maps of two or three interpreters, not of {maps}"
        )
    channels: Channels = asked or ("pair" if maps == 2 else "triple")
    if MAPS[channels] != maps:
        raise ValueError(f"channels {channels} are made of {MAPS[channels]} maps, not of {maps}")
    return channels


def choose_side(extractor: Extractor, shape: tuple[int, int, int]) -> int:
    """Choose the cells a side that maps of images ``(c, h, w)`` are brought to.

    At most 64, and not many more than the image has pixels; what VGG-16 was trained on is 224.
    """
    return 224 if extractor == "vgg16" else min(64, max(32, *shape[1:]))


def resize_maps(maps: Tensor, side: int) -> Tensor:
    """Resize maps ``(n, 1, h, w)`` to ``(n, 1, side, side)``.

    Bilinear, or the mean of what falls together; plane by plane, so that no digit depends on the
    batch.
    """
    height, width = maps.shape[2:]
    return resample(
        maps,
        (build_resize_matrix(height, side).to(maps), build_resize_matrix(width, side).to(maps)),
    )


def build_resize_matrix(cells: int, wanted: int) -> Tensor:
    """Build the matrix ``(wanted, cells)`` that changes the number of cells."""
    if cells <= wanted:
        return build_enlargement(cells, wanted)
    unit = torch.eye(cells, dtype=torch.float64).unsqueeze(0)
    return F.adaptive_avg_pool1d(unit, wanted)[0].t()


def stack_maps(maps: Sequence[Tensor], channels: Channels, side: int) -> Tensor:
    """Stack maps ``(n, 1, h', w')`` of each interpreter as one image ``(n, k, side, side)``.

    The product, where asked for, is that of the resized maps.
    """
    parts = [resize_maps(each, side) for each in maps]
    if channels == "pair_product":
        parts.append(parts[0] * parts[1])
    return torch.cat(parts, 1)


def list_statistics(maps: Sequence[str], confidence: bool) -> list[str]:
    """List what `compute_statistics` measures, of maps by these names."""
    pairs = ("l1", "l2", "cosine", "spearman", "overlap", "divergence")
    single = ("entropy", "gini", "row", "column", "variation", "above half")
    return [
        *(f"{name} of {a} and {b}" for a, b in combinations(maps, 2) for name in pairs),
        *(f"{name} of {each}" for each in maps for name in single),
        *(("probability of the class", "margin of the class") if confidence else ()),
    ]


def compute_statistics(stack: Tensor, maps: int, logits: Tensor | None) -> Tensor:
    """Compute how maps agree and what each is like ``(n, d)``, on the graph; see `list_statistics`.

    Parameters
    ----------
    stack : Tensor
        From `stack_maps`; of its channels the first `maps` are looked at.
    maps : int
        How many interpreters there are.
    logits : Tensor, optional
        ``(n, classes)``; if given, how sure the classifier is.
    """
    # image by image: the order of a sum, and which exponential is used, can depend on the batch
    rows = []
    for i, image in enumerate(stack[:, :maps].unbind()):
        found = [measure_agreement(image), measure_character(image)]
        if logits is not None:
            found.append(measure_certainty(logits[i]))
        rows.append(torch.cat(found))
    if not rows:
        names = list_statistics([""] * maps, logits is not None)
        return stack.new_zeros(0, len(names))
    return torch.stack(rows)


def measure_agreement(maps: Tensor) -> Tensor:
    """Measure six numbers for each two of some maps ``(m, s, s)``, pair by pair."""
    flat = maps.flatten(1)  # (m, s * s)
    shares = (flat + TINY) / (flat + TINY).sum(1, keepdim=True)
    ranked, highest = rank_values(flat.detach()), highest_cells(flat.detach(), TOP)
    i, j = torch.triu_indices(len(flat), len(flat), 1, device=flat.device)
    a, b, p, q = flat[i], flat[j], shares[i], shares[j]  # (pairs, s * s)
    middle = ((p + q) / 2).log()
    union = (highest[i] | highest[j]).sum(1)
    overlap = (highest[i] & highest[j]).sum(1) / union.clamp_min(1)
    found = [
        (a - b).abs().mean(1),
        ((a - b).square().mean(1) + TINY).sqrt(),
        compute_cosine(a, b),
        compute_cosine(ranked[i], ranked[j]),
        torch.where(union > 0, overlap, 1.0).to(a),
        (p * (p.log() - middle) + q * (q.log() - middle)).sum(1) / 2,
    ]
    return torch.stack(found, 1).flatten()


def compute_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compute the cosine of the angles ``(m,)`` between vectors ``(m, d)``; 0 if one is zero."""
    return (a * b).sum(1) / ((a.square().sum(1) + TINY) * (b.square().sum(1) + TINY)).sqrt()


def rank_values(values: Tensor) -> Tensor:
    """Rank values ``(m, d)`` in each row, around zero, those of equal values shared."""
    ordered = values.sort(1).values
    first = torch.searchsorted(ordered, values, right=False)
    last = torch.searchsorted(ordered, values, right=True)
    return (first + last - values.shape[1]).to(values) / 2


def measure_character(maps: Tensor) -> Tensor:
    """Measure what each of some maps ``(m, s, s)`` is like by six numbers, map by map."""
    flat = maps.flatten(1)
    n = flat.shape[1]
    shares = (flat + TINY) / (flat + TINY).sum(1, keepdim=True)
    grid = shares.view_as(maps)
    place = torch.linspace(0, 1, maps.shape[1]).to(maps)
    order = torch.arange(1, n + 1).to(maps)
    down, across = maps[:, 1:] - maps[:, :-1], maps[:, :, 1:] - maps[:, :, :-1]
    found = [
        -(shares * shares.log()).sum(1) / math.log(n),
        2 * (order * shares.sort(1).values).sum(1) / n - (n + 1) / n,
        (grid.sum(2) * place).sum(1),
        (grid.sum(1) * place).sum(1),
        down.abs().mean((1, 2)) + across.abs().mean((1, 2)),
        (flat > 0.5).to(maps).mean(1),
    ]
    return torch.stack(found, 1).flatten()


def measure_certainty(logits: Tensor) -> Tensor:
    """Measure the highest probability, and how far the highest logit ``(k,)`` is above the next."""
    first, second = logits.topk(2).values
    return torch.stack([logits.softmax(0).max(), first - second])


class Raw(nn.Module):
    """The channels themselves, at 16x16."""

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(n, 256 k)``."""
        return F.adaptive_avg_pool2d(x, RAW).flatten(1)


class Pooled(nn.Module):
    """Mean and maximum of each feature map of some convolutions."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(n, 2 c)``."""
        maps = self.features(x)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


def build_small_cnn(channels: int) -> nn.Sequential:
    """Build four blocks of a convolution each."""
    widths = (channels, 16, 32, 64, 64)
    blocks: list[nn.Module] = []
    for before, width in pairwise(widths):
        blocks += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        blocks += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks)


def adapt_convolution(first: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Adapt a convolution on colour images to one on other channels that responds as strongly.

    Each channel gets the mean of the weights for red, green and blue times 3 / `channels`; three
    channels keep them.
    """
    changed = nn.Conv2d(
        channels,
        first.out_channels,
        kernel_size=(first.kernel_size[0], first.kernel_size[1]),
        padding=(int(first.padding[0]), int(first.padding[1])),
        bias=first.bias is not None,
    )
    weight = first.weight.detach()
    if channels != weight.shape[1]:
        mean = weight.mean(1, keepdim=True) * weight.shape[1] / channels
        weight = mean.expand(-1, channels, -1, -1)
    with torch.no_grad():
        changed.weight.copy_(weight)
        if changed.bias is not None and first.bias is not None:
            changed.bias.copy_(first.bias)
    return changed


def build_vgg16(channels: int) -> nn.Sequential:
    """Build the convolutions of VGG-16 for so many channels, not trained."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16(num_classes=2).features
    features.to_empty(device="cpu")
    assert isinstance(features, nn.Sequential)
    first = features[0]
    assert isinstance(first, nn.Conv2d)
    features[0] = nn.Conv2d(channels, first.out_channels, 3, padding=1)
    return features


def build_extractor(extractor: Extractor, channels: int) -> nn.Module:
    """Build the network of an extractor, to be filled with weights."""
    if extractor == "raw":
        return Raw()
    return Pooled(build_small_cnn(channels) if extractor == "small_cnn" else build_vgg16(channels))


def count_features(extractor: Extractor, channels: int) -> int:
    """Count the features that an extractor gives."""
    return {"raw": RAW * RAW * channels, "small_cnn": 128, "vgg16": 1024}[extractor]


def wrap_extractor(network: nn.Module, extractor: Extractor, mean: Any, std: Any) -> Classifier:
    """Wrap a network as one that takes stacks, in blocks of one size."""
    found = Classifier(
        network, mean=mean, std=std, num_classes=count_features(extractor, len(mean))
    )
    return found.eval().requires_grad_(False)


class Examples(NamedTuple):
    """Stacks to learn from, as some of all rows."""

    stacks: np.ndarray[Any, Any]  # (all rows, k, side, side)
    labels: np.ndarray[Any, Any]  # (all rows,): 1 for attacked images
    weights: np.ndarray[Any, Any]  # (all rows,)
    train: np.ndarray[Any, Any]  # rows
    validation: np.ndarray[Any, Any]


def measure_channels(stacks: np.ndarray[Any, Any], rows: Any) -> tuple[list[float], list[float]]:
    """Measure mean and deviation of each channel in some rows."""
    parts = np.array_split(rows, max(1, len(rows) // BATCH))
    means = np.array([stacks[part].mean((0, 2, 3), dtype=np.float64) for part in parts])
    squares = np.array([np.square(stacks[p]).mean((0, 2, 3), dtype=np.float64) for p in parts])
    share = np.array([len(part) for part in parts]) / len(rows)
    mean = share @ means
    std = np.sqrt(np.maximum(share @ squares - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def train_extractor(
    kind: Extractor,
    examples: Examples,
    *,
    seed: int,
    device: torch.device,
    start: nn.Module | None = None,
    epochs: int = 20,
    advance: Callable[[int], object] = lambda _: None,
) -> Classifier:
    """Train an extractor to tell attacked images from others by their maps.

    Parameters
    ----------
    kind : {"raw", "small_cnn", "vgg16"}
        Which; `raw` learns nothing but means and deviations.
    examples : Examples
        Stacks, of which it learns from some and is judged on others.
    seed : int
        Decides the first weights, the order and which stacks are mirrored.
    device : torch.device
        Where it is trained.
    start : Module, optional
        VGG-16 with the weights to start from. Only its first convolution and its last layer learn.
    epochs : int
        At most; the one of the highest AUC on validation rows is kept, and five in a row without
        a better one are the last.
    advance : callable
        Told after each epoch, and at the end of those that were not needed.

    Returns
    -------
    Classifier
        From stacks to features ``(n, d)``.
    """
    mean, std = measure_channels(examples.stacks, examples.train)
    if kind == "raw":
        advance(epochs)
        return wrap_extractor(Raw(), kind, mean, std)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = (
            Headed.build_vgg(start, len(mean))
            if start is not None
            else Headed.build_small(len(mean))
        )
    learner = Learner(network.to(device), examples, mean, std, seed)
    best, waited = (-1.0, learner.copy_state()), 0
    for done in range(epochs):
        learner.run_one_epoch()
        reached = learner.measure_auc()
        advance(1)
        waited += 1
        if reached > best[0]:
            best, waited = (reached, learner.copy_state()), 0
        if waited == 5:
            advance(epochs - done - 1)
            break
    network.load_state_dict(best[1])
    return wrap_extractor(Pooled(network.features), kind, mean, std).to(device)


class Headed(nn.Module):
    """A convolutional extractor with the head of two logits that it is trained through."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, 2)``."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @classmethod
    def build_small(cls, channels: int) -> Headed:
        """Build the small network."""
        features = build_small_cnn(channels)
        return cls(features, nn.Sequential(Pooled(nn.Identity()), nn.Linear(128, 2)))

    @classmethod
    def build_vgg(cls, network: nn.Module, channels: int) -> Headed:
        """Build a copy of VGG-16 of which only the ends learn."""
        from copy import deepcopy

        vgg: Any = deepcopy(network).requires_grad_(False)
        vgg.features[0] = adapt_convolution(vgg.features[0], channels)
        vgg.classifier[-1] = nn.Linear(vgg.classifier[-1].in_features, 2)
        return cls(vgg.features, nn.Sequential(vgg.avgpool, nn.Flatten(), vgg.classifier))


class Learner:
    """Epochs of Adam on the cross-entropy of weighted examples."""

    def __init__(
        self, network: nn.Module, examples: Examples, mean: Any, std: Any, seed: int
    ) -> None:
        self.network, self.examples = network, examples
        free = [p for p in network.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(free, RATE)
        self.device = free[0].device
        self.draws = torch.Generator().manual_seed(seed)
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1).to(self.device) for v in (mean, std))

    def standardise_stacks(self, rows: Any) -> Tensor:
        """Standardise the stacks in some rows."""
        stacks = torch.from_numpy(np.ascontiguousarray(self.examples.stacks[rows]))
        return (stacks.to(self.device) - self.mean) / self.std

    def run_one_epoch(self) -> None:
        """Learn from every training row once, half of them mirrored."""
        self.network.train()
        train = self.examples.train
        order = torch.randperm(len(train), generator=self.draws).numpy()
        for rows in np.array_split(train[order], max(1, len(train) // BATCH)):
            x = self.standardise_stacks(rows)
            mirrored = torch.rand(len(x), 1, 1, 1, generator=self.draws).to(x) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
            y = torch.from_numpy(self.examples.labels[rows].astype(np.int64)).to(self.device)
            w = torch.from_numpy(self.examples.weights[rows].astype(np.float32)).to(self.device)
            loss = (F.cross_entropy(self.network(x), y, reduction="none") * w).mean()
            lower_loss(loss, self.adam)

    def measure_auc(self) -> float:
        """Measure the AUC on validation rows."""
        self.network.eval()
        rows = self.examples.validation
        parts = np.array_split(rows, max(1, len(rows) // BATCH))
        with torch.no_grad():
            logits = torch.cat([self.network(self.standardise_stacks(part)) for part in parts])
        scores = (logits[:, 1] - logits[:, 0]).cpu().numpy()
        labels = self.examples.labels[rows]
        return roc_auc(scores[labels == 0], scores[labels == 1])

    def copy_state(self) -> dict[str, Tensor]:
        """Copy the weights of the network as it is now."""
        return {name: value.clone() for name, value in self.network.state_dict().items()}
