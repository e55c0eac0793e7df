"""A folder as transformers and timm publish networks in: configuration, weights, preprocessing.

The configuration names a class of an installed package and its sizes. Nothing is downloaded and
no code of the folder runs: what could ask for either is taken out of the configuration or refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robusteval.errors import Refused, UsageError
from robusteval.models.built import Built, State, escape
from robusteval.models.preparation import Preprocessing, read_processor, read_timm_preset
from robusteval.models.user_code import describe_exception
from robusteval.runs.reading import NAMES, read_bytes

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
MOST_SHARDS = 200
MOST_LAYERS = 1000  # of one kind in a configuration
LARGEST = 10**6  # number in a configuration
NESTED = 4  # configurations inside others
# what a configuration says of where code or weights are fetched from and how they are run
DROPPED = {
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "use_kernels", "dtype", "torch_dtype"),
    *("backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs"),
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
    *("trust_remote_code", "custom_pipelines", "pruned_heads"),
    *("checkpoint_path", "cache_dir"),  # of timm: another file with weights
}


def find_hub_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder at a path, if it has a `config.json`."""
    return Path(path) if os.path.isfile(Path(path) / CONFIG) else None


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; UsageError if it is none."""
    try:
        content = json.loads(read_bytes(path, NAMES))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON: download or copy it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no JSON object: download or copy it again")
    return content


def list_weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, several where they are split; UsageError if none."""
    for name in WEIGHT_FILES:
        if os.path.isfile(folder / name):
            return [folder / name]
        index = folder / f"{name}.index.json"
        if os.path.isfile(index):
            return _list_shards(index)
    if os.path.isfile(folder / "adapter_config.json"):
        raise UsageError(
            f"{folder} holds adapters (LoRA) without the network: merge them first, in peft with"
            " model.merge_and_unload().save_pretrained(FOLDER)"
        )
    foreign = [n for n in ("tf_model.h5", "flax_model.msgpack") if os.path.isfile(folder / n)]
    if foreign:
        raise UsageError(
            f"{folder} holds {foreign[0]} alone, which is not read: save it from PyTorch with"
            " save_pretrained"
        )
    raise UsageError(
        f"{folder} has a {CONFIG} and no weights: {' or '.join(WEIGHT_FILES[:2])} is needed"
    )


def _list_shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UsageError(f"{index} has no weight_map: download or copy it again")
    files = sorted(set(names.values()))
    if not 0 < len(files) <= MOST_SHARDS:
        raise UsageError(f"{index} names {len(files)} files, at most {MOST_SHARDS} are read")
    for name in files:
        if Path(name).name != name or name in (os.curdir, os.pardir):
            raise Refused(f"{index} names a file outside its folder, {escape(name)}: mend it")
        if not os.path.isfile(index.parent / name):
            raise UsageError(f"{index.parent} lacks {escape(name)}: download or copy it again")
    return [index.parent / name for name in files]


def build_from_folder(folder: Path, num_classes: int | None, state: State) -> Built:
    """The network that a folder's configuration describes, with random weights.

    Raises
    ------
    UsageError
        The configuration is not of a classifier that an installed package knows.
    Refused
        It asks for code of its own.
    """
    path = folder / CONFIG
    config = read_json(path)
    sha256 = hashlib.sha256(read_bytes(path, NAMES)).hexdigest()
    numbers = sum(tensor.numel() for tensor in state.values())
    if "architecture" in config:
        return Built(*_build_with_timm(config, path, num_classes, numbers), sha256)
    return Built(*_build_with_transformers(config, path, num_classes, numbers), sha256)


def _build_with_transformers(
    config: Mapping[str, Any], path: Path, num_classes: int | None, numbers: int
) -> tuple[nn.Module, str]:
    kind, classes = config.get("model_type"), config.get("architectures")
    name = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    if not isinstance(kind, str) or not isinstance(name, str):
        raise UsageError(
            f"{path} names no network: model_type and architectures of transformers are needed, or"
            " architecture of timm"
        )
    if config.get("auto_map"):
        raise Refused(
            f"{path} asks for code of its own (auto_map), which is never run: load the network"
            " yourself and give robusteval.evaluate the network"
        )
    if config.get("quantization_config"):
        raise UsageError(f"the weights in {path.parent} are quantised: save them dequantised")
    try:
        auto = import_module("transformers.models.auto.modeling_auto")
        configs = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    except ImportError:
        raise UsageError(
            f"{path.parent} needs the package transformers: pip install 'robusteval[transformers]'"
        ) from None
    known = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind, ())
    if name not in ((known,) if isinstance(known, str) else known):
        raise UsageError(
            f"{escape(name)} of {path} is no image classifier that this version of transformers"
            " knows (such as ViTForImageClassification): give the folder of a classifier"
        )
    with _raise_as_config_error(path), _quiet():
        config_class = configs[kind]
        fields = set(config_class().to_dict()) | {"id2label", "label2id"}
        given = {k: v for k, v in _clean(config).items() if k in fields and v is not None}
        made = config_class(**given)
        if num_classes is not None:
            made.num_labels = num_classes
        made.architectures = [name]
        network_class = getattr(import_module("transformers"), name)
        with torch.device("meta"):
            _check_numbers(network_class(copy.deepcopy(made)), numbers, path)
        network: nn.Module = network_class(made)
    return network, f"transformers:{name}"


