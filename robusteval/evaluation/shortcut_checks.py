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
from robusteval.models.forward_modes import find_float_type, is_observed
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
) -> tuple[Shortcuts, list[Finding]]:
    """The shortcuts of these names, and what must be known of them.

    Parameters
    ----------
    names : sequence of str
        Of `SHORTCUTS`, one at least.
    models : sequence of Classifier
        What will be attacked; each is tried.
    x : Tensor
        A few images ``(n, c, h, w)`` in [0, 1].

    Raises
    ------
    UsageError
        If there is no such shortcut, or not here, or none of the networks can take it.
    """
    if isinstance(names, str):
        raise UsageError(f"shortcuts cannot be str: give a list such as [{names!r}]")
    for name in names:
        if name not in SHORTCUTS:
            raise UsageError(f"shortcuts are {' and '.join(SHORTCUTS)}, not {name!r}")
    autocast = None
    if "amp" in names:
        autocast = choose_autocast_type(models[0].device)
        for each in models:
            if (dtype := find_float_type(each.network)) != torch.float32:
                raise UsageError(
                    "--amp is for networks in float32, and this one computes in"
                    f" {str(dtype).removeprefix('torch.')}: leave --amp"
                    f"{'' if dtype == torch.float64 else ' or --dtype'} out"
                )
    shortcuts = Shortcuts(autocast, compiles="compile" in names)
    able = [each for each in models if not is_observed(each.network)]
    if not able:
        options = " and ".join(f"--{name}" for name in dict.fromkeys(names))
        raise UsageError(
            "attacks can take no shortcuts through this network, as it has hooks (a mask, or"
            " torch's older weight_norm and spectral_norm), is scripted, or was compiled before:"
            f" leave {options} out"
        )
    depends = [try_network(each, shortcuts, x) for each in able]
    told = [describe_dependence()] if any(depends) else []
    return shortcuts, told + describe_unable(len(models) - len(able), len(models))


def try_network(model: Classifier, shortcuts: Shortcuts, x: Tensor) -> bool:
    """As `depends_on_place`; UsageError if the network cannot be called so."""
    try:
        return depends_on_place(model, shortcuts, x)
    except Exception as error:
        try:  # or it breaks in any case, and not by them
            differentiate_by(model, None, x)
        except UsageError:
            raise
        except Exception:
            raise UsageError(
                f"attacks cannot differentiate this network ({name_error(error)}), and so take no"
                " shortcuts: leave --amp and --compile out"
            ) from error
        raise UsageError(explain_failure(shortcuts, error)) from error


def explain_failure(shortcuts: Shortcuts, error: Exception) -> str:
    """One sentence on a pass that broke."""
    text = name_error(error)
    if shortcuts.compiles:
        return (
            f"the network could not be compiled ({text}): leave --compile out, or see that torch"
            " finds a C++ compiler and that torch.compile takes the network"
        )
    return f"the network cannot be called under autocast ({text}): leave --amp out"


def name_error(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def differentiate_by(
    model: Classifier, shortcuts: Shortcuts | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits ``(n, k)`` and a derivative of theirs ``(n, c, h, w)``, by shortcuts if any."""
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


def describe_unable(unable: int, of: int) -> list[Finding]:
    """What a reader must know where some of the networks that are attacked take no shortcuts."""
    if not unable:
        return []
    return [
        Finding(
            "no-shortcuts",
            False,
            f"Attacks on {unable} of the {of} networks take no shortcuts, as these have hooks (a"
            " mask, say), are scripted, or were compiled before.",
        )
    ]


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


def describe_differences(found: Columns) -> list[str]:
    """On how many images ``(n,)`` verdicts differ by shortcuts: for a cell's notes, where some do.

    That they differ on none stands beside what the shortcuts are, in the report.
    """
    lost, won = (int((found[BY_SHORTCUTS] == which).sum()) for which in (LOST, WON))
    if not lost + won:
        return []
    return [
        f"through the run's shortcuts {lost} of {len(found[BY_SHORTCUTS])} images fooled the"
        f" network that hold without them, and were attacked again without; {won} held that fool"
        " it; verdicts are made without"
    ]
