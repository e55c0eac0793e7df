"""Maps made of the attention of a transformer: what the tokens that it answers from looked at.

Both follow the form of `robusteval.interpreters.gradient`. They need attention of all tokens of an
image to all others, in every layer, among the same tokens. Which tokens stand for which place is
found out (`robusteval.models.places`), and so is from which the logits are read: from a class
token, or from all places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from robusteval.interpreters.gradient import is_differentiated, select_scores
from robusteval.interpreters.observing import draw_noise, get_network, get_unmasked, watched
from robusteval.models.classifier import frozen
from robusteval.models.layouts import SOFTMAX, list_tensors
from robusteval.models.masked import Masked
from robusteval.models.places import (
    Places,
    fill_zeros,
    make_probes,
    remember,
    see_changes,
    survey_network,
)
from robusteval.models.precision import refuse_rounded
from robusteval.models.products import apply_image_by_image
from robusteval.models.scripted import refuse_scripted
from robusteval.registry import INTERPRETERS


@INTERPRETERS.add("rollout", differentiable=True, cost="1 forward")
def rollout(model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None) -> Tensor:
    """How much attention each place is paid, followed through all layers of a transformer.

    Attention rollout: Quantifying Attention Flow in Transformers, arXiv:2005.00928, Eq. 1: in each
    layer the mean over heads, half of it the token itself, multiplied over the layers. The class is
    not looked at: the maps of all classes of an image are the same. One forward pass.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0: the attention of the tokens that logits are read from.

    Raises
    ------
    ValueError
        If the network has no such attention, or a class does not exist.
    """
    keep = is_differentiated(x)
    with torch.set_grad_enabled(keep):
        attention = observe_attention(model, x)
        select_scores(attention.logits, y)  # for its checks
        relevance: Tensor | None = None
        for weights in attention.layers:
            mixed = weights.mean(1)  # (n, t, t)
            mixed = (mixed + torch.eye(mixed.shape[1]).to(mixed)) / 2
            relevance = mixed if relevance is None else multiply_matrices(mixed, relevance)
        assert relevance is not None
        return attention.read_places(relevance)


@INTERPRETERS.add("attention_relevance", differentiable=True, cost="1 forward, 1 backward")
def attention_relevance(
    model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None
) -> Tensor:
    """Attention weighted by its derivative of the logit, followed through all layers.

    Generic Attention-model Explainability, arXiv:2103.15679 (Chefer et al.), Eq. 5 and 6 for
    self-attention: in each layer what of attention times derivative is positive, its mean over
    heads, added to what was relevant before. One forward and one backward pass.

    Parameters
    ----------
    model, x, y
        See `robusteval.interpreters.gradient`.
    seeds : Tensor, optional
        Not used: nothing is random.

    Returns
    -------
    Tensor
        Maps ``(n, 1, h', w')``, at least 0.

    Raises
    ------
    ValueError
        If the network has no such attention, or a class does not exist.
    """
    keep = is_differentiated(x)
    with torch.enable_grad():
        attention = observe_attention(model, x if keep else x.detach().requires_grad_())
        scores = select_scores(attention.logits, y)
        # of attention that nothing is made of: nothing is relevant
        slopes = autograd.grad(
            scores.sum(), attention.parts, create_graph=keep, materialize_grads=True
        )
        layers = attention.join(slopes)
        relevance: Tensor | None = None
        for weights, slope in zip(attention.layers, layers, strict=True):
            gain = F.relu(weights * slope).mean(1)  # Eq. 5
            if relevance is None:
                relevance = torch.eye(gain.shape[1]).to(gain).expand_as(gain)
            relevance = relevance + multiply_matrices(gain, relevance)  # Eq. 6
        assert relevance is not None
        maps = attention.read_places(relevance)
    return maps if keep else maps.detach()


def multiply_matrices(left: Tensor, right: Tensor) -> Tensor:
    """Products ``(n, t, t)`` of n pairs of matrices, the same wherever they lie in memory."""
    return apply_image_by_image(torch.bmm, len(left), left, right)


class Attention(NamedTuple):
    """What the layers of a network paid attention to, for n images."""

    logits: Tensor  # (n, k)
    calls: list[list[Tensor]]  # of each call of the network, of each layer (m, heads, t, t)
    tokens: Tokens

    @property
    def parts(self) -> list[Tensor]:
        """The tensors of all calls and layers."""
        return [weights for call in self.calls for weights in call]

    @property
    def layers(self) -> list[Tensor]:
        """Of each layer ``(n, heads, t, t)``; rows look at columns."""
        return self.join(self.parts)

    def join(self, parts: Any) -> list[Tensor]:
        """What there is of each of `parts` as ``(n, heads, t, t)`` of each layer."""
        depth = len(self.calls[0])
        each = [torch.cat(list(parts[layer::depth])) for layer in range(depth)]
        return [weights[: len(self.logits)] for weights in each]

    def read_places(self, relevance: Tensor) -> Tensor:
        """Maps ``(n, 1, h, w)`` of what ``(n, t, t)`` says of the tokens that are read."""
        read = relevance[:, list(self.tokens.read)].mean(1, keepdim=True)  # (n, 1, t)
        return self.tokens.places._replace(form="columns").read_maps(read)


class Tokens(NamedTuple):
    """What the tokens stand for that attend to one another in a network."""

    places: Places
    read: tuple[int, ...]  # those that the logits are read from


def observe_attention(model: nn.Module, x: Tensor) -> Attention:
    """One forward pass in which attention is computed step by step, on the graph if `x` is.

    Without any images the network is shown one of noise.
    """
    network = get_network(model)
    refuse_scripted(network)
    refuse_rounded(network)
    tokens = find_tokens(network, tuple(x.shape[1:]))
    watch = AttentionRecorder(network)
    shown = x if len(x) else draw_noise(x).requires_grad_(x.requires_grad)
    with watched(model, shown), watch.hooks(), watch:
        logits: Tensor = model(shown)
    count = tokens.places.prefix + tokens.places.height * tokens.places.width
    for call in watch.calls:
        check_layers(call, count)
    rows = [len(call[0]) for call in watch.calls]
    if not len(x) <= sum(rows) < max(1, len(x)) + max(1, *rows):
        raise ValueError(
            f"the model runs its network on {sum(rows)} images for a batch of {len(x)}:"
            " maps are defined for one pass per image"
        )
    return Attention(logits[: len(x)], watch.calls, tokens)


COPYING = {"dropout", "to", "type_as", "type", "float", "contiguous", "clone"}
PRODUCTS = {"matmul", "__matmul__", "einsum"}
NO_SLOPE = "the logits have no derivative with respect to attention"
OTHERWISE = "use gradcam, which needs no attention"


def check_layers(layers: list[Tensor], count: int | None = None) -> int:
    """How many tokens attend to one another; ValueError if not all to all in all layers."""
    if not layers:
        raise ValueError(f"the network computes no attention that could be followed: {OTHERWISE}")
    sizes = {tuple(weights.shape[2:]) for weights in layers}
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        raise ValueError(
            "the tokens of the network are not the same from layer to layer, so attention cannot"
            f" be followed through: {OTHERWISE}"
        )
    found = layers[0].shape[2]
    if count is not None and found != count:
        raise ValueError(f"attention is not between the tokens of an image's places: {OTHERWISE}")
    return found


def find_tokens(network: nn.Module, shape: tuple[int, ...]) -> Tokens:
    """What the tokens stand for, found out once for each size of images ``(c, h, w)``."""
    inner = get_unmasked(network)
    return remember(inner, ("tokens", shape), partial(_find_tokens, inner, shape))


def _find_tokens(network: nn.Module, shape: tuple[int, ...]) -> Tokens:
    with frozen(network), torch.enable_grad():
        probes = make_probes(network, shape)
        watch = AttentionRecorder(network)
        filled = fill_zeros(network, torch.Generator().manual_seed(1))
        with watch.hooks(), watch:
            logits = torch.func.functional_call(network, filled, (probes[:1].requires_grad_(),))
        (layers,) = watch.calls
        count = check_layers(layers)
        if any(len(weights) != 1 for weights in layers):
            raise ValueError(f"attention is not between all tokens of an image: {OTHERWISE}")
        places = find_places_of_values(network, probes, shape)
        if places is not None and not is_of_tokens(places, count):
            raise ValueError(
                f"attention is not between the tokens of an image's places: {OTHERWISE}"
            )
        if not (logits.requires_grad and layers[-1].requires_grad):
            raise ValueError(NO_SLOPE)
        (slope,) = autograd.grad(logits.square().sum(), layers[-1], materialize_grads=True)
    found = [places] if places is not None else survey_network(network, shape).places.values()
    known = [each for each in found if is_of_tokens(each, count)]
    if not known:
        raise ValueError(f"it was not found which token stands for which place: {OTHERWISE}")
    rows = slope.abs().amax((0, 1, 3)).nonzero().flatten().tolist()
    if not rows:
        raise ValueError(f"the logits have no derivative along attention: {OTHERWISE}")
    return Tokens(max(known, key=known.count), tuple(rows))


def is_of_tokens(places: Places, count: int) -> bool:
    """Whether these are places of so many tokens."""
    return places.form == "tokens" and places.prefix + places.height * places.width == count


def find_places_of_values(
    network: nn.Module, probes: Tensor, shape: tuple[int, ...]
) -> Places | None:
    """How what the first layer attends to is spread over the image; None if it does not show.

    A square matrix of weights may as well stand between channels. What it weighs, looked at as
    ``(n, rows, channels)`` with a row for each column of the matrix, must follow bands of the
    image from row to row. That holds for tokens in whatever order of axes modules hand them on.
    """
    watch = AttentionRecorder(network)
    with torch.no_grad(), watch.hooks(), watch:
        network(probes)
    values = watch.first
    if values is None or values.ndim != 4 or len(values) != len(probes):
        return None
    rows = values.transpose(1, 2).flatten(2)  # (n, t, heads * d)
    return see_changes(rows).find_places(shape)


class AttentionRecorder(TorchFunctionMode):
    """Computes attention step by step, and keeps of each call of a network what was attended to.

    A softmax of its own is attention where its rows weigh something in a matrix product.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[list[Tensor]] = []
        self.first: Tensor | None = None  # what the first layer weighs (n, heads, t, d)
        self._layers: list[Tensor] = []
        self._candidates: Any = WeakIdKeyDictionary()  # what could be weights, and whose copies

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch where calls begin and end."""
        with ExitStack() as stack:
            stack.callback(self.network.register_forward_pre_hook(self._begin).remove)
            stack.callback(self.network.register_forward_hook(self._end).remove)
            if isinstance(self.network, Masked):  # of two passes the second gives the logits
                inner = self.network.network
                stack.callback(inner.register_forward_pre_hook(self._begin).remove)
            yield

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        output, weights = attend(*args, **kwargs)
        values = args[2] if len(args) > 2 else kwargs["value"]
        self._keep(weights, values if values.ndim == 4 else values.unsqueeze(1))
        return output

    def _keep(self, weights: Tensor, values: Tensor | None) -> None:
        if not self._layers:
            self.first = values
        self._layers.append(weights)

    def _begin(self, *_: object) -> None:
        self._layers = []

    def _end(self, *_: object) -> None:
        self.calls.append(self._layers)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # the weights that it returns are a copy beside the graph of what it returns with them
            given = {**kwargs, "need_weights": False}
            with patch.object(F, "scaled_dot_product_attention", self._attend):
                output, _ = func(*args, **given)
            if not kwargs.get("need_weights", True):
                return output, None
            weights = self._layers[-1]
            return output, weights.mean(1) if kwargs.get("average_attn_weights", True) else weights
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or output.ndim != 4:
            return output
        inputs = [each for each in list_tensors(args) if each.ndim == 4]
        name = getattr(func, "__name__", "")
        if func in SOFTMAX and output.shape[2] == output.shape[3] > 1:
            self._candidates[output] = output
        elif inputs and inputs[0] in self._candidates:
            weights = self._candidates[inputs[0]]
            if name in COPYING:
                self._candidates[output] = weights
            elif name in PRODUCTS and len(inputs) == 2:
                values = inputs[1] if inputs[1].shape[2] == weights.shape[3] else None
                once = all(weights is not each for each in self._layers)
                if once and (values is not None or name == "einsum"):
                    self._keep(weights, values)
        return output


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scaled dot product attention ``(…, t, d)``, and its weights ``(n, heads, t, s)``."""
    if query.ndim == 3:  # one head without an axis of its own
        mask = attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        output, weights = attend(q, k, v, mask, dropout_p, is_causal, scale=scale)
        return output.squeeze(1), weights
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    n = len(query)
    logits = apply_image_by_image(lambda q, k: q @ k.transpose(-2, -1) * factor, n, query, key)
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        else:
            logits = logits + attn_mask
    weights = logits.softmax(-1)
    dropped = F.dropout(weights, dropout_p)
    return apply_image_by_image(torch.matmul, n, dropped, value), weights
