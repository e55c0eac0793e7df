"""Reports: what they say, that all formats say the same, and that nothing steers them."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from reportable import (
    DETECTOR,
    JPEG,
    LINF,
    PGD,
    TRADES,
    Check,
    as_dict,
    behind,
    check,
    defended,
    gate,
    json_of,
    markdown_of,
    print_run,
    record_of,
)
from rich.console import Console
from sklearn.metrics import roc_auc_score

from robusteval.reports import attack_tables, formatting, gate_words
from robusteval.reports.markdown import list_lines, shorten_document
from robusteval.reports.measures import ThreatRecord, build_rate, build_threat, to_json_types
from robusteval.reports.record import GateOutcome, GateRow
from robusteval.runs import metrics
from robusteval.runs.statistics import Rate, wilson
from robusteval.runs.types import Defended, Finding, Outcome, Run, Spec, Threat, visible

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
    "]]>",
    "=cmd()",
    "::error::x%0A",
)
LONG = Spec(
    "art:AutoProjectedGradientDescent",
    {"eps": 8 / 255, "loss_type": "difference_logits_ratio", "nb_random_init": 5, "max_iter": 100},
)


def printed(run: Run, width: int = 80, *, checked: Check | None = None, **options: Any) -> str:
    """What the terminal report looks like without a terminal."""
    console = Console(file=io.StringIO(), width=width, **options)
    print_run(run, console, checked)
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
    assert markdown_of(two_attacks).splitlines()[0] == f"**{expected}**"


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
    assert text.index("knowledge") < text.index("✗ pgd:eps=8/255,steps=20: The gradient")
    assert text.index("The gradient") < text.index("! Two images")
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
    assert "knowledge" not in markdown_of(run)


def test_a_run_without_a_correct_image_evaluated_nothing(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([False] * 60, right=[False] * 60))

    assert "Nothing was evaluated: no image was classified correctly" in flat(printed(run))
    assert "Robust accuracy" not in markdown_of(run)
    assert json.loads(json_of(run))["attacks"][0]["success_rate"]["float"]["value"] is None


def test_a_run_stopped_before_its_first_image_evaluated_nothing(make_run: MakeRun) -> None:
    run = make_run(
        clean={}, status="incomplete", config={}, model={}, data={}, environment={}, folder=None
    )

    assert printed(run).startswith("Incomplete: 0 of 0 attacks finished. Nothing was evaluated")
    assert json.loads(json_of(run))["clean_accuracy"]["n"] == 0
    assert "Nothing was evaluated" in markdown_of(run)


def test_a_run_without_images_evaluated_nothing(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([]))

    assert printed(run).startswith("Nothing was evaluated: no image was looked at.")
    assert json.loads(json_of(run))["worst_cases"][0]["robust_accuracy"]["float"]["high"] == 1.0
    assert "Nothing was evaluated" in markdown_of(run)


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


def test_changed_values_are_told_of_attacks_that_are_to_change_few(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """And of the others beside them, which they are held against."""
    broken, counts = masks(500, 400)[0], np.full(500, 123.0)
    plain = make_outcome(broken, l0=counts)
    refined = make_outcome(broken, spec=Spec("refine", {"attack": "pgd"}), l0=counts / 3)

    alone, beside = printed(make_run(plain)), printed(make_run(plain, refined))

    assert "values" not in alone
    assert "123" in beside
    assert "41" in beside


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
    assert attack["distances"] == metrics.summarize_distances(outcome)._asdict()
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
    record = record_of(two_attacks)
    cells = {
        column.write(line.numbers)
        for line in attack_tables.list_attack_lines(record)
        if line.numbers
        for column in (
            *attack_tables.choose_strength_columns(record),
            *attack_tables.choose_cost_columns(record),
        )
    }
    terminal, markdown = printed(two_attacks, width), markdown_of(two_attacks)

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

    assert "only this" not in markdown_of(single)
    assert "worst case" not in markdown_of(single)
    assert "only this" in markdown_of(two_attacks)


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

    said = "fools it on 2 of the 3 images it had right (67 %); after rounding to 8 bit on 1."
    assert said in flat(printed(run))


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
    run = make_run(make_outcome([True, False]), config={"probes": False})

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
    assert "someone" not in text + markdown_of(run)
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

    record = json.loads(json_of(run))

    assert record["attacks"][0]["distances"]["psnr"] is None
    assert record["provenance"]["config"] == {"rate": None, "sizes": [1, None]}


def test_json_is_the_record(two_attacks: Run) -> None:
    text = json_of(two_attacks)

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
    assert formatting.format_percent(Rate(k, n)) == expected


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
    assert formatting.format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        (Threat("linf", 8 / 255, False), "linf eps 8/255 (0.0314)"),
        (Threat("linf", 0.031, True), "linf eps 0.031 (7.905/255) targeted"),
        (Threat("l2", 0.5, False), "l2 eps 0.5 (127.5/255)"),
        (Threat("l2", 128 / 255, False), "l2 eps 128/255 (0.502)"),
        (Threat("l2", 2 / 3, False), "l2 eps 0.666667 (170/255)"),
        (Threat("l0", 24.0, False), "l0 up to 24 values"),
        (Threat("l2", None, True), "l2 minimum norm targeted"),
    ],
)
def test_a_radius_is_shown_on_both_scales(
    threat: Threat, expected: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = record_of(make_run(make_outcome([True], threat=threat)))

    assert formatting.format_threat(record.worst_cases[0].threat) == expected


def test_several_radii_stand_in_ascending_order(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Of each norm and goal together, without a radius last; in whatever order they were given."""
    asked = [
        Threat("linf", 16 / 255, False),
        Threat("l2", None, False),
        Threat("linf", 2 / 255, True),
        Threat("linf", 2 / 255, False),
        Threat("l2", 0.5, False),
        Threat("linf", 8 / 255, False),
    ]
    cells = [
        make_outcome([True, False], threat=threat, spec=Spec("pgd", {"eps": threat.eps or 1.0}))
        for threat in asked
    ]
    record = record_of(make_run(*cells))

    assert [str(build_key(case.threat)) for case in record.worst_cases] == [
        "linf eps 2/255",
        "linf eps 8/255",
        "linf eps 16/255",
        "l2 eps 0.5",
        "l2 minimum",
        "linf eps 2/255 targeted",
    ]
    assert record.verdict.index("2/255") < record.verdict.index("8/255")


