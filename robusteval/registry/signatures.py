"""What a function that can be named in a command takes: read from its source, kept at its calls.

The words that a parameter may take are those of its annotation, ``Literal["up", "down"]`` or the
name of such a type. A wrong word is refused before a function is loaded and, where Python code
calls the function directly, before it runs: no function needs to check its words. So is a
parameter that does nothing beside the others, by the rules of `Needs`.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec, resolve_name
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from robusteval.errors import check_image_form, explain_words
from robusteval.runs.types import format_value

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


# What a parameter waits for before it does anything: of each other parameter the values it may
# have, for a number the least, or what it may not be. Several such are alternatives. A rule that
# speaks of the parameter itself is about some of its values alone.
Wanted = tuple[Any, ...] | int | dict[Literal["not"], tuple[Any, ...]]
Condition = dict[str, Wanted]
Needs = dict[str, Condition | tuple[Condition, ...]]


def list_ways(rule: Condition | tuple[Condition, ...]) -> tuple[Condition, ...]:
    """The alternatives of a rule."""
    return rule if isinstance(rule, tuple) else (rule,)


def explain_idle(name: str, needs: Needs, values: dict[str, Any]) -> str | None:
    """Why parameter `name` does nothing beside these `values`; None if it does something.

    Parameters
    ----------
    name : str
        A parameter that was given.
    needs : Needs
        The rules of its function; a parameter without one always does something.
    values : dict
        All parameters of the function, defaults included.
    """
    ways = list_ways(needs.get(name, {}))
    unmet = [dict(list_unmet(condition, values)) for condition in ways]
    if not all(unmet):
        return None
    itself = f"{name}={format_value(values[name])}" if judges_itself(name, needs) else name
    # a way is left out that asks for another value of the parameter, or for more than another way
    open_ = [way for way in unmet if name not in way]
    least = [w for w in open_ if not any(set(o.values()) < set(w.values()) for o in open_)]
    said = dict.fromkeys(" and ".join(way.values()) for way in least)
    return f"{itself} does nothing unless {' or '.join(said)}"


def judges_itself(name: str, needs: Needs) -> bool:
    """Whether the rule of a parameter is about some of its values alone."""
    return any(name in condition for condition in list_ways(needs.get(name, {})))


def list_unmet(condition: Condition, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a condition does not hold, by parameter, as a user would write it."""
    for name, wanted in condition.items():
        if not is_met(wanted, values[name]):
            yield name, spell_condition(name, wanted)


def describe_needs(needs: Needs) -> Iterator[str]:
    """What each parameter waits for, as a user would write it, in sentences without a stop."""
    for name, rule in needs.items():
        ways = list_ways(rule)
        # values of its own that wait for nothing
        free = [str(word) for way in ways if list(way) == [name] for word in way[name]]  # type: ignore[union-attr]
        said = [
            " and ".join(spell_condition(other, wanted) for other, wanted in way.items())
            for way in ways
            if list(way) != [name]
        ]
        other_than = f" other than {' or '.join(free)}" if free else ""
        yield f"{name}{other_than} does nothing unless {', or '.join(said)}"


def is_met(wanted: Wanted, value: Any) -> bool:
    """Whether a value is what a condition asks for."""
    if isinstance(wanted, int):
        return bool(value >= wanted)
    return value not in wanted["not"] if isinstance(wanted, dict) else value in wanted


def spell_condition(name: str, wanted: Wanted) -> str:
    """What a condition asks of a parameter."""
    if isinstance(wanted, int):
        return f"{name} is {wanted} or more"
    words = wanted["not"] if isinstance(wanted, dict) else wanted
    spelled = " or ".join(format_value(word) for word in words)
    return f"{name} is not {spelled}" if isinstance(wanted, dict) else f"{name}={spelled}"


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


def check_calls(function: F, needs: Needs) -> F:
    """The function with a ValueError for what its signature and its rules exclude.

    That are words that are none of an annotation's, images that are none, and parameters that do
    nothing beside the others and are not left at their defaults.
    """
    parameters = signature(function).parameters
    of_images = list(parameters)[:2] == ["model", "x"]
    defaults = {name: each.default for name, each in parameters.items()}

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
        for name in needs:
            values = defaults | kwargs
            if values[name] != defaults[name] or judges_itself(name, needs):
                idle = explain_idle(name, needs, values)
                if idle:
                    raise ValueError(idle)
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
