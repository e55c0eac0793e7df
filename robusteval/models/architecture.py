"""From the name of an architecture to a network, and how its publisher prepares images for it."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import nn

from robusteval.errors import UsageError
from robusteval.models.built import Built, State, escape
from robusteval.models.filling import Unfilled
from robusteval.models.preparation import Preprocessing, read_timm_preset
from robusteval.models.user_code import describe_exception
from robusteval.runs.reading import NAMES, WEIGHTS, check_regular, read_bytes

ARCH_FORMS = (
    "torchvision:NAME, robusteval:NAME, timm:NAME, path/to/file.py:function, "
    "package.module:function or a folder with config.json, for example --arch torchvision:resnet18"
)


def name_publicly(arch: str) -> str:
    """The architecture without folders, which are nobody else's business."""
    if os.path.isdir(arch):
        return f"{Path(arch).resolve().name}/config.json"
    source, _, function = arch.rpartition(":")
    return f"{Path(source).name}:{function}" if source.endswith(".py") else arch


def build_network(
    arch: str, num_classes: int | None, state: State, *, seed: int = 0, fill: bool = True
) -> Built:
    """The architecture with random weights; the global generator is left as it was.

    Without `fill` parameters that would be random hold anything: they are to be loaded.
    """
    kind, _, name = arch.partition(":")
    sized = {} if num_classes is None else {"num_classes": num_classes}
    with torch.random.fork_rng(devices=[]), nullcontext() if fill else Unfilled():
        torch.default_generator.manual_seed(seed)
        if os.path.isdir(arch):
            from robusteval.models.hub_folder import build_from_folder

            return build_from_folder(Path(arch), num_classes, state)
        match kind:
            case "torchvision":
                return Built(_from_torchvision(name, sized, state), arch)
            case "robusteval":
                return Built(_from_zoo(name, sized), arch)
            case "timm":
                return Built(_from_timm(name, sized), arch)
            case _:
                return _from_user(arch, sized)


def _from_torchvision(name: str, sized: dict[str, Any], state: State) -> nn.Module:
    models = _torchvision_models()
    known = models.list_models(module=models)
    if name not in known:
        _unknown(f"torchvision has no classifier {name}", name, known)
    if name in ("googlenet", "inception_v3"):
        auxiliary = any(part.lower().startswith("aux") for key in state for part in key.split("."))
        sized = sized | {
            "init_weights": False,
            "transform_input": True,  # as the published weights were trained
            "aux_logits": auxiliary,
        }
    network: nn.Module = models.get_model(name, weights=None, **sized)
    return network


def _torchvision_models() -> Any:
    try:
        return importlib.import_module("torchvision").models
    except (ImportError, RuntimeError):
        raise UsageError(
            f"torch {version('torch')} and torchvision {version('torchvision')} do not match: "
            "reinstall both together with pip install --force-reinstall torch torchvision"
        ) from None


def _from_zoo(name: str, sized: dict[str, Any]) -> nn.Module:
    from robusteval.models.networks import ARCHITECTURES

    if name not in ARCHITECTURES:
        _unknown(f"robusteval has no architecture {name}", name, list(ARCHITECTURES))
    return ARCHITECTURES[name](**sized)


def _from_timm(name: str, sized: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UsageError(f"timm:{name} needs the package timm: pip install timm") from None
    if not timm.is_model(name):  # timm also takes addresses to download from
        _unknown(f"timm has no model {name}", name, timm.list_models())
    network: nn.Module = timm.create_model(name, pretrained=False, **sized)
    return network


def _unknown(sentence: str, name: str, known: Sequence[str]) -> NoReturn:
    close = difflib.get_close_matches(name, known, 3) or sorted(known)[:3]
    raise UsageError(f"{escape(sentence)}; there is {', '.join(close) or 'none'}") from None


def check_source(arch: str, folder: Path) -> None:
    """Refuse the name of an architecture whose code is elsewhere; UsageError with the right form.

    Code runs only from where it was named: a file beside the checkpoint, in `folder`, or in the
    current folder is suggested and not taken.
    """
    if os.path.isdir(arch):
        if not os.path.isfile(Path(arch) / "config.json"):
            raise UsageError(f"--arch {arch} is a folder without a config.json: give {ARCH_FORMS}")
        return
    source, _, function = arch.rpartition(":")
    if source in ("torchvision", "robusteval", "timm"):
        return
    if arch.endswith(".py"):
        found = find_file(arch, folder)
        names = list_definitions(found) if found else []
        form = " or ".join(f"{found}:{name}" for name in names) or f"{arch}:FUNCTION"
        raise UsageError(f"--arch {arch} names no function: write {form}")
    if not source:
        module, _, attribute = arch.rpartition(".")
        found = find_file(f"{module.replace('.', '/')}.py", folder) if module else None
        if found is not None:
            raise UsageError(f"--arch {arch} is not an architecture: write {found}:{attribute}")
        known = _torchvision_models()
        hint = f"torchvision:{arch}, of " if arch in known.list_models(module=known) else ""
        raise UsageError(f"--arch {escape(arch)} is not an architecture: give {hint}{ARCH_FORMS}")
    stem = source.rstrip(":").removesuffix(".py")
    if source.endswith(".py"):
        check_regular(Path(source).resolve(), NAMES)
        if not os.path.isfile(source):
            found = find_file(source, folder)
            hint = f"; write {found}:{function}" if found else ""
            raise UsageError(f"there is no file {source} to take the architecture from{hint}")
    elif not _is_module(source):
        paths = (f"{stem}.py", f"{stem.replace('.', '/')}.py")
        found = next(filter(None, (find_file(path, folder) for path in paths)), None)
        if found is not None:
            raise UsageError(f"there is no module {source}: write {found}:{function}")


def find_file(name: str, folder: Path) -> Path | None:
    """The file of this name here or, by its last part, in `folder`; None if there is none."""
    for path in (Path(name), folder / Path(name).name):
        if os.path.isfile(path):
            return path
    return None


def list_definitions(path: Path) -> list[str]:
    """The first few classes and functions that a file of Python defines; it is not executed."""
    try:
        body = ast.parse(read_bytes(path, NAMES)).body
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError, UsageError):
        return []
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"][:3]


