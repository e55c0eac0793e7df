"""A checkpoint as a defense of another, and files as arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from toys import Bands

from robusteval.defenses.unit_ranking import list_layers
from robusteval.errors import Refused, UsageError
from robusteval.evaluation.defense import prepare_defense
from robusteval.evaluation.defense_files import hide_folder, is_detector, parse_defense
from robusteval.interpreters.rts import locate_mask_network
from robusteval.models.checkpoint import collect_state, load, save
from robusteval.models.classifier import Classifier
from robusteval.models.identity import hash_model
from robusteval.models.masked import mask_units
from robusteval.runs.types import Spec

SOURCE = "from toys import Bands\n\n\ndef bands():\n    return Bands()\n"


@pytest.fixture
def arch(tmp_path: Path) -> str:
    """The network as a user's own file."""
    (tmp_path / "own.py").write_text(SOURCE)
    return f"{tmp_path / 'own.py'}:bands"


@pytest.fixture
def model(tmp_path: Path, trained_bands: Bands, arch: str) -> Classifier:
    """The undefended one."""
    torch.save(trained_bands.state_dict(), tmp_path / "net.pt")
    return load(tmp_path / "net.pt", arch=arch, mean=[0.5], std=[0.25])


def test_a_bare_state_dict_is_built_and_fed_like_the_model(
    tmp_path: Path, trained_bands: Bands, model: Classifier
) -> None:
    torch.save(trained_bands.state_dict(), tmp_path / "hard.pt")

    defense = prepare_defense(f"checkpoint:file={tmp_path / 'hard.pt'}", model)

    x = torch.rand(3, 3, 12, 12)
    assert torch.equal(defense.model(x), model(x))
    assert defense.detector is None


def test_what_the_file_says_counts(
    tmp_path: Path, trained_bands: Bands, model: Classifier, arch: str
) -> None:
    """Its own normalisation, although the network has to be looked up."""
    save(
        tmp_path / "hard.safetensors",
        trained_bands.state_dict(),
        arch=arch,
        num_classes=3,
        input_shape=(3, 12, 12),
        mean=[0.25],
        std=[0.5],
    )

    defense = prepare_defense(str(tmp_path / "hard.safetensors"), model)

    assert defense.model.mean.flatten().tolist() == [0.25] * 3
    assert str(defense.spec) == "checkpoint:file=hard.safetensors"
    assert defense.facts["sha256"] == defense.model.identity["sha256"]
    assert str(tmp_path) not in json.dumps(defense.identity)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("checkpoint", "checkpoint: say which: checkpoint:file=FILE"),
        ("checkpoint:file=nowhere.pt", "there is no file nowhere.pt"),
        ("nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("detektor", "unknown defense 'detektor' .did you mean 'detector'"),
        ("checkpoint:fiel=a.pt", "unknown parameter of checkpoint 'fiel'"),
    ],
)
def test_mistakes_are_told(model: Classifier, spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_defense(spec, model)


def test_code_in_a_defense_is_refused(tmp_path: Path, model: Classifier) -> None:
    (tmp_path / "hard.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")

    with pytest.raises(Refused):
        prepare_defense(str(tmp_path / "hard.pt"), model)


def test_other_classes_are_refused(tmp_path: Path, bands: Classifier) -> None:
    """Ten of them against three."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 10))
    path = tmp_path / "ten.py"
    path.write_text(
        "from torch import nn\n\n\ndef ten():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(432, 10))\n"
    )
    save(
        tmp_path / "ten.safetensors",
        network.state_dict(),
        arch=f"{path}:ten",
        num_classes=10,
        input_shape=(3, 12, 12),
        mean=None,
        std=None,
    )

    with pytest.raises(UsageError, match="10 classes, the model itself with 3"):
        prepare_defense(
            Spec(
                "checkpoint",
                {"file": str(tmp_path / "ten.safetensors"), "arch": f"{path}:ten"},
            ),
            bands,
        )


def test_a_file_stands_for_what_is_in_it(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    safetensors.torch.save_file(tensors, tmp_path / "one", {"detector": "{}"})
    safetensors.torch.save_file(tensors, tmp_path / "two", {"arch": "x"})
    (tmp_path / "three").write_bytes(b"\xff" * 100)
    (tmp_path / "four").write_bytes(b"")

    assert [is_detector(tmp_path / name) for name in ("one", "two", "three", "four")] == [
        True,
        False,
        False,
        False,
    ]
    assert parse_defense(str(tmp_path / "one")) == Spec("detector", {"file": str(tmp_path / "one")})
    assert parse_defense("detector:file=x,fpr=0.01").parameters == {"file": "x", "fpr": "0.01"}


def test_folders_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()

    assert hide_folder(str(tmp_path / "net.pt")) == "net.pt"
    assert hide_folder(f"{tmp_path}/own.py:build") == "own.py:build"
    assert hide_folder("grad+cam") == "grad+cam"
    assert hide_folder(0.05) == 0.05


def test_no_defense_shares_the_identity_of_its_model(
    tmp_path: Path, trained_bands: Bands, model: Classifier, arch: str
) -> None:
    """Or caches, and mask networks of rts among them, would take one for the other."""
    layer = list_layers(model, torch.rand(2, 3, 12, 12))
    units = next(output.shape[1] for output in layer.values())
    keep = torch.ones(units)
    keep[0] = 0
    masks = {
        name: mask_units(model, next(iter(layer)), k) for name, k in (("", keep), (" 2", 1 - keep))
    }
    for name, made in masks.items():
        state, facts = collect_state(made.network)
        known: dict[str, Any] = {"arch": arch, "num_classes": 3, "input_shape": (3, 12, 12)}
        save(tmp_path / f"mask{name}.safetensors", state, mean=[0.5], std=[0.25], **known, **facts)
    retrained = {key: 1.5 * value for key, value in trained_bands.state_dict().items()}
    torch.save(retrained, tmp_path / "hard.pt")
    files = ("mask.safetensors", "mask 2.safetensors", "hard.pt")

    from_files = [
        prepare_defense(Spec("checkpoint", {"file": str(tmp_path / name)}), model) for name in files
    ]

    models = [model, *masks.values(), *(defense.model for defense in from_files)]
    assert len({hash_model(each) for each in models}) == len(models)
    assert len({locate_mask_network(each) for each in models}) == len(models)
    assert len({json.dumps(defense.identity) for defense in from_files}) == len(files)
