"""Text from outside goes through every format unharmed, and does no harm there.

One run holds a hostile text wherever text can come from outside: names of attacks, defenses,
models, files and classes, parameters, exceptions, findings, gates. Each format is read back by a
parser of its kind, which refuses what would be active there. What a reader then sees must hold the
text, and the page must be built like that of a harmless one.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import reportable
from conftest import save_cells
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from reportable import json_of, markdown_of, print_run, record_of
from rich.console import Console

from robusteval.registry import REPORT_FORMATS
from robusteval.reports import (
    badge,
    compare,
    comparison,
    comparison_layout,
    cyclonedx,
    github,
    image_list,
    junit,
    model_card,
    sarif,
    spdx,
)
from robusteval.reports.formatting import name_file
from robusteval.reports.rendering import render_records
from robusteval.reports.spreadsheet import to_csv
from robusteval.runs.folder import Store, load_run
from robusteval.runs.formulas import ACTIVE
from robusteval.runs.types import Finding, Outcome, Picture, Run, Spec, visible

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
Check = reportable.Check

HOSTILE = {
    "markup": "[bold]x[/bold] [link=http://h/]y[/link] [/]",
    "script": "<script>alert(1)</script>",
    "attribute": "\" onload='alert(1)' x=\"",
    "entity": "&lt;b&gt; &#60; &amp",
    "cdata": "]]> <![CDATA[ <!-- --> <?x?>",
    "escape": "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "formula": "=cmd()|' /C calc'!A0",
    "plus": "+1+1",
    "minus": "-2+3",
    "at": "@SUM(A1)",
    "command": "::error::x",
    "old-command": "##[error]x %0A::add-mask::y",
    "lines": "a\nb\r\n# c\n\n- d\n::warning::e",
    "bidi": "\u202egnp.exe\u2066\u200f",
    "pipe": "| pipe `tick` @user ``two`` \\| end",
    "markdown": "**b** _i_ ~~s~~ $x$ ![i](http://h/i.png) [l](javascript:x) <http://h/> #1",
    "mathtext": "$\\frac{1}$ $x^{",
    "template": "{{ 7*7 }} {% raw %} ${7*7}",
    "control": "\x00\x08\x0b\x7f\ufffe\uffff",
    "surrogate": "\ud800 \udc80",
    "separators": "a\u2028b\u2029c\x85d\x0ce",
    "url": "javascript:alert(1)",
    "blank": "\u200b\ufeff\u00a0",
    "long": "very long " * 100,
}
HARMLESS = "harmless"
# each text stands in these places, with the name of the place behind it
PLACES = (
    *("attack", "value", "defense", "arch", "file", "data", "class", "failed", "reason"),
    *("finding", "code", "note", "gate", "told", "config", "device", "command"),
)


class Format(NamedTuple):
    """A way to lay out a run, and a reader that fails on whatever is active in it."""

    render: Callable[[Run, Check], str]
    read: Callable[[str], str]  # what a reader of it sees
    shape: Callable[[str], Any]  # what must not depend on the text
    shows: frozenset[str]  # the places whose text it must show
    cuts: bool = False  # it shortens very long text


def hostile(run: Run, text: str) -> Run:
    """The run with the text in all places but those of gates."""

    def spec(old: Spec, place: str) -> Spec:
        return Spec(f"{text}~{place}", {**old.parameters, "value": f"{text}~value"})

    attacks = {o.attack.name: spec(o.attack, f"attack {o.attack.name}") for o in run.outcomes}
    defenses = {str(d.spec): spec(d.spec, f"defense {d.spec.name}") for d in run.defenses}
    outcomes = tuple(
        replace(
            outcome,
            attack=attacks[outcome.attack.name],
            defense=outcome.defense and defenses[str(outcome.defense)],
            notes=(f"{text}~note",),
        )
        for outcome in run.outcomes
    )
    return replace(
        run,
        outcomes=outcomes,
        defenses=tuple(d._replace(spec=defenses[str(d.spec)]) for d in run.defenses),
        findings=(
            Finding("duplicates", False, f"{text}~finding"),
            Finding(f"{text}~code", True, f"{text}~finding", str(outcomes[0].attack)),
        ),
        failures={f"{text}~failed": f"{text}~reason"},
        config={**run.config, "command": f"{text}~command"},
        model={**run.model, "arch": f"{text}~arch", "file": f"{text}~file"},
        data={
            **run.data,
            "name": f"{text}~data",
            "class_names": [f"{text}~class {i}" for i in range(11)],
        },
        environment={**run.environment, "device": f"{text}~device"},
        created=f"2026-01-02 {text}",
    )


def gates(text: str) -> Check:
    """A check with the text in its gates."""
    record = reportable.check(f"{text}~gate").to_gates()
    told = tuple(replace(gate, reason=f"{text}~told") for gate in record.gates)
    return Check(replace(record, config=f"{text}~config", gates=told))


def turned(outcome: Outcome) -> Outcome:
    """The cell with every seventh image robust."""
    c = outcome.columns
    made = np.where(np.arange(len(c["id"])) % 7 == 3, c["label"], c["pred_adv"])
    return replace(outcome, columns={**c, "pred_adv": made})


def compared(run: Run) -> comparison.ComparisonRecord:
    """The run beside another, with one attack more in each."""
    ready = replace(run, status="complete", failures={}, config={**run.config, "attacks": []})
    before = replace(ready, outcomes=run.outcomes[:-1])
    after = replace(ready, outcomes=tuple(map(turned, run.outcomes[1:])))
    return comparison.build_comparison(compare.compare(before, after))


def on_terminal(print_it: Callable[[Console], None], width: int = 5_000) -> str:
    """What is printed on a terminal with colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="256")
    print_it(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def read_terminal(text: str) -> str:
    """The text on the terminal: beside our own colours only what prints."""
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    for line in shown.splitlines():
        assert not line.lstrip().startswith("::")
        assert "##[" not in line
    return shown


def read_markdown(text: str) -> str:
    """The text of the page: no markup but that of our own, and nobody is called."""
    assert all(char.isprintable() or char == "\n" for char in text)
    parts, elements = opened(rendered(text))
    assert {tag for tag, _ in elements} <= set(
        "p strong code h1 h2 h3 ul li table thead tbody tr th td".split()
    )
    assert {name for _, names in elements for name in names} <= {"style"}
    prose = "".join(part for part, path in parts if "code" not in path)
    assert not re.search(r"@\w", prose)
    return "".join(part for part, _ in parts).replace("@\u200b", "@")


def read_model_card(text: str) -> str:
    """The text of a model card; the hub takes its head."""
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    assert card.data.eval_results
    assert str(card.data).replace("\n", "").isprintable()
    return read_markdown(card.text)


def rendered(text: str) -> str:
    """The page as GitHub would lay it out, raw HTML and all."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return str(reader.render(text))


class Page(HTMLParser):
    """The elements of a page in order, and its text with the elements around it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[tuple[str, tuple[str, ...]]] = []
        self.path: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr", "input", "link", "source", "wbr"):
            self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.path and self.path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.parts.append((data, tuple(self.path)))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def parsed(text: str) -> Page:
    """The page, read as HTML."""
    page = Page()
    page.feed(text)
    page.close()
    return page


def opened(text: str) -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, list[str]]]]:
    """Its text, and its elements with the names of their attributes."""
    page = parsed(text)
    return page.parts, [(tag, sorted(attrs)) for tag, attrs in page.elements]


