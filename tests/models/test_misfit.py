"""Weights under other names, or fewer or more than the network has."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robusteval.errors import UsageError
from robusteval.models.checkpoint import load

SOURCE = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("window", torch.zeros(4))
        self.register_buffer("copy", self.window)
    def forward(self, x):
        z = self.second(self.first(self.stem(x)).relu()).relu().mean((2, 3))
        return self.head(z * (self.window > -1))

class Remembering(nn.Linear):
    def get_extra_state(self):
        return {"version": 2}
    def set_extra_state(self, state):
        self.version = state["version"]

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = plain()
    def forward(self, x):
        return self.inner(x)

def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 3))
def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.LazyLinear(3))
def remembering():
    return nn.Sequential(nn.Flatten(), Remembering(64, 3))
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(SOURCE)
    return f"{tmp_path}/nets.py"


def build(name: str) -> nn.Module:
    space: dict[str, object] = {}
    exec(SOURCE, space)
    made = space[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = made()  # type: ignore[operator]
    assert isinstance(network, nn.Module)
    return network.eval()


def agree(path: Path, arch: str, network: nn.Module) -> bool:
    """Whether the file, loaded, answers as the network does."""
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load(path, arch=arch)(x), network(x))
    return True


def test_one_of_two_names_of_a_tensor_is_enough(tmp_path: Path, source: str) -> None:
    """As safetensors.torch.save_model keeps tied parameters and buffers."""
    network = build("Tied")
    safetensors.torch.save_model(network, str(tmp_path / "w.safetensors"))
    kept = safetensors.torch.load_file(tmp_path / "w.safetensors")

    assert len(kept) < len(network.state_dict())
    assert agree(tmp_path / "w.safetensors", f"{source}:Tied", network)


def test_a_tensor_that_is_under_no_name_is_missing(tmp_path: Path, source: str) -> None:
    state = build("Tied").state_dict()
    torch.save({n: t for n, t in state.items() if "weight" not in n}, tmp_path / "w.pt")

    with pytest.raises(UsageError, match="4 missing"):
        load(tmp_path / "w.pt", arch=f"{source}:Tied")


def test_minus_infinity_in_a_mask_is_no_fault(tmp_path: Path, source: str) -> None:
    """A buffer that is added to scores; of a weight or a statistic it is damage."""
    network = build("Tied")
    state = network.state_dict()
    state["window"][2] = -torch.inf
    torch.save(state, tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:Tied", network)
    state["window"][1] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"window.*NaN or infinity"):
        load(tmp_path / "w.pt", arch=f"{source}:Tied")
    for name in ("0.weight", "1.running_var"):
        broken = build("plain").state_dict()
        broken[name][..., 0] = torch.inf
        torch.save(broken, tmp_path / "w.pt")
        with pytest.raises(UsageError, match="NaN or infinity"):
            load(tmp_path / "w.pt", arch=f"{source}:plain")


def prefix(state: dict[str, Tensor], text: str) -> dict[str, Tensor]:
    return {text + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrapper", ["module.", "encoder.", "net.module.", "_orig_mod.a."])
@pytest.mark.parametrize("counter", [{}, {"n_averaged": torch.tensor(5), "step": torch.tensor(2)}])
def test_any_common_prefix_is_taken_off(
    tmp_path: Path, source: str, wrapper: str, counter: dict[str, Tensor]
) -> None:
    """Counters beside the network, as averaging keeps them, are left out."""
    network = build("plain")
    torch.save({**counter, **prefix(network.state_dict(), wrapper)}, tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:plain", network)


def test_averaged_weights_are_read(tmp_path: Path, source: str) -> None:
    network = build("plain")
    averaged = AveragedModel(network, use_buffers=True)
    averaged.update_parameters(network)
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:plain", network)


def test_a_prefix_that_the_file_lacks_is_put_before(tmp_path: Path, source: str) -> None:
    network = build("Wrapped")
    state = {n.removeprefix("inner."): t for n, t in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:Wrapped", network)


def test_parts_that_were_compiled_alone_are_read(tmp_path: Path, source: str) -> None:
    network = build("plain")
    state = {n.replace("0.", "0._orig_mod.", 1): t for n, t in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:plain", network)


def test_a_part_of_the_file_that_fits_is_named_and_can_be_chosen(
    tmp_path: Path, source: str
) -> None:
    """Never taken unasked: what is left out may be the normalisation, or the better copy."""
    network, other = build("plain"), build("plain")
    with torch.no_grad():
        other[4].weight.add_(1.0)  # type: ignore[index]
    student, teacher = (prefix(n.state_dict(), p) for n, p in ((network, "a."), (other, "b.c.")))
    torch.save({**student, **teacher, "scale.mean": torch.zeros(1)}, tmp_path / "w.pt")

    with pytest.raises(UsageError, match=r"--weights a or --weights b.c,") as refusal:
        load(tmp_path / "w.pt", arch=f"{source}:plain")
    first = load(tmp_path / "w.pt", arch=f"{source}:plain", weights="a")
    second = load(tmp_path / "w.pt", arch=f"{source}:plain", weights="b")

    assert "\n" not in str(refusal.value)
    assert torch.equal(first.network[4].weight, network[4].weight)  # type: ignore[index]
    assert torch.equal(second.network[4].weight, other[4].weight)  # type: ignore[index]
    assert first.identity["weights"] == "a"
    assert first.identity["sha256"] != second.identity["sha256"]


def test_more_tensors_than_the_network_has_are_refused(tmp_path: Path, source: str) -> None:
    state = {**build("plain").state_dict(), "5.weight": torch.zeros(3, 3)}
    torch.save(state, tmp_path / "w.pt")

    with pytest.raises(UsageError, match="1 unexpected"):
        load(tmp_path / "w.pt", arch=f"{source}:plain")


def test_lazy_layers_take_the_shapes_of_the_file(tmp_path: Path, source: str) -> None:
    network = build("plain")
    torch.save(network.state_dict(), tmp_path / "w.pt")

    assert agree(tmp_path / "w.pt", f"{source}:lazy", network)


def test_what_is_no_tensor_is_named(tmp_path: Path, source: str) -> None:
    torch.save(build("remembering").state_dict(), tmp_path / "w.pt")

    with pytest.raises(UsageError, match=r"1\._extra_state among its weights.*no tensor"):
        load(tmp_path / "w.pt", arch=f"{source}:remembering")
