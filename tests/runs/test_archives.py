"""Archives in memory, read without `zipfile` where they are packed as NumPy packs them."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest

from robusteval.runs.archives import read_plain
from robusteval.runs.reading import COLUMNS
from robusteval.runs.storage import pack, unpack


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"a": np.arange(5), "b": np.zeros((2, 3), np.float32)},
        {"f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "none": np.zeros(0, np.uint64)},
        {"flags": np.array([True, False]), "one": np.array(3.5), "names": np.array(["x", "yz"])},
    ],
)
def test_plain_archives_are_read_as_numpy_reads_them(columns: dict[str, Any]) -> None:
    content = pack(columns, "key")

    found = read_plain(content, COLUMNS)

    with np.load(io.BytesIO(content)) as expected:
        assert found is not None
        assert found.keys() == dict(expected).keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            assert np.array_equal(array, expected[name])
            assert array.flags.f_contiguous == expected[name].flags.f_contiguous
            assert array.flags.writeable


def test_no_changed_byte_of_a_plain_archive_passes() -> None:
    """It is no plain one any more, says what is wrong, or means the same."""
    columns = {"a": np.arange(9), "b": np.ones(3)}
    content = pack(columns)
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= 0x41
        try:
            found = read_plain(bytes(spoiled), COLUMNS)
        except (ValueError, zlib.error):
            continue
        # the time of a member, and what system packed it, say nothing of the arrays
        assert found is None or all(np.array_equal(found[name], columns[name]) for name in columns)


def test_what_numpy_does_not_write_is_left_to_the_other_reader() -> None:
    stored = io.BytesIO()
    np.savez(stored, a=np.arange(3))
    large = pack({"a": np.zeros(1000)})

    assert read_plain(stored.getvalue(), COLUMNS) is None
    assert read_plain(large, 4000) is None
    assert read_plain(large[:-1], COLUMNS) is None
    assert read_plain(b"nothing", COLUMNS) is None
    assert unpack(stored.getvalue())["a"].tolist() == [0, 1, 2]
