"""Specs and threats as text, and runs on disk: whole, locked, checked, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clean_columns, save_cells
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from robusteval.errors import RunError, UsageError
from robusteval.registry import parse
from robusteval.registry.signatures import read_number
from robusteval.runs import folder as folder_module
from robusteval.runs.folder import FORMAT, Store, load_run
from robusteval.runs.keys import hash_attack, hash_clean
from robusteval.runs.storage import differences, digest, pack, unpack
from robusteval.runs.types import Columns, Finding, Outcome, Run, Spec, Threat, format_value
from robusteval.runs.writing import write_atomically

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
CONFIG = {"attacks": ["pgd:eps=8/255"], "samples": 3, "seed": 0}
KEY = hash_clean(CONFIG)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Spec("pgd", {}), "pgd"),
        (Spec("pgd", {"eps": 8 / 255, "steps": 20}), "pgd:eps=8/255,steps=20"),
        (Spec("pgd", {"eps": 0.3, "step": None}), "pgd:eps=0.3,step=none"),
        (Spec("art:SquareAttack", {"verbose": False}), "art:SquareAttack:verbose=false"),
        (Spec("pgd", {"eps": 1 / 3}), "pgd:eps=0.3333333333333333"),
        (Spec("pgd", {"eps": 128 / 255}), "pgd:eps=128/255"),
        (Spec("pgd", {"eps": 0.4}), "pgd:eps=0.4"),
    ],
)
def test_a_spec_prints_as_a_user_writes_it(spec: Spec, text: str) -> None:
    assert str(spec) == text
    assert str(parse(text)) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_back_exactly(value: float) -> None:
    assert read_number(format_value(value)) == value


@given(st.integers(1, 64))
def test_grey_levels_are_shown_as_fractions(levels: int) -> None:
    assert format_value(levels / 255) == f"{levels}/255"


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (Threat("linf", 8 / 255, False), "linf eps 8/255"),
        (Threat("l2", 0.5, True), "l2 eps 0.5 targeted"),
        (Threat("l2", 128 / 255, False), "l2 eps 128/255"),
        (Threat("l2", None, False), "l2 minimum"),
    ],
)
def test_a_threat_prints_norm_radius_and_goal(threat: Threat, text: str) -> None:
    assert str(threat) == text


def test_logits_that_are_not_finite_count_for_the_attacker(make_outcome: MakeOutcome) -> None:
    outcome = make_outcome([False, False], pred_adv=np.array([-1, 1]))

    assert outcome.success().tolist() == [True, False]


def test_what_png_cannot_hold_is_judged_in_float(make_outcome: MakeOutcome) -> None:
    outcome = make_outcome([True, False], pred_png=np.full(2, -2))

    assert outcome.success("pred_png").tolist() == [True, False]


def test_only_attacked_images_can_be_successes(make_outcome: MakeOutcome) -> None:
    outcome = make_outcome([True, True], right=[False, True])

    assert outcome.success().tolist() == [False, True]


def test_probes_are_no_attacks(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    attack, probe = make_outcome([True]), make_outcome([True], role="probe:noise")

    assert make_run(attack, probe).attacks == (attack,)


def test_equal_values_have_equal_digests() -> None:
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    write_atomically(path, b"one")
    write_atomically(path, b"two")

    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left on device"):
        write_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_in_the_way_is_a_clear_failure(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()

    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "file", b"new")

    assert os.listdir(tmp_path) == ["file"]


def test_a_file_in_place_of_the_folder_is_a_clear_failure(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("in the way")

    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "samples" / "cell.npz", b"new")


@pytest.fixture
def columns() -> Columns:
    """A few columns of three rows."""
    return {
        "id": np.array([1, 2, 2**64 - 1], dtype=np.uint64),
        "attacked": np.array([True, False, True]),
        "psnr": np.array([np.inf, np.nan, 30.0]),
        "fault": np.array([0, 1, 4], dtype=np.uint8),
    }


def same(left: Columns | None, right: Columns) -> bool:
    """Whether names, types and values are the same, nan included."""
    if left is None or left.keys() != right.keys():
        return False
    for name, values in right.items():
        np.testing.assert_array_equal(left[name], values, strict=True)
    return True


def test_columns_come_back_as_they_were(columns: Columns) -> None:
    assert same(unpack(pack(columns)), columns)


def test_equal_columns_are_equal_bytes(columns: Columns) -> None:
    assert pack(columns) == pack(dict(reversed(columns.items())))


def test_every_truncation_of_columns_is_noticed(columns: Columns) -> None:
    content = pack(columns)

    for end in range(len(content)):
        with pytest.raises(ValueError, match=r"."):
            unpack(content[:end])


def test_a_changed_byte_never_escapes_as_another_error(columns: Columns) -> None:
    content = pack(columns)

    for at in range(len(content)):
        changed = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        try:
            unpack(changed)  # harmless where the byte is not looked at
        except ValueError:
            continue


def test_pickles_among_columns_are_not_opened() -> None:
    content = pack({"label": np.array([print], dtype=object)})

    with pytest.raises(ValueError, match="holds Python objects"):
        unpack(content)


def record(**changed: Any) -> dict[str, Any]:
    """The rest of a ``run.json``."""
    return {
        "status": "complete",
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "command": "robusteval evaluate net.pt",
        "config": CONFIG,
        "model": {"sha256": "ab"},
        "data": {"name": "digits"},
        "environment": {"numpy": "2"},
        "findings": [],
        "failures": {},
        **changed,
    }


def find_key(folder: Path, role: str) -> str:
    """The key of the cell of this role."""
    cells = json.loads((folder / "run.json").read_text())["cells"]
    return str(next(cell["key"] for cell in cells if cell["role"] == role))


def test_a_cell_comes_back_in_the_next_session(tmp_path: Path, columns: Columns) -> None:
    with Store.open(tmp_path / "run", CONFIG) as store:
        store.save_cell(KEY, columns, {"role": "clean"})
        store.save_record(record(), [KEY])

    with Store.open(tmp_path / "run", CONFIG) as store:
        assert same(store.find_cell(KEY), columns)
        assert store.find_cell("other") is None


def test_an_attack_comes_back_in_the_next_session(
    tmp_path: Path, make_outcome: MakeOutcome
) -> None:
    outcome = make_outcome([True, False])
    key = hash_attack(CONFIG, "attack", outcome.attack, outcome.resolved)
    clean = clean_columns(outcome.columns["label"], outcome.attacked)
    with Store.open(tmp_path, CONFIG) as store:
        store.save_cell(key, outcome.columns, outcome.to_record())
        store.save_record(record(), [key])

    with Store.open(tmp_path, CONFIG) as store:
        again = store.find_outcome(key, clean)
        assert store.find_outcome("other", clean) is None

    assert again is not None
    assert (again.attack, again.threat) == (outcome.attack, outcome.threat)
    assert same(again.columns, outcome.columns)


def test_parts_stay_until_the_record_names_the_cell(tmp_path: Path, columns: Columns) -> None:
    with Store.open(tmp_path, CONFIG) as store:
        store.save_record(record(status="incomplete"), [])
        part = {**columns, "row": np.arange(len(columns["id"]))}
        store.parts.save_part(KEY, part)
        store.parts.save_part(KEY, part)
        store.parts.save_part(KEY, {"row": part["row"][:1]})

    with Store.open(tmp_path, CONFIG) as store:
        assert sorted(len(part) for part in store.parts.read_parts(KEY)) == [1, len(part)]
        store.save_cell(KEY, columns, {"role": "clean"})
        assert len(list(store.parts.read_parts(KEY))) == 2
        store.save_record(record(status="incomplete"), [KEY])
        assert list(store.parts.read_parts(KEY)) == []


def halved(content: bytes) -> bytes:
    """Cut off in the middle."""
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """With other bits in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [halved, flipped])
def test_a_damaged_part_is_dropped(
    tmp_path: Path, columns: Columns, damage: Callable[[bytes], bytes]
) -> None:
    with Store.open(tmp_path, CONFIG) as store:
        store.parts.save_part(KEY, {**columns, "row": np.arange(len(columns["id"]))})
        (part,) = (tmp_path / "samples" / f"{KEY}.parts").iterdir()
        content = part.read_bytes()
        part.write_bytes(damage(content))

        assert list(store.parts.read_parts(KEY)) == []
        assert not part.exists()


