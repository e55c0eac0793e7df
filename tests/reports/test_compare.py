"""Two runs image by image: what changed, whether it is chance, and what is not compared."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.reports.compare import FLAGGED, Comparison, Pair, compare
from robusteval.reports.comparison import build_comparison, render_comparison_json
from robusteval.reports.comparison_layout import print_comparison, render_comparison_markdown
from robusteval.runs import metrics, statistics
from robusteval.runs.types import Columns, Defended, Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

N = np.arange(500)
JPEG = Spec("jpeg", {"quality": 75})
SQUARE = Spec("square", {"eps": 8 / 255})


def printed(comparison: Comparison, width: int = 80) -> str:
    """What the terminal shows without a terminal."""
    console = Console(file=io.StringIO(), width=width)
    print_comparison(build_comparison(comparison), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def flat(text: str) -> str:
    """The text with every run of blanks and line ends as one blank."""
    return " ".join(text.split())


def shuffled(run: Run, seed: int = 0) -> Run:
    """The same run with its images in another order."""
    order = np.random.default_rng(seed).permutation(len(run.clean["id"]))

    def turned(columns: Columns) -> Columns:
        return {name: column[order] for name, column in columns.items()}

    return replace(
        run,
        clean=turned(run.clean),
        outcomes=tuple(replace(o, columns=turned(o.columns)) for o in run.outcomes),
        defenses=tuple(d._replace(clean=turned(d.clean)) for d in run.defenses),
    )


@pytest.fixture
def before(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """500 images, all right; two attacks that break the first 200 and 250."""
    return make_run(make_outcome(N < 200), make_outcome(N < 250, spec=SQUARE))


@pytest.fixture
def after(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """The same images; the first attack breaks 30 more and 5 less, the second the same."""
    run = make_run(
        make_outcome((N >= 5) & (N < 230)), make_outcome(N < 250, spec=SQUARE), folder="runs/two"
    )
    return shuffled(run)


def named(comparison: Comparison) -> dict[tuple[str, ...], Pair]:
    """The pairs by kind and attacks."""
    return {(pair.kind, *pair.attacks): pair for pair in comparison.pairs}


def test_images_are_paired_by_id_in_any_order(before: Run, after: Run) -> None:
    pairs = named(compare(before, after))

    pgd = pairs["attack", "pgd:eps=8/255,steps=20"]
    assert (pgd.before.k, pgd.after.k) == (300, 275)
    assert (pgd.change.lost, pgd.change.gained, pgd.change.n) == (30, 5, 500)
    assert pgd.difference == pytest.approx(-0.05)
    lost = [flip for flip in pgd.flips if flip.lost]
    assert [flip.position for flip in lost] == list(range(200, 230))
    assert [int(flip.id, 16) for flip in lost] == [2**63 + i for i in range(200, 230)]
    assert {(flip.before - flip.label, flip.after - flip.label) for flip in lost} == {(0, 1)}


def test_nothing_changed_where_nothing_did(before: Run) -> None:
    comparison = compare(before, shuffled(before))

    assert all(pair.flips == () and pair.p == pair.p_holm == 1 for pair in comparison.pairs)
    assert all(pair.before == pair.after and pair.difference == 0 for pair in comparison.pairs)
    assert comparison.unpaired == ()
    assert comparison.remarks == ("The weights are the same (by SHA-256).",)
    assert build_comparison(comparison).verdict == (
        "Nothing changed: no image flipped in 4 comparisons over 500 images."
    )


def test_a_change_that_may_be_chance_is_called_that(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    runs = [make_run(make_outcome(N < 200 + k)) for k in (0, 3)]

    assert build_comparison(compare(*runs)).verdict == (
        "No change beyond chance in 2 comparisons over 500 images; the largest is"
        " pgd:eps=8/255,steps=20 at linf eps 8/255 (0.0314), -0.6 points (-1.7 to +0.2)."
    )


def test_p_is_the_exact_two_sided_mcnemar_test(before: Run, after: Run) -> None:
    pair = named(compare(before, after))["attack", "pgd:eps=8/255,steps=20"]

    tail = sum(comb(35, i) for i in range(6)) / 2**35
    assert pair.p == pytest.approx(2 * tail, rel=1e-12)


def test_the_interval_is_that_of_pairs_and_holds_the_difference(before: Run, after: Run) -> None:
    pair = named(compare(before, after))["attack", "pgd:eps=8/255,steps=20"]

    low, high = statistics.Pairs(30, 5, 500).interval
    assert pair.difference_interval == (-high, -low)
    assert pair.difference_interval.low < -0.05 < pair.difference_interval.high < 0


def test_holm_corrects_for_all_pairs(before: Run, after: Run) -> None:
    pairs = compare(before, after).pairs

    assert [pair.p_holm for pair in pairs] == statistics.holm([pair.p for pair in pairs])
    assert [pair.kind for pair in pairs] == ["clean", "attack", "attack", "worst case"]
    assert max(pair.p_holm - pair.p for pair in pairs) > 0


def test_rates_are_those_of_the_report(before: Run, after: Run) -> None:
    comparison = compare(before, after)

    for pair in comparison.pairs:
        for run, rate in ((before, pair.before), (after, pair.after)):
            if pair.kind == "clean":
                assert rate == metrics.accuracy(run.clean)
            else:
                group = [o for o in run.attacks if str(o.attack) in pair.attacks]
                assert rate == metrics.worst_case(group)


def test_the_worst_case_names_what_the_first_success_made_of_an_image(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    label = np.arange(3) % 10
    first = make_outcome([False, False, True], pred_adv=label + np.array([0, 0, 2]))
    second = make_outcome([False, True, True], spec=SQUARE, pred_adv=label + np.array([0, 3, 4]))
    none = make_outcome([False] * 3), make_outcome([False] * 3, spec=SQUARE)

    comparison = compare(make_run(*none), make_run(first, second))

    flips = comparison.pairs[-1].flips
    assert [(flip.position, flip.before, flip.after) for flip in flips] == [(1, 1, 4), (2, 2, 4)]


def test_clean_accuracy_is_compared_too(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    before = make_run(make_outcome([False] * 4, right=[True, True, False, False]))
    after = make_run(make_outcome([False] * 4, right=[True, False, True, True]))

    clean, attack = compare(before, after).pairs

    assert (clean.kind, clean.before.k, clean.after.k) == ("clean", 2, 3)
    assert (clean.change.lost, clean.change.gained) == (1, 2)
    assert [(flip.before, flip.after) for flip in clean.flips] == [(1, 2), (3, 2), (4, 3)]
    assert (attack.before.k, attack.after.k) == (2, 3)


def test_images_that_are_twice_in_the_data_are_paired(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    def twice(run: Run) -> Run:
        ids = np.array([7, 7, 9], dtype=np.uint64)
        label = np.zeros(3, dtype=np.int64)
        clean = {**run.clean, "id": ids, "label": label, "pred_clean": label}
        columns = {**run.outcomes[0].columns, "id": ids, "label": label, "pred_clean": label}
        return replace(run, clean=clean, outcomes=(replace(run.outcomes[0], columns=columns),))

    run = twice(make_run(make_outcome([True, False, False], pred_adv=np.array([1, 0, 0]))))

    assert compare(run, shuffled(run, 1)).pairs[1].flips == ()


def behind(outcome: Outcome, *, adaptive: bool = True, **columns: Any) -> Outcome:
    """The same cell behind a defense."""
    changed = {**outcome.columns, **columns}
    return replace(outcome, defense=JPEG, adaptive=adaptive, columns=changed)


def test_cells_behind_a_defense_are_their_own(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    plain = make_outcome([True, False, False])
    cells = (plain, behind(plain), behind(plain, adaptive=False))
    run = make_run(*cells)
    defended = Defended(JPEG, "model", {**run.clean, "pred_clean": np.array([0, 1, 7])}, {})
    run = replace(run, defenses=(defended,))

    pairs = compare(run, run).pairs

    assert [(pair.kind, pair.defense, pair.adaptive) for pair in pairs] == [
        ("clean", None, True),
        ("clean", "jpeg:quality=75", True),
        ("attack", None, True),
        ("attack", "jpeg:quality=75", True),
        ("attack", "jpeg:quality=75", False),
        ("worst case", "jpeg:quality=75", True),
    ]
    assert [pair.before.k for pair in pairs] == [3, 2, 2, 2, 2, 2]


def test_an_alarm_is_no_prediction(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    plain = make_outcome([True, True])
    flags = [np.array([True, False]), np.array([False, True])]
    before, after = (make_run(plain, behind(plain, flagged=flag)) for flag in flags)

    comparison = compare(before, after)

    flips = comparison.pairs[-1].flips
    assert [(flip.before, flip.after, flip.lost) for flip in flips] == [
        (FLAGGED, 1, True),
        (2, FLAGGED, False),
    ]
    assert "class 0: alarm before, 1 after" in flat(printed(comparison))


def test_other_images_are_refused_with_how_many_are_shared(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    before, after = make_run(make_outcome([True] * 5)), make_run(make_outcome([True] * 8))

    with pytest.raises(UsageError, match="5 are in both, of 5 before and 8 after"):
        compare(before, after)


def test_other_labels_are_refused(before: Run) -> None:
    after = replace(before, clean={**before.clean, "label": (before.clean["label"] + 1) % 10})

    with pytest.raises(UsageError, match="disagree on the class of 500 images"):
        compare(before, after)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"num_classes": 12}}, "other classes apart: 10 before, 12 after"),
        ({"config": {"seed": 1}}, "other seeds, so that chance differs too: 0 before, 1 after"),
        ({"data": {"class_names": ["cat", "dog"]}}, "other class names apart: a, b before, cat"),
    ],
)
def test_what_is_another_question_as_a_whole_is_refused(
    changed: dict[str, Any], message: str, before: Run
) -> None:
    before = replace(before, data={**before.data, "class_names": ["a", "b"]})
    facts: dict[str, Any] = {
        name: {**getattr(before, name), **values} for name, values in changed.items()
    }

    with pytest.raises(UsageError, match=message):
        compare(before, replace(before, **facts))


def test_runs_that_lack_an_attack_are_refused(before: Run) -> None:
    asked = {**before.config, "attacks": [*before.config["attacks"], "late"]}

    with pytest.raises(
        RunError, match=r"the run after \(one\) is not complete: .*late: not finished"
    ):
        compare(before, replace(before, config=asked))
    with pytest.raises(RunError, match=r"the run before \(one\) is not complete: .*late: broke"):
        compare(replace(before, failures={"late": "broke"}), before)


def test_incomplete_runs_are_refused(before: Run) -> None:
    with pytest.raises(RunError, match=r"the run after \(one\) is not complete"):
        compare(before, replace(before, status="incomplete"))


def test_runs_without_images_are_refused(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(make_outcome([]))

    with pytest.raises(NothingEvaluated, match="looked at no image"):
        compare(run, run)


def test_runs_without_a_shared_attack_are_refused_with_the_nearest(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    other = make_outcome(
        [True], spec=Spec("pgd", {"eps": 4 / 255}), threat=Threat("linf", 4 / 255, False)
    )

    with pytest.raises(UsageError, match="eps 4/255 after, 8/255 before"):
        compare(make_run(make_outcome([True])), make_run(other))
    with pytest.raises(UsageError, match="Neither has any"):
        compare(make_run(), make_run())


def test_defaults_written_out_are_the_same_attack(before: Run) -> None:
    resolved = {"eps": 8 / 255, "steps": 20, "restarts": 1}
    first, second = (replace(o, resolved=resolved) for o in before.outcomes[:1] * 2)
    second = replace(second, attack=Spec("pgd", resolved))

    runs = [
        replace(before, outcomes=(o,), config={**before.config, "attacks": [str(o.attack)]})
        for o in (first, second)
    ]
    pairs = compare(*runs).pairs

    assert [pair.kind for pair in pairs] == ["clean", "attack"]


def test_what_only_one_run_did_is_named_with_its_nearest(
    before: Run, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    fewer = make_outcome(N < 9, spec=Spec("pgd", {"eps": 8 / 255, "steps": 10}))
    shared = make_outcome(N < 250, spec=SQUARE)
    noise = make_outcome(N < 9, spec=Spec("noise", {}))

    comparison = compare(before, make_run(fewer, shared, noise))

    assert comparison.unpaired == (
        "Only before: pgd:eps=8/255,steps=20; nearest after: pgd:eps=8/255,steps=10"
        " (steps 10 after, 20 before).",
        "Only after: pgd:eps=8/255,steps=10; nearest before: pgd:eps=8/255,steps=20"
        " (steps 20 before, 10 after).",
        "Only after: noise; nothing like it before.",
        "The worst cases at linf eps 8/255 (0.0314) are made of other attacks (only before:"
        " pgd:eps=8/255,steps=20; only after: pgd:eps=8/255,steps=10, noise).",
    )
    assert [pair.kind for pair in comparison.pairs] == ["clean", "attack"]
    assert "Only after: noise; nothing like it before." in flat(printed(comparison))
    assert "Only after: noise; nothing like it before." in render_comparison_markdown(
        build_comparison(comparison)
    )


def test_what_differs_without_forbidding_it_is_remarked(before: Run) -> None:
    after = replace(
        before,
        model={**before.model, "sha256": "f" * 64, "mean": [0.5, 0.5, 0.5]},
        environment={**before.environment, "torch": "2.11", "device": "cuda"},
    )

    comparison = compare(before, after)

    assert comparison.remarks == (
        "The weights are different (by SHA-256).",
        "mean: 0.485, 0.456, 0.406 before, 0.5, 0.5, 0.5 after.",
        "torch: 2.10 before, 2.11 after.",
        "device: cpu before, cuda after.",
    )
    assert "- torch: 2.10 before, 2.11 after." in printed(comparison)


def test_doubts_come_before_the_numbers(before: Run) -> None:
    weak = replace(before, findings=(Finding("zero-gradient", True, "Zero."),))
    misfed = replace(before, findings=(Finding("guessing", True, "Guesses."),))

    verdict = build_comparison(compare(weak, misfed)).verdict

    assert verdict.startswith(
        "The evaluation before is weak (1 grave finding): its numbers are upper bounds. Not to be"
        " used: the model after is probably not fed as it was trained. Nothing changed"
    )


def test_the_verdict_says_what_changed_most(before: Run, after: Run) -> None:
    comparison = compare(before, after)

    said = build_comparison(comparison).verdict
    assert said == (
        "Changed beyond chance: 1 of 4 comparisons over 500 images (1 fell); the largest is"
        " pgd:eps=8/255,steps=20 at linf eps 8/255 (0.0314), -5.0 points (-7.6 to -2.9)."
    )
    assert flat(printed(comparison)).startswith(said)
    assert render_comparison_markdown(build_comparison(comparison)).startswith(f"**{said}**\n")


def test_the_record_has_every_number_and_every_image(before: Run, after: Run) -> None:
    comparison = compare(before, after)

    record = json.loads(render_comparison_json(build_comparison(comparison)))

    assert record["images"] == 500
    assert (record["before"]["name"], record["after"]["name"]) == ("one", "two")
    for pair, row in zip(comparison.pairs, record["pairs"], strict=True):
        assert (row["before"]["k"], row["after"]["k"]) == (pair.before.k, pair.after.k)
        assert (row["before"]["low"], row["before"]["high"]) == pair.before.interval
        assert (row["lost"], row["gained"]) == (pair.change.lost, pair.change.gained)
        assert (row["low"], row["high"]) == pair.difference_interval
        assert (row["p"], row["p_holm"]) == (pair.p, pair.p_holm)
        keys = ("id", "index", "label", "before", "after", "lost")
        assert row["flipped"] == [dict(zip(keys, flip, strict=True)) for flip in pair.flips]
    assert "runs/" not in render_comparison_json(build_comparison(comparison))


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_every_number(width: int, before: Run, after: Run) -> None:
    text = printed(compare(before, after), width)

    assert max(map(len, text.splitlines())) <= width
    for number in ("60.0 % (55.6–64.2)", "55.0 % (50.6–59.3)", "-5.0", "-7.6 to -2.9", "< 0.0001"):
        assert number in text
    (line,) = re.findall(r"^pgd:\S+ .*-5\.0.*$", text, re.MULTILINE)
    assert line.split()[-6:-4] == ["30", "5"]


def test_at_most_twenty_images_are_listed(before: Run, after: Run) -> None:
    comparison = compare(before, after)

    for text in (
        flat(printed(comparison)),
        render_comparison_markdown(build_comparison(comparison)),
    ):
        assert len(re.findall("- (?:lost|gained): image", text)) == 20
        assert "and 15 more images: all are in the JSON form" in text
    assert printed(comparison).count("- lost: image 200 (80000000000000c8), class 0: 0") == 1


def test_an_image_that_flipped_in_several_cells_is_listed_once_and_first(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    n = np.arange(40)
    before = make_run(make_outcome(n < 0), make_outcome(n < 0, spec=SQUARE))
    after = make_run(make_outcome(n < 30), make_outcome(n == 29, spec=SQUARE))

    text = printed(compare(before, after))

    lines = [line for line in text.splitlines() if "image " in line]
    assert lines[0].startswith("- lost: image 29 (")
    assert flat(text).count("image 29 ") == 1
    assert "pgd:eps=8/255,steps=20, and in 2 more" in flat(text)


def test_classes_have_their_names(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    before, after = make_run(make_outcome([False, False])), make_run(make_outcome([True, False]))
    names = ["cat", "1", "dog"]
    runs = [replace(run, data={**run.data, "class_names": names}) for run in (before, after)]

    assert "class 0 (cat): 0 (cat) before, 1 after" in flat(printed(compare(*runs)))


def test_the_markdown_tables_are_tables(before: Run, after: Run) -> None:
    page = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(render_comparison_markdown(build_comparison(compare(before, after))))
    )

    assert page.count("<table>") == 1
    assert page.count("<td>") + page.count('<td style="text-align:left">') >= 6
    assert "<code>pgd:eps=8/255,steps=20</code>" in page
