"""The detector of a paper under attacks that know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import synthetic, trained

from robusteval.analysis.papers.declaration import Detectors
from robusteval.analysis.papers.evading import Evasion, build_attack
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.defenses import boosting
from robusteval.defenses.detection import fit_unjudged
from robusteval.defenses.detector import MapDetector
from robusteval.errors import UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.classifier import Classifier
from robusteval.progress import Silent

ATTACK = "pgd:eps=24/255,steps=6"
QUICK = "evade:eps=24/255,warmup=2,steps=3,choice=distance"
WANTED = Detectors(
    samples=50,
    interpreters=("grad", "gradcam", "hirescam"),
    attacks={"grad": ATTACK, "hirescam": "fgsm"},
    watching=("grad", "gradcam"),
    evasions={"maps": QUICK, "transfer": f"{QUICK},made_on=other"},
    evaded=6,
)


def test_the_detector_the_attackers_own_and_the_attacks_see_different_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oblivious and adaptive results by their short names; a second call fits nothing again."""
    monkeypatch.setattr(boosting, "ROUNDS", 10)
    model = Classifier(
        trained(), mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    x, y = synthetic(110, 3)
    data = from_arrays(x, y, name="bands")
    written: list[tuple[Path, set[int]]] = []

    def write(wanted: Detectors, images: Data, seed: int, out: Path) -> None:
        attack = prepare_attack(wanted.attacks["grad"], model, images.shape)
        fit_unjudged(model, images, wanted.watching, [attack], extractor="raw", seed=seed).save(out)
        written.append((out, set(images.batch(range(len(images))).ids.tolist())))

    here = tmp_path / "here"
    evasion = Evasion(model, data, here, seed=0)

    def run() -> tuple[dict[str, list[bool]], dict[str, str], set[int]]:
        found, missing = evasion.run_attacks(
            WANTED, write, fresh=False, progress=Silent(), stopping=lambda: False
        )
        assert [each.adaptive for each in found.values()] == [False, True, True]
        ids = set(found["maps"].columns["id"].tolist())
        return {n: o.success().tolist() for n, o in found.items()}, missing, ids

    first, missing, unseen = run()

    assert list(first) == ["grad", "maps", "transfer"]
    assert missing == {}
    (watching, mine), (other, theirs) = written
    assert (len(mine), len(theirs), len(unseen)) == (50, 50, 6)
    assert len(mine | theirs | unseen) == 106
    assert (
        MapDetector.load_file(watching).seen.tolist() != MapDetector.load_file(other).seen.tolist()
    )
    assert run()[0] == first
    assert len(written) == 2

    # a folder may be moved: nothing in it says where it was
    moved = tmp_path / "elsewhere"
    here.rename(moved)
    record = moved / "run" / "run.json"
    cells = json.loads(record.read_text())["cells"]
    evasion = Evasion(model, data, moved, seed=0)
    assert run()[0] == first
    assert len(written) == 2
    assert json.loads(record.read_text())["cells"] == cells
    assert str(tmp_path) not in record.read_text()


def test_detectors_of_other_weights_are_not_used_again(tmp_path: Path) -> None:
    """By what is in the file, whatever it is called."""
    x, y = synthetic(106, 3)
    model = Classifier(trained(), num_classes=3)
    data, weights = from_arrays(x, y), tmp_path / "vgg.pth"
    written: list[Path] = []

    def write(wanted: Detectors, images: Data, seed: int, out: Path) -> None:
        out.write_bytes(b"")
        written.append(out)

    def count_written(start: Path | None) -> int:
        before = len(written)
        evasion = Evasion(model, data, tmp_path / "vgg16", 0, start)
        with pytest.raises(UsageError, match=r"watching\.safetensors"):  # as it is empty
            evasion.run_attacks(
                WANTED, write, fresh=False, progress=Silent(), stopping=lambda: False
            )
        return len(written) - before

    weights.write_bytes(b"some")
    assert [count_written(start) for start in (None, weights, None, weights)] == [2, 2, 0, 0]
    weights.write_bytes(b"others")
    assert [count_written(weights) for _ in range(2)] == [2, 0]
    weights.write_bytes(b"some")
    assert count_written(weights) == 0
    with pytest.raises(UsageError, match=r"no\.pth cannot be read"):
        Evasion(model, data, tmp_path, 0, tmp_path / "no.pth").choose_folder()


def test_too_few_images_for_three_parts_are_said() -> None:
    x, y = synthetic(105, 3)
    model = Classifier(trained(), num_classes=3)
    with pytest.raises(UsageError, match=r"105 images are too few .* give at least 106"):
        Evasion(model, from_arrays(x, y), Path(), 0).split_images(WANTED)


def test_the_attackers_own_detector_is_named_by_its_path() -> None:
    path = Path("a,b") / "other.safetensors"
    assert build_attack(f"{QUICK},made_on=other", path).parameters["made_on"] == str(path)
    assert "made_on" not in build_attack(QUICK, path).parameters
