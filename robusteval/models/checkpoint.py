"""From a file of weights to a classifier, without running anything the file holds."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robusteval.errors import Refused, UsageError
from robusteval.models.architecture import (
    ARCH_FORMS,
    Built,
    Preset,
    Shape,
    State,
    build,
    preset_of,
    public_name,
    reported,
    shown,
)
from robusteval.models.classifier import Classifier
from robusteval.models.masked import Masked
from robusteval.runs.storage import write_atomically

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "ema",
    "state_dict_ema",
    "model_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.")
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SIZES = (32, 28, 224)  # tried in this order where nothing says what images the network takes
MOST_LINES = 8
CHECKSUM = "robusteval_sha256"  # in the header of our own files: over all the rest of the file
MASKS = "robusteval_masks"  # a tensor beside the weights; the header's note "mask" says the rest


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> Classifier:
    """The classifier whose weights a file holds: eval mode, parameters frozen, on `device`.

    Safetensors files and PyTorch state dicts are read, told apart by content; nothing in the file
    is ever executed. What is not given is taken from the file's own metadata, then from the
    preset that torchvision or timm publishes for the architecture.

    Parameters
    ----------
    path : path
        The file; it is read once, so the hash in the identity is that of the weights in use.
    arch : str, optional
        ``torchvision:NAME``, ``robusteval:NAME``, ``timm:NAME``, ``path/to/file.py:function`` or
        ``package.module:function``. The last two run that code. ``torchvision:googlenet`` and
        ``inception_v3`` are built as for their published weights (``transform_input``).
    mean, std : sequence of float, optional
        Normalisation per channel, or one for all, in units of the [0, 1] pixel range; both or
        neither. A mean of 0 and a std of 1 switch a preset off.
    num_classes : int, optional
        Number of logits; found from the weights if not given.
    device : str or torch.device
        Where the classifier goes; see `pick_device`.

    Returns
    -------
    Classifier
        ``identity`` holds sha256, file, arch, arch_sha256, mean, std, normalisation (where it came
        from), num_classes, input_shape and input_channels (None if unknown), size and resize
        (pixels of the preset's crop and of the short side before it) and parameters (count); of a
        file with masks also mask, see `robusteval.models.masked.Masked.facts`.

    Raises
    ------
    UsageError
        A missing, foreign or damaged file, weights that do not fit, or options that contradict.
    Refused
        The file could not be opened without running code that is in it.
    """
    path = Path(path)
    target = pick_device(str(device))
    raw = _read(path)
    state, notes = _opened(raw, path.name)
    _check_plain(state, len(raw), path.name)
    masks = state.pop(MASKS, None)
    arch = arch or _arch_in_file(notes, path.name)
    wanted = num_classes or _classes_in_file(notes, state, path.name)
    built = _fitted(arch, wanted, state, path.name)
    preset = preset_of(arch, built.network)
    built = _masked(built, masks, notes, path.name)
    shape = _shape_in_file(notes, path.name) or (preset.shape if preset else None)
    channels, found = _probed(built, shape)
    if wanted is not None and found != wanted:
        raise UsageError(f"{built.name} has {found} outputs, not {wanted} (--num-classes)")
    if found < 2:
        raise UsageError(f"{built.name} has one output; a classifier needs a logit for each class")
    normalisation = _normalisation((mean, std), notes, preset, channels)
    identity: dict[str, Any] = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "file": path.name,
        "arch": built.name,
        "arch_sha256": built.sha256,
        "mean": normalisation.mean,
        "std": normalisation.std,
        "normalisation": normalisation.origin,
        "num_classes": found,
        "input_shape": list(shape) if shape else None,
        "input_channels": channels,
        "size": preset.size if preset else None,
        "resize": preset.resize if preset else None,
        "parameters": sum(p.numel() for p in built.network.parameters()),
    }
    if isinstance(built.network, Masked):
        identity["mask"] = built.network.facts
    classifier = Classifier(
        built.network,
        mean=normalisation.mean,
        std=normalisation.std,
        num_classes=found,
        input_shape=shape,
        identity=identity,
    )
    classifier.arch = arch
    return classifier.requires_grad_(False).eval().to(target)


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    arch: str,
    num_classes: int,
    input_shape: Shape | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    **facts: Any,
) -> None:
    """Write a state dict as a safetensors file that `load` opens without options.

    The file appears whole or not at all, and equal contents give equal bytes.

    Parameters
    ----------
    path : path
        The file to write; its folder is made if need be.
    state : mapping
        State dict of the network itself, without the classifier's normalisation.
    arch, num_classes, input_shape, mean, std
        As in `load`; None for mean and std says that there is no normalisation. Of a path to
        a Python file only the file's name is kept, and `load` will ask for it again.
    **facts
        JSON-able facts about the training, kept in the header.

    Raises
    ------
    RunError
        The file could not be written.
    """
    notes = facts | {
        "format": "robusteval 1",
        "arch": public_name(arch),
        "num_classes": num_classes,
        "input": input_shape,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
    }
    texts = {name: json.dumps(note, allow_nan=False) for name, note in notes.items()}
    write_atomically(Path(path), serialised(state, texts))


def contents(network: nn.Module) -> tuple[State, dict[str, Any]]:
    """What `save` needs of a network: its state dict, and facts if units of it are masked."""
    if not isinstance(network, Masked):
        return network.state_dict(), {}
    state = {**network.network.state_dict(), MASKS: network.masks.to(torch.uint8)}
    seen = [f"{number:016x}" for number in network.seen.tolist()]
    return state, {"mask": {"layer": network.layer, "seen": seen}}


def pick_device(name: str | None) -> torch.device:
    """The device of that name; "auto" or None is a GPU if there is one, else the processor.

    Raises
    ------
    UsageError
        There is no such device here.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name} here: torch sees {_gpus()}; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no device mps here; use --device cpu")
    return device