@pytest.fixture
def run_folder(tmp_path: Path, make_outcome: MakeOutcome) -> Path:
    """A finished run of one clean cell, one attack and one probe."""
    attack = make_outcome([True, False, False], right=[True, True, False], notes=("slow",))
    probe = make_outcome([True, True], role="probe:noise", spec=Spec("noise", {"tries": 3}))
    clean = clean_columns(attack.columns["label"], attack.attacked)
    finding = Finding("note", False, "Small.", "pgd")
    folder = tmp_path / "run"
    facts = record(findings=[finding._asdict()], failures={"art:X": "broke"})
    run = Run.from_record(facts, [({"role": "clean"}, clean)])
    with Store.open(folder, CONFIG) as store:
        keys = save_cells(store, replace(run, outcomes=(attack, probe)))
        store.save_record(facts, [*keys, "missing"])
    return folder


@pytest.mark.parametrize("name", ["", "run.json"])
def test_a_run_comes_back_from_its_folder(run_folder: Path, name: str) -> None:
    run = load_run(run_folder / name)

    attack, probe = run.outcomes
    assert run.status == "complete"
    assert run.findings == (Finding("note", False, "Small.", "pgd"),)
    assert run.failures == {"art:X": "broke"}
    assert run.folder == str(run_folder)
    assert run.config == {**CONFIG, "command": "robusteval evaluate net.pt"}
    assert run.attacks == (attack,)
    assert attack.attack == Spec("pgd", {"eps": 8 / 255, "steps": 20})
    assert attack.threat == Threat("linf", 8 / 255, False)
    assert attack.notes == ("slow",)
    assert attack.success().tolist() == [True, False, False]
    assert (probe.role, str(probe.attack)) == ("probe:noise", "noise:tries=3")
    assert run.clean["id"].dtype == np.uint64


