"""`robusteval list`: what there is."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from robusteval.preset import shipped
from robusteval.records import show as show_value
from robusteval.registry import ATTACKS

from .shell import emit


@click.command(name="list")
@click.argument(
    "what",
    metavar="[WHAT]",
    type=click.Choice(("attacks", "data", "presets")),
    required=False,
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def list_(what: str | None, as_json: bool) -> None:
    """Show what there is: WHAT is attacks, data or presets; all three if not given."""
    from robusteval.data import list_kinds

    attacks = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "norms": list(entry.norms),
            "knowledge": entry.knowledge,
            "parameters": {p.name: p.default for p in entry.parameters.values()},
        }
        for entry in ATTACKS.entries.values()
    ]
    attacks.append(
        {
            "name": "art:CLASS",
            "summary": "Any evasion attack of the Adversarial Robustness Toolbox, by class.",
            "norms": [],
            "knowledge": "",
            "parameters": {},
        }
    )
    everything: dict[str, list[dict[str, Any]]] = {
        "attacks": attacks,
        "data": [{"name": name, "summary": summary} for name, summary in list_kinds()],
        "presets": [
            {
                "name": name,
                "summary": preset.description,
                "attack": [str(spec) for spec in preset.attack],
            }
            for name, preset in shipped()
        ],
    }
    if what:
        everything = {what: everything[what]}
    if as_json:
        emit(json.dumps(everything, indent=1) + "\n")
    else:
        emit("\n".join(listed(everything)) + "\n")


def listed(everything: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Names with what is to say of each; lines as wide as the terminal, or whole for a pipe."""
    terminal = bool(sys.stdout) and sys.stdout.isatty()
    width = max(shutil.get_terminal_size().columns, 40) if terminal else sys.maxsize
    for heading, items in everything.items():
        yield heading
        margin = max(len(item["name"]) for item in items) + 4
        for item in items:
            given = item.get("parameters", {}).items()
            lines = [
                item["summary"],
                ", ".join(filter(None, (*item.get("norms", ()), item.get("knowledge", "")))),
                " ".join(f"{key}={show_value(value)}" for key, value in given),
                *item.get("attack", ()),
            ]
            first, *more = filter(None, lines)
            for mark, line in ((f"  {item['name']}", first), *(("", line) for line in more)):
                yield textwrap.fill(
                    line,
                    width,
                    initial_indent=mark.ljust(margin),
                    subsequent_indent=" " * margin,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        yield ""
