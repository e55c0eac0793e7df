"""Networks small enough to be trained here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


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