def read_html(text: str) -> str:
    """The text of the page and of its pictures: nothing runs, nothing is loaded from elsewhere."""
    assert all(char.isprintable() or char == "\n" for char in text)
    page = parsed(text)
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv")]
    assert any("default-src 'none'" in (policy or "") for policy in policies)
    seen = [part for part, path in page.parts if "style" not in path]
    for tag, attrs in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "svg")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "xlink:href", "action"):
                assert value == "data:," or (value or "").startswith(("data:image/", "#"))
            seen.append(read_drawing(value or ""))
    return "".join(seen)


def read_drawing(value: str) -> str:
    """The text of an attribute, or of the drawing in it, in which nothing runs either."""
    head = "data:image/svg+xml;base64,"
    if not value.startswith(head):
        return "" if value.startswith("data:") else value
    root = ET.fromstring(base64.b64decode(value.removeprefix(head)))
    for element in root.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a")
        for name, said in element.attrib.items():
            assert not name.startswith("on")
            assert not name.endswith("href") or said.startswith("#")
    return "".join(root.itertext())


def shape_of_html(text: str) -> Any:
    """Its elements in order."""
    return opened(text)[1]


def read_json(text: str) -> str:
    """All strings of the record; in the file ASCII alone."""
    assert all(char == "\n" or " " <= char <= "~" for char in text)
    return "\n".join(visible(said) for said in strings(json.loads(text)))


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, Mapping):
        return [*map(str, value), *(s for item in value.values() for s in strings(item))]
    if isinstance(value, list):
        return [said for item in value for said in strings(item)]
    return [value] if isinstance(value, str) else []


def shape_of_json(text: str) -> Any:
    """How many values are in it."""

    def count(value: Any) -> int:
        items = value.values() if isinstance(value, dict) else value
        return 1 + sum(map(count, items)) if isinstance(value, dict | list) else 1

    return count(json.loads(text))


