"""Reports: what they say, that all formats say the same, and that nothing steers them."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from robusteval import metrics
from robusteval.records import Finding, Outcome, Run, Spec, Threat, visible
from robusteval.reports import words
from robusteval.reports.markdown import to_markdown
from robusteval.reports.tables import as_dict, to_json
from robusteval.reports.terminal import print_table

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

HOSTILE = (
    "[bold]x[/bold]",
    "<script>alert(1)</script>",
    "a|b",
    "a\\|b`c`|",
    "\x1b[31mred\x1b]0;title\x07",
    "line\nbreak\r\n# heading",
    "\u202egnp.exe\u2066",
    "``` & &lt; **b** _i_ ~~s~~ $x$ @everyone #1 ![i](http://h/)",
    "\udc80 \x00 \x9b31m \u2028",
)
LONG = Spec(
    "art:AutoProjectedGradientDescent",
    {"eps": 8 / 255, "loss_type": "difference_logits_ratio", "nb_random_init": 5, "max_iter": 100},
)


def printed(run: Run, width: int = 80, **options: Any) -> str:
    """What the terminal report looks like without a terminal."""
    console = Console(file=io.StringIO(), width=width, **options)
    print_table(run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def flat(text: str) -> str:
    """The text with every run of blanks and line ends as one blank."""
    return " ".join(text.split())


def masks(n: int, *broken: int) -> list[np.ndarray[Any, Any]]:
    """Masks ``(n,)`` that are true on the first so many images."""
    return [np.arange(n) < k for k in broken]


@pytest.fixture
def two_attacks(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """500 images, 404 right; two linf attacks that break 300 and 342 of them."""
    right, first, second = masks(500, 404, 300, 342)
    return make_run(
        make_outcome(first, right=right),
        make_outcome(second, right=right, spec=LONG),
    )


def test_the_verdict_comes_first_and_says_everything(two_attacks: Run) -> None:
    expected = (
        "Robust accuracy 12.4 % (9.8–15.6), n = 500, linf eps 8/255 (0.0314), worst case of"
        " 2 attacks; clean 80.8 %"
    )

    assert as_dict(two_attacks)["verdict"] == expected
    assert flat(printed(two_attacks)).startswith(expected)
    assert to_markdown(two_attacks).splitlines()[0] == f"**{expected}**"


def test_a_grave_finding_makes_the_number_an_upper_bound(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    findings = (
        Finding("duplicates", False, "Two images are in the data twice."),
        Finding("zero-gradient", True, "The gradient is zero.", "pgd:eps=8/255,steps=20"),
    )
    run = make_run(make_outcome(masks(500, 274)[0]), findings=findings)

    verdict = as_dict(run)["verdict"]
    text = printed(run)

    assert "Robust accuracy at most 45.2 % (40.9–49.6)" in verdict
    assert verdict.endswith("this evaluation is weak: 1 grave finding below")
    assert text.index("✗ pgd:eps=8/255,steps=20: The gradient") < text.index("! Two images")
    assert text.index("! Two images") < text.index("knowledge")
    assert as_dict(run)["upper_bound"] is True


def test_findings_that_are_not_grave_leave_the_number_alone(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([True]), findings=(Finding("note", False, "Small."),))

    record = as_dict(run)

    assert record["upper_bound"] is False
    assert "weak" not in record["verdict"]
    assert "1 remark, nothing grave" in printed(run)


def test_an_incomplete_run_says_so_at_once(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    first, second = make_outcome([True, False]), make_outcome([False, False], spec=LONG)
    asked = [str(first.attack), str(LONG), "art:Broken", "late"]
    run = make_run(
        first,
        second,
        status="incomplete",
        config={"attacks": asked},
        failures={"art:Broken": "out of memory"},
    )

    record, text = as_dict(run), printed(run)

    assert record["verdict"].startswith("Incomplete: 2 of 4 attacks finished. Robust accuracy at")
    assert record["upper_bound"] is True
    assert record["not_run"] == ["late"]
    assert "✗ art:Broken: out of memory" in text
    assert "✗ late: not finished" in text
    assert "Trust checks: not finished." in text


def test_a_run_without_attacks_evaluated_nothing(make_run: MakeRun) -> None:
    run = make_run()

    assert as_dict(run)["verdict"] == (
        "Nothing was evaluated: no attack has a result; clean accuracy 100.0 % (99.2–100.0),"
        " n = 500."
    )
    assert "knowledge" not in printed(run)
    assert "knowledge" not in to_markdown(run)


def test_a_run_without_a_correct_image_evaluated_nothing(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([False] * 60, right=[False] * 60))

    assert "Nothing was evaluated: no image was classified correctly" in flat(printed(run))
    assert "Robust accuracy" not in to_markdown(run)
    assert json.loads(to_json(run))["attacks"][0]["success_rate"]["float"]["value"] is None


def test_a_run_stopped_before_its_first_image_evaluated_nothing(make_run: MakeRun) -> None:
    run = make_run(
        clean={}, status="incomplete", config={}, model={}, data={}, environment={}, folder=None
    )

    assert printed(run).startswith("Incomplete: 0 of 0 attacks finished. Nothing was evaluated")
    assert json.loads(to_json(run))["clean_accuracy"]["n"] == 0
    assert "Nothing was evaluated" in to_markdown(run)


def test_a_run_without_images_evaluated_nothing(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([]))

    assert printed(run).startswith("Nothing was evaluated: no image was looked at.")
    assert json.loads(to_json(run))["worst_cases"][0]["robust_accuracy"]["float"]["high"] == 1.0
    assert "Nothing was evaluated" in to_markdown(run)


def test_each_threat_has_its_own_number(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    linf, l2, near = masks(500, 100, 200, 400)
    run = make_run(
        make_outcome(linf),
        make_outcome(l2, spec=Spec("square", {}), threat=Threat("l2", 0.5, False)),
        make_outcome(near, spec=Spec("deepfool", {}), threat=Threat("l2", None, False)),
    )

    verdict = as_dict(run)["verdict"]

    assert "80.0 % (76.3–83.3) at linf eps 8/255 (0.0314), one attack" in verdict
    assert "60.0 % (55.6–64.2) at l2 eps 0.5 (127.5/255), one attack" in verdict
    assert "minimum" not in verdict
    assert "l2 minimum norm" in printed(run)


def test_without_a_radius_the_distance_is_the_verdict(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    sizes = np.full(500, 0.25)
    run = make_run(make_outcome(masks(500, 400)[0], threat=Threat("l2", None, False), l2=sizes))

    assert as_dict(run)["verdict"] == (
        "Median l2 distance to another class 0.25, over 400 of 500 images it had right,"
        " one attack, n = 500; clean 100.0 %"
    )


def test_numbers_are_those_of_the_metrics(two_attacks: Run) -> None:
    record = as_dict(two_attacks)
    attack, outcome = record["attacks"][0], two_attacks.attacks[0]
    robust = metrics.robust_accuracy(outcome)

    assert attack["robust_accuracy"]["float"] == {
        "k": 104,
        "n": 500,
        "value": robust.value,
        "low": robust.interval.low,
        "high": robust.interval.high,
    }
    assert attack["distances"] == metrics.distances(outcome)._asdict()
    assert attack["unique_breaks"] == 0
    assert record["attacks"][1]["unique_breaks"] == 42
    assert record["worst_cases"][0]["robust_accuracy"]["float"]["k"] == 62
    assert record["worst_cases"][0]["success_rate"]["float"]["k"] == 342
    assert attack["threat"] == {
        "norm": "linf",
        "eps": 8 / 255,
        "eps_255": "8/255",
        "targeted": False,
    }


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_format_shows_every_cell(two_attacks: Run, width: int) -> None:
    record = as_dict(two_attacks)
    cells = {
        column.cell(line.numbers)
        for line in words.lines(record)
        if line.numbers
        for column in (*words.strength(record), *words.COST)
    }
    terminal, markdown = printed(two_attacks, width), to_markdown(two_attacks)

    for cell in cells:
        assert cell in terminal
        assert cell in markdown


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_cut_off_or_too_wide(two_attacks: Run, width: int) -> None:
    text = printed(two_attacks, width)

    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "".join(str(LONG).split()) in cut_free(text)


def cut_free(text: str) -> str:
    """The first column of the tables, in one piece."""
    return "".join(line[:70].split("  white")[0].strip() for line in text.splitlines())


def test_a_very_narrow_terminal_loses_nothing(two_attacks: Run) -> None:
    assert "…" not in printed(two_attacks, width=30)


def test_a_wide_terminal_shows_one_table(two_attacks: Run) -> None:
    def tables(width: int) -> int:
        return printed(two_attacks, width).count("\nattack ")

    assert (tables(80), tables(140)) == (2, 1)


def test_marginal_gain_is_not_shown_of_a_single_attack(
    make_outcome: MakeOutcome, make_run: MakeRun, two_attacks: Run
) -> None:
    single = make_run(make_outcome([True]))

    assert "only this" not in to_markdown(single)
    assert "worst case" not in to_markdown(single)
    assert "only this" in to_markdown(two_attacks)


def test_png_is_mentioned_only_where_it_differs(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    same = make_run(make_outcome([True, False, False]))
    differs = make_run(make_outcome([True, False, False], pred_png=np.array([0, 1, 2])))
    without = make_run(make_outcome([True, False, False], pred_png=np.full(3, -2)))

    assert "PNG" not in printed(same)
    assert "Read back from PNG files 100 % robust, rounded to 8 bit 67 %" in flat(printed(differs))
    assert "A PNG file cannot hold these images." in printed(without)
    assert as_dict(without)["attacks"][0]["robust_accuracy"]["png"] is None


def test_rounding_to_8_bit_has_its_own_number(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(make_outcome([True, True, False], pred_8bit=np.array([0, 2, 2])))

    assert "Fooled on 2 of the 3 images it had right (67 %); after rounding to 8 bit on 1." in flat(
        printed(run)
    )


def test_probes_are_told(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(
        make_outcome([True, False]),
        make_outcome([True, False], spec=Spec("noise", {}), role="probe:noise"),
        make_outcome([True, True], spec=Spec("pgd", {"eps": 1.0}), role="probe:unlimited"),
        make_outcome([True, True], spec=Spec("pgd", {"eps": 16 / 255}), role="probe:double"),
    )

    text = flat(printed(run))

    assert "- Noise of the same size, linf eps 8/255 (0.0314): fooled 1 of 2 images" in text
    assert "- An unlimited linf attack: fooled 2 of 2 images" in text
    assert "- Twice the budget, pgd:eps=16/255: fooled 2 of 2 images" in text


def test_a_misfed_model_is_named_before_any_number(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(
        make_outcome([True, False]),
        findings=(Finding("convention", True, "1% as given, but 90% otherwise."),),
    )
    record = as_dict(run)

    assert record["verdict"].startswith("Not to be used: the model is probably not fed")
    assert record["upper_bound"] is False
    assert "mend how the model is fed first" in flat(printed(run))


def test_skipped_probes_are_told(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(make_outcome([True, False]), config={"attacks": ["pgd"], "probes": False})

    assert "extra attacks were skipped" in flat(printed(run))


def test_the_legend_explains_only_what_is_shown(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    one = make_outcome([True, False])
    two = make_outcome([False, True], spec=Spec("noise", {}))

    assert "“Only this”" not in printed(make_run(one))
    assert "“Only this”" in printed(make_run(one, two))


def test_provenance_is_told_without_the_folders_of_the_user(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    model = {"file": "/home/someone/net.pt", "sha256": "ab" * 32, "arch": "a:b"}
    run = make_run(make_outcome([True]), model=model)

    text = printed(run)

    assert "net.pt, sha256 abababababab, a:b" in text
    assert "someone" not in text + to_markdown(run)
    assert "normalisation  none" in text
    assert "1 of 1,797 images, seed 0, 3×32×32, sha256 fedcba987654" in text
    assert text.endswith("reproduce with:\nrobusteval evaluate net.pt --data digits\n")


def test_a_long_command_stays_in_one_piece(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    command = "robusteval evaluate " + "x" * 200
    run = make_run(make_outcome([True]), config={"attacks": [], "command": command})

    assert command in printed(run).splitlines()


def test_what_is_not_finite_becomes_null(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(
        make_outcome([True], psnr=np.array([np.inf])),
        config={"rate": float("nan"), "sizes": (1, np.float64("inf"))},
    )

    record = json.loads(to_json(run))

    assert record["attacks"][0]["distances"]["psnr"] is None
    assert record["provenance"]["config"] == {"rate": None, "sizes": [1, None]}


def test_json_is_the_record(two_attacks: Run) -> None:
    text = to_json(two_attacks)

    assert json.loads(text) == as_dict(two_attacks)
    assert text.isascii()
    assert json.loads(text)["schema"] == 1


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (0, 500, "0.0 %"),
        (500, 500, "100.0 %"),
        (1, 5000, "< 0.1 %"),
        (4999, 5000, "> 99.9 %"),
        (62, 500, "12.4 %"),
        (1, 3, "33 %"),
        (0, 0, "–"),
    ],
)
def test_a_share_is_as_precise_as_it_deserves(k: int, n: int, expected: str) -> None:
    assert words.percent({"k": k, "n": n}) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0 s"),
        (0.0432, "0.043 s"),
        (7.74, "7.7 s"),
        (9.96, "10 s"),
        (59.9, "60 s"),
        (75.0, "1.2 min"),
        (3599.0, "1 h 0 min"),
        (7380.0, "2 h 3 min"),
        (None, "–"),
    ],
)
def test_a_time_has_the_unit_it_deserves(seconds: float | None, expected: str) -> None:
    assert words.duration(seconds) == expected


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        (Threat("linf", 8 / 255, False), "linf eps 8/255 (0.0314)"),
        (Threat("linf", 0.031, True), "linf eps 0.031 (7.905/255) targeted"),
        (Threat("l2", 0.5, False), "l2 eps 0.5 (127.5/255)"),
        (Threat("l0", 24.0, False), "l0 eps 24"),
        (Threat("l2", None, True), "l2 minimum norm targeted"),
    ],
)
def test_a_radius_is_shown_on_both_scales(
    threat: Threat, expected: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = as_dict(make_run(make_outcome([True], threat=threat)))

    assert words.threat(record["worst_cases"][0]["threat"]) == expected


@pytest.fixture(params=HOSTILE)
def hostile(
    request: pytest.FixtureRequest, make_outcome: MakeOutcome, make_run: MakeRun
) -> tuple[str, Run]:
    """A hostile name, and a run that carries it wherever a name can stand."""
    name: str = request.param
    spec = Spec(name, {name: name})
    run = make_run(
        make_outcome([True, False], spec=spec, notes=(name,), knowledge=name),
        make_outcome([True, True], spec=Spec("pgd", {})),
        make_outcome([True, True], threat=Threat(name, 0.5, False)),
        make_outcome([True], spec=spec, role=name),
        findings=(Finding(name, True, name, name), Finding("x", False, f"saw {name}", "pgd")),
        failures={name: name},
        status="incomplete",
        config={"attacks": [str(spec), name, f"late {name}"], "seed": 1, "command": f"run {name}"},
        model={"file": name, "arch": name, "normalisation": name, "mean": [0.5], "std": [0.5]},
        data={"name": name, "total": 2, "samples": 2, "class_names": [name], "shape": [1, 2, 2]},
        environment={"device": name, "platform": name, "torch": name},
        folder=name,
    )
    return name, run


@pytest.mark.parametrize("width", [40, 80, 140])
def test_hostile_names_do_not_steer_the_terminal(hostile: tuple[str, Run], width: int) -> None:
    name, run = hostile
    text = printed(run, width)

    assert all(char.isprintable() or char == "\n" for char in text)
    assert f"run {visible(name)}" in text.splitlines()


def test_hostile_names_add_no_colour(hostile: tuple[str, Run]) -> None:
    _, run = hostile
    coloured = printed(run, force_terminal=True, color_system="truecolor")
    codes = set(re.findall("\x1b\\[[^m]*m", coloured))

    assert codes <= {
        "\x1b[0m",
        "\x1b[1m",
        "\x1b[2m",
        "\x1b[3m",
        "\x1b[31m",
        "\x1b[33m",
        "\x1b[1;31m",
    }
    assert re.sub("\x1b\\[[^m]*m", "", coloured) == printed(run)


def test_hostile_names_are_text_in_markdown(hostile: tuple[str, Run]) -> None:
    name, run = hostile
    source = to_markdown(run)
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source)

    assert all(char.isprintable() or char in "\n\u200b" for char in source)
    assert set(re.findall(r"<(/?\w+)[^>]*>", page)) <= {
        end + tag
        for end in ("", "/")
        for tag in "p strong ul li h3 table thead tbody tr th td code".split()
    }
    rows = re.findall("<tr>(.*?)</tr>", page, re.S)
    assert {len(re.findall("<t[hd][ >]", row)) for row in rows} == {9}
    text = html.unescape(re.sub("<[^>]*>", "", page)).replace("\u200b", "")
    assert f"run {visible(name)}" in text
    assert f"saw {visible(name)}" in text


def test_nobody_is_called_from_a_markdown_report(make_run: MakeRun) -> None:
    source = to_markdown(make_run(failures={"@team": "x"}))

    assert "@" not in source


def test_hostile_names_survive_json(hostile: tuple[str, Run]) -> None:
    name, run = hostile
    record = json.loads(to_json(run))

    assert record["findings"][0]["message"] == name
    assert record["attacks"][0]["name"] == name
    assert record["failures"] == {name: name}
    assert record["provenance"]["data"]["class_names"] == [name]


def test_a_terminal_without_unicode_still_gets_the_report(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([True] * 101), data={"name": "猫×"}, failures={"x": "y"})
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    print_table(run, Console(file=stream, width=80))
    stream.flush()

    assert isinstance(stream.buffer, io.BytesIO)
    text = stream.buffer.getvalue().decode("ascii")
    assert "Robust accuracy 0.0 % (0.0-3.7)" in text
    assert "\\u732bx" in text
    assert "x x: y" in text


def test_no_color_is_honoured(two_attacks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    text = printed(two_attacks, force_terminal=True)

    assert not re.search("\x1b\\[[0-9;]*3[0-9]m", text)
