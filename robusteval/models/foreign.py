"""Files and folders that hold no weights in a form that is read, and the way on from each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from robusteval.errors import UsageError
from robusteval.models.built import escape

STATE = "torch.save(model.state_dict(), 'net.pt')"
WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")
TRAINING = ("optimizer", "scheduler", "scaler", "random_states", "rng_state", "training_args")
# how archives begin, where there is nothing to be read before they are unpacked
ARCHIVES = (
    *((0, b"\x1f\x8b"), (0, b"BZh"), (0, b"\xfd7zXZ"), (0, b"(\xb5/\xfd")),
    *((0, b"7z\xbc\xaf"), (0, b"Rar!"), (257, b"ustar")),
)
COMPILED = {
    "GGUF": (0, b"GGUF"),
    "TensorFlow Lite": (4, b"TFL3"),
    "ExecuTorch": (4, b"ET1"),
    "TensorRT": (0, b"ptrt"),
}
MOST_FILES = 200  # of a folder that are looked at


def explain_file(raw: bytes | bytearray, file: str) -> UsageError:
    """The error on a file that is no archive of torch and no pickle."""
    start = raw[:1024].lstrip().lower()
    if start.startswith(b"<") and (b"<html" in start or b"<!doctype" in start):
        return UsageError(f"{file} is a web page (HTML), not weights: download the file itself")
    if start.startswith(b"version https://git-lfs"):
        return UsageError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    if start.startswith((b"{", b"[")):
        return UsageError(f"{file} is JSON, which says what is where: give the folder it is in")
    if any(raw[at : at + len(mark)] == mark for at, mark in ARCHIVES):
        return UsageError(
            f"{file} is an archive of files: unpack it, and give the file of weights or the folder"
            " that is in it"
        )
    if raw[:1] == b"\x08" and file.lower().endswith(".onnx"):
        return UsageError(
            f"{file} is ONNX, which is not read, as it becomes a network only by running code made"
            f" of it: save the weights where it was exported from, {STATE}, or, if you trust the"
            f" file, make network = onnx2torch.convert({file!r}).eval() in Python (which takes"
            " exports of opset 17 and before), compare its outputs, and give it to"
            " robusteval.evaluate(network, data)"
        )
    if raw.startswith(b"\x89HDF"):
        return _explain_keras(file, "HDF5, as Keras writes it")
    for kind, (at, mark) in COMPILED.items():
        if raw[at : at + len(mark)] == mark:
            return UsageError(
                f"{file} is of {kind}, which is made for running and not read: save the weights"
                f" where it was made from, {STATE}"
            )
    return UsageError(
        f"{file} has no format known here: safetensors files and PyTorch state dicts (.pt, .pth) "
        "are read, ONNX, TensorFlow and Keras files are not"
    )


def _explain_keras(file: str, kind: str) -> UsageError:
    return UsageError(
        f"{file} is {kind}, which is not read: save the weights from PyTorch, {STATE}"
    )


def explain_zip(names: Sequence[str], file: str) -> UsageError:
    """The error on a zip file that `torch.save` did not write, by what is in it."""
    if any(name.endswith("model.weights.h5") for name in names):
        return _explain_keras(file, "a file of Keras")
    if names and all(name.endswith(".npy") for name in names):
        return UsageError(
            f"{file} holds arrays of NumPy and was not written by torch.save: if it is a network of"
            " JAX, as ViTs are published, build that of timm, call model.load_pretrained("
            f"{file!r}) and save {STATE}"
        )
    inside = [name for name in names if name.endswith(WEIGHTS)]
    if inside:
        return UsageError(
            f"{file} is a zip file with {escape(inside[0])} in it: unpack it, and give that file"
        )
    return UsageError(f"{file} is a zip file, but not one written by torch.save")


def explain_folder(path: Path) -> UsageError:
    """The error on a folder without a `config.json`, by what is in it."""
    files = list(_list_files(path))
    names = {os.path.basename(name) for name in files}
    if "adapter_config.json" in names:
        return UsageError(
            f"{path} holds adapters (LoRA) without the network: merge them first, in peft with"
            " model.merge_and_unload().save_pretrained(FOLDER)"
        )
    if any(name.endswith(".distcp") for name in names):
        return UsageError(
            f"{path} holds shards of a distributed checkpoint: make one file of them, python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {path} net.pt"
        )
    if any("zero_pp_rank" in name or name == "zero_to_fp32.py" for name in names):
        return UsageError(
            f"{path} holds shards of DeepSpeed: make one file of them, in Python with"
            " deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict"
        )
    if "saved_model.pb" in names:
        return _explain_keras(str(path), "a SavedModel of TensorFlow")
    found = [name for name in files if name.endswith(WEIGHTS)]
    found = [name for name in found if not os.path.basename(name).startswith(TRAINING)]
    if len(found) == 1:
        return UsageError(
            f"{path} is a folder without a config.json: give the file with the weights,"
            f" {path / escape(found[0])}"
        )
    return UsageError(f"{path} is a folder without a config.json: give the file with the weights")


def _list_files(path: Path) -> Iterator[str]:
    """The files of a folder and of folders in it, some hundred at most."""
    count = 0
    for top, folders, files in os.walk(path):
        if Path(top) != path:
            folders.clear()
        for name in sorted(files):
            count += 1
            if count > MOST_FILES:
                return
            yield os.path.relpath(os.path.join(top, name), path)
