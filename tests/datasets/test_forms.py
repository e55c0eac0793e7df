"""Images as people save them: any channels and ranges, labels by name, tensors and tables."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

from robusteval.cli import cli
from robusteval.datasets import parquet
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.sources import open_data
from robusteval.errors import Refused, UsageError

LEVELS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 2, 1])


def refusal(spec: object, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        open_data(str(spec), **options).batch([0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def see(spec: object, **options: Any) -> tuple[np.ndarray, list[int]]:
    data = open_data(str(spec), **options)
    batch = data.batch(range(len(data)))
    return batch.x.numpy(), batch.y.tolist()


@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("last", [False, True])
def test_any_number_of_channels_is_read(tmp_path: Path, channels: int, last: bool) -> None:
    x = np.random.default_rng(1).random((4, channels, 8, 9), dtype=np.float32)
    np.savez(tmp_path / "a.npz", x=x.transpose(0, 2, 3, 1) if last else x, y=LABELS)

    found, labels = see(tmp_path / "a.npz", channels=channels)
    assert np.array_equal(found, x)
    assert labels == LABELS.tolist()


def test_axis_of_channels_is_never_guessed() -> None:
    square, oblong = np.zeros((2, 5, 8, 8)), np.zeros((2, 5, 8, 9))
    square[0, 0, 0, 0] = oblong[0, 0, 0, 0] = 1

    assert from_arrays(square, [0, 1]).shape == (5, 8, 8)
    assert from_arrays(oblong, [0, 1], channels=9).shape == (9, 5, 8)
    with pytest.raises(UsageError, match="as many channels as the model takes"):
        from_arrays(oblong, [0, 1])


def test_model_with_other_channels_than_files_have_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(LEVELS[0]).save(tmp_path / "class" / "a.png")

    assert "image files have 1 or 3: give the images as arrays" in refusal(tmp_path, channels=4)


@pytest.mark.parametrize(
    ("x", "span"),
    [
        (np.arange(240, dtype=np.uint16).reshape(4, 1, 6, 10) * 273, (0, 65535)),
        (np.arange(240, dtype=np.int16).reshape(4, 1, 6, 10) - 100, (-100, 300)),
        (np.linspace(-1, 1, 240, dtype=np.float32).reshape(4, 1, 6, 10), (-1, 1)),
        (np.linspace(0, 4e3, 240).reshape(4, 1, 6, 10), (0, 1e4)),
    ],
)
def test_values_in_a_range_are_scaled(
    tmp_path: Path, x: np.ndarray, span: tuple[float, float]
) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=LABELS)
    found, _ = see(tmp_path / "a.npz", value_range=span)

    expected = (x.astype(np.float64) - span[0]) / (span[1] - span[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    stated = f"values {span[0]:g} to {span[1]:g} as 0 to 1; as stored"
    assert open_data(str(tmp_path / "a.npz"), value_range=span).transform == stated
    assert "outside --range" in refusal(tmp_path / "a.npz", value_range=(span[0], span[0] + 1e-3))


def test_values_are_written_with_all_their_digits() -> None:
    values = np.array([[[0, 1234567], [7, 9]]])

    with pytest.raises(UsageError, match="integers from 0 to 1234567, not 0 to 255"):
        from_arrays(values, [0])
    with pytest.raises(UsageError, match="from 0 to 1234567, outside --range 0,1234566"):
        from_arrays(values, [0], value_range=(0, 1234566))


@pytest.mark.parametrize("span", [(1, 0), (1,), (0, float("nan")), (0, 1, 2)])
def test_a_range_is_two_numbers(span: Any) -> None:
    with pytest.raises(UsageError, match="takes two numbers"):
        from_arrays(LEVELS, LABELS, value_range=span)
    assert "not for digits" in refusal("digits", value_range=(0, 1))


def test_values_of_image_files_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    depth = np.linspace(0.5, 4.0, 30, dtype=np.float32).reshape(5, 6)
    Image.fromarray(depth).save(tmp_path / "class" / "a.tif")
    Image.fromarray((depth * 1000).astype(np.uint16)).save(tmp_path / "class" / "b.png")

    assert "give --range LOW,HIGH" in refusal(tmp_path)
    found, _ = see(tmp_path, channels=1, value_range=(0, 5000))
    np.testing.assert_allclose(found[1, 0], depth / 5, atol=2e-4)
    np.testing.assert_allclose(found[0, 0], depth / 5000, atol=1e-6)
    assert see(tmp_path, channels=3, value_range=(0, 5000))[0].shape == (2, 3, 5, 6)
    assert "outside --range 0,2" in refusal(tmp_path, value_range=(0, 2))


def write_deep_colour(path: Path, levels: np.ndarray) -> None:
    """A PNG file with 16 bits a colour, ``(h, w, 3)``, which Pillow cannot write."""

    def spell(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    h, w, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = spell(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
    body = spell(b"IDAT", zlib.compress(rows)) + spell(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)


def test_files_of_fewer_bits_than_their_range_are_refused(tmp_path: Path) -> None:
    """Else colour of 16 bits, of which Pillow keeps 8, would come out nearly black."""
    (tmp_path / "class").mkdir()
    write_deep_colour(tmp_path / "class" / "a.png", LEVELS[0] * np.uint16(257))

    assert np.array_equal(see(tmp_path)[0][0], LEVELS[0].transpose(2, 0, 1) / np.float32(255))
    assert "has 8 bits" in refusal(tmp_path, value_range=(0, 65535))
    with pytest.raises(UsageError, match="has 8 bits, of which none reaches the white"):
        from_arrays(LEVELS, LABELS, value_range=(0, 65535))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA"])
def test_range_of_8_bits_changes_nothing(tmp_path: Path, mode: str) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(LEVELS[0]).convert(mode).save(tmp_path / "class" / "a.png")

    for channels in (1, 3):
        usual, _ = see(tmp_path, channels=channels)
        ranged, _ = see(tmp_path, channels=channels, value_range=(0, 255))
        assert np.array_equal(usual, ranged)


PAIRS = [("x.npy", "y.npy"), ("X_test.npy", "y_test.npy"), ("images.npy", "labels.npy"),
         ("cifar-data.npy", "cifar-targets.npy")]  # fmt: skip


@pytest.mark.parametrize(("images", "labels"), PAIRS)
def test_pair_of_npy_files_is_read(tmp_path: Path, images: str, labels: str) -> None:
    np.save(tmp_path / images, LEVELS)
    np.save(tmp_path / labels, LABELS)

    found, numbers = see(tmp_path / images)
    assert np.array_equal(found, LEVELS.transpose(0, 3, 1, 2) / np.float32(255))
    assert numbers == LABELS.tolist()
    (tmp_path / labels).unlink()
    message = refusal(tmp_path / images)
    assert "put their labels beside it, as " in message
    assert labels in message


def test_npy_file_of_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "y.npy", LABELS)

    assert "holds Python objects" in refusal(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", LEVELS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    assert "not as long as its shape says" in refusal(tmp_path / "x.npy")


X, Y = torch.from_numpy(LEVELS), torch.from_numpy(LABELS)


@pytest.mark.parametrize(
    "content",
    [{"x": X, "y": Y}, {"images": X, "labels": Y}, {"data": X, "targets": Y}, (X, Y), [X, Y],
     (X, Y, {}), {"x_test": X, "y_test": Y.view(-1, 1)}],
)  # fmt: skip
def test_tensors_are_read(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")

    found, numbers = see(tmp_path / "a.pt")
    assert np.array_equal(found, LEVELS.transpose(0, 3, 1, 2) / np.float32(255))
    assert numbers == LABELS.tolist()


def test_tensors_of_16_bits_are_read(tmp_path: Path) -> None:
    x = torch.linspace(0, 1, 4 * 3 * 6 * 5).view(4, 3, 6, 5)
    for kind in (torch.bfloat16, torch.float16):
        torch.save((x.to(kind), Y), tmp_path / "a.pt")
        assert np.array_equal(see(tmp_path / "a.pt")[0], x.to(kind).float().numpy())


def test_tensors_of_safetensors_are_read_and_code_is_not(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": X, "y": Y}, tmp_path / "a.safetensors")
    assert see(tmp_path / "a.safetensors")[1] == LABELS.tolist()
    torch.save(torch.utils.data.TensorDataset(X, Y), tmp_path / "b.pt")
    with pytest.raises(Refused, match="TensorDataset"):
        open_data(tmp_path / "b.pt")
    torch.save({"model": X}, tmp_path / "c.pt")
    assert "holds no images with labels but model" in refusal(tmp_path / "c.pt")


NAMES = np.array(["cat", "ant", "dog", "cat"])


def test_labels_can_be_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=LEVELS, y=NAMES)
    data = open_data(str(tmp_path / "a.npz"))
    assert data.labels.tolist() == [1, 0, 2, 1]
    assert data.class_names == ("ant", "cat", "dog")
    matched = open_data(str(tmp_path / "a.npz"), classes=["dog", "Cat", "owl", "ant"])
    assert matched.labels.tolist() == [1, 3, 0, 1]
    assert matched.matching == "by name, the class names given"
    assert from_arrays(LEVELS, NAMES, class_names=["dog", "cat", "ant"]).labels.tolist() == [
        *(1, 2, 0, 1)
    ]
    assert from_arrays(LEVELS, ["3", "1", "0", "3"]).labels.tolist() == [3, 1, 0, 3]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([b"\xff", b"a", b"b", b"c"]), "cannot be read"),
        (["9" * 19, "1", "0", "2"], "digits"),
    ],
)
def test_labels_that_are_no_text_and_no_numbers_are_refused(labels: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_arrays(LEVELS, labels)


def test_labels_of_a_list_of_files_can_be_names(tmp_path: Path) -> None:
    Image.fromarray(LEVELS[0]).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("file,label\na.png,owl\na.png,bee\n")
    data = open_data(str(tmp_path / "a.csv"))

    assert data.labels.tolist() == [1, 0]
    assert data.class_names == ("bee", "owl")


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def build_table(names: list[str] | None = None) -> Any:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rows = [{"bytes": encode(pixels), "path": None} for pixels in LEVELS]
    table = pa.table({"image": rows, "label": LABELS.tolist(), "id": ["a", "b", "c", "d"]})
    if names is None:
        return table
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    facts = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": facts})


@pytest.mark.parametrize("names", [None, ["ant", "bee", "cat"]])
def test_parquet_file_is_read(tmp_path: Path, names: list[str] | None) -> None:
    table = build_table(names)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    found, numbers = see(tmp_path / "a.parquet")

    assert np.array_equal(found, LEVELS.transpose(0, 3, 1, 2) / np.float32(255))
    assert numbers == LABELS.tolist()
    assert open_data(tmp_path / "a.parquet").class_names == (tuple(names) if names else None)
    assert "columns image, label, id: name" in refusal(
        tmp_path / "a.parquet", columns=["picture", "label"]
    )


def test_numbers_written_as_text_in_a_table_are_numbers(tmp_path: Path) -> None:
    """In the order of text, 10 would be before 2 and every label another."""
    pa = pytest.importorskip("pyarrow")
    table = build_table(None).drop_columns(["label"])
    for labels, expected in ((["10", "2", "0", "2"], [10, 2, 0, 2]), (list("cabc"), [2, 0, 1, 2])):
        made = table.append_column("label", pa.array(labels))
        pytest.importorskip("pyarrow.parquet").write_table(made, tmp_path / "a.parquet")
        assert see(tmp_path / "a.parquet")[1] == expected
    made = table.append_column("label", pa.array([[1], [1, 2], [0], [2]]))
    pytest.importorskip("pyarrow.parquet").write_table(made, tmp_path / "a.parquet")
    assert "give one label for each image" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("images", ["encoded", "numbers"])
def test_numbered_labels_of_a_table_are_matched_by_their_names(tmp_path: Path, images: str) -> None:
    table = build_table(["ant", "bee", "cat"])
    if images == "numbers":
        pa = pytest.importorskip("pyarrow")
        values = pa.array((LEVELS[..., :1] / 255).tolist())
        table = table.set_column(0, "image", values)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    found = open_data(tmp_path / "a.parquet", classes=["cat", "dog", "bee", "ant"])

    assert found.labels.tolist() == [[3, 2, 0][label] for label in LABELS]


def test_columns_that_could_both_be_meant_are_asked_for(tmp_path: Path) -> None:
    tables = pytest.importorskip("pyarrow.parquet")
    table = build_table().append_column("target", [[2, 1, 0, 1]])
    table = table.append_column("file", [list("abcd")])  # a path beside the image is none
    tables.write_table(table, tmp_path / "a.parquet")

    assert "name those of image and label with --columns" in refusal(tmp_path / "a.parquet")
    assert see(tmp_path / "a.parquet", columns=["image", "target"])[1] == [2, 1, 0, 1]
    tables.write_table(table.drop_columns(["target"]), tmp_path / "a.parquet")
    assert see(tmp_path / "a.parquet")[1] == LABELS.tolist()


@pytest.mark.parametrize(
    ("empty", "said"), [((0,), "in row 0, counted"), ((0, 2, 3), "in row 0 and 2 more, counted")]
)
@pytest.mark.parametrize("form", ["files", "bytes", "numbers", "fields"])
def test_rows_of_a_table_without_an_image_are_named(
    tmp_path: Path, form: str, empty: tuple[int, ...], said: str
) -> None:
    """Also where the first is one of them, which tells what the others are."""
    pa = pytest.importorskip("pyarrow")
    nothing: Any = {"bytes": None, "path": None} if form == "fields" else None
    rows: list[Any] = build_table().column("image").to_pylist()
    if form == "bytes":
        rows = [row["bytes"] for row in rows]
    elif form == "numbers":
        rows = (LEVELS[..., :1] / 255).tolist()
    images = pa.array([nothing if i in empty else row for i, row in enumerate(rows)])
    table = build_table().set_column(0, "image", images)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")

    assert f"a.parquet has no image {said}" in refusal(tmp_path / "a.parquet")


def write_stream(path: Path, table: Any) -> None:
    """A folder as `datasets.save_to_disk` writes it."""
    pa = pytest.importorskip("pyarrow")
    path.mkdir()
    with pa.OSFile(str(path / "data-0.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))


@pytest.mark.parametrize("form", ["plain", "dictionary", "nested", "view"])
@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_values_that_rows_share_are_counted_for_each(
    tmp_path: Path, form: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes could fill the memory."""
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(parquet, "PIECE", 10**6)
    content = encode(LEVELS[0])
    for padding, count in ((0, 4), (10**5, 1000)):
        images = pa.array([content + bytes(padding)])
        images = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), images)
        if form == "plain":
            images = images.dictionary_decode()
        elif form == "view":
            images = images.dictionary_decode().cast(pa.binary_view())
        elif form == "nested":
            images = pa.StructArray.from_arrays([images], ["bytes"])
        table = pa.table({"image": images, "label": [1] * count})
        path = tmp_path / f"{count}{suffix}"
        if suffix:
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        else:
            write_stream(path, table)
        if count == 4:
            assert len(see(path)[1]) == 4
    monkeypatch.setattr(parquet, "ARRAYS", 10**7)
    if suffix or form == "dictionary":
        assert "unpacked, has" in refusal(path)
    else:
        assert "the limit is 10 MB" in refusal(path)


