"""`robusteval list`: what there is."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from robusteval.commands.preset import list_presets
from robusteval.registry import ATTACKS, DEFENSES, INTERPRETERS, REPORT_FORMATS, Entry
from robusteval.registry.signatures import describe_needs
from robusteval.runs.types import format_value, spell_json

from .shell import emit, emit_lines


@click.command(
    name="list", short_help="Show attacks, interpreters, defenses, data, formats, presets, terms."
)
@click.argument(
    "what",
    metavar="[WHAT]",
    type=click.Choice(
        ("attacks", "defenses", "interpreters", "data", "formats", "presets", "terms")
    ),
    required=False,
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def list_(what: str | None, as_json: bool) -> None:
    """Show what there is.

    WHAT is attacks, defenses, interpreters, data, formats, presets or terms (the words of reports);
    all if not given.
    """
    from robusteval.datasets.sources import list_kinds
    from robusteval.reports.terms import TERMS

    attacks = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "norms": list(entry.norms),
            "knowledge": entry.knowledge,
            "parameters": {p.name: p.default for p in entry.parameters.values()},
            "needs": list(describe_needs(entry.needs)),
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
            "needs": [],
        }
    )
    everything: dict[str, list[dict[str, Any]]] = {
        "attacks": attacks,
        "defenses": [
            {
                "name": entry.name,
                "summary": entry.summary,
                "parameters": {p.name: p.default for p in entry.parameters.values()},
            }
            for entry in DEFENSES.entries.values()
        ],
        "interpreters": [describe_interpreter(entry) for entry in INTERPRETERS.entries.values()],
        "data": [{"name": name, "summary": summary} for name, summary in list_kinds()],
        "formats": [
            {"name": entry.name, "summary": entry.summary, "suffixes": list(entry.suffixes)}
            for entry in REPORT_FORMATS.entries.values()
        ],
        "presets": [
            {
                "name": name,
                "summary": preset.description,
                "attack": [str(spec) for spec in preset.attack],
                "interpreter": [str(spec) for spec in preset.interpreter],
            }
            for name, preset in list_presets()
        ],
        "terms": [{"name": name, "summary": meaning} for name, meaning in TERMS.items()],
    }
    if what:
        everything = {what: everything[what]}
    if as_json:
        emit(spell_json(json.dumps(everything, indent=1)) + "\n")
    else:
        emit_lines(lay_out(everything))


def describe_interpreter(entry: Entry) -> dict[str, Any]:
    """What there is to know of an interpreter before it is used."""
    return {
        "name": entry.name,
        "summary": entry.summary,
        "differentiable": entry.differentiable,
        "seeded": entry.seeded,
        "cost": entry.cost,
        "alike": list(entry.alike),
        "parameters": {p.name: p.default for p in entry.parameters.values()},
    }


def describe_facts(item: dict[str, Any]) -> Iterator[str]:
    """The facts of an interpreter in words; nothing for other items."""
    if "differentiable" in item:
        graph = "on the graph: can be attacked" if item["differentiable"] else "not on the graph"
        cost = f"per map {item['cost']}" if item["cost"] else ""
        random = "another seed gives another map" if item["seeded"] else ""
        yield "; ".join(filter(None, (graph, cost, random)))
        if item["alike"]:
            yield (
                f"same information as {', '.join(item['alike'])}"
                " on a network that ends in average pooling and one linear layer"
            )


def lay_out(everything: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
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
                ", ".join(item.get("suffixes", ())),
                *describe_facts(item),
                " ".join(f"{key}={format_value(value)}" for key, value in given),
                "; ".join(item.get("needs", ())),
                *item.get("attack", ()),
                *(f"interpreter {spec}" for spec in item.get("interpreter", ())),
            ]
            first, *more = filter(None, lines)
            for mark, line in ((f"  {item['name']}", first), *(("", line) for line in more)):
                yield from textwrap.wrap(
                    line,
                    width,
                    initial_indent=mark.ljust(margin),
                    subsequent_indent=" " * margin,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        yield ""
