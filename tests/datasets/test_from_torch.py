"""Data sets of PyTorch, which may hold nearly anything, become data or one sentence."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import robusteval
from robusteval.datasets import from_torch
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.from_torch import from_dataset
from robusteval.errors import NothingEvaluated, RobustevalError, UsageError

LEVELS = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 6), dtype=np.uint8)
LABELS = np.arange(40) % 5


class Pairs(Dataset[Any]):
    """Images in some form with their labels; counts how often each is read."""

    def __init__(self, images: Any, given: Any = LABELS, **attributes: Any) -> None:
        self.images, self.given, self.reads = images, given, np.zeros(len(images), int)
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.images[index], self.given[index]


def pictures(mode: str = "RGB") -> list[Image.Image]:
    return [Image.fromarray(each.transpose(1, 2, 0)).convert(mode) for each in LEVELS]


def refusal(dataset: Any, **options: Any) -> str:
    with pytest.raises(RobustevalError) as caught:
        from_dataset(dataset, **options).batch(range(len(dataset)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "images",
    [
        LEVELS,
        LEVELS.transpose(0, 2, 3, 1),
        torch.from_numpy(LEVELS),
        torch.from_numpy(LEVELS) / 255,
        torch.from_numpy(LEVELS).long(),
        torch.from_numpy(LEVELS / 255).requires_grad_(),
        pictures(),
        pictures("RGBA"),
    ],
    ids=["array", "nhwc", "tensor", "floats", "int64", "float64 with grad", "pillow", "alpha"],
)
def test_every_form_of_an_image_gives_the_same_batch(images: Any) -> None:
    expected = from_arrays(LEVELS, LABELS).batch([7, 0, 30])
    batch = from_dataset(Pairs(images)).batch([7, 0, 30])

    assert torch.equal(expected.x, batch.x)
    assert torch.equal(expected.y, batch.y)
    assert np.array_equal(expected.ids, batch.ids)


def test_it_is_public_and_named_by_its_class() -> None:
    data = robusteval.from_dataset(Pairs(LEVELS, classes=["a", "b", "c", "d", "e"]))

    assert (data.name, data.shape, len(data)) == ("Pairs", (3, 8, 6), 40)
    assert data.class_names == ("a", "b", "c", "d", "e")
    assert from_dataset(Pairs(LEVELS), name="mine", class_names=["x"]).class_names == ("x",)
    assert "mine, image 3" in from_dataset(Pairs(LEVELS), name="mine").source.where(3)


def test_the_fingerprint_is_that_of_equal_arrays() -> None:
    dataset = TensorDataset(torch.from_numpy(LEVELS), torch.from_numpy(LABELS))

    assert from_dataset(dataset).fingerprint([3, 1]) == from_arrays(LEVELS, LABELS).fingerprint(
        [3, 1]
    )


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_listed_labels_are_taken_without_reading_images(attribute: str) -> None:
    dataset = Pairs(LEVELS, **{attribute: LABELS.tolist()})

    data = from_dataset(dataset)

    assert np.array_equal(data.labels, LABELS)
    assert data.labels.dtype == np.int64
    assert dataset.reads.sum() == from_torch.LOOKED_AT


@pytest.mark.parametrize("listed", [LABELS[::-1], LABELS[:9], "cat", None, lambda: 3, LABELS - 1])
def test_lists_of_something_else_are_not_labels(listed: Any) -> None:
    """A transform of labels leaves `targets` as they were."""
    assert np.array_equal(from_dataset(Pairs(LEVELS, targets=listed)).labels, LABELS)


def test_labels_of_a_part_are_those_of_the_part() -> None:
    dataset = Pairs(LEVELS, targets=torch.from_numpy(LABELS))
    part = Subset(Subset(dataset, list(range(39, 0, -1))), list(range(0, 38, 2)))

    data = from_dataset(part)

    assert np.array_equal(data.labels, LABELS[39:1:-2])
    assert dataset.reads.sum() == 16


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        torch.from_numpy(LABELS),
        LABELS.astype(np.float32),
        np.eye(5, dtype=int)[LABELS],
    ],
)
def test_labels_of_every_form_become_numbers(labels: Any) -> None:
    assert np.array_equal(from_dataset(Pairs(LEVELS, labels)).labels, LABELS)


def test_nothing_is_read_twice_while_there_is_room() -> None:
    """Not for labels, shape, fingerprint and two batches together."""
    dataset = Pairs(pictures())
    data = from_dataset(dataset)
    data.fingerprint(range(40))
    data.batch(range(40))
    data.batch(range(40))

    assert dataset.reads.tolist() == [1] * 40


def test_what_does_not_fit_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_torch, "MAX_KEPT", 3 * LEVELS[0].nbytes)
    dataset = Pairs(LEVELS, targets=LABELS)

    batch = from_dataset(dataset).batch(range(40))

    assert torch.equal(batch.x, from_arrays(LEVELS, LABELS).batch(range(40)).x)
    assert dataset.reads[:3].tolist() == [1, 1, 1]
    assert dataset.reads[3:16].tolist() == [2] * 13


def test_images_are_read_when_asked_for() -> None:
    dataset = Pairs(LEVELS, targets=LABELS)
    data = from_dataset(dataset)
    data.batch([20, 21])

    assert dataset.reads[16:].tolist() == [0] * 4 + [1, 1] + [0] * 18


def test_grey_pictures_have_one_channel_and_can_be_asked_for_three() -> None:
    grey = pictures("L")

    assert from_dataset(Pairs(grey)).shape == (1, 8, 6)
    assert from_dataset(Pairs(grey), channels=3).shape == (3, 8, 6)
    assert from_dataset(Pairs(pictures("1"))).batch([0]).x.flatten().tolist()[0] in (0, 1)
    assert from_dataset(Pairs(pictures()), channels=1).shape == (1, 8, 6)


def test_pictures_of_16_bits_are_scaled() -> None:
    levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
    data = from_dataset(Pairs([Image.fromarray(levels)] * 3, [0, 1, 2]))

    assert torch.allclose(data.batch([0]).x[0, 0], torch.from_numpy(levels / 65535).float())


def test_images_of_several_sizes_need_one() -> None:
    images = [np.full((3, side, side), 99, np.uint8) for side in (8, 9)]

    assert "pass --size" in refusal(Pairs(images, [0, 1]))
    assert from_dataset(Pairs(images, [0, 1]), size=8).batch([0, 1]).x.shape == (2, 3, 8, 8)


def test_a_black_image_among_others_is_an_image() -> None:
    images = LEVELS.copy()
    images[20] = 0

    assert float(from_dataset(Pairs(images)).batch([20]).x.max()) == 0


class Stream(IterableDataset[Any]):
    """A data set without positions."""

    def __iter__(self) -> Iterator[Any]:
        yield LEVELS[0], 0


class Breaking(Pairs):
    """Breaks at one image."""

    def __getitem__(self, index: int) -> Any:
        if index == 30:
            raise OSError("torn\nfile")
        return super().__getitem__(index)


class Single(Pairs):
    """Images alone."""

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Stream(), "pass a data set with __getitem__ and __len__"),
        (DataLoader(Pairs(LEVELS)), "pass the data set itself, DataLoader.dataset"),
        (Breaking(LEVELS), "image 30 cannot be read (torn file): mend the data set"),
        (Breaking(LEVELS, targets=LABELS), "image 30 cannot be read (torn file)"),
        (Single(LEVELS), "image 0 is ndarray, not a pair (image, label)"),
        (Pairs(["a", "b"], [0, 1]), "image 0 has the shape ()"),
        (Pairs([None] * 2, [0, 1]), "image 0 has the shape ()"),
        (Pairs(np.zeros((2, 5, 8, 6))), "reshape it to"),
        (Pairs(LEVELS / 255 - 0.5), "looks normalised"),
        (Pairs(LEVELS.astype(np.float32)), "looks like 0..255 stored as float"),
        (Pairs(LEVELS / 255**2), "divided by 255 twice"),
        (Pairs(np.full((2, 3, 4, 4), np.nan)), "NaN"),
        (Pairs(LEVELS > 9), "holds bool"),
        (Pairs(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)), "cannot be read"),
        (Pairs(LEVELS, LABELS - 1), "not whole numbers from 0 up"),
        (Pairs(LEVELS, LABELS + 0.5), "not whole numbers from 0 up"),
        (Pairs(LEVELS, ["cat"] * 40), "give one integer per image"),
        (Pairs(LEVELS, [None] * 40), "give one integer per image"),
        (Pairs(LEVELS, [0, [1, 2]] * 20), "labels of several shapes"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(dataset: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_dataset(dataset).batch(range(len(dataset)))

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 1}, "the model takes 1 channels"),
        ({"channels": 2}, "the model takes 2 channels"),
        ({"size": 0}, "at least 1 pixel"),
        ({"resize": 9}, "--resize needs --size"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(Pairs(LEVELS), **options)


def test_a_data_set_of_nothing_has_nothing_to_evaluate() -> None:
    with pytest.raises(NothingEvaluated, match="holds no images"):
        from_dataset(Pairs([]))


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, robusteval.datasets.from_torch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
