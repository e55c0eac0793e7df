"""Names of attacks, interpreters and defenses; `NAME:key=value` checked against signatures.

What exists is read from source, not imported: `robusteval list` and a mistyped name cost no
second of importing torch. Other packages add theirs through an entry point of the group
`robusteval.attacks` that names a module like those in `attacks/`, or of the groups
`robusteval.interpreters` and `robusteval.defenses`.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from robusteval.errors import UsageError
from robusteval.runs.types import Spec, Threat

F = TypeVar("F", bound=Callable[..., Any])

# arguments that the suite supplies itself
PROTOCOL = ("model", "x", "y", "seeds", "mask")


@dataclass(frozen=True)
class Parameter:
    """One parameter that a user may set."""

    name: str
    kind: str  # annotation as written: "float", "int | None", "Norm", …
    default: Any
    choices: tuple[str, ...] = ()  # when the annotation is a set of words

    def read(self, text: str) -> Any:
        """The value a user wrote; ValueError if it is not of this kind."""
        if text.lower() == "none" and "None" in self.kind:
            return None
        kind = self.kind.removesuffix(" | None")
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"one of {', '.join(self.choices)}")
            return text
        if kind == "bool":
            if text.lower() not in ("true", "false"):
                raise ValueError("true or false")
            return text.lower() == "true"
        if kind == "int":
            try:
                return int(text)
            except ValueError:
                raise ValueError("a whole number") from None
        if kind == "float":
            return read_number(text)
        return text


def read_number(text: str) -> float:
    """A finite decimal or a fraction such as ``8/255``; ValueError otherwise."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("a number or a fraction such as 8/255")
    return value


@dataclass(frozen=True)
class Entry:
    """One registered function, as far as its source tells."""

    name: str
    module: str
    summary: str  # first line of the docstring
    norms: tuple[str, ...]
    knowledge: str  # "white-box", "black-box" or "none": what the attacker sees of the model
    parameters: dict[str, Parameter] = field(default_factory=dict)
    # by parameter, the words that leave an attack without a radius, and the norm it then has
    unbounded: dict[str, dict[str, str]] = field(default_factory=dict)
    detector: bool = False  # it attacks a detector, and needs one
    # of an interpreter
    differentiable: bool = False  # its maps stay on the graph
    seeded: bool = False  # another seed gives another map
    cost: str = ""  # passes for one map
    alike: tuple[str, ...] = ()  # those that say the same of a network that ends in pooling

    def resolve(self, spec: Spec) -> dict[str, Any]:
        """All parameters of a spec, defaults included."""
        return {name: p.default for name, p in self.parameters.items()} | spec.parameters

    def threat(self, spec: Spec) -> Threat:
        """Norm and budget that a spec stands for."""
        values = self.resolve(spec)
        targeted = bool(values.get("targeted", False))
        for name, norms in self.unbounded.items():
            if values[name] in norms:
                return Threat(norms[values[name]], None, targeted)
        norm = values.get("norm", self.norms[0] if self.norms else "none")
        return Threat(norm, values.get("eps"), targeted)


