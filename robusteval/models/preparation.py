"""How the publisher of a network prepares images for it, read from what it is published with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from robusteval.errors import UsageError

Shape = tuple[int, int, int]
# Pillow's numbers, which transformers writes, and the names that timm and torchvision use
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# of processors, which their files name, those to which one number is the shorter side, or both
SHORTER = {"Bit", "CLIP", "ConvNext", "Levit", "MobileNetV1", "MobileNetV2", "MobileViT"}
SHORTER |= {"PoolFormer"}
BOTH = {"Beit", "DeiT", "EfficientNet", "Pvt", "ViT"}
LARGEST = 4096  # pixels a side
LEVELS = 255


class Preprocessing(NamedTuple):
    """How the publisher of an architecture prepares images for it.

    The shorter side is brought to `resize` pixels, both sides if `stretch`, then the centre of
    `shape` is cut out. `certain` says that it belongs to these weights, not only to the
    architecture; `flip`, that channels are in the order blue, green, red; `crop` and `fill` are
    those of `robusteval.datasets.images.Fit`.
    """

    mean: list[float]
    std: list[float]
    shape: Shape
    resize: int
    origin: str
    interpolation: str = "bilinear"
    stretch: bool = False
    certain: bool = False
    flip: bool = False
    crop: str = "rounded"
    fill: tuple[int, ...] = ()

    @property
    def size(self) -> int | None:
        """Pixels a side; None where images are not square, to which nothing is brought here."""
        return self.shape[-1] if self.shape[-1] == self.shape[-2] else None


def read_timm_preset(recipe: Mapping[str, Any], origin: str, certain: bool) -> Preprocessing:
    """Of what timm calls `pretrained_cfg`; UsageError if it is none."""
    try:
        c, h, w = (int(n) for n in recipe["input_size"])
        mean, std = (_read_numbers(recipe[key]) for key in ("mean", "std"))
        share = float(recipe.get("crop_pct") or 0.875)
        interpolation = str(recipe.get("interpolation") or "bicubic")
        mode = str(recipe.get("crop_mode") or "center")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(
            f"{origin} is damaged: input_size, mean or std is missing or no number"
        ) from None
    if len(mean) != len(std) or len(mean) not in (1, c) or min(std, default=0) <= 0:
        raise UsageError(f"{origin} needs a mean and a positive std for each of {c} channels")
    if not (1 <= min(c, h, w) and max(c, h, w) <= LARGEST and 0.01 <= share <= 2):
        raise UsageError(f"{origin} describes impossible images: mend it")
    resize = math.floor(h / share)
    known = interpolation if interpolation in RESAMPLING.values() else "bilinear"
    made = Preprocessing(mean, std, (c, h, w), max(h, resize), origin, known, certain=certain)
    if mode == "border":  # the whole image, with the mean around it
        return made._replace(crop="padded", fill=tuple(round(LEVELS * value) for value in mean))
    return made._replace(stretch=mode == "squash")


def read_processor(recipe: Mapping[str, Any], origin: str) -> Preprocessing:
    """Of what transformers calls `preprocessor_config.json`; UsageError if it is none."""
    try:
        size, resize, stretch = _read_geometry(recipe)
        code = recipe.get("resample")
        interpolation = RESAMPLING[2 if code is None else int(code)]
        mean, std = _read_scale(recipe)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise UsageError(
            f"{origin} is not understood: give --mean, --std and --size yourself, with the file"
            " of weights in the place of the folder and the folder as --arch"
        ) from None
    flip = recipe.get("do_flip_channel_order", _read_kind(recipe) == "MobileViT") is True
    shape = (len(mean), size, size)
    return Preprocessing(
        mean, std, shape, resize, origin, interpolation, stretch, True, flip, crop="floored"
    )


def _read_kind(recipe: Mapping[str, Any]) -> str:
    """Which of transformers' processors it is for, such as ConvNext; empty if it does not say."""
    name = str(recipe.get("image_processor_type") or recipe.get("feature_extractor_type") or "")
    return name.partition("ImageProcessor")[0].partition("FeatureExtractor")[0]


def _read_geometry(recipe: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Side of the crop, pixels that the shorter side is resized to, whether both sides are."""
    size, kind = recipe.get("size", 224), _read_kind(recipe)
    share = recipe.get("crop_pct")  # of ConvNeXt, which crops below 384 pixels, and of PoolFormer
    share = 224 / 256 if share is None and kind == "ConvNext" else share
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    if sides is not size and (kind in SHORTER or share is not None):
        sides = {"shortest_edge": size}
    crop = recipe.get("crop_size")
    crop = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    cut = _read_side(crop["height"]) if recipe.get("do_center_crop") and crop["height"] else None
    if cut is not None and crop["height"] != crop["width"]:
        raise ValueError("not square")
    if recipe.get("do_resize") is False:
        whole = cut or _read_side(sides.get("height", sides.get("shortest_edge")))
        return whole, whole, False
    if "shortest_edge" in sides:
        edge = _read_side(sides["shortest_edge"])
        if share is not None and cut is None:
            return (edge, int(edge / float(share)), False) if edge < 384 else (edge, edge, True)
        short = edge if share is None else int(edge / float(share))
        if kind == "Levit":
            short = int(256 / 224 * edge)
        return cut or edge, max(short, cut or edge), False
    height = _read_side(sides["height"])
    if height != _read_side(sides["width"]):
        raise ValueError("not square")
    # of a processor that is not known, one number with a crop is taken as the shorter side
    stretch = isinstance(size, Mapping) or cut is None or kind in BOTH
    return cut or height, max(height, cut or height), stretch


def _read_side(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(value)
    return int(value)


def _read_scale(recipe: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation for pixels in [0, 1]."""
    factor = float(recipe.get("rescale_factor") or 1 / LEVELS)
    times = LEVELS * factor if recipe.get("do_rescale", True) is not False else float(LEVELS)
    if not math.isfinite(times) or times <= 0 or recipe.get("rescale_offset"):
        raise ValueError(factor)
    mean, std = [0.0] * 3, [1.0] * 3
    if recipe.get("do_normalize", _read_kind(recipe) != "MobileViT") is not False:
        mean, std = _read_numbers(recipe["image_mean"]), _read_numbers(recipe["image_std"])
    # EfficientNet divides twice
    if recipe.get("include_top", _read_kind(recipe) == "EfficientNet") is True:
        std = [value * value for value in std]
    if len(mean) != len(std) or len(mean) not in range(1, 65) or min(std) <= 0:
        raise ValueError(std)
    if abs(times - 1) < 1e-6:
        return mean, std
    return [value / times for value in mean], [value / times for value in std]


def _read_numbers(values: Any) -> list[float]:
    """A list of finite numbers; one number is a list of three."""
    listed = [float(values)] * 3 if isinstance(values, int | float) else [float(v) for v in values]
    if not all(map(math.isfinite, listed)):
        raise ValueError(values)
    return listed