def test_a_changed_cell_is_refused_and_computed_again(run_folder: Path) -> None:
    key = find_key(run_folder, "attack")
    path = run_folder / "samples" / f"{key}.npz"
    stored = unpack(path.read_bytes())
    path.write_bytes(pack({**stored, "pred_adv": stored["label"]}))

    with pytest.raises(RunError, match=r"\.npz was changed after the run"):
        load_run(run_folder)
    with Store.open(run_folder, CONFIG) as store:
        assert store.find_cell(key) is None
        assert store.find_cell(find_key(run_folder, "clean")) is not None


def test_a_missing_cell_is_refused_and_computed_again(run_folder: Path) -> None:
    key = find_key(run_folder, "attack")
    (run_folder / "samples" / f"{key}.npz").unlink()

    with pytest.raises(RunError, match="missing: run the evaluation again"):
        load_run(run_folder)
    with Store.open(run_folder, CONFIG) as store:
        assert store.find_cell(key) is None


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RunError, match="another process is writing"),
        Store.open(tmp_path, CONFIG),
    ):
        pass


def test_another_process_is_refused_while_one_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from robusteval.errors import RunError; from robusteval.runs.folder import Store\n"
        "try:\n"
        "    with Store.open(Path(sys.argv[1]), {}): print('in')\n"
        "except RunError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]

    with Store.open(tmp_path, {}):
        during = subprocess.run(command, capture_output=True, text=True, check=True)
    after = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "another process is writing" in during.stdout
    assert after.stdout == "in\n"


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Store.open(tmp_path, CONFIG):
        raise KeyError

    with Store.open(tmp_path, CONFIG):
        pass


def test_other_settings_are_refused_with_the_difference(run_folder: Path) -> None:
    other = {**CONFIG, "seed": 7, "attacks": ["fgsm"]}

    with (
        pytest.raises(UsageError, match="other settings") as caught,
        Store.open(run_folder, other),
    ):
        pass

    assert "seed: 0 there, 7 here" in str(caught.value)
    assert 'attacks: ["pgd:eps=8/255"] there, ["fgsm"] here' in str(caught.value)
    assert load_run(run_folder).attacks


def test_differences_name_the_way_to_them() -> None:
    old, new = {"model": {"sha256": "a", "file": "x"}}, {"model": {"sha256": "b", "file": "x"}}

    assert list(differences(old, new)) == ['model.sha256: "a" there, "b" here']
    assert list(differences(old, old)) == []


def test_of_lists_what_they_do_not_share_is_told() -> None:
    """Forty attacks that both have would hide the one that is new; only their order is all told."""
    long = [f"pgd:eps={i}/255" for i in range(40)]

    assert list(differences({"attacks": long}, {"attacks": [*long, "fgsm"]})) == [
        'attacks: [] there, ["fgsm"] here'
    ]
    assert list(differences(["a", "b"], ["b", "a"], "at")) == [
        'at: ["a", "b"] there, ["b", "a"] here'
    ]


def test_fresh_throws_the_old_run_away_and_nothing_else(run_folder: Path) -> None:
    (run_folder / "notes.txt").write_text("mine")

    key = find_key(run_folder, "attack")
    with Store.open(run_folder, {"seed": 7}, fresh=True) as store:
        assert store.find_cell(key) is None

    assert (run_folder / "notes.txt").read_text() == "mine"
    assert not (run_folder / "samples").exists()
    assert not (run_folder / "run.json").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")

    with (
        pytest.raises(UsageError, match="holds other files"),
        Store.open(tmp_path, CONFIG, fresh=fresh),
    ):
        pass

    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_called_samples_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "photo.jpg").write_text("mine")

    with pytest.raises(UsageError), Store.open(tmp_path, CONFIG, fresh=fresh):
        pass

    assert (tmp_path / "samples" / "photo.jpg").read_text() == "mine"


