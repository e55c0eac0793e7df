"""A classifier on [0, 1] images, and what is done to any model while it is measured."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.models.call_sizes import Call, CallSizes, call_in_parts, cut_into_blocks
from robusteval.models.forward_modes import (
    ImageByImage,
    find_float_type,
    is_observed,
    is_twice_differentiable,
    twice_differentiable,
    without_checkpointing,
)
from robusteval.models.precision import Scaled, Scales, Unscaled
from robusteval.models.shortcuts import Shortcuts
from robusteval.models.steps import Passes as Passes
from robusteval.models.steps import book_rows as book_rows
from robusteval.models.steps import count_passes as count_passes


class Classifier(nn.Module):
    """A network that maps images in [0, 1] to logits; normalisation happens inside.

    In eval mode the network is called with blocks of one fixed size, the last one padded with
    zeros. The kernels that a convolution or a matrix product picks depend on the shape of the
    batch, and with them the last digits of every logit; under a sign that is enough to change
    an attack's path. With one shape an image's result does not depend on its company. Other sizes
    are used only where they were seen to give the same bits, see `CallSizes`.

    Parameters
    ----------
    network : nn.Module
        Maps normalised images ``(n, c, h, w)`` to logits ``(n, num_classes)``.
    mean, std : sequence of float, optional
        Per channel (or one for all), in units of the [0, 1] pixel range. None: no normalisation.
    num_classes : int
        Number of logits.
    input_shape : tuple of int, optional
        ``(c, h, w)`` the network was made for; a hint, not a check.
    identity : dict, optional
        JSON-able facts that name this model (hashes, architecture); part of every cache key. The
        hash of another classifier, taken over with its facts, is left out, see `WeightsHash`.
    block : int, optional
        Images in every call of the network; None picks one by image size and device, and other
        sizes that give the same bits where they save time.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_classes: int,
        input_shape: tuple[int, int, int] | None = None,
        identity: dict[str, Any] | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, not {block}")
        self.network = network
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.identity = identity or {}
        self.block = block
        self.call_sizes = CallSizes()
        self.shortcuts: Shortcuts | None = None  # that passes may take just now
        self.class_names: tuple[str, ...] | None = None  # of the outputs, where a file says them
        self.arch: str | None = None  # how `load` was told to build the network, with its folder
        self.register_buffer("mean", torch.tensor(tuple(mean or (0.0,))).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std or (1.0,))).view(-1, 1, 1))
        if not bool((self.std > 0).all()):
            raise ValueError("std must be positive in every channel")
        self.training = network.training  # and the modes inside stay as they are

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able facts that name this model; a copy."""
        return claim_identity(self._identity, self.network)

    @identity.setter
    def identity(self, facts: Mapping[str, Any]) -> None:
        self._identity = claim_identity(facts, self.network)

    @property
    def answers(self) -> dict[str, Any]:
        """Identity of the model that gives the logits; another where something stands beside it."""
        return self.identity

    def derive(self, network: nn.Module, **facts: Any) -> Classifier:
        """A classifier of a network made from this one's, given images as this one's is.

        Parameters
        ----------
        network : nn.Module
            Maps normalised images ``(n, c, h, w)`` to logits ``(n, num_classes)``.
        **facts
            JSON-able: what was done to it. They become part of its identity, of which the hash of
            this classifier does not.
        """
        return self.rebuild(network, derive_identity(self, **facts))

    def rebuild(self, network: nn.Module, identity: dict[str, Any]) -> Classifier:
        """A classifier of another network, or identity, given images as this one's is."""
        made = Classifier(
            network,
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            identity=identity,
            block=self.block,
        )
        made.arch = self.arch
        made.class_names = self.class_names
        return made.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the network's arithmetic happens."""
        return self.mean.device

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, num_classes)`` of images ``(n, c, h, w)`` in [0, 1]."""
        x = (x - self.mean) / self.std
        if self.training:
            return self._logits(x)
        x = x.contiguous()  # memory format picks kernels too, so it is fixed as well
        ways = self.shortcuts if self.shortcuts and self.shortcuts.suit(x, self.network) else None
        call, sizes = self._plan_calls(x, ways)
        return call_in_parts(x, sizes, call)

    def _plan_calls(self, x: Tensor, ways: Shortcuts | None) -> tuple[Call, list[int]]:
        block = self.block or choose_block_size(x.shape[1:].numel(), x.device)
        call = partial(self._logits, block=block, ways=ways)
        if self.block is None and len(x) > 0 and ways is None:
            return call, self.call_sizes.cut(x, block, self.network, call)
        return call, cut_into_blocks(len(x), block)

    @contextmanager
    def watched(self, x: Tensor) -> Iterator[None]:
        """While hooks inside see what the network computes for images ``(n, c, h, w)`` in [0, 1].

        And make of each image's values its own. Sizes of calls are tried before it, unseen; where
        images are on a graph, for what is derived twice.
        """
        with twice_differentiable(x):
            twice = is_twice_differentiable()
            if not self.training:
                self._plan_calls(((x - self.mean) / self.std).contiguous(), None)
        with self.call_sizes.watched(self.network, twice):
            yield

    def _logits(self, x: Tensor, block: int = 1, ways: Shortcuts | None = None) -> Tensor:
        dtype, scales = find_float_type(self.network), Scales()
        smallest = ways.autocast if ways and ways.autocast else dtype
        # whoever looks on inside sees derivatives in their own size
        is_scaled = smallest == torch.float16 and x.requires_grad and not is_observed(self.network)
        if is_scaled:
            x = Unscaled.apply(x, scales)
        x = x.to(dtype)
        if self.training:
            logits = self.network(x)
        elif ways is not None:
            logits = ways.call(self.network, x, block)
        else:
            with ImageByImage(len(x), block), without_checkpointing():
                logits = self.network(x)
        logits = check_logits(logits, len(x)).float()
        return Scaled.apply(logits, scales) if is_scaled else logits


def check_logits(logits: object, n: int) -> Tensor:
    """What a network returned for `n` images, if it is logits ``(n, k)``; UsageError if not."""
    if isinstance(logits, Tensor) and logits.ndim == 2:
        if len(logits) != n:
            raise UsageError(
                f"the model returned {len(logits)} rows of logits for {n} images: whose they are"
                " is not known"
            )
        return logits
    if isinstance(logits, Tensor):
        found = f"a tensor of {logits.ndim} axes"
    else:
        found = type(logits).__name__
    raise UsageError(
        f"the model must return one tensor of logits (n, k), not {found}: wrap it in a module that"
        " picks them out"
    )


MADE_FROM = "made_from"  # in an identity: the hash of the model that this one was made from


class WeightsHash(str):
    """The hash of a classifier's file, which is of no other network than that one.

    Code that makes a classifier from another one passes its facts on, and must not pass on this:
    caches would take both for the same. A copy or an unpickled one belongs to no network, since
    the copy's weights may have been changed.
    """

    network: weakref.ref[nn.Module] | None

    def __new__(cls, text: str, network: nn.Module | None = None) -> WeightsHash:
        self = super().__new__(cls, text)
        self.network = None if network is None else weakref.ref(network)
        return self

    def is_of(self, network: nn.Module) -> bool:
        """Whether this is the hash of a network."""
        return self.network is not None and self.network() is network

    def __reduce__(self) -> tuple[type[WeightsHash], tuple[str]]:
        return WeightsHash, (str(self),)


def claim_identity(facts: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The facts that are true of a network: without the hash of another, which it was made from."""
    known = dict(facts)
    sha256 = known.get("sha256")
    if isinstance(sha256, WeightsHash) and not sha256.is_of(network):
        known[MADE_FROM] = str(known.pop("sha256"))
    elif isinstance(sha256, str):
        known["sha256"] = WeightsHash(sha256, network)
    return known


