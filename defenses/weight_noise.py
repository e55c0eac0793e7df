"""Weights that are averaged over a training, and weights that are made worse before each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, autograd, nn


class WeightAverage:
    """The exponential moving average of a network's state over the steps of a training.

    Uncovering the Limits of Adversarial Training, arXiv:2010.03593, section 4.4, judges and keeps
    it in the place of the last weights. Statistics of batch normalisation are averaged, too. The
    first steps count more than `decay` says, as otherwise the random weights would: after step t
    the old average keeps the lesser of `decay` and (1 + t) / (10 + t).

    Parameters
    ----------
    network : nn.Module
        Whose state is averaged.
    decay : float
        Share of the old average that a step leaves.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step, counted from zero, into the average."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in self._now().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - keep)
            else:
                self.state[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the average, until it is left."""
        now = {name: value.clone() for name, value in self._now().items()}
        self.network.load_state_dict(self.state)
        try:
            yield
        finally:
            self.network.load_state_dict(now)


@contextmanager
def worst_weights(
    network: nn.Module, loss: Callable[[], Tensor], gamma: float, processes: int = 1
) -> Iterator[None]:
    """Move each weight matrix where the loss rises, by `gamma` times its norm, until it is left.

    Adversarial Weight Perturbation Helps Robust Generalization, arXiv:2004.05884, Eq. 9 and 10, in
    one step, as its authors' code does it: layer by layer, and only tensors of two and more
    dimensions. Buffers are as before afterwards, so that this look at the loss leaves no trace in
    the statistics of batch normalisation.

    Parameters
    ----------
    network : nn.Module
        Whose weights are moved.
    loss : callable
        Gives the mean loss of a batch, on the graph.
    gamma : float
        Size of the move, relative to the norm of a weight; 0 moves nothing and costs nothing.
    processes : int
        That take the same step together.
    """
    weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1] if gamma else []
    if not weights:
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    grads = autograd.grad(loss(), weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for buffer, kept in buffers:
            buffer.copy_(kept)
        for weight, grad in zip(weights, grads, strict=True):
            if grad is None:
                continue
            if processes > 1:
                dist.all_reduce(grad)
            weight.add_(grad * (gamma * weight.norm() / grad.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