def _is_module(name: str) -> bool:
    """Whether Python would find a module of this name, which is not imported."""
    try:
        return name in sys.modules or importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _from_user(arch: str, sized: dict[str, Any]) -> Built:
    source, _, function = arch.rpartition(":")
    check_source(arch, Path())
    name = name_publicly(arch)
    if not source.endswith(".py"):
        with raise_as_architecture_error(name):
            module = importlib.import_module(source)
        code = [Path(file)] if (file := getattr(module, "__file__", None)) else []
        return Built(_called(module, function, name, sized), name, _hash(code))
    path = Path(source).resolve()
    with _folder_importable(path.parent) as helpers:
        module = _executed(path, name)
        network = _called(module, function, name, sized)
        return Built(network, name, _hash([path, *helpers()]))


def _executed(path: Path, name: str) -> ModuleType:
    """A user's file as a module under a private name, so that it can shadow no other."""
    module = ModuleType(f"_robusteval_arch_{hashlib.sha256(bytes(path)).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    with raise_as_architecture_error(name):
        # under the rules of their file, not under the __future__ imports of ours
        code = compile(read_bytes(path, NAMES), path, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    return module


def _called(module: ModuleType, function: str, name: str, sized: dict[str, Any]) -> nn.Module:
    factory = getattr(module, function, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        _unknown(f"{name}: there is no function {function}", function, known)
    with raise_as_architecture_error(name):
        network = factory(**(sized if _accepts_classes(factory) else {}))
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _accepts_classes(factory: Callable[..., object]) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)


@contextmanager
def raise_as_architecture_error(name: str) -> Iterator[None]:
    """Anything that goes wrong in a user's code, in one sentence."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} raised {describe_exception(error)}") from error


@contextmanager
def _folder_importable(folder: Path) -> Iterator[Callable[[], list[Path]]]:
    """Let a user's file import its neighbours, and forget them afterwards.

    Otherwise the next architecture file would get this one's neighbours of the same name. The
    callable that is handed out lists the files of those imported so far.
    """
    before = set(sys.modules)

    def neighbours() -> dict[str, Path]:
        found = {}
        for name, module in list(sys.modules.items()):
            top = name.partition(".")[0]
            origin = getattr(module, "__file__", None) or next(iter(_portions(module)), None)
            if origin is None or top in before:
                continue
            file = Path(origin).resolve()
            if file == folder / f"{top}.py" or file.is_relative_to(folder / top):
                found[name] = file
        return found

    sys.path.insert(0, str(folder))
    try:
        yield lambda: sorted(file for file in neighbours().values() if file.is_file())
    finally:
        for name in neighbours():
            del sys.modules[name]
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _portions(module: ModuleType) -> Iterable[str]:
    """Folders of a package without an ``__init__.py``."""
    return getattr(module, "__path__", ())


def _hash(files: Sequence[Path]) -> str | None:
    """SHA-256 of one file, or of the hashes of several; None where there is none."""
    hashes = [hashlib.sha256(read_bytes(file, WEIGHTS)) for file in files]
    if len(hashes) < 2:
        return hashes[0].hexdigest() if hashes else None
    return hashlib.sha256(b"".join(h.digest() for h in hashes)).hexdigest()


def find_preset(arch: str, network: nn.Module) -> Preprocessing | None:
    """How images are prepared for an architecture, as its publisher says; None if nobody does."""
    kind, _, name = arch.partition(":")
    if kind == "torchvision":
        recipe = _torchvision_models().get_model_weights(name).DEFAULT.transforms()
        crop, resize = recipe.crop_size[0], recipe.resize_size[0]
        origin = f"torchvision's preset for {name}"
        shape = (3, crop, crop)
        mean, std = list(recipe.mean), list(recipe.std)
        return Preprocessing(mean, std, shape, resize, origin, recipe.interpolation.value)
    recipe = getattr(network, "default_cfg", None)
    if kind == "timm" and recipe:
        return read_timm_preset(recipe, f"timm's preset for {name}", certain=False)
    if os.path.isdir(arch):
        from robusteval.models.hub_folder import read_preparation

        return read_preparation(Path(arch), getattr(network, "default_cfg", None))
    return None
