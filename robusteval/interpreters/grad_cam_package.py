"""Class activation maps of the package grad-cam: for figures and comparison, off the graph."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack, redirect_stderr
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn
from torch.overrides import TorchFunctionMode

from robusteval.interpreters.gradient import select_scores
from robusteval.interpreters.observing import (
    check_read,
    choose_layer,
    draw_noise,
    find_layer,
    get_network,
    observe_calls,
)
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.failures import raise_as_run_error
from robusteval.models.layouts import ATTENTION, SOFTMAX, Layout, Layouts, measure_extent
from robusteval.models.places import Places, has_bypass
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


OF_SLOPES = ("eigengradcam", "gradcam", "gradcam_plus_plus", "hirescam", "layercam", "xgradcam")


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
    """A map of the package grad-cam, with the layer and the reshape that are found here.

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
        maps of at least 2x2; of a network with tokens or attention see
        `robusteval.interpreters.cam.gradcam`.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')`` at the layer's resolution, clipped at 0 and then stretched to
        [0, 1] each by the package.

    Raises
    ------
    ValueError
        If there is no such method, layer or class, the layer gives no feature maps, or the method
        follows derivatives and the logits have none with respect to the layer's places.
    RunError
        If the package fails.
    """
    # here, as it loads OpenCV
    package = import_module("pytorch_grad_cam")
    targets = import_module("pytorch_grad_cam.utils.model_targets")
    ablation = import_module("pytorch_grad_cam.ablation_layer")

    with frozen(model):  # not on the copy, of which nothing is known yet
        found_in_model, places, logits = find_target(model, x, layer, method in OF_SLOPES)
    subject = copy.deepcopy(model).eval().requires_grad_(True)
    target = dict(zip(model.modules(), subject.modules(), strict=True))[found_in_model]
    for part in subject.modules():
        if isinstance(part, Classifier):
            part.block = 1  # the package expects one call of the layer per image
    select_scores(logits.expand(len(x), -1), y)  # for its checks

    class Unresized(getattr(package, METHODS[method])):  # type: ignore[misc]
        def get_target_width_height(self, input_tensor: Tensor) -> None:
            return None

    maps = x.new_zeros(len(x), 1, places.height, places.width)
    with (
        raise_as_run_error(f"the package grad-cam failed at {method}"),
        torch.enable_grad(),
        redirect_stderr(io.StringIO()),  # progress bars
    ):
        explain = Unresized(
            model=subject,
            target_layers=[target],
            reshape_transform=lambda output: places.read_maps(output),
        )
        if method == "ablationcam":
            explain.batch_size = 1  # it answers for several channels where a block asks for one
            if places.unit_axis == -1:  # otherwise places would be ablated
                explain.ablation_layer = ablation.AblationLayerVit()
        for i in range(len(x)):
            image = x[i : i + 1].detach().clone()
            goal = targets.ClassifierOutputTarget(int(y[i]))
            found = explain(input_tensor=image, targets=[goal])
            maps[i] = torch.from_numpy(found).to(maps)
    return maps


def find_target(
    model: nn.Module, x: Tensor, layer: str | None, by_slopes: bool
) -> tuple[nn.Module, Places, Tensor]:
    """The module that is explained, its places, and logits ``(1, k)`` of an image of noise.

    ValueError if there is none whose maps would be those of the whole network.
    """
    network = get_network(model)
    image = draw_noise(x).requires_grad_()
    chosen = None
    if layer is None:
        chosen = choose_layer(network, tuple(x.shape[1:]))
    if layer is not None or chosen is not None:
        module = chosen.module if chosen is not None else find_layer(model, network, layer or "")
        with torch.enable_grad():
            logits, (call,) = observe_calls(model, image, layer)
            assert call.places is not None
            assert call.features is not None
            if by_slopes and call.places.prefix and call.features.requires_grad:
                (slope,) = autograd.grad(
                    logits.square().sum(), call.features, materialize_grads=True
                )
                check_read(model, image, call.places, call.places.read_maps(slope), layer)
        return module, call.places, logits.detach()
    watch = ModuleWatch()
    with ExitStack() as stack, torch.enable_grad(), watch:
        for part in network.modules():
            stack.callback(part.register_forward_hook(watch.see).remove)
        logits = model(image)
    if not watch.found:
        raise ValueError("the network has no feature maps of at least 2x2 before its head")
    module, output, layout = watch.found[-1]
    several = sum(module is each for each, _, _ in watch.found) > 1
    if several or has_bypass(logits, output, None, image):
        raise ValueError(
            "the logits do not depend on one call of the layer alone, as after several passes or"
            " branches: name another layer, or explain each part by itself"
        )
    return module, Places(layout, *measure_extent(output, layout)), logits.detach()


class ModuleWatch(TorchFunctionMode):
    """Collects the modules that give feature maps after the last attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts = Layouts()
        self.found: list[tuple[nn.Module, Tensor, Layout]] = []

    def see(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook."""
        pooling = isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d)
        if not isinstance(output, Tensor) or output.ndim != 4 or pooling:
            return
        layout = self.layouts.find(output)
        if layout is not None and min(measure_extent(output, layout)) > 1:
            self.found.append((module, output, layout))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.layouts.follow(func, args, kwargs, output)
        mixes = isinstance(output, Tensor) and output.ndim > 2 and func in SOFTMAX
        if mixes or func in ATTENTION:
            self.found.clear()
        return output
