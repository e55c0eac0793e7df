"""Time and memory of `report`, `check` and `compare` on runs of 10,000 images and 12 attacks.

Usage: python tests/benchmarks/bench_reports.py, or with `many` for the reports of one run of 100
images and 10,000 attacks, 100 settings at each of 100 radii.
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
from robusteval.runs.keys import hash_attack, hash_clean
from robusteval.runs.types import Columns, Outcome, Spec, Threat

FORMS = ("table", "markdown", "json", "html", "junit", "sarif", "csv")


def columns(rng: np.random.Generator, n: int, share: float, flips: float) -> Columns:
    """An attack that breaks this share of `n` images; some verdicts flipped."""
    label = np.arange(n) % 10
    right = np.random.default_rng(0).random(n) < 0.9  # the same in every cell
    pred = np.where(right, label, (label + 1) % 10)
    broken = right & ((rng.random(n) < share) ^ (np.random.default_rng(2).random(n) < flips))
    made = np.where(broken, (label + 1) % 10, pred)
    size = np.where(right, rng.random(n) / 300, 0.0)
    return {
        "index": np.arange(n),
        "id": np.random.default_rng(1).integers(0, 2**63, n).astype(np.uint64),
        "label": label,
        "pred_clean": pred,
        "attacked": right,
        "target": np.full(n, -1),
        **dict.fromkeys(("pred_adv", "pred_8bit", "pred_png"), made),
        **dict.fromkeys(("l0", "l0_pixels", "l1", "l2", "linf"), size),
        "ssim": 1 - size,
        "psnr": np.where(right, 40.0, np.inf),
        "margin_clean": np.where(right, 1.0, -1.0),
        "margin_adv": rng.normal(size=n),
        "confidence_adv": rng.random(n),
        **dict.fromkeys(("forwards", "backwards", "seconds"), right * 10.0),
        "fault": np.zeros(n, np.uint8),
    }


def build(folder: Path, flips: float, n: int, radii: int, settings: int) -> None:
    """A whole run of `n` images on disk, with so many settings at each radius."""
    rng = np.random.default_rng(3)
    specs = [
        Spec("pgd", {"eps": (i + 1) / 255, "steps": steps + 1})
        for i in range(radii)
        for steps in range(settings)
    ]
    config = {"attacks": [str(spec) for spec in specs], "samples": n, "seed": 0}
    first = columns(rng, n, 0.0, 0.0)
    clean = {name: first[name] for name in ("index", "id", "label", "pred_clean", "margin_clean")}
    clean["confidence_clean"] = rng.random(n)
    data = {"name": "large", "total": n, "samples": n, "sha256": "0" * 64, "shape": [3, 32, 32]}
    with Store.open(folder, config) as store:
        keys = [hash_clean(config)]
        store.save_cell(keys[0], clean, {"role": "clean"})
        for i, spec in enumerate(specs):
            threat = Threat("linf", spec.parameters["eps"], False)
            made = columns(rng, n, i / len(specs), flips)
            outcome = Outcome(spec, threat, "white-box", made, resolved=spec.parameters)
            keys.append(hash_attack(config, "attack", spec, spec.parameters))
            store.save_cell(keys[-1], outcome.columns, outcome.to_record())
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
        store.save_record(record, keys)


def main(many: bool) -> None:
    """Print a line per command."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if many:
            build(folder / "a", 0.0, 100, 100, 100)
        else:
            build(folder / "a", 0.0, 10_000, 12, 1)
            build(folder / "b", 0.02, 10_000, 12, 1)
            call(folder, "baseline", "update", "a")
        for form in FORMS:
            call(folder, "report", "a", "--format", form)
        if not many:
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
    main(many=sys.argv[1:] == ["many"])
