"""Checkpoints: what could run code is refused, what is wrong is said, what loads is exact."""

import json
import os
import pickle
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torchvision import models

from robusteval.cli import cli
from robusteval.errors import Refused, RobustevalError, RunError, UsageError
from robusteval.models.checkpoint import load, save
from robusteval.models.classifier import Classifier
from robusteval.models.environment import pick_device
from robusteval.models.networks import digits_cnn

State = dict[str, Tensor]
ARCH = "robusteval:digits_cnn"
SOURCE = """
from torch import nn

def build(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )
"""


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits_cnn().eval()


@pytest.fixture
def state(network: nn.Module) -> State:
    return network.state_dict()


@pytest.fixture
def written(tmp_path: Path, state: State) -> Path:
    """A checkpoint as the suite writes it."""
    path = tmp_path / "net.safetensors"
    save(
        path,
        state,
        arch=ARCH,
        num_classes=10,
        input_shape=(1, 32, 32),
        mean=[0.3],
        std=[0.2],
        epochs=3,
    )
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the payloads below would write."""
    return tmp_path / "marker"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f'echo ran > "{self.marker}"',)


class Infected(nn.Linear):
    """A whole module, as `torch.save(model)` stores it, with something extra."""

    def __init__(self, payload: Payload) -> None:
        super().__init__(2, 2)
        self.payload = payload


def pickled(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def pickled_as_text(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps({"state_dict": payload}, protocol=0))


def pickled_like_torch(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps([payload], protocol=2))


def saved(path: Path, payload: Payload) -> None:
    torch.save(payload, path)


def saved_as_legacy(path: Path, payload: Payload) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def saved_in_an_entry(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2, 2), "bias": payload}}, path)


def saved_module(path: Path, payload: Payload) -> None:
    torch.save(Infected(payload), path)


def saved_module_as_legacy(path: Path, payload: Payload) -> None:
    torch.save(Infected(payload), path, _use_new_zipfile_serialization=False)


PAYLOADS = [
    pickled,
    pickled_as_text,
    pickled_like_torch,
    saved,
    saved_as_legacy,
    saved_in_an_entry,
    saved_module,
    saved_module_as_legacy,
]


def test_payload_is_live(tmp_path: Path, marker: Path) -> None:
    pickled(tmp_path / "net.pt", Payload(marker))
    pickle.loads((tmp_path / "net.pt").read_bytes())

    assert marker.exists()


@pytest.mark.parametrize("write", PAYLOADS)
def test_code_is_refused_and_does_not_run(
    tmp_path: Path, marker: Path, write: Callable[[Path, Payload], None]
) -> None:
    write(tmp_path / "net.pt", Payload(marker))

    with pytest.raises(Refused, match=r"save_file") as refusal:
        load(tmp_path / "net.pt", arch=ARCH)
    assert "module" in write.__name__ or f"{os.name}.system" in str(refusal.value)
    assert not marker.exists()


def test_suffix_does_not_decide_how_a_file_is_read(tmp_path: Path, marker: Path) -> None:
    saved(tmp_path / "net.safetensors", Payload(marker))

    with pytest.raises(Refused):
        load(tmp_path / "net.safetensors", arch=ARCH)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    for module in (scripted, traced):
        torch.jit.save(module, tmp_path / "net.pt")

        with pytest.raises(Refused, match="TorchScript"):
            load(tmp_path / "net.pt", arch=ARCH)


def test_exported_program_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "net.pt2")

    with pytest.raises(Refused, match=r"torch\.export"):
        load(tmp_path / "net.pt2", arch=ARCH)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (nn.ReLU(), "ReLU"),
        (partial(print, 1), "functools.partial"),
        (np.random.default_rng(0), "numpy.random"),
    ],
)
def test_refusal_names_the_object_that_stands_in_the_way(
    tmp_path: Path, state: State, extra: object, named: str
) -> None:
    torch.save({"state_dict": state, "best": extra}, tmp_path / "net.pth")

    with pytest.raises(Refused, match=named):
        load(tmp_path / "net.pth", arch=ARCH)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        np.float64(91.7),
        np.zeros(3),
        [np.bool_(True), np.int64(3)],
        Namespace(lr=0.1, layers=[1, 2]),
        SimpleNamespace(best={"a": np.float32(1)}),
        Path("runs"),
        datetime(2026, 1, 31),
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_settings_and_scores_beside_the_weights_are_not_in_the_way(
    tmp_path: Path, state: State, extra: object, legacy: bool
) -> None:
    """They are not built: something that keeps nothing stands in their place."""
    content = {"state_dict": state, "args": extra, "again": extra}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)

    assert load(tmp_path / "net.pth", arch=ARCH).num_classes == 10
    with pytest.raises(pickle.UnpicklingError):  # torch itself has learned nothing
        torch.load(tmp_path / "net.pth", weights_only=True)


def test_what_stands_for_objects_is_no_way_in(tmp_path: Path, state: State, marker: Path) -> None:
    """Names are taken as they are: what lies below one of them is another name."""
    for name in ("pathlib Path.write_text", "argparse Namespace.__class__", "types FunctionType"):
        pickled = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n)R."
        torch.save({"state_dict": state}, tmp_path / "net.pt")
        with zipfile.ZipFile(tmp_path / "net.pt") as archive:
            parts = {n: archive.read(n) for n in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
            for entry, raw in parts.items():
                archive.writestr(entry, pickled if entry.endswith("data.pkl") else raw)
        with pytest.raises(Refused):
            load(tmp_path / "net.pt", arch=ARCH)
    assert not marker.exists()


def test_metadata_cannot_name_code(
    tmp_path: Path, state: State, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    for arch in ("evil.py:build", "evil:build", "timm:resnet18"):
        for text in (arch, json.dumps(arch)):
            safetensors.torch.save_file(state, tmp_path / "net.safetensors", {"arch": text})

            with pytest.raises(UsageError, match="may not choose"):
                load(tmp_path / "net.safetensors")
    assert not marker.exists()


def test_torch_files_are_refused_where_the_guard_is_broken(
    tmp_path: Path, state: State, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "net.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))

    with pytest.raises(Refused, match=r"2\.10"):
        load(tmp_path / "net.pt", arch=ARCH)
    assert load(written).num_classes == 10


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/data/0", bytes(2**22))

    with pytest.raises(Refused, match="zip bomb"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_tensor_that_repeats_itself_beyond_the_file_is_an_error(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match="larger than the file"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_wrapper_in_itself_is_an_error(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "net.pt")

    with pytest.raises(UsageError, match="no state dict"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load(tmp_path / "net.pt")


def test_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body>", "web page"),
        (b"<HTML><head></head></HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "ONNX"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5, as Keras writes it"),
        (pickle.dumps({"accuracy": 0.9}), "plain pickle"),
        (pickle.dumps({"accuracy": 0.9})[:-3], "damaged"),
    ],
)
def test_foreign_file_is_an_error(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "net.pt").write_bytes(content)

    with pytest.raises(UsageError, match=said):
        load(tmp_path / "net.pt", arch=ARCH)


def test_zip_of_something_else_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", x=np.zeros(3))

    with pytest.raises(UsageError, match=r"torch\.save"):
        load(tmp_path / "net.npz", arch=ARCH)


def test_content_without_tensors_is_an_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "net.pt")

    with pytest.raises(UsageError, match="but list"):
        load(tmp_path / "net.pt", arch=ARCH)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net"
    state = nn.Linear(2, 2).state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])

        with pytest.raises(UsageError, match=r"empty|damaged|no format known"):
            load(path, arch=ARCH)


@pytest.mark.parametrize("kind", ["written", "zip", "legacy"])
def test_damage_never_ends_in_a_traceback(
    tmp_path: Path, written: Path, state: State, kind: str
) -> None:
    if kind != "written":
        torch.save(state, written, _use_new_zipfile_serialization=kind == "zip")
    whole = np.frombuffer(written.read_bytes(), np.uint8)
    draws = np.random.default_rng(0)
    for _ in range(60):
        damaged = whole.copy()
        # half of the damage where the structure is: at the two ends
        place = draws.integers(len(whole)) if draws.random() < 0.5 else draws.integers(-900, 900)
        damaged[place] ^= 1 << draws.integers(8)
        written.write_bytes(damaged.tobytes())
        with suppress(RobustevalError):
            load(written, arch=ARCH)


@pytest.mark.parametrize("changed", [(b'"mean":"[0.3]"', b'"mean":"[0.4]"'), None])
def test_checksum_notices_a_small_change(
    written: Path, changed: tuple[bytes, bytes] | None
) -> None:
    raw = bytearray(written.read_bytes())
    if changed:
        assert changed[0] in raw
        raw = raw.replace(*changed)
    else:
        raw[-100] ^= 1
    written.write_bytes(raw)

    with pytest.raises(UsageError, match="damaged"):
        load(written)


def test_one_changed_bit_in_a_torch_file_is_noticed(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "net.pt")
    raw = bytearray((tmp_path / "net.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "net.pt").write_bytes(raw)

    with pytest.raises(UsageError, match="damaged"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_torch_file_without_sums_loads(tmp_path: Path, state: State) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(True)

    assert load(tmp_path / "net.pt", arch=ARCH).num_classes == 10


def test_round_trip_is_exact(written: Path, network: nn.Module) -> None:
    x = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    classifier = load(written)
    original = Classifier(network, mean=[0.3], std=[0.2], num_classes=10)

    assert torch.equal(original(x), classifier(x))
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())


def test_saving_twice_gives_the_same_bytes(written: Path, state: State) -> None:
    first = written.read_bytes()
    for _ in range(5):
        save(
            written,
            dict(reversed(state.items())),
            epochs=3,
            std=(0.2,),
            mean=(0.3,),
            input_shape=(1, 32, 32),
            num_classes=10,
            arch=ARCH,
        )

        assert first == written.read_bytes()


def test_saved_file_is_read_by_others(written: Path, state: State) -> None:
    tensors = safetensors.torch.load_file(written)
    with safetensors.safe_open(written, "pt") as file:
        metadata = file.metadata()

    assert json.loads(metadata["arch"]) == ARCH
    assert json.loads(metadata["epochs"]) == 3
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


def test_failed_save_leaves_the_old_file_and_no_other(
    written: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save(
            written,
            {name: tensor + 1 for name, tensor in state.items()},
            arch=ARCH,
            num_classes=10,
            input_shape=None,
            mean=None,
            std=None,
        )
    assert before == written.read_bytes()
    assert [written] == list(written.parent.iterdir())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net", "model_state_dict", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(
    tmp_path: Path, state: State, wrapper: str, prefix: str
) -> None:
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    content = {"epoch": 3, "seen": torch.tensor(7), "optimizer": {"lr": 0.1}, wrapper: prefixed}
    torch.save(content, tmp_path / "net.pt")

    loaded = load(tmp_path / "net.pt", arch=ARCH).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_prefix_that_the_network_has_itself_stays(tmp_path: Path) -> None:
    source = SOURCE.replace("def build", "def inner") + (
        "class Wrapped(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = inner()\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
        "build = Wrapped\n"
    )
    arch = user_file(tmp_path, source)
    state = tiny_state()
    torch.save({f"module.model.{name}": tensor for name, tensor in state.items()}, tmp_path / "n")

    loaded = load(tmp_path / "n", arch=arch).network.state_dict()
    assert torch.equal(loaded["model.0.weight"], state["0.weight"])


def test_legacy_file_loads(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "net.th", _use_new_zipfile_serialization=False)

    loaded = load(tmp_path / "net.th", arch=ARCH).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_batch_counter_of_batch_norm_may_be_missing(tmp_path: Path, state: State) -> None:
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "net.pt")

    assert load(tmp_path / "net.pt", arch=ARCH).num_classes == 10


def test_half_precision_becomes_single(tmp_path: Path, state: State) -> None:
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "net.pt")

    classifier = load(tmp_path / "net.pt", arch=ARCH)
    assert classifier(torch.zeros(1, 1, 32, 32)).dtype == torch.float32


def test_difference_is_shown_line_by_line(tmp_path: Path, state: State) -> None:
    state["0.weight"] = torch.zeros(16, 3, 3, 3)
    state["\x1b[31mextra"] = torch.zeros(2)
    del state["13.weight"]
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(UsageError) as difference:
        load(tmp_path / "net.pt", arch=ARCH)
    assert str(difference.value).splitlines() == [
        f"the weights in net.pt do not fit {ARCH}: it is made for images of 3 channels, the"
        " network for 1",
        "  or: the network has 13 where the file has '\\x1b[31mextra': a head or a layer is"
        " another one",
        "  or: it is another variant of this architecture, or made for another version of its code",
        "  tensors: 1 missing, 1 unexpected, 1 of another shape, 19 names in common (-v lists"
        " them)",
    ]
    assert list(difference.value.details) == [
        "  missing: 13.weight (10, 64)",
        "  unexpected: '\\x1b[31mextra' (2,)",
        "  shape: 0.weight is (16, 3, 3, 3) in the file, (16, 1, 3, 3) in the architecture",
    ]


def test_long_difference_is_listed_where_it_is_asked_for(tmp_path: Path) -> None:
    torch.save({f"layer{n}": torch.zeros(2) for n in range(50)}, tmp_path / "net.pt")
    command = ["evaluate", str(tmp_path / "net.pt"), "--arch", ARCH, "--data", "digits"]
    short = CliRunner().invoke(cli, command)
    full = CliRunner().invoke(cli, [*command, "-v"])

    assert (short.exit_code, full.exit_code) == (2, 2)
    assert "no name is in both" in short.stderr
    assert "-v lists them" in short.stderr
    assert len(short.stderr.splitlines()) == 2
    assert "  unexpected: layer49 (2,)" in full.stderr.splitlines()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(tmp_path: Path, state: State, bad: float) -> None:
    state["0.weight"][0, 0, 0, 0] = bad
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=r"0\.weight .* NaN or infinity"):
        load(tmp_path / "net.pt", arch=ARCH)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["0.weight", "13.bias"])
def test_whole_numbers_are_no_weights(
    tmp_path: Path, state: State, kind: torch.dtype, name: str
) -> None:
    """Cut off, or without their scale, they would give a number all the same."""
    torch.save({**state, name: state[name].to(kind)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=rf"{name} .* quantised"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_weights_with_scales_beside_them_are_called_quantised(tmp_path: Path, state: State) -> None:
    """As bitsandbytes stores a layer."""
    torch.save({**state, "0.SCB": torch.ones(16)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match="quantised"):
        load(tmp_path / "net.pt", arch=ARCH)


def test_complex_weights_are_an_error(tmp_path: Path, state: State) -> None:
    safetensors.torch.save_file(
        {**state, "0.weight": torch.zeros(16, 1, 3, 3, dtype=torch.complex64)}, tmp_path / "net"
    )

    with pytest.raises(UsageError, match="plain array"):
        load(tmp_path / "net", arch=ARCH)


def torchvision_state(name: str, **options: Any) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state: State = models.get_model(name, weights=None, **options).state_dict()
    return state


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5"])
def test_class_count_is_found_from_the_weights(tmp_path: Path, name: str) -> None:
    torch.save(torchvision_state(name, num_classes=7), tmp_path / "net.pt")

    classifier = load(tmp_path / "net.pt", arch=f"torchvision:{name}")
    assert classifier.num_classes == 7
    assert classifier(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert classifier.input_shape == (3, 224, 224)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_googlenet_is_built_as_it_was_published(tmp_path: Path, auxiliary: bool) -> None:
    options = {"aux_logits": auxiliary, "init_weights": False, "num_classes": 5}
    torch.save(torchvision_state("googlenet", **options), tmp_path / "net.pt")

    classifier = load(tmp_path / "net.pt", arch="torchvision:googlenet")
    assert classifier.num_classes == 5
    assert classifier.network.transform_input


def test_given_class_count_is_kept_to(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=r"\(10, 64\) in the file, \(7, 64\)"):
        load(tmp_path / "net.pt", arch=ARCH, num_classes=7)


def test_global_generator_is_left_alone(written: Path) -> None:
    before = torch.random.get_rng_state()
    load(written)

    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("torchvision:resnet81", "torchvision has no classifier resnet81; there is resnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("robusteval:digit_cnn", "there is digits_cnn"),
        ("resnet18", "torchvision:NAME"),
        ("net.py", r"write net\.py:FUNCTION"),
        ("nowhere/net.py:build", "there is no file nowhere"),
        ("no_such_package.nets:build", "ModuleNotFoundError"),
        ("json:lods", "there is loads"),
        ("json:dumps", "TypeError"),
    ],
)
def test_unknown_architecture_is_an_error(written: Path, arch: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(written, arch=arch)


def test_missing_architecture_is_an_error_that_lists_the_forms(
    tmp_path: Path, state: State
) -> None:
    torch.save(state, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=r"torchvision:NAME.*\.py:function.*--arch torchvision:"):
        load(tmp_path / "net.pt")


def user_file(folder: Path, source: str = SOURCE, name: str = "net.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source, encoding="utf-8")
    return f"{folder / name}:build"


def tiny_state(num_classes: int = 3) -> State:
    draws = torch.Generator().manual_seed(0)
    shapes = {
        "0.weight": (4, 3, 3, 3),
        "0.bias": (4,),
        "3.weight": (num_classes, 4),
        "3.bias": (num_classes,),
    }
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Weights for the architecture in `SOURCE`."""
    torch.save(tiny_state(), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def test_users_file_builds_the_network(tmp_path: Path, tiny: Path) -> None:
    path = list(sys.path)
    classifier = load(tiny, arch=user_file(tmp_path / "code"))

    assert classifier.num_classes == 3
    assert classifier.identity["arch"] == "net.py:build"
    assert classifier.identity["input_channels"] == 3
    assert classifier.identity["input_shape"] is None
    assert path == sys.path


def test_users_function_is_given_the_class_count_if_it_takes_it(tmp_path: Path) -> None:
    torch.save(tiny_state(6), tmp_path / "net.pt")
    arch = user_file(tmp_path / "code")

    assert load(tmp_path / "net.pt", arch=arch, num_classes=6).num_classes == 6
    assert load(tmp_path / "net.pt", arch=arch).num_classes == 6


def test_class_count_that_the_network_does_not_have_is_an_error(tmp_path: Path, tiny: Path) -> None:
    arch = user_file(tmp_path / "code", SOURCE.replace("num_classes", "classes"))

    with pytest.raises(UsageError, match="has 3 outputs, not 5"):
        load(tiny, arch=arch, num_classes=5)


def test_users_package_builds_the_network(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_file(tmp_path / "robusteval_test_nets", name="__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    identity = load(tiny, arch="robusteval_test_nets:build").identity
    monkeypatch.delitem(sys.modules, "robusteval_test_nets")

    assert identity["arch"] == "robusteval_test_nets:build"
    assert identity["arch_sha256"]


def test_users_file_may_import_its_neighbours_and_only_its_own(tmp_path: Path) -> None:
    for folder, width in (("one", 4), ("two", 5)):
        source = SOURCE.replace("3, 4, 3", "3, WIDTH, 3").replace("Linear(4", "Linear(WIDTH")
        user_file(tmp_path / folder, "from layers import WIDTH\nimport parts.deep\n" + source)
        user_file(tmp_path / folder, f"WIDTH = {width}\n", "layers.py")
        user_file(tmp_path / folder / "parts", "", "deep.py")
    before = set(sys.modules)
    torch.save(tiny_state(), tmp_path / "net.pt")
    load(tmp_path / "net.pt", arch=f"{tmp_path}/one/net.py:build")

    assert not {"layers", "parts", "parts.deep"} & (set(sys.modules) - before)
    with pytest.raises(UsageError, match=r"\(5, 3, 3, 3\) in the architecture"):
        load(tmp_path / "net.pt", arch=f"{tmp_path}/two/net.py:build")


def test_neighbours_are_part_of_the_architectures_hash(tmp_path: Path, tiny: Path) -> None:
    arch = user_file(tmp_path / "code", "import layers\n" + SOURCE)
    hashes = set()
    for line in ("A = 1\n", "A = 22\n", "A = 1\n"):
        user_file(tmp_path / "code", line, "layers.py")
        hashes.add(load(tiny, arch=arch).identity["arch_sha256"])

    assert len(hashes) == 2


def test_users_folder_does_not_shadow_the_suite(tmp_path: Path, tiny: Path) -> None:
    for name in ("attacks.py", "robusteval.py"):
        user_file(tmp_path / "code", "raise RuntimeError('shadowed')\n", name)
    arch = user_file(tmp_path / "code", "import robusteval.attacks\n" + SOURCE)

    assert load(tiny, arch=arch).num_classes == 3
    attacks = sys.modules["robusteval.attacks"].__file__
    assert attacks is not None
    assert not Path(attacks).is_relative_to(tmp_path)


def test_users_file_may_have_the_name_of_a_module(tmp_path: Path, tiny: Path) -> None:
    arch = user_file(tmp_path / "code", name="json.py")

    assert load(tiny, arch=arch).num_classes == 3
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def build():\n    raise KeyError('width')\n", r"net\.py:build raised KeyError: 'width'"),
        ("def build(:\n", r"net\.py:build raised SyntaxError"),
        ("raise SystemExit(3)\n", r"net\.py:build raised SystemExit"),
        ("import no_such_neighbour\n", r"raised ModuleNotFoundError: .*no_such_neighbour"),
        ("def build():\n    return {'a': 1}\n", r"returned dict, not a torch\.nn\.Module"),
        ("def built():\n    pass\n", "no function build; there is built"),
        ("", "no function build; there is none"),
        ("def build(width):\n    pass\n", "raised TypeError.*width"),
    ],
)
def test_mistake_in_users_code_is_told(tmp_path: Path, tiny: Path, source: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(tiny, arch=user_file(tmp_path / "code", source))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("(logits, logits)", r"returned tuple of 2 \(\(2, 3\), \(2, 3\)\)"),
        ("{'a': logits, 'b': logits}", "returned dict with a, b"),
        ("logits[:, :, None]", r"returned a tensor \(2, 3, 1\)"),
        ("logits[:, :1].sigmoid()", "between 0 and 1 as a probability"),
        ("'logits'", "returned str"),
    ],
)
def test_output_that_is_not_logits_is_an_error(
    tmp_path: Path, tiny: Path, returned: str, said: str
) -> None:
    source = SOURCE.replace("def build", "def layers") + (
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        logits = super().forward(x)\n"
        f"        return {returned}\n"
        "def build():\n"
        "    return Net(*layers())\n"
    )
    with pytest.raises(UsageError, match=said):
        load(tiny, arch=user_file(tmp_path / "code", source))