def _gpus() -> str:
    count = torch.cuda.device_count()
    return f"cuda:0 to cuda:{count - 1}" if count else "no CUDA GPU"


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the file with the weights")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not raw:
        raise UsageError(f"{path} is empty; download or copy it again")
    return raw


def _opened(raw: bytes, file: str) -> tuple[State, dict[str, Any]]:
    """The state dict and what the header says about it; the kind is told by content."""
    if raw[8:9] == b"{":
        return _opened_safetensors(raw, file)
    if raw.startswith(b"PK\x03\x04"):
        _check_archive(raw, file)
        return _state_dict(_torch_load(raw, file), file), {}
    if raw.startswith(LEGACY_MAGIC):
        if _globals(raw, 5) is None:  # a torn name would look like a forbidden one
            raise _damaged(file)
        return _state_dict(_torch_load(raw, file), file), {}
    names = _globals(raw, 1)
    if names:
        raise _refusal(file, ", ".join(map(shown, dict.fromkeys(names[:4]))))
    if raw.startswith(b"\x80"):
        raise _damaged(file) if names is None else _without_state(file, "a plain pickle")
    start = raw[:1024].lstrip().lower()
    if start.startswith(b"<") and (b"<html" in start or b"<!doctype" in start):
        raise UsageError(f"{file} is a web page (HTML), not weights: download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    raise UsageError(
        f"{file} has no format known here: safetensors files and PyTorch state dicts (.pt, .pth) "
        "are read, ONNX, TensorFlow and Keras files are not"
    )


def _opened_safetensors(raw: bytes, file: str) -> tuple[State, dict[str, Any]]:
    try:
        state = safetensors.torch.load(raw)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError):
        raise _damaged(file) from None
    header, body = parts(raw)
    notes = header.get("__metadata__", {})
    found = checksum(header, body)
    if notes.get(CHECKSUM, found) != found:
        raise _damaged(file)
    return state, {key: _parsed(text) for key, text in notes.items()}


def checksum(header: Mapping[str, Any], body: bytes) -> str:
    """SHA-256 of one of our own files without itself."""
    notes = {key: text for key, text in header.get("__metadata__", {}).items() if key != CHECKSUM}
    described = json.dumps({**header, "__metadata__": notes}, sort_keys=True)
    return hashlib.sha256(described.encode() + body).hexdigest()


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # other programs write plain words there


