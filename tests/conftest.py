"""Runs made of numbers alone for what reads runs, small models for what makes them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from toys import Bands, Linear, synthetic, trained

from robusteval.models.classifier import Classifier
from robusteval.models.networks import digits_cnn
from robusteval.runs.folder import Store
from robusteval.runs.keys import list_keys
from robusteval.runs.types import Columns, Outcome, Picture, Run, Spec, Threat

Made = np.ndarray[Any, Any]

# For tensors as small as these more threads only wait for each other. Processes that tests start
# inherit it: a network trained with another number of threads has other weights.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# the same examples every time, and none that fails on a clock where others use the machine
settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("steady")


# for `tox -e quick`: what takes milliseconds a test; of the table over attacks the rows of pgd
QUICK = ("datasets", "models", "reports", "runs", "search")
QUICK_FILES = ("test_gallery", "test_judge", "test_layout", "test_public_names", "test_registry")
QUICK_ROWS = {"test_attacks": "[pgd"}
LONGER = (  # seconds each, in the places above: training, simulations, a browser
    "test_demo_",
    "test_nothing_changed_seldom_fails",
    "test_a_drop_of_four_points",
    "test_chromium_",
    "test_truncated_file_is_an_error",
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Networks that a test makes without a seed are the same in whatever order tests run."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are quick, by their place."""
    for item in items:
        stem = item.path.stem
        row = QUICK_ROWS.get(stem)
        quick = item.path.parent.name in QUICK or stem in QUICK_FILES
        if (quick or (row is not None and row in item.name)) and not item.name.startswith(LONGER):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for all tests, never the user's; the demo network is trained in it once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ROBUSTEVAL_CACHE", str(folder))
        yield folder


ENSEMBLES = ("standard", "thorough", "quick", "autoattack", "unmask")


@pytest.fixture(autouse=True)
def short_ensembles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tables over the attacks the stages of an ensemble have few steps.

    What every attack must keep does not depend on their number; what an ensemble finds is tested
    in test_standard.py.
    """
    row = request.node.name.rpartition("[")[2]
    if request.path.stem == "test_standard" or not any(name in row for name in ENSEMBLES):
        return
    from robusteval.search import ensemble

    def shorten(name: str, most: int) -> None:
        search = getattr(ensemble, f"search_{name}")
        count = {"apgd": "steps", "square": "queries"}[name]

        def short(*args: Any, **options: Any) -> Any:
            return search(*args, **{**options, count: min(options[count], most)})

        monkeypatch.setattr(ensemble, f"search_{name}", short)

    shorten("apgd", 10)
    shorten("square", 20)
    approach = ensemble.Stage.approach

    def hurry(stage: Any, attack: str, norm: Any, eps: float, **given: Any) -> Any:
        few = {"steps": 70}
        if attack == "fab":
            few = {"steps": 10} if stage.targeted else {"steps": 10, "targets": 2}
        return approach(stage, attack, norm, eps, **given | few)

    monkeypatch.setattr(ensemble.Stage, "approach", hurry)


@pytest.fixture(scope="session", autouse=True)
def few_planted() -> Iterator[None]:
    """The active test takes a few images and short searches; `test_active_test` has it as it is."""
    from robusteval.evaluation import active_test

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SMALL": 6, "LARGE": 6, "SEARCH": 5, "STARTS": 1, "DRAWS": 10}.items():
            patch.setattr(active_test, name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def untimed() -> Iterator[None]:
    """What is said only because much time has passed is not said, however slow the machine is."""
    from robusteval import progress
    from robusteval.evaluation import estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "PLAIN_EVERY", math.inf)
        patch.setattr(estimate, "WORTH_SAYING", math.inf)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo network is trained once, for all caches and all processes of a session."""
    from robusteval.models import demo

    base = tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo.pt"
    train = demo._trained

    @functools.wraps(train)
    def train_once(x: Tensor, y: Tensor, progress: Callable[[int, int], None]) -> nn.Module:
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                torch.save(train(x, y, lambda done, total: None).state_dict(), kept)
        network = digits_cnn()
        network.load_state_dict(torch.load(kept))
        progress(0, 1)
        progress(1, 1)
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_trained", train_once)
        yield


def clean_columns(label: Made, right: Made) -> Columns:
    """Clean predictions, right where asked, one class too high elsewhere."""
    n = len(label)
    return {
        "index": np.arange(n),
        "id": np.arange(n, dtype=np.uint64) + np.uint64(2**63),
        "label": label,
        "pred_clean": np.where(right, label, label + 1),
        "margin_clean": np.where(right, 1.0, -1.0),
        "confidence_clean": np.full(n, 0.5),
    }


