"""Every kind of data, every way in which it can be wrong, and ids that do not move."""

import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from robusteval.datasets import checks, npz
from robusteval.datasets.dataset import ArraySource, Data, draw, image_id
from robusteval.datasets.images import SUFFIXES, png_round_trip
from robusteval.datasets.sources import list_kinds, open_data
from robusteval.datasets.torchvision_sets import TORCHVISION
from robusteval.datasets.wordnet import read_wordnet_ids
from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.search.balls import quantise

LEVELS = np.arange(256, dtype=np.uint8)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, levels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


def save_npz(path: Path, **arrays: object) -> str:
    values: dict[str, Any] = {key: np.asarray(array) for key, array in arrays.items()}
    np.savez(path, **values)
    return str(path)


def save_manifest(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def refusal(spec: object, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        open_data(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    save_image(root / "dog" / "b.png", pixels(6, 5, 3, seed=1))
    save_image(root / "cat" / "z.png", pixels(6, 5, 3, seed=2))
    save_image(root / "cat" / "a.PNG", pixels(6, 5, 3, seed=3))
    return root


# What an image is called


def test_image_id_is_the_start_of_a_known_hash() -> None:
    x = np.array([[[0.0, 0.5]]], dtype=np.float32)
    digest = hashlib.sha256(b"(1, 1, 2)" + struct.pack("<ff", 0.0, 0.5)).digest()

    assert image_id(x) == struct.unpack(">Q", digest[:8])[0]
    assert image_id(x.astype(np.float64)) == image_id(x)


def test_image_id_knows_the_shape() -> None:
    x = np.zeros((1, 2, 3), dtype=np.float32)

    assert image_id(x) != image_id(x.reshape(1, 3, 2))


def test_image_id_does_not_depend_on_the_memory_layout() -> None:
    x = (pixels(4, 5, 3) / np.float32(255)).transpose(2, 0, 1)

    assert image_id(x) == image_id(np.ascontiguousarray(x))


def test_ids_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    spec = save_npz(tmp_path / "a.npz", x=pixels(7, 5, 4, 3), y=range(7))
    opened = open_data(spec)
    whole = opened.batch(range(7))

    for size in (1, 3):
        for start in range(0, 7, size):
            part = opened.batch(range(start, min(start + size, 7)))
            np.testing.assert_array_equal(part.ids, whole.ids[part.index])
            assert torch.equal(part.x, whole.x[part.index])
    shuffled = opened.batch([6, 0, 3])
    assert whole.ids[[6, 0, 3]].tolist() == shuffled.ids.tolist()
    assert shuffled.y.tolist() == [6, 0, 3]


def test_ids_are_those_of_the_pixels_however_they_are_stored(tmp_path: Path) -> None:
    levels = pixels(3, 6, 5, 3)
    levels[0, 0, 0, 0], levels[0, 0, 0, 1] = 0, 255
    for row, image in enumerate(levels):
        save_image(tmp_path / "folder" / "class" / f"{row}.png", image)
    y = [0, 0, 0]
    specs = [
        str(tmp_path / "folder"),
        save_npz(tmp_path / "uint8.npz", x=levels, y=y),
        save_npz(tmp_path / "int64.npz", x=levels.astype(np.int64), y=y),
        save_npz(tmp_path / "float32.npz", x=levels / np.float32(255), y=y),
        save_npz(tmp_path / "float64.npz", x=levels / 255, y=y),
        save_npz(tmp_path / "nchw.npz", x=levels.transpose(0, 3, 1, 2), y=y),
    ]

    for size in (None, 4):
        ids = [open_data(spec, size=size).batch(range(3)).ids.tolist() for spec in specs]
        assert ids == [ids[0]] * len(specs)


def test_batch_has_the_promised_types(tmp_path: Path) -> None:
    spec = save_npz(tmp_path / "a.npz", x=pixels(4, 6, 5, 3), y=range(4))
    opened = open_data(spec)
    asked = np.array([2, 1])
    batch = opened.batch(asked)
    asked[:] = 0

    assert batch.x.shape == (2, 3, 6, 5)
    assert batch.x.dtype == torch.float32
    assert batch.x.is_contiguous()
    assert batch.y.dtype == torch.int64
    assert batch.ids.dtype == np.uint64
    assert batch.index.dtype == np.int64
    assert batch.index.tolist() == [2, 1]
    assert len(opened) == 4
    assert opened.shape == (3, 6, 5)
    assert opened.transform == "as stored"


def test_empty_batch_keeps_the_shape(tmp_path: Path) -> None:
    batch = open_data(save_npz(tmp_path / "a.npz", x=pixels(2, 6, 5), y=[0, 1])).batch([])

    assert batch.x.shape == (0, 1, 6, 5)
    assert len(batch.ids) == 0


# The fingerprint


def test_fingerprint_changes_with_pixel_label_order_and_transform(tmp_path: Path) -> None:
    x, y = pixels(4, 8, 8, 3), np.arange(4)
    other = x.copy()
    other[1, 0, 0, 0] ^= 1
    opened = open_data(save_npz(tmp_path / "a.npz", x=x, y=y))
    prints = [
        opened.fingerprint([0, 1, 2]),
        opened.fingerprint([0, 2, 1]),
        opened.fingerprint([0, 1]),
        open_data(save_npz(tmp_path / "b.npz", x=other, y=y)).fingerprint([0, 1, 2]),
        open_data(save_npz(tmp_path / "c.npz", x=x, y=y[::-1])).fingerprint([0, 1, 2]),
        open_data(str(tmp_path / "a.npz"), size=4).fingerprint([0, 1, 2]),
        open_data(str(tmp_path / "a.npz"), size=4, resize=6).fingerprint([0, 1, 2]),
    ]

    assert len(set(prints)) == len(prints)
    assert opened.fingerprint(np.array([0, 1, 2])) == prints[0]
    assert len(prints[0]) == 64


def test_fingerprint_does_not_take_one_layout_or_type_for_another(tmp_path: Path) -> None:
    flat = np.arange(1, 13, dtype=np.uint8)
    wide = save_npz(tmp_path / "a.npz", x=flat.reshape(1, 2, 2, 3), y=[0])
    deep = save_npz(tmp_path / "b.npz", x=flat.reshape(1, 3, 2, 2), y=[0])

    assert open_data(wide).shape == open_data(deep).shape
    assert open_data(wide).fingerprint([0]) != open_data(deep).fingerprint([0])
    bits = np.array([[[[1, 2, 3]]]], dtype=np.int32)
    sources = [
        ArraySource("a", x, np.zeros(1, dtype=np.int64)) for x in (bits, bits.view(np.float32))
    ]
    prints = [Data(source, (1, 1, 3)) for source in sources]
    assert prints[0].fingerprint([0]) != prints[1].fingerprint([0])


def test_fingerprint_of_files_covers_their_bytes_and_labels(folder: Path, tmp_path: Path) -> None:
    opened = open_data(str(folder))
    before = opened.fingerprint(range(3))
    files = ("pets/cat/a.PNG,0", "pets/cat/z.png,0", "pets/dog/b.png,1")
    listed = save_manifest(tmp_path / "list.csv", "file,label", *files)

    assert open_data(listed).fingerprint(range(3)) == before
    save_image(folder / "dog" / "b.png", pixels(6, 5, 3, seed=9))
    assert opened.fingerprint(range(3)) != before


def test_fingerprint_reports_progress(folder: Path) -> None:
    seen: list[int] = []
    open_data(str(folder)).fingerprint([2, 0, 1], seen.append)

    assert seen == [1, 1, 1]


# The images of a run


def test_smaller_draw_is_the_start_of_a_larger_one() -> None:
    whole = draw(100, None, seed=3)

    assert sorted(whole.tolist()) == list(range(100))
    assert whole.dtype == np.int64
    for samples in (1, 10, 99):
        assert draw(100, samples, seed=3).tolist() == whole[:samples].tolist()
    assert draw(100, 1000, seed=3).tolist() == whole.tolist()
    assert draw(100, None, seed=4).tolist() != whole.tolist()


def test_draw_is_the_same_everywhere() -> None:
    assert draw(10, 5, seed=0).tolist() == [3, 2, 1, 8, 6]


def test_draw_of_nothing_is_empty() -> None:
    assert draw(0, None, seed=0).shape == (0,)


@pytest.mark.parametrize("samples", [0, -1])
def test_draw_of_no_samples_is_refused(samples: int) -> None:
    with pytest.raises(UsageError, match="--samples"):
        draw(10, samples, seed=0)


# 8 bit


def test_every_level_is_the_same_from_array_quantise_and_file() -> None:
    levels = torch.from_numpy(LEVELS.reshape(1, 1, 16, 16))
    stored = LEVELS.reshape(1, 16, 16).astype(np.float32) / np.float32(255)
    read = png_round_trip(levels / 255)

    assert read is not None
    assert torch.equal(quantise(levels / 255), torch.from_numpy(stored)[None])
    assert torch.equal(read, torch.from_numpy(stored)[None])


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_quantise_goes_to_the_nearest_level_and_stays_there(values: list[float]) -> None:
    x = torch.tensor(values)
    q = quantise(x)

    assert torch.equal(quantise(q), q)
    assert bool(((q - x).abs().double() <= 1 / 510 + 1e-7).all())
    assert bool(((q.double() * 255 - (q.double() * 255).round()).abs() < 1e-4).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_equals_quantise(channels: int) -> None:
    x = torch.rand((3, channels, 9, 7), generator=torch.Generator().manual_seed(0))
    before = x.clone()
    read = png_round_trip(x)

    assert read is not None
    assert torch.equal(read, quantise(x))
    assert read.dtype == x.dtype
    assert torch.equal(x, before)


def test_png_cannot_hold_two_channels() -> None:
    assert png_round_trip(torch.zeros(1, 2, 4, 4)) is None


def test_png_round_trip_of_nothing_is_nothing() -> None:
    read = png_round_trip(torch.zeros(0, 3, 4, 4))

    assert read is not None
    assert read.shape == (0, 3, 4, 4)


# Specs


def test_listing_kinds_imports_neither_torch_nor_torchvision() -> None:
    code = (
        "import sys, robusteval.datasets.sources\n"
        "robusteval.datasets.sources.list_kinds()\n"
        "print(sorted({'torch', 'torchvision', 'sklearn', 'art'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "[]"


def test_kinds_are_listed_with_one_line_each() -> None:
    kinds = list_kinds()

    assert [form for form, _ in kinds][:2] == ["digits", "mnist:DIR"]
    assert all(line and "\n" not in line for _, line in kinds)


@pytest.mark.parametrize(
    "spec", ["", "digts", "cifar11:somewhere", "CIFAR10:somewhere", "digits:8"]
)
def test_unknown_data_is_refused_with_the_known_listed(spec: str) -> None:
    message = refusal(spec)

    for form, _ in list_kinds():
        assert form in message


def test_unknown_data_is_refused_with_a_suggestion() -> None:
    assert "did you mean cifar10?" in refusal("cifr10:somewhere")


@pytest.mark.parametrize("name", ["missing.npz", "missing/folder", "~nobody-here/x.csv"])
def test_path_that_does_not_exist_is_refused(name: str) -> None:
    assert "there is no file or folder" in refusal(name)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.tfrecord"
    path.touch()

    assert ".safetensors or .parquet" in refusal(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "val"}, "choose test or train"),
        ({"channels": 4}, "the model takes 4 channels, the images of digits (held out) have 1"),
        ({"size": 0}, "--size must be at least 1"),
        ({"resize": 10}, "--resize needs --size"),
        ({"size": 10, "resize": 9}, "cannot be smaller"),
        ({"channels": 3}, "the model takes 3 channels, the images of digits (held out) have 1"),
    ],
)
def test_option_that_cannot_be_met_is_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal("digits", **options)


# Digits


def test_digits_are_held_out_from_training_and_stratified() -> None:
    test, train = open_data("digits"), open_data("digits", split="train")

    assert (len(test), len(train)) == (500, 1297)
    assert test.class_names == tuple("0123456789")
    counts = np.bincount(test.labels) / np.bincount(np.r_[test.labels, train.labels])
    assert np.abs(counts - 500 / 1797).max() < 0.01
    held_out = set(test.batch(range(500)).ids.tolist())
    assert held_out.isdisjoint(train.batch(range(1297)).ids.tolist())
    assert (test.name, train.name) == ("digits (held out)", "digits (train)")


def test_digits_are_real_images_and_always_the_same() -> None:
    batch = open_data("digits").batch(range(500))

    assert batch.x.shape == (500, 1, 32, 32)
    assert batch.x.min() == 0
    assert batch.x.max() == 1
    assert torch.equal(quantise(batch.x), batch.x)
    assert (
        hashlib.sha256(batch.ids.tobytes() + batch.y.numpy().tobytes()).hexdigest()[:16]
        == "791a30100fc230ff"
    )


# torchvision's sets


def save_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def save_mnist(root: Path, name: str = "MNIST", labels: int = 5) -> None:
    for part, n in (("train", 6), ("t10k", 5)):
        save_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", pixels(n, 28, 28, seed=n))
        save_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(n)[:labels])


@pytest.mark.parametrize(("kind", "name"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist_is_read_from_its_files(tmp_path: Path, kind: str, name: str) -> None:
    save_mnist(tmp_path, name, labels=6)
    opened = open_data(f"{kind}:{tmp_path}")

    assert opened.name == f"{kind} (test)"
    assert opened.labels.tolist() == [0, 1, 2, 3, 4]
    assert opened.class_names is not None
    assert len(opened.class_names) == 10
    expected = pixels(5, 28, 28, seed=5)[:, None] / np.float32(255)
    np.testing.assert_array_equal(opened.batch(range(5)).x.numpy(), expected)
    assert len(open_data(f"{kind}:{tmp_path}", split="train")) == 6


def test_mnist_with_labels_missing_is_refused(tmp_path: Path) -> None:
    save_mnist(tmp_path, labels=4)

    assert "5 images but labels of shape (4,)" in refusal(f"mnist:{tmp_path}")


def test_truncated_mnist_is_refused(tmp_path: Path) -> None:
    save_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])

    assert "missing or damaged" in refusal(f"mnist:{tmp_path}")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def save_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from torchvision.datasets import CIFAR10

    base = root / "cifar-10-batches-py"
    base.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": pixels(2, 3072, seed=names.index(name)), "labels": [7, 2]}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    sums = [[name, md5(base / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(base / "batches.meta")})
    return base


def test_cifar_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_cifar(tmp_path, monkeypatch)
    opened = open_data(f"cifar10:{tmp_path}")

    assert opened.name == "cifar10 (test)"
    assert opened.labels.tolist() == [7, 2]
    assert opened.class_names == tuple("abcdefghij")
    expected = pixels(2, 3072, seed=5).reshape(2, 3, 32, 32) / np.float32(255)
    np.testing.assert_array_equal(opened.batch([0, 1]).x.numpy(), expected)
    assert len(open_data(f"cifar10:{tmp_path}", split="train")) == 10


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_foreign_pickle_among_cifar_files_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_cifar(tmp_path, monkeypatch)
    mark = tmp_path / "mark"
    for name in ("test_batch", "batches.meta"):
        original = (base / name).read_bytes()
        (base / name).write_bytes(pickle.dumps(Payload(mark)))
        assert "missing or damaged" in refusal(f"cifar10:{tmp_path}")
        (base / name).write_bytes(original)

    assert not mark.exists()


def test_svhn_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    path = tmp_path / "test_32x32.mat"
    images = pixels(32, 32, 3, 4)
    scipy.io.savemat(path, {"X": images, "y": np.array([[10], [1], [2], [9]], dtype=np.uint8)})
    entry = ["", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", SVHN.split_list | {"test": entry})
    opened = open_data(f"svhn:{tmp_path}")

    assert opened.labels.tolist() == [0, 1, 2, 9]
    assert opened.class_names == tuple("0123456789")
    expected = images.transpose(3, 2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(opened.batch(range(4)).x.numpy(), expected)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "test_32x32.mat is missing or damaged" in refusal(f"svhn:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("fashionmnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "test_32x32.mat"),
    ],
)
def test_missing_set_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    from torchvision import datasets

    def forbidden(self: object) -> NoReturn:
        raise AssertionError("a download was started")

    monkeypatch.setattr(getattr(datasets, TORCHVISION[kind][0]), "download", forbidden)
    message = refusal(f"{kind}:{tmp_path}")

    assert str(tmp_path / place) in message
    assert "--download" in message
    assert list(tmp_path.iterdir()) == []


def test_failed_download_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    def offline(self: object) -> NoReturn:
        raise URLError("no route to host")

    monkeypatch.setattr(SVHN, "download", offline)
    with pytest.raises(RunError, match="no route to host"):
        open_data(f"svhn:{tmp_path}", download=True)


@pytest.mark.parametrize("kind", ["cifar10", "imagenet"])
def test_set_without_a_folder_is_refused(kind: str) -> None:
    assert f"{kind}:DIR" in refusal(kind)


def test_torchvision_that_cannot_be_imported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)

    assert "install the version that belongs to" in refusal(f"mnist:{tmp_path}")


