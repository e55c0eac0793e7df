"""The libraries and the machine that numbers depend on."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata

import torch

from robusteval import __version__
from robusteval.errors import UsageError

OPENCV = (
    *("opencv-python", "opencv-python-headless"),
    *("opencv-contrib-python", "opencv-contrib-python-headless"),
)

# of glibc's malloc, malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**26  # bytes that are free, up to which they stay with the process
MAPPED = 2**25  # bytes from which a tensor has pages of its own, glibc's largest


def list_versions() -> dict[str, str]:
    """The libraries that numbers depend on."""
    names = {
        "torch": "torch",
        "torchvision": "torchvision",
        "art": "adversarial-robustness-toolbox",
        "numpy": "numpy",
        "scipy": "scipy",
        "pillow": "pillow",
    }
    found = {name: metadata.version(package) for name, package in names.items()}
    return {"robusteval": __version__, **found, "opencv": find_opencv_version()}


def find_opencv_version() -> str:
    """The version of OpenCV, which is published under four names."""
    for package in OPENCV:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def describe_environment(device: torch.device) -> dict[str, str]:
    """Where a run was made, without names of machines or people."""
    return {
        **list_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def keep_freed_memory() -> bool:
    """Let this process keep some of the memory that it frees; whether that could be said.

    Every step of an attack frees the activations of the one before. glibc hands them back to the
    system at once, which gives them out again page by page, as zeros: a twentieth of the time of an
    attack on a ResNet-20. For programs, not for libraries: it holds for the whole process. What the
    environment says of it counts more.
    """
    said = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ)
    if said or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED) and mallopt(M_TRIM_THRESHOLD, KEPT))


def pick_device(name: str | None) -> torch.device:
    """The device of that name; "auto" or None is a GPU if there is one, else the processor.

    Raises
    ------
    UsageError
        There is no such device here.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name} here: torch sees {_gpus()}; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no device mps here; use --device cpu")
    return device


def _gpus() -> str:
    count = torch.cuda.device_count()
    return f"cuda:0 to cuda:{count - 1}" if count else "no CUDA GPU"