def derive_identity(classifier: Classifier, **facts: Any) -> dict[str, Any]:
    """Identity of a model that is made from a classifier, with facts of its own in addition."""
    known = classifier.identity
    # one without a hash may itself be made from another, which stays the origin of both
    sha256 = known.pop("sha256", known.get(MADE_FROM))
    return {**known, MADE_FROM: sha256 and str(sha256), **facts}


def choose_block_size(values: int, device: torch.device) -> int:
    """Images per network call, for images of `values` numbers: a power of two.

    On two cores a ResNet-20 runs fastest from 32 images of 32x32 up, a SqueezeNet at 2 to 4 images
    of 224x224: activations then stay in the cache. An accelerator wants many more.
    """
    room, most = (400_000, 32) if device.type == "cpu" else (10_000_000, 256)
    size = 2
    while size < most and 2 * size * values <= room:
        size *= 2
    return size


def choose_batch_size(values: int, device: torch.device) -> int:
    """Images of `values` numbers that are worked on at once: a few blocks."""
    return 4 * choose_block_size(values, device)


def choose_graph_size(values: int, device: torch.device) -> int:
    """Images of `values` numbers that are on a graph at once.

    Two blocks on a processor: the way back finds activations of a ResNet-20 in the cache, which
    takes a twentieth less than four blocks; smaller networks take about as much more.
    """
    return (2 if device.type == "cpu" else 4) * choose_block_size(values, device)


def absorb(content: hashlib._Hash, state: Mapping[str, Any]) -> None:
    """Let a hash take up a state dict: names, shapes, types and bits, in the order of names.

    Quantised layers keep tuples and types there, and a module may add what it likes: of this
    plain values count, and of other objects only what they are.
    """
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            if value.is_quantized:
                value = value.dequantize()
            content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            content.update(bits.numpy().tobytes())
        elif isinstance(value, Mapping):
            absorb(content, {f"{name}.{key}": item for key, item in value.items()})
        elif isinstance(value, list | tuple):
            absorb(content, {f"{name}.{i}": item for i, item in enumerate(value)})
        else:
            plain = isinstance(value, int | float | str | bytes | torch.dtype | None)
            content.update(f"{name} {value if plain else type(value).__name__}".encode())


def predict_classes(logits: Tensor) -> Tensor:
    """The class of each row of logits ``(n, k)``, -1 where a logit is not finite."""
    finite = logits.isfinite().all(1)
    return torch.where(finite, logits.argmax(1), -1)


def switch_to_eval(module: nn.Module) -> None:
    """Call a module's `eval`; UsageError if it breaks, as by a `train` of the user's own."""
    try:
        module.eval()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"eval() of the model raised {type(error).__name__} ({text}): its own train or eval is"
            " in the way; torch's train(mode) takes a bool, so give a method for training another"
            " name"
        ) from error


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode and without parameter gradients; put back as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    try:
        switch_to_eval(module)
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None  # so that nothing is added to the user's in place
        yield module
    finally:
        for part, training in modes:
            part.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
