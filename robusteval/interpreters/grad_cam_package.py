"""Class activation maps of the package grad-cam: for figures and comparison, off the graph."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack, redirect_stderr
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.interpreters.cam import find_layer, get_network
from robusteval.interpreters.gradient import select_scores
from robusteval.models.classifier import Classifier
from robusteval.models.failures import raise_as_run_error
from robusteval.registry import INTERPRETERS

METHODS = {
    "ablationcam": "AblationCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "gradcam": "GradCAM",
    "gradcam_plus_plus": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "scorecam": "ScoreCAM",
    "xgradcam": "XGradCAM",
}


@INTERPRETERS.add("library", differentiable=False, cost="1 forward to hundreds, by method")
def library(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    method: Literal[
        "ablationcam",
        "eigencam",
        "eigengradcam",
        "gradcam",
        "gradcam_plus_plus",
        "hirescam",
        "layercam",
        "scorecam",
        "xgradcam",
    ] = "eigencam",
    layer: str | None = None,
) -> Tensor:
    """A map of the package grad-cam, which must be installed.

    Image by image on a copy of the model: the package switches modes, writes into parameter
    gradients and swaps layers. EigenCAM does not look at the class. ScoreCAM and AblationCAM take
    one forward pass for each channel of the layer.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.
    method : str
        Which of the package's methods.
    layer : str, optional
        Name of the module whose output is explained. If not given, the last that returns feature
        maps of at least 2x2.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')`` at the layer's resolution, clipped at 0 and then stretched to
        [0, 1] each by the package.

    Raises
    ------
    UsageError
        If the package is not installed.
    ValueError
        If there is no such method, layer or class, or the layer gives no feature maps.
    RunError
        If the package fails.
    """
    try:
        package = import_module("pytorch_grad_cam")
        targets = import_module("pytorch_grad_cam.utils.model_targets")
    except ImportError as error:
        raise UsageError(
            f"the interpreter library needs the package grad-cam ({error}): pip install grad-cam"
        ) from error

    subject = copy.deepcopy(model).eval().requires_grad_(True)
    for part in subject.modules():
        if isinstance(part, Classifier):
            part.block = 1  # the package expects one call of the layer per image
    size, logits, target = choose_layer(subject, x, layer)
    select_scores(logits.expand(len(x), -1), y)  # for its checks

    class Unresized(getattr(package, METHODS[method])):  # type: ignore[misc]
        def get_target_width_height(self, input_tensor: Tensor) -> None:
            return None

    maps = x.new_zeros(len(x), 1, *size)
    with (
        raise_as_run_error(f"the package grad-cam failed at {method}"),
        torch.enable_grad(),
        redirect_stderr(io.StringIO()),  # progress bars
    ):
        explain = Unresized(model=subject, target_layers=[target])
        for i in range(len(x)):
            image = x[i : i + 1].detach().clone()
            goal = targets.ClassifierOutputTarget(int(y[i]))
            found = explain(input_tensor=image, targets=[goal])
            maps[i] = torch.from_numpy(found).to(maps)
    return maps


def choose_layer(
    model: nn.Module, x: Tensor, layer: str | None
) -> tuple[tuple[int, int], Tensor, nn.Module]:
    """Size of the feature maps, logits ``(1, k)`` of a black image, and the module."""
    network = get_network(model)
    candidates = (
        [find_layer(model, network, layer)] if layer is not None else list(network.modules())
    )
    found: list[tuple[nn.Module, Tensor]] = []

    def see(module: nn.Module, _args: Any, output: Any) -> None:
        pooling = isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d)
        if isinstance(output, Tensor) and output.ndim == 4 and not pooling:
            if min(output.shape[2:]) > 1:
                found.append((module, output))

    with ExitStack() as stack, torch.no_grad():
        for module in candidates:
            stack.callback(module.register_forward_hook(see).remove)
        logits: Tensor = model(x.new_zeros(1, *x.shape[1:]))
    if not found:
        raise ValueError(
            "the network has no feature maps of at least 2x2 before its head"
            if layer is None
            else f"layer {layer!r} gives no feature maps (n, channels, h, w) of at least 2x2"
        )
    module, output = found[-1]
    return (output.shape[2], output.shape[3]), logits, module
