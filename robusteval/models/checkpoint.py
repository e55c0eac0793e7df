"""From a file of weights to a classifier, without running anything the file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.errors import UsageError, check_argument, check_path
from robusteval.models.architecture import ARCH_FORMS, check_source, find_preset, name_publicly
from robusteval.models.building import build_with_weights, fits_network
from robusteval.models.built import Built, State, escape
from robusteval.models.classifier import Classifier
from robusteval.models.copies import choose_state
from robusteval.models.environment import pick_device
from robusteval.models.hub_folder import find_hub_folder, read_labels
from robusteval.models.masked import Masked
from robusteval.models.normalisation import choose_normalisation
from robusteval.models.outputs import LogitsOf, unwrap_logits
from robusteval.models.precision import describe_precision, name_precision, set_precision
from robusteval.models.preparation import Shape
from robusteval.models.probing import probe_network
from robusteval.models.weights import read_contents, serialise_safetensors
from robusteval.runs.reading import check_amount
from robusteval.runs.writing import write_atomically

MOST_NUMBERS = 3 * 800 * 800  # of an image: the largest that timm has a network for
MASKS = "robusteval_masks"  # a tensor beside the weights; the header's note "mask" says the rest


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Classifier:
    """The classifier whose weights a file holds: eval mode, parameters frozen, on `device`.

    Safetensors files and PyTorch state dicts are read, told apart by content; nothing in the file
    is ever executed. What is not given is taken from the file's own metadata, then from the
    preset that torchvision or timm publishes for the architecture. Of a folder as transformers and
    timm publish them all is read; nothing is downloaded.

    Parameters
    ----------
    path : path
        The file, or a folder with ``config.json`` and weights; it is read once, so the hash in the
        identity is that of the weights in use.
    arch : str, optional
        ``torchvision:NAME``, ``robusteval:NAME``, ``timm:NAME``, ``path/to/file.py:function``,
        ``package.module:function``, or a folder with ``config.json``. The functions run that code.
        ``torchvision:googlenet`` and ``inception_v3`` are built as for their published weights
        (``transform_input``).
    mean, std : sequence of float, optional
        Normalisation per channel, or one for all, in units of the [0, 1] pixel range; both or
        neither. A mean of 0 and a std of 1 switch a preset off.
    num_classes : int, optional
        Number of logits; found from the weights if not given.
    weights : str, optional
        Key of a state dict in a file of PyTorch that holds several, such as ``state_dict_ema``,
        with a dot between levels; needed where two that differ fit.
    device : str or torch.device
        Where the classifier goes; see `pick_device`.
    dtype : str or torch.dtype
        What the network computes in: float32, bfloat16 or float16, to which all weights are
        rounded. Images are normalised in float32.

    Returns
    -------
    Classifier
        ``identity`` holds sha256 (of the file; where several state dicts fit, of it and the key),
        file, arch, arch_sha256, mean, std, normalisation (where it came
        from), num_classes, input_shape and input_channels (None if unknown), size and resize
        (pixels of the preset's crop and of the short side before it), interpolation, stretch
        (whether both sides are brought to `resize`), certain (whether that belongs to these
        weights and not only to the architecture) and parameters (count); crop and fill, where the
        centre is not cut out as torchvision does (`robusteval.datasets.images.Fit`); of a
        file with masks also mask, see `robusteval.models.masked.Masked.mask_facts`; where several
        state dicts fit also weights, the key that was taken; where the file's names are not the
        network's, also reading, what was done to them in words; where the network returns
        something else than logits, also outputs, how they are found in it; where not all is
        float32, also precision, what is in words, and dtype where that is another.

    Raises
    ------
    UsageError
        A missing, foreign or damaged file, weights that do not fit, or options that contradict.
    Refused
        The file could not be opened without running code that is in it.
    """
    check_path("a checkpoint", path)
    check_argument(
        "arch",
        arch,
        (str, type(None)),
        'name it, such as "net.py:Net"; a network that is built already needs no load: give it to'
        " robusteval.evaluate as it is",
    )
    path = Path(path)
    target = pick_device(str(device))
    dtype = name_precision(dtype)
    if str(path) == "demo" and not path.exists():
        raise UsageError(
            "there is no file demo: `demo` is a network only to the commands; load(demo()) with"
            " `from robusteval.models.demo import demo`, which trains it once, gives the same"
        )
    states, notes, content = read_contents(path, weights)
    file = path.name or path.resolve().name
    arch = arch or (str(path) if os.path.isdir(path) else _find_arch(notes, file))
    check_source(arch, path.parent)
    fits = partial(fits_network, arch, num_classes)
    state, key, several = choose_state(states, weights, fits, file)
    masks = state.pop(MASKS, None)
    wanted = num_classes or _find_classes(notes, state, file)
    filled = build_with_weights(arch, wanted, state, file, plain=weights is not None)
    built, match = filled.built, filled.match
    preset = find_preset(arch, built.network)
    if preset is None and find_hub_folder(arch) and (mean, std) == (None, None):
        raise UsageError(
            f"{find_hub_folder(arch)} has no preprocessor_config.json, so that nothing says how"
            " images are normalised: copy that file there, or give --mean and --std"
        )
    shape = _find_shape(notes, file) or (preset.shape if preset else None)
    probe = probe_network(built, shape)
    words = probe.reading.describe()
    flip = preset is not None and preset.flip
    if words or flip:
        built = replace(built, network=LogitsOf(built.network, probe.reading, flip=flip))
    built = _insert_masks(built, masks, notes, file)
    if masks is not None:
        probe_network(built, shape)
    set_precision(built.network, dtype, file)
    channels, found = probe.channels, probe.classes
    if wanted is not None and found != wanted:
        raise UsageError(f"{built.name} has {found} outputs, not {wanted} (--num-classes)")
    if several:  # two models in one file are two models to all that is kept under the hash
        content.update(f"\n{key}".encode())
    normalisation = choose_normalisation((mean, std), match.normaliser, notes, preset, channels)
    identity: dict[str, Any] = {
        "sha256": content.hexdigest(),
        "file": file,
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
        "interpolation": preset.interpolation if preset else None,
        "stretch": preset.stretch if preset else None,
        "certain": preset.certain if preset else None,
        "parameters": sum(p.numel() for p in built.network.parameters()),
    }
    if preset is not None and preset.crop != "rounded":
        identity |= {"crop": preset.crop, "fill": list(preset.fill)}
    if several:
        identity["weights"] = key
    if match.remarks:
        identity["reading"] = "; ".join(match.remarks)
    if words or flip:
        flipped = "channels are given in the order blue, green, red" if flip else ""
        identity["outputs"] = "; ".join(filter(None, (words, flipped)))
    if precision := describe_precision(match.state.values(), dtype):
        identity["precision"] = precision
    if dtype != "float32":
        identity["dtype"] = dtype
    if isinstance(built.network, Masked):
        identity["mask"] = built.network.mask_facts
    classifier = Classifier(
        built.network,
        mean=normalisation.mean,
        std=normalisation.std,
        num_classes=found,
        input_shape=shape,
        identity=identity,
    )
    classifier.arch = arch
    classifier.class_names = _find_class_names(notes, arch)
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
        "arch": name_publicly(arch),
        "num_classes": num_classes,
        "input": input_shape,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
    }
    texts = {name: json.dumps(note, allow_nan=False) for name, note in notes.items()}
    write_atomically(Path(path), serialise_safetensors(state, texts))


def collect_state(network: nn.Module) -> tuple[State, dict[str, Any]]:
    """What `save` needs of a network: its state dict, and facts if units of it are masked."""
    network = unwrap_logits(network)
    if not isinstance(network, Masked):
        return network.state_dict(), {}
    state = {**unwrap_logits(network.network).state_dict(), MASKS: network.masks.to(torch.uint8)}
    seen = [f"{number:016x}" for number in network.seen.tolist()]
    return state, {"mask": {"layer": network.layer, "seen": seen}}


def _find_arch(notes: Mapping[str, Any], file: str) -> str:
    arch = notes.get("arch")
    if arch is None:
        raise UsageError(f"{file} does not say what network it is for: give --arch as {ARCH_FORMS}")
    if not isinstance(arch, str) or not arch.startswith(("torchvision:", "robusteval:")):
        raise UsageError(
            f"{file} asks for the architecture {escape(str(arch))}, which a file may not choose,"
            f" because that could run code: give --arch yourself as {ARCH_FORMS}"
        )
    return arch


def _find_classes(notes: Mapping[str, Any], state: State, file: str) -> int | None:
    value = notes.get("num_classes")
    if value is None:
        return None
    # a count that no tensor has could only ask for memory
    if type(value) is not int or all(tensor.shape[:1] != (value,) for tensor in state.values()):
        raise UsageError(f"the metadata of {file} is wrong: num_classes is {escape(str(value))}")
    return value


def _find_class_names(notes: Mapping[str, Any], arch: str) -> tuple[str, ...] | None:
    """Names of the outputs in the metadata or in the folder; what is no list of names is left."""
    folder = find_hub_folder(arch)
    if folder is not None and (names := read_labels(folder)):
        return tuple(names)
    for key in ("class_names", "classes", "labels"):
        value = notes.get(key)
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
    return None


def _find_shape(notes: Mapping[str, Any], file: str) -> Shape | None:
    value = notes.get("input")
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(n) is int and 1 <= n <= 2**20 for n in value):
        value = []
    match value:
        case [c, h, w]:
            title = f"an image as the metadata of {file} describes it"
            check_amount(title, c * h * w, MOST_NUMBERS, "numbers")
            return c, h, w
        case _:
            raise UsageError(f"the metadata of {file} is wrong: input must be [channels, h, w]")


def _insert_masks(built: Built, masks: Tensor | None, notes: Mapping[str, Any], file: str) -> Built:
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
