"""The HTML report: one file that runs nothing, loads nothing, and says what the columns say."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reportable
from conftest import save_cells
from PIL import Image
from reportable import as_dict, html_of, record_of
from rich.console import Console

from robusteval.errors import RunError
from robusteval.reports import formatting, gate_words, pictures
from robusteval.reports import html as report
from robusteval.reports.console import print_list, print_paragraph
from robusteval.reports.html import LIMIT
from robusteval.reports.pictures import CRISP, EDGES
from robusteval.runs import metrics
from robusteval.runs.folder import Store, load_run
from robusteval.runs.types import Outcome, Picture, Run, Spec, Threat, visible

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
Array = np.ndarray[Any, Any]

VOID = ("meta", "img", "br", "source", "link", "input")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECTIONS = [
    "Gates",
    "Attacks and defenses",
    "Classes",
    "Budgets",
    "Gallery",
    "Images",
    "Detectors",
    "Cost",
    "Trust",
    "Without a result",
    "Terms",
    "Provenance",
]


class Element:
    """An element of a page, and what is in it."""

    def __init__(self, tag: str, attrs: dict[str, str], parent: Element | None) -> None:
        self.tag, self.attrs, self.parent = tag, attrs, parent
        self.inside: list[Element | str] = []

    def all(self, *tags: str) -> list[Element]:
        """The elements of these kinds below this one, in order."""
        found = []
        for item in self.inside:
            if isinstance(item, Element):
                found += [item] * (not tags or item.tag in tags) + item.all(*tags)
        return found

    @property
    def text(self) -> str:
        """All text in it, runs of blanks as one."""
        parts = (item if isinstance(item, str) else item.text for item in self.inside)
        return " ".join(" ".join(parts).split())


class Tree(HTMLParser):
    """Builds the elements of a page; every element must be closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.inside.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.inside.append(data)


def parsed(text: str) -> Element:
    """The page as elements."""
    tree = Tree()
    tree.feed(text)
    tree.close()
    assert tree.at is tree.root
    return tree.root


def section(page: Element, name: str) -> Element:
    """The section with this heading."""
    (found,) = (s for s in page.all("section") if s.all("h2", "h3")[0].text == name)
    return found


