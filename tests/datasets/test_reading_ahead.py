"""Images decoded ahead by threads are the same, and so is all that is wrong with them."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import Bands

from robusteval.datasets import keeping
from robusteval.datasets.keeping import KeptData, keep_decoded, read_ahead
from robusteval.datasets.reading_ahead import Found, ReadAhead
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, UsageError
from robusteval.evaluation.evaluate import evaluate, execute
from robusteval.evaluation.plan import prepare_plan
from robusteval.models.classifier import Classifier

N = 12


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve files of three classes; the palettes of some make Pillow remark on them."""
    levels = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3), np.uint8)
    for i, pixels in enumerate(levels):
        folder = tmp_path / "photos" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        if i % 2:
            picture.quantize(8).save(folder / f"{i}.png", transparency=b"\x00\x80\xff")
        else:
            picture.save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def model(trained_bands: Bands) -> Classifier:
    return Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "b"}
    )


def count_readers() -> int:
    return sum(each.name.startswith("robusteval-reader") for each in threading.enumerate())


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("room", [1, 3 * 4 * 12 * 12 * 3, 2**20])
def test_images_have_the_same_bits_and_ids(
    photos: Path, size: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are read ahead, and whatever is asked for in the end."""
    monkeypatch.setattr(keeping, "MOST_AHEAD", room)
    data = open_data(str(photos), size=size)
    expected = data.batch(range(N))
    kept = keep_decoded(data)
    with read_ahead(kept):
        kept.expect([4, 2, 7, 0, 1])
        first = kept.batch([4, 2, 9])
        kept.expect(range(N))
        found = kept.batch(range(N))

    assert found.x.numpy().tobytes() == expected.x.numpy().tobytes()
    assert found.ids.tolist() == expected.ids.tolist()
    assert first.ids.tolist() == expected.ids[[4, 2, 9]].tolist()


def test_a_damaged_file_is_told_where_it_is_asked_for(photos: Path) -> None:
    data = open_data(str(photos))
    broken = Path(data.source.where(3))
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UsageError) as expected:
        data.batch([3])

    kept = keep_decoded(data)
    with read_ahead(kept):
        kept.expect(range(N))
        time.sleep(0.1)
        kept.batch([0, 1, 2])
        with pytest.raises(UsageError) as found:
            kept.batch([3])

    assert str(found.value) == str(expected.value)


def test_filters_of_warnings_are_those_of_the_caller(photos: Path) -> None:
    """Whatever these are: threads change none, and what Pillow remarks there is not heard."""
    kept = keep_decoded(open_data(str(photos)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with read_ahead(kept):
            during = list(warnings.filters)
            kept.expect(range(N))
            for _ in range(200):
                assert list(warnings.filters) == during
            kept.batch(range(N))
        assert list(warnings.filters) == before
    assert not heard


def test_no_more_are_read_than_there_is_room_for() -> None:
    seen: list[int] = []

    def read(position: int) -> Found:
        seen.append(position)
        return np.zeros(1), position

    ahead = ReadAhead(read, 3)
    with ahead.start_threads():
        ahead.expect(range(100))
        time.sleep(0.1)
        assert sorted(seen) == [0, 1, 2]
        for position in range(5):
            ahead.take(position)
        assert len(ahead.under_way) == 3
    assert not ahead.under_way


def test_what_is_no_longer_expected_is_not_read() -> None:
    gate = threading.Event()
    seen: list[int] = []

    def read(position: int) -> Found:
        gate.wait(10)
        seen.append(position)
        return np.zeros(1), position

    ahead = ReadAhead(read, 50)
    with ahead.start_threads():
        ahead.expect(range(50))
        ahead.forget()
        gate.set()
    assert len(seen) <= 8  # those that were begun


def test_a_run_is_the_same_with_threads_and_without(
    photos: Path, model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(str(photos))
    attacks = ["pgd:eps=8/255,steps=2", "noise:tries=1"]
    found = evaluate(model, data, attacks, probes=False, batch_size=5)
    monkeypatch.setattr("robusteval.datasets.image_files.FileSource.in_threads", False)
    expected = evaluate(model, data, attacks, probes=False, batch_size=5)

    assert found.findings == expected.findings
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        for name in one.columns.keys() - {"seconds"}:
            np.testing.assert_array_equal(one.columns[name], other.columns[name])


def test_kept_images_go_with_who_keeps_them(photos: Path) -> None:
    """At once: up to a GiB for each run of a long session."""
    kept = keep_decoded(open_data(str(photos)))
    assert isinstance(kept, KeptData)
    with read_ahead(kept):
        kept.expect(range(N))
        kept.batch(range(N))
    shelf = weakref.ref(kept.shelf)
    gc.disable()
    try:
        del kept
        assert shelf() is None
    finally:
        gc.enable()


def test_threads_end_with_the_run(photos: Path, model: Classifier, tmp_path: Path) -> None:
    """Also with one that is stopped; then what was decoded ahead is forgotten."""
    plan = prepare_plan(model, open_data(str(photos)), ["pgd:eps=8/255,steps=2"], probes=False)
    with pytest.raises(Interrupted):
        execute(plan, tmp_path / "run", batch_size=2, stopping=lambda: count_readers() > 0)

    assert count_readers() == 0
    assert execute(plan, tmp_path / "run").finished


def test_images_in_memory_are_not_read_by_threads() -> None:
    data = open_data("digits")
    with read_ahead(keep_decoded(data)):
        data.expect(range(5))
        assert count_readers() == 0


def test_images_of_a_users_own_data_set_are_read_one_by_one() -> None:
    """It may not stand several threads."""
    data = open_data("digits", size=12)
    kept = keep_decoded(data)
    assert isinstance(kept, KeptData)
    with read_ahead(kept):
        kept.expect(range(5))
        assert not kept.ahead.under_way
