"""Data sets that torchvision knows, in its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import (
    explain_cause,
)
from robusteval.datasets.dataset import ArraySource
from robusteval.errors import RunError, UsageError
from robusteval.registry import DATA_SOURCES
from robusteval.runs.reading import check_regular

ARCHIVE = 10**9  # bytes of a file; SVHN's largest part has 182 MB

# (class in torchvision.datasets, where it keeps its files below the root)
TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
}


@DATA_SOURCES.add("mnist", written="mnist:DIR")
def open_mnist(path: Path, split: str, download: bool) -> ArraySource:
    """MNIST, 28x28 grey, in torchvision's layout below DIR."""
    return read_torchvision_set("mnist", path, split, download)


@DATA_SOURCES.add("fashionmnist", written="fashionmnist:DIR")
def open_fashionmnist(path: Path, split: str, download: bool) -> ArraySource:
    """FashionMNIST, 28x28 grey, in torchvision's layout below DIR."""
    return read_torchvision_set("fashionmnist", path, split, download)


@DATA_SOURCES.add("cifar10", written="cifar10:DIR")
def open_cifar10(path: Path, split: str, download: bool) -> ArraySource:
    """CIFAR-10, 32x32 colour, in torchvision's layout below DIR."""
    return read_torchvision_set("cifar10", path, split, download)


@DATA_SOURCES.add("cifar100", written="cifar100:DIR")
def open_cifar100(path: Path, split: str, download: bool) -> ArraySource:
    """CIFAR-100, 32x32 colour, in torchvision's layout below DIR."""
    return read_torchvision_set("cifar100", path, split, download)


@DATA_SOURCES.add("svhn", written="svhn:DIR")
def open_svhn(path: Path, split: str, download: bool) -> ArraySource:
    """SVHN, 32x32 colour, in torchvision's layout below DIR."""
    return read_torchvision_set("svhn", path, split, download)


def read_torchvision_set(kind: str, root: Path, split: str, download: bool) -> ArraySource:
    """A split of one of `TORCHVISION`; RunError if it cannot be fetched, UsageError if missing."""
    class_name, place = TORCHVISION[kind]
    part: dict[str, Any] = {"split": split} if kind == "svhn" else {"train": split == "train"}
    constructor = getattr(_import_datasets(), class_name)
    expected = root / place.format(split=split)
    for file in expected.iterdir() if expected.is_dir() else (expected,):
        if not file.is_dir():
            check_regular(file, ARCHIVE)
    # The constructor compares the MD5 sums of CIFAR's and SVHN's files with the published ones
    # before it opens them, so no other pickle than CIFAR's own is ever unpickled. MNIST's
    # unpacked files have no published sums; they are parsed as plain numbers.
    try:
        dataset = constructor(root, download=download, **part)
    except Exception as error:
        if download:
            raise RunError(
                f"{kind} could not be fetched into {root}: {explain_cause(error)}"
            ) from error
        raise UsageError(
            f"no complete {kind} below {root}: {expected} is missing or damaged; "
            "name the folder that holds it, or pass --download to fetch it"
        ) from error
    labels = dataset.labels if kind == "svhn" else dataset.targets
    names = tuple(getattr(dataset, "classes", "0123456789"))
    return build_array_source(
        f"{kind} ({split})", np.asarray(dataset.data), np.asarray(labels), names
    )


def _import_datasets() -> Any:
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch fails with whatever it meets first
        raise UsageError(
            f"torchvision cannot be imported ({explain_cause(error)}): "
            "install the version that belongs to the installed torch"
        ) from error
    return datasets
