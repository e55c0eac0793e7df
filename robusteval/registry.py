"""Names of attacks and of whatever else can be added; `NAME:key=value` checked by signatures.

What exists is read from source, not imported: `robusteval list` and a mistyped name cost no
second of importing torch. There is a registry each of attacks, interpreters, defenses, report
formats and data sources. Other packages add theirs through an entry point that names a module
with decorated functions, in the group `robusteval.attacks`, likewise `.interpreters`,
`.defenses`, `.report_formats` or `.data_sources`.

The words that a parameter may take are those of its annotation, ``Literal["up", "down"]`` or the
name of such a type. A wrong word is refused before a function is loaded and, where Python code
calls the function directly, before it runs: no function needs to check its words.
"""

from __future__ import annotations

import ast
import difflib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from importlib import import_module, metadata
from importlib.util import find_spec, resolve_name
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from types import NoneType
from typing import (
    Any,
    Literal,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from robusteval.errors import UsageError, check_image_form, explain_words, raise_as_missing
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

    def read_value(self, text: str) -> Any:
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


class Facts(TypedDict, total=False):
    """What `Registry.add` may be told of a function, all literals: see `Entry`."""

    norms: tuple[str, ...]
    knowledge: str
    unbounded: dict[str, dict[str, str]]
    detector: bool
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
    # by parameter, the words that leave an attack without a radius, and the norm it then has
    unbounded: dict[str, dict[str, str]] = field(default_factory=dict)
    detector: bool = False  # it attacks a detector, and needs one
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
        del facts  # read from the source

        def register(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and known.__module__ != function.__module__:
                raise RuntimeError(
                    f"two {self.noun}s are called {name!r}:"
                    f" {known.__module__} and {function.__module__}"
                )
            self._functions[name] = checked = raise_as_missing(name)(refuse_wrong_words(function))
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

        UsageError for an unknown name or parameter, or a value of the wrong kind.
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
        return Spec(spec.name, values)


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


def find_source(module: str) -> Path | None:
    """The file of a module that may not be imported; None if there is no such module in source."""
    try:
        spec = find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    origin = (spec and spec.origin) or ""
    return Path(origin) if origin.endswith(".py") else None


@cache
def parse_source(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def is_called(call: ast.Call, name: str) -> bool:
    """Whether ``A.b(…)`` or ``module.A.b(…)`` is a call of `name`, ``A.b``."""
    written = ast.unparse(call.func)
    return written == name or written.endswith(f".{name}")


def read_parameters(node: ast.FunctionDef, module: str) -> Iterator[Parameter]:
    """The keyword-only parameters of a function in `module` that a user may set."""
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.arg in PROTOCOL:
            continue
        assert argument.annotation is not None, f"{argument.arg} needs an annotation"
        assert default is not None, f"{argument.arg} needs a default"
        kind = ast.unparse(argument.annotation)
        choices = read_words(argument.annotation, module)
        yield Parameter(argument.arg, kind, read_constant(default), choices)


def read_words(annotation: ast.expr, module: str) -> tuple[str, ...]:
    """The words that an annotation allows, without importing the module that it stands in.

    Empty if it is not a set of words. Names are followed to where they are assigned, through
    imports, too.
    """
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return read_words(annotation.left, module) + read_words(annotation.right, module)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return read_words(ast.parse(annotation.value, mode="eval").body, module)
    if isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value).rpartition(".")[2] != "Literal":
            return ()
        words = ast.literal_eval(annotation.slice)
        return words if isinstance(words, tuple) else (words,)
    if isinstance(annotation, ast.Attribute):
        found = find_import(ast.unparse(annotation.value), module)
        return read_alias(annotation.attr, ".".join(filter(None, found))) if found else ()
    if isinstance(annotation, ast.Name) and annotation.id not in ("bool", "int", "float", "str"):
        return read_alias(annotation.id, module)
    return ()


def read_alias(name: str, module: str) -> tuple[str, ...]:
    """The words of a type that `module` assigns to `name` or imports by it; empty if none."""
    path = find_source(module)
    if path is None or module.partition(".")[0] in sys.stdlib_module_names:
        return ()
    for node in parse_source(path).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(ast.unparse(target) == name for target in targets):
            return read_words(node.value, module)
    found = find_import(name, module)
    return read_alias(found[1], found[0]) if found and found[0] != module else ()


def find_import(name: str, module: str) -> tuple[str, str] | None:
    """The module that `module` imports `name` from, and what it is called there.

    The second is empty where `name` is a module itself; None if `name` is not imported.
    """
    path = find_source(module)
    if path is None:
        return None
    for node in ast.walk(parse_source(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    if isinstance(node, ast.Import):
                        return alias.name, ""
                    relative = "." * node.level + (node.module or "")
                    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                    return resolve_name(relative, package), alias.name
    return None


def refuse_wrong_words(function: F) -> F:
    """The function with a ValueError for words that annotations exclude, and what is no image."""
    of_images = list(signature(function).parameters)[:2] == ["model", "x"]

    @cache
    def list_words() -> dict[str, tuple[Any, ...]]:
        try:
            hints = get_type_hints(function)
        except NameError:  # imported for type checkers only
            return {}
        allowed = {name: tuple(list_choices(hint)) for name, hint in hints.items()}
        return {name: words for name, words in allowed.items() if words}

    @wraps(function)
    def check_and_call(*args: Any, **kwargs: Any) -> Any:
        for name, words in list_words().items():
            if name in kwargs and kwargs[name] not in words:
                raise ValueError(explain_words(name, words, kwargs[name]))
        if of_images and len(args) > 1:
            check_image_form(args[1])
        return function(*args, **kwargs)

    return cast(F, check_and_call)


def list_choices(hint: Any) -> Iterator[Any]:
    """The values that a type of nothing but words, or of words and None, allows."""
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint)
    if all(kind is NoneType or get_origin(kind) is Literal for kind in kinds):
        for kind in kinds:
            yield from get_args(kind) or (None,)


def read_constant(node: ast.expr) -> Any:
    """The value of a default: a literal, or a fraction of two."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return ast.literal_eval(node.left) / ast.literal_eval(node.right)
    return ast.literal_eval(node)


ATTACKS = Registry("robusteval.attacks", "attack")
INTERPRETERS = Registry("robusteval.interpreters", "interpreter")
DEFENSES = Registry("robusteval.defenses", "defense")
REPORT_FORMATS = Registry("robusteval.reports", "report format", "robusteval.report_formats")
TENSORS = "robusteval.models.tensor_file"
DATA_SOURCES = Registry("robusteval.datasets", "data source", "robusteval.data_sources", TENSORS)