def _build_with_timm(
    config: Mapping[str, Any], path: Path, num_classes: int | None, numbers: int
) -> tuple[nn.Module, str]:
    name = config["architecture"]
    try:
        timm = import_module("timm")
    except ImportError:
        raise UsageError(f"{path.parent} needs the package timm: pip install timm") from None
    if not isinstance(name, str) or not timm.is_model(name):
        raise UsageError(f"timm has no model {escape(str(name))}, which {path} names: update timm")
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise UsageError(f"model_args in {path} is no JSON object: mend it")
    arguments = {k: v for k, v in _clean(given).items() if not k.startswith("pretrained")}
    classes = num_classes or config.get("num_classes")
    if type(classes) is int:
        arguments["num_classes"] = classes
    with _raise_as_config_error(path):
        with torch.device("meta"):
            _check_numbers(timm.create_model(name, pretrained=False, **arguments), numbers, path)
        network: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return network, f"timm:{name}"


def _check_numbers(network: nn.Module, numbers: int, path: Path) -> None:
    """Refuse a configuration that asks for far more memory than its weights have."""
    # with buffers that are computed and stand in no file, some of which grow with the fourth power
    wanted = sum(t.numel() for part in (network.parameters(), network.buffers()) for t in part)
    if wanted > 2 * numbers + 10**6:
        raise UsageError(
            f"{path} describes a network of {wanted:,} numbers, its weights have {numbers:,}:"
            " they do not belong together"
        )


def _clean(config: Mapping[str, Any], depth: int = NESTED) -> dict[str, Any]:
    """A configuration without what fetches or runs anything; UsageError if it is impossible."""
    cleaned = {}
    for key, value in config.items():
        if key in DROPPED:
            continue
        if isinstance(value, dict):
            if depth == 0:
                raise UsageError("its configuration is nested too deeply")
            value = _clean(value, depth - 1)
        most = MOST_LAYERS if any(w in key for w in ("layers", "depth", "blocks")) else LARGEST
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        total = max(map(abs, numbers), default=0)
        if most == MOST_LAYERS and isinstance(value, list):  # the layers of each stage
            total = sum(map(abs, numbers)) + len(value)
        if total > most:
            raise UsageError(f"its {escape(key)} is {escape(str(value))}, at most {most} are taken")
        cleaned[key] = value
    return cleaned


@contextmanager
def _raise_as_config_error(path: Path) -> Iterator[None]:
    """What a package raises about a configuration, in one sentence."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path} was not followed: {error.message}") from None
    except Exception as error:
        raise UsageError(f"{path} was not followed: {describe_exception(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers say nothing and draw no bars of its own."""
    logging = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def convert_names(network: nn.Module, state: State) -> State | None:
    """Weights under the names that transformers has for them now, by its own rules.

    What was published years ago has other names than the code has today. None where the network
    is none of transformers, or where tensors are missing or left over all the same.
    """
    if not type(network).__module__.startswith("transformers."):
        return None
    config = copy.deepcopy(network.config)
    try:
        with _quiet():
            # given tensors and no name of a model: there is nothing to fetch or to open
            made, facts = type(network).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=dict(state),
                output_loading_info=True,
                dtype=torch.float32,
            )
    except Exception:  # whatever weights that do not fit lead it to
        return None
    return None if any(facts.values()) else dict(made.state_dict())


def read_preparation(folder: Path, usual: Mapping[str, Any] | None = None) -> Preprocessing | None:
    """How images are prepared, as the folder says; None where it says nothing.

    Of networks of timm, `usual` is what timm knows of the architecture, which holds where the
    folder has no recipe of its own.
    """
    config = read_json(folder / CONFIG)
    if "architecture" in config:
        recipe = config.get("pretrained_cfg", config)
        if recipe is config and "input_size" not in config:
            return _read_usual(config, usual) if usual else None
        origin = f"the pretrained_cfg in {CONFIG}"
        return read_timm_preset(recipe, origin, True) if isinstance(recipe, dict) else None
    for name in PROCESSORS:
        if os.path.isfile(folder / name):
            recipe = read_json(folder / name)
            inner = recipe.get("image_processor")
            return read_processor(inner if isinstance(inner, dict) else recipe, name)
    return None


def _read_usual(config: Mapping[str, Any], usual: Mapping[str, Any]) -> Preprocessing:
    """What timm knows of an architecture, at the size that the folder's network was built for."""
    recipe, given = dict(usual), config.get("model_args")
    side = given.get("img_size") if isinstance(given, dict) else None
    if side:
        channels = usual.get("input_size", (3,))[0]
        recipe["input_size"] = (channels, *(side if isinstance(side, list) else (side, side)))
    origin = f"timm's preset for {config['architecture']}"
    return read_timm_preset(recipe, origin, certain=False)


def read_labels(folder: Path) -> list[str] | None:
    """What the outputs are called, in their order; None where they are only numbered."""
    config = read_json(folder / CONFIG)
    recipe = config.get("pretrained_cfg")
    listed = config.get("label_names") or (isinstance(recipe, dict) and recipe.get("label_names"))
    names: Sequence[Any] | None = listed if isinstance(listed, list) else None
    by_number = config.get("id2label")
    if isinstance(by_number, dict) and "architecture" not in config:
        names = [by_number.get(str(n)) for n in range(len(by_number))]
    if not names or not all(isinstance(name, str) and name for name in names):
        return None
    numbered = all(name == f"LABEL_{n}" for n, name in enumerate(names))
    return None if numbered else [str(name) for name in names]