class Registry:
    """Functions of one package by name, and the way to add one."""

    def __init__(self, package: str, noun: str) -> None:
        self.package = package
        self.noun = noun
        self._functions: dict[str, Callable[..., Any]] = {}

    def add(
        self,
        name: str,
        *,
        norms: tuple[str, ...] = (),
        knowledge: str = "white-box",
        unbounded: dict[str, dict[str, str]] | None = None,
        detector: bool = False,
        differentiable: bool = False,
        seeded: bool = False,
        cost: str = "",
        alike: tuple[str, ...] = (),
    ) -> Callable[[F], F]:
        """Decorator: make a function known as `name`. Arguments must be literals."""
        # read from the source
        del norms, knowledge, unbounded, detector, differentiable, seeded, cost, alike

        def register(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and known.__module__ != function.__module__:
                raise RuntimeError(
                    f"two {self.noun}s are called {name!r}:"
                    f" {known.__module__} and {function.__module__}"
                )
            self._functions[name] = function
            return function

        return register

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Everything registered, by name, in alphabetical order."""
        found: dict[str, Entry] = {}
        for module in self._modules():
            for entry in read_entries(module, self.noun):
                if entry.name in found:
                    raise UsageError(
                        f"two {self.noun}s are called {entry.name!r} ({found[entry.name].module}"
                        f" and {entry.module}): uninstall one of the packages"
                    )
                found[entry.name] = entry
        return dict(sorted(found.items()))

    def _modules(self) -> Iterator[str]:
        package = find_spec(self.package)
        folders = package.submodule_search_locations if package else None
        for module in iter_modules(folders or ()):
            yield f"{self.package}.{module.name}"
        for point in metadata.entry_points(group=self.package):
            yield point.value

    def entry(self, name: str) -> Entry:
        """What is known of `name`; UsageError with a suggestion if nothing is."""
        if name not in self.entries:
            raise UsageError(unknown(self.noun, name, self.entries))
        return self.entries[name]

    def load(self, name: str) -> Callable[..., Any]:
        """The function itself; imports its module."""
        entry = self.entry(name)
        import_module(entry.module)
        return self._functions[name]

    def check(self, spec: Spec) -> Spec:
        """The spec with its values read as what the signature says.

        UsageError for an unknown name or parameter, or a value of the wrong kind.
        """
        entry = self.entry(spec.name)
        values: dict[str, Any] = {}
        for key, value in spec.parameters.items():
            if key not in entry.parameters:
                raise UsageError(unknown(f"parameter of {spec.name}", key, entry.parameters))
            parameter = entry.parameters[key]
            try:
                values[key] = parameter.read(value) if isinstance(value, str) else value
            except ValueError as error:
                raise UsageError(f"{spec.name}: {key} must be {error}, not {value!r}") from None
        return Spec(spec.name, values)


def unknown(noun: str, name: str, known: dict[str, Any] | list[str]) -> str:
    """A sentence for a name that does not exist, with what does."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {noun} {name!r}{hint}: known are {', '.join(known)}"


def parse(text: str) -> Spec:
    """``NAME`` or ``NAME:key=value,…`` or ``art:ClassName:key=value,…``, values still as text.

    UsageError if the text has another form.
    """
    name, _, rest = text.strip().partition(":")
    if name == "art":
        kind, _, rest = rest.partition(":")
        name = f"art:{kind}"
    parameters: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value or key in parameters:
            raise UsageError(f"{text!r}: write NAME:key=value,key=value, each key once")
        parameters[key] = value
    if name in ("", "art:"):
        raise UsageError(f"{text!r}: write NAME:key=value,key=value")
    return Spec(name, parameters)


def read_entries(module: str, noun: str) -> Iterator[Entry]:
    """The registered functions of a module, from its source."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError(f"the {noun} module {module} of an installed package cannot be found")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("S.add"):
                options = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg}
                yield Entry(
                    name=ast.literal_eval(decorator.args[0]),
                    module=module,
                    summary=(ast.get_docstring(node) or "").partition("\n")[0],
                    norms=options.get("norms", ()),
                    knowledge=options.get("knowledge", "white-box"),
                    parameters={p.name: p for p in read_parameters(node)},
                    unbounded=options.get("unbounded", {}),
                    detector=options.get("detector", False),
                    differentiable=options.get("differentiable", False),
                    seeded=options.get("seeded", False),
                    cost=options.get("cost", ""),
                    alike=options.get("alike", ()),
                )


# the annotations that stand for a set of words
WORDS = {
    "Norm": ("linf", "l2"),
    "Loss": ("ce", "margin", "dlr"),
    "Stop": ("8bit", "float", "never"),
}


def read_parameters(node: ast.FunctionDef) -> Iterator[Parameter]:
    """The keyword-only parameters that a user may set."""
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.arg in PROTOCOL:
            continue
        assert argument.annotation is not None, f"{argument.arg} needs an annotation"
        assert default is not None, f"{argument.arg} needs a default"
        kind = ast.unparse(argument.annotation)
        choices = WORDS.get(kind, ())
        words = kind.removesuffix(" | None")
        if words.startswith("Literal["):
            choices = ast.literal_eval("(" + words[len("Literal[") : -1] + ",)")
        yield Parameter(argument.arg, kind, constant(default), choices)


def constant(node: ast.expr) -> Any:
    """The value of a default: a literal, or a fraction of two."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return ast.literal_eval(node.left) / ast.literal_eval(node.right)
    return ast.literal_eval(node)


ATTACKS = Registry("robusteval.attacks", "attack")
INTERPRETERS = Registry("robusteval.interpreters", "interpreter")
DEFENSES = Registry("robusteval.defenses", "defense")
