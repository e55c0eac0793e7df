"""Images and labels that are none: names, and what writes each below a folder and says its name."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Writer = Callable[[Path], str]
GREY = np.full((32, 32), 99, np.uint8)
LEVELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32), dtype=np.uint8)
LABELS = np.arange(10)


def write_npz(**arrays: Any) -> Writer:
    """An archive of arrays, the usual two unless they are given."""

    def write(folder: Path) -> str:
        made = {"x": LEVELS, "y": LABELS, **arrays}
        with (folder / "a.npz").open("wb") as file:
            np.savez(file, **{key: value for key, value in made.items() if value is not None})
        return "a.npz"

    return write


def write_bytes(name: str, content: bytes) -> Writer:
    """A file with this content."""

    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return write


def write_member(x: bytes, packing: int = zipfile.ZIP_DEFLATED) -> Writer:
    """An archive of arrays of which one is written as it is."""

    def write(folder: Path) -> str:
        with zipfile.ZipFile(folder / "a.npz", "w", packing) as archive:
            labels = io.BytesIO()
            np.save(labels, LABELS)
            archive.writestr("x.npy", x)
            archive.writestr("y.npy", labels.getvalue())
        return "a.npz"

    return write


def describe(shape: str, dtype: str = "|u1", end: bytes = b"") -> bytes:
    """The beginning of an array's file."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + end


def list_archives() -> Iterator[tuple[str, Writer]]:
    floats = LEVELS / 255
    changed: dict[str, dict[str, Any]] = {
        "no images": {"x": None},
        "no labels": {"y": None},
        "nothing at all": {"x": None, "y": None},
        "none": {"x": LEVELS[:0], "y": LABELS[:0]},
        "one number": {"x": np.array(3)},
        "a row": {"x": LEVELS[:, 0, 0]},
        "a table": {"x": LEVELS[:, 0]},
        "five axes": {"x": LEVELS[..., None, None]},
        "seven channels": {"x": np.stack([LEVELS] * 7, 1)},
        "two layouts": {"x": np.zeros((10, 3, 9, 3), np.uint8) + 99},
        "an axis of nothing": {"x": LEVELS[:, :0]},
        "texts": {"x": LEVELS.astype("U3")},
        "objects": {"x": LEVELS.astype(object)},
        "complex numbers": {"x": LEVELS.astype(complex)},
        "dates": {"x": LEVELS.astype("datetime64[s]")},
        "structures": {"x": np.zeros((10, 32, 32), [("a", "u1"), ("b", "f4")])},
        "truths": {"x": LEVELS > 9},
        "no numbers": {"x": floats * np.nan},
        "infinity": {"x": floats + np.inf},
        "normalised": {"x": floats - 0.5},
        "levels as floats": {"x": LEVELS.astype(float)},
        "large floats": {"x": floats * 1e30},
        "a little above one": {"x": floats * 1.01},
        "black": {"x": LEVELS * 0},
        "divided twice": {"x": floats / 255},
        "levels below zero": {"x": LEVELS.astype(int) - 5},
        "sixteen bits": {"x": LEVELS.astype(np.uint16) * 257},
        "fewer labels": {"y": LABELS[:5]},
        "more labels": {"y": np.arange(11)},
        "labels below zero": {"y": LABELS - 1},
        "labels between": {"y": LABELS + 0.5},
        "labels that are none": {"y": LABELS * np.nan},
        "labels without end": {"y": LABELS + 2.0**63},
        "labels of other classes": {"y": LABELS + 500},
        "texts of nothing as labels": {"y": np.array([""] * 10)},
        "objects as labels": {"y": LABELS.astype(object)},
        "a cube of labels": {"y": np.zeros((10, 2, 2))},
        "labels of two classes at once": {"y": np.ones((10, 10))},
    }
    for name, arrays in changed.items():
        yield f"npz, {name}", write_npz(**arrays)
    yield "npz, empty", write_bytes("a.npz", b"")
    yield "npz, text", write_bytes("a.npz", b"x,y")
    yield "npz, a single array", write_bytes("a.npz", describe("(2,)", end=bytes(2)))
    yield "npz, an end alone", write_bytes("a.npz", b"PK\x05\x06" + bytes(18))
    members = {
        "a shape without end": describe(f"({2**62}, {2**62})"),
        "a shape below zero": describe("(-1, -1, -1)", end=b"x"),
        "a shape of texts": describe("('a',)"),
        "a shape that would run": describe("(__import__('os').getcwd(),)"),
        "less than it says": describe("(10, 32, 32)", end=bytes(99)),
        "more than it says": describe("(10, 1, 1)", end=bytes(10_000_000)),
        "a header without end": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(10_000_000),
        "brackets without end": describe("(" * 9000),
        "another version": b"\x93NUMPY\x07\x00" + bytes(99),
        "half a header": b"\x93NUMPY\x01\x00\xff\x00{'descr",
    }
    for name, content in members.items():
        yield f"npz, {name}", write_member(content)
    whole = describe("(10, 32, 32)", end=LEVELS.tobytes())
    yield "npz, packed by bzip2", write_member(whole, zipfile.ZIP_BZIP2)
    yield "npz, packed by lzma", write_member(whole, zipfile.ZIP_LZMA)


