"""What a run must keep: the gates of ``robusteval.toml`` or ``pyproject.toml``.

Two spellings of one content. In ``robusteval.toml`` it stands at the top level, in
``pyproject.toml`` below ``[tool.robusteval]``, so that gates are ``[[tool.robusteval.gate]]``::

    alpha = 0.05                 # chance of any false alarm
    baseline = "baseline.json"   # relative to this file
    allow = ["saturated"]        # codes of grave findings that do not fail the check

    [[gate]]
    name = "robust"              # what reports call it
    on = "worst-case"            # or "clean", or an attack such as "pgd:eps=8/255,steps=20"
    threat = "linf eps 8/255"    # or "linf": of several worst cases only this one
    defense = "NAME:key=value"   # behind this defense; without it, the model as it is
    class = "cat"                # only images of this class; "*": each class, the worst decides
    slice = "camera=night"       # only these images; "camera": each value, the worst decides
    floor = 0.4                  # robust accuracy of at least 40 %
    max_drop = 0.01              # at most one point below the baseline
    detectable = 0.05            # drops from five points up must be visible in this sample
    max_clean_cost = 0.02        # clean accuracy, of the defense or against the baseline
    min_tpr = 0.8                # share of successful attacks that a detector flags,
    fpr = 0.05                   # set to this rate of false alarms

A table ``[evaluate]`` beside them has options of `robusteval evaluate`, which reads it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.registry import ATTACKS, explain_unknown, parse
from robusteval.registry.signatures import read_number
from robusteval.runs.reading import check_amount, read_toml
from robusteval.runs.types import Spec, Threat

MOST_GATES = 1000
MOST_TRIED = 100  # lines that may begin a gate, where texts of several lines may only look so
WORST, CLEAN = "worst-case", "clean"
EVERY = "*"  # each class by itself
EXAMPLE = """[[gate]]
floor = 0.4      # robust accuracy of at least 40 %
max_drop = 0.01  # at most one point below the baseline"""


class Wanted(NamedTuple):
    """The worst cases a gate is about."""

    norm: str
    radius: bool = False  # whether what follows matters
    eps: float | None = None
    targeted: bool = False

    def includes(self, threat: Threat) -> bool:
        """Whether this is one of them."""
        if threat.norm != self.norm:
            return False
        return not self.radius or (threat.eps, threat.targeted) == (self.eps, self.targeted)

    def __str__(self) -> str:
        return str(Threat(self.norm, self.eps, self.targeted)) if self.radius else self.norm


class SliceName(NamedTuple):
    """The images that have a value in a column of their table."""

    column: str
    value: str | None  # None: each value by itself


@dataclass(frozen=True)
class Rule:
    """One gate as configured; the module says what each key means."""

    name: str | None = None
    on: str | Spec = WORST  # WORST, CLEAN or an attack
    threat: Wanted | None = None
    defense: Spec | None = None
    label: str | None = None  # of a class, its name or number, or EVERY
    slice: SliceName | None = None
    floor: float | None = None
    max_drop: float | None = None
    detectable: float = 0.05
    max_clean_cost: float | None = None
    min_tpr: float | None = None
    fpr: float | None = None
    line: int | None = None  # where it stands in its file, from 1


@dataclass(frozen=True)
class Settings:
    """All gates, and what they share."""

    alpha: float = 0.05
    baseline: Path | None = None
    allow: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    file: str | None = None  # where they were read


class Number(NamedTuple):
    """A number in a range; both ends included unless said otherwise."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if type(value) not in (int, float):  # in TOML true is no number
            return False
        # as it is: the whole numbers of TOML have no end, those of a float do
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        ends = "above" if self.open_low else "from"
        till = "to below" if self.open_high else "to"
        return f"a number {ends} {self.low:g} {till} {self.high:g}"


SHARE = Number(0, 1)
ALLOWED = Number(0, 1, open_high=True)
NUMBERS = {
    "alpha": Number(0, 0.5, open_low=True),
    "floor": SHARE,
    "max_drop": ALLOWED,
    "detectable": Number(0, 1, open_low=True),
    "max_clean_cost": ALLOWED,
    "min_tpr": SHARE,
    "fpr": Number(0, 1, open_low=True, open_high=True),
}
SHARED = ("alpha", "baseline", "allow", "gate", "evaluate")
TEXTS = ("name", "on", "threat", "defense", "class", "slice")
KEYS = (*TEXTS, *(key for key in NUMBERS if key != "alpha"))
LIMITS = ("floor", "max_drop", "max_clean_cost", "min_tpr")


def find_settings(folder: Path) -> Settings:
    """The settings of a folder: ``robusteval.toml``, else ``pyproject.toml`` if it has some.

    Defaults without gates if there are none. UsageError if they are wrong.
    """
    path, _ = find_table(folder)
    return read_settings(path) if path.exists() else Settings()


def find_table(place: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder, or the file itself, and what it says of this suite; {} if nothing.

    UsageError if it cannot be read.
    """
    if not place.is_dir():
        return place, read_table(place)[1]
    path = place / "robusteval.toml"
    if path.exists():
        return path, read_table(path)[1]
    project = place / "pyproject.toml"
    if project.exists() and "robusteval" in get_tools(read_settings_file(project)[1]):
        return project, read_table(project)[1]
    return path, {}