def read_xml(text: str) -> str:
    """All text and attributes, of which XML 1.0 takes every character."""
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "<!" not in text
    root = ET.fromstring(text)
    attributes = [said for element in root.iter() for said in element.attrib.values()]
    return "".join((*attributes, *root.itertext()))


def shape_of_xml(text: str) -> Any:
    """Its elements in order."""
    return [(element.tag, sorted(element.attrib)) for element in ET.fromstring(text).iter()]


def read_sarif(text: str) -> str:
    """The messages; every place is a plain relative path."""
    run = json.loads(text)["runs"][0]
    for result in run["results"]:
        place = result["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9._~%-][A-Za-z0-9._~%/-]*", place["artifactLocation"]["uri"])
        assert place["region"]["startLine"] >= 1
    assert all(said.isprintable() for said in strings(run))
    return read_json(text)


def read_csv(text: str) -> str:
    """The cells, none of which a spreadsheet calculates."""
    cells = [cell for row in rows_of(text) for cell in row]
    for cell in cells:
        assert cell.isprintable()
        assert not cell.lstrip().startswith(ACTIVE)
    return "\n".join(cells)


def rows_of(text: str) -> list[list[str]]:
    """The rows that hold text; a number would end the test."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len({len(row) for row in rows}) == 1
    return [[cell for cell in row if not re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)] for row in rows]


def read_commands(text: str) -> str:
    """What GitHub shows of workflow commands, each of which is one of ours in one line."""
    shown = []
    for line in text.splitlines():
        found = re.fullmatch(
            r"::(?:error|warning) file=([^:,%]|%..)*,line=\d+,title=([^:,%]|%..)*::([^%]|%..)*",
            line,
        )
        assert found
        assert line.isprintable()
        said = re.sub(r"%(25|0D|0A|3A|2C)", lambda code: bytes.fromhex(code[1]).decode(), line)
        assert said.isprintable()
        shown.append(said)
    return "\n".join(shown)


def html(run: Run, check: Check) -> str:
    """The HTML report, if its renderer is there."""
    module = pytest.importorskip(
        "robusteval.reports.html", exc_type=ImportError, reason="needs the HTML report"
    )
    page: str = module.to_html([record_of(run, check)])
    return page


RECORD = frozenset(PLACES)
REPORT = RECORD - {"note", "code", "config", "told", "command"} | {"told", "command"}
PROBLEMS = frozenset(("gate", "told", "finding", "code", "failed", "reason", "attack"))
BILLED = frozenset(("defense", "arch", "file", "data", "finding", "failed", "reason"))
COMPARED = frozenset(("attack", "value", "defense", "arch", "file", "class"))
FORMATS = {
    "terminal": Format(
        lambda run, check: on_terminal(lambda console: print_run(run, console, check)),
        read_terminal,
        lambda text: None,
        REPORT,
    ),
    "markdown": Format(
        markdown_of,
        read_markdown,
        lambda text: opened(rendered(text))[1],
        REPORT,
    ),
    "json": Format(lambda run, check: json_of([run], [check]), read_json, shape_of_json, RECORD),
    "html": Format(html, read_html, shape_of_html, REPORT | {"class"}),
    "junit": Format(
        lambda run, check: junit.render_junit([record_of(run, check)]),
        read_xml,
        shape_of_xml,
        REPORT - {"arch", "file", "data", "device", "command", "class"},
    ),
    "sarif": Format(
        lambda run, check: sarif.render_sarif([record_of(run, check)]),
        read_sarif,
        shape_of_json,
        PROBLEMS,
        cuts=True,
    ),
    "csv": Format(
        lambda run, check: to_csv([record_of(run, check)]),
        read_csv,
        lambda text: [len(row) for row in rows_of(text)],
        frozenset(("attack", "value", "defense", "class")),
    ),
    "images": Format(
        lambda run, check: image_list.render_images([record_of(run, check)]),
        read_csv,
        lambda text: [len(row) for row in rows_of(text)],
        frozenset(("attack", "value", "defense", "class")),
    ),
    "annotations": Format(
        lambda run, check: "\n".join(github.list_annotations(record_of(run, check))),
        read_commands,
        lambda text: len(text.splitlines()),
        PROBLEMS,
        cuts=True,
    ),
    "summary": Format(
        lambda run, check: github.write_step_summary([record_of(run, check)]),
        read_markdown,
        lambda text: opened(rendered(text))[1],
        REPORT,
    ),
    "badge": Format(
        lambda run, check: badge.build_badge(record_of(run, check)),
        read_json,
        shape_of_json,
        frozenset(),
    ),
    "cyclonedx": Format(
        lambda run, check: cyclonedx.render_cyclonedx([record_of(run, check)]),
        read_json,
        shape_of_json,
        BILLED,
    ),
    "spdx": Format(
        lambda run, check: spdx.render_spdx([record_of(run, check)]),
        read_json,
        shape_of_json,
        BILLED,
    ),
    "model-card": Format(
        lambda run, check: model_card.render_model_card([record_of(run, check)]),
        read_model_card,
        lambda text: opened(rendered(ModelCard(text).text))[1],
        BILLED - {"arch"} | {"command"},
    ),
    "compared on a terminal": Format(
        lambda run, _: on_terminal(
            lambda console: comparison_layout.print_comparison(compared(run), console)
        ),
        read_terminal,
        lambda text: None,
        COMPARED,
        cuts=True,
    ),
    "compared in markdown": Format(
        lambda run, _: comparison_layout.render_comparison_markdown(compared(run)),
        read_markdown,
        lambda text: opened(rendered(text))[1],
        COMPARED,
        cuts=True,
    ),
    "compared in json": Format(
        lambda run, _: comparison.render_comparison_json(compared(run)),
        read_json,
        shape_of_json,
        COMPARED - {"class"},
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Run]:
    """Writes a run with a picture of its first attack to a folder, and reads it again."""

    def store(run: Run) -> Run:
        rng = np.random.default_rng(0)
        picture = Picture(
            "easiest",
            0,
            rng.integers(0, 255, (4, 4, 3)).astype(np.uint8),
            np.zeros((4, 4, 3), np.float32),
        )
        folder = tmp_path_factory.mktemp("run")
        record = run.to_record()
        with Store.open(folder, record["config"]) as open_store:
            open_store.save_record(record, save_cells(open_store, run, {0: [picture]}))
        return load_run(folder)

    return store


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """What was made already, by text."""
    return {}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Harmless pages by their format."""
    return {}