def test_network_for_one_size_only_is_understood(tmp_path: Path) -> None:
    arch = user_file(
        tmp_path / "code",
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 4))\n",
    )
    torch.save({"1.weight": torch.ones(4, 784), "1.bias": torch.ones(4)}, tmp_path / "net.pt")

    classifier = load(tmp_path / "net.pt", arch=arch)
    assert classifier.num_classes == 4
    assert classifier.identity["input_channels"] == 1


def test_network_for_an_unknown_size_has_as_many_classes_as_its_last_layer(tmp_path: Path) -> None:
    arch = user_file(
        tmp_path / "code",
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(17, 9), nn.Linear(9, 4))\n",
    )
    shapes = {"1.weight": (9, 17), "1.bias": (9,), "2.weight": (4, 9), "2.bias": (4,)}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "net.pt")

    classifier = load(tmp_path / "net.pt", arch=arch)
    assert classifier.num_classes == 4
    assert classifier.identity["input_channels"] is None
    with pytest.raises(UsageError, match="differ in length: 3, 1"):
        load(tmp_path / "net.pt", arch=arch, mean=[0.5, 0.5, 0.5], std=[0.5])


@pytest.mark.parametrize(
    ("body", "said"),
    [("raise IndexError('wide')", "wide"), ("return x.reshape(-1, 2)", "number of rows")],
)
def test_network_that_answers_no_image_is_an_error(tmp_path: Path, body: str, said: str) -> None:
    source = (
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n"
        f"        {body}\n"
        "build = Net\n"
    )
    torch.save({"scale": torch.ones(1)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match=f"took no image.*{said}"):
        load(tmp_path / "net.pt", arch=user_file(tmp_path / "code", source))


def test_normalisation_comes_from_options_then_file_then_preset(tmp_path: Path) -> None:
    path, arch = tmp_path / "net", "torchvision:squeezenet1_1"
    state = torchvision_state("squeezenet1_1", num_classes=4)
    safetensors.torch.save_file(state, path)
    preset = load(path, arch=arch).identity
    safetensors.torch.save_file(state, path, {"mean": "[0.1]", "std": "[0.2, 0.3, 0.4]"})
    from_file = load(path, arch=arch).identity
    given = load(path, arch=arch, mean=[0.5], std=[0.25]).identity

    assert preset["mean"] == [0.485, 0.456, 0.406]
    assert preset["std"] == [0.229, 0.224, 0.225]
    assert preset["normalisation"] == "torchvision's preset for squeezenet1_1"
    assert (preset["size"], preset["resize"]) == (224, 256)
    assert (from_file["mean"], from_file["std"]) == ([0.1] * 3, [0.2, 0.3, 0.4])
    assert from_file["normalisation"] == "from the file"
    assert (given["mean"], given["std"]) == ([0.5] * 3, [0.25] * 3)
    assert given["normalisation"] == "given"


def test_file_can_say_that_there_is_no_normalisation(tmp_path: Path) -> None:
    save(
        tmp_path / "net",
        torchvision_state("squeezenet1_1", num_classes=4),
        arch="torchvision:squeezenet1_1",
        num_classes=4,
        input_shape=(3, 64, 64),
        mean=None,
        std=None,
    )

    identity = load(tmp_path / "net").identity
    assert identity["mean"] is None
    assert identity["normalisation"] == "none, from the file"
    assert identity["input_shape"] == [3, 64, 64]


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5], None, "only one of mean and std"),
        (None, [0.5], "only one of mean and std"),
        ([0.5, 0.5, 0.5], [0.5], "3 numbers for 1 channels"),
        ([0.5], [0.0], "positive"),
        ([0.5], [-1.0], "positive"),
        ([float("nan")], [1.0], "numbers"),
        ([], [], "0 numbers"),
    ],
)
def test_impossible_normalisation_is_an_error(
    written: Path, mean: list[float] | None, std: list[float] | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        load(written, mean=mean, std=std)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_classes", "1e9", "num_classes"),
        ("num_classes", "1000000000", "num_classes"),
        ("num_classes", "64", "do not fit"),
        ("num_classes", "true", "num_classes"),
        ("input", '"32x32"', "input"),
        ("input", "[1, 32]", "input"),
        ("input", "[1, 1000000, 1000000]", "the limit is"),
        ("input", "[3, 32, 32]", "cannot take images"),
        ("mean", '{"r": 1}', "mean"),
        ("mean", "[" * 10_000, "mean"),
        ("mean", '["a"]', "mean"),
        ("std", "[0]", "positive"),
        ("arch", "[]", "may not choose"),
    ],
)
def test_wrong_metadata_is_an_error(
    tmp_path: Path, state: State, key: str, value: str, said: str
) -> None:
    metadata = {"arch": ARCH, "mean": "[0.5]", "std": "[0.5]", key: value}
    safetensors.torch.save_file(state, tmp_path / "net", metadata)

    with pytest.raises(UsageError, match=said):
        load(tmp_path / "net")


