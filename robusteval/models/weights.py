"""Reading files of weights that are not trusted: nothing in them is executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robusteval.errors import Refused, RobustevalError, UsageError
from robusteval.models.archive import check_archive, check_legacy_storages, check_storages
from robusteval.models.built import State, escape
from robusteval.models.bystanders import Bystander, stand_in
from robusteval.models.copies import TOP, list_states
from robusteval.models.foreign import explain_file, explain_folder, explain_zip
from robusteval.models.hub_folder import find_hub_folder, list_weight_files
from robusteval.models.pickles import MOST_TENSORS, build_code_refusal, build_damage, limit_length
from robusteval.models.stored import is_stored, unpickle_views
from robusteval.models.tensor_views import view_tensors
from robusteval.runs.reading import (
    WEIGHTS,
    check_amount,
    check_regular,
    open_regular,
    read_buffer,
    read_bytes,
)

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
HEADER = 8 * 10**6  # bytes of the JSON in front of tensors
START = 4096  # bytes that say what a file is
PLAIN = 64 * 10**6  # bytes of a file that can only be refused, but with the reason
CHECKSUM = "robusteval_sha256"  # in the header of our own files: over all the rest of the file


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes
    ----------
    states : dict
        State dicts by their keys.
    notes : dict
        The metadata.
    digest : hash
        SHA-256 over the bytes of its files.
    """

    states: dict[str, State]
    notes: dict[str, Any]
    digest: hashlib._Hash


def read_contents(path: Path, wanted: str | None) -> Contents:
    """The state dicts of a file, or of a folder as transformers and timm write it.

    Those that hold something else than plain tensors are left out, unless `wanted` is their key.
    """
    if not os.path.isdir(path):
        raw = read_checkpoint_file(path)
        states, notes = parse_checkpoint(raw, path.name)
        states = select_plain_states(states, wanted, len(raw), path.name)
        return Contents(states, notes, hashlib.sha256(raw))
    if find_hub_folder(path) is None:
        raise explain_folder(path)
    merged: State = {}
    digest = hashlib.sha256()
    for file in list_weight_files(path):
        raw = read_checkpoint_file(file)
        digest.update(raw)
        states = select_plain_states(parse_checkpoint(raw, file.name)[0], None, len(raw), file.name)
        if list(states) != [TOP]:
            raise UsageError(
                f"{file} holds more than one state dict: give it as a file, --arch {path}"
            )
        if twice := next((name for name in states[TOP] if name in merged), None):
            raise UsageError(f"{path} holds the tensor {escape(twice)} in two files: mend it")
        merged |= states[TOP]
    return Contents({TOP: merged}, {}, digest)


def read_checkpoint_file(path: Path) -> bytes | bytearray:
    """All of a file of weights; what cannot be one by its first bytes is not read further."""
    try:
        with open_regular(path, WEIGHTS) as file:
            start = file.read(START)
            if not _may_hold_weights(start):
                check_regular(path, PLAIN)
            large = start[8:9] == b"{" or start.startswith(b"PK\x03\x04")
            raw = read_buffer(file) if large else read_bytes(path, WEIGHTS)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not raw:
        raise UsageError(f"{path} is empty; download or copy it again")
    return raw


def _may_hold_weights(start: bytes) -> bool:
    """Whether a file that begins so may be a large one: one of safetensors or of PyTorch."""
    return start[8:9] == b"{" or start.startswith((b"PK\x03\x04", LEGACY_MAGIC))


def parse_checkpoint(raw: bytes | bytearray, file: str) -> tuple[dict[str, State], dict[str, Any]]:
    """The state dicts by their keys and what the header says; the kind is told by content."""
    content, notes = parse_tensors(raw, file)
    return ({TOP: content} if raw[8:9] == b"{" else _find_states(content, file)), notes


def parse_tensors(raw: bytes | bytearray, file: str) -> tuple[Any, dict[str, Any]]:
    """What a file of tensors holds, as `torch.save` was given it, and what its header says.

    Raises
    ------
    UsageError
        It is damaged or of another kind.
    Refused
        It could run code.
    """
    if raw[8:9] == b"{":
        return _parse_safetensors(raw, file)
    if raw.startswith(b"PK\x03\x04"):
        archive, folder = _check_contents(raw, file)
        if is_stored(raw, archive, folder):
            return _torch_load(lambda: unpickle_views(raw, archive, folder), file), {}
        return _torch_load(lambda: _load_copies(raw), file), {}
    if raw.startswith(LEGACY_MAGIC):
        if _list_globals(raw, 5, file) is None:  # a torn name would look like a forbidden one
            raise build_damage(file)
        check_legacy_storages(raw, file)
        return _torch_load(lambda: _load_copies(raw), file), {}
    raise _explain_kind(raw, file)


def _explain_kind(raw: bytes | bytearray, file: str) -> RobustevalError:
    """The error on a file that holds no tensors in a form that is read."""
    names = _list_globals(raw, 1, file)
    if names:
        return build_code_refusal(file, ", ".join(map(escape, dict.fromkeys(names[:4]))))
    if raw.startswith(b"\x80"):
        return build_damage(file) if names is None else _without_state(file, "a plain pickle")
    return explain_file(raw, file)


def _parse_safetensors(raw: bytes | bytearray, file: str) -> tuple[State, dict[str, Any]]:
    check_amount(f"the header of {file}", int.from_bytes(raw[:8], "little"), HEADER, "bytes")
    try:
        state, header = view_tensors(raw)
        check_amount(file, len(state), MOST_TENSORS, "tensors")
        notes = header.get("__metadata__", {})
        begin = 8 + int.from_bytes(raw[:8], "little")
        sealed = CHECKSUM in notes
        found = compute_checksum(header, memoryview(raw)[begin:]) if sealed else None
    except RobustevalError:
        raise
    except Exception:  # whatever damaged bytes lead to, in two readers
        raise build_damage(file) from None
    if notes.get(CHECKSUM) != found:
        raise build_damage(file)
    return state, {key: _parse_note(text) for key, text in notes.items()}