def test_fresh_does_not_delete_a_foreign_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"speed": 3}')

    with pytest.raises(UsageError), Store.open(tmp_path, CONFIG, fresh=True):
        pass

    assert (tmp_path / "run.json").read_text() == '{"speed": 3}'


def test_a_file_in_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot write to"), Store.open(folder, CONFIG):
            pass


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_module, "hold_lock", denied)

    with (
        pytest.raises(UsageError, match=r"cannot write to .* \(Permission denied\)"),
        Store.open(tmp_path, CONFIG),
    ):
        pass


def edit(folder: Path, **changed: Any) -> None:
    """Change entries of a ``run.json``; None removes one."""
    path = folder / "run.json"
    whole = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))


def test_a_newer_format_is_refused_by_name(run_folder: Path) -> None:
    edit(run_folder, format=FORMAT + 1)

    with pytest.raises(UsageError, match=f"format {FORMAT + 1}.* reads {FORMAT}"):
        load_run(run_folder)
    with pytest.raises(UsageError, match="format"), Store.open(run_folder, CONFIG):
        pass


def test_a_newer_format_may_have_other_entries(run_folder: Path) -> None:
    edit(run_folder, format=FORMAT + 1, cells=None)

    with pytest.raises(UsageError, match=f"format {FORMAT + 1}"):
        load_run(run_folder)


def test_every_truncation_of_the_record_is_refused(run_folder: Path) -> None:
    path = run_folder / "run.json"
    content = path.read_bytes()

    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        with pytest.raises(UsageError, match="damaged"):
            load_run(run_folder)
        with pytest.raises(UsageError, match="damaged"), Store.open(run_folder, CONFIG):
            pass


@pytest.mark.parametrize("content", ["[]", "3", "null", '"run"', "{}", "\x00", '{"format": 1}'])
def test_what_is_no_record_is_refused(run_folder: Path, content: str) -> None:
    (run_folder / "run.json").write_text(content)

    with pytest.raises(UsageError, match="not the record of a run"):
        load_run(run_folder)


@pytest.mark.parametrize(
    "name",
    ["model", "data", "environment", "findings", "failures", "seconds", "created", "command"],
)
def test_a_record_with_an_entry_missing_is_refused(run_folder: Path, name: str) -> None:
    edit(run_folder, **{name: None})

    with pytest.raises(UsageError, match="damaged"):
        load_run(run_folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"config": 3},
        {"model": []},
        {"cells": 3},
        {"cells": [3]},
        {"cells": [{"key": "clean"}]},
        {"findings": [{"surprise": 1}]},
        {"findings": 3},
    ],
)
def test_a_record_of_another_shape_is_refused(run_folder: Path, changed: dict[str, Any]) -> None:
    edit(run_folder, **changed)

    with pytest.raises(UsageError, match="damaged"):
        load_run(run_folder)


def test_no_run_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=re.escape(f"{folder} is not the folder of a run")):
            load_run(folder)


def test_columns_that_are_whole_but_no_columns_are_refused(run_folder: Path) -> None:
    key = find_key(run_folder, "attack")
    path = run_folder / "samples" / f"{key}.npz"
    path.write_bytes(b"no archive")
    whole = json.loads((run_folder / "run.json").read_text())
    for entry in whole["cells"]:
        if entry["key"] == key:
            entry["sha256"] = hashlib.sha256(b"no archive").hexdigest()
    edit(run_folder, cells=whole["cells"])

    with pytest.raises((UsageError, RunError), match="no archive of arrays"):
        load_run(run_folder)


def test_a_run_is_its_record_and_its_cells(run_folder: Path) -> None:
    """There and back, and the line that it prints."""
    run = load_run(run_folder)
    cells = [({"role": "clean"}, run.clean), *((o.to_record(), o.columns) for o in run.outcomes)]

    again = Run.from_record(json.loads(json.dumps(run.to_record())), cells, run.folder)

    assert again.to_record() == run.to_record()
    assert [o.to_record() for o in again.outcomes] == [o.to_record() for o in run.outcomes]
    assert repr(again) == repr(run)
    assert "3 images, 66.7% right, 33.3% after 1 attack;" in repr(run)
