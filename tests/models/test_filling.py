"""A network that is built to be loaded is not filled with numbers first, and is in memory once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from robusteval.models.architecture import build_network
from robusteval.models.checkpoint import load
from robusteval.models.filling import Unfilled, adopt_weights
from robusteval.models.tensor_views import view_tensors


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 200), nn.ReLU(), nn.Linear(200, 3))


def test_only_what_is_random_in_large_parameters_is_left_out() -> None:
    with torch.random.fork_rng(devices=[]), Unfilled():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        layer = nn.Linear(256, 200, bias=False)
        assert torch.equal(before, torch.random.get_rng_state())
        nn.init.constant_(layer.weight, 2.0)
        nn.init.trunc_normal_(nn.Linear(256, 200).weight, std=0.02)
        buffer = torch.empty(256, 200).normal_()
        small = nn.Linear(3, 2).weight.detach()

    assert bool((layer.weight == 2).all())
    assert 0.9 < float(buffer.std()) < 1.1
    assert float(small.abs().max()) < 0.6


def test_networks_that_are_to_be_trained_are_filled() -> None:
    drawn = [build_network("robusteval:digits_cnn", 10, {}).network for _ in range(2)]

    for a, b in zip(*(network.parameters() for network in drawn), strict=True):
        assert torch.equal(a, b)


def test_large_parameters_take_over_the_memory_and_share_none() -> None:
    network, state = build(), build().state_dict()
    state["3.weight"] = state["3.weight"].half()
    adopt_weights(network, state)
    held = dict(network.named_parameters())
    assert held["1.weight"].data_ptr() == state["1.weight"].data_ptr()

    twins = nn.ModuleDict({"a": nn.Linear(256, 200), "b": nn.Linear(256, 200)})
    one = torch.ones(200, 256)
    adopt_weights(twins, {"a.weight": one, "b.weight": one})
    first, second = (twins.get_parameter(f"{name}.weight") for name in "ab")
    assert first.data_ptr() != second.data_ptr()


def write_torch(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path)


def write_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, path)


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_loaded_networks_are_independent_of_each_other(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], None]
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def Net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, 200), nn.ReLU(),"
        " nn.Linear(200, 3))\n"
    )
    network = build()
    write(tmp_path / "w", network.state_dict())
    before = (tmp_path / "w").read_bytes()
    first, second = (load(tmp_path / "w", arch=f"{tmp_path}/net.py:Net") for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()

    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(second(x), network(x))
    assert before == (tmp_path / "w").read_bytes()


def test_views_agree_with_the_library() -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    state = {f"t{n}": torch.arange(6).view(2, 3).to(kind) for n, kind in enumerate(kinds)}
    state |= {"none": torch.zeros(0, 3), "one": torch.tensor(3.5)}
    raw = bytearray(safetensors.torch.save(state, {"a": "b"}))
    found, header = view_tensors(raw)

    assert header["__metadata__"] == {"a": "b"}
    assert found.keys() == state.keys()
    for name, tensor in safetensors.torch.load(bytes(raw)).items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        '{"__metadata__":{"a":1}}',
        "[]",
        "{",
    ],
)
def test_headers_that_the_library_refuses_are_refused(header: str) -> None:
    raw = len(header).to_bytes(8, "little") + header.encode() + bytes(8)

    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        view_tensors(raw)
    if header.count('"a"') == 1:  # the library takes the last of two
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load(raw)