def attacked_columns(clean: Columns, broken: Made, **changed: Made) -> Columns:
    """The columns of an attack that succeeds where asked, of the images that were right."""
    n = len(broken)
    attacked = clean["pred_clean"] == clean["label"]
    broken = broken & attacked
    pred = np.where(broken, clean["label"] + 1, clean["pred_clean"])
    size = np.where(broken, 0.01 + 0.001 * np.arange(n), 0.0)
    return {
        **{name: clean[name] for name in ("index", "id", "label", "pred_clean", "margin_clean")},
        "attacked": attacked,
        "target": np.full(n, -1),
        "pred_adv": pred,
        "pred_8bit": pred,
        "pred_png": pred,
        **{name: size for name in ("l0", "l0_pixels", "l1", "l2", "linf")},
        "ssim": np.where(broken, 0.9, 1.0),
        "psnr": np.where(broken, 30.0, np.inf),
        "margin_adv": np.where(broken, -1.0, clean["margin_clean"]),
        "confidence_adv": np.full(n, 0.5),
        "forwards": np.where(attacked, 20.0, 0.0),
        "backwards": np.where(attacked, 19.0, 0.0),
        "seconds": np.where(attacked, 0.02, 0.0),
        "fault": np.zeros(n, dtype=np.uint8),
        **changed,
    }


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    """Builds one cell from masks ``(n,)``: which images are right, and which of them break."""

    def make(
        broken: list[bool] | Made,
        *,
        right: list[bool] | Made | None = None,
        spec: Spec | None = None,
        threat: Threat | None = None,
        knowledge: str = "white-box",
        role: str = "attack",
        notes: tuple[str, ...] = (),
        **changed: Made,
    ) -> Outcome:
        mask = np.asarray(broken, dtype=np.bool_)
        first = np.ones(len(mask), np.bool_) if right is None else np.asarray(right, np.bool_)
        clean = clean_columns(np.arange(len(mask)) % 10, first)
        return Outcome(
            attack=spec or Spec("pgd", {"eps": 8 / 255, "steps": 20}),
            threat=threat or Threat("linf", 8 / 255, False),
            knowledge=knowledge,
            columns=attacked_columns(clean, mask, **changed),
            role=role,
            notes=notes,
        )

    return make


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Builds a run around cells: the images of the first, 500 right ones without any."""

    def make(*outcomes: Outcome, n: int = 500, **changed: Any) -> Run:
        attacks = [str(o.attack) for o in outcomes if o.role == "attack"]
        if outcomes:
            first = outcomes[0].columns
            clean = clean_columns(first["label"], first["attacked"])
        else:
            clean = clean_columns(np.arange(n) % 10, np.ones(n, np.bool_))
        facts: dict[str, Any] = {
            "config": {
                "attacks": attacks,
                "samples": len(clean["id"]),
                "seed": 0,
                "command": "robusteval evaluate net.pt --data digits",
            },
            "model": {
                "file": "folder/net.pt",
                "sha256": "0123456789abcdef" * 4,
                "arch": "torchvision:resnet18",
                "normalisation": "given",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "num_classes": 10,
            },
            "data": {
                "name": "digits",
                "total": 1797,
                "samples": len(clean["id"]),
                "sha256": "fedcba9876543210" * 4,
                "shape": [3, 32, 32],
                "transform": "none",
                "class_names": None,
            },
            "environment": {
                "robusteval": "0.1.0",
                "python": "3.12.1",
                "torch": "2.10",
                "device": "cpu",
                "platform": "Linux x86_64",
            },
            "clean": clean,
            "outcomes": outcomes,
            "findings": (),
            "status": "complete",
            "seconds": 75.0,
            "created": "2026-01-02T03:04:05+00:00",
            "folder": "runs/one",
        }
        return Run(**{**facts, **changed})

    return make


def keep_in_ball(outcome: Outcome) -> Columns:
    """The columns of a cell with no distance above its radius, as the judge leaves them."""
    norm, eps, _ = outcome.threat
    if eps is None or norm not in outcome.columns:
        return outcome.columns
    return {**outcome.columns, norm: np.minimum(outcome.columns[norm], eps)}


def save_cells(store: Store, run: Run, pictures: Mapping[int, list[Picture]] = {}) -> list[str]:
    """Write the cells of a run, as an evaluation does; their keys, those of attacks last.

    `pictures` are by the position of the attack.
    """
    config = run.to_record()["config"]
    keys = []

    def save(columns: Columns, entry: dict[str, Any], shown: Sequence[Picture] = ()) -> None:
        keys.append(min(list_keys(config, entry)))
        store.save_cell(keys[-1], columns, entry, shown)

    save(run.clean, {"role": "clean"})
    for defended in run.defenses:
        save(defended.clean, {**defended.to_record(), "facts": defended.facts})
    for i, outcome in enumerate(run.outcomes):
        save(keep_in_ball(outcome), outcome.to_record(), pictures.get(i, ()))
    return keys


@pytest.fixture
def keep_run() -> Callable[[Run, Path], Path]:
    """Writes a run to a folder, as an evaluation does."""

    def keep(run: Run, folder: Path) -> Path:
        record = run.to_record()
        with Store.open(folder, record["config"]) as store:
            store.save_record(record, save_cells(store, run))
        return folder

    return keep


@pytest.fixture
def linear() -> Classifier:
    """A linear classifier of 1x6x5 images."""
    return Classifier(Linear((1, 6, 5)), num_classes=2).eval()


@pytest.fixture
def grey_images() -> Tensor:
    """Eight 1x6x5 images away from the edges of the pixel box."""
    generator = torch.Generator().manual_seed(1)
    return 0.3 + 0.4 * torch.rand(8, 1, 6, 5, generator=generator)


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty synthetic images in an ``.npz`` file."""
    path = tmp_path_factory.mktemp("data") / "bands.npz"
    x, y = synthetic(60, seed=1)
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="session")
def trained_bands() -> Bands:
    """The trained network, shared: do not change it."""
    return trained()


@pytest.fixture
def bands(trained_bands: Bands) -> Classifier:
    """The trained network as a classifier of 3x12x12 images."""
    return Classifier(
        trained_bands,
        mean=(0.5,),
        std=(0.25,),
        num_classes=3,
        identity={"sha256": "bands", "num_classes": 3},
    ).eval()
