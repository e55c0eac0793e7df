"""Grad-CAM and its relatives against the package grad-cam, with the reshapes that it documents."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import small_architectures
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.interpreters import observing
from robusteval.interpreters.cam import gradcam, gradcam_plus_plus, hirescam
from robusteval.interpreters.grad_cam_package import library
from robusteval.interpreters.scaling import min_max
from robusteval.models.classifier import Classifier
from robusteval.models.places import Survey, survey_network


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


class Arranged(nn.Module):
    """Means of features, which one layer gives with channels first or last or as tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.features = nn.Identity()
        self.head = nn.Linear(6, 4)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x).relu()
        if self.form == "last":
            features = features.permute(0, 2, 3, 1)
        if self.form == "tokens":
            features = features.flatten(2).transpose(1, 2)
        places = {"first": (2, 3), "last": (1, 2), "tokens": (1,)}[self.form]
        logits: Tensor = self.head(self.features(features).mean(places))
        return logits


def test_channels_are_ablated_wherever_their_axis_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {form: Arranged(form).eval() for form in ("first", "last", "tokens")}
    x, y = (
        torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1]),
    )
    found = {}
    for form, network in networks.items():
        network.load_state_dict(networks["first"].state_dict())
        found[form] = library(network, x, y, method="ablationcam", layer="features")

    assert found["first"].shape == (2, 1, 4, 4)
    model = Classifier(networks["first"], num_classes=4).eval()  # it runs them in blocks
    found["blocks"] = library(model, x, y, method="ablationcam", layer="features")
    for form in ("last", "tokens", "blocks"):
        assert torch.allclose(found[form], found["first"], atol=1e-5)


def test_layers_are_found_once_and_not_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package works on a copy, of which nothing would be known."""
    surveyed: list[nn.Module] = []

    def survey(network: nn.Module, shape: tuple[int, ...]) -> Survey:
        surveyed.append(network)
        return survey_network(network, shape)

    monkeypatch.setattr(observing, "survey_network", survey)
    network = Arranged("tokens").train()
    for _ in range(2):
        library(network, torch.rand(1, 3, 16, 16), torch.tensor([0]), method="hirescam")

    assert surveyed == [network]
    assert network.training


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