def build_key(threat: ThreatRecord) -> Threat:
    return Threat(threat.norm, threat.eps, threat.targeted)


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
    # and no runner of GitHub, which reads along
    told = visible(name).replace("::", ":\\x3a")
    assert f"run {told}" in text.splitlines()


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
    source = markdown_of(run)
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source)

    assert all(char.isprintable() or char in "\n\u200b" for char in source)
    assert set(re.findall(r"<(/?\w+)[^>]*>", page)) <= {
        end + tag
        for end in ("", "/")
        for tag in "p strong ul li h3 table thead tbody tr th td code".split()
    }
    rows = re.findall("<tr>(.*?)</tr>", page, re.S)
    assert {len(re.findall("<t[hd][ >]", row)) for row in rows} == {4, 6, 9}
    text = html.unescape(re.sub("<[^>]*>", "", page)).replace("\u200b", "")
    assert f"run {visible(name)}" in text
    assert f"saw {visible(name)}" in text


def test_nobody_is_called_from_a_markdown_report(make_run: MakeRun) -> None:
    source = markdown_of(make_run(failures={"@team": "x"}))

    assert "@" not in source


def test_hostile_names_survive_json(hostile: tuple[str, Run]) -> None:
    name, run = hostile
    record = json.loads(json_of(run))

    assert record["findings"][0]["message"] == name
    assert record["attacks"][0]["name"] == name
    assert record["failures"] == {name: name}
    assert record["provenance"]["data"]["class_names"] == [name]