def compute_checksum(header: Mapping[str, Any], body: bytes | memoryview) -> str:
    """SHA-256 of one of our own files without itself."""
    notes = {key: text for key, text in header.get("__metadata__", {}).items() if key != CHECKSUM}
    described = json.dumps({**header, "__metadata__": notes}, sort_keys=True)
    digest = hashlib.sha256(described.encode())
    digest.update(body)
    return digest.hexdigest()


def split_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def _parse_note(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # other programs write plain words there


def _check_contents(raw: bytes | bytearray, file: str) -> tuple[zipfile.ZipFile, str]:
    """The archive of a zip file with one pickle and its tensors, and the folder in it."""
    archive = check_archive(raw, file)
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(n.endswith((".py", "/constants.pkl")) or "/code/" in n for n in names):
        raise build_code_refusal(file, "the code inside this TorchScript archive")
    if any(n.endswith(("archive_format", "serialized_exported_program.json")) for n in names):
        raise build_code_refusal(file, "the program inside this torch.export archive")
    folder = names[0].partition("/")[0]  # torch looks nowhere else
    if f"{folder}/data.pkl" not in names:
        raise explain_zip(names, file)
    try:
        # torch does not check sums when it reads, and can be told to write none
        torn = any(entry.CRC for entry in entries) and archive.testzip() is not None
    except Exception:  # whatever damaged bytes lead to
        torn = True
    if torn:
        raise build_damage(file)
    check_storages(archive, f"{folder}/data.pkl", file)
    return archive, folder


def _list_globals(raw: bytes | bytearray, pickles: int, file: str) -> list[str] | None:
    """Names of the objects a run of pickles would import, None where one is cut short.

    Reads the instructions without following them. The names are for messages, not for judging
    safety: a hostile pickle can hide them.
    """
    names: list[str] = []
    stream = io.BytesIO(raw)
    try:
        for _ in range(pickles):
            texts: list[str] = []
            memo: dict[Any, str] = {}
            for opcode, argument, _ in limit_length(pickletools.genops(stream), file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
                elif "UNICODE" in opcode.name:
                    texts.append(str(argument))
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = texts[-1] if texts else ""
                elif "GET" in opcode.name:
                    texts.append(memo.get(argument, ""))
    except Refused:
        raise
    except Exception:  # pickletools raises whatever the bytes lead it into
        return None
    return names


def _load_copies(raw: bytes | bytearray) -> Any:
    return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")


def _torch_load(load: Callable[[], Any], file: str) -> Any:
    if torch.__version__ < "2.10":
        raise Refused(
            f"{file} was not opened: PyTorch files can run code in torch {torch.__version__} even "
            "when only weights are asked for; install torch 2.10 or later, or use safetensors"
        )
    try:
        # of oddities of damaged files torch warns
        with warnings.catch_warnings(action="ignore"), stand_in():
            return load()
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wanted = named[1] if named else "more than plain tensors"
        raise build_code_refusal(file, escape(wanted)) from None
    except Exception:  # whatever damaged bytes lead to
        raise build_damage(file) from None


def _find_states(content: Any, file: str) -> dict[str, State]:
    """The state dicts in what `torch.save` was given."""
    states = list_states(content)
    if not states:
        kind = "an object that is not built" if isinstance(content, Bystander) else None
        raise _without_state(file, kind or type(content).__name__)
    return states


def _without_state(file: str, found: str) -> UsageError:
    return UsageError(f"{file} holds no state dict but {found}: save model.state_dict() there")


def check_plain_tensors(state: State, size: int, file: str) -> None:
    """Refuse what cannot be weights, and tensors that repeat few bytes to fill the memory."""
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise UsageError(f"tensor {escape(name)} in {file} is not a plain array of numbers")
        if tensor.numel() * tensor.element_size() > size:
            raise UsageError(f"tensor {escape(name)} in {file} is larger than the file")


def select_plain_states(
    states: Mapping[str, State], wanted: str | None, size: int, file: str
) -> dict[str, State]:
    """Those that `check_plain_tensors` passes; what it raises, if none is left or it is wanted."""
    plain = {}
    for key, state in states.items():
        try:
            check_plain_tensors(state, size, file)
            plain[key] = state
        except UsageError:
            if key == wanted or (len(plain) == 0 and key == list(states)[-1]):
                raise
    return plain


def read_sealed(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors and notes of a file that `serialise_safetensors` made.

    OSError if there is none, UsageError if it is no ordinary file, ValueError if it is not, byte
    for byte, what was written.
    """
    raw = read_bytes(path, WEIGHTS)
    try:
        header, body = split_safetensors(raw)
        notes = header["__metadata__"]
        if notes.pop(CHECKSUM) != compute_checksum(header, body):
            raise ValueError("other bytes than were written")
        return safetensors.torch.load(raw), notes
    except Exception:  # whatever damaged bytes lead to
        raise ValueError(f"{path} is damaged") from None


def serialise_safetensors(state: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file with a checksum; equal contents give equal bytes."""
    # clones, because the format holds no shared memory
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    header, body = split_safetensors(safetensors.torch.save(tensors))
    # written here, because the library orders the notes at random
    header["__metadata__"] = {name: notes[name] for name in sorted(notes)}
    header["__metadata__"][CHECKSUM] = compute_checksum(header, body)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body
