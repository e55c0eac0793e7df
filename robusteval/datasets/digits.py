"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from robusteval.datasets.dataset import ArraySource
from robusteval.datasets.images import resize_plane
from robusteval.registry import DATA_SOURCES


@DATA_SOURCES.add("digits", written="digits")
def open_digits(split: str) -> ArraySource:
    """scikit-learn's handwritten digits, 32x32 grey, 500 held out; needs no files."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=500, stratify=labels, random_state=0
    )
    chosen = np.sort(test if split == "test" else train)
    levels = np.rint(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.stack([resize_plane(plane, 32, 32) for plane in levels])
    name = "digits (held out)" if split == "test" else "digits (train)"
    return ArraySource(
        name, images[:, None], np.asarray(labels)[chosen].astype(np.int64), tuple("0123456789")
    )