def _damaged(file: str) -> UsageError:
    return UsageError(f"{file} is truncated or damaged; download or copy it again")


def _check_archive(raw: bytes, file: str) -> None:
    """Let only zip files pass that hold one pickle and its tensors."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(raw))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        raise _damaged(file) from None
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(n.endswith((".py", "/constants.pkl")) or "/code/" in n for n in names):
        raise _refusal(file, "the code inside this TorchScript archive")
    if any(n.endswith(("archive_format", "serialized_exported_program.json")) for n in names):
        raise _refusal(file, "the program inside this torch.export archive")
    if not any(n.endswith("/data.pkl") for n in names):
        raise UsageError(f"{file} is a zip file, but not one written by torch.save")
    if sum(entry.file_size for entry in entries) > 4 * len(raw) + 2**20:
        raise Refused(f"{file} was not opened: unpacked it is many times its size (a zip bomb)")
    try:
        # torch does not check sums when it reads, and can be told to write none
        torn = any(entry.CRC for entry in entries) and archive.testzip() is not None
    except Exception:  # whatever damaged bytes lead to
        torn = True
    if torn:
        raise _damaged(file)


def _globals(raw: bytes, pickles: int) -> list[str] | None:
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
            for opcode, argument, _position in pickletools.genops(stream):
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
    except Exception:  # pickletools raises whatever the bytes lead it into
        return None
    return names


def _torch_load(raw: bytes, file: str) -> Any:
    if torch.__version__ < "2.10":
        raise Refused(
            f"{file} was not opened: PyTorch files can run code in torch {torch.__version__} even "
            "when only weights are asked for; install torch 2.10 or later, or use safetensors"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # about oddities of damaged files
            return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wanted = named[1] if named else "more than plain tensors"
        raise _refusal(file, shown(wanted)) from None
    except Exception:  # whatever damaged bytes lead to
        raise _damaged(file) from None


def _refusal(file: str, wanted: str) -> Refused:
    return Refused(
        f"{file} was not opened, because that could run code: it needs {wanted}. If you trust it, "
        "load it yourself and save its tensors alone: "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )


def _state_dict(content: Any, file: str) -> State:
    """The first state dict in what `torch.save` was given."""
    state = _tensors(content)
    if not state:
        raise _without_state(file, type(content).__name__)
    return state


def _without_state(file: str, found: str) -> UsageError:
    return UsageError(f"{file} holds no state dict but {found}: save model.state_dict() there")


def _tensors(content: Any, depth: int = 3) -> State:
    if not isinstance(content, Mapping):
        return {}
    for wrapper in WRAPPERS if depth else ():  # a hostile file can wrap itself
        if inner := _tensors(content.get(wrapper), depth - 1):
            return inner
    items = content.items()
    return {k: v.detach() for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}


def _check_plain(state: State, size: int, file: str) -> None:
    """Refuse what cannot be weights, and tensors that repeat few bytes to fill the memory."""
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise UsageError(f"tensor {shown(name)} in {file} is not a plain array of numbers")
        if tensor.numel() * tensor.element_size() > size:
            raise UsageError(f"tensor {shown(name)} in {file} is larger than the file")


def _arch_in_file(notes: Mapping[str, Any], file: str) -> str:
    arch = notes.get("arch")
    if arch is None:
        raise UsageError(f"{file} does not say what network it is for: give --arch as {ARCH_FORMS}")
    if not isinstance(arch, str) or not arch.startswith(("torchvision:", "robusteval:")):
        raise UsageError(
            f"{file} asks for the architecture {shown(str(arch))}, which a file may not choose, "
            f"because that could run code: give --arch yourself as {ARCH_FORMS}"
        )
    return arch


def _classes_in_file(notes: Mapping[str, Any], state: State, file: str) -> int | None:
    value = notes.get("num_classes")
    if value is None:
        return None
    # a count that no tensor has could only ask for memory
    if type(value) is not int or all(tensor.shape[:1] != (value,) for tensor in state.values()):
        raise UsageError(f"the metadata of {file} is wrong: num_classes is {shown(str(value))}")
    return value


def _shape_in_file(notes: Mapping[str, Any], file: str) -> Shape | None:
    value = notes.get("input")
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(n) is int and 1 <= n <= 4096 for n in value):
        value = []
    match value:
        case [c, h, w]:
            return c, h, w
        case _:
            raise UsageError(f"the metadata of {file} is wrong: input must be [channels, h, w]")


def _fitted(arch: str, num_classes: int | None, state: State, file: str) -> Built:
    """The architecture with the weights in it; its class count is found from theirs."""
    built = build(arch, num_classes, state)
    weights, misfit = _compared(built.network, state)
    if num_classes is None and (classes := misfit.classes()):
        other = build(arch, classes, state)
        if not _compared(other.network, state)[1]:
            built, misfit = other, Misfit([], [], [])
    if misfit:
        raise UsageError(misfit.sentence(file, built.name))
    for name, tensor in weights.items():
        if not bool(tensor.float().isfinite().all()):
            raise UsageError(
                f"tensor {shown(name)} in {file} contains NaN or infinity: the model would "
                "answer nothing"
            )
    network = built.network.float().eval()
    complete = network.state_dict()  # with the format versions that some modules look up
    complete.update(weights)
    with reported(built.name):
        network.load_state_dict(complete)
    return built


def _masked(built: Built, masks: Tensor | None, notes: Mapping[str, Any], file: str) -> Built:
    """The network with the masks of the file, if it has any."""
    note = notes.get("mask")
    if masks is None and note is None:
        return built
    match note:
        case {"layer": str(layer), "seen": list(seen)} if masks is not None:
            pass
        case _:
            raise UsageError(
                f"{file} has masks without the note that says of what, or the note without masks:"
                " make it again with `robusteval defend mask`"
            )
    try:
        ids = np.array([int(number, 16) for number in seen], np.uint64)
        return replace(built, network=Masked(built.network, layer, masks, ids).eval())
    except UsageError as error:
        raise UsageError(f"the masks in {file} do not fit {built.name}: {error}") from None
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"the metadata of {file} is wrong: mask must list ids of images") from None


class Misfit(NamedTuple):
    """How weights differ from a network's: names with shapes, and shapes in file and network."""

    missing: list[tuple[str, torch.Size]]
    unexpected: list[tuple[str, torch.Size]]
    shapes: list[tuple[str, torch.Size, torch.Size]]

    def __bool__(self) -> bool:
        return any(self)

    def classes(self) -> int | None:
        """The class count that could explain the whole difference."""
        counts = {(inside[0], wanted[0]) for _, inside, wanted in self.shapes if inside and wanted}
        alike = all(inside[1:] == wanted[1:] for _, inside, wanted in self.shapes)
        if self.missing or self.unexpected or len(counts) != 1 or not alike:
            return None
        return int(counts.pop()[0])

    def sentence(self, file: str, arch: str) -> str:
        """A readable difference: one sentence, then lines."""
        lines = [
            f"the weights in {file} do not fit {arch}: {len(self.missing)} tensors missing, "
            f"{len(self.unexpected)} unexpected, {len(self.shapes)} of another shape"
        ]
        lines += _some("missing", (f"{shown(n)} {tuple(s)}" for n, s in self.missing))
        lines += _some("unexpected", (f"{shown(n)} {tuple(s)}" for n, s in self.unexpected))
        shapes = (
            f"{shown(name)} is {tuple(inside)} in the file, {tuple(wanted)} in the architecture"
            for name, inside, wanted in self.shapes
        )
        return "\n".join(lines + _some("shape", shapes))


