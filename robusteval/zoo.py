"""Networks small enough to be trained here, and one that is trained on the spot."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval import checkpoint
from robusteval.data import Batch, open_data
from robusteval.errors import RobustevalError, RunError, UsageError

SEED = 0
EPOCHS = 10
BATCH = 64  # images
RATE = 0.01  # at its highest; a cosine to zero
DECAY = 0.01
SHIFT = 2  # pixels, at most, in each direction


def digits_cnn(num_classes: int = 10) -> nn.Module:
    """Three convolutions, global average pooling and one linear layer, for grey 32x32 images."""
    return nn.Sequential(
        *_stage(1, 16),
        nn.MaxPool2d(2),  # (n, 16, 16, 16)
        *_stage(16, 32),
        nn.MaxPool2d(2),  # (n, 32, 8, 8)
        *_stage(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # (n, 64)
        nn.Linear(64, num_classes),
    )


def _stage(width_in: int, width: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(width), nn.ReLU()


def small_cnn(num_classes: int = 10, channels: int = 1) -> nn.Module:
    """Three convolutions, global average pooling and a linear layer without bias.

    The "Small" network of Proper Network Interpretability Helps Adversarial Robustness in
    Classification, arXiv:2006.14748, after its authors' code: nothing between the last
    convolution and the pooling, so maps are signed; for images of even height and width.
    """
    network = nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 100, 7, padding=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # (n, 100)
        nn.Linear(100, num_classes, bias=False),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no parameters.

    Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2: where the width
    grows, the shortcut takes every second pixel and fills up with channels of zeros.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.missing = width - width_in

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps ``(n, width, h / stride, w / stride)``."""
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before, after = self.missing // 2, self.missing - self.missing // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))
        return F.relu(inside + shortcut)


class ResNet(nn.Module):
    """Three stages of residual blocks for small images; module names as is usual for CIFAR."""

    def __init__(self, num_classes: int, *, blocks: int, factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16 * factor, 1, blocks)
        self.layer2 = self._layer(16 * factor, 32 * factor, 2, blocks)
        self.layer3 = self._layer(32 * factor, 64 * factor, 2, blocks)
        self.linear = nn.Linear(64 * factor, num_classes)

    @staticmethod
    def _layer(width_in: int, width: int, stride: int, blocks: int) -> nn.Module:
        others = [Residual(width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Residual(width_in, width, stride), *others)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, num_classes)``."""
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))  # (n, 16 factor, h, w)
        x = self.layer3(self.layer2(x))  # (n, 64 factor, h / 4, w / 4)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20(num_classes: int = 10) -> nn.Module:
    """The residual network of 20 layers for colour images of about 32x32 pixels."""
    return ResNet(num_classes, blocks=3, factor=1)


def wide_resnet14(num_classes: int = 10) -> nn.Module:
    """A residual network of 14 layers, four times as wide, for colour images of about 32x32."""
    return ResNet(num_classes, blocks=2, factor=4)


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {
    "digits_cnn": digits_cnn,
    "small_cnn": small_cnn,
    "small_cnn_rgb": partial(small_cnn, channels=3),
    "resnet20": resnet20,
    "wide_resnet14": wide_resnet14,
}


def demo(cache: Path | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """The checkpoint of a `digits_cnn` trained on handwritten digits, trained if not there yet.

    Parameters
    ----------
    cache : Path, optional
        Folder to keep it in; `cache_folder` if not given.
    progress : callable, optional
        Told steps done and steps in all, from zero on; not called where nothing is trained.

    Returns
    -------
    Path
        A file for `robusteval.checkpoint.load`, named by what it was made from.

    Raises
    ------
    UsageError
        The cache folder cannot be written.
    """
    data = open_data("digits", split="train")
    images = data.batch(range(len(data)))
    path = (cache or cache_folder()) / f"digits_cnn-{_recipe(images)[:16]}.safetensors"
    if _is_sound(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise _unwritable(path.parent) from None
    mean, std = float(images.x.mean()), float(images.x.std())
    with _one_thread():
        network = _trained((images.x - mean) / std, images.y, progress or _silent)
    try:
        checkpoint.save(
            path,
            network.state_dict(),
            arch="robusteval:digits_cnn",
            num_classes=10,
            input_shape=(1, 32, 32),
            mean=[mean],
            std=[std],
            data=data.name,
            epochs=EPOCHS,
            seed=SEED,
        )
    except RunError:
        raise _unwritable(path.parent) from None
    return path


def _unwritable(folder: Path) -> UsageError:
    return UsageError(
        f"cannot write to the cache folder {folder}: "
        "set the environment variable ROBUSTEVAL_CACHE to a folder that can be written"
    )


def cache_folder() -> Path:
    """Where this user's caches belong, or what ``ROBUSTEVAL_CACHE`` says."""
    if chosen := os.environ.get("ROBUSTEVAL_CACHE"):
        return Path(chosen).expanduser()
    home = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(home) or Path.home() / ".cache") / "robusteval"


def _recipe(images: Batch) -> str:
    """Hash of all that decides the weights, as far as one can know it."""
    facts = [Path(__file__).read_bytes(), torch.__version__.encode()]
    facts += [images.ids.tobytes(), np.asarray(images.y).tobytes()]
    return hashlib.sha256(b"\n".join(facts)).hexdigest()


def _is_sound(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except RobustevalError:
        return False
    return True


def _silent(done: int, total: int) -> None:
    pass


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads changes the last digits; a network this small gains little from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(x: Tensor, y: Tensor, progress: Callable[[int, int], None]) -> nn.Module:
    """A network trained on these normalised images; the global generator stays as it was."""
    draws = torch.Generator().manual_seed(SEED)
    total = EPOCHS * (len(x) // BATCH)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        network = digits_cnn().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    done = 0
    progress(done, total)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=draws)
        for index in torch.split(order, BATCH)[: len(x) // BATCH]:
            loss = F.cross_entropy(network(_shifted(x[index], draws)), y[index])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            done += 1
            progress(done, total)
    return network


def _shifted(x: Tensor, draws: torch.Generator) -> Tensor:
    """All images of a batch moved by the same few pixels, the edge repeated."""
    top, left = torch.randint(2 * SHIFT + 1, (2,), generator=draws).tolist()
    h, w = x.shape[2:]
    return F.pad(x, [SHIFT] * 4, mode="replicate")[:, :, top : top + h, left : left + w]
