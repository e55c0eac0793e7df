"""Time and memory of `report`, `check` and `compare` on runs of 10,000 images and 12 attacks.

Usage: python tests/benchmarks/bench_reports.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from robusteval.runs.folder import Store
from robusteval.runs.types import Columns, Outcome, Spec, Threat

N, CELLS = 10_000, 12


def columns(rng: np.random.Generator, share: float, flips: float) -> Columns:
    """An attack that breaks this share of the images; some verdicts flipped."""
    label = np.arange(N) % 10
    right = np.random.default_rng(0).random(N) < 0.9  # the same in every cell
    pred = np.where(right, label, (label + 1) % 10)
    broken = right & ((rng.random(N) < share) ^ (np.random.default_rng(2).random(N) < flips))
    made = np.where(broken, (label + 1) % 10, pred)
    size = np.where(right, rng.random(N) / 30, 0.0)
    return {
        "index": np.arange(N),
        "id": np.random.default_rng(1).integers(0, 2**63, N).astype(np.uint64),
        "label": label,
        "pred_clean": pred,
        "attacked": right,
        "target": np.full(N, -1),
        **dict.fromkeys(("pred_adv", "pred_8bit", "pred_png"), made),
        **dict.fromkeys(("l0", "l0_pixels", "l1", "l2", "linf"), size),
        "ssim": 1 - size,
        "psnr": np.where(right, 40.0, np.inf),
        "margin_clean": np.where(right, 1.0, -1.0),
        "margin_adv": rng.normal(size=N),
        "confidence_adv": rng.random(N),
        **dict.fromkeys(("forwards", "backwards", "seconds"), right * 10.0),
        "fault": np.zeros(N, np.uint8),
    }


def build(folder: Path, flips: float) -> None:
    """A whole run on disk."""
    rng = np.random.default_rng(3)
    specs = [Spec("pgd", {"eps": (i + 1) / 255}) for i in range(CELLS)]
    config = {"attacks": [str(spec) for spec in specs], "samples": N, "seed": 0}
    first = columns(rng, 0.0, 0.0)
    clean = {name: first[name] for name in ("index", "id", "label", "pred_clean", "margin_clean")}
    clean["confidence_clean"] = rng.random(N)
    data = {"name": "large", "total": N, "samples": N, "sha256": "0" * 64, "shape": [3, 32, 32]}
    with Store.open(folder, config) as store:
        store.save_cell("clean", clean, {"role": "clean"})
        for i, spec in enumerate(specs):
            threat = Threat("linf", spec.parameters["eps"], False)
            outcome = Outcome(spec, threat, "white-box", columns(rng, i / CELLS, flips))
            store.save_cell(f"cell{i}", outcome.columns, outcome.to_record())
        record = {
            "status": "complete",
            "created": "2026-01-01T00:00:00+00:00",
            "seconds": 1.0,
            "command": "",
            "config": config,
            "model": {"sha256": "1" * 64},
            "data": data,
            "environment": {},
            "findings": [],
            "failures": {},
        }
        store.save_record(record, ["clean", *(f"cell{i}" for i in range(CELLS))])


def main() -> None:
    """Print a line per command."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder / "a", 0.0)
        build(folder / "b", 0.02)
        call(folder, "baseline", "update", "a")
        for form in ("table", "markdown", "json", "html", "junit", "sarif", "csv"):
            call(folder, "report", "a", "--format", form)
        call(folder, "check", "b", "--baseline", "robustness-baseline.json")
        call(folder, "compare", "a", "b")
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"largest of these processes: {largest:.0f} MB")


def call(folder: Path, *words: str) -> None:
    """Run a command and say how long it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "robusteval", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    print(f"{time.perf_counter() - start:5.2f} s  exit {done.returncode}  {' '.join(words)}")


if __name__ == "__main__":
    main()
