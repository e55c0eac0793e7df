"""Published beside measured, on runs made of numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robusteval.analysis.papers.comparison import (
    Reproduction,
    compare_paper,
    decide,
    is_same_data,
)
from robusteval.analysis.papers.declaration import Reading, build_paper
from robusteval.analysis.papers.measures import Measured, find_measure
from robusteval.analysis.papers.results import MissingError, Results
from robusteval.reports.paper import (
    format_figure,
    format_measured,
    render_paper_html,
    render_paper_json,
    render_paper_markdown,
    summarize_paper,
)
from robusteval.runs.detector_record import Combination, EstimateOfImages, Proportion
from robusteval.runs.statistics import (
    mean_interval,
    median_interval,
    paired_difference,
    wilson,
)
from robusteval.runs.types import Defended, Outcome, Run, Spec

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

WEAK, STRONG = Spec("pgd", {"eps": 0.1}), Spec("pgd", {"eps": 0.2})
DECLARED: Mapping[str, Any] = {
    "title": "On <b>nothing</b>",
    "source": "nowhere",
    "setting": "none",
    "small": {"samples": 4},
    "paper": {"samples": 100},
    "attacks": {"sweep": [str(WEAK), str(STRONG)], "strong": str(STRONG), "gone": "fgsm"},
    "tables": [
        {
            "name": "Table I",
            "title": "Fooled",
            "measure": "fooled",
            "data": "digits, a network",
            "columns": ["strong", "gone"],
            "rows": [
                {"name": "near", "published": [0.8, 0.5]},
                {"name": "far", "published": [0.2, 0.5]},
                {"name": "elsewhere", "data": "ImageNet", "published": [0.8, 0.5]},
                {"name": "never", "needs": "needs a telescope", "published": [0.8, 0.5]},
            ],
        },
        {
            "name": "Table II",
            "title": "Fooled at equal SSIM",
            "measure": "fooled",
            "unpublished": "the paper has a figure",
            "columns": ["sweep"],
            "rows": [
                {"name": "SSIM .9", "at": {"ssim": 0.9}},
                {"name": "SSIM .5", "at": {"ssim": 0.5}},
                {"name": "SSIM .99", "at": {"ssim": 0.99}},
            ],
        },
        {
            "name": "Figure 1",
            "title": "All",
            "sweep": True,
            "columns": ["fooled", "ssim", "map_l2:cam"],
            "rows": [{"name": "PGD", "attack": "sweep"}],
        },
    ],
    "claims": [
        {
            "text": "More eps fools more.",
            "where": "Table I",
            "more": {"attack": "strong", "measure": "fooled"},
            "than": {"attack": "sweep", "measure": "fooled", "at": {"ssim": 0.9}},
        },
        {
            "text": "It fools all.",
            "where": "Table I",
            "reaches": {"attack": "strong", "measure": "fooled"},
        },
        {
            "text": "It fools more than what was not run.",
            "where": "Table I",
            "more": {"attack": "strong", "measure": "fooled"},
            "than": {"attack": "gone", "measure": "fooled"},
        },
    ],
}


@pytest.fixture
def found(make_outcome: MakeOutcome, make_run: MakeRun) -> Reproduction:
    """A weak attack that fools 20 of 100 images at SSIM .95, a strong one 80 at .7."""
    rows = np.arange(100)
    weak = make_outcome((rows < 20).tolist(), spec=WEAK, ssim=np.full(100, 0.95))
    strong = make_outcome((rows < 80).tolist(), spec=STRONG, ssim=np.full(100, 0.7))
    paper = build_paper("mine", DECLARED)
    run = replace(make_run(weak, strong), data={"name": "digits (held out)"})
    attacks = {name: each for name, each in paper.attacks.items()}
    return compare_paper(paper, "small", Results(run, attacks, {"fgsm": "it broke"}))


def test_a_published_figure_agrees_where_it_lies_in_the_interval(found: Reproduction) -> None:
    """And only where data and network are of the kind that it was published for."""
    verdicts = {(row.row, row.attack): row.verdict for row in found.tables[0].rows}

    assert verdicts["near", str(STRONG)] == "agrees"
    assert verdicts["far", str(STRONG)] == "differs"
    assert verdicts["elsewhere", str(STRONG)] == "not comparable"


def test_what_was_not_measured_has_its_reason(found: Reproduction) -> None:
    reasons = {(r.row, r.column): r.reason for r in found.tables[0].rows if r.measured is None}

    assert reasons["near", "gone"] == "it broke"
    assert reasons["never", "strong"] == "needs a telescope"
    assert all(reasons.values())


def test_maps_are_read_of_the_interpreter_as_it_was_run(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """With its parameters; where the run has several of the name the plain one is meant."""
    spec = "mask:iterations=50"
    maps = {f"map_l2:{spec}": np.arange(4.0), "map_l2:cam": np.ones(4)}
    run = make_run(make_outcome([True] * 4, spec=STRONG, **maps))

    def read(measure: str, *interpreters: str) -> float:
        known = replace(run, config={**run.config, "interpreters": list(interpreters)})
        results = Results(known, {"strong": (str(STRONG),)}, {"mask": "no masks here"})
        return results.measure(Reading("strong", measure))[1].value

    assert read("map_l2:mask", spec, "cam") == 1.5
    assert read("map_l2:cam", spec, "cam") == 1
    with pytest.raises(MissingError, match="no masks here"):
        read("map_l2:mask", spec, "mask:iterations=60")


@pytest.mark.parametrize(
    ("measure", "values", "low", "high"),
    [
        ("l0", [0, 0, 0, 0, 0, 0, 0, 60], 0, None),
        ("ssim", [1, 1, 1, 1, 1, 1, 1, 0.2], None, 1),
        ("psnr", [-9, 0, 0, 0, 0, 0, 0, 9], None, None),
    ],
)
def test_an_interval_ends_where_no_value_can_lie(
    make_outcome: MakeOutcome, measure: str, values: list[float], low: float, high: float
) -> None:
    outcome = make_outcome([True] * 8, spec=STRONG, **{measure: np.array(values, np.float64)})

    found = find_measure(measure).summarize(outcome)
    plain = mean_interval(np.array(values, np.float64))

    assert found.low == (plain.low if low is None else low)
    assert found.high == (plain.high if high is None else high)
    assert (plain.low < found.low) == (low is not None)
    assert (plain.high > found.high) == (high is not None)


def test_an_image_that_is_not_fooled_has_no_median_end(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """An attack that rarely succeeds does not look the sparser for it."""
    changed = np.arange(20.0)
    fooled = [True] * 12 + [False] * 8

    def read(hit: list[bool]) -> Measured:
        run = make_run(make_outcome(hit, spec=STRONG, l0=changed))
        return Results(run, {"strong": (str(STRONG),)}, {}).measure(Reading("strong", "l0_median"))[
            1
        ]

    assert read([True] * 20)[::3] == (9.5, 20)
    found = read(fooled)
    assert found[::3] == (9.5, 20)  # of the twelve alone it would be 5.5
    assert np.isnan(found[1:3]).all()
    with pytest.raises(MissingError, match="a median has no end"):
        read([True] * 10 + [False] * 10)


def test_over_seeds_an_image_counts_by_its_own_median(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """By hand: three seeds, images in another order, one missed once, one missed twice."""
    changed = np.array([[2.0, 4, 6, 8, 1], [4, 4, 9, 8, 1], [9, 4, 3, 8, 1]])
    fooled = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1]], dtype=np.bool_)
    right = [True] * 4 + [False]  # the last one is wrong from the start
    outcomes = [
        make_outcome((hit & right).tolist(), right=right, spec=STRONG, l0=each)
        for each, hit in zip(changed, fooled, strict=True)
    ]
    outcomes[2] = replace(
        outcomes[2], columns={name: values[::-1] for name, values in outcomes[2].columns.items()}
    )
    spec = str(STRONG)
    results = Results(make_run(outcomes[0]), {"strong": (spec,)}, {}, again={spec: outcomes[1:]})

    def read(measure: str) -> Measured:
        return results.measure(Reading("strong", measure))[1]

    assert read("seeds_fooled")[::3] == (0.5, 4)
    assert read("seeds_l0_median")[::3] == (6.5, 4)  # of 4, 4, 9 and one without an end
    spread = read("seeds_l0_spread")
    assert spread.value == pytest.approx(np.std([2, 4, 9], ddof=1) / 2)
    assert spread.n == 2
    with pytest.raises(MissingError, match="one seed alone"):
        replace(results, again={}).measure(Reading("strong", "seeds_fooled"))


def test_rows_of_a_hardened_network_are_read_of_its_run(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Compared on the same images alone; without such a network the reason says how to name one."""
    table = {"name": "Table I", "title": "Right", "measure": "robust", "columns": ["strong"]}
    reading = {"attack": "strong", "measure": "robust"}
    claim = {"text": "It helps.", "where": "Table I", "than": reading}
    declared = {
        **DECLARED,
        "tables": [{**table, "rows": [{"name": "normal"}, {"name": "robust", "hardened": True}]}],
        "claims": [{**claim, "more": {**reading, "hardened": True}}],
    }
    paper = build_paper("mine", declared)
    rows = np.arange(100)
    plain = make_run(make_outcome((rows < 80).tolist(), spec=STRONG))
    better = make_outcome((rows < 20).tolist(), spec=STRONG)

    def compare(hardened: Run | None) -> Reproduction:
        results = Results(plain, paper.attacks, {}, hardened=hardened)
        return compare_paper(paper, "small", results)

    found = compare(make_run(better))
    assert [row.measured and row.measured.value for row in found.tables[0].rows] == [0.2, 0.8]
    assert found.claims[0].holding == "holds"
    assert "on the hardened network less" in found.claims[0].said

    assert "name one by --hardened" in compare(None).tables[0].rows[1].reason
    assert compare(None).claims[0].holding == "not measured"
    elsewhere = replace(better, columns={**better.columns, "id": better.columns["id"] + 1000})
    assert "the same images" in compare(make_run(elsewhere)).claims[0].said


