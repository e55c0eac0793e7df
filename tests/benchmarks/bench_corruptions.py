"""Time of each corruption beside the packages that have it, where they are installed.

    python tests/benchmarks/bench_corruptions.py [--side 224] [--images 8] [--seconds 2]

imagecorruptions (the authors' programs as a package) and albumentations are given 8-bit images
``(h, w, c)`` and return such; ours takes and returns tensors in [0, 1], conversion included. They
take turns, round by round, so that a busy machine slows all of them. Of each the fastest round, in
milliseconds of CPU time an image, one thread; ratios are to the fastest package, of the fastest
rounds and of the median ones. Packages that do not start, or lack a kind, have no column entry.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from robusteval.attacks.corruption import corruption
from robusteval.attacks.severities import KINDS, Kind, find_constants

Photo = np.ndarray[Any, Any]
IDLE = nn.Identity()
ROUND = 0.01  # seconds of CPU time that a round takes at least
LEAST = 3  # rounds


def draw_photos(images: int, side: int) -> list[Photo]:
    """Colours that go over into each other, with noise ``(h, w, 3)`` uint8."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, side)[:, None, None] * np.linspace(0.2, 1, 3)
    made = [
        slope + slope.transpose(1, 0, 2) / 4 + rng.normal(0, 8, (side, side, 3))
        for _ in range(images)
    ]
    return [photo.clip(0, 255).astype(np.uint8) for photo in made]


def measure(works: Sequence[Callable[[], object]], seconds: float) -> np.ndarray[Any, Any]:
    """Seconds of CPU time of each round of each work ``(works, rounds)``; they take turns.

    No shorter rounds than there is use in, and no more of them than there is time for.
    """
    start = time.process_time()
    calls = [find_calls(work) for work in works]
    rounds: list[list[float]] = []
    while len(rounds) < LEAST or time.process_time() - start < seconds:
        rounds.append(
            [measure_round(work, count) for work, count in zip(works, calls, strict=True)]
        )
    return np.array(rounds).T


def find_calls(work: Callable[[], object]) -> int:
    """How many calls make a round."""
    work()  # what is compiled or looked up at first is no part of it
    return max(1, round(ROUND / max(measure_round(work, 1), 1e-6)))


def measure_round(work: Callable[[], object], calls: int) -> float:
    """Seconds of CPU time of a call, the mean over some."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def open_imagecorruptions() -> Callable[[Photo, Kind, int], Photo]:
    """The package imagecorruptions, under the NumPy and scikit-image of today."""
    numpy: Any = np
    if not hasattr(numpy, "float_"):
        numpy.float_ = np.float64
    module: Any = import_module("imagecorruptions")
    programs: Any = import_module("imagecorruptions.corruptions")
    filters: Any = import_module("skimage.filters")

    def smooth(image: Any, sigma: float, multichannel: bool = False, **settings: Any) -> Any:
        axis = -1 if multichannel else None
        return filters.gaussian(image, sigma=sigma, channel_axis=axis, **settings)

    programs.gaussian = smooth
    return lambda photo, kind, severity: module.corrupt(
        photo, corruption_name=kind, severity=severity
    )


def open_albumentations() -> Callable[[Photo, Kind, int], Photo]:
    """The transforms of albumentations that do the same as a kind, with its constants.

    Others have the name of a kind and do something else: its Downscale takes single pixels or
    fractions of them, its ZoomBlur enlarges on another grid, its RandomFog draws circles.
    """
    a: Any = import_module("albumentations")
    # threads would not count as CPU time of this process's own
    import_module("cv2").setNumThreads(1)
    made: dict[str, Callable[[dict[str, float]], Any]] = {
        "gaussian_noise": lambda c: a.GaussNoise(
            std_range=(c["scale"],) * 2, mean_range=(0, 0), p=1
        ),
        "impulse_noise": lambda c: a.SaltAndPepper(
            amount=(c["share"],) * 2, salt_vs_pepper=(0.5, 0.5), p=1
        ),
        "defocus_blur": lambda c: a.Defocus(
            radius=(max(round(c["radius"]), 1),) * 2, alias_blur=(c["soft"],) * 2, p=1
        ),
        "glass_blur": lambda c: a.GlassBlur(
            sigma=c["sigma"], max_delta=round(c["reach"]), iterations=round(c["rounds"]), p=1
        ),
        "brightness": lambda c: a.HueSaturationValue(
            (0, 0), (0, 0), (round(255 * c["added"]),) * 2, p=1
        ),
        "jpeg_compression": lambda c: a.ImageCompression(
            quality_range=(round(c["quality"]),) * 2, p=1
        ),
        "gaussian_blur": lambda c: a.GaussianBlur(sigma_limit=(c["sigma"],) * 2, blur_limit=0, p=1),
        "spatter": lambda c: a.Spatter(
            mean=(c["mean"],) * 2,
            std=(c["scale"],) * 2,
            gauss_sigma=(c["smooth"],) * 2,
            cutout_threshold=(c["least"],) * 2,
            intensity=(c["strength"],) * 2,
            mode="rain" if c["strength"] else "mud",
            p=1,
        ),
    }

    @lru_cache
    def build(kind: Kind, severity: int, side: int) -> Any:
        return made[kind](find_constants(kind, severity, side))

    def corrupt(photo: Photo, kind: Kind, severity: int) -> Photo:
        changed: Photo = build(kind, severity, min(photo.shape[:2]))(image=photo)["image"]
        return changed

    return corrupt


def main() -> None:
    """Print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2)
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
    print(f"{'kind':18s} {'ours':>8s}", *(f"{name:>17s}" for name in rivals), "  fastest   median")
    for kind in given.kind or KINDS:

        def run_ours(kind: Kind = kind) -> object:
            return corruption(IDLE, x, y, seeds=seeds, kind=kind, severity=given.severity)

        works: dict[str, Callable[[], object]] = {"ours": run_ours}
        for name, rival in rivals.items():

            def run_theirs(kind: Kind = kind, rival: Any = rival) -> object:
                return [rival(photo, kind, given.severity) for photo in photos]

            try:
                run_theirs()
            except Exception:
                continue
            works[name] = run_theirs
        rounds = 1000 / len(photos) * measure(list(works.values()), given.seconds)
        times = dict(zip(works, rounds.min(1), strict=True))
        ratios = ""
        if len(works) > 1:
            for each in (rounds.min(1), np.median(rounds, 1)):
                ratios += f"{each[0] / each[1:].min():9.2f}"
        columns = (f"{times.get(name, float('nan')):17.3f}" for name in rivals)
        print(f"{kind:18s} {times['ours']:8.3f}", *columns, ratios, flush=True)


if __name__ == "__main__":
    main()