def _some(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"  {title}: {item}" for item in items]
    rest = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"  {title}: and {rest} more"] if rest > 0 else [])


def _compared(network: nn.Module, state: State) -> tuple[State, Misfit]:
    """The state without wrappers' prefixes, and how it differs from the network's."""
    wanted = network.state_dict()
    stripped = [state]
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in stripped[-1])), None):
        stripped.append({n.removeprefix(prefix): t for n, t in stripped[-1].items()})
    state = max(stripped, key=lambda names: len(wanted.keys() & names.keys()))
    missing = [
        (name, tensor.shape)
        for name, tensor in wanted.items()
        # a counter that checkpoints from before 2018 lack and eval mode never reads
        if name not in state and not name.endswith("num_batches_tracked")
    ]
    unexpected = [(name, state[name].shape) for name in sorted(state.keys() - wanted.keys())]
    shapes = [
        (name, state[name].shape, tensor.shape)
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return state, Misfit(missing, unexpected, shapes)


def _probed(built: Built, shape: Shape | None) -> tuple[int | None, int]:
    """Channels (None if unknown) and classes of a network, by showing it black images."""
    first = next((m for m in built.network.modules() if isinstance(m, nn.Conv2d)), None)
    channels = shape[0] if shape else first.in_channels if first else None
    candidates = [channels] if channels else [3, 1]
    shapes = [shape] if shape else [(c, size, size) for c in candidates for size in SIZES]
    failure: object = "it returned another number of rows"
    for c, h, w in shapes:
        try:
            with torch.no_grad():
                logits = built.network(torch.zeros(2, c, h, w))
        except UsageError as error:  # of masks
            raise UsageError(f"the masks do not fit {built.name}: {error}") from None
        except Exception as error:  # whatever a network does on images it was not made for
            failure = error
            continue
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"{built.name} returned {got} for two images; a classifier returns one tensor "
                "(n, num_classes)"
            )
        if len(logits) == 2:
            return c, logits.shape[1]
    if shape:
        raise UsageError(f"{built.name} cannot take images of shape {shape}: {failure}")
    matrices = [p for p in built.network.parameters() if p.ndim == 2]
    if not matrices:
        raise UsageError(f"{built.name} took no image of {SIZES} pixels a side: {failure}")
    return channels, len(matrices[-1])


