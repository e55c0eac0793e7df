"""Names of attacks and of whatever else can be added; `NAME:key=value` checked by signatures.

What exists is read from source, not imported: `robusteval list` and a mistyped name cost no
second of importing torch. There is a registry each of attacks, interpreters, defenses, report
formats and data sources. Other packages add theirs through an entry point that names a module
with decorated functions, in the group `robusteval.attacks`, likewise `.interpreters`,
`.defenses`, `.report_formats` or `.data_sources`.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, TypedDict, TypeVar, Unpack

from robusteval.errors import UsageError, raise_as_missing
from robusteval.registry.signatures import (
    Needs,
    Parameter,
    check_calls,
    explain_idle,
    find_source,
    is_called,
    judges_itself,
    parse_source,
    read_parameters,
)
from robusteval.runs.types import Spec, Threat

F = TypeVar("F", bound=Callable[..., Any])


class Facts(TypedDict, total=False):
    """What `Registry.add` may be told of a function, all literals: see `Entry`."""

    norms: tuple[str, ...]
    knowledge: str
    unbounded: dict[str, dict[str, str]]
    radius: str
    needs: Needs
    detector: bool
    files: tuple[str, ...]
    differentiable: bool
    seeded: bool
    cost: str
    alike: tuple[str, ...]
    suffix: str | tuple[str, ...]
    written: str
    recognises: str


@dataclass(frozen=True)
class Entry:
    """One registered function, as far as its source tells."""

    name: str
    module: str
    summary: str  # first line of the docstring
    # of an attack
    norms: tuple[str, ...] = ()
    knowledge: str = "white-box"  # or "black-box", "none": what the attacker sees of the model
    parameters: dict[str, Parameter] = field(default_factory=dict)
    # of parameters that do nothing beside some values of others, when they do something
    needs: Needs = field(default_factory=dict)
    # by parameter, the words that leave an attack without a radius, and the norm it then has
    unbounded: dict[str, dict[str, str]] = field(default_factory=dict)
    radius: str = "eps"  # the parameter that is the radius of its threat
    detector: bool = False  # it attacks a detector, and needs one
    files: tuple[str, ...] = ()  # parameters that name a file, which counts by its content
    # of an interpreter
    differentiable: bool = False  # its maps stay on the graph
    seeded: bool = False  # another seed gives another map
    cost: str = ""  # passes for one map
    alike: tuple[str, ...] = ()  # those that say the same of a network that ends in pooling
    # of a report format or a data source
    suffix: str | tuple[str, ...] = ()  # of its files: ".tex", or several
    written: str = ""  # how a user names a data source: "FILE.npz"
    # name of a function (path) -> bool of its module: whether a path is one that this source reads
    recognises: str = ""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All endings of the files of a report format or data source, in lower case."""
        return (self.suffix,) if isinstance(self.suffix, str) else self.suffix

    def resolve(self, spec: Spec) -> dict[str, Any]:
        """All parameters of a spec, defaults included."""
        return {name: p.default for name, p in self.parameters.items()} | spec.parameters

    def find_idle(self, spec: Spec) -> dict[str, str]:
        """Of the parameters that a spec gives, those that do nothing, each with the reason.

        A default counts as given where a rule is about values of its own parameter.
        """
        values = self.resolve(spec)
        given = {name: None for name, value in spec.parameters.items() if value is not None}
        given |= {name: None for name in self.needs if judges_itself(name, self.needs)}
        reasons = {name: explain_idle(name, self.needs, values) for name in given}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def threat(self, spec: Spec) -> Threat:
        """Norm and budget that a spec stands for."""
        values = self.resolve(spec)
        targeted = bool(values.get("targeted", False))
        for name, norms in self.unbounded.items():
            if values[name] in norms:
                return Threat(norms[values[name]], None, targeted)
        norm = values.get("norm", self.norms[0] if self.norms else "none")
        return Threat(norm, values.get(self.radius), targeted)


