"""What an ART estimator makes of images, as a module that can be differentiated."""

from __future__ import annotations

from typing import Any

import torch
from art.defences import preprocessor
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robusteval.models.forward_modes import without_checkpointing


class AsSeen(nn.Module):
    """An estimator as a module: its preprocessing, then its network, then the logits."""

    def __init__(self, estimator: PyTorchClassifier) -> None:
        super().__init__()
        self.estimator = estimator
        self.network = estimator._model  # ART's wrapper, returns a list

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)`` of images ``(n, c, h, w)``, n = 0 included."""
        n = len(x)
        if n == 0:  # not every network takes an empty batch
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        if self.estimator.all_framework_preprocessing:
            x, _ = self.estimator._apply_preprocessing(x, y=None, fit=False, no_grad=False)
        else:
            x = NumpyPreprocessing.apply(x, self.estimator)
        with without_checkpointing():
            layers = self.network(x.clone())  # which it may write to
        # a network that returns several things makes these look like its layers
        logits = layers[-1] if isinstance(layers, list) else None
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                "the estimator's network must return one tensor of logits (n, k): wrap it in a"
                " module that does"
            )
        return logits[:n].float()


class NumpyPreprocessing(torch.autograd.Function):
    """An estimator's preprocessing in NumPy, with ART's estimate of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: PyTorchClassifier) -> Tensor:
        """Preprocessed images."""
        ctx.images, ctx.estimator = x.detach().cpu().numpy(), estimator
        z, _ = estimator._apply_preprocessing(ctx.images.copy(), y=None, fit=False)
        return torch.as_tensor(z).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The estimate; not differentiable again, which is a ValueError."""
        (grad,) = grads
        if torch.is_grad_enabled():  # as the derivative is to be differentiated
            raise ValueError(explain_no_second_derivative(ctx.estimator))
        with torch.enable_grad():  # the normaliser behind a NumPy defence is in torch
            passed = ctx.estimator._apply_preprocessing_gradient(ctx.images, grad.cpu().numpy())
        return torch.as_tensor(passed).to(grad), None


def explain_no_second_derivative(estimator: PyTorchClassifier) -> str:
    """Say what to put in the place of preprocessing in NumPy, torch twins by name."""
    found = []
    for step in estimator.preprocessing_operations:
        if not isinstance(step, PreprocessorPyTorch):
            name = type(step).__name__
            twin = f"{name}PyTorch"
            known = hasattr(preprocessor, twin)
            found.append(f"{name} (use {twin})" if known else f"{name} (ART has none in torch)")
    return (
        "maps of a derivative need preprocessing that torch can differentiate twice, not"
        f" {', '.join(found)}: take a PreprocessorPyTorch, or put it into the network"
    )
