"""Shortcuts of attacks: whether a network can take them, and where verdicts differ by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.models.classifier import (
    Classifier,
    choose_batch_size,
    choose_block_size,
    frozen,
    predict_classes,
)
from robusteval.models.forward_modes import find_float_type
from robusteval.models.shortcuts import SHORTCUTS, Shortcuts
from robusteval.runs.types import Columns, Finding

BY_SHORTCUTS = "by_shortcuts"  # the column: 0 where verdicts agree, else one of
LOST, WON = 1, 2  # fools the network by shortcuts alone; without alone


@contextmanager
def taking_shortcuts(model: Classifier, shortcuts: Shortcuts | None) -> Iterator[None]:
    """Let passes of a classifier take shortcuts, where these suit."""
    before = model.shortcuts
    model.shortcuts = shortcuts
    try:
        yield
    finally:
        model.shortcuts = before


def predict_by_shortcuts(model: Classifier, shortcuts: Shortcuts, x: Tensor) -> Tensor:
    """The classes ``(n,)`` of images ``(n, c, h, w)`` in the eyes of an attack."""
    found = []
    with taking_shortcuts(model, shortcuts), torch.enable_grad():
        for part in x.split(choose_batch_size(x.shape[1:].numel(), x.device)):  # type: ignore[no-untyped-call]
            found.append(predict_classes(model(part.detach().requires_grad_()).detach()))
    return torch.cat(found)


def choose_autocast_type(device: torch.device) -> torch.dtype:
    """What autocast computes in on a device; UsageError if it knows none there."""
    if not torch.amp.is_autocast_available(device.type):
        raise UsageError(f"torch has no autocast on {device.type}: leave --amp out")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def try_shortcuts(
    names: Sequence[str], models: Sequence[Classifier], x: Tensor
) -> tuple[Shortcuts | None, list[Finding]]:
    """The shortcuts of these names, and what must be known of them; None for no name.

    Parameters
    ----------
    names : sequence of str
        Of `SHORTCUTS`.
    models : sequence of Classifier
        What will be attacked; each is tried.
    x : Tensor
        A few images ``(n, c, h, w)`` in [0, 1].

    Raises
    ------
    UsageError
        If there is no such shortcut, or not here.
    """
    for name in names:
        if name not in SHORTCUTS:
            raise UsageError(f"shortcuts are {' and '.join(SHORTCUTS)}, not {name!r}")
    if not names:
        return None, []
    autocast = None
    if "amp" in names:
        autocast = choose_autocast_type(models[0].device)
        if any(find_float_type(each.network) != torch.float32 for each in models):
            raise UsageError(
                "--amp is for networks in float32, and this one computes in half precision as it"
                " is: leave --amp or --dtype out"
            )
    shortcuts = Shortcuts(autocast, compiles="compile" in names)
    try:
        depends = [depends_on_place(each, shortcuts, x) for each in models]
    except Exception as error:
        raise UsageError(explain_failure(shortcuts, error)) from error
    return shortcuts, [describe_dependence()] if any(depends) else []


def explain_failure(shortcuts: Shortcuts, error: Exception) -> str:
    """One sentence on a pass that broke."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if shortcuts.compiles:
        return (
            f"the network could not be compiled ({text}): leave --compile out, or see that torch"
            " finds a C++ compiler and that torch.compile takes the network"
        )
    return f"the network cannot be called under autocast ({text}): leave --amp out"


def differentiate_by(model: Classifier, shortcuts: Shortcuts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(n, k)`` and a derivative of theirs ``(n, c, h, w)``, by shortcuts."""
    with frozen(model), taking_shortcuts(model, shortcuts), torch.enable_grad():
        z = x.to(model.device).detach().requires_grad_()
        logits = model(z)
        weights = torch.linspace(0.5, 1.5, logits.shape[1]).to(logits)
        (grad,) = torch.autograd.grad((logits * weights).sin().sum(), z)
    return logits.detach(), grad


def depends_on_place(model: Classifier, shortcuts: Shortcuts, x: Tensor) -> bool:
    """Whether the bits of some images are others in another place of a block.

    Step by step they never are: see `ImageByImage`, which a compiled network does without.
    """
    block = model.block or choose_block_size(x.shape[1:].numel(), model.device)
    images = x[torch.arange(block) % len(x)]
    found = differentiate_by(model, shortcuts, images)
    rolled = differentiate_by(model, shortcuts, images.roll(1, 0))
    return not all(torch.equal(a.roll(1, 0), b) for a, b in zip(found, rolled, strict=True))


def describe_dependence() -> Finding:
    """What a reader must know where bits depend on the place of an image."""
    return Finding(
        "compiled",
        False,
        "The last digits of the compiled network's derivatives depend on the place of an image"
        " among others, so that numbers can change a little with --batch-size, --workers and"
        " --shard.",
    )


def compare_verdicts(
    model: Classifier, shortcuts: Shortcuts, x: Tensor, goal: Tensor, *, targeted: bool
) -> Tensor:
    """Whether images ``(n, c, h, w)`` fool a model by shortcuts alone or without alone: ``(n,)``.

    `goal` ``(n,)`` are the classes to leave or, if `targeted`, to reach.
    """
    seen = (predict_by_shortcuts(model, shortcuts, x) == goal) == targeted
    with torch.no_grad():
        true = (predict_classes(model(x)) == goal) == targeted
    return LOST * (seen & ~true) + WON * (true & ~seen)


def count_differences(found: Columns) -> str:
    """On how many images ``(n,)`` verdicts differ by shortcuts: a sentence for a cell's notes."""
    lost, won = (int((found[BY_SHORTCUTS] == which).sum()) for which in (LOST, WON))
    return (
        f"through the run's shortcuts {lost} of {len(found[BY_SHORTCUTS])} images fooled the"
        f" network that hold without them, and were attacked again without; {won} held that fool"
        " it; verdicts are made without"
    )