class Normalisation(NamedTuple):
    """Mean and deviation per channel, in units of the [0, 1] pixel range, and who said so."""

    mean: list[float] | None
    std: list[float] | None
    origin: str


def _normalisation(
    given: tuple[Sequence[float] | None, Sequence[float] | None],
    notes: Mapping[str, Any],
    preset: Preset | None,
    channels: int | None,
) -> Normalisation:
    if given != (None, None):
        return _checked(*given, "given", channels)
    if "mean" in notes or "std" in notes:
        mean, std = notes.get("mean"), notes.get("std")
        if mean is None and std is None:
            return Normalisation(None, None, "none, from the file")
        return _checked(mean, std, "from the file", channels)
    if preset:
        return Normalisation(preset.mean, preset.std, preset.origin)
    return Normalisation(None, None, "none")


def _checked(mean: Any, std: Any, origin: str, channels: int | None) -> Normalisation:
    if mean is None or std is None:
        raise UsageError(f"the normalisation {origin} has only one of mean and std: give both")
    pair = []
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or not all(map(_is_number, values)):
            raise UsageError(f"the {key} {origin} must be numbers, one for each channel")
        values = [float(value) for value in values]
        if channels and len(values) == 1:
            values *= channels
        if not values or len(values) != (channels or len(values)):
            raise UsageError(
                f"the {key} {origin} has {len(values)} numbers for {channels} channels"
            )
        pair.append(values)
    if len(pair[0]) != len(pair[1]):
        raise UsageError(f"mean and std {origin} differ in length: {len(pair[0])}, {len(pair[1])}")
    if min(pair[1]) <= 0:
        raise UsageError(f"the std {origin} must be positive in every channel")
    return Normalisation(pair[0], pair[1], origin)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def serialised(state: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file with a checksum; equal contents give equal bytes."""
    # clones, because the format holds no shared memory
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    header, body = parts(safetensors.torch.save(tensors))
    # written here, because the library orders the notes at random
    header["__metadata__"] = {name: notes[name] for name in sorted(notes)}
    header["__metadata__"][CHECKSUM] = checksum(header, body)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body