def test_options_win_over_wrong_metadata(tmp_path: Path, state: State) -> None:
    metadata = {"arch": "evil.py:build", "mean": "?", "std": "?", "format": "pt"}
    safetensors.torch.save_file(state, tmp_path / "net", metadata)

    assert load(tmp_path / "net", arch=ARCH, mean=[0.5], std=[1]).identity["mean"] == [0.5]


def test_identity_is_json_and_holds_no_folder(tmp_path: Path, tiny: Path) -> None:
    identity = load(tiny, arch=user_file(tmp_path / "code")).identity
    text = json.dumps(identity, allow_nan=False)

    assert str(tmp_path) not in text
    assert tmp_path.name not in text
    assert identity["file"] == "tiny.pt"
    assert identity["parameters"] == sum(t.numel() for t in tiny_state().values())


def test_saved_path_of_an_architecture_holds_no_folder(tmp_path: Path) -> None:
    save(
        tmp_path / "net",
        tiny_state(),
        arch=user_file(tmp_path / "code"),
        num_classes=3,
        input_shape=None,
        mean=None,
        std=None,
    )

    assert str(tmp_path).encode() not in (tmp_path / "net").read_bytes()
    with pytest.raises(UsageError, match=r"net\.py:build, which a file may not choose"):
        load(tmp_path / "net")


