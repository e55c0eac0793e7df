"""What a path is and how large is known before anything is read of it."""

from __future__ import annotations

import os
import socket
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robusteval.errors import RobustevalError, UsageError
from robusteval.runs import archives, reading
from robusteval.runs.reading import check_amount, open_regular, read_bytes, read_text, read_toml
from robusteval.runs.storage import unpack


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(path.parent)  # the name of a socket has a hundred characters at most
        listening.bind(path.name)


def make_device(path: Path) -> None:
    path.symlink_to(os.devnull)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(30 * 10**9)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a device": make_device,
    "30 GB": make_large,
    "a folder": Path.mkdir,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files")
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_ordinary_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "it")
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("it was opened"))

    with pytest.raises(UsageError, match=kind):
        open_regular(tmp_path / "it", reading.ARRAYS)


def test_file_of_which_most_was_never_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SPARSE", 2**20)
    path = tmp_path / "half"
    with path.open("wb") as file:
        file.write(b"begun")
        file.truncate(2**22)
    if not path.stat().st_blocks < 2**10:
        pytest.skip("this file system writes what was not written")
    with pytest.raises(UsageError, match="never written"):
        open_regular(path, 2**30)

    monkeypatch.setenv("ROBUSTEVAL_LIMITS", "4")
    assert len(read_bytes(path, 2**30)) == 2**22


def test_limit_holds_and_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    path.write_bytes(bytes(2500))

    assert len(read_bytes(path, 2500)) == 2500
    with pytest.raises(UsageError, match=r"it has 2.5 kB.*1 kB.*ROBUSTEVAL_LIMITS=3"):
        read_bytes(path, 1000)
    monkeypatch.setenv("ROBUSTEVAL_LIMITS", "3")
    assert len(read_bytes(path, 1000)) == 2500
    monkeypatch.setenv("ROBUSTEVAL_LIMITS", "0.5")
    with pytest.raises(UsageError, match=r"500 bytes"):
        read_bytes(path, 1000)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_limits_are_a_number_above_zero(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ROBUSTEVAL_LIMITS", text)

    with pytest.raises(UsageError, match="number above 0"):
        check_amount("it", 1, 2, "gates")


def test_file_that_grows_is_read_to_the_limit_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the system do, which say that they are empty."""
    path = tmp_path / "it"
    path.write_bytes(bytes(5000))
    before = os.fstat

    def fstat(file: int) -> os.stat_result:
        found = list(before(file))
        found[6] = 0
        return os.stat_result(found)

    monkeypatch.setattr(reading, "CHUNK", 100)
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "stat", lambda path: fstat(os.open(path, os.O_RDONLY)))

    assert len(read_bytes(path, 5000)) == 5000
    with pytest.raises(UsageError, match="limit is 3 kB"):
        read_bytes(path, 3000)


def test_text_has_line_ends_as_in_python(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes("ä\r\nb\rc\n".encode())

    assert read_text(tmp_path / "it", 99) == "ä\nb\nc\n"


@pytest.mark.parametrize("name", ["zero\x00byte", "nothing"])
def test_path_of_nothing_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises((OSError, UsageError)):
        open_regular(tmp_path / name, 1)


@pytest.mark.parametrize(
    "key", ["a." * 70 + "a", "[x" + " . 'y z'" * 70 + "]", '"a"' + '."b"' * 70]
)
def test_key_of_very_many_parts_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It takes the square of their number, hours in a file of one megabyte."""
    path = tmp_path / "it.toml"
    path.write_text(f"{key} = 1")
    monkeypatch.setattr("tomllib.loads", lambda _: pytest.fail("it was parsed"))

    with pytest.raises(UsageError, match="parts"):
        read_toml(path)


def test_ordinary_settings_are_read(tmp_path: Path) -> None:
    text = "\ufefftool.mine.gate = 1.5\r\n[a.'b.c'.d]\nx = 'http://a.b.c.d.e/' # a.b"
    (tmp_path / "it.toml").write_text(text, newline="")

    assert read_toml(tmp_path / "it.toml")[1] == {
        "tool": {"mine": {"gate": 1.5}},
        "a": {"b.c": {"d": {"x": "http://a.b.c.d.e/"}}},
    }


def write_archive(path: Path, content: bytes, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", packing) as archive, archive.open("x.npy", "w") as file:
        file.write(content)
    return path.read_bytes()


def describe_array(shape: str, dtype: str = "<f8") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


ARCHIVES = {
    "more than its shape": (describe_array("(2,)") + bytes(2**23), "not as long"),
    "less than its shape": (describe_array("(2**40,)".replace("2**40", str(2**40))), "not as long"),
    "a size below zero": (describe_array("(-1, -8)") + bytes(64), "shape"),
    "elements without size": (describe_array(f"({2**60},)", "|V0"), "shape"),
    "a long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(2**23), "header of"),
    "no header": (b"\x93NUM", "no .npy"),
    "another version": (b"\x93NUMPY\x09\x00" + bytes(99), "no .npy"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_array_that_is_not_as_it_says_is_refused_before_it_is_unpacked(
    tmp_path: Path, name: str
) -> None:
    content, words = ARCHIVES[name]
    packed = write_archive(tmp_path / "it.npz", content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words):
            unpack(packed)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_of_which_few_bytes_fill_the_memory_is_refused(
    tmp_path: Path, packing: int
) -> None:
    packed = write_archive(tmp_path / "it.npz", describe_array("(9,)") + bytes(72), packing)

    with pytest.raises(ValueError, match="not packed"):
        unpack(packed)


def test_columns_that_unpack_to_more_than_the_limit_are_refused() -> None:
    from robusteval.runs.storage import pack

    packed = pack({"a": np.zeros(5000), "b": np.zeros(5000)})

    assert unpack(packed, 100_000)["a"].shape == (5000,)
    with pytest.raises(ValueError, match=r"unpacked, has 80.26 kB.*ROBUSTEVAL_LIMITS=2"):
        unpack(packed, 50_000)


def test_large_array_packed_far_too_well_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = write_archive(tmp_path / "it.npz", describe_array("(9, 1000)") + bytes(72_000))
    monkeypatch.setattr(archives, "SMALL", 10_000)
    monkeypatch.setattr(archives, "LARGE", 10_000)

    with pytest.raises(ValueError, match="times the bytes"):
        unpack(packed)
    monkeypatch.setenv("ROBUSTEVAL_LIMITS", "9")
    assert unpack(packed)["x"].shape == (9, 1000)


@pytest.mark.parametrize("large", [False, True], ids=["plain", "large"])
def test_long_list_of_members_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    path = tmp_path / "it.npz"
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10 if large else 2**16)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(40):
            archive.writestr(f"{number}.npy", b"")
    monkeypatch.setattr(archives, "DIRECTORY", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))

    with path.open("rb") as file, pytest.raises(UsageError, match="list of members"):
        archives.open_archive(file, "it.npz")


def test_refusal_is_of_the_kind_that_is_asked_for() -> None:
    class Own(RobustevalError):
        pass

    with pytest.raises(Own):
        check_amount("it", 2, 1, "gates", Own)
