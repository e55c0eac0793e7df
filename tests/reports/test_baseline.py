"""Baselines: what they keep, that they are stable and small, and that nothing else is taken."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.errors import NothingEvaluated, RobustevalError, RunError, UsageError
from robusteval.reports.baseline import (
    Baseline,
    DataIdentity,
    build_baseline,
    collect_verdicts,
    list_changes,
)
from robusteval.reports.baseline_file import (
    decode_bits,
    encode_bits,
    read_baseline,
    render_baseline,
)
from robusteval.runs.storage import digest
from robusteval.runs.types import Defended, Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

N = 100
DETECTOR = Spec("detector", {"fpr": 0.05, "interpreter": "cam"})


def first(k: int, n: int = N) -> np.ndarray[Any, Any]:
    """A mask ``(n,)`` of the first so many images."""
    return np.arange(n) < k


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """100 images, 90 right; two attacks, one of them behind a detector as well."""
    right = first(90)
    plain = make_outcome(first(40), right=right)
    other = make_outcome(
        first(30), right=right, spec=Spec("fab", {}), threat=Threat("l2", None, False)
    )
    flagged = make_outcome(first(40), right=right, flagged=first(25), score=np.linspace(1, 0, N))
    clean = {**make_run(plain).clean, "flagged": np.arange(N) >= 95, "score": np.zeros(N)}
    defended = Defended(DETECTOR, "detector", clean, {"fpr": 0.05, "threshold": 0.3})
    return make_run(
        plain,
        other,
        replace(flagged, defense=DETECTOR, adaptive=False),
        defenses=(defended,),
    )


@pytest.fixture
def file(run: Run, tmp_path: Path) -> Path:
    """The baseline of that run on disk."""
    path = tmp_path / "baseline.json"
    path.write_text(render_baseline(build_baseline(run)))
    return path


def test_a_baseline_holds_the_verdicts_of_the_run(run: Run, file: Path) -> None:
    made = read_baseline(file)

    assert made.ids.tolist() == run.clean["id"].tolist()
    assert made.clean.tolist() == first(90).tolist()
    for cell, outcome in zip(made.cells, run.attacks, strict=True):
        assert cell.attack == str(outcome.attack)
        assert cell.threat == outcome.threat
        assert cell.robust.tolist() == (outcome.attacked & ~outcome.success()).tolist()
    assert [int(cell.robust.sum()) for cell in made.cells] == [50, 60, 75]
    assert [cell.defense for cell in made.cells] == [None, None, str(DETECTOR)]
    assert [cell.adaptive for cell in made.cells] == [True, True, False]
    assert made.defenses[0].fpr == 0.05
    assert int(made.defenses[0].clean.sum()) == 90
    assert made.seed == 0
    assert made.model.name == "net.pt"
    assert made.model.sha256 == run.model["sha256"]
    assert made.data == DataIdentity("digits", run.data["sha256"])
    assert made.created == run.created


def test_reading_returns_what_was_written(run: Run, file: Path) -> None:
    assert (
        render_baseline(read_baseline(file))
        == file.read_text()
        == render_baseline(build_baseline(run))
    )


def test_the_text_is_ascii_ends_with_a_newline_and_names_no_folder(
    run: Run, make_run: MakeRun
) -> None:
    named = replace(
        run,
        data={**run.data, "name": "/home/müller/Bilder/<b>"},
        model={**run.model, "file": "/home/müller/net.pt"},
    )

    text = render_baseline(build_baseline(named))

    assert text.isascii()
    assert text.endswith("}\n")
    assert "home" not in text


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_bits_come_back(n: int) -> None:
    bits = np.random.default_rng(n).random(n) < 0.5

    assert decode_bits(encode_bits(bits), n).tolist() == bits.tolist()
    with pytest.raises(ValueError, match="bytes"):
        decode_bits(encode_bits(bits), n + 8)


def test_a_thousand_images_and_five_cells_take_twenty_kilobytes(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cells = [
        make_outcome(first(100 * k, 1000), spec=Spec("pgd", {"steps": k})) for k in range(1, 6)
    ]

    assert len(render_baseline(build_baseline(make_run(*cells)))) < 20_000


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"status": "incomplete"}, RunError, "not complete"),
        ({"config": {"attacks": ["pgd", "late"]}}, RunError, "; late: not finished"),
        ({"failures": {"fab": "out of memory"}}, RunError, "fab: out of memory"),
        (
            {"findings": (Finding("guessing", True, "It guesses."),)},
            UsageError,
            "not to be used: It guesses.",
        ),
    ],
)
def test_what_means_nothing_makes_no_baseline(
    run: Run, changed: dict[str, Any], error: type[RobustevalError], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_baseline(replace(run, **changed))


def test_nothing_right_makes_no_baseline(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    with pytest.raises(NothingEvaluated, match="none of 20 images was classified correctly"):
        build_baseline(make_run(make_outcome(first(0, 20), right=first(0, 20))))


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file.*baseline update RUN"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format": 1, "cells": []}', "[" * 100_000, "\udcff", "\x00"],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))

    with pytest.raises(UsageError, match="not a baseline"):
        read_baseline(path)


def test_a_later_version_is_named(file: Path) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "version": 2}))

    with pytest.raises(UsageError, match="has version 2, this version of robusteval reads 1"):
        read_baseline(file)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(seed=1),
        lambda record: record.update(clean=encode_bits(first(100))),
        lambda record: record["cells"].pop(),
        lambda record: record["versions"].update(torch="9"),
        lambda record: record.pop("digest"),
        lambda record: record.update(digest="0" * 64),
        lambda record: record.update(extra=float("nan")) or record.pop("digest"),
        lambda record: record.update(version=0),
    ],
)
def test_an_edit_by_hand_is_seen(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))

    with pytest.raises(UsageError, match="changed after it was made"):
        read_baseline(file)


def test_other_white_space_is_no_edit(file: Path, run: Run) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4).replace("\n", "\r\n"))

    assert render_baseline(read_baseline(file)) == render_baseline(build_baseline(run))


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(clean=encode_bits(first(100, 120))),
        lambda record: record["cells"][0].update(robust="A"),
        lambda record: record["cells"][0].update(robust=None),
        lambda record: record["cells"][0].update(attack=""),
        lambda record: record["cells"][0].update(attack=7),
        lambda record: record["cells"][0].pop("threat"),
        lambda record: record["cells"][0].update(more=1),
        lambda record: record.update(cells=3),
        lambda record: record.update(ids="AAAA"),
        lambda record: record.update(ids="", images=0),
        lambda record: record.update(images=99),
        lambda record: record.update(versions=[]),
        lambda record: record.update(version="1"),
        lambda record: record.pop("seed"),
        lambda record: record["cells"].append(record["cells"][0]),
        lambda record: record["cells"][0]["threat"].update(eps=-1),
        lambda record: record["cells"][0].update(robust=encode_bits(first(95))),
        lambda record: record["cells"][2].update(defense="jpeg"),
        lambda record: record["defenses"][0].update(fpr=5),
        lambda record: record["defenses"][0].update(defense=""),
    ],
)
def test_parts_that_do_not_fit_are_refused_even_with_a_digest(
    file: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    record = json.loads(file.read_text())
    del record["digest"]
    edit(record)
    file.write_text(json.dumps({**record, "digest": digest(record)}))

    with pytest.raises(UsageError, match="damaged"):
        read_baseline(file)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"arch": 3, "sha256": "0"}},
        {"environment": {"torch": 2.1}},
        {"created": 2026},
        {"config": {"seed": "first"}},
        {"data": {"name": "digits", "sha256": [1]}},
        {"defenses": ()},
    ],
)
def test_what_could_not_be_read_again_is_never_written(run: Run, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no baseline can be made of this run"):
        render_baseline(collect_verdicts(replace(run, **changed)))


def test_another_rate_of_false_alarms_is_a_change(run: Run) -> None:
    (defended,) = run.defenses
    other = replace(run, defenses=(defended._replace(facts={"fpr": 0.01}),))

    lines = list_changes(build_baseline(run), build_baseline(other))

    assert lines == [f"{DETECTOR}.fpr: 0.05 -> 0.01"]


def test_ids_are_little_endian(file: Path, run: Run) -> None:
    content = base64.b64decode(json.loads(file.read_text())["ids"])

    assert int.from_bytes(content[:8], "little") == int(run.clean["id"][0])


def test_the_first_baseline_is_described(run: Run) -> None:
    lines = list_changes(None, build_baseline(run))

    assert lines == [
        "new: 100 images of digits, seed 0",
        "clean: 90 %",
        "clean behind detector:fpr=0.05,interpreter=cam: 90 %",
        "pgd:eps=8/255,steps=20: 50 %",
        "fab: 60 %",
        "pgd:eps=8/255,steps=20 behind detector:fpr=0.05,interpreter=cam (oblivious): 75 %",
    ]


def test_the_same_run_changes_nothing(run: Run) -> None:
    later = replace(run, created="2027-01-01T00:00:00+00:00")

    assert list_changes(build_baseline(run), build_baseline(later)) == []


def test_an_update_says_what_it_changes(
    run: Run, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    right = first(92)
    broken = first(40) ^ (first(45) & ~first(38))  # 38 and 39 gained, 40 to 44 lost
    stronger = make_outcome(first(50), right=right, spec=Spec("apgd", {}))
    new = make_run(
        make_outcome(broken, right=right),
        stronger,
        model={**run.model, "sha256": "ab" * 32},
        environment={**run.environment, "torch": "2.11"},
    )

    lines = list_changes(build_baseline(run), build_baseline(new))

    assert lines == [
        f'model.sha256: "{run.model["sha256"]}" -> "{"ab" * 32}"',
        'versions.torch: "2.10" -> "2.11"',
        "clean: 90 % -> 92 % (0 lost, 2 gained)",
        "clean behind detector:fpr=0.05,interpreter=cam: 90 % -> gone",
        "pgd:eps=8/255,steps=20: 50 % -> 49 % (5 lost, 4 gained)",
        "fab: 60 % -> gone",
        "pgd:eps=8/255,steps=20 behind detector:fpr=0.05,interpreter=cam (oblivious): 75 % -> gone",
        "apgd: new, 42 %",
    ]


def test_an_update_to_other_images_and_settings_says_so(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    old = make_run(replace(make_outcome(first(40)), resolved={"eps": 8 / 255, "restarts": 1}))
    new = make_run(
        replace(make_outcome(first(30, 50)), resolved={"eps": 8 / 255, "restarts": 5}),
        config={"seed": 3},
    )

    lines = list_changes(build_baseline(old), build_baseline(new))

    assert lines == [
        "seed: 0 -> 3",
        "images: 100 -> 50, of which 50 are in both",
        "pgd:eps=8/255,steps=20: 60 % -> 40 % (other images)",
        "pgd:eps=8/255,steps=20.restarts: 1 -> 5",
    ]


def test_flips_are_joined_by_id_whatever_the_order(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(40)))
    turned = make_run(make_outcome(first(40)[::-1]))
    turned = replace(turned, clean={**turned.clean, "id": run.clean["id"][::-1]})

    assert list_changes(build_baseline(run), build_baseline(turned)) == []


def test_clean_verdicts_by_defense(run: Run) -> None:
    made: Baseline = build_baseline(run)

    assert made.clean_behind(None) is made.clean
    assert made.clean_behind(str(DETECTOR)) is made.defenses[0].clean
    assert made.clean_behind("other") is None