def test_imagenet_is_read_from_its_folder(tmp_path: Path) -> None:
    ids = list(read_wordnet_ids())
    for wnid in ids:
        (tmp_path / "val" / wnid).mkdir(parents=True)
    save_image(tmp_path / "val" / ids[700] / "a.JPEG", pixels(8, 8, 3))
    opened = open_data(f"imagenet:{tmp_path}")

    assert opened.name == "imagenet (val)"
    assert opened.labels.tolist() == [700]
    (tmp_path / "val" / "n00000000").mkdir()
    assert "'n00000000', which is no class of ImageNet" in refusal(f"imagenet:{tmp_path}")


@pytest.mark.parametrize(
    ("download", "said"), [(False, "is not below"), (True, "cannot be downloaded")]
)
def test_missing_imagenet_says_where_to_put_it(tmp_path: Path, download: bool, said: str) -> None:
    message = refusal(f"imagenet:{tmp_path}", download=download)

    assert said in message
    assert str(tmp_path / "val") in message


# Image folders


def test_folder_gives_sorted_classes_and_files(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / "._a.png").write_bytes(b"not an image")
    (folder / "cat" / "notes.txt").write_text("not an image")
    save_image(folder / "dog" / "puppies" / "c.png", pixels(6, 5, 3, seed=4))
    opened = open_data(str(folder))

    assert opened.name == "pets"
    assert opened.class_names == ("cat", "dog")
    assert opened.labels.tolist() == [0, 0, 1, 1]
    assert "1 entry in class folders is left out, cat/notes.txt: " in opened.notes[0]
    seeds = (3, 2, 1, 4)
    expected = np.stack([pixels(6, 5, 3, seed=seed) for seed in seeds]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(opened.batch(range(4)).x.numpy(), expected / np.float32(255))
    assert opened.source.where(0) == str(folder / "cat" / "a.PNG")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_an_image_that_is_no_file_is_not_left_out_in_silence(folder: Path, kind: str) -> None:
    """As where links into a store lead nowhere, since it was not fetched."""
    path = folder / "cat" / "zz.png"
    path.symlink_to("nowhere") if kind == "link" else os.mkfifo(path)

    assert "zz.png is " in refusal(str(folder))


def test_folder_agrees_with_torchvision(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(folder), allow_empty=True)
    ours = open_data(str(folder))

    assert ours.labels.tolist() == theirs.targets
    assert [ours.source.where(k) for k in range(3)] == [path for path, _ in theirs.samples]
    for k in range(3):
        expected = np.asarray(theirs[k][0]).transpose(2, 0, 1) / np.float32(255)
        np.testing.assert_array_equal(ours.source.image(k), expected)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_listed_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    levels = np.full((6, 5), 128, dtype=np.uint8)
    save_image(tmp_path / "class" / f"a{suffix}", levels)
    image = open_data(str(tmp_path), channels=1).source.image(0)

    assert image.shape == (1, 6, 5)
    np.testing.assert_allclose(image, 128 / 255, atol=2 / 255)


def test_hostile_class_names_stay_as_they_are(tmp_path: Path) -> None:
    names = ("<b>", "[bold]", "a,b=c", "café", "{x}", "%s")
    for name in names:
        save_image(tmp_path / name / "a.png", pixels(4, 4, 3))

    assert open_data(str(tmp_path)).class_names == tuple(sorted(names))


def test_numbered_folders_out_of_order_are_noted(tmp_path: Path) -> None:
    for name in range(11):
        save_image(tmp_path / str(name) / "a.png", pixels(4, 4, 3))
    opened = open_data(str(tmp_path))

    assert opened.class_names is not None
    assert opened.class_names[:4] == ("0", "1", "10", "2")
    assert "folder 10 is label 2" in opened.notes[0]


def test_numbered_folders_in_order_need_no_note(tmp_path: Path) -> None:
    for name in ("00", "01", "02"):
        save_image(tmp_path / name / "a.png", pixels(4, 4, 3))

    assert open_data(str(tmp_path)).notes == ()


def test_class_without_images_keeps_its_label_and_is_noted(folder: Path) -> None:
    (folder / "cow").mkdir()
    opened = open_data(str(folder))

    assert opened.labels.tolist() == [0, 0, 2]
    assert "cow" in opened.notes[0]


def test_link_that_leads_back_up_is_not_followed(folder: Path) -> None:
    (folder / "cat" / "loop").symlink_to(folder, target_is_directory=True)

    assert len(open_data(str(folder))) == 3


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", pixels(4, 4, 3))
    assert "one sub-folder of images per class" in refusal(tmp_path)

    save_manifest(tmp_path / "labels.csv", "file,label", "a.png,0")
    assert str(tmp_path / "labels.csv") in refusal(tmp_path)


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()

    assert "one sub-folder of images per class" in refusal(tmp_path)


def test_folder_of_splits_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save_image(tmp_path / part / "cat" / "a.png", pixels(4, 4, 3))

    assert "holds splits, not classes" in refusal(tmp_path)


# CSV manifests


def test_manifest_is_read_in_its_own_order(folder: Path, tmp_path: Path) -> None:
    spec = save_manifest(
        tmp_path / "labels.csv", " label, wnid ,file", "12,n1,pets/dog/b.png", "3,n2,pets/cat/z.png"
    )
    opened = open_data(spec)

    assert opened.name == "labels.csv"
    assert opened.class_names is None
    assert opened.labels.tolist() == [12, 3]
    expected = pixels(6, 5, 3, seed=2).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(opened.batch([1]).x.numpy()[0], expected)


def test_manifest_with_byte_order_mark_and_quotes_is_read(folder: Path) -> None:
    save_image(folder / "a, b.png", pixels(4, 4, 3))
    path = folder / "list.csv"
    path.write_text('file,label\r\n"a, b.png",1\r\n', encoding="utf-8-sig")

    assert open_data(str(path)).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("",), "found nothing"),
        (("file;label", "a.png;1"), "found file;label"),
        (("file,class", "a.png,1"), "found file, class"),
        (("file,label", "a.png,1", "gone.png,1"), "line 3: there is no file"),
        (("file,label", ",1"), "line 2: there is no file"),
        (("file,label", "a.png,1", "a.png,cat"), "line 3: the label 'cat' is not a non-negative"),
        (("file,label", "a.png,-1"), "line 2: the label '-1'"),
        (("file,label", "a.png,1.5"), "line 2: the label '1.5'"),
        (("file,label", "a.png,1_0"), "line 2: the label '1_0'"),
        (("file,label", "a.png"), "line 2: the label ''"),
        (("file,label", "a.png," + "9" * 5000), "is not a non-negative integer"),
    ],
)
def test_bad_manifest_is_refused(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    save_image(tmp_path / "a.png", pixels(4, 4, 3))

    assert said in refusal(save_manifest(tmp_path / "list.csv", *lines))


def test_columns_of_a_manifest_can_be_named(folder: Path, tmp_path: Path) -> None:
    spec = save_manifest(
        tmp_path / "a.csv", "id, image,file,target", "7,pets/dog/b.png,no,1", "8,pets/cat/z.png,,0"
    )

    assert open_data(spec, columns=("image", "target")).labels.tolist() == [1, 0]
    assert "found id, image, file, target: name those" in refusal(spec)
    assert "image,x; found id" in refusal(spec, columns=["image", "x"])


@pytest.mark.parametrize("columns", ["ab", ["a"], ["a", ""], ["a", "b", "c"], ["a", "a"], [1, 2]])
def test_columns_are_two_names(folder: Path, columns: Any) -> None:
    assert "two names" in refusal(folder, columns=columns)


def test_whole_number_is_one_label_however_it_is_written(folder: Path, tmp_path: Path) -> None:
    lines = [f"pets/dog/b.png,{text}" for text in ("3", "3.0", " 3. ", "03", "0.0")]
    spec = save_manifest(tmp_path / "a.csv", "file,label", *lines)
    npz = save_npz(tmp_path / "a.npz", x=pixels(5, 6, 5), y=[3.0, 3.0, 3.0, 3.0, -0.0])

    assert open_data(spec).labels.tolist() == [3, 3, 3, 3, 0]
    assert open_data(npz).labels.tolist() == [3, 3, 3, 3, 0]
    assert open_data(npz).labels.dtype == open_data(spec).labels.dtype == np.int64


@pytest.mark.parametrize("label", ["0.5", "-0", "1e0", "0x1", "1_0", "nan", "", "1.0.0", ".0"])
def test_other_labels_of_a_manifest_are_refused(folder: Path, tmp_path: Path, label: str) -> None:
    spec = save_manifest(tmp_path / "a.csv", "file,label", f"pets/dog/b.png,{label}")

    assert "line 2: the label" in refusal(spec)


@pytest.mark.parametrize("how", ["up", "absolute", "link", "linked folder", "up and down"])
def test_paths_of_a_manifest_stay_in_its_folder_unless_allowed(
    folder: Path, tmp_path: Path, how: str
) -> None:
    lists = tmp_path / "lists"
    (lists / "sub").mkdir(parents=True)
    (lists / "linked").symlink_to(folder, target_is_directory=True)
    (lists / "link.png").symlink_to(folder / "dog" / "b.png")
    named = {
        "up": "../pets/dog/b.png",
        "absolute": str(folder / "dog" / "b.png"),
        "link": "link.png",
        "linked folder": "linked/dog/b.png",
        "up and down": "sub/../../pets/dog/b.png",
    }
    spec = save_manifest(lists / "a.csv", "file,label", f"{named[how]},1")

    assert "line 2: " in refusal(spec)
    assert "--allow-outside" in refusal(spec)
    assert len(open_data(spec, allow_outside=True)) == 1


def test_paths_of_a_manifest_may_be_written_in_any_way_that_stays(tmp_path: Path) -> None:
    """The folder itself may be behind a link."""
    save_image(tmp_path / "real" / "a" / "b.png", pixels(6, 5, 3))
    (tmp_path / "real" / "again").symlink_to("a", target_is_directory=True)
    (tmp_path / "seen").symlink_to("real", target_is_directory=True)
    whole = tmp_path / "seen" / "a" / "b.png"
    spec = save_manifest(
        tmp_path / "seen" / "a.csv", "file,label", "a/../a/b.png,0", "again/b.png,1", f"{whole},2"
    )

    assert len(open_data(spec)) == 3


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """One of the two would decide."""
    spec = save_manifest(tmp_path / "a.csv", "file,label,label", "a.png,0,1")

    assert "two columns label" in refusal(spec)


def test_file_outside_is_not_even_looked_for(tmp_path: Path) -> None:
    """Otherwise a table could ask what there is."""
    spec = save_manifest(tmp_path / "a.csv", "file,label", "/nowhere/at/all.png,0")

    assert "not in the folder" in refusal(spec)


def test_photos_that_are_turned_are_said_and_known_apart(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, orientation in (("a", exif), ("b", Image.Exif())):
        (tmp_path / "photos" / name).mkdir(parents=True)
        image = Image.fromarray(pixels(4, 4, 3, seed=ord(name)))
        image.save(tmp_path / "photos" / name / "1.jpg", exif=orientation, quality=95)
    opened = open_data(str(tmp_path / "photos"))
    stored = (tmp_path / "photos" / "a" / "1.jpg").read_bytes()

    assert "turned upright as their EXIF says, such as 1.jpg" in opened.notes[0]
    assert [opened.count_turned([i]) for i in (0, 1)] == [1, 0]
    assert opened.count_turned([0, 1]) == 1
    assert opened.source.raw(0) != stored
    shutil.rmtree(tmp_path / "photos" / "a")
    (tmp_path / "photos" / "a").mkdir()
    assert open_data(str(tmp_path / "photos")).source.raw(0) == opened.source.raw(1)


def test_damaged_orientation_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    damaged = b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"
    Image.fromarray(pixels(4, 5, 3)).save(path, exif=damaged)

    assert decoded(path).shape == (3, 4, 5)


def test_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")

    assert "save it as comma-separated text in UTF-8" in refusal(path)


def test_manifest_without_rows_has_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(NothingEvaluated):
        open_data(save_manifest(tmp_path / "list.csv", "file,label"))


# Arrays


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6, 5), (1, 6, 5)),
        ((4, 6, 5, 1), (1, 6, 5)),
        ((4, 1, 6, 5), (1, 6, 5)),
        ((4, 6, 5, 3), (3, 6, 5)),
        ((4, 3, 6, 5), (3, 6, 5)),
    ],
)
def test_layout_is_told_from_the_shape(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = pixels(*shape)
    opened = open_data(save_npz(tmp_path / "a.npz", x=x, y=range(4)))

    assert opened.shape == expected
    nchw = x.transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else x
    expected_x = nchw.reshape(4, *expected) / np.float32(255)
    np.testing.assert_array_equal(opened.batch(range(4)).x.numpy(), expected_x)


@pytest.mark.parametrize("shape", [(4, 3, 32, 3), (4, 1, 28, 1), (4, 3, 28, 1)])
def test_layout_that_can_be_read_twice_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    message = refusal(save_npz(tmp_path / "a.npz", x=pixels(*shape), y=range(4)))

    assert "NCHW and as NHWC" in message
    assert "squeeze" in message


@pytest.mark.parametrize("shape", [(4, 784), (4, 6, 5, 2), (4, 3, 6, 5, 1), (4,), (), (4, 0, 5, 3)])
def test_array_that_is_no_stack_of_images_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    assert "reshape it to" in refusal(save_npz(tmp_path / "a.npz", x=pixels(*shape), y=range(4)))


def at(value: float, dtype: type = np.float32) -> np.ndarray:
    x: np.ndarray = np.full((4, 6, 5), 0.5).astype(dtype)
    x[2, 3, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (at(255.0), "looks like 0..255 stored as float"),
        (at(-1.5), "looks normalised (min -1.5, max 0.5)"),
        (at(np.nan), "NaN or infinite"),
        (at(np.inf), "NaN or infinite"),
        (at(65535.0), "floats up to 65535"),
        (at(1.0000001), "clip them to [0, 1]"),
        (np.full((4, 6, 5), 1 / 255, dtype=np.float32), "divided by 255 twice?"),
        (at(256, np.int64), "integers from 0 to 256"),
        (at(-1, np.int16), "integers from -1 to 0"),
        (at(1, np.uint8), "if 1 means white"),
        (np.zeros((4, 6, 5), dtype=bool), "holds bool"),
        (np.zeros((4, 6, 5), dtype=complex), "holds complex128"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_values_out_of_range_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray, said: str, chunk: int
) -> None:
    monkeypatch.setattr(checks, "CHUNK", chunk)

    assert said in refusal(save_npz(tmp_path / "a.npz", x=x, y=range(4)))


def test_normalised_data_is_sent_to_mean_and_std(tmp_path: Path) -> None:
    message = refusal(save_npz(tmp_path / "a.npz", x=at(-1.5), y=range(4)))

    assert "--mean" in message
    assert "--std" in message


@pytest.mark.parametrize(
    "y",
    [
        np.array([2, 0, 1, 2], dtype=np.uint8),
        np.array([[2], [0], [1], [2]]),
        np.array([2.0, 0.0, 1.0, 2.0]),
        np.eye(3, dtype=np.float32)[[2, 0, 1, 2]],
        np.eye(3, dtype=bool)[[2, 0, 1, 2]],
        np.asfortranarray(np.eye(3)[[2, 0, 1, 2]]),
    ],
)
def test_labels_of_every_form_become_indices(tmp_path: Path, y: np.ndarray) -> None:
    labels = open_data(save_npz(tmp_path / "a.npz", x=pixels(4, 6, 5), y=y)).labels

    assert labels.tolist() == [2, 0, 1, 2]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("y", "said"),
    [
        ([0, 1, 2], "has 4 images but labels of shape (3,)"),
        (0, "has 4 images but labels of shape ()"),
        ([0, 1, 2, -1], "not whole numbers from 0 up"),
        ([0, 1, 2, 0.5], "not whole numbers from 0 up"),
        ([0, 1, 2, np.nan], "not whole numbers from 0 up"),
        ([0, 1, 2, 1e300], "not whole numbers from 0 up"),
        (np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64), "not whole numbers from 0 up"),
        (["cat", "dog", "cat", ""], "without a label"),
        (np.full((4, 2), 0.5), "not one-hot"),
        (np.zeros((4, 2)), "not one-hot"),
        (np.zeros((4, 2, 2)), "give one integer per image"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, y: Any, said: str) -> None:
    assert said in refusal(save_npz(tmp_path / "a.npz", x=pixels(4, 6, 5), y=y))


@pytest.mark.parametrize(
    ("keys", "split", "name"),
    [
        (("x", "y"), "test", "a.npz (x)"),
        (("x", "y"), "train", "a.npz (x)"),
        (("images", "labels"), "test", "a.npz (images)"),
        (("x_test", "y_test"), "test", "a.npz (x_test)"),
        (("x_train", "y_train"), "train", "a.npz (x_train)"),
    ],
)
def test_arrays_are_found_by_their_keys(
    tmp_path: Path, keys: tuple[str, str], split: str, name: str
) -> None:
    spec = save_npz(tmp_path / "a.npz", **{keys[0]: pixels(2, 6, 5), keys[1]: [0, 1]})

    assert open_data(spec, split=split).name == name


def test_each_split_has_its_own_arrays(tmp_path: Path) -> None:
    arrays = {"x_train": pixels(3, 6, 5), "y_train": range(3)}
    spec = save_npz(tmp_path / "a.npz", x_test=pixels(2, 6, 5), y_test=[0, 1], **arrays)

    assert (len(open_data(spec)), len(open_data(spec, split="train"))) == (2, 3)


def test_archive_without_the_arrays_names_what_it_has(tmp_path: Path) -> None:
    arrays = {"x_train": pixels(3, 6, 5), "y_train": range(3)}

    assert "found x_train, y_train" in refusal(save_npz(tmp_path / "a.npz", **arrays))
    assert "found x" in refusal(save_npz(tmp_path / "b.npz", x=pixels(3, 6, 5)))


def test_arrays_without_images_have_nothing_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(NothingEvaluated):
        open_data(save_npz(tmp_path / "a.npz", x=pixels(0, 6, 5), y=[]))


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = Path(save_npz(tmp_path / "whole.npz", x=pixels(4, 6, 5), y=range(4))).read_bytes()
    for name, content in {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "altered": whole[:200] + b"\xff\xff\xff" + whole[203:],
        "text": b"x,y",
    }.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        assert "write it again with numpy.savez" in refusal(path)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_archive_with_objects_is_refused_and_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", limit)
    mark = tmp_path / "mark"
    objects = np.array([Payload(mark)] * 2, dtype=object)

    refusal(save_npz(tmp_path / "a.npz", x=objects, y=[0, 1]))
    assert not mark.exists()


def test_bytes_posing_as_objects_are_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = save_npz(tmp_path / "a.npz", x=np.ones((2, 6, 5)), y=[0, 1])
    with zipfile.ZipFile(spec) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(spec, "w") as archive:
        archive.writestr("x.npy", entries["x.npy"].replace(b"'<f8'", b"'|O' "))
        archive.writestr("y.npy", entries["y.npy"])
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 0)

    assert "it holds Python objects" in refusal(spec)


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_images_of_a_mapped_array_do_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    images = np.random.default_rng(0).integers(0, 256, (16_000, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.zeros(16_000, np.int64))

    def measure() -> int:
        """Bytes of files that count as memory of this process."""
        found = re.search(r"RssFile:\s+([0-9]+)", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    before = measure()
    data = open_data(str(tmp_path / "data.npz"))
    data.fingerprint(range(16_000))
    for start in range(0, 16_000, 500):
        data.batch(range(start, start + 500))

    assert data.batch([15_999]).x[0].numpy().tobytes() == (
        (images[15_999].transpose(2, 0, 1) / np.float32(255)).astype(np.float32).tobytes()
    )
    assert measure() - before < images.nbytes // 3


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_mapped_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    x = np.asarray(pixels(9, 6, 5, 3), order=order)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=range(9))
    spec = str(tmp_path / "a.npz")
    small = open_data(spec)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(unpacked))
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    monkeypatch.setattr(npz, "CHUNK", 100)
    large = open_data(spec)

    assert isinstance(large.source, ArraySource)
    assert isinstance(large.source.images, np.memmap)
    assert list(unpacked.iterdir()) == []
    assert torch.equal(large.batch(range(9)).x, small.batch(range(9)).x)
    assert large.fingerprint(range(9)) == small.fingerprint(range(9))


@pytest.mark.parametrize("order", ["C", "F"])
def test_stored_array_is_mapped_where_it_lies_and_a_packed_one_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    """A copy of a large data set takes as much disk again, and minutes; bits are compared."""
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    x, y = np.asarray(pixels(9, 6, 5, 3), order=order), np.arange(9)
    np.savez(tmp_path / "stored.npz", x=x, y=y)
    np.savez_compressed(tmp_path / "packed.npz", x=x, y=y)
    copied: list[str] = []
    unpack = npz._unpack

    def watched(packed: Any, file: Any, key: str) -> None:
        copied.append(key)
        unpack(packed, file, key)

    monkeypatch.setattr(npz, "_unpack", watched)

    stored, packed = (open_data(str(tmp_path / f"{name}.npz")) for name in ("stored", "packed"))

    assert copied == ["x"]
    assert torch.equal(stored.batch(range(9)).x, packed.batch(range(9)).x)
    content = bytearray((tmp_path / "stored.npz").read_bytes())
    content[content.index(x.tobytes("A")) + 50] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / "flipped.npz")


