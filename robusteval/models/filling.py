"""Building a network whose weights come from a file, without drawing and copying others first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

LARGE = 2**14  # numbers of a tensor that is worth it
DRAWING = {
    *("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_"),
    *("xavier_uniform_", "xavier_normal_", "orthogonal_", "bernoulli_", "exponential_"),
}
# of random numbers these make others
CHANGING = {"mul_", "add_", "sub_", "div_", "clamp_", "erfinv_", "neg_"}


class Unfilled(TorchFunctionMode):
    """Inside, large parameters are not filled with random numbers, which costs seconds.

    What is not random is done as it is written. Buffers are left alone, since a file may lack them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random: list[
            Tensor
        ] = []  # parameters that hold anything; kept, so that ids are theirs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("tensor")
        if isinstance(x, nn.Parameter) and not is_lazy(x) and x.numel() >= LARGE:
            name = getattr(func, "__name__", "")
            if name in DRAWING:
                self.random.append(x)
                return x
            if name in CHANGING and any(x is other for other in self.random):
                return x
        return func(*args, **kwargs)


def adopt_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let large parameters take over a file's tensors as their memory instead of a copy.

    Only where a tensor has its memory for itself, so that no two parameters share it after.
    """
    taken = set()
    for name, parameter in network.named_parameters():
        tensor = weights.get(name)
        if tensor is None or is_lazy(parameter) or tensor.numel() < LARGE:
            continue
        alike = tensor.dtype == parameter.dtype and tensor.shape == parameter.shape
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        place = tensor.data_ptr()
        if alike and alone and place not in taken and tensor.device == parameter.device:
            taken.add(place)
            parameter.data = tensor
