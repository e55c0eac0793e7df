"""A data source of another package: one file, found by name, by suffix or by what it recognises."""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from robusteval.datasets.sources import ORDER, list_kinds, open_data
from robusteval.errors import RobustevalError, UsageError
from robusteval.registry import DATA_SOURCES

SOURCE = '''
import numpy as np
from robusteval.datasets.arrays import from_arrays
from robusteval.registry import DATA_SOURCES

def read(path, name):
    y, *x = np.loadtxt(path, delimiter=";", dtype=np.uint8).T
    return from_arrays(np.stack(x, 1).reshape(-1, 2, 2), y.astype(int), name=name)

@DATA_SOURCES.add("table", suffix=(".tab", ".table"), written="FILE.tab")
def open_table(path):
    """label and four pixels in each line."""
    return read(path, path.name)

@DATA_SOURCES.add("kept", written="kept:DIR")
def open_kept(path, split, channels):
    """a table for each split below DIR."""
    return read(path / f"{split}.tab", f"{split} {channels}")

def is_shelf(path):
    return (path / "shelf.txt").exists()

@DATA_SOURCES.add("shelf", written="SHELF", recognises="is_shelf")
def open_shelf(path):
    """a folder with shelf.txt, which holds a table."""
    return read(path / "shelf.txt", "shelf").source
'''
LINES = "0;10;20;30;40\n1;50;60;70;80\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of files of an installed package with three data sources."""
    (tmp_path / "shelving.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)

    def entry_points(group: str) -> metadata.EntryPoints:
        point = metadata.EntryPoint("shelving", "shelving", group)
        return metadata.EntryPoints([point] if group == "robusteval.data_sources" else [])

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    DATA_SOURCES.__dict__.pop("entries", None)  # which are read once
    yield tmp_path
    DATA_SOURCES.__dict__.pop("entries", None)
    sys.modules.pop("shelving", None)


def test_sources_are_listed_behind_ours_without_being_imported(package: Path) -> None:
    kinds = list_kinds()
    names = [name for name, _ in kinds]

    assert names[: len(ORDER)][:: len(ORDER) - 1] == ["digits", "FILE.parquet"]
    assert [kind for kind in kinds if kind[0] in ("kept:DIR", "SHELF", "FILE.tab")] == [
        ("kept:DIR", "a table for each split below DIR"),
        ("SHELF", "a folder with shelf.txt, which holds a table"),
        ("FILE.tab", "label and four pixels in each line"),
    ]
    assert names.index("kept:DIR") >= len(ORDER)
    assert "shelving" not in sys.modules


@pytest.mark.parametrize("suffix", [".tab", ".TABLE"])
def test_a_file_is_known_by_its_suffix(package: Path, suffix: str) -> None:
    path = package / f"my{suffix}"
    path.write_text(LINES)

    data = open_data(str(path))

    assert (data.name, data.shape, data.labels.tolist()) == (path.name, (1, 2, 2), [0, 1])
    assert np.allclose(data.batch([1]).x.flatten() * 255, [50, 60, 70, 80])
    assert open_data(str(path), size=1, resize=2).shape == (1, 1, 1)


def test_a_source_is_given_what_it_asks_for(package: Path) -> None:
    (package / "train.tab").write_text(LINES)

    assert open_data(f"kept:{package}", split="train", channels=1).name == "train 1"
    with pytest.raises(UsageError, match="kept needs the folder it is kept in: kept:DIR"):
        open_data("kept")


def test_what_is_recognised_goes_before_a_folder(package: Path) -> None:
    (package / "shelf.txt").write_text(LINES)

    assert open_data(str(package)).name == "shelf"


def test_a_folder_that_nobody_recognises_is_one_of_classes(package: Path) -> None:
    with pytest.raises(UsageError, match="needs one sub-folder of images per class"):
        open_data(str(package))


@pytest.mark.parametrize("lines", ["", "no;numbers\n", "0;1\n", "0;1;2;3;4\n"])
def test_whatever_breaks_in_a_source_is_one_sentence(package: Path, lines: str) -> None:
    path = package / "my.tab"
    path.write_text(lines)

    with pytest.raises(RobustevalError) as caught, np.errstate(all="ignore"):
        open_data(str(path)).batch([0, 1])

    assert "my.tab" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_name_what_there_is(package: Path) -> None:
    path = package / "my.xyz"
    path.write_text("")

    with pytest.raises(UsageError, match=r"nor a \.csv, \.npz, .*\.tab or \.table file"):
        open_data(str(path))
    with pytest.raises(UsageError, match=r"did you mean kept\?\); known are digits, .*FILE\.tab$"):
        open_data("kpt")