def photo(side: int, channels: int = 3, seed: int = 0) -> Array:
    """Something as hard to compress as a photo ``(side, side, channels)`` uint8."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.linspace(0, 7, side))[:, None, None] * np.linspace(-90, 90, side)[:, None]
    noise = rng.normal(0, 12, (side, side, channels))
    made: Array = (128 + wave + noise).clip(0, 255).astype(np.uint8)
    return made


def pictures_of(run: Run, side: int, channels: int = 3) -> dict[int, list[Picture]]:
    """Three pictures for each attack."""
    rng = np.random.default_rng(1)
    found = {}
    for position, outcome in enumerate(run.outcomes):
        rows = np.flatnonzero(outcome.attacked)
        found[position] = [
            Picture(
                place,
                int(row),
                photo(side, channels, seed=3 * position + i),
                rng.choice([-8 / 255, 8 / 255], (side, side, channels)).astype(np.float32),
            )
            for i, (place, row) in enumerate(
                zip(("easiest", "median", "hardest"), rows, strict=False)
            )
        ]
    return found


@pytest.fixture
def with_pictures(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, list[Picture]]], None]:
    """Gives pictures to runs that are in no folder."""

    def give(found: dict[int, list[Picture]]) -> None:
        monkeypatch.setattr(report, "read_pictures", lambda run: found)

    return give


@pytest.fixture
def everything(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    with_pictures: Callable[[dict[int, list[Picture]]], None],
) -> Run:
    """A run with several norms, defenses, a detector, pictures, findings and failures."""
    run = reportable.defended(make_outcome, make_run, folder=None)
    probe = replace(run.outcomes[0], role="probe:noise")
    run = replace(
        run,
        outcomes=(*run.outcomes, probe),
        failures={"art:Broken": "out of memory"},
        data={**run.data, "class_names": [f"sort {i}" for i in range(11)]},
    )
    with_pictures(pictures_of(run, 12))
    return run


@pytest.fixture
def page(everything: Run) -> Element:
    """Its report."""
    return parsed(html_of([everything], [reportable.check()]))


def test_the_file_runs_nothing_and_loads_nothing(page: Element) -> None:
    allowed = ("#", "data:image/png;base64,", "data:image/svg+xml;base64,")
    for element in page.all():
        assert element.tag not in ("script", "iframe", "object", "embed", "form", "base", "link")
        for name, value in element.attrs.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in ("src", "srcset", "href"):
                assert value.startswith(allowed)
        if element.tag == "style":
            assert "url(" not in element.text
            assert "@import" not in element.text


def test_the_policy_allows_the_one_style_and_nothing_else(everything: Run) -> None:
    text = html_of([everything])
    (policy,) = (m.attrs["content"] for m in parsed(text).all("meta") if "http-equiv" in m.attrs)
    (style,) = re.findall("<style>(.*)</style>", text, re.DOTALL)

    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )


def test_the_order_is_that_of_every_report(page: Element) -> None:
    assert [s.all("h2")[0].text for s in page.all("section")] == SECTIONS
    assert page.all("h1", "p")[0].text.startswith("Robustness of net.pt on digits")
    verdict = page.all("article")[0].all("p")[0]
    assert verdict.attrs["class"].startswith("said")


def test_the_verdict_is_the_one_of_the_record(everything: Run, page: Element) -> None:
    record = as_dict(everything, reportable.check())

    said = page.all("article")[0].all("p")[0].text

    assert said == record["verdict"]
    assert gate_words.OUTCOMES["failed"] in page.all("article")[0].all("span")[0].text


def test_it_can_be_read_aloud(page: Element) -> None:
    assert page.all("html")[0].attrs["lang"] == "en"
    assert page.all("title")[0].text == "Robustness of net.pt on digits"
    for image in page.all("img"):
        # a bar says nothing that is not beside it
        assert image.attrs["alt"] or image.attrs["class"] == "bar"
    for table in page.all("table"):
        assert table.all("caption")[0].text
        assert all(head.attrs["scope"] for head in table.all("th"))
        assert table.parent is not None
        assert table.parent.attrs["class"].split()[0] == "scroll"
    for region in page.all("div"):
        if region.attrs.get("role") == "region":
            assert region.attrs["aria-label"]


def test_headings_go_down_one_by_one(everything: Run) -> None:
    for runs in ([everything], [everything, everything]):
        levels = [int(h.tag[1]) for h in parsed(html_of(runs)).all("h1", "h2", "h3", "h4", "h5")]

        assert levels[0] == 1
        assert levels.count(1) == 1
        assert max(np.diff(levels)) == 1


def test_links_lead_somewhere(everything: Run) -> None:
    page = parsed(html_of([everything, everything]))
    names = [element.attrs["id"] for element in page.all() if "id" in element.attrs]

    targets = {link.attrs["href"].removeprefix("#") for link in page.all("a")}

    assert len(names) == len(set(names))
    assert targets <= set(names)
    assert {"run-1", "run-2", "run-2-gallery"} <= targets
    chapters = [link.text for link in page.all("a") if link.attrs["href"] in ("#run-1", "#run-2")]
    assert len(set(chapters)) == 2  # by name, not by place alone


def test_numbers_of_the_matrix_are_those_of_the_columns(everything: Run, page: Element) -> None:
    table = section(page, "Attacks and defenses").all("table")[0]
    heads = [head.text for head in table.all("thead")[0].all("th")]
    threat, seen = "", set()
    for row in table.all("tbody")[0].all("tr"):
        first, *cells = row.all("th", "td")
        if row.attrs["class"] == "threat":
            threat = first.text
        for head, cell in zip(heads[1:], cells, strict=False):
            for shown in cell.all("p"):
                seen.add((threat, first.text, head, shown.text))
    for outcome in everything.attacks:
        rate = metrics.robust_accuracy(outcome)
        low, high = rate.interval
        number = f"{100 * rate.value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
        found = [
            text
            for _, attack, defense, text in seen
            if attack == str(outcome.attack) and text.startswith(number)
            if defense.startswith(outcome.defense.name if outcome.defense else "undefended")
        ]
        assert found, (outcome.attack, outcome.defense, number)


def test_numbers_without_a_defense_are_those_of_the_columns(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    broken = np.arange(500) % 7 < 3
    run = make_run(make_outcome(broken, right=np.arange(500) < 470), folder=None)

    (row,) = section(parsed(html_of([run])), "Attacks").all("tbody")[0].all("tr")[1:]

    robust = int((~broken & (np.arange(500) < 470)).sum())
    assert row.all("td")[1].text.startswith(f"{100 * robust / 500:.1f} % (")


def test_numbers_of_curves_are_counted_in_the_columns(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    rng = np.random.default_rng(0)
    broken, far = rng.random(500) < 0.8, rng.uniform(0, 2, 500)
    outcome = make_outcome(broken, threat=Threat("l2", None, False), l2=far)
    run = make_run(outcome, folder=None)

    table = section(parsed(html_of([run])), "Budgets").all("table")[0]
    shown = [cell.text for cell in table.all("tbody")[0].all("td")]

    reach = far[broken].max()
    for share, text in zip((0.0, 0.25, 0.5, 0.75, 1.0), shown, strict=True):
        robust = 500 - int((broken & (far <= share * reach)).sum())
        # steps may be merged, a few images later at most
        assert float(text.removesuffix(" %")) == pytest.approx(robust / 5, abs=0.5)
    (image,) = section(parsed(html_of([run])), "Budgets").all("img")
    assert all(text in image.attrs["alt"] for text in shown)


def test_gates_show_their_margin(page: Element) -> None:
    record = reportable.check().to_gates()

    rows = section(page, "Gates").all("tbody")[0].all("tr")

    for gate, row in zip(record.gates, rows, strict=True):
        cells = [cell.text for cell in row.all("td")]
        assert cells[:4] == [
            gate_words.OUTCOMES[gate.outcome],
            gate_words.format_gate_value(gate),
            gate_words.format_gate_limit(gate),
            gate_words.format_gate_margin(gate),
        ]
        assert row.all("td")[0].attrs["class"] == f"words {gate.outcome}"


def test_a_detector_has_its_curve_and_its_point(everything: Run, page: Element) -> None:
    found = section(page, "Detectors")
    record = next(d.detector for d in record_of(everything).defenses if d.detector)

    rows = found.all("tbody")[0].all("tr")

    for attack, row in zip(record.attacks, rows, strict=True):
        assert row.all("td")[0].text == f"{attack.auc:.3f}"
        assert row.all("td")[1].text == formatting.format_rate(record.fpr)
        assert row.all("td")[2].text == formatting.format_rate(attack.tpr)
        assert f"{attack.auc:.3f}" in found.all("img")[0].attrs["alt"]


def test_a_run_in_which_nothing_was_evaluated_has_a_report(make_run: MakeRun) -> None:
    page = parsed(html_of([make_run(folder=None)]))

    assert [s.all("h2")[0].text for s in page.all("section")] == ["Provenance"]
    assert "Nothing was evaluated" in page.text


def test_the_same_run_gives_the_same_file(everything: Run) -> None:
    assert html_of([everything]) == html_of([everything])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_those_of_the_run(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    with_pictures: Callable[[dict[int, list[Picture]]], None],
    channels: int,
) -> None:
    clean = photo(20, channels)
    attacked = photo(20, channels, seed=9)
    delta = ((attacked / 255) - (clean / 255)).astype(np.float16).astype(np.float32)
    with_pictures({0: [Picture("median", 1, clean, delta)]})
    run = make_run(make_outcome([True, True], linf=np.full(2, 4 / 255)), folder=None)

    images = section(parsed(html_of([run])), "Gallery").all("img")
    first, second, change = (opened(image.attrs["src"]) for image in images)

    def flat(image: Array) -> Array:
        return image if channels < 4 else image.mean(axis=2, keepdims=True)

    factor = 2.0 ** np.floor(np.log2(0.504 / np.abs(delta).max()))
    np.testing.assert_allclose(first, flat(clean), atol=0.51)
    np.testing.assert_allclose(second, flat(attacked), atol=0.7)
    np.testing.assert_allclose(change, flat(127.5 + 255 * factor * delta), atol=1.6)
    assert all(image.attrs["class"] == "crisp" for image in images)
    assert (
        f"linf {formatting.format_quantity(4)}/255"
        in section(parsed(html_of([run])), "Gallery").text
    )


def test_the_first_screen_shows_what_the_radius_is_on_an_image(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    with_pictures: Callable[[dict[int, list[Picture]]], None],
) -> None:
    """A success where there is one, else the largest change at random signs, and says which."""
    broken = np.arange(500) == 1
    for outcome, said in ((make_outcome(broken), "fooled"), (make_outcome(~broken), "at random")):
        run = make_run(outcome, folder=None)
        with_pictures({0: [Picture("median", 1, photo(20), np.zeros((20, 20, 3), np.float32))]})

        (figure,) = parsed(html_of([run])).all("article")[0].all("div")[0].all("figure")

        assert "image 1 at linf eps 8/255" in figure.text
        assert said in figure.text
        assert "magnified ×" in figure.text
        first, second, _ = (opened(image.attrs["src"]).astype(int) for image in figure.all("img"))
        assert np.abs(second - first).max() == (8 if said == "at random" else 0)
        # what is read out is what is shown: no class of an attack beside random signs
        alts = [image.attrs["alt"] for image in figure.all("img")]
        assert [said == "at random" and said in alt for alt in alts] == [
            False,
            *[said == "at random"] * 2,
        ]


def test_words_of_the_field_are_explained_where_they_stand(page: Element) -> None:
    """By a tooltip in tables, and in a list for those who have no mouse."""
    told = {element.text: element.attrs["title"] for element in page.all("abbr")}
    listed = section(page, "Terms")

    assert "computes with it" in told["white-box"]
    assert any(name.startswith("linf eps") for name in told)
    assert {"adaptive", "oblivious", "forward / back"} <= told.keys()
    assert {name.text for name in listed.all("dt")} >= {"linf", "white-box", "adaptive", "interval"}
    assert all(meaning in listed.text for meaning in told.values())


def opened(uri: str) -> Array:
    """The pixels ``(h, w, c)`` of a data URI."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(8 / 255, "×16"), (0.25, "×2"), (0.5, "×1"), (0.9, "×1/2"), (0.0, "×1"), (1e-3, "×256")],
)
def test_a_change_nearly_fills_the_greys(largest: float, expected: str) -> None:
    delta = np.zeros((4, 4, 3), np.float32)
    delta[1, 2] = -largest

    factor = pictures.choose_amplification(delta)

    assert pictures.format_factor(factor) == expected
    assert largest == 0 or 0.25 < factor * largest <= 0.504


