"""Randomness that belongs to an image, not to the batch it happens to travel in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = np.ndarray[Any, np.dtype[np.uint64]]


def sample_seeds(seed: int, ids: Ids) -> Tensor:
    """One seed per image ``(n,)`` int64 below 2**62, from the run's seed and the image's id.

    Scrambled by the finaliser of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom
    number generators, OOPSLA 2014), so that neighbouring seeds share nothing.
    """
    z = np.asarray(ids, dtype=np.uint64) ^ _scramble(np.uint64(seed % 2**64))
    return torch.from_numpy((_scramble(z) >> np.uint64(2)).astype(np.int64))


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Put the global random states of torch, NumPy and Python back as they were."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the global random states of torch, NumPy and Python, below 2**32."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _scramble(z: Any) -> Any:
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def per_image(seeds: Tensor, shape: torch.Size, *, normal: bool = False) -> Tensor:
    """Random numbers ``(n, *shape)`` on the CPU, each image's from its own seed alone.

    Uniform on [0, 1), or standard normal.
    """
    out = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(out, seeds.tolist(), strict=True):
        generator.manual_seed(seed)
        if normal:
            row.normal_(generator=generator)
        else:
            row.uniform_(generator=generator)
    return out


def draw_targets(labels: Tensor, seeds: Tensor, num_classes: int) -> Tensor:
    """For each image a class other than its label ``(n,)``, from its seed."""
    return (labels + 1 + seeds.to(labels.device) % (num_classes - 1)) % num_classes
