"""The WordNet ids of ImageNet's classes, which its folders are called."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def read_wordnet_ids() -> dict[str, int]:
    """The WordNet ids of ImageNet's 1000 classes with their positions, as ILSVRC 2012 has them."""
    text = (Path(__file__).parent / "imagenet_synsets.txt").read_text(encoding="ascii")
    return {wnid: place for place, wnid in enumerate(text.split())}
