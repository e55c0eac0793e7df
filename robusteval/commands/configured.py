"""Options of `evaluate` from ``robusteval.toml`` or ``pyproject.toml``: for CI and people alike.

The table ``[evaluate]`` (``[tool.robusteval.evaluate]`` in ``pyproject.toml``) has the options by
their names without dashes, and ``checkpoint``. It counts where the command line names no
checkpoint or gives the file by ``--config``; so a file that happens to lie in a folder says
nothing about another network, and names no code to run for it. Options that are given win.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from robusteval.errors import UsageError
from robusteval.registry import explain_unknown

from .shell import Command, tell

LEFT_OUT = ("config", "fresh", "help", "others", "verbose")  # of a single call alone
EXAMPLE = 'checkpoint = "net.safetensors" below [evaluate] in robusteval.toml'


class ConfiguredCommand(Command):
    """A command whose options may stand in a file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the options of the file as defaults, where they count."""
        given = self.make_parser(ctx).parse_args(list(args))[0]
        config, checkpoint = given.get("config"), given.get("checkpoint")
        named = isinstance(checkpoint, str) and not isinstance(config, str)
        asks = any(word in ctx.help_option_names for word in args)
        if not named and not asks and not ctx.resilient_parsing:
            ctx.default_map = read_options(self, Path(config or ""))
        return super().parse_args(ctx, args)


def read_options(command: click.Command, place: Path) -> dict[str, Any]:
    """Defaults by parameter, from a file or from that of a folder; none if it has none.

    UsageError if a key is unknown or of the wrong type.
    """
    from robusteval.reports.gate_config import SHARED, find_table

    path, table = find_table(place)
    options = table.get("evaluate", {})
    known = {name_key(each): each for each in command.params if name_key(each) not in LEFT_OUT}
    misplaced = [key for key in table if key in known and key not in SHARED]
    if misplaced:
        prefix = "tool.robusteval." if path.name == "pyproject.toml" else ""
        stands = "stand" if len(misplaced) > 1 else "stands"
        raise UsageError(
            f"{path}: {', '.join(misplaced)} {stands} outside of the table of options: put"
            f" {'them' if len(misplaced) > 1 else 'it'} below a line [{prefix}evaluate]"
        )
    if not options:
        return {}
    if not isinstance(options, dict):
        raise UsageError(f"{path}: evaluate must be a table of options, not {options!r}")
    found = {}
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"{path}: {explain_unknown('option', key, list(known))}")
        parameter = known[key]
        found[str(parameter.name)] = read_option(parameter, value, f"{path}: {key}")
    tell(f"Settings of {path}; what the command line says wins.")
    return found


def name_key(parameter: click.Parameter) -> str:
    """How a parameter is called in the file: its longest name without dashes."""
    return max(parameter.opts, key=len).lstrip("-")


def read_option(parameter: click.Parameter, value: Any, place: str) -> Any:
    """A value as the command line would give it; UsageError if it is of another kind."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if type(value) is not bool:
            raise UsageError(f"{place} must be true or false, not {value!r}")
        return value
    several = isinstance(value, list)
    items = value if several else [value]
    if any(type(item) not in (str, int, float) for item in items) or not items:
        raise UsageError(f"{place} must be a text, a number, or a list of them, not {value!r}")
    texts = [str(item) for item in items]
    return texts if parameter.multiple else ",".join(texts)


def is_configured() -> bool:
    """Whether the command under way has options from a file."""
    return bool(click.get_current_context().default_map)


def list_words() -> Iterator[str]:
    """The words of a command line that would say what the command under way has from a file."""
    ctx = click.get_current_context()
    defaults: Mapping[str, Any] = ctx.default_map or {}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            continue
        value = defaults[name]
        if isinstance(parameter, click.Argument):
            yield shlex.quote(value)
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            if value:
                yield f"--{name_key(parameter)}"
        else:
            for text in value if parameter.multiple else [value]:
                yield from (f"--{name_key(parameter)}", shlex.quote(text))