def test_stored_floats_that_lie_askew_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are made of them without a copy, and must begin where floats may begin."""
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    x = (pixels(9, 6, 5, 3) / np.float32(255)).astype(np.float32)
    images = []
    for shift in range(4):
        path = tmp_path / f"{shift}.npz"
        np.savez(path, x=x, y=range(9))
        path.write_bytes(bytes(shift) + path.read_bytes())
        data = open_data(str(path))
        assert isinstance(data.source, ArraySource)
        assert isinstance(data.source.images, np.memmap)
        assert data.source.images.flags.aligned
        images.append(data.batch(range(9)).x)

    assert all(torch.equal(images[0], other) for other in images)


def test_stored_array_that_says_it_is_longer_than_it_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows it in the file is no image of the set."""
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    path = tmp_path / "a.npz"
    x = pixels(9, 6, 5, 3)
    whole, short = io.BytesIO(), io.BytesIO()
    np.save(whole, x)
    short.write(whole.getvalue()[:-100])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", short.getvalue())
        archive.writestr("more.txt", bytes(4000))
        labels = io.BytesIO()
        np.save(labels, np.arange(9))
        archive.writestr("y.npy", labels.getvalue())
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    size = directory + 24  # of the unpacked member, after that of the packed one
    longer = struct.pack("<L", len(whole.getvalue()))
    path.write_bytes(content[:size] + longer + content[size + 4 :])

    assert "cannot be read" in refusal(path)