def fake_timm() -> ModuleType:
    """A stand-in with timm's interface, since timm is optional."""

    def create_model(name: str, pretrained: bool, num_classes: int = 1000) -> nn.Module:
        assert not pretrained
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        )
        network.default_cfg = {  # type: ignore[assignment]
            "input_size": (3, 64, 64),
            "crop_pct": 0.875,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
        }
        return network

    timm = ModuleType("timm")
    vars(timm).update(
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny", "huge"],
        create_model=create_model,
    )
    return timm


def test_timm_builds_the_network_without_downloading(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm())
    identity = load(tiny, arch="timm:tiny").identity

    assert identity["num_classes"] == 3
    assert identity["normalisation"] == "timm's preset for tiny"
    assert (identity["size"], identity["resize"]) == (64, 73)
    for name in ("tinny", "hf-hub:someone/tiny"):
        with pytest.raises(UsageError, match="timm has no model"):
            load(tiny, arch=f"timm:{name}")


def test_timm_that_is_not_installed_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(UsageError, match="pip install timm"):
        load(tiny, arch="timm:tiny")


def test_torchvision_for_another_torch_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(UsageError, match="do not match: reinstall both together"):
        load(tiny, arch="torchvision:resnet18")


def test_device_is_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    assert pick_device(None) == pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "gpu", "meta", "cpu:x", ""):
        with pytest.raises(UsageError, match="device"):
            pick_device(name)


def test_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="cuda:0 to cuda:1"):
        pick_device("cuda:2")


def test_load_checks_the_device(written: Path) -> None:
    with pytest.raises(UsageError, match="not a device"):
        load(written, device="gpu")
