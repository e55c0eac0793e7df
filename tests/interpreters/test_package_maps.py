"""Grad-CAM and its relatives against the package grad-cam, with the reshapes that it documents."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import small_architectures
import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.interpreters.cam import gradcam, gradcam_plus_plus, hirescam
from robusteval.interpreters.scaling import min_max


def from_tokens(tensor: Tensor) -> Tensor:
    """The package's for a ViT of 4x4 patches and a class token."""
    maps = tensor[:, 1:, :].reshape(len(tensor), 4, 4, tensor.shape[2])
    return maps.transpose(2, 3).transpose(1, 2)


def from_last(tensor: Tensor) -> Tensor:
    """The package's for Swin, which here gives maps with channels last."""
    return tensor.transpose(2, 3).transpose(1, 2)


CASES = [
    pytest.param("vit_class", "blocks.1.norm1", from_tokens),
    pytest.param("swin", "layers.1.blocks.0.norm1", from_last),
    pytest.param("convnext", "stages.2", None),
    pytest.param("tv_maxvit", "blocks.0", None, marks=pytest.mark.slow),
    pytest.param("efficientnet", "blocks.3", None, marks=pytest.mark.slow),
]
METHODS = {"GradCAM": gradcam, "GradCAMPlusPlus": gradcam_plus_plus, "HiResCAM": hirescam}


@pytest.mark.parametrize(("name", "layer", "reshape"), CASES)
def test_maps_are_those_of_the_package(
    name: str, layer: str, reshape: Callable[[Tensor], Tensor] | None
) -> None:
    row = small_architectures.ROWS[name]
    pytest.importorskip(row.package, exc_type=ImportError)
    package: Any = import_module("pytorch_grad_cam")
    targets: Any = import_module("pytorch_grad_cam.utils.model_targets")
    network = small_architectures.build(name)
    x = torch.rand(2, 3, row.side, row.side, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1, 3])
    for method, ours in METHODS.items():
        explain = getattr(package, method)(
            model=network,
            target_layers=[network.get_submodule(layer)],
            reshape_transform=reshape,
        )
        goals = [targets.ClassifierOutputTarget(int(k)) for k in y]
        theirs = torch.from_numpy(explain(input_tensor=x, targets=goals))
        explain.activations_and_grads.release()
        mine = F.interpolate(
            min_max(ours(network, x, y, layer=layer)), x.shape[2:], mode="bilinear"
        )

        assert float((min_max(mine)[:, 0] - theirs).abs().max()) <= 2e-3
        assert float(theirs.max()) > 0.99
