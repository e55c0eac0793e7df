"""Checkpoints that somebody built on purpose, or that broke on their way: names and bytes.

What would run is harmless: it leaves a file named `MARK` in the working folder.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from packed import ASKS, BYPASSES, HONEST, pack, pack_state, word
from torch import Tensor

MARK = "executed"
TOUCH = f"touch {MARK}"
WRITE = f"open({MARK!r}, 'w')"
USAGE, REFUSED = 2, 4  # exit codes

# what a pickle could call, and with what
CALLS: Mapping[str, tuple[Any, ...]] = {
    "os.system": (TOUCH,),
    "posix.system": (TOUCH,),
    "os.popen": (TOUCH,),
    "os.execlp": ("touch", "touch", MARK),
    "os.mkdir": (MARK,),
    "subprocess.check_output": (["touch", MARK],),
    "subprocess.Popen": (["touch", MARK],),
    "builtins.eval": (WRITE,),
    "builtins.exec": (WRITE,),
    "builtins.open": (MARK, "w"),
    "builtins.__import__": ("this",),
    "builtins.getattr": ("", "join"),
    "builtins.apply": (),
    "io.open": (MARK, "w"),
    "_io.FileIO": (MARK, "w"),
    "pathlib.Path.write_text": (MARK,),
    "runpy._run_code": (WRITE, {}),
    "importlib.import_module": ("this",),
    "code.InteractiveInterpreter": (),
    "timeit.timeit": (WRITE,),
    "cProfile.run": (WRITE,),
    "pdb.run": (WRITE,),
    "types.FunctionType": (),
    "functools.partial": (print, WRITE),
    "operator.attrgetter": ("system",),
    "operator.methodcaller": ("system", TOUCH),
    "ctypes.CDLL": ("libc.so.6",),
    "shutil.copyfile": ("/etc/hostname", MARK),
    "pickle.loads": (b"N.",),
    "marshal.loads": (b"N",),
    "numpy.load": (MARK,),
    "numpy.testing._private.utils.runstring": (WRITE, {}),
    "torch.load": (MARK,),
    "torch.hub.load": ("a/b", "c"),
    "torch.jit.load": (MARK,),
    "torch.storage._load_from_bytes": (b"N.",),
    "torch._utils._import_dotted_name": ("os.system",),
    "torch.ops.load_library": (MARK,),
    "torch.nn.Linear": (1, 1),
    "torch.utils.collect_env.run": (TOUCH,),
    "collections.OrderedDict.__reduce__": (),
    "robusteval.models.checkpoint.load": (MARK,),
}


def spell_value(value: Any) -> bytes:
    """A pickle of a value, without its frame."""
    text = pickle.dumps(value if value is not print and print not in _flat(value) else (), 2)
    return text[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"").replace(b"q\x02", b"")


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def call(name: str, given: tuple[Any, ...]) -> bytes:
    """A pickle that imports a name and calls it."""
    module, _, short = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{short}\n".encode() + spell_value(given) + b"R."


def in_archive(pickled: bytes) -> bytes:
    """In a file as torch writes it now."""
    return pack([("net/data.pkl", pickled), *HONEST[1:]])


def in_legacy(pickled: bytes) -> bytes:
    """In a file as torch wrote it before version 1.6."""
    kept = io.BytesIO()
    torch.save({}, kept, _use_new_zipfile_serialization=False)
    return kept.getvalue().replace(b"\x80\x02}q\x00.", pickled)


def list_code() -> Iterator[tuple[str, bytes, int]]:
    """Files that would run code in a reader that lets them."""
    for name, given in CALLS.items():
        pickled = call(name, given)
        yield f"{name} in an archive", in_archive(pickled), REFUSED
        yield f"{name} in a legacy file", in_legacy(pickled), REFUSED
        yield f"{name} in a plain pickle", pickled, REFUSED
    system = f"cos\nsystem\n({word(TOUCH).decode()}tR."
    spelled = {
        "protocol 0": f"cos\nsystem\n(S{TOUCH!r}\ntR.".encode(),
        "INST": f"(S{TOUCH!r}\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS{TOUCH!r}\no.".encode(),
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(TOUCH)]) + TOUCH.encode() + b"\x85R.",
        "framed": pickle.dumps(Payload(), 5),
        "behind a state dict": pack_state()[:-1] + b"0" + system.encode()[:-1] + b".",
        "by NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + spell_value((["touch", MARK],)) + b"\x81.",
        "by BUILD": b"\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\nb.",
        "by an extension": b"\x80\x02\x82\x01)R.",
        "by a persistent id": b"\x80\x02" + word(TOUCH) + b"Q.",
        "with a name in two lines": b"\x80\x02cos\nsystem\r\n" + word(TOUCH) + b"\x85R.",
        "with a name of signs": "\x80\x02c\u202eos\n::error::\n)R.".encode("latin-1", "ignore"),
    }  # fmt: skip
    for name, pickled in spelled.items():
        yield f"system {name} in an archive", in_archive(pickled), 0
        yield f"system {name} in a legacy file", in_legacy(pickled), 0
        yield f"system {name} in a plain pickle", pickled, 0


class Payload:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (WRITE,))


def list_archives() -> Iterator[tuple[str, bytes, int]]:
    """Archives that two readers read in two ways, and pickles that only do harm."""
    for name, raw in BYPASSES.items():
        yield name, raw, REFUSED
    for name, asked in ASKS.items():
        yield name, in_archive(b"\x80\x02}" + word("w") + asked + b"s."), REFUSED
        yield f"{name}, legacy", in_legacy(b"\x80\x02}" + word("w") + asked + b"s."), REFUSED
    sizes: dict[str, dict[str, Any]] = {
        "a storage of gigabytes": {"count": 2**31},
        "a shape of gigabytes": {"shape": (2**31, 2)},
        "a stride of gigabytes": {"strides": (2**31, 1)},
        "an offset below zero": {"offset": -4},
        "a shape below zero": {"shape": (-2, -2)},
        "a shape that overflows": {"shape": (2**62, 2**62)},
        "a shape of other length than strides": {"shape": (2, 2, 1)},
    }
    for name, options in sizes.items():
        yield name, in_archive(pack_state(**options)), 0
    for extra in ("net/code/a.py", "net/constants.pkl", "net/archive_format", "net/data.pkl/",
                  "a/data.py", "net/serialized_exported_program.json"):  # fmt: skip
        yield f"an entry {extra[:20]}", pack([*HONEST, (extra, b"x")]), 0
    yield "no pickle", pack(HONEST[1:]), USAGE
    yield "no entries", pack([]), USAGE
    yield "an empty pickle", in_archive(b""), USAGE
    yield "lists without end", in_archive(b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b"."), USAGE
    yield "a stack that is empty", in_archive(b"\x80\x020."), 0
    yield "a memory of nothing", in_archive(b"\x80\x02h\x09."), USAGE
    yield "zeros", bytes(5000), USAGE
    wrapped = (b"}" + word("model")) * 1000 + b"}" + b"s" * 1000
    yield "a thousand wrappers", in_archive(b"\x80\x02" + wrapped + b"."), USAGE


def save(content: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    kept = io.BytesIO()
    torch.save(content, kept, **options)
    return kept.getvalue()


def build_safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def describe(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def list_safetensors() -> Iterator[tuple[str, bytes, int]]:
    """Headers that are wrong in one way."""
    body = bytes(8)
    headers: dict[str, Any] = {
        "a shape below zero": {"w": describe([-2])},
        "a shape of another size": {"w": describe([3])},
        "a shape that overflows": {"w": describe([2**32, 2**32, 2**32])},
        "a shape of texts": {"w": describe(["2"])},
        "a shape of a thousand axes": {"w": describe([1] * 1000 + [2])},
        "sizes whose product takes minutes": {"w": describe([10**11] * 200_000)},
        "offsets beyond the end": {"w": describe([2**40], 0, 2**42)},
        "offsets backwards": {"w": describe([2], 8, 0)},
        "offsets with a hole": {"w": describe([1], 4, 8)},
        "offsets that overlap": {"w": describe(), "v": describe()},
        "offsets below zero": {"w": describe([2], -8, 0)},
        "offsets that are none": {"w": describe([2], None, None)},
        "an unknown type": {"w": describe(dtype="F33")},
        "a type that is a number": {"w": describe(dtype=32)},
        "no type": {"w": {"shape": [2], "data_offsets": [0, 8]}},
        "a tensor that is a list": {"w": []},
        "metadata that is a list": {"w": describe(), "__metadata__": []},
        "metadata of numbers": {"w": describe(), "__metadata__": {"a": 1}},
        "metadata that is a tensor": {"__metadata__": describe()},
        "a list": [describe()],
        "a text": "w",
        "no tensors": {},
        "lists without end": b"{" + b'"a":[' * 100_000,
        "objects without end": b'{"a":' * 100_000,
        "a key twice": b'{"w":' + json.dumps(describe()).encode() + b',"w":{}}',
        "half a header": b'{"w":{"dtype":"F32"',
        "no text": b"{\xff\xfe\x00",
        "a number without end": b'{"w":' + b"9" * 5000 + b"}",
    }
    for name, header in headers.items():
        yield f"safetensors, {name}", build_safetensors(header, body), USAGE
    good = {"w": describe()}
    for name, length in (("none", 0), ("short", 3), ("beyond the end", 2**20), ("huge", 2**63),
                         ("largest", 2**64 - 1)):  # fmt: skip
        yield f"safetensors, length {name}", build_safetensors(good, body, length), USAGE
    yield "safetensors and more", build_safetensors(good, body + b"more"), USAGE
    yield "safetensors before an archive", build_safetensors(good, body + pack()), USAGE


def list_notes(state: dict[str, Tensor]) -> Iterator[tuple[str, bytes, int]]:
    """Sound weights with metadata that lie; no architecture is named in the command."""
    sound: dict[str, Any] = {
        "arch": "robusteval:digits_cnn",
        "num_classes": 10,
        "input": [1, 32, 32],
    }
    lies: dict[str, dict[str, Any]] = {
        "code of a file": {"arch": "hostile.py:run"},
        "code of a module": {"arch": "os:getcwd"},
        "a path": {"arch": "../../hostile.py:run"},
        "an address": {"arch": "timm:hf_hub:somebody/net"},
        "no architecture": {"arch": "robusteval:\u202e::error::"},
        "an architecture that is a list": {"arch": ["robusteval:digits_cnn"]},
        "classes without end": {"num_classes": 2**62},
        "classes below zero": {"num_classes": -10},
        "classes of a text": {"num_classes": "10"},
        "classes that are true": {"num_classes": True},
        "large images": {"input": [1, 4096, 4096]},
        "huge images": {"input": [2**30, 2**30, 2**30]},
        "images of nothing": {"input": [0, 0, 0]},
        "images of one number": {"input": 32},
        "images of texts": {"input": ["1", "32", "32"]},
        "a mean of texts": {"mean": ["a"], "std": [1.0]},
        "a mean without end": {"mean": [1e400], "std": [1.0]},
        "a deviation of nothing": {"mean": [0.0], "std": [0.0]},
        "a mean of other channels": {"mean": [0.0] * 7, "std": [1.0] * 7},
        "a mask of nothing": {"mask": {"layer": "0", "seen": []}},
        "a mask that is a text": {"mask": "0"},
    }
    for name, lie in lies.items():
        notes = {key: json.dumps(value) for key, value in {**sound, **lie}.items()}
        raw = safetensors.torch.save(state, notes)
        yield f"metadata, {name}", raw, USAGE
    yield (
        "metadata, lists without end",
        safetensors.torch.save(state, {"arch": "[" * 100_000}),
        USAGE,
    )


def list_states(state: dict[str, Tensor]) -> Iterator[tuple[str, bytes, int]]:
    """State dicts, or what is in their place, that no network can take."""
    first = next(iter(state))
    contents: dict[str, Any] = {
        "numbers that are none": {**state, first: state[first] * float("nan")},
        "complex numbers": {**state, first: state[first].to(torch.complex64)},
        "numbers elsewhere": {**state, first: torch.zeros(state[first].shape, device="meta")},
        "sparse numbers": {**state, first: state[first].flatten(1).to_sparse()},
        "another shape": {**state, first: torch.zeros(3)},
        "one byte a billion times": {**state, first: torch.zeros(1).expand(2**30)},
        "names of numbers": dict(enumerate(state.values())),
        "names that steer a terminal": {f"\x1b[2J\u202e::error::{k}": v for k, v in state.items()},
        "a name without end": {"a" * 10**6: torch.zeros(1)},
        "two that differ": {"last": state, "best": {k: v + 1 for k, v in state.items()}},
        "a list": list(state.values()),
        "a tensor": state[first],
        "nothing": None,
        "an empty one": {},
        "arrays": {k: v.numpy() for k, v in state.items()},
        "a network": torch.nn.Linear(2, 2),
        "texts": dict.fromkeys(state, "x"),
    }
    for name, content in contents.items():
        yield f"state, {name}", save(content), 0
        if name != "numbers elsewhere":
            yield f"state, {name}, legacy", save(content, _use_new_zipfile_serialization=False), 0


def list_torn(state: dict[str, Tensor]) -> Iterator[tuple[str, bytes, int]]:
    """Sound files that were cut or altered on their way, and files of other kinds."""
    sound = {
        "archive": save(state),
        "legacy": save(state, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(state),
    }
    for kind, raw in sound.items():
        for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
            # of the oldest form nobody can tell whether bytes were lost or never there
            expected = 0 if kind == "legacy" else USAGE
            yield f"{kind}, cut at {share}", raw[: int(share * len(raw))], expected
        yield f"{kind}, without its last byte", raw[:-1], USAGE
        yield f"{kind}, packed by gzip", gzip.compress(raw), USAGE
        yield f"{kind}, its bytes turned", raw[::-1], USAGE
    kept = io.BytesIO()
    with tarfile.open(fileobj=kept, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../x"))
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as packed:
        packed.writestr("a.txt", "x")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    yield from (
        ("nothing", b"", USAGE),
        ("one byte", b"\x80", USAGE),
        ("a web page", b"\n<!DOCTYPE html><title>404</title>", USAGE),
        ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", USAGE),
        ("ONNX", b"\x08\x07\x12\x07pytorch" + bytes(99), USAGE),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(99), USAGE),
        ("ELF", b"\x7fELF" + bytes(99), USAGE),
        ("JSON", b'{"w": [1, 2]}', USAGE),
        ("a script", b"#!/bin/sh\n" + TOUCH.encode(), USAGE),
        ("a tar file", kept.getvalue(), USAGE),
        ("a zip file", text.getvalue(), USAGE),
        ("an array of NumPy", array.getvalue(), USAGE),
        ("a pickle of numbers", pickle.dumps([1, 2]), USAGE),
        ("a pickle without end", b"\x80\x02" + b"]" * 10**6, USAGE),
        ("a text of 4 GB that is not there", b"\x80\x02X" + struct.pack("<I", 2**32 - 1), USAGE),
    )


def list_all(state: dict[str, Tensor]) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes and exit code (0 where 2 and 4 are both right) of each."""
    yield from list_code()
    yield from list_archives()
    yield from list_safetensors()
    yield from list_states(state)
    yield from list_torn(state)
