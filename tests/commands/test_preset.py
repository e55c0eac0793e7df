"""Presets: what ships is sound, and a user's own is checked before anything is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.commands.preset import (
    Preset,
    change_norm,
    change_radius,
    list_presets,
    read_preset,
)
from robusteval.errors import UsageError
from robusteval.runs.types import Spec


def written(folder: Path, text: str) -> str:
    """The path of a preset with this content."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_presets_are_shipped() -> None:
    """In alphabetical order, each with a line on it and attacks."""
    presets = dict(list_presets())

    names = ["autoattack", "corruptions", "curves", "interpretation", "quick", "sparse", "standard"]
    assert list(presets) == names
    assert all(preset.description and preset.attack for preset in presets.values())


def test_a_shipped_preset_is_read_by_name() -> None:
    """Values are numbers by then, not texts."""
    first, *_ = read_preset("quick").attack

    assert first == Spec("quick", {"norm": "linf", "eps": 8 / 255})


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    """All that a preset can set."""
    path = written(
        tmp_path,
        'description = "mine"\nattack = ["pgd:steps=3", "art:DeepFool"]\nsamples = 7\nseed = 0\n'
        'interpreter = ["grad:pool=2"]\nadapt = true\n',
    )

    assert read_preset(path) == Preset(
        attack=(Spec("pgd", {"steps": 3}), Spec("art:DeepFool", {})),
        description="mine",
        samples=7,
        seed=0,
        interpreter=(Spec("grad", {"pool": 2}),),
        adapt=True,
    )


def test_what_a_file_leaves_out_stays_open(tmp_path: Path) -> None:
    """So that the command line's defaults hold."""
    preset = read_preset(written(tmp_path, 'attack = ["pgd"]'))

    assert (preset.samples, preset.seed) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('atack = ["pgd"]', "unknown key 'atack' (did you mean 'attack'?)"),
        ('attack = "pgd"', "attack must be a list of texts such as 'pgd:eps=8/255', not 'pgd'"),
        ('attack = ["pgd"]\ninterpreter = "cam"', "interpreter must be a list of texts such as"),
        ('attack = ["pgd"]\ninterpreter = [1]', "interpreter must be a list of texts such as"),
        ('attack = ["pgd"]\ninterpreter = ["kam"]', "unknown interpreter 'kam'"),
        ('attack = ["pgd"]\nadapt = 1', "adapt must be true or false, not 1"),
        ("attack = [1]", "attack must be a list of texts such as 'pgd:eps=8/255', not [1]"),
        ("attack = []", "attack must be a list of texts such as 'pgd:eps=8/255', not []"),
        ("samples = 3", "attack must be a list of texts such as 'pgd:eps=8/255', not []"),
        ('attack = ["pgd"]\nsamples = 0', "samples must be a whole number from 1 up, not 0"),
        ('attack = ["pgd"]\nsamples = true', "samples must be a whole number from 1 up, not True"),
        ('attack = ["pgd"]\nsamples = "9"', "samples must be a whole number from 1 up, not '9'"),
        ('attack = ["pgd"]\nseed = -1', "seed must be a whole number from 0 up, not -1"),
        ('attack = ["pgd"]\ndescription = 1', "description must be a text, not 1"),
        ('attack = ["pgg"]', "unknown attack 'pgg' (did you mean 'pgd'?)"),
        ('attack = ["pgd:epz=1"]', "unknown parameter of pgd 'epz' (did you mean 'eps'?)"),
        ('attack = ["pgd:eps"]', "'pgd:eps': write NAME:key=value"),
    ],
)
def test_a_mistake_is_said_with_the_name_of_the_file(
    tmp_path: Path, text: str, message: str
) -> None:
    """One sentence, and what would be right."""
    path = written(tmp_path, text)

    with pytest.raises(UsageError) as caught:
        read_preset(path)

    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("text", ["attack = [", "a = " + "[" * 100_000])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    """Also one that is nested until Python gives up."""
    with pytest.raises(UsageError, match=r"mine\.toml is not TOML: "):
        read_preset(written(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """TOML is UTF-8."""
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(UsageError, match="is not TOML: "):
        read_preset(str(tmp_path / "mine.toml"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """With what the system said."""
    with pytest.raises(UsageError, match=r"^cannot read the preset .*: No such file or directory$"):
        read_preset(str(tmp_path / "mine.toml"))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    """And the other way to name a preset."""
    with pytest.raises(UsageError) as caught:
        read_preset("standart")

    assert str(caught.value) == (
        "unknown preset 'standart' (did you mean 'standard'?): known are autoattack,"
        " corruptions, curves, interpretation, quick, sparse, standard; or give the path of a"
        " .toml file"
    )


@pytest.mark.parametrize(
    ("name", "norm", "expected"),
    [
        ("pgd", "l2", "pgd:norm=l2,eps=0.5"),
        ("standard", "l1", "standard:norm=l1,eps=12"),
        ("standard", "l0", "standard:norm=l0,eps=24"),
        ("quick", "l0_pixels", "quick:norm=l0_pixels,eps=20"),
        ("autoattack", "l1", None),
        ("fgsm", "l0", None),
        ("sigma_zero", "l0", None),  # no radius
        ("art:DeepFool", "l2", None),
    ],
)
def test_another_norm_brings_its_usual_radius(name: str, norm: str, expected: str | None) -> None:
    """Nothing of an attack that does not know it, or that has no radius."""
    changed = change_norm(Spec(name, {}), norm)

    assert (changed and str(changed)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "autoattack", "--norm", "l1"], "no attack of the preset autoattack knows"),
        (["--preset", "standard", "--norm", "l0", "--eps", "0.5"], "a whole number of changed val"),
        (["--attack", "pgd", "--norm", "l2"], "write --attack NAME:norm=..."),
        (["--attack", "apgd:norm=l0"], "norm must be one of linf, l2, l1, not 'l0'"),
        (["--attack", "standard:cut=0.2"], "unknown parameter of standard 'cut'"),
    ],
)
def test_a_norm_that_does_not_fit_is_one_sentence(words: list[str], message: str) -> None:
    """Before anything is run, with the exit code of a mistake."""
    result = CliRunner().invoke(cli, ["evaluate", "demo", "--samples", "2", *words])

    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 200


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec("pgd", {"steps": 3}), {"steps": 3, "eps": 0.5}),
        (Spec("pgd", {"eps": 8 / 255}), {"eps": 0.5}),
        (
            Spec("art:AutoAttack", {"eps": "8/255", "eps_step": "2/255"}),
            {"eps": 0.5, "eps_step": 0.25},
        ),
        (Spec("art:DeepFool", {"max_iter": "5"}), {"max_iter": "5"}),
    ],
)
def test_the_radius_is_set_where_there_is_one(spec: Spec, expected: dict[str, object]) -> None:
    """The step of ART's attacks goes with it; what has no radius stays as it is."""
    assert change_radius(spec, 0.5) == Spec(spec.name, expected)
