"""The images that are kept of a cell, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.datasets.sources import open_data
from robusteval.errors import RunError
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.gallery import SPARE, Gallery, measure_hardness
from robusteval.models.classifier import Classifier
from robusteval.runs.folder import load_pictures, load_run
from robusteval.runs.types import Threat

RNG = np.random.default_rng(0)
HARD = RNG.permutation(100).astype(np.float64)
IDS = RNG.integers(0, 2**63, 100).astype(np.uint64)
IMAGES = RNG.integers(0, 256, (100, 4, 5, 3)).astype(np.uint8)
CHANGES = RNG.normal(0, 0.01, (100, 4, 5, 3)).astype(np.float32)


def offered(batches: list[np.ndarray[Any, Any]], hard: np.ndarray[Any, Any] = HARD) -> Gallery:
    gallery = Gallery({})
    for rows in batches:
        gallery.offer(rows, IDS[rows], hard[rows], images_of(rows))
    return gallery


def images_of(rows: np.ndarray[Any, Any]) -> Any:
    return lambda some: (IMAGES[rows[some]], CHANGES[rows[some]])


def test_the_easiest_and_the_hardest_are_exact_and_the_median_is_near() -> None:
    easiest, median, hardest = offered([np.arange(100)]).choose_pictures(HARD)

    assert [p.place for p in (easiest, median, hardest)] == ["easiest", "median", "hardest"]
    assert (HARD[easiest.row], HARD[hardest.row]) == (0, 99)
    assert 20 < HARD[median.row] < 80
    assert np.array_equal(median.clean, IMAGES[median.row])
    assert np.allclose(median.delta, CHANGES[median.row], rtol=1e-3)


def test_batches_and_their_order_do_not_matter() -> None:
    whole = offered([np.arange(100)]).choose_pictures(HARD)

    for batches in ([np.arange(50, 100), np.arange(50)], np.array_split(np.arange(100), 33)):
        pictures = offered(list(batches)).choose_pictures(HARD)
        assert [(p.place, p.row) for p in pictures] == [(p.place, p.row) for p in whole]


def test_an_offer_that_is_made_twice_changes_nothing() -> None:
    """So a batch that is computed again after a kill does no harm."""
    gallery = offered([np.arange(100), np.arange(30, 70)])

    rows = gallery.candidates["row"].tolist()

    assert len(rows) == len(set(rows)) <= SPARE + 2


def test_maps_go_with_their_images() -> None:
    """Whatever the batches; half precision is enough to look at."""
    maps = {"benign:cam": RNG.random((100, 3, 3)), "changed:cam": RNG.random((100, 3, 3))}
    found = []
    for batches in ([np.arange(100)], np.array_split(np.arange(100), 9)):
        gallery = Gallery({})
        for rows in batches:
            some = {name: values[rows] for name, values in maps.items()}
            gallery.offer(rows, IDS[rows], HARD[rows], images_of(rows), some)
        found.append(gallery.choose_pictures(HARD))

    for one, other in zip(*found, strict=True):
        assert one.row == other.row
        for picture in (one, other):
            benign, changed = picture.maps["cam"]
            assert benign == pytest.approx(maps["benign:cam"][one.row], abs=1e-3)
            assert changed == pytest.approx(maps["changed:cam"][one.row], abs=1e-3)


def test_few_images_give_few_pictures() -> None:
    for n, places in ((0, []), (1, ["easiest"]), (2, ["easiest", "hardest"])):
        rows = np.arange(n)
        assert [p.place for p in offered([rows] if n else []).choose_pictures(HARD[:n])] == places


def test_images_that_withstood_are_hardest() -> None:
    """However far the attack went: a failure has no distance."""
    columns = {
        "margin_adv": np.array([-1.0, 2.0, -3.0]),
        "l0": np.array([4.0, 1.0, 2.0]),
        "ssim": np.array([0.9, 1.0, 0.8]),
        "l2": np.array([1.0, 1.0, 3.0]),
        "pred_adv": np.array([3, 0, 5]),
        "target": np.array([3, 3, 3]),
    }

    assert measure_hardness(columns, Threat("l0", None, False)).tolist() == [4, np.inf, 2]
    assert measure_hardness(columns, Threat("l0", None, True)).tolist() == [4, np.inf, np.inf]
    assert measure_hardness(columns, Threat("ssim", None, False)) == pytest.approx(
        [0.1, np.inf, 0.2]
    )
    assert measure_hardness(columns, Threat("odd", None, False)).tolist() == [1, np.inf, 3]
    assert measure_hardness(columns, Threat("linf", 0.1, False)).tolist() == [-1, 2, -3]


def test_a_run_keeps_pictures_of_its_attacks_and_not_of_probes(
    bands: Classifier, npz: Path, tmp_path: Path
) -> None:
    """The same for any batch size."""
    data = open_data(str(npz))
    found = []
    for size in (None, 7):
        out = tmp_path / str(size)
        evaluate(bands, data, ["fgsm:eps=12/255", "noise"], out=out, batch_size=size)
        run = load_run(out)
        pictures = load_pictures(run)
        assert sorted(pictures) == [i for i, o in enumerate(run.outcomes) if o.role == "attack"]
        found.append(pictures)

    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert (one.place, one.row) == (other.place, other.row)
        assert np.array_equal(one.clean, other.clean)
        assert np.array_equal(one.delta, other.delta)
    picture = found[0][0][0]
    columns = run.outcomes[0].columns
    assert picture.clean.shape == picture.delta.shape == (12, 12, 3)
    assert np.abs(picture.delta).max() == pytest.approx(columns["linf"][picture.row], rel=1e-3)
    assert columns["margin_adv"][picture.row] == columns["margin_adv"][columns["attacked"]].min()


def test_pictures_that_were_changed_are_refused(
    bands: Classifier, npz: Path, tmp_path: Path
) -> None:
    evaluate(bands, open_data(str(npz)), ["fgsm"], out=tmp_path, probes=False)
    (file,) = (tmp_path / "pictures").glob("*.npz")
    file.write_bytes(file.read_bytes() + b"x")

    with pytest.raises(RunError, match="changed after the run"):
        load_pictures(load_run(tmp_path))


def test_a_run_that_was_kept_nowhere_has_no_pictures(bands: Classifier, npz: Path) -> None:
    assert load_pictures(evaluate(bands, open_data(str(npz)), ["noise"], probes=False)) == {}
