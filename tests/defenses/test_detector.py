"""Fitting a detector, its file, and what it says of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from toys import Bands, synthetic, trained

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.defenses import (
    boosting,
    detector_fitting,
    detector_report,
    image_variants,
    map_features,
    map_rows,
    splits,
)
from robusteval.defenses.boosting import TreeSettings, choose_threshold
from robusteval.defenses.detection import FittedDetector, fit_detector
from robusteval.defenses.detector import (
    BOOSTER,
    NOTES,
    MapDetector,
    attach_detector,
)
from robusteval.defenses.detector_fitting import fit_task, weigh_rows
from robusteval.defenses.detector_metrics import (
    Resampling,
    Scored,
    judge_scores,
    measure_calibration,
)
from robusteval.defenses.detector_remarks import write_remarks
from robusteval.defenses.detector_report import DetectorReport
from robusteval.defenses.detector_view import choose_view
from robusteval.defenses.image_variants import VariantMaker
from robusteval.defenses.leak_tests import LeakTests
from robusteval.defenses.map_rows import RowMaker, Rows, allocate_stacks
from robusteval.defenses.splits import Sources, group_alike, read_sources, split_groups
from robusteval.defenses.study import Study
from robusteval.defenses.transforms import compress_jpeg, crop_and_enlarge, from_bytes, to_bytes
from robusteval.errors import UsageError
from robusteval.evaluation.defense import WithDetector, prepare_defense
from robusteval.evaluation.defense_files import is_detector
from robusteval.evaluation.perturbing import perturb
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.identity import hash_answers, hash_model
from robusteval.models.seeds import sample_seeds
from robusteval.models.steps import count_passes
from robusteval.models.weights import CHECKSUM, compute_checksum, split_safetensors
from robusteval.progress import Silent
from robusteval.runs.detector_record import DetectorRecord, Estimate
from robusteval.runs.plain import from_plain, to_plain
from robusteval.search.balls import quantise

PGD = "pgd:eps=24/255,steps=8"
NOISE = "noise:eps=12/255,tries=1"
INTERPRETERS = ("grad", "gradcam")


def classifier(network: Bands | None = None, sha256: str = "bands") -> Classifier:
    """The network for bands, trained if none is given."""
    return Classifier(
        network or trained(),
        mean=(0.5,),
        std=(0.25,),
        num_classes=3,
        identity={"sha256": sha256},
    ).eval()


def images(n: int, seed: int) -> Data:
    """Bands, some of them twice."""
    x, y = synthetic(n, seed)
    x[-5:], y[-5:] = x[:5], y[:5]
    return from_arrays(x, y, name="bands")


def fit(
    model: Classifier, data: Data, attacks: tuple[str, ...] = (PGD,), **given: Any
) -> FittedDetector:
    """A detector of the results of some attacks."""
    built = [prepare_attack(spec, model, data.shape) for spec in attacks]
    names = given.pop("interpreters", INTERPRETERS)
    return fit_detector(model, data, names, built, **{"extractor": "raw", **given})


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Less of what takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "FOLDS", 3)
        patch.setattr(boosting, "ROUNDS", 40)
        train = map_features.train_extractor
        patch.setattr(
            detector_fitting,
            "train_extractor",
            lambda *a, **more: train(*a, **{**more, "epochs": 2}),
        )
        yield


class Kept:
    """One fit with everything it was made from."""

    rows: Rows
    sources: Sources
    judgement: DetectorReport


@pytest.fixture(scope="module")
def model() -> Classifier:
    return classifier()


@pytest.fixture(scope="module")
def kept(model: Classifier) -> tuple[FittedDetector, Kept]:
    """A fit in two rounds of cross-validation, and what it saw."""
    seen = Kept()
    fill_rows, judge_detector = RowMaker.fill_rows, DetectorReport.judge_detector

    def filling(self: RowMaker, stacks: np.ndarray[Any, Any]) -> Rows:
        seen.sources, seen.rows = self.sources, fill_rows(self, stacks)
        return seen.rows

    def judging(self: DetectorReport) -> Any:
        seen.judgement = self
        return judge_detector(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowMaker, "fill_rows", filling)
        patch.setattr(DetectorReport, "judge_detector", judging)
        found = fit(model, images(150, seed=1), (PGD, "pgd:eps=2,steps=8,norm=l2"))
    return found, seen


@pytest.fixture(scope="module")
def found(kept: tuple[FittedDetector, Kept]) -> FittedDetector:
    return kept[0]


class Counted:
    """The pieces of work that fits do, by name; KeyboardInterrupt after so many."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int = -1) -> None:
        self.names: list[str] = []
        self.most = most
        patch.setattr(Study, "batch", 16)
        patch.setattr(VariantMaker, "perturb_rows", self.count("attack", VariantMaker.perturb_rows))
        patch.setattr(RowMaker, "look_at_rows", self.count("maps", RowMaker.look_at_rows))
        patch.setattr(detector_fitting, "fit_task", self.count("fit", fit_task))

    def count(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            if len(self.names) == self.most:
                raise KeyboardInterrupt
            self.names.append(name)
            return work(*given, **more)

        return counted


@pytest.fixture(scope="module")
def fit_whole(model: Classifier) -> Callable[[str], tuple[FittedDetector, list[str]]]:
    """Fits once with each extractor, in one go; with the pieces of work that this took."""

    @cache
    def fit_once(extractor: str) -> tuple[FittedDetector, list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            work = Counted(patch)
            return fit(model, images(60, seed=2), extractor=extractor), sorted(work.names)

    return fit_once


@pytest.mark.parametrize(
    ("extractor", "batches"), [("raw", 1), ("raw", 4), ("raw", 9), ("small_cnn", 35)]
)
def test_fit_that_was_stopped_goes_on_to_the_same_detector(
    model: Classifier,
    fit_whole: Callable[[str], tuple[FittedDetector, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extractor: str,
    batches: int,
) -> None:
    """In the attack, between maps or fits; nothing that was finished is done again."""
    whole, pieces = fit_whole(extractor)
    work = Counted(monkeypatch, most=batches)
    run = partial(fit, model, images(60, seed=2), extractor=extractor)

    with pytest.raises(KeyboardInterrupt):
        run(done=WorkCache(tmp_path))
    assert len(work.names) == batches
    work.most = -1
    again = run(done=WorkCache(tmp_path))

    assert sorted(work.names) == pieces
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    whole.detector.save(one)
    again.detector.save(other)
    assert one.read_bytes() == other.read_bytes()
    assert replace(again.report, cost=whole.report.cost) == whole.report  # which is measured


def test_what_is_finished_is_used_by_the_same_fit_alone(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(60, seed=2)
    fit(model, data, done=WorkCache(tmp_path))
    Counted(monkeypatch, most=0)

    fit(model, data, done=WorkCache(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, seed=1, done=WorkCache(tmp_path))


@pytest.fixture
def file(found: FittedDetector, tmp_path: Path) -> Path:
    path = tmp_path / "detector.safetensors"
    found.detector.save(path)
    return path


def test_trees_are_chosen_by_what_does_best_where_images_stay_whole(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all other fits grow alike."""
    worst, best = TreeSettings(1, 0.01, 0.1), TreeSettings(2, 0.3, 1.0)
    monkeypatch.setattr(detector_fitting, "GRID", (worst, best))
    monkeypatch.setattr(detector_report, "GRID", (worst, best))
    areas = {worst: 0.6, best: 0.7}
    monkeypatch.setattr(detector_fitting, "cross_validate_trees", lambda *given: areas[given[-1]])

    chosen = fit(model, images(60, seed=2), tune=True)

    trees = chosen.report.trees
    assert (trees.depth, trees.rate, trees.columns) == best
    assert [each.auc for each in trees.tried] == [0.6, 0.7]
    assert chosen.detector.trees.depth <= 2


def test_parts_share_no_source_image(kept: tuple[FittedDetector, Kept]) -> None:
    judgement, rows = kept[1].judgement, kept[1].rows

    sets = [
        set(judgement.tasks.select_within(np.arange(len(rows.group)), p))
        for p in judgement.tasks.parts[:3]
    ]
    images_in = [set(rows.image[list(part)]) for part in sets]

    assert not images_in[0] & images_in[1]
    assert not images_in[0] & images_in[2]
    assert not images_in[1] & images_in[2]
    assert sum(map(len, sets)) == len(rows.group)


def test_attacked_image_stays_with_the_one_it_was_made_of(
    kept: tuple[FittedDetector, Kept],
) -> None:
    rows = kept[1].rows

    for image in np.unique(rows.image):
        assert len(np.unique(rows.group[rows.image == image])) == 1
    assert set(rows.image[rows.fooled]) <= set(rows.image[rows.list_variants("clean")])


def test_copies_of_an_image_are_one_group(kept: tuple[FittedDetector, Kept]) -> None:
    sources = kept[1].sources

    counts = np.unique(sources.groups, return_counts=True)[1]

    assert (counts == 2).sum() == 5
    assert len(counts) == 145
    assert kept[0].report.images.alike == 5


def test_near_copies_are_one_group() -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[4] = (x[1] + 0.004).clamp(0, 1)

    groups = group_alike(x, np.arange(6, dtype=np.uint64))

    assert groups[4] == groups[1]
    assert len(np.unique(groups)) == 5


def test_both_labels_and_all_attacks_weigh_the_same(kept: tuple[FittedDetector, Kept]) -> None:
    rows, judgement = kept[1].rows, kept[1].judgement
    negatives, positives = (
        rows.list_variants("clean", "noise", "jpeg"),
        judgement.tasks.select_hits(judgement.attacks),
    )

    weights = weigh_rows(rows, negatives, positives)

    assert weights[negatives].sum() == pytest.approx(weights[positives].sum())
    assert weights[rows.list_variants("clean")].sum() == pytest.approx(
        weights[rows.list_variants("noise", "jpeg")].sum()
    )
    each = [weights[judgement.tasks.select_hits([name])].sum() for name in judgement.attacks]
    assert each[0] == pytest.approx(each[1])
    both = np.concatenate([negatives, positives])
    assert weights[both].mean() == pytest.approx(1)


def test_maps_are_those_of_images_of_8_bits_and_the_predicted_class(
    kept: tuple[FittedDetector, Kept], model: Classifier
) -> None:
    rows, sources = kept[1].rows, kept[1].sources
    x = sources.x[:8]

    stack, statistics = kept[0].detector.view.measure_maps(
        *kept[0].detector.view.compute_maps(model, x, torch.zeros(8, dtype=torch.int64))
    )

    assert torch.equal(quantise(x), x)
    np.testing.assert_array_equal(rows.stacks[:8], stack.numpy())
    np.testing.assert_array_equal(rows.statistics[:8], statistics.numpy())
    np.testing.assert_array_equal(
        rows.right[:8], (predict_classes(model(x)) == sources.labels[:8]).numpy()
    )


def test_scores_while_fitting_are_those_of_the_file(
    kept: tuple[FittedDetector, Kept], file: Path, model: Classifier
) -> None:
    loaded = MapDetector.load_file(file)
    clean = kept[1].rows.list_variants("clean")[:20]
    made = kept[1].judgement.fitter.fit_once(
        kept[1].judgement.tasks.make_attack_task(kept[1].judgement.attacks)
    )

    scores = loaded.score(model, kept[1].sources.x[:20], torch.zeros(20, dtype=torch.int64))

    assert made.booster == loaded.booster
    np.testing.assert_array_equal(scores.numpy(), made.predict_scores(kept[1].rows, clean))


def test_thresholds_hold_on_the_images_that_set_them(kept: tuple[FittedDetector, Kept]) -> None:
    detector, judgement = kept[0].detector, kept[1].judgement
    made = judgement.fitter.fit_once(judgement.tasks.make_attack_task(judgement.attacks))

    benign = made.predict_scores(
        kept[1].rows,
        judgement.tasks.select_within(
            kept[1].rows.list_variants("clean"), judgement.tasks.parts.validation
        ),
    )

    for fpr, threshold in detector.fit.thresholds.items():
        assert threshold == choose_threshold(benign, float(fpr))
        assert (benign > threshold).mean() <= float(fpr)


def test_detector_finds_attacks_and_nothing_where_there_is_nothing(found: FittedDetector) -> None:
    report = found.report

    assert report.headline.auc.value > 0.7
    for leak in (report.leaks.shuffled, report.leaks.benign):
        assert leak.low < 0.5 < leak.high
        assert 0.35 < leak.value < 0.65


def test_report_is_json_and_complete(found: FittedDetector) -> None:
    report = json.loads(json.dumps(to_plain(found.report), allow_nan=False))

    assert [each["kind"] for each in report["negatives"]] == [
        "clean",
        "clean, predicted wrongly",
        "noise",
        "jpeg",
        "blur",
        "crop",
    ]
    assert [row["fitted_on"] for row in report["matrix"]] == [
        *(each["attack"] for each in report["per_attack"]),
        None,
    ]
    assert all(len(row["judged_on"]) == 2 for row in report["matrix"])
    assert len(report["baselines"]) == 3
    assert [each["name"] for each in report["simpler"]] == ["grad", "gradcam"]
    assert report["cost"]["forwards"] >= 4
    assert 0.5 < report["imitation"] <= 1
    assert sum(report["images"][name] for name in ("train", "validation", "test")) == 150


def test_identical_maps_of_both_labels_cannot_be_told_apart(
    kept: tuple[FittedDetector, Kept],
) -> None:
    rows, judgement = kept[1].rows, kept[1].judgement
    clean, hits = rows.list_variants("clean"), judgement.tasks.select_hits(judgement.attacks[:1])
    twins = clean[np.isin(rows.image[clean], rows.image[hits])]
    stacks, statistics = rows.stacks.copy(), rows.statistics.copy()
    stacks[hits], statistics[hits] = stacks[twins], statistics[twins]
    copied = rows._replace(stacks=stacks, statistics=statistics)
    same = LeakTests(
        replace(judgement.tasks, rows=copied),
        replace(judgement.fitter, rows=copied),
        judgement.attacks,
        judgement.ids,
        judgement.resampling,
        judgement.seed,
    )

    area = same.cross_validate(twins, hits)

    assert area.value == pytest.approx(0.5, abs=0.05)


def test_fit_with_the_same_seed_is_the_same(
    kept: tuple[FittedDetector, Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, judgement = kept[1].rows, kept[1].judgement
    fitter = replace(judgement.fitter, kind="small_cnn")
    monkeypatch.setattr(detector_fitting, "fit_task", partial(fit_task, epochs=2))
    task = judgement.tasks.make_attack_task(judgement.attacks)

    one, other = (fitter.fit_once(task) for _ in range(2))

    some = rows.list_variants("clean")
    assert one.booster == other.booster
    np.testing.assert_array_equal(one.predict_scores(rows, some), other.predict_scores(rows, some))


def test_file_holds_all_that_the_detector_knows(found: FittedDetector, file: Path) -> None:
    loaded = MapDetector.load_file(file)

    assert is_detector(file)
    assert loaded.view == found.detector.view
    assert loaded.fit == found.detector.fit
    assert loaded.booster == found.detector.booster
    np.testing.assert_array_equal(loaded.seen, found.detector.seen)
    assert loaded.seen.dtype == np.uint64
    assert loaded.imitator is not None
    assert found.detector.imitator is not None
    mine = found.detector.imitator.state_dict()
    assert all(torch.equal(mine[name], v) for name, v in loaded.imitator.state_dict().items())
    assert len(loaded.seen) == round(145 * 0.8)
    assert loaded.facts["fpr"] == 0.05
    assert json.loads(json.dumps(loaded.facts)) == loaded.facts


def test_other_files_are_no_detectors(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, weights)

    assert not is_detector(weights)
    with pytest.raises(UsageError, match="is no detector"):
        MapDetector.load_file(weights)
    with pytest.raises(UsageError, match="there is no file"):
        MapDetector.load_file(tmp_path / "nothing.safetensors")


def test_every_changed_byte_is_noticed(file: Path) -> None:
    raw = file.read_bytes()
    for place in np.linspace(9, len(raw) - 1, 40).astype(int):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(UsageError, match=r"damaged|no detector|version"):
            MapDetector.load_file(file)
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UsageError, match=r"damaged|no detector"):
        MapDetector.load_file(file)


def rewritten(raw: bytes, settings: Callable[[Any], None], tensors: Callable[[Any], None]) -> bytes:
    """The file with other contents and a checksum that fits them."""
    header, _ = split_safetensors(raw)
    notes = header["__metadata__"]
    facts = json.loads(notes[NOTES])
    settings(facts)
    state = safetensors.torch.load(raw)
    tensors(state)
    made, body = split_safetensors(safetensors.torch.save(state))
    made["__metadata__"] = {NOTES: json.dumps(facts), BOOSTER: notes[BOOSTER]}
    made["__metadata__"][CHECKSUM] = compute_checksum(made, body)
    text = json.dumps(made).encode()
    return len(text).to_bytes(8, "little") + text + body


def same(_: Any) -> None:
    """Change nothing."""


def put(path: str, value: Any, facts: Any) -> None:
    *way, last = [path] if path in facts or path.startswith("extractor") else path.split(".")
    for step in way:
        facts = facts[step]
    facts[last] = value


SETTINGS = [
    ("view.channels", "triple"),
    ("view.channels", 7),
    ("view.extractor", "os.system"),
    ("view.extractor", "small_cnn"),
    ("view.side", 10**9),
    ("view.interpreters", ["grad", "nothing"]),
    ("view.interpreters", ["grad"]),
    ("view.shape", [3, 12]),
    ("fit.thresholds", {"0.05": 0.5}),
    ("fit.thresholds", {"0.05": 0.5, "0.01": float("inf")}),
    ("fit.forwards", "many"),
    ("fit.surplus", 1),
    ("fit", None),
]


@pytest.mark.parametrize(("path", "value"), SETTINGS)
def test_settings_that_make_no_sense_are_refused(file: Path, path: str, value: Any) -> None:
    file.write_bytes(rewritten(file.read_bytes(), partial(put, path, value), same))

    with pytest.raises(UsageError):
        MapDetector.load_file(file)


TENSORS = [
    ("center", torch.zeros(3)),
    ("center", torch.full((530,), torch.nan)),
    ("spread", torch.zeros(530)),
    ("extractor.std", torch.zeros(2, 1, 1)),
    ("extractor.mean", torch.zeros(5, 1, 1)),
    ("extractor.more", torch.zeros(1)),
    ("seen", torch.zeros(2, 2, dtype=torch.int64)),
]


@pytest.mark.parametrize(("name", "value"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(file: Path, name: str, value: torch.Tensor) -> None:
    file.write_bytes(rewritten(file.read_bytes(), same, partial(put, name, value)))

    with pytest.raises(UsageError, match="damaged"):
        MapDetector.load_file(file)


def test_file_written_anew_with_the_same_contents_is_read(file: Path) -> None:
    """So the tests above fail for what they change alone."""
    file.write_bytes(rewritten(file.read_bytes(), same, same))

    assert len(MapDetector.load_file(file).center) == 530


def test_file_of_another_version_is_refused(file: Path) -> None:
    file.write_bytes(rewritten(file.read_bytes(), partial(put, "format", 99), same))

    with pytest.raises(UsageError, match="another version"):
        MapDetector.load_file(file)


def test_detector_of_another_model_is_refused(file: Path, trained_bands: Bands) -> None:
    with pytest.raises(UsageError, match="for another model"):
        attach_detector(classifier(trained_bands, sha256="other"), file=str(file))
    renormalised = Classifier(
        trained_bands, mean=(0.4,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    )
    with pytest.raises(UsageError, match="for another model"):
        attach_detector(renormalised, file=str(file))


def test_detector_needs_a_file_and_a_known_rate(file: Path, model: Classifier) -> None:
    with pytest.raises(ValueError, match="say which file"):
        attach_detector(model)
    with pytest.raises(ValueError, match=r"fpr must be 0\.05 or 0\.01, not 0\.2"):
        attach_detector(model, file=str(file), fpr=0.2)


def test_file_is_a_defense(file: Path, model: Classifier) -> None:
    made = prepare_defense(str(file), model)
    strict = prepare_defense(f"detector:file={file},fpr=0.01", model)

    assert made.detector is not None
    assert made.facts["threshold"] <= strict.facts["threshold"]
    assert strict.facts["fpr"] == 0.01
    assert len(made.facts["sha256"]) == 64


def test_files_without_an_imitator_are_read_and_have_none_to_follow(
    found: FittedDetector, model: Classifier, tmp_path: Path
) -> None:
    """As those are that were written before there was one."""
    old = tmp_path / "old.safetensors"
    replace(found.detector, imitator=None).save(old)
    guarded = attach_detector(model, file=str(old))

    assert MapDetector.load_file(old).imitate_odds is None
    with pytest.raises(UsageError, match="no stand-in of its score for imitation"):
        prepare_attack("evade:along=imitation", guarded, (3, 12, 12))


def test_an_attack_made_on_another_detector_is_the_attack_on_that_one(
    found: FittedDetector, file: Path, model: Classifier, tmp_path: Path
) -> None:
    """To the bit, and of the one that watches nothing is asked; what counts is the content."""
    other = tmp_path / "other.safetensors"
    contrary = deepcopy(found.detector.imitator)
    assert contrary is not None
    contrary.last.weight.neg_()
    replace(found.detector, imitator=contrary).save(other)
    watching, followed = (attach_detector(model, file=str(each)) for each in (file, other))
    assert isinstance(watching, WithDetector)
    assert isinstance(followed, WithDetector)
    batch = images(30, seed=3).batch(range(6))
    seeds = sample_seeds(0, batch.ids)

    spent = []

    def make(text: str, target: Classifier) -> tuple[torch.Tensor, dict[str, Any]]:
        steps = "eps=24/255,warmup=4,steps=6,along=imitation"
        attack = prepare_attack(f"evade:{steps}{text}", target, (3, 12, 12))
        with count_passes(target, 6, batch.x.device) as passes:
            made = attack.perturb(target, batch.x, batch.y, seeds=seeds)
        spent.append((passes.forwards.tolist(), passes.backwards.tolist()))
        return made, attack.resolved

    made, resolved = make(f",made_on={other}", watching)

    assert torch.equal(made, make("", followed)[0])
    assert watching.detector is not followed.detector
    (forwards, backwards), plain = spent[0], spent[1]
    assert backwards == plain[1]
    assert forwards == [each + 1 for each in plain[0]]  # to see that nothing stands before
    assert not torch.equal(made, make("", watching)[0])
    assert resolved["made_on"] == f"sha256:{hashlib.sha256(other.read_bytes()).hexdigest()}"
    with pytest.raises(UsageError, match="there is no file"):
        make(f",made_on={tmp_path / 'none.safetensors'}", watching)


def test_detector_does_not_share_the_identity_of_its_model(file: Path, model: Classifier) -> None:
    guarded = attach_detector(model, file=str(file))
    strict = attach_detector(model, file=str(file), fpr=0.01)

    assert len({hash_model(each) for each in (model, guarded, strict)}) == 3
    assert hash_answers(guarded) == hash_answers(model)  # so its maps are still those of the fit
    json.dumps(guarded.identity)


def test_scores_do_not_depend_on_the_batch(file: Path, model: Classifier) -> None:
    guarded = attach_detector(model, file=str(file))
    assert isinstance(guarded, WithDetector)
    batch = images(30, seed=3).batch(range(30))
    seeds = sample_seeds(0, batch.ids)
    order = torch.from_numpy(np.random.default_rng(0).permutation(30))
    score = partial(guarded.detector.score, guarded)

    whole = score(batch.x, seeds)

    assert whole.dtype == torch.float64
    assert bool(((whole > 0) & (whole < 1)).all())
    assert torch.equal(score(batch.x[order], seeds[order]), whole[order])
    alone = torch.cat([score(batch.x[i : i + 1], seeds[i : i + 1]) for i in range(30)])
    assert torch.equal(alone, whole)
    assert len(score(batch.x[:0], seeds[:0])) == 0


def test_scores_are_those_of_rounded_images(file: Path, model: Classifier) -> None:
    guarded = attach_detector(model, file=str(file))
    assert isinstance(guarded, WithDetector)
    x = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    seeds = torch.zeros(6, dtype=torch.int64)

    scores = guarded.detector.score(guarded, x, seeds)

    assert torch.equal(scores, guarded.detector.score(guarded, quantise(x), seeds))


def test_features_are_on_the_graph_and_decide_the_score(file: Path, model: Classifier) -> None:
    guarded = attach_detector(model, file=str(file))
    assert isinstance(guarded, WithDetector)
    found = MapDetector.load_file(file)
    x = images(5, seed=4).batch(range(5)).x
    x, seeds = quantise(x).requires_grad_(), torch.zeros(5, dtype=torch.int64)
    logits = model(x)
    y = predict_classes(logits)

    maps = [each.trace_maps(model, x, y, seeds)[0] for each in found.explainers]
    features = found.features(model, maps, logits)
    (grad,) = torch.autograd.grad(features.square().sum(), x)

    assert features.shape == (5, 530)
    assert bool(grad.isfinite().all())
    assert bool((grad != 0).flatten(1).any(1).all())
    expected = found.score(model, x.detach(), seeds)
    # an interpreter may use other slopes on the graph, the values are the same up to rounding
    scores = found.trees.predict_scores(features.detach().numpy())
    np.testing.assert_allclose(scores, expected.numpy(), atol=0.05)


def test_confidence_is_looked_at_only_when_asked_for(found: FittedDetector) -> None:
    view = found.detector.view
    sure = replace(view, confidence=True)
    maps = [torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    logits = torch.tensor([[0.0, 0, 0], [1, 4, 2], [9, 0, 0]])

    without, given = (each.measure_maps(maps, logits)[1] for each in (view, sure))

    assert torch.equal(given[:, :-2], without)
    torch.testing.assert_close(given[:, -2], logits.softmax(1).amax(1))
    assert given[:, -1].tolist() == [0, 2, 9]
    assert sure.statistic_names == [
        *view.statistic_names,
        "probability of the class",
        "margin of the class",
    ]
    assert sure.feature_count == view.feature_count + 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"samples": 20}, "20 images cannot be parted"),
        ({"attacks": ()}, "at least one attack"),
        ({"attacks": (PGD, PGD)}, "asked for twice"),
        ({"attacks": (NOISE,)}, "succeeds on"),
        ({"interpreters": ("grad",)}, "two or three"),
        ({"interpreters": ("grad", "grad")}, "different ones"),
        ({"interpreters": ("grad", "nothing")}, "unknown interpreter"),
        ({"interpreters": ("grad", "guided_backprop")}, "no derivative"),
        ({"interpreters": ("grad", "cam")}, "cam"),
        ({"interpreters": ("grad", "rts")}, "no mask network"),
        ({"channels": "triple"}, "made of 3 maps"),
        ({"extractor": "vgg16"}, "needs VGG-16"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    model: Classifier, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        fit(model, images(60, seed=1), **given)


def test_images_of_one_class_are_refused(model: Classifier) -> None:
    x, y = synthetic(200, 0)
    data = from_arrays(x[y == 1], y[y == 1], name="middles")

    with pytest.raises(UsageError, match="of one class"):
        fit(model, data)


def test_targeted_attacks_succeed_where_the_class_is_reached(model: Classifier) -> None:
    data = images(100, seed=2)
    attack = prepare_attack("pgd:eps=64/255,steps=8,targeted=true", model, data.shape)
    view = choose_view(INTERPRETERS, None, "raw", False, data.shape)
    study = Study(model, data, view, [attack], 0)
    with frozen(model):
        sources = read_sources(model, data, 100, 0, study.batch, Silent())
        maker = VariantMaker(study, sources, split_groups(sources, 0))
        with RowMaker(study, sources, list(maker.make_variants())).make_rows() as rows:
            mine = rows.list_variants(str(attack.spec))
            goal = study.choose_goals(attack, sources, rows.image[mine])
            attacked = maker.attack_images(attack, rows.image[mine])
            answers = study.predict_classes(from_bytes(attacked.images))

    assert (goal != sources.labels.numpy()[rows.image[mine]]).all()
    np.testing.assert_array_equal(rows.fooled[mine], answers.numpy() == goal)
    assert 0 < rows.fooled.sum() <= len(mine)


def test_large_stacks_go_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_rows, "IN_MEMORY", 100)

    with allocate_stacks((3, 4, 5)) as stacks:
        assert isinstance(stacks, np.memmap)
        stacks[:] = 7
        assert stacks.sum() == 7 * 60
    with allocate_stacks((2, 3)) as stacks:
        assert not isinstance(stacks, np.memmap)


def test_work_is_halved_until_it_fits_into_memory(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(60, seed=2)
    whole = fit(model, data)
    look, sizes = RowMaker.look_at_rows, []

    def short_attack(*given: Any, **more: Any) -> Any:
        sizes.append(len(given[2]))
        if len(given[2]) > 9:
            raise RuntimeError("out of memory")
        return perturb(*given, **more)

    def short_look(self: RowMaker, rows: Rows, some: np.ndarray[Any, Any]) -> Any:
        sizes.append(len(some))
        if len(some) > 9:
            raise MemoryError
        return look(self, rows, some)

    monkeypatch.setattr(image_variants, "perturb", short_attack)
    monkeypatch.setattr(RowMaker, "look_at_rows", short_look)
    found = fit(model, data)

    assert found.detector.booster == whole.detector.booster
    assert replace(found.report, cost=whole.report.cost) == whole.report
    assert max(sizes) > 9


def test_changes_that_are_no_attack_keep_form_and_range() -> None:
    x = quantise(torch.rand(4, 3, 17, 12, generator=torch.Generator().manual_seed(0)))
    seeds = torch.arange(4)

    for made in (compress_jpeg(x), compress_jpeg(x[:, :1]), crop_and_enlarge(x, seeds)):
        assert made.shape[2:] == x.shape[2:]
        assert bool(((made >= 0) & (made <= 1)).all())
    assert torch.equal(from_bytes(to_bytes(x)), x)
    assert torch.equal(crop_and_enlarge(x[2:3], seeds[2:3])[0], crop_and_enlarge(x, seeds)[2])
    assert 0 < float((compress_jpeg(x) - x).abs().mean()) < 0.2


def test_order_of_images_does_not_decide_their_part() -> None:
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = np.arange(50, dtype=np.uint64)
    labels = torch.zeros(50, dtype=torch.int64)
    order = np.random.default_rng(0).permutation(50)

    one = split_groups(Sources(x, labels, ids, np.arange(50)), 3)
    other = split_groups(Sources(x[order], labels, ids[order], np.arange(50)), 3)

    assert [len(part) for part in one[:3]] == [30, 10, 10]
    for a, b in zip(one[:3], other[:3], strict=True):
        assert set(a) == set(order[b])


def test_area_and_interval_are_those_of_the_plain_formula() -> None:
    draws = np.random.default_rng(0)
    label = np.arange(80) % 2
    scored = Scored(draws.normal(size=80) + label, label, np.arange(80) // 2)

    found = Resampling(40, 0).estimate_auc([scored])

    pairs = scored.score[label == 1][:, None] > scored.score[label == 0][None]
    assert found.value == pytest.approx(pairs.mean())
    assert found.low < found.value < found.high
    # the usual approximation (Hanley and McNeil 1982)
    a = pairs.mean()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 39 * (q1 - a * a) + 39 * (q2 - a * a)) / 1600)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_difference_to_itself_is_nothing() -> None:
    label = np.arange(40) % 2
    scored = Scored(np.random.default_rng(0).normal(size=40), label, np.arange(40) // 2)

    assert Resampling(20, 0).estimate_gain(scored, scored) == Estimate(0, 0, 0)


def test_figures_of_a_known_case() -> None:
    score = np.array([0.1, 0.2, 0.3, 0.9, 0.4, 0.8, 0.95, 0.99])
    scored = Scored(score, np.repeat([0, 1], 4), np.tile(np.arange(4), 2))

    found = judge_scores(scored, {"0.05": 0.5}, Resampling(4, 0))

    assert found.auc.value == 14 / 16
    at = found.at["0.05"]
    assert (at.tpr.k, at.tpr.n, at.fpr.k, at.fpr.n) == (3, 4, 1, 4)
    assert at.precision == pytest.approx(0.0075 / (0.0075 + 0.2475))
    assert measure_calibration(scored).accuracy == 0.75


def test_remarks_speak_of_leaks_alarms_and_baselines(found: FittedDetector) -> None:
    report = json.loads(json.dumps(to_plain(found.report)))
    report["leaks"]["shuffled"] = {"value": 0.8, "low": 0.7, "high": 0.9}
    report["negatives"][2]["flagged"]["0.05"] = {"k": 20, "n": 30, "low": 0.5, "high": 0.8}
    report["baselines"][0]["gain"] = {"value": -0.1, "low": -0.2, "high": 0.1}
    report["simpler"][0]["gain"] = {"value": 0.1, "low": 0.05, "high": 0.2}

    texts = [each.text for each in write_remarks(from_plain(DetectorRecord, report))]

    assert any("it leaks, and no figure" in text for text in texts)
    report["images"]["total"] = 20
    few = [each.text for each in write_remarks(from_plain(DetectorRecord, report))]
    assert any("it leaks, or 20 images are too few to tell" in text for text in few)
    assert any("noise 67 %" in text for text in texts)
    assert any("not shown to do better than logistic" in text for text in texts)
    assert "It does better than on grad: AUC +0.100 (+0.050 to +0.200)." in texts