def test_a_terminal_without_unicode_still_gets_the_report(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([True] * 101), data={"name": "猫×"}, failures={"x": "y"})
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    print_run(run, Console(file=stream, width=80))
    stream.flush()

    assert isinstance(stream.buffer, io.BytesIO)
    text = stream.buffer.getvalue().decode("ascii")
    assert "Robust accuracy at most 0.0 % (0.0-3.7)" in text
    assert "\\u732bx" in text
    assert "x x: y" in text


def test_no_color_is_honoured(two_attacks: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    text = printed(two_attacks, force_terminal=True)

    assert not re.search("\x1b\\[[0-9;]*3[0-9]m", text)


@pytest.fixture
def shielded(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Attacks of several norms against nothing, two models and a detector."""
    return defended(make_outcome, make_run)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_too_wide_or_ends_in_blanks(shielded: Run, width: int) -> None:
    lines = printed(shielded, width, checked=check()).splitlines()

    assert max(map(len, lines)) <= width
    assert [line for line in lines if line != line.rstrip()] == []
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [80, 120])
def test_the_order_is_verdict_gates_matrix_cost_trust_origin(shielded: Run, width: int) -> None:
    text, page = printed(shielded, width, checked=check()), markdown_of(shielded, check())

    for whole in (text, page):
        at = 0
        for mark in (
            "Robust accuracy at most 0.0 %",
            "Gates: ✗ FAILED",
            "Robust accuracy, attacks against defenses",
            "undefended",
            "clean accuracy",
            "clean cost",
            "Detectors",
            "success",
            "Findings",
            "0123456789ab",
            "robusteval evaluate net.pt",
        ):
            at = whole.index(mark, at)


def test_the_verdict_names_each_defense(shielded: Run) -> None:
    assert as_dict(shielded)["verdict"] == (
        "Robust accuracy at most 0.0 % (0.0–0.8), n = 500, linf eps 8/255 (0.0314), worst case of"
        " 2 attacks; clean 95.0 %; behind jpeg at most 0.0 % (0.0–0.8) adaptive, defeated, clean"
        " 92.2 %; behind trades at most 22.4 % (19.0–26.3) adaptive, clean 87.8 %; behind detector"
        " at most 55.4 % (51.0–59.7) oblivious, clean 89.6 %; this evaluation is weak: 1 grave"
        " finding below"
    )


def test_the_verdict_names_each_threat_behind_a_defense(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    linf = make_outcome([True, False])
    l2 = make_outcome([False, False], spec=Spec("square", {}), threat=Threat("l2", 0.5, False))
    run = make_run(linf, l2, behind(linf, JPEG, adaptive=True), behind(l2, JPEG, adaptive=False))
    run = replace(run, defenses=(Defended(JPEG, "model", run.clean, {}),))

    verdict = as_dict(run)["verdict"]

    assert "; behind jpeg at linf eps 8/255 (0.0314) 50 % (9–91) adaptive, defeated" in verdict
    assert "; behind jpeg at l2 eps 0.5 (127.5/255) 100 % (34–100) oblivious, clean" in verdict


def test_defenses_of_one_name_are_told_apart(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    cell = make_outcome([True, False])
    other = Spec("jpeg", {"quality": 50})
    base = make_run(cell)
    run = make_run(
        cell,
        *(behind(cell, spec, adaptive=True) for spec in (JPEG, other)),
        defenses=tuple(Defended(spec, "model", base.clean, {}) for spec in (JPEG, other)),
    )

    assert "behind jpeg:quality=75 50 %" in as_dict(run)["verdict"]
    assert "behind jpeg:quality=50 50 %" in as_dict(run)["verdict"]


@pytest.mark.parametrize(
    ("undefended", "adaptive", "expected"),
    [(500, 497, True), (500, 500, True), (400, 390, True), (400, 410, True), (500, 490, False)],
)
def test_a_defense_that_helps_against_nobody_who_knows_it_is_called_defeated(
    undefended: int,
    adaptive: int,
    expected: bool,
    make_outcome: MakeOutcome,
    make_run: MakeRun,
) -> None:
    without, knowing, unaware = (
        make_outcome(mask) for mask in masks(500, undefended, adaptive, 10)
    )
    run = make_run(
        without,
        behind(knowing, JPEG, adaptive=True),
        behind(unaware, JPEG, adaptive=False),
    )
    run = replace(run, defenses=(Defended(JPEG, "model", run.clean, {}),))

    (defense,) = as_dict(run)["defenses"]

    assert bool(defense["defeated"]) == expected
    assert ("Defeated: against attacks that know it, jpeg is" in flat(printed(run))) == expected
    assert ("adaptive, defeated" in markdown_of(run)) == expected
    if expected:
        assert defense["defeated"][0]["robust_accuracy"]["k"] == 500 - adaptive
        assert defense["defeated"][0]["undefended"]["k"] == 500 - undefended


def test_a_defense_that_no_attack_knows_is_called_so(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cell = make_outcome(masks(500, 400)[0])
    run = make_run(cell, behind(make_outcome(masks(500, 10)[0]), JPEG, adaptive=False))
    run = replace(run, defenses=(Defended(JPEG, "model", run.clean, {}),))

    text = flat(printed(run))

    assert "Oblivious: no attack here knows jpeg; one that does may be stronger." in text
    assert as_dict(run)["defenses"][0]["defeated"] == []
    assert "98.0 % (96.4–98.9) oblivious" in as_dict(run)["verdict"]


def test_a_run_with_nothing_but_a_defense_still_has_a_verdict(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cell = make_outcome([True, False])
    near = behind(
        make_outcome([True, False], threat=Threat("l2", None, False)), JPEG, adaptive=True
    )
    clean = Defended(JPEG, "model", make_run(cell).clean, {})
    bounded = make_run(behind(cell, JPEG, adaptive=True), defenses=(clean,))
    nearest = make_run(near, defenses=(clean,))

    assert "50 % (9–91), n = 2, linf eps 8/255 (0.0314) behind jpeg" in as_dict(bounded)["verdict"]
    assert "1 of 2 images it had right behind jpeg, one attack" in as_dict(nearest)["verdict"]
    assert bounded.defenses[0].spec == JPEG
    assert "–" in markdown_of(bounded)


def test_what_was_asked_behind_a_defense_and_not_run_is_told(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cell, both = make_outcome([True, False], spec=PGD), (JPEG, TRADES)
    config = {
        "attacks": [str(PGD), "late"],
        "defenses": [str(JPEG), str(TRADES)],
        "cells": [f"{a}{b}" for a in (PGD, "late") for b in ("", *(f" behind {d}" for d in both))],
    }
    run = make_run(
        cell,
        behind(cell, JPEG, adaptive=True),
        config=config,
        status="incomplete",
        failures={f"{PGD} behind {TRADES}": "out of memory"},
    )

    record = as_dict(run)

    assert record["verdict"].startswith("Incomplete: 2 of 6 attacks finished.")
    assert record["not_run"] == ["late", f"late behind {JPEG}", f"late behind {TRADES}"]


def test_a_distance_is_told_in_the_measure_of_its_threat(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    ssim = make_outcome(
        [True, True],
        spec=Spec("pgap", {}),
        threat=Threat("ssim", None, False),
        ssim=np.array([0.9991, 0.9993]),
        psnr=np.array([49.0, 50.0]),
    )
    sparse = make_outcome(
        [True, True],
        spec=Spec("sigma_zero", {}),
        threat=Threat("l0", None, False),
        l0=np.array([3.0, 5.0]),
        l0_pixels=np.array([2.0, 2.0]),
    )
    alike, counted, both = make_run(ssim), make_run(sparse), make_run(sparse, ssim)

    assert as_dict(alike)["verdict"] == (
        "Fooled on 2 of 2 images it had right, mean SSIM 0.9992 and PSNR 49.5 dB, ssim, no fixed"
        " radius, one attack, n = 2; clean 100 %"
    )
    assert as_dict(alike)["worst_cases"][0]["distance"]["median"] == pytest.approx(0.0008)
    assert "| mean SSIM | mean PSNR |" in markdown_of(alike)
    assert "| 0.9992 | 49.5 dB |" in markdown_of(alike)
    assert "| median values | median pixels |" in markdown_of(counted)
    assert "| 4 | 2 |" in markdown_of(counted)
    assert "median distance" not in markdown_of(alike) + markdown_of(counted)
    assert "| 100 % | 4 | 2 |  |  |" in markdown_of(both)
    assert "| 100 % |  |  | 0.9992 | 49.5 dB |" in markdown_of(both)
    assert as_dict(both)["attacks"][1]["threat"]["eps_255"] is None


def test_columns_of_another_threat_leave_no_empty_rows(shielded: Run) -> None:
    _, _, likeness = printed(shielded, 80).partition("SSIM")

    assert likeness.index("ssim, no fixed radius") < likeness.index("pgap")
    for line in printed(shielded, 40).splitlines():
        if "pgap:eps2=0.01" in line:
            assert line != "pgap:eps2=0.01"


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        (Threat("ssim", None, False), "ssim, no fixed radius"),
        (Threat("ssim", None, True), "ssim, no fixed radius targeted"),
        (Threat("ssim", 0.01, False), "ssim eps 0.01"),
        (Threat("none", None, False), "no stated norm"),
        (Threat("none", 0.25, True), "no stated norm, eps 0.25 (63.75/255) targeted"),
    ],
)
def test_what_is_no_norm_is_not_called_one(
    threat: Threat, expected: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = record_of(make_run(make_outcome([True], threat=threat)))

    assert formatting.format_threat(record.worst_cases[0].threat) == expected
    assert "minimum" not in record.verdict


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "1.0000"), (0.99996, "> 0.9999"), (0.9995, "0.9995"), (None, "–")],
)
def test_likeness_is_never_rounded_to_identity(value: float | None, expected: str) -> None:
    assert formatting.format_similarity(value) == expected


GATES = [
    (gate("failed"), "12.4 % (9.8–15.6); asked at least 30.0 %; margin -20.2 points"),
    (gate("passed", limit=0.05), "12.4 % (9.8–15.6); asked at least 5.0 %; margin +4.8 points"),
    (
        gate("failed", kind="max_drop", limit=0.01, value=0.042, low=0.028, high=0.056),
        "4.2 points (2.8–5.6); asked at most 1.0 points; margin -3.2 points",
    ),
    (
        gate("inconclusive", kind="max_clean_cost", limit=0.02, value=0.018, low=None, high=None),
        "1.8 points; asked at most 2.0 points; margin +0.2 points",
    ),
    (
        gate("failed", kind="findings", limit=0, value=2, low=None, high=None),
        "2; asked at most 0; margin -2",
    ),
    (gate("failed", value=None, low=None, high=None), "asked at least 30.0 %"),
    (gate("passed", kind="findings", value=None, low=None, high=None, limit=None), ""),
]


@pytest.mark.parametrize(("asked", "expected"), GATES)
def test_a_gate_tells_its_margin(asked: GateRow, expected: str) -> None:
    assert gate_words.write_gate_numbers(asked) == expected
    assert gate_words.write_gate(asked).startswith(
        "worst-linf: robust accuracy at linf eps 8/255, worst"
    )


def test_a_gate_tells_why_and_what_flipped(shielded: Run) -> None:
    text = flat(printed(shielded, 100, checked=check()))

    assert "It lost 4.2 points against drop. Lost: 0000000000000000 (image 0), 000000000" in text
    assert "(image 35), 18 more." in text


def test_a_gate_without_numbers_is_still_a_sentence() -> None:
    bare = {"value": None, "low": None, "high": None, "limit": None, "on": "trust checks"}
    quiet = gate("passed", name="findings", kind="findings", reason="No grave finding.", **bare)

    assert gate_words.write_gate(quiet) == "findings: trust checks: passed. No grave finding."


@pytest.mark.parametrize("outcome", ["passed", "failed", "inconclusive"])
def test_the_outcome_of_gates_needs_no_colour(
    outcome: GateOutcome, shielded: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    gates = replace(check().to_gates(), outcome=outcome, gates=(gate(outcome),))
    checked = Check(gates)
    word = {"passed": "✓ passed", "failed": "✗ FAILED", "inconclusive": "? inconclusive"}[outcome]

    text = printed(shielded, checked=checked, force_terminal=True)
    page = markdown_of(shielded, checked)

    assert f"Gates: {word} (1 {outcome}, baseline drop" in flat(re.sub("\x1b\\[[^m]*m", "", text))
    assert f"| {word} | worst-linf" in page


def test_without_gates_nothing_is_said_of_them(shielded: Run) -> None:
    assert "Gates" not in printed(shielded)
    assert "Gates" not in markdown_of(shielded)
    assert as_dict(shielded)["gates"] is None


def counted(mask: np.ndarray[Any, Any]) -> tuple[int, int]:
    """How many of how many, one by one."""
    return sum(bool(value) for value in mask), len(mask)


def success(outcome: Outcome, pred: str = "pred_adv") -> list[bool]:
    """On which images an attack succeeds, one by one."""
    c = outcome.columns
    return [
        bool(c["attacked"][i])
        and (c[pred][i] != c["label"][i])
        and not ("flagged" in c and c["flagged"][i])
        for i in range(len(c["id"]))
    ]


def test_every_number_of_the_record_is_that_of_the_columns(shielded: Run) -> None:
    record = as_dict(shielded)

    def same(rate: dict[str, Any], k: int, n: int) -> None:
        assert (rate["k"], rate["n"]) == (k, n)
        assert rate["value"] == k / n
        assert (rate["low"], rate["high"]) == wilson(k, n)

    for row in record["attacks"]:
        outcome = shielded.outcomes[row["outcome"]]
        assert (row["spec"], row["threat"]["norm"]) == (str(outcome.attack), outcome.threat.norm)
        assert row["defense"] == (str(outcome.defense) if outcome.defense else None)
        c, made = outcome.columns, success(outcome)
        right, n = counted(c["attacked"])
        for way, pred in (("float", "pred_adv"), ("eight_bit", "pred_8bit"), ("png", "pred_png")):
            broken = sum(success(outcome, pred))
            same(row["robust_accuracy"][way], right - broken, n)
            same(row["success_rate"][way], broken, right)
        for name in ("l0", "l0_pixels", "l1", "l2", "linf"):
            assert row["distances"][name] == np.median(c[name][made])
        assert row["distances"]["ssim"] == pytest.approx(np.mean(c["ssim"][made]))
        assert row["cost"]["forwards"] == sum(c["forwards"]) / right
        assert row["cost"]["seconds"] == pytest.approx(sum(c["seconds"]))

    for case in record["worst_cases"]:
        cells = [
            outcome
            for outcome in shielded.outcomes
            if outcome.threat._asdict().items() <= case["threat"].items()
            and case["defense"] == (str(outcome.defense) if outcome.defense else None)
        ]
        fallen = [any(each) for each in zip(*map(success, cells), strict=True)]
        right, n = counted(cells[0].columns["attacked"])
        same(case["robust_accuracy"]["float"], right - sum(fallen), n)
        alone = [
            sum(s[i] and not any(success(o)[i] for o in cells if o is not cell) for i in range(n))
            for cell in cells
            for s in [success(cell)]
        ]
        assert alone == [
            row["unique_breaks"]
            for row in record["attacks"]
            if (row["threat"], row["defense"]) == (case["threat"], case["defense"])
        ]

    before = shielded.clean["pred_clean"] == shielded.clean["label"]
    for defense, (spec, _, clean, _) in zip(record["defenses"], shielded.defenses, strict=True):
        assert (defense["spec"], defense["name"]) == (str(spec), spec.name)
        flags = clean.get("flagged", np.zeros(500, np.bool_))
        after = (clean["pred_clean"] == clean["label"]) & ~flags
        same(defense["clean_accuracy"], *counted(after))
        paid = defense["clean_cost"]
        assert paid["lost"] == sum(before & ~after)
        assert paid["gained"] == sum(after & ~before)
        assert paid["value"] == pytest.approx(before.mean() - after.mean())

    found = record["defenses"][2]["detector"]
    clean = shielded.defenses[2].clean
    same(found["fpr"], *counted(clean["flagged"]))
    for attack, outcome in zip(found["attacks"], shielded.outcomes[-2:], strict=True):
        c = outcome.columns
        wrong = c["attacked"] & (c["pred_adv"] != c["label"])
        same(attack["tpr"], *counted(c["flagged"][wrong]))
        scores = np.concatenate([clean["score"], c["score"][wrong]])
        truth = np.arange(len(scores)) >= len(clean["score"])
        assert attack["auc"] == pytest.approx(roc_auc_score(truth, scores))
        for fpr, tpr in attack["roc"]:
            assert any(
                (fpr, tpr)
                == pytest.approx(((clean["score"] >= t).mean(), (c["score"][wrong] >= t).mean()))
                for t in (*np.unique(scores), np.inf)
            )


def test_every_point_of_a_curve_is_that_of_the_columns(shielded: Run) -> None:
    curves = as_dict(shielded)["curves"]

    assert [(c["norm"], c["defense"]) for c in curves] == [
        ("linf", None),
        ("ssim", None),
        ("l0", None),
        ("linf", str(JPEG)),
        ("linf", str(TRADES)),
        ("linf", str(DETECTOR)),
        ("l0", str(DETECTOR)),
    ]
    for curve in curves:
        cells = [
            outcome
            for outcome in shielded.outcomes
            if outcome.threat.norm == curve["norm"]
            and curve["defense"] == (str(outcome.defense) if outcome.defense else None)
        ]
        assert len(curve["budgets"]) <= 200
        assert curve["budgets"] == sorted(set(curve["budgets"]))
        assert curve["n"] == 500
        for budget, robust in zip(curve["budgets"], curve["robust"], strict=True):
            fooled = np.zeros(500, np.bool_)
            for outcome in cells:
                c = outcome.columns
                far = 1 - c["ssim"] if curve["norm"] == "ssim" else c[curve["norm"]]
                fooled |= np.array(success(outcome)) & (far <= budget)
            assert robust == sum(cells[0].attacked & ~fooled)
        if curve["norm"] == "linf":
            assert curve["budgets"][-1] == LINF.eps
            (tested,) = curve["tested"]
            assert tested["robust_accuracy"]["k"] == curve["robust"][-1]
        else:
            assert curve["tested"] == []


SHARE = r"(?:[<>] )?\d+\.\d % \(\d+\.\d–\d+\.\d\)"


@pytest.mark.parametrize("name", ["", *HOSTILE])
def test_every_format_shows_the_numbers_of_the_columns(
    name: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = defended(make_outcome, make_run, name=name, findings=())
    cells = [(run.clean["pred_clean"] == run.clean["label"]).sum()]
    cells += [metrics.accuracy(defense.clean).k for defense in run.defenses]
    cells += [int(o.attacked.sum()) - sum(success(o)) for o in run.outcomes]
    cells += [
        metrics.worst_case(group).k
        for spec in (None, *(defense.spec for defense in run.defenses))
        for threat, group in metrics.group_by_threat(
            o for o in run.outcomes if o.defense == spec
        ).items()
        if threat == LINF
    ]
    expected = sorted(formatting.format_rate(build_rate(Rate(int(k), 500))) for k in cells)

    for text in (printed(run, 80), printed(run, 400), markdown_of(run)):
        _, _, rest = text.partition("attacks against defenses")
        matrix, _, rest = rest.partition("Detectors")
        assert sorted(re.findall(SHARE, matrix)) == expected
    stored = [row["robust_accuracy"]["float"]["k"] for row in json.loads(json_of(run))["attacks"]]
    assert sorted(stored) == sorted(int(o.attacked.sum()) - sum(success(o)) for o in run.outcomes)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_defenses_and_gates_are_text(
    name: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = defended(make_outcome, make_run, n=60, name=name)

    for width in (40, 80, 140):
        text = printed(run, width, checked=check(name))
        assert all(char.isprintable() or char == "\n" for char in text)
        assert [line for line in text.splitlines() if line != line.rstrip()] == []
    source = markdown_of(run, check(name))
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source)

    assert set(re.findall(r"<(/?\w+)[^>]*>", page)) <= {
        end + tag
        for end in ("", "/")
        for tag in "p strong ul li h3 table thead tbody tr th td code".split()
    }
    rows = re.findall("<tr>(.*?)</tr>", page, re.S)
    assert {len(re.findall("<t[hd][ >]", row)) for row in rows} == {5, 6, 11, 12}
    shown = html.unescape(re.sub("<[^>]*>", "", page)).replace("\u200b", "")
    assert f"baseline {visible(name)}, gates from {visible(name)}" in shown
    assert f"against {visible(name)}." in shown
    assert f"jpeg{visible(name)}:quality=75" in shown
    record = json.loads(json_of(run, [check(name)]))
    assert record["gates"] == to_json_types(check(name).to_gates())
    assert record["defenses"][0]["spec"] == f"jpeg{name}:quality=75"


@pytest.mark.parametrize("limit", [100, 200, 700, 1500, 2000, 3000, 5000, 10_000])
def test_a_long_document_is_cut_between_lines_with_a_note(shielded: Run, limit: int) -> None:
    whole = markdown_of(shielded, check())
    cut = markdown_of(shielded, check(), limit)

    assert len(cut.encode()) <= limit
    if len(whole.encode()) <= limit:
        assert cut == whole
        return
    kept, _, note = cut.rpartition("\n\n")
    assert note == "*Cut here: the whole report is too long for this place.*\n"
    assert whole.startswith(kept)
    assert whole[len(kept)] == "\n" or kept == ""


def test_a_table_is_not_cut_within_its_head(shielded: Run) -> None:
    lines = list(list_lines(record_of(shielded)))
    rule = next(i for i, line in enumerate(lines) if line.startswith("| :-"))
    upto = sum(len(line.encode()) + 1 for line in lines[:rule])

    cut = shorten_document(lines, upto + 70)

    assert lines[rule - 3].startswith("### ")
    assert cut[:-2] == lines[: rule - 4]


def test_a_limit_that_is_not_reached_changes_nothing(two_attacks: Run) -> None:
    assert markdown_of(two_attacks, limit=2**20) == markdown_of(two_attacks)


def test_a_radius_of_sums_is_not_told_in_grey_levels() -> None:
    """Of l1, where 382.5/255 says nothing; of one value and of l2 it is."""
    shown = [formatting.format_budget(build_threat(Threat(n, 1.5, False))) for n in ("l1", "l2")]

    assert shown == ["eps 1.5", "eps 1.5 (382.5/255)"]