def test_saved_dataset_is_read(tmp_path: Path) -> None:
    table = build_table(["ant", "bee", "cat"])
    write_stream(tmp_path / "test", table)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))

    for spec in (tmp_path, tmp_path / "test"):
        assert see(spec)[1] == LABELS.tolist()
    assert "no split train but test" in refusal(tmp_path, split="train")
    state = {"_data_files": [{"filename": "../data-0.arrow"}]}
    (tmp_path / "test" / "state.json").write_text(json.dumps(state))
    assert "names files elsewhere" in refusal(tmp_path)


def test_network_of_four_channels_is_evaluated_to_a_report(tmp_path: Path) -> None:
    x = np.random.default_rng(1).integers(0, 10_000, (8, 4, 8, 8), dtype=np.uint16)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def Net():\n"
        "    return nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3))\n"
    )
    space: dict[str, Any] = {}
    exec((tmp_path / "net.py").read_text(), space)
    torch.manual_seed(0)
    network = space["Net"]()
    with torch.no_grad():
        y = network(torch.from_numpy(x / np.float32(10_000))).argmax(1)
    np.savez(tmp_path / "a.npz", x=x, y=y.numpy())
    torch.save(network.state_dict(), tmp_path / "net.pt")
    done = CliRunner().invoke(
        cli,
        ["evaluate", str(tmp_path / "net.pt"), "--arch", f"{tmp_path}/net.py:Net", "--data",
         str(tmp_path / "a.npz"), "--range", "0,10000", "--attack", "fgsm:eps=8/255",
         "--no-probes", "--out", str(tmp_path / "run")],
    )  # fmt: skip
    report = CliRunner().invoke(
        cli, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "a.html")]
    )

    assert (done.exit_code, report.exit_code) == (0, 0), done.output
    assert "clean 100 %" in " ".join(done.output.split())
    assert "values 0 to 10000 as 0 to 1" in " ".join(done.output.split())