def test_stored_array_is_copied_where_files_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    x = pixels(9, 6, 5, 3)
    np.savez(tmp_path / "a.npz", x=x, y=range(9))
    small, mapped = open_data(str(tmp_path / "a.npz")), npz.map_array

    def fail_in_place(file: Any, layout: Any, begin: int = 0) -> Any:
        if begin:
            raise OSError(19, "No such device")
        return mapped(file, layout)

    monkeypatch.setattr(npz, "map_array", fail_in_place)

    copied = open_data(str(tmp_path / "a.npz"))

    assert torch.equal(copied.batch(range(9)).x, small.batch(range(9)).x)


def test_large_array_that_is_cut_short_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = save_npz(tmp_path / "a.npz", x=pixels(9, 6, 5, 3), y=range(9))
    with zipfile.ZipFile(spec) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(spec, "w") as archive:
        archive.writestr("x.npy", entries["x.npy"][:-1])
        archive.writestr("y.npy", entries["y.npy"])
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)

    assert "cannot be read" in refusal(spec)


def test_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    np.savez_compressed(tmp_path / "a.npz", x=pixels(9, 6, 5, 3), y=range(9))
    monkeypatch.setattr(npz, "MAX_IN_MEMORY", 500)
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(RunError, match="TMPDIR"):
        open_data(str(tmp_path / "a.npz"))


