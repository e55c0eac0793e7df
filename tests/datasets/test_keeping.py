"""Images of a run are decoded once, and come back as they were."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import Bands

from robusteval.datasets import keeping
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import build_data
from robusteval.datasets.image_files import FileSource
from robusteval.datasets.keeping import KeptData, Shelf, keep_decoded
from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six files of three classes."""
    levels = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), np.uint8)
    for i, pixels in enumerate(levels):
        folder = tmp_path / "photos" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each file is decoded from now on."""
    counts: Counter[int] = Counter()
    decode = FileSource.decode

    def count(source: FileSource, index: int) -> np.ndarray:
        counts[index] += 1
        return decode(source, index)

    monkeypatch.setattr(FileSource, "decode", count)
    return counts


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_kept_images_have_the_same_bits_and_ids(
    photos: Path, size: int | None, kind: type, decoded: Counter[int]
) -> None:
    """Also those that are none of 256 levels."""
    data = open_data(str(photos), size=size)
    if kind is np.float32:
        arrays = from_arrays(open_data(str(photos)).batch(range(6)).x.numpy() / 3, data.labels)
        data = build_data(arrays.source, size=size)
    kept = keep_decoded(data)
    decoded.clear()

    for index in ([0, 3, 5], [5, 1, 0], [0, 1, 2, 3, 4, 5]):
        expected, found = data.batch(index), kept.batch(index)
        assert found.x.numpy().tobytes() == expected.x.numpy().tobytes()
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.y.tolist() == expected.y.tolist()
    if isinstance(data.source, FileSource):
        assert decoded == {0: 4, 1: 3, 2: 2, 3: 3, 4: 2, 5: 4}  # of which one is to keep it


def test_images_for_which_there_is_no_room_are_read_again(
    photos: Path, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "find_room", lambda: 2 * 12 * 12 * 3)
    data = open_data(str(photos))
    kept = keep_decoded(data)
    decoded.clear()
    kept.batch(range(6))
    found = kept.batch(range(6))

    assert decoded == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 2}
    assert found.ids.tolist() == data.batch(range(6)).ids.tolist()


def test_images_brought_to_another_shape_are_others(photos: Path) -> None:
    """What is kept of the one is none of the other's."""
    kept = keep_decoded(open_data(str(photos), size=9))
    kept.batch(range(6))
    assert kept.fit is not None
    other = replace(kept, fit=kept.fit._replace(interpolation="nearest"))

    assert isinstance(other, KeptData)
    assert other.batch([0]).ids[0] != kept.batch([0]).ids[0]


def test_what_is_in_memory_is_not_kept_twice(photos: Path) -> None:
    data = from_arrays(np.full((2, 12, 12, 3), 9, np.uint8), [0, 1])

    assert keep_decoded(data) is data
    assert type(keep_decoded(keep_decoded(open_data(str(photos))))) is KeptData


def test_a_negative_zero_comes_back_as_one() -> None:
    """It is another content, so another id."""
    shelf, image = Shelf(100), np.array([[[-0.0, 1.0]]], np.float32)
    shelf.put(0, image, 7)
    found = shelf.take(0)

    assert found is not None
    assert (found[0].tobytes(), found[1]) == (image.tobytes(), 7)


def test_a_run_decodes_each_image_once(
    photos: Path, trained_bands: Bands, decoded: Counter[int]
) -> None:
    """However many attacks there are, and to the same numbers."""
    model = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "b"}
    )
    data = open_data(str(photos))
    decoded.clear()
    run = evaluate(model, data, ["noise:tries=1", "noise:tries=2"], probes=False)

    # once for the run, and some where the plan is made, to see what they are
    assert decoded[int(run.clean["index"][5])] == 1
    assert sum(decoded.values()) <= 6 + 4 + 3
    assert run.clean["id"].tolist() == data.batch(run.clean["index"]).ids.tolist()