def test_captions_say_class_confidence_and_distance(everything: Run, page: Element) -> None:
    outcome = everything.outcomes[0]
    row = int(np.flatnonzero(outcome.attacked)[0])
    c = outcome.columns

    sample = section(page, "Gallery").all("figure")[0]

    before, after = f"sort {c['label'][row]}, 50.0 %", f"sort {c['pred_adv'][row]}, 50.0 %"
    alts = [image.attrs["alt"].partition(": ")[2] for image in sample.all("img")[:2]]
    assert alts == [before, after]
    assert f"easiest: image {c['index'][row]}" in sample.text
    assert ("✗ fooled" if outcome.success()[row] else "✓ withstood") in sample.text
    assert f"linf {formatting.format_quantity(255 * c['linf'][row])}/255" in sample.text


def test_a_flagged_image_is_no_success(everything: Run) -> None:
    behind = next(o for o in everything.attacks if "flagged" in o.columns and o.attacked.any())
    row = int(np.flatnonzero(behind.columns["flagged"])[0])

    assert pictures.describe_result(everything, behind, row) == "✓ flagged"


def test_a_targeted_attack_names_its_target(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    outcome = make_outcome([True, False], threat=Threat("linf", 0.1, True), target=np.array([1, 7]))
    run = make_run(outcome)

    assert pictures.describe_result(run, outcome, 0) == "✗ made class 1"
    assert pictures.describe_result(run, outcome, 1) == "✓ not made class 7"


@pytest.mark.parametrize(
    ("probability", "expected"),
    [(0.5, "50.0 %"), (1.0, "> 99.9 %"), (1e-9, "< 0.1 %"), (float("nan"), "")],
)
def test_a_probability_is_never_all_or_nothing(probability: float, expected: str) -> None:
    assert pictures.format_confidence(probability) == expected


def test_twelve_attacks_on_photos_stay_below_the_limit(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    with_pictures: Callable[[dict[int, list[Picture]]], None],
) -> None:
    attacks = [make_outcome([True] * 9, spec=Spec("pgd", {"seed": i})) for i in range(12)]
    run = make_run(*attacks, folder=None)
    with_pictures(pictures_of(run, 224))

    text = html_of([run])
    gallery = section(parsed(text), "Gallery")

    assert len(text.encode()) < LIMIT
    assert len(gallery.all("img")) == 12 * 3 * 3
    assert "Large pictures are reduced" in gallery.text
    assert "left out" not in gallery.text


def test_pictures_beyond_the_room_are_left_out_and_counted() -> None:
    def drawn(side: int) -> pictures.Sample:
        shown = pictures.ShownPicture("clean", [], "", photo(side))
        return pictures.Sample("", "", [shown])

    cells = [pictures.GalleryCell("", "", [drawn(30), drawn(50), drawn(56)])]
    smallest = pictures.count_characters(
        [pictures.GalleryCell("", "", [pictures.embed_sample(drawn(30), EDGES[-1])])]
    )

    few, edge = pictures.fit_pictures(cells, smallest)
    none, _ = pictures.fit_pictures(cells, smallest - 1)

    assert [sample.pictures[0].height for sample in few[0].samples] == [30]
    assert pictures.describe_fit(cells, few, edge) == pictures.GalleryFit(reduced=False, left_out=2)
    assert none[0].samples == []


def test_reducing_averages_photos_and_keeps_single_changes() -> None:
    grey, change = np.full((2, 6, 6, 3), 128, np.uint8)
    grey[0, 0] = 137
    change[4, 5] = (0, 128, 255)

    assert pictures.reduce_picture(grey, 3, change=False)[0, 0].tolist() == [129] * 3
    small = pictures.reduce_picture(change, 3, change=True)
    assert small[1, 1].tolist() == [0, 128, 255]
    assert (small[:1] == 128).all()


def test_small_pictures_are_enlarged_as_squares() -> None:
    sizes = (CRISP, CRISP + 1)

    assert [pictures.ShownPicture("", [], "", photo(s)).crisp for s in sizes] == [True, False]


def test_text_from_outside_stays_text(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    with_pictures: Callable[[dict[int, list[Picture]]], None],
) -> None:
    evil = '"><script>alert(1)</script>{{ 7*7 }}\u202e\x00$x$'
    seen = '"><script>alert(1)</script>{{ 7*7 }}\\u202e\\x00$x$'
    run = make_run(
        make_outcome([True], spec=Spec(evil, {})),
        folder=None,
        failures={evil: evil},
        model={"file": evil},
    )
    run = replace(run, data={**run.data, "class_names": [evil] * 11})
    with_pictures(pictures_of(run, 4))

    page = parsed(html_of([run]))

    assert page.all("script") == []
    assert (
        page.all("title")[0].text
        == f"Robustness of {visible(formatting.name_file(evil))} on digits"
    )
    assert seen in section(page, "Attacks").text
    assert seen in section(page, "Without a result").text
    assert seen in section(page, "Gallery").all("img")[0].attrs["alt"]


def stored(run: Run, folder: Path) -> Run:
    """The run, written to a folder with pictures and read back."""
    record = run.to_record()
    with Store.open(folder, record["config"]) as store:
        store.save_record(record, save_cells(store, run, pictures_of(run, 8)))
    return load_run(folder)


def test_pictures_come_from_the_folder_of_the_run(
    make_outcome: MakeOutcome, make_run: MakeRun, tmp_path: Path
) -> None:
    run = stored(make_run(make_outcome([True] * 5)), tmp_path)

    gallery = section(parsed(html_of([run])), "Gallery")

    first = pictures_of(run, 8)[0][0]
    np.testing.assert_array_equal(opened(gallery.all("img")[0].attrs["src"]), first.clean)
    assert len(gallery.all("figure")) == 3


def test_a_changed_picture_is_refused(
    make_outcome: MakeOutcome, make_run: MakeRun, tmp_path: Path
) -> None:
    run = stored(make_run(make_outcome([True] * 5)), tmp_path)
    (kept,) = (tmp_path / "pictures").iterdir()
    kept.write_bytes(kept.read_bytes() + b" ")

    with pytest.raises(RunError, match="was changed"):
        html_of([run])


def test_importing_it_is_cheap() -> None:
    code = (
        "import sys, robusteval.reports.html;"
        "assert not {'torch', 'art', 'scipy', 'sklearn', 'matplotlib', 'jinja2'} & {*sys.modules}"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


MEASURE = """
<body><script>
const page = %s, told = [];
for (const width of [390, 1280]) {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const d = frame.contentDocument, images = [...d.images];
    told.push({
      width,
      needed: d.documentElement.scrollWidth,
      images: images.length,
      broken: images.filter(i => !i.naturalWidth).length,
      styled: frame.contentWindow.getComputedStyle(d.body).marginTop === '0px',
      loaded: frame.contentWindow.performance.getEntriesByType('resource')
        .map(e => e.name).filter(n => !n.startsWith('data:')),
    });
    document.title = JSON.stringify(told);
  };
  document.body.append(frame);
}
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_shows_it_whole_at_the_width_of_a_telephone(
    everything: Run, tmp_path: Path
) -> None:
    text = html_of([everything], [reportable.check()])
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    embedded = json.dumps(text).replace("<", "\\u003c")
    (tmp_path / "measure.html").write_text(MEASURE % embedded, encoding="utf-8")

    dumped = chromium(tmp_path, "measure.html", "--dump-dom", "--virtual-time-budget=5000")
    errors = chromium(
        tmp_path,
        "report.html",
        "--window-size=1280,2000",
        f"--screenshot={tmp_path / 'shot.png'}",
    )

    (title,) = re.findall("<title>(.*?)</title>", dumped)
    narrow, wide = sorted(json.loads(html.unescape(title)), key=lambda told: told["width"])
    for told in (narrow, wide):
        assert told["needed"] == told["width"]
        assert told["images"] > 50
        assert told["broken"] == 0
        assert told["styled"]
        assert told["loaded"] == []
    assert "Content Security Policy" not in dumped + errors
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1280, 2000)
        assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 50


def chromium(folder: Path, file: str, *options: str) -> str:
    """What headless Chromium says of a file, its console included."""
    assert CHROMIUM is not None
    quiet = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
    )
    ran = subprocess.run(
        [CHROMIUM, *quiet, *options, (folder / file).as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return "\n".join([ran.stdout, *console])


def test_a_number_keeps_its_percent_sign(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """In one line, in HTML as in the terminal."""
    page = html_of([make_run(make_outcome([True] * 40 + [False] * 23))])

    assert not re.search(r">[^<]*\d %[^<]*<", page)
    assert "37&#160;% (" in page


@pytest.mark.parametrize("width", range(20, 60))
def test_a_terminal_keeps_percent_signs_too(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_paragraph(console, "Robust accuracy 12.5 % (3-4), then 100 % of it, and 33.1 % of 5 %.")
    print_list(console, "title", ["! of all images 55 % withstood it, 7 % did not"])

    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert not any(line.lstrip().startswith("%") for line in lines)
    assert "12.5 %" in " ".join(lines)
