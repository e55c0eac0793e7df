"""Time of each corruption beside the packages that have it, where they are installed.

    python tests/benchmarks/bench_corruptions.py [--side 224] [--images 8] [--repeat 5]

imagecorruptions (the authors' programs as a package) and albumentations are given 8-bit images
``(h, w, c)`` and return such; ours takes and returns tensors in [0, 1], conversion included. Of
each the fastest of several rounds, in milliseconds of CPU time an image, one thread. Packages that
do not start, or lack a kind, have no column entry.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from robusteval.attacks.corruption import corruption
from robusteval.attacks.severities import KINDS, Kind

Photo = np.ndarray[Any, Any]
IDLE = nn.Identity()
PATIENCE = 3.0  # seconds of CPU time for one kind by one package


def draw_photos(images: int, side: int) -> list[Photo]:
    """Colours that go over into each other, with noise ``(h, w, 3)`` uint8."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, side)[:, None, None] * np.linspace(0.2, 1, 3)
    made = [
        slope + slope.transpose(1, 0, 2) / 4 + rng.normal(0, 8, (side, side, 3))
        for _ in range(images)
    ]
    return [photo.clip(0, 255).astype(np.uint8) for photo in made]


def measure(work: Callable[[], object], repeat: int) -> float:
    """Seconds of CPU time of the fastest round; no more rounds than there is patience for."""
    found: list[float] = []
    while len(found) < repeat and sum(found) < PATIENCE:
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def open_imagecorruptions() -> Callable[[Photo, Kind, int], Photo]:
    """The package imagecorruptions, under the NumPy and SciPy of today."""
    names = {"float_": np.float64}
    for name, value in names.items():
        if not hasattr(np, name):
            setattr(np, name, value)
    module: Any = import_module("imagecorruptions")
    return lambda photo, kind, severity: module.corrupt(
        photo, corruption_name=kind, severity=severity
    )


def open_albumentations() -> Callable[[Photo, Kind, int], Photo]:
    """The transforms of albumentations that do the same, with constants of ImageNet-C."""
    a: Any = import_module("albumentations")
    quality = (25, 18, 15, 10, 7)
    share = (0.6, 0.5, 0.4, 0.3, 0.25)
    sigma = (1, 2, 3, 4, 6)
    made: dict[str, Callable[[int], Any]] = {
        "jpeg_compression": lambda s: a.ImageCompression(quality_range=(quality[s - 1],) * 2, p=1),
        "pixelate": lambda s: a.Downscale(scale_range=(share[s - 1],) * 2, p=1),
        "gaussian_blur": lambda s: a.GaussianBlur(
            sigma_limit=(sigma[s - 1],) * 2, blur_limit=0, p=1
        ),
        "saturate": lambda s: a.HueSaturationValue(0, (60, 60), 0, p=1),
        "brightness": lambda s: a.RandomBrightnessContrast((0.3, 0.3), 0, p=1),
    }

    def corrupt(photo: Photo, kind: Kind, severity: int) -> Photo:
        changed: Photo = made[kind](severity)(image=photo)["image"]
        return changed

    return corrupt


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--kind", action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    photos = draw_photos(given.images, given.side)
    x = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float().contiguous() / 255
    y, seeds = torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))
    rivals: dict[str, Callable[[Photo, Kind, int], Photo]] = {}
    for name, start in (
        ("imagecorruptions", open_imagecorruptions),
        ("albumentations", open_albumentations),
    ):
        try:
            rivals[name] = start()
        except Exception as error:
            print(f"{name}: {error}")
    print(f"{'kind':18s} {'ours':>8s}", *(f"{name:>17s}" for name in rivals), "   ratio")
    for kind in given.kind or KINDS:

        def run_ours(kind: Kind = kind) -> object:
            return corruption(IDLE, x, y, seeds=seeds, kind=kind, severity=given.severity)

        ours = measure(run_ours, given.repeat)
        times: dict[str, float] = {}
        for name, rival in rivals.items():

            def run_theirs(kind: Kind = kind, rival: Any = rival) -> object:
                return [rival(photo, kind, given.severity) for photo in photos]

            try:
                times[name] = measure(run_theirs, given.repeat)
            except Exception:
                times[name] = float("nan")
        per = 1000 / len(photos)
        known = [value for value in times.values() if value == value]
        ratio = f"{ours / min(known):8.2f}" if known else "       -"
        columns = (f"{value * per:17.2f}" for value in times.values())
        print(f"{kind:18s} {ours * per:8.2f}", *columns, ratio, flush=True)


if __name__ == "__main__":
    main()