@pytest.mark.parametrize(
    ("value", "holding"), [(0.5, "holds"), (0.55, "not decided"), (0.9, "does not hold")]
)
def test_a_share_is_reached_where_it_was_measured_and_missed_where_the_interval_ends_below(
    make_outcome: MakeOutcome, make_run: MakeRun, value: float, holding: str
) -> None:
    claim = {"text": "It does.", "where": "Table I", "value": value}
    claim["reaches"] = {"attack": "strong", "measure": "fooled"}
    paper = build_paper("mine", {**DECLARED, "claims": [claim]})
    run = make_run(make_outcome([True, False] * 50, spec=STRONG))

    (said,) = compare_paper(paper, "small", Results(run, paper.attacks, {})).claims

    assert said.holding == holding


def test_a_claim_says_what_it_was_read_from_and_what_that_keeps(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Of a value that is reached, too."""
    claim = {"text": "It does.", "where": "Table I", "value": 0.2}
    claim["reaches"] = {"attack": "strong", "measure": "fooled", "at": {"ssim": 0.5}}
    paper = build_paper("mine", {**DECLARED, "claims": [claim]})
    likeness = np.full(100, 0.75)
    run = make_run(make_outcome([True, False] * 50, spec=STRONG, ssim=likeness))

    (said,) = compare_paper(paper, "small", Results(run, paper.attacks, {})).claims

    assert said.said.endswith(f"was published: {STRONG} at a mean SSIM of 0.75")


def test_of_a_sweep_two_settings_make_up_the_level_that_is_named(found: Reproduction) -> None:
    """By hand: a fifth of the images at .7, the others at .95; the likest where none is enough."""
    near, far, none = found.tables[1].rows

    assert (near.attack, near.beyond) == (str(WEAK), str(STRONG))
    assert near.share == pytest.approx(0.2)
    assert near.measured is not None
    assert near.measured.value == pytest.approx(0.8 * 0.2 + 0.2 * 0.8)
    assert near.measured[1:3] == pytest.approx(wilson(32, 100))
    assert near.verdict == "nothing published"
    assert near.reason == (
        "pgd:eps=0.1 at a mean SSIM of 0.95, on 20 % of the images by lot eps=51/255 at 0.7:"
        " 0.9 together; the paper has a figure"
    )
    assert (far.attack, far.beyond, far.share) == (str(STRONG), None, 0)
    assert far.reason.startswith(f"{STRONG} at a mean SSIM of 0.7 (no stronger setting was run)")
    assert none.attack is None
    assert none.reason == "no setting that was run keeps a mean SSIM of 0.99 (the highest is 0.95)"


def test_a_figure_has_every_setting(found: Reproduction) -> None:
    """Measure by measure; maps that nobody asked for have a reason."""
    rows = found.tables[2].rows

    assert [row.attack for row in rows] == [str(WEAK)] * 3 + [str(STRONG)] * 3
    assert [row.measured is None for row in rows] == [False, False, True] * 2
    assert rows[-1].reason == "no maps of cam"


def test_claims_are_tested_on_the_same_images(found: Reproduction) -> None:
    more, reaches, unknown = found.claims

    assert (more.holding, reaches.holding) == ("holds", "does not hold")
    assert more.measured is not None
    assert more.measured.value == pytest.approx(0.8 - 0.32)
    assert more.measured.low > 0.35
    assert "less pgd:eps=0.1 at a mean SSIM of 0.95, on 20 % of the images" in more.said
    assert (unknown.holding, unknown.said) == ("not measured", "it broke")
    assert summarize_paper(found).endswith(
        "Of 3 claims here: 1 held, 1 not held, 0 not decided, 1 not measured. Each is tested by"
        " itself at 5 %: of 2 without any effect behind them up to 0.1 would be decided on average."
    )


def test_text_of_a_paper_is_no_markup(found: Reproduction) -> None:
    assert "<b>" not in render_paper_html(found)
    assert "<b>" not in render_paper_markdown(found)
    assert '"published": 0.8' in render_paper_json(found)


def test_an_interval_that_nobody_knows_is_not_invented() -> None:
    assert format_measured(Measured(3.0, np.nan, np.nan, 1)) == "3.000 (no interval)"
    assert format_measured(None) == "–"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (0.00035, "3.5e-04"), (0.00114, "0.0011"), (0.0114, "0.011"), (12.5, "12.5")],
)
def test_a_small_figure_keeps_two_digits(value: float, shown: str) -> None:
    assert format_figure(value) == shown


def test_ends_of_an_interval_have_the_digits_of_their_figure() -> None:
    """And none that columns of a sweep have no room for."""
    large, small = Measured(0.05, 0.0089, 0.236, 20), Measured(0.0063, 0.0028, 0.0099, 20)

    assert format_measured(large) == "0.050 (0.009–0.236)"
    assert format_measured(small) == "0.0063 (0.0028–0.0099)"
    assert format_measured(small, fine=False) == "0.006 (0.003–0.010)"


def test_the_median_lies_in_its_interval_as_often_as_it_says() -> None:
    """Of the ranks of ten values 2 and 9 are the widest that miss it in no more than 2.5 %."""
    assert median_interval(np.arange(1.0, 11.0)) == (2.0, 9.0)
    assert np.isnan(median_interval(np.arange(5.0))).all()

    draws = np.random.default_rng(0).normal(size=(2000, 25))
    inside = [low <= 0 <= high for low, high in map(median_interval, draws)]
    assert np.mean(inside) >= 0.95


def test_measures_count_the_images_they_name(make_outcome: MakeOutcome) -> None:
    """Wrong ones are no attacked ones, and failures no successes."""
    outcome = make_outcome(
        [True, True, False, False],
        right=[True, True, True, False],
        l0=np.array([2.0, 4.0, 90.0, 0.0]),
    )

    fooled, robust, l0 = (
        find_measure(name).summarize(outcome) for name in ("fooled", "robust", "l0")
    )
    assert (fooled.value, fooled.n) == (2 / 3, 3)
    assert (robust.value, robust.n) == (0.25, 4)
    assert (l0.value, l0.n) == (3.0, 2)
    few = find_measure("fooled_within:3").summarize(outcome)
    assert (few.value, few.n) == (1 / 3, 3)
    with pytest.raises(ValueError, match="no measure is called l3"):
        find_measure("l3")


@pytest.mark.parametrize(
    ("gaps", "holding"),
    [
        ([1, 1, 1, 1, 1, 1, -0.1], "not decided"),  # p is 2 (1 + 7) / 2**7
        ([1, 1, 1, 1, 1, 1, 0.1], "holds"),  # 2 / 2**7
        ([-1, -1, -1, -1, -1, -1, -0.1], "does not hold"),
        ([1, 1, 1, 1, 1], "not decided"),  # 2 / 2**5
        ([1, 1, 1, 1, 1, 1], "holds"),  # 2 / 2**6
        ([1] * 13 + [-0.1] * 6, "not decided"),  # 19 images, p = .17
        ([1] * 13 + [-0.1] * 7, "holds"),  # 20: the interval alone
        ([1, -1] * 9, "not decided"),
        ([1] * 5 + [0] * 5, "not decided"),  # ten images, of which five differ
        ([1] * 6 + [0] * 6, "holds"),
    ],
)
def test_where_few_images_differ_the_sign_test_must_agree(gaps: list[float], holding: str) -> None:
    """Whose probability is known; but for one row the interval leaves out zero."""
    values = np.array(gaps)
    found = paired_difference(values, np.zeros(len(gaps)), np.ones(len(gaps), np.bool_))

    said, doubt = decide(found)

    assert said == holding
    assert bool(doubt) is (found.low > 0 and said == "not decided")
    assert "sign test" in doubt or not doubt


def test_four_images_of_many_are_no_finding() -> None:
    """Though Tango's interval leaves out zero: McNemar's exact test is 2 / 2**4."""
    one, other = np.ones(417, np.bool_), np.arange(417) >= 4

    found = find_measure("fooled").compare_values(one, other, one)

    assert found.low > 0
    assert found.p == 0.125
    assert decide(found)[0] == "not decided"


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("CIFAR-10", "cifar10 (test)", True),
        ("CIFAR-10", "cifar100 (test)", False),
        ("CIFAR-10", "cifar10 (train)", False),
        ("CIFAR-10", "CIFAR-10-C", False),
        ("ImageNet", "imagenet_val", True),
        ("ImageNet", "imagenetv2-top-images-format-val", False),
        ("ImageNetV2", "imagenetv2-top-images-format-val", True),
    ],
)
def test_data_are_those_published_for_by_their_whole_name(
    theirs: str, ours: str, same: bool
) -> None:
    assert is_same_data(theirs, ours) is same


def test_without_an_interval_nothing_differs(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """Neither where one image is all there is nor where all images give the same."""
    declared = {
        **DECLARED,
        "tables": [
            {
                "name": "Table I",
                "title": "SSIM",
                "measure": "ssim",
                "data": "digits",
                "columns": ["strong"],
                "rows": [{"name": "mean", "published": [0.8]}],
            }
        ],
        "claims": [
            {
                "text": "SSIM is above one half.",
                "where": "Table I",
                "reaches": {"attack": "strong", "measure": "ssim"},
                "value": 0.5,
            },
            {
                "text": "The sweep is more alike.",
                "where": "Table I",
                "more": {"attack": "sweep", "measure": "ssim", "at": {"ssim": 0.9}},
                "than": {"attack": "strong", "measure": "ssim"},
            },
        ],
    }
    paper = build_paper("mine", declared)
    weak = make_outcome([True, True], spec=WEAK, ssim=np.full(2, 0.95))
    strong = make_outcome([True, True], spec=STRONG, ssim=np.full(2, 0.7))
    run = replace(make_run(weak, strong), data={"name": "digits (held out)"})

    found = compare_paper(paper, "small", Results(run, paper.attacks, {}))

    assert found.tables[0].rows[0].verdict == "not comparable"
    assert [claim.holding for claim in found.claims] == ["not decided", "not decided"]


def test_detectors_are_read_by_name_or_say_why_they_are_not_there(make_run: MakeRun) -> None:
    """An accuracy with its interval beside the published one; a gap has its reason."""
    known, share = EstimateOfImages(0.7, 0.6, 0.8, 40), Proportion(3, 4, 0.3, 0.9)
    six = (known, known, known, share, share, known)
    detector = Combination("grad+cam", ("pgd",), *six, None)
    rows = [
        {"name": "accuracy", "measure": "detector_as_published", "published": [0.75, 0.5]},
        {"name": "unseen", "measure": "detector_unseen"},
        {"name": "flagged", "measure": "detector_flagged"},
    ]
    table = {
        "name": "Table V",
        "title": "Detectors",
        "data": "digits, a network",
        "columns": ["grad+cam", "grad+rts"],
        "rows": rows,
    }
    declared = {**DECLARED, "detectors": ["grad+cam", "grad+rts"], "tables": [table], "claims": []}
    missing = {"detect grad+rts": "no masks"}
    run = replace(make_run(), data={"name": "digits"})
    results = Results(run, {}, missing, detectors={"grad+cam": detector})

    (filled,) = compare_paper(build_paper("mine", declared), "small", results).tables

    first, gap, unseen, _, flagged, _ = filled.rows
    assert (first.measured, first.verdict) == (Measured(0.7, 0.6, 0.8, 40), "agrees")
    assert (gap.measured, gap.reason) == (None, "no masks")
    assert unseen.reason == "too few images of the classes held out"
    assert flagged.measured == Measured(0.75, 0.3, 0.9, 4)


def test_transfer_is_over_the_images_that_both_networks_have_right(
    make_run: MakeRun, make_outcome: MakeOutcome
) -> None:
    """Of 80 that the second has right it is fooled on the first 20; without it a reason."""
    rows = np.arange(100)
    own = make_outcome((rows < 80).tolist(), spec=STRONG)
    there = replace(
        make_outcome((rows < 20).tolist(), spec=STRONG), role="transfer", defense=Spec("b.pt", {})
    )
    run = make_run(own)
    wrong = np.where(rows < 80, run.clean["label"], run.clean["label"] + 1)
    second = Defended(Spec("b.pt", {}), "receiver", {**run.clean, "pred_clean": wrong}, {})
    results = Results(run, {"strong": (str(STRONG),)}, {})
    reading = Reading("strong", "transfer")

    with pytest.raises(MissingError, match="--target"):
        results.measure(reading)
    run = replace(run, outcomes=(own, there), receivers=(second,))
    _, found = replace(results, run=run).measure(reading)
    assert (found.value, found.n) == (0.25, 80)