@pytest.fixture
def run_with(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    stored: Callable[[Run], Run],
    runs: dict[str, Run],
) -> Callable[[str], Run]:
    """A stored run with a text in all its places."""

    def make(text: str) -> Run:
        if text not in runs:
            plain = reportable.defended(make_outcome, make_run, n=40, status="incomplete")
            runs[text] = stored(hostile(plain, text))
        return runs[text]

    return make


def squeezed(text: str) -> str:
    """Without blanks, which layout moves."""
    return re.sub(r"\s", "", text)


# a page of HTML takes longest to draw, and how a text begins does not matter in it
SEVERAL = {f"all {i}": " / ".join(list(HOSTILE.values())[i::4]) for i in range(4)}
CASES = [
    (form, kind, text)
    for form in FORMATS
    for kind, text in (SEVERAL if form == "html" else HOSTILE).items()
]


@pytest.mark.parametrize(("form", "kind", "text"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_hostile_text_is_shown_and_does_nothing(
    form: str, kind: str, text: str, run_with: Callable[[str], Run], pages: dict[str, str]
) -> None:
    layout = FORMATS[form]
    if form not in pages:
        pages[form] = layout.render(run_with(HARMLESS), gates(HARMLESS))

    page = layout.render(run_with(text), gates(text))

    seen = squeezed(layout.read(page))
    assert layout.shape(page) == layout.shape(pages[form])
    for place in layout.shows:
        said = f"{text}~{place}"
        shown = squeezed(visible(name_file(said) if place in ("file", "data") else said))
        if "terminal" in form:  # where a GitHub runner reads along
            shown = shown.replace("::", ":\\x3a").replace("##[", "#\\x23[")
        assert (shown[:60] if layout.cuts and kind == "long" else shown) in seen, place


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_narrow_terminal_is_not_steered_either(kind: str, run_with: Callable[[str], Run]) -> None:
    run, check = run_with(HOSTILE[kind]), gates(HOSTILE[kind])

    read_terminal(on_terminal(lambda console: print_run(run, console, check), 80))
    read_terminal(
        on_terminal(lambda console: comparison_layout.print_comparison(compared(run), console), 80)
    )


@pytest.mark.parametrize("name", REPORT_FORMATS.entries)
def test_no_registered_format_carries_a_command_of_a_runner(
    name: str, run_with: Callable[[str], Run]
) -> None:
    """GitHub's and Azure's runners obey ``##[`` anywhere in what a step prints."""
    text = SEVERAL["old-command"] if "old-command" in SEVERAL else HOSTILE["old-command"]
    made = REPORT_FORMATS.load(name)([record_of(run_with(text), gates(text))])

    assert "##[" not in (made if isinstance(made, str) else made.decode())


@pytest.mark.parametrize("name", REPORT_FORMATS.entries)
def test_every_registered_format_writes_only_what_prints(
    name: str, run_with: Callable[[str], Run]
) -> None:
    for text in (HARMLESS, *SEVERAL.values()):
        record = record_of(run_with(text), gates(text))

        page = render_records([record], name, page=True)

        if isinstance(page, str):
            assert all(char.isprintable() or char in "\r\n" for char in page)
