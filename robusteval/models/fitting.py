"""A step of an optimiser, for whatever is fitted on the side."""

from __future__ import annotations

from torch import Tensor, autograd
from torch.optim import Optimizer


def lower_loss(loss: Tensor, optimiser: Optimizer) -> None:
    """Make one step down a loss `()`, by derivatives for the optimiser's parameters alone."""
    parameters = [each for group in optimiser.param_groups for each in group["params"]]
    for parameter, grad in zip(parameters, autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad
    optimiser.step()