def read_table(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file, and the table in it that is about this suite."""
    text, table = read_settings_file(path)
    if path.name == "pyproject.toml":
        if not isinstance(get_tools(table).get("robusteval"), dict):
            raise UsageError(f"{path} has no table [tool.robusteval]")
        table = get_tools(table)["robusteval"]
    return text, table


def read_settings(path: Path) -> Settings:
    """The settings in a TOML file; one called ``pyproject.toml`` has them in its table.

    UsageError that names file and gate if something in it is unknown, of the wrong type, or out of
    range.
    """
    text, table = read_table(path)
    check_keys(table, SHARED, str(path))
    check_numbers(table, str(path))
    baseline, allow, gates = (table.get(key) for key in ("baseline", "allow", "gate"))
    if baseline is not None and (not isinstance(baseline, str) or not baseline):
        raise UsageError(f"{path}: baseline must be the path of a file, not {baseline!r}")
    if allow is not None and not is_list_of(allow, str):
        raise UsageError(f"{path}: allow must be a list of codes of findings, not {allow!r}")
    if gates is not None and not is_list_of(gates, dict):
        raise UsageError(f"{path}: gate must be tables, each below [[{name_header(path)}]]")
    check_amount(str(path), len(gates or ()), MOST_GATES, "gates")
    lines = find_lines(text, path, len(gates or ()))
    return Settings(
        alpha=float(table.get("alpha", 0.05)),
        baseline=path.parent / baseline if baseline else None,
        allow=tuple(allow or ()),
        rules=tuple(
            read_rule(gate, name_gate(path, number, gate), lines.get(number))
            for number, gate in enumerate(gates or (), 1)
        ),
        file=show_path(path),
    )


def read_settings_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a TOML file; UsageError if there is none."""
    try:
        return read_toml(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None


def get_tools(project: dict[str, Any]) -> dict[str, Any]:
    """The settings of tools in a ``pyproject.toml``."""
    found = project.get("tool")
    return found if isinstance(found, dict) else {}


def is_list_of(value: Any, kind: type) -> bool:
    """Whether a value is a list of these."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def name_header(path: Path) -> str:
    """How a gate begins in this file."""
    return "tool.robusteval.gate" if path.name == "pyproject.toml" else "gate"


def name_gate(path: Path, number: int, gate: dict[str, Any]) -> str:
    """What to call a gate in a message."""
    name = gate.get("name")
    return f"{path}, gate {number}" + (f" ({name})" if isinstance(name, str) and name else "")


def show_path(path: Path) -> str:
    """A file as seen from the working directory, without folders that are nobody's business."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return path.name


def find_lines(text: str, path: Path, gates: int) -> dict[int, int]:
    """The line of each of so many gates, both counted from 1, as far as they can be told."""
    found: dict[int, int] = {}
    lines = text.split("\n")
    header = rf"\s*\[\[\s*{re.escape(name_header(path))}\s*\]\]"
    plain = [line for line, content in enumerate(lines, 1) if re.match(header, content)]
    if len(plain) == gates and not re.search(r"""\"{3}|'{3}|gate\s*=""", text):
        return dict(enumerate(plain, 1))
    likely = [
        line
        for line, content in enumerate(lines, 1)
        if re.match(r"\s*(\[\[.*gate.*\]\]|gate\s*=)", content)
    ]
    for line in likely[:MOST_TRIED]:
        # what only looks like a gate, in a text of several lines, ends no document
        try:
            table = tomllib.loads("\n".join(lines[:line]))
        except ValueError:
            continue
        table = get_tools(table).get("robusteval", {}) if path.name == "pyproject.toml" else table
        for number in range(len(found) + 1, len(table.get("gate", ())) + 1):
            found[number] = line
    return found


def check_keys(table: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """UsageError if there is a key that means nothing."""
    for key in table:
        if key not in known:
            raise UsageError(f"{place}: {explain_unknown('key', key, list(known))}")


def check_numbers(table: dict[str, Any], place: str) -> None:
    """UsageError if a number is none, or out of range."""
    for key, kind in NUMBERS.items():
        if key in table and not kind.holds(table[key]):
            hint = " (0.4 is 40 %)" if key in LIMITS else ""
            raise UsageError(f"{place}: {key} must be {kind}{hint}, not {table[key]!r}")


def read_rule(gate: dict[str, Any], place: str, line: int | None) -> Rule:
    """One gate; UsageError with its place if it is wrong."""
    check_keys(gate, KEYS, place)
    check_numbers(gate, place)
    for key in TEXTS:
        if key in gate and (not isinstance(gate[key], str) or not gate[key].strip()):
            raise UsageError(f"{place}: {key} must be a text, not {gate[key]!r}")
    for problem in list_problems(gate):
        raise UsageError(f"{place}: {problem}")
    values = {key: value for key, value in gate.items() if key in NUMBERS}
    try:
        return Rule(
            name=gate.get("name"),
            on=read_on(gate.get("on", WORST)),
            threat=read_threat(gate["threat"]) if "threat" in gate else None,
            defense=parse(gate["defense"]) if "defense" in gate else None,
            label=gate.get("class"),
            slice=read_slice(gate["slice"]) if "slice" in gate else None,
            line=line,
            **values,
        )
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def list_problems(gate: dict[str, Any]) -> Iterator[str]:
    """Why the keys of a gate do not make sense together."""
    if not any(key in gate for key in LIMITS):
        yield f"it demands nothing; give one or more of {', '.join(LIMITS)}"
    if ("min_tpr" in gate) != ("fpr" in gate):
        yield "min_tpr and fpr belong together: a detector catches as much as it cries wolf"
    drops = [key for key in ("max_drop", "max_clean_cost") if key in gate]
    if "detectable" in gate and not drops:
        yield "detectable belongs to max_drop or max_clean_cost"
    for key in drops:
        if gate.get("detectable", Rule.detectable) <= gate[key]:
            yield f"detectable ({Rule.detectable} if not given) must be above {key}"
    if "threat" in gate and gate.get("on", WORST) != WORST:
        yield "threat chooses among worst cases; leave it out, or leave out on"
    if "class" in gate and "slice" in gate:
        yield "class and slice choose the images in two ways: give one of them"
    if "min_tpr" in gate and gate.get("on") == CLEAN:
        yield "min_tpr is about attacks, not about clean images"


def read_on(text: str) -> str | Spec:
    """What a gate looks at; UsageError if that is no attack."""
    if text in (WORST, CLEAN):
        return text
    spec = parse(text)
    if spec.name.startswith("art:"):
        return spec
    if spec.name not in ATTACKS.entries:
        known = [WORST, CLEAN, *ATTACKS.entries]
        raise UsageError(explain_unknown("attack", spec.name, known))
    return check_attack(spec)


def read_slice(text: str) -> SliceName:
    """``camera=night``, or ``camera`` for each of its values; UsageError without a column."""
    column, equals, value = (part.strip() for part in text.partition("="))
    if not column:
        raise UsageError(f"slice must be a column, or a column and a value, not {text!r}")
    return SliceName(column, (value or "(empty)") if equals else None)


def read_threat(text: str) -> Wanted:
    """``linf``, ``linf eps 8/255``, ``l2 minimum``, the last two also with ``targeted`` behind."""
    norm, *rest = text.split()
    targeted = rest[-1:] == ["targeted"]
    radius = rest[:-1] if targeted else rest
    if not rest:
        return Wanted(norm)
    if radius == ["minimum"]:
        return Wanted(norm, True, None, targeted)
    if len(radius) == 2 and radius[0] == "eps":
        try:
            return Wanted(norm, True, read_number(radius[1]), targeted)
        except ValueError as error:
            raise UsageError(f"threat: eps must be {error}, not {radius[1]!r}") from None
    raise UsageError(
        f"threat must be a norm such as 'linf', or as in 'linf eps 8/255' and 'l2 minimum', with"
        f" 'targeted' behind where it is, not {text!r}"
    )
