"""Archives that two readers would read in two ways, and pickles that ask for more than there is."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import ASKS, BYPASSES, HONEST, TENSOR, pack, pack_large, pack_state, word
from torch import nn

from robusteval.errors import Refused, UsageError
from robusteval.models.checkpoint import load
from robusteval.models.copies import list_states
from robusteval.models.weights import parse_checkpoint


def read(raw: bytes) -> dict[str, Any]:
    return next(iter(parse_checkpoint(raw, "net.pt")[0].values()))


def test_archive_built_here_is_read_when_it_is_honest() -> None:
    for raw in (pack(), pack(large=pack_large)):
        assert list(read(raw)) == ["w"]


@pytest.mark.parametrize("raw", BYPASSES.values(), ids=BYPASSES)
def test_archive_that_can_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused, match="not opened"):
        read(raw)


@pytest.mark.parametrize(
    "tensor",
    [
        pack_state(count=2**29, shape=(2**29,), strides=(1,)),
        pack_state(shape=(2**29,), strides=(1,)),
        pack_state(shape=(2, 2), strides=(2**28, 1)),
        pack_state(offset=1),
        pack_state(offset=-1),
        pack_state(shape=(2, 2), strides=(-1, 1)),
    ],
    ids=["storage", "shape", "stride", "offset", "negative offset", "negative stride"],
)
def test_tensor_that_reaches_out_of_its_storage_is_refused_before_torch_sees_it(
    tensor: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked"))

    with pytest.raises(Refused, match="storage"):
        read(pack([("net/data.pkl", tensor), *HONEST[1:]]))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x04tR",
        b"c__builtin__\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x04tR",
        b"ctorch\nFloatTensor\n(\x8a\x05\x00\x00\x00\x00\x04tR",
        b"ctorch\nTensor\n(\x8a\x05\x00\x00\x00\x00\x04t\x81",
        b"ctorch.storage\nUntypedStorage\n(\x8a\x05\x00\x00\x00\x00\x04tR",
    ],
)
def test_calls_that_only_fill_the_memory_are_refused_before_torch_sees_them(
    call: bytes, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = io.BytesIO()
    torch.save({}, kept, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked"))
    hostile = b"\x80\x02" + call + b"."
    legacy = kept.getvalue().replace(b"\x80\x02}q\x00.", hostile)
    assert hostile in legacy

    with pytest.raises(Refused, match="not opened"):
        read(pack([("net/data.pkl", hostile), *HONEST[1:]]) if new else legacy)


def test_legacy_storage_larger_than_the_file_is_refused() -> None:
    kept = io.BytesIO()
    torch.save({"w": torch.zeros(200)}, kept, _use_new_zipfile_serialization=False)
    raw = kept.getvalue().replace(b"K\xc8", b"M\xff\xff")

    with pytest.raises(Refused, match="as large as its tensor"):
        read(raw.replace(b"M\xff\xff\x85", b"K\xc8\x85"))


def test_more_entries_than_any_network_needs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robusteval.models.archive.MOST_ENTRIES", 2)

    with pytest.raises(Refused, match="3 entries"):
        read(pack())


def test_longer_pickle_than_any_state_dict_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robusteval.models.pickles.MOST_INSTRUCTIONS", 9)

    with pytest.raises(Refused, match="long"):
        read(pack())


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_everything_that_torch_saves_of_a_training_is_still_read(tmp_path: Path, new: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(2, 3, 8, 8))
    linear = network.get_submodule("3")
    linear.weight = nn.Parameter(linear.get_parameter("weight").data.T.contiguous().T)  # strides
    network.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
    network.register_buffer("slice", torch.arange(10)[2:5])
    network.register_buffer("empty", torch.zeros(0, 3))
    network.register_parameter("scalar", nn.Parameter(torch.zeros(())))
    steps = torch.optim.Adam(network.parameters())
    network(torch.zeros(2, 3, 8, 8)).sum().backward()
    steps.step()
    content = {"state_dict": network.state_dict(), "optimizer": steps.state_dict(),
               "parts": set(), "size": torch.Size([1]), "bytes": b"x", "words": bytearray(b"ab"),
               "type": torch.float16, "kind": torch.device("cpu"), "rate": 0.1, "seed": 2**70,
               "parameters": list(network.parameters())}  # fmt: skip
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=new)
    state = read((tmp_path / "net.pt").read_bytes())

    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_bytes_without_a_directory_are_damaged_and_not_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(pack()[:-10])

    with pytest.raises(UsageError, match="damaged"):
        load(tmp_path / "net.pt", arch="robusteval:digits_cnn")


@pytest.mark.parametrize("asked", ASKS.values(), ids=ASKS)
def test_what_no_state_dict_needs_is_refused_before_torch_sees_it(
    asked: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills the memory, reaches elsewhere, takes the square of its length, or ends us."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked"))
    hostile = b"\x80\x02}" + word("w") + asked + b"s."

    with pytest.raises(Refused, match=r"net\.pt was not opened"):
        read(pack([("net/data.pkl", hostile), *HONEST[1:]]))


@pytest.mark.parametrize(
    "name", ["posix system", "builtins eval", "torch hub", "torch._utils _import_dotted_name"]
)
def test_name_that_no_state_dict_needs_is_refused_with_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked"))
    hostile = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."

    with pytest.raises(Refused, match="could run code: it needs " + name.replace(" ", ".")):
        read(pack([("net/data.pkl", hostile), *HONEST[1:]]))


def test_dicts_of_python_two_are_read() -> None:
    """Ordered dicts as lists of pairs, and the names of its builtins."""
    pairs = b"ccollections\nOrderedDict\n](](" + word("w") + TENSOR + b"ee\x85R"
    raw = b"\x80\x02" + pairs + b"}" + word("_metadata") + b"}sb."

    assert list(read(pack([("net/data.pkl", raw), *HONEST[1:]]))) == ["w"]


def test_more_tensors_than_any_network_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robusteval.models.pickles.MOST_TENSORS", 2)
    three = b"\x80\x02(" + TENSOR * 3 + b"t."

    with pytest.raises(Refused, match="3 tensors, the limit is 2"):
        read(pack([("net/data.pkl", three), *HONEST[1:]]))


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_torch_does_not_use_is_refused_before_it_is_unpacked(packing: int) -> None:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w") as archive:
        for name, content in HONEST:
            archive.writestr(name, content, packing if name.endswith("0") else None)

    with pytest.raises(Refused, match="packed"):
        read(kept.getvalue())


def test_safetensors_with_a_long_header_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robusteval.models.weights.HEADER", 99)
    monkeypatch.setattr("safetensors.torch.load", lambda _: pytest.fail("it was read"))
    header = b'{"__metadata__":{"a":"' + b"x" * 99 + b'"}}'

    with pytest.raises(UsageError, match=r"header of net\.pt has 124 bytes.*LIMITS=2"):
        parse_checkpoint(len(header).to_bytes(8, "little") + header, "net.pt")


def test_one_dict_under_many_names_is_looked_at_a_few_times() -> None:
    content: dict[str, Any] = {}
    content.update({f"k{i}": content for i in range(500)}, w=torch.zeros(1))

    assert 1 <= len(list_states(content)) <= 8
