"""What becomes of images without any attack: rounded, compressed, cropped."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robusteval.models.seeds import per_image
from robusteval.search.balls import quantise

Array = np.ndarray[Any, Any]


def to_bytes(x: Tensor) -> Array:
    """Round images in [0, 1] to 8 bits: uint8 of the same shape."""
    return np.asarray((quantise(x) * 255).round().to(torch.uint8).cpu().numpy())


def from_bytes(images: Array) -> Tensor:
    """Turn images of 8 bits into those in [0, 1]."""
    return quantise(torch.from_numpy(np.ascontiguousarray(images)).float() / 255)


def compress_jpeg(x: Tensor, quality: int = 75) -> Tensor:
    """Compress images ``(n, c, h, w)`` by JPEG; unless they have three channels, one by one."""
    out = to_bytes(x).transpose(0, 2, 3, 1).copy()
    for image in out:
        planes = [image] if image.shape[2] == 3 else list(np.moveaxis(image, 2, 0))
        found = []
        for plane in planes:
            file = io.BytesIO()
            Image.fromarray(plane).save(file, "JPEG", quality=quality)
            with Image.open(file, formats=("JPEG",)) as jpeg:
                found.append(np.asarray(jpeg))
        image[...] = found[0] if image.shape[2] == 3 else np.stack(found, 2)
    return from_bytes(out.transpose(0, 3, 1, 2))


def crop_and_enlarge(x: Tensor, seeds: Tensor, part: float = 7 / 8) -> Tensor:
    """Crop a part of each image at a random place, and bring it to the size of the whole."""
    h, w = x.shape[2:]
    height, width = max(1, round(part * h)), max(1, round(part * w))
    places = per_image(seeds, torch.Size((2,)))
    out = torch.empty_like(x)
    for row, image, (down, across) in zip(out, x, places.tolist(), strict=True):
        top, left = int(down * (h - height + 1)), int(across * (w - width + 1))
        piece = image[None, :, top : top + height, left : left + width]
        row.copy_(nn.functional.interpolate(piece, (h, w), mode="bilinear")[0])
    return out.clamp(0, 1)