# Decoding files


def decoded(path: Path, **options: Any) -> np.ndarray:
    spec = save_manifest(path.parent / "one.csv", "file,label", f"{path.name},0")
    return open_data(spec, **options).source.image(0)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65534, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff", "a.pgm"):
        grey = decoded(save_image(tmp_path / name, values), channels=1)
        np.testing.assert_array_equal(grey[0], values.astype(np.float32) / np.float32(65535))
    colour = decoded(tmp_path / "a.png")

    assert colour.shape == (3, 2, 3)
    np.testing.assert_array_equal(colour, np.repeat(decoded(tmp_path / "a.png", channels=1), 3, 0))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_pixels_are_refused(tmp_path: Path, dtype: type) -> None:
    path = save_image(tmp_path / "a.tiff", np.ones((4, 4), dtype=dtype))

    with pytest.raises(UsageError, match="range of its 32-bit pixels"):
        decoded(path)


def test_channels_decide_between_grey_and_colour(tmp_path: Path) -> None:
    grey, colour = pixels(4, 5), np.full((4, 5, 3), (255, 0, 0), dtype=np.uint8)
    save_image(tmp_path / "grey.png", grey)
    save_image(tmp_path / "colour.png", colour)

    assert decoded(tmp_path / "grey.png").shape == (3, 4, 5)
    assert decoded(tmp_path / "grey.png", channels=1).shape == (1, 4, 5)
    luma = decoded(tmp_path / "colour.png", channels=1)
    np.testing.assert_array_equal(luma, np.full((1, 4, 5), np.float32(76) / np.float32(255)))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    levels = pixels(4, 5, 4)

    expected = levels[..., :3].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(decoded(save_image(tmp_path / "a.png", levels)), expected)


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(4, 5, 3)).quantize(4)
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff\xff")

    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [*range(9), 77])