class Registry:
    """Functions by name, and the way to add one.

    Parameters
    ----------
    package : str
        Package whose modules register functions.
    noun : str
        What one of them is called in messages.
    group : str, optional
        Entry-point group of other packages' functions, `package` if not given. Its last part in
        capitals is the name of the registry, by which decorators are found in source.
    more : str, optional
        Another module of ours, which needs what stands above `package`.
    """

    def __init__(self, package: str, noun: str, group: str | None = None, more: str = "") -> None:
        self.package, self.noun = package, noun
        self.group, self.more = group or package, more
        self._decorator = f"{self.group.rpartition('.')[2].upper()}.add"  # as written in source
        self._functions: dict[str, Callable[..., Any]] = {}

    def add(self, name: str, **facts: Unpack[Facts]) -> Callable[[F], F]:
        """Decorator: make a function known as `name`. Arguments must be literals."""
        needs = facts.get("needs", {})  # all others are read from the source

        def register(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and known.__module__ != function.__module__:
                raise RuntimeError(
                    f"two {self.noun}s are called {name!r}:"
                    f" {known.__module__} and {function.__module__}"
                )
            self._functions[name] = checked = raise_as_missing(name)(check_calls(function, needs))
            return checked

        return register

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Everything registered, by name, in alphabetical order."""
        found: dict[str, Entry] = {}
        for module in self._modules():
            for entry in self._read_entries(module):
                if entry.name in found:
                    raise UsageError(
                        f"two {self.noun}s are called {entry.name!r} ({found[entry.name].module}"
                        f" and {entry.module}): uninstall one of the packages"
                    )
                found[entry.name] = entry
        return dict(sorted(found.items()))

    def _modules(self) -> Iterator[str]:
        package = find_spec(self.package)
        for module in iter_modules((package and package.submodule_search_locations) or ()):
            yield f"{self.package}.{module.name}"
        yield from filter(None, [self.more])
        yield from (point.value for point in metadata.entry_points(group=self.group))

    def _read_entries(self, module: str) -> Iterator[Entry]:
        """The functions that a module registers here, from its source."""
        path = find_source(module)
        if path is None:
            raise UsageError(
                f"the {self.noun} module {module} of an installed package cannot be found"
            )
        if f"{self._decorator}(" not in path.read_text(encoding="utf-8"):
            return
        for node in parse_source(path).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if not isinstance(call, ast.Call) or not is_called(call, self._decorator):
                    continue
                facts = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                yield Entry(
                    name=ast.literal_eval(call.args[0]),
                    module=module,
                    summary=(ast.get_docstring(node) or "").partition("\n")[0],
                    parameters={p.name: p for p in read_parameters(node, module)},
                    **facts,
                )

    def entry(self, name: str) -> Entry:
        """What is known of `name`; UsageError with a suggestion if nothing is."""
        if name not in self.entries:
            raise UsageError(explain_unknown(self.noun, name, self.entries))
        return self.entries[name]

    def find_suffix(self, suffix: str) -> Entry | None:
        """The one whose files end in `suffix`, such as ``.tex``; None if there is none."""
        return next((e for e in self.entries.values() if suffix.lower() in e.suffixes), None)

    def load(self, name: str) -> Callable[..., Any]:
        """The function itself; imports its module."""
        if name not in self._functions:
            with raise_as_missing(name):
                import_module(self._find_module(name))
        return self._functions[name]

    def _find_module(self, name: str) -> str:
        """The module that registers `name`, by its text alone where no entries are read yet."""
        if "entries" not in self.__dict__:
            for module in self._modules():
                path = find_source(module)
                if path and f'{self._decorator}("{name}"' in path.read_text(encoding="utf-8"):
                    return module
        return self.entry(name).module

    def check_spec(self, spec: Spec) -> Spec:
        """The spec with its values read as what the signature says.

        UsageError for an unknown name or parameter, a value of the wrong kind, or a parameter
        that does nothing beside the others.
        """
        entry = self.entry(spec.name)
        values: dict[str, Any] = {}
        for key, value in spec.parameters.items():
            if key not in entry.parameters:
                raise UsageError(
                    explain_unknown(f"parameter of {spec.name}", key, entry.parameters)
                )
            parameter = entry.parameters[key]
            try:
                values[key] = parameter.read_value(value) if isinstance(value, str) else value
                if parameter.choices and values[key] not in (None, *parameter.choices):
                    raise ValueError(f"one of {', '.join(parameter.choices)}")
            except ValueError as error:
                raise UsageError(f"{spec.name}: {key} must be {error}, not {value!r}") from None
        checked = Spec(spec.name, values)
        for reason in entry.find_idle(checked).values():
            raise UsageError(f"{spec.name}: {reason}")
        return checked


def explain_unknown(noun: str, name: str, known: dict[str, Any] | list[str]) -> str:
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
        key, equals, value = map(str.strip, item.partition("="))
        if not equals or not key or not value or key in parameters:
            raise UsageError(f"{text!r}: write NAME:key=value,key=value, each key once")
        parameters[key] = value
    if name in ("", "art:"):
        raise UsageError(f"{text!r}: write NAME:key=value,key=value")
    return Spec(name, parameters)


ATTACKS = Registry("robusteval.attacks", "attack")
INTERPRETERS = Registry("robusteval.interpreters", "interpreter")
DEFENSES = Registry("robusteval.defenses", "defense")
REPORT_FORMATS = Registry("robusteval.reports", "report format", "robusteval.report_formats")
TENSORS = "robusteval.models.tensor_file"
DATA_SOURCES = Registry("robusteval.datasets", "data source", "robusteval.data_sources", TENSORS)
