"""Presets: option values by name, read from TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.registry import ATTACKS, INTERPRETERS, explain_unknown, parse
from robusteval.runs.reading import read_toml
from robusteval.runs.types import Spec


class Preset(NamedTuple):
    """What a preset sets; None where it leaves the choice."""

    attack: tuple[Spec, ...]
    description: str = ""
    samples: int | None = None
    seed: int | None = None
    interpreter: tuple[Spec, ...] = ()
    adapt: bool = False  # what a network cannot have is left out, with a remark


# the type of each value, as a user would call it; the least a number may be
KINDS: dict[str, tuple[type, str]] = {
    "description": (str, "a text"),
    "attack": (list, "a list of texts such as 'pgd:eps=8/255'"),
    "samples": (int, "a whole number from 1 up"),
    "seed": (int, "a whole number from 0 up"),
    "interpreter": (list, "a list of texts such as 'cam'"),
    "adapt": (bool, "true or false"),
}
LEAST = {"samples": 1, "seed": 0}


def list_presets() -> Iterator[tuple[str, Preset]]:
    """The presets that come with the suite, by name."""
    folder = files("robusteval").joinpath("presets")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        name, dot, suffix = file.name.rpartition(".")
        if dot and suffix == "toml":
            yield name, check_preset(name, tomllib.loads(file.read_text("utf-8")))


def read_preset(name: str) -> Preset:
    """A preset by name, or by the path of a TOML file; its attacks are checked.

    UsageError if there is none of that name, or it sets something a preset cannot.
    """
    path = Path(name)
    if path.suffix != ".toml":
        known = dict(list_presets())
        if name not in known:
            raise UsageError(
                explain_unknown("preset", name, known) + "; or give the path of a .toml file"
            )
        return known[name]
    try:
        _, values = read_toml(path)
    except OSError as error:
        raise UsageError(f"cannot read the preset {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the preset {name} is not TOML: {error}") from None
    return check_preset(name, values)


def check_preset(name: str, values: dict[str, Any]) -> Preset:
    """The values of a preset, each of its kind; UsageError that names the preset otherwise."""
    for key, value in values.items():
        if key not in KINDS:
            raise UsageError(f"{name}: {explain_unknown('key', key, dict(KINDS))}")
        kind, words = KINDS[key]
        fits = type(value) is kind  # in TOML true is no number
        if not fits or (key in LEAST and value < LEAST[key]):
            raise UsageError(f"{name}: {key} must be {words}, not {value!r}")
    texts = values.get("attack", [])
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name}: attack must be {KINDS['attack'][1]}, not {texts!r}")
    names = values.get("interpreter", [])
    if not all(isinstance(text, str) for text in names):
        raise UsageError(f"{name}: interpreter must be {KINDS['interpreter'][1]}, not {names!r}")
    try:
        specs = tuple(check_attack(parse(text)) for text in texts)
        interpreters = tuple(INTERPRETERS.check_spec(parse(text)) for text in names)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    return Preset(**{**values, "attack": specs, "interpreter": interpreters})


# radii of the other norms, where a preset is given one without --eps
RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0, "l0": 24.0, "l0_pixels": 20.0}


def change_norm(spec: Spec, norm: str) -> Spec | None:
    """The attack in another norm, with the usual radius of that; None if it knows it not."""
    entry = ATTACKS.entries.get(spec.name)
    if entry is None or norm not in entry.norms or not {"norm", "eps"} <= entry.parameters.keys():
        return None
    return Spec(spec.name, {**spec.parameters, "norm": norm, "eps": RADII[norm]})


def change_radius(spec: Spec, eps: float) -> Spec:
    """The attack at another radius, if it has one."""
    parameters = {**spec.parameters, "eps": eps}
    entry = ATTACKS.entries.get(spec.name)
    known = spec.parameters if entry is None else entry.parameters
    if "eps" not in known or (entry and "eps" in entry.find_idle(Spec(spec.name, parameters))):
        return spec
    if "eps_step" in parameters:
        parameters["eps_step"] = eps / 2
    return Spec(spec.name, parameters)
