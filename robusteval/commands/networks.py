"""Other networks beside the one that a command is about, each named with its own options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robusteval.errors import UsageError
from robusteval.registry import explain_unknown
from robusteval.registry.signatures import read_number

from .session import load_model

if TYPE_CHECKING:
    from robusteval.models.classifier import Classifier
    from robusteval.progress import Bars

# of `evaluate`, by the same names
OPTIONS = ("arch", "mean", "std", "num_classes", "weights", "dtype")
FORM = "FILE,arch=ARCH,mean=M,std=S"


class NetworkSpec(NamedTuple):
    """A checkpoint with the options that say how it is read."""

    checkpoint: str
    options: dict[str, Any]


def parse_network(text: str, what: str = "--target") -> NetworkSpec:
    """``FILE`` or ``FILE,arch=net.py:Net,mean=.485,.456,.406,std=.25``, each option once.

    What stands between commas and is no ``option=value`` goes on with what was before it.
    UsageError, which begins with `what` the text is, if it has another form.
    """
    parts: list[str] = []
    for piece in text.split(","):
        name = piece.partition("=")[0].strip()
        if parts and (name not in OPTIONS or "=" not in piece):
            if "=" in piece:
                raise UsageError(f"{what} {text}: {explain_unknown('option', name, list(OPTIONS))}")
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    checkpoint, *given = (part.strip() for part in parts)
    options: dict[str, Any] = {}
    for part in given:
        name, _, value = (each.strip() for each in part.partition("="))
        if not value or name in options:
            raise UsageError(f"{what} {text}: write {FORM}, each option once")
        options[name] = read_option(f"{what} {text}", name, value)
    if not checkpoint or checkpoint.partition("=")[0] in OPTIONS:
        raise UsageError(f"{what} {text}: begin with the checkpoint, {FORM}")
    if checkpoint != "demo" and not os.path.exists(checkpoint):
        raise UsageError(f"{what}: there is no file {checkpoint}")
    return NetworkSpec(checkpoint, options)


def read_option(text: str, name: str, value: str) -> Any:
    """The value of an option as `evaluate` reads it; UsageError if it is none."""
    try:
        if name == "num_classes":
            return int(value)
        if name in ("mean", "std"):
            return [read_number(part) for part in value.split(",")]
    except ValueError:
        kind = "a whole number" if name == "num_classes" else "numbers separated by commas"
        raise UsageError(f"{text}: {name} must be {kind}, not {value!r}") from None
    return value


def name_networks(specs: Sequence[NetworkSpec]) -> list[str]:
    """The names of networks in reports: of files the name, with folders where these are equal.

    UsageError if a network is named twice in the same way.
    """
    if len({(each.checkpoint, str(each.options)) for each in specs}) < len(specs):
        raise UsageError("the same --target is given twice: name each network once")
    names = [name_network(each, Path(each.checkpoint).name) for each in specs]
    if len(set(names)) < len(names):
        names = [name_network(each, each.checkpoint) for each in specs]
    return [
        f"{name} ({specs[i].options.get('arch', i + 1)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def name_network(spec: NetworkSpec, file: str) -> str:
    """The file, and the type that the network computes in where that was said."""
    return f"{file} in {spec.options['dtype']}" if "dtype" in spec.options else file


def load_networks(
    specs: Sequence[NetworkSpec], progress: Bars, *, device: str
) -> dict[str, Classifier]:
    """The networks by name, on their device, each with its own architecture and normalisation."""
    names = name_networks(specs)
    if len(set(names)) < len(names):
        raise UsageError("two targets go by the same name: give copies of the file other names")
    return {
        name: load_model(each.checkpoint, progress, device=device, **each.options)
        for name, each in zip(names, specs, strict=True)
    }