def test_image_is_upright_whichever_way_the_camera_was_held(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels(4, 5, 3)).save(path, exif=exif)
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file)).transpose(2, 0, 1)

    np.testing.assert_array_equal(decoded(path), upright / np.float32(255))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".tiff", ".webp"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save_image(tmp_path / f"a{suffix}", pixels(40, 40, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(UsageError, match=rf"a\{suffix} cannot be read"):
        decoded(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)

    with pytest.raises(UsageError, match=r"a\.png cannot be read"):
        decoded(path)


@pytest.mark.parametrize("form", ["EPS", "PCX"])
def test_form_outside_the_list_is_refused_under_any_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels(8, 8, 3)).save(path, form)

    with pytest.raises(UsageError, match="cannot identify image file"):
        decoded(path)


@pytest.mark.parametrize("limit", [50, 90])
def test_decompression_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = save_image(tmp_path / "a.png", pixels(10, 11, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with pytest.raises(UsageError, match="decompression bomb"):
        decoded(path)


def test_file_that_vanishes_is_named(folder: Path) -> None:
    opened = open_data(str(folder))
    (folder / "dog" / "b.png").unlink()

    for read in (opened.batch, opened.fingerprint):
        with pytest.raises(UsageError, match=r"b\.png cannot be read"):
            read([2])


# One shape


def test_odd_file_is_named(folder: Path) -> None:
    save_image(folder / "dog" / "odd.png", pixels(7, 9, 3))
    opened = open_data(str(folder))

    with pytest.raises(UsageError, match=r"odd\.png is 9x7 pixels, the first image is 5x6.*--size"):
        opened.batch(range(4))
    assert open_data(str(folder), size=4).batch(range(4)).x.shape == (4, 3, 4, 4)


@pytest.mark.parametrize("shape", [(40, 57, 3), (57, 40, 3), (31, 31, 3), (16, 20, 3), (9, 12, 3)])
@pytest.mark.parametrize("resize", [None, 16, 19, 21])
def test_resizing_agrees_with_torchvision(
    tmp_path: Path, shape: tuple[int, ...], resize: int | None
) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    levels = pixels(*shape)
    save_image(tmp_path / "class" / "a.png", levels)
    opened = open_data(str(tmp_path), size=16, resize=resize)

    theirs = Compose([Resize(resize or 16), CenterCrop(16)])(Image.fromarray(levels))
    expected = np.asarray(theirs).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(opened.batch([0]).x.numpy()[0], expected)
    way = "(bilinear, antialiased)"
    assert opened.transform.startswith(f"shorter side to {resize or 16} {way}, centre crop 16")


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("stretch", [False, True])
def test_interpolation_is_that_of_pillow(tmp_path: Path, name: str, stretch: bool) -> None:
    levels = pixels(40, 57, 3)
    save_image(tmp_path / "class" / "a.png", levels)
    opened = open_data(str(tmp_path), size=16, resize=20, interpolation=name, stretch=stretch)

    side = (20, 20) if stretch else (28, 20)
    picture = Image.fromarray(levels).resize(side, Image.Resampling[name.upper()])
    left = round((side[0] - 16) / 2)
    expected = np.asarray(picture)[2:18, left : left + 16].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(opened.batch([0]).x.numpy()[0], expected)
    assert opened.transform.startswith("both sides" if stretch else "shorter side")
    assert name in opened.transform


def test_floats_stay_in_range_where_a_filter_overshoots(tmp_path: Path) -> None:
    x = np.zeros((1, 20, 20), np.float32)
    x[:, 5:11, 5:11] = 1
    x[:, 0, 0] = 0.3  # between two levels
    spec = save_npz(tmp_path / "a.npz", x=x, y=[0])
    found = open_data(spec, size=9, interpolation="lanczos").batch([0]).x

    assert (float(found.min()), float(found.max())) == (0.0, 1.0)


def test_image_of_the_right_size_stays_untouched(tmp_path: Path) -> None:
    levels = pixels(16, 16, 3)
    save_image(tmp_path / "class" / "a.png", levels)
    x = open_data(str(tmp_path), size=16, resize=20).batch([0]).x

    np.testing.assert_array_equal(x.numpy()[0], levels.transpose(2, 0, 1) / np.float32(255))
    spec = save_npz(tmp_path / "a.npz", x=levels[None], y=[0])
    assert open_data(spec, size=16, resize=20).transform == "as stored"


def test_floats_between_the_levels_are_resized_as_floats(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((2, 20, 30), dtype=np.float32)
    batch = open_data(save_npz(tmp_path / "a.npz", x=x, y=[0, 1]), size=10).batch([0, 1])

    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x)[:, None], (10, 15), mode="bilinear", antialias=True
    )[..., 2:12]
    torch.testing.assert_close(batch.x, expected, atol=1e-6, rtol=0)
    assert not torch.equal(quantise(batch.x), batch.x)


def test_resized_white_stays_white(tmp_path: Path) -> None:
    x = np.ones((1, 23, 37), dtype=np.float32)
    x[0, 0, 0] = 0.1

    assert open_data(save_npz(tmp_path / "a.npz", x=x, y=[0]), size=9).batch([0]).x.max() == 1


def test_image_too_narrow_to_resize_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "class" / "a.png", pixels(1, 100, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    opened = open_data(str(tmp_path), size=8)

    with pytest.raises(UsageError, match=r"a\.png is too long and narrow"):
        opened.batch([0])