def write_list(text: str | bytes, picture: bytes | None = None) -> Writer:
    """A table, with a picture a.png beside it."""

    def write(folder: Path) -> str:
        (folder / "list.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        if picture is None:
            Image.fromarray(GREY).save(folder / "a.png")
        else:
            (folder / "a.png").write_bytes(picture)
        (folder / "sub").mkdir()
        return "list.csv"

    return write


def list_tables() -> Iterator[tuple[str, Writer]]:
    head = "file,label\n"
    texts: dict[str, str | bytes] = {
        "empty": "",
        "a header alone": head,
        "no header": "a.png,0\n",
        "other columns": "image,class\na.png,0\n",
        "semicolons": "file;label\na.png;0\n",
        "no label": f"{head}a.png\n",
        "a label of words": f"{head}a.png,cat\n",
        "a label below zero": f"{head}a.png,-1\n",
        "half a label": f"{head}a.png,0.5\n",
        "a label without end": f"{head}a.png,{'9' * 5000}\n",
        "a label of other digits": f"{head}a.png,\u0663\n",
        "a label of other classes": f"{head}a.png,12345\n",
        "a file that is not there": f"{head}b.png,0\n",
        "a file above": f"{head}../a.png,0\n",
        "a file of the system": f"{head}/etc/hostname,0\n",
        "a folder": f"{head}sub,0\n",
        "no file": f"{head},0\n",
        "a point": f"{head}.,0\n",
        "a home": f"{head}~/a.png,0\n",
        "an address": f"{head}https://example.org/a.png,0\n",
        "a zero byte": f"{head}a\0.png,0\n",
        "a name without end": f"{head}{'a' * 9000},0\n",
        "a field without end": f"{head}{'a' * 200_000},0\n",
        "a quote without end": f'{head}"a.png,0\n',
        "a name that steers": f"{head}\x1b[2J\u202e::error::x,0\n",
        "a formula": f"{head}=cmd|'/c calc'!A1,0\n",
        "UTF-16": f"{head}a.png,0\n".encode("utf-16"),
        "no text": b"\xff\xfe\x00\x81",
    }
    for name, text in texts.items():
        yield f"csv, {name}", write_list(text)


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    """An image as a file of a form."""
    kept = io.BytesIO()
    image.save(kept, form, **options)
    return kept.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def build_png(width: int, height: int, packed: bytes) -> bytes:
    """A grey PNG file that says how large it is."""
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def list_pictures() -> Iterator[tuple[str, Writer]]:
    image = Image.fromarray(GREY)
    png = save(image, "PNG")
    contents = {
        "nothing": b"",
        "text": b"hello",
        "half of it": png[: len(png) // 2],
        "PostScript": save(image.convert("RGB"), "EPS"),
        "PCX": save(image, "PCX"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/hostname"/></svg>',
        "PDF": save(image, "PDF"),
        "a script": b"%!PS\n(executed) (w) file closefile\n",
        "more pixels than anything": build_png(2**31 - 1, 2**31 - 1, b""),
        "a billion pixels": build_png(30_000, 30_000, zlib.compress(bytes(2**20))),
        "no pixels": build_png(0, 0, zlib.compress(b"")),
        "pixels that are not there": build_png(32, 32, zlib.compress(bytes(9))),
        "pixels that are damaged": build_png(32, 32, b"\xff" * 99),
        "numbers without a range": save(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "a long text": png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) + png[33:],
        "JPEG without an end": save(image, "JPEG")[:200],
    }
    for name, content in contents.items():
        if name == "a long text":
            continue  # Pillow leaves it out where it is not asked for
        yield f"picture, {name}", write_list("file,label\na.png,0\n", content)


def list_folders() -> Iterator[tuple[str, Writer]]:
    def write(*paths: str) -> Writer:
        def make(folder: Path) -> str:
            (folder / "photos").mkdir()
            for path in paths:
                place = folder / "photos" / path
                place.parent.mkdir(parents=True, exist_ok=True)
                if path.endswith("/"):
                    place.mkdir()
                elif path.endswith("@"):
                    os.symlink(folder / "photos", place)
                else:
                    Image.fromarray(GREY).save(place)
            return "photos"

        return make

    yield "folder, empty", write()
    yield "folder, pictures without classes", write("a.png", "b.png")
    yield "folder, empty classes", write("a/", "b/")
    yield "folder, hidden classes", write(".a/1.png", ".b/1.png")
    yield "folder, hidden pictures", write("a/.1.png", "b/.1.png")
    yield "folder, splits", write("train/a/1.png", "test/a/1.png")
    yield "folder, fewer classes than outputs", write("a/1.png", "b/1.png")
    yield "folder, more classes than outputs", write(*(f"{i}/1.png" for i in range(30)))
    yield "folder, links in a circle", write("a/x@", "b/x@")
    yield "folder, missing", lambda _: "photos/nowhere"
    yield "imagenet, missing", lambda _: "imagenet:nowhere"
    yield "svhn, missing", lambda _: "svhn:nowhere"
    yield "cifar10, missing", lambda _: "cifar10:nowhere"
    yield "digits with a folder", lambda _: "digits:nowhere"
    yield "an empty name", lambda _: ""
    yield "a name that steers", lambda _: "\x1b[2J\u202e::error::x"
    yield "a name with a zero byte", lambda _: "a\0b.npz"
    yield "a name without end", lambda _: "a" * 9000
    yield "another kind of file", write_bytes("a.mat", b"MATLAB 5.0")


def list_all() -> Iterator[tuple[str, Writer]]:
    """Name and writer of each."""
    yield from list_archives()
    yield from list_tables()
    yield from list_pictures()
    yield from list_folders()
