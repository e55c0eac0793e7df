"""Names of tensors as training scripts write them, read as the network's own or refused."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from robusteval.errors import UsageError
from robusteval.models.building import check_tied
from robusteval.models.checkpoint import load
from robusteval.models.layer_forms import rewrite_layers

State = dict[str, Tensor]
SOURCE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.deep = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU())
        self.head = nn.Linear(5, num_classes)
    def forward(self, x):
        return self.head(self.deep(self.bn(self.conv(x)).relu()).mean((2, 3)))

class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Small()
    def forward(self, x):
        return self.net(x)

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Module()
        self.features.module = Small()
    def forward(self, x):
        return self.features.module(x)
"""
SPACE: dict[str, Any] = {}
exec(SOURCE, SPACE)
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.25, 0.75]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(SOURCE)
    return str(path)


def build(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SPACE["Small"]()
        network(torch.rand(8, 3, 8, 8))  # statistics that are not those of a fresh network
    return network.eval()


def prefix(text: str, state: State) -> State:
    return {text + name: tensor for name, tensor in state.items()}


NETWORK, OTHER = build(), build(1)
PLAIN: State = NETWORK.state_dict()
LEFT: State = {
    "criterion.weight": torch.ones(4),
    "n_averaged": torch.tensor(3),
    "val_acc.tp": torch.zeros(4),
    "model_ema.decay": torch.tensor(0.99),
    "model_ema.convweight": torch.zeros(6, 3, 3, 3),  # dots left out, as one implementation does
}


def as_lightning() -> Any:
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefix("net.", PLAIN) | {"criterion.weight": torch.ones(4)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(6, 3, 3, 3)}}}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def as_robustness() -> Any:
    """As the library `robustness` writes it: the network twice, a normaliser beside each."""
    numbers = {"new_mean": torch.tensor(MEAN), "new_std": torch.tensor(STD)}
    numbers = {name: tensor[:, None, None] for name, tensor in numbers.items()}
    state: State = {}
    for place in ("module.", "module.attacker."):
        layer = "normalizer." if place == "module." else "normalize."
        state |= prefix(place + layer, numbers) | prefix(f"{place}model.", PLAIN)
    return {"model": state, "epoch": 1, "nat_prec1": 0.9}


def average() -> State:
    averaged = AveragedModel(NETWORK, use_buffers=True)
    averaged.update_parameters(NETWORK)
    return averaged.state_dict()


FORMS: dict[str, Callable[[], Any]] = {
    "plain": lambda: PLAIN,
    "net.": lambda: prefix("net.", PLAIN),
    "backbone.": lambda: {"state_dict": prefix("backbone.", PLAIN)},
    "module.model.": lambda: prefix("module.model.", PLAIN),
    "model._orig_mod.": lambda: prefix("model._orig_mod.", PLAIN),
    "one part compiled": lambda: {
        n.replace("deep.", "deep._orig_mod."): t for n, t in PLAIN.items()
    },
    "one part parallel": lambda: {n.replace("deep.", "deep.module."): t for n, t in PLAIN.items()},
    "fsdp": lambda: prefix(
        "_fsdp_wrapped_module.",
        {n.replace("deep.", "deep._fsdp_wrapped_module.", 1): t for n, t in PLAIN.items()},
    ),
    "checkpointed": lambda: {
        n.replace("deep.", "deep._checkpoint_wrapped_module."): t for n, t in PLAIN.items()
    },
    "foreign beside": lambda: prefix("model.", PLAIN) | LEFT,
    "foreign among": lambda: PLAIN | LEFT,
    "lightning": as_lightning,
    "averaged": average,
    "timm": lambda: {"epoch": 1, "arch": "x", "state_dict": PLAIN, "version": 2, "metric": 80.1},
    "equal copies": lambda: prefix("model.", PLAIN) | prefix("ema_model.", PLAIN),
    "double wrapped": lambda: {"model": {"state_dict": prefix("module.", PLAIN)}},
}


@pytest.mark.parametrize("form", FORMS)
def test_form_gives_the_logits_of_the_network_it_was_saved_from(
    tmp_path: Path, source: str, form: str
) -> None:
    torch.save(FORMS[form](), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{source}:Small")

    with torch.no_grad():
        torch.testing.assert_close(classifier(X), NETWORK(X))


def test_spectral_norm_of_a_square_transposed_convolution_is_along_its_own_axis() -> None:
    layer = nn.ConvTranspose2d(3, 3, 3)
    old = torch.nn.utils.spectral_norm(layer)
    old.train()(X[:, :3])
    old.eval()(X[:, :3])  # computes the weight
    made, _ = rewrite_layers(old.state_dict(), {"weight": None, "bias": None})

    assert made is not None
    torch.testing.assert_close(made["weight"], old.weight)


@pytest.mark.parametrize(
    "parts",
    [
        {"w_orig": torch.ones(4, 3), "w_mask": torch.ones(2)},
        {"w_orig": torch.ones(4, 3), "w_u": torch.ones(2), "w_v": torch.ones(3)},
        {"w_orig": torch.tensor(1.0), "w_u": torch.ones(1), "w_v": torch.ones(1)},
        {"w_orig": torch.ones(4, 3).long(), "w_u": torch.ones(4), "w_v": torch.ones(3)},
        {"w_g": torch.ones(2, 1), "w_v": torch.ones(4, 3)},
    ],
)
def test_parts_that_do_not_belong_together_are_left_alone(parts: State) -> None:
    assert rewrite_layers(parts, {"w": None}) == (None, "")


def test_tied_weights_that_differ_in_the_file_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_tied(network, state, "net.pt")

    state["1.weight"][0, 0] += 1
    with pytest.raises(UsageError, match=r"as 0\.weight and 1\.weight, which differ in net\.pt"):
        check_tied(network, state, "net.pt")


LAYERS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm before 1.9": torch.nn.utils.spectral_norm,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("wrap", LAYERS)
def test_computed_weights_are_put_in_the_place_of_their_parts(
    tmp_path: Path, source: str, wrap: str
) -> None:
    network = build()
    for layer in (network.conv, network.deep[0], network.head):
        LAYERS[wrap](layer)
    torch.save(prefix("net.", network.state_dict()), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{source}:Small")

    with torch.no_grad():
        torch.testing.assert_close(classifier(X), network(X))
    assert "as" in classifier.identity["reading"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the older form
@pytest.mark.parametrize("dim", [0, 1, None])
def test_older_form_of_weight_norm_is_read_along_any_axis(
    tmp_path: Path, source: str, dim: int | None
) -> None:
    network = build()
    for layer in (network.conv, network.head):
        weight_norm(layer, dim=dim)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight_g.mul_(1.5)
    torch.save(network.state_dict(), tmp_path / "net.pt")

    with torch.no_grad():
        expected = network(X)
        torch.testing.assert_close(load(tmp_path / "net.pt", arch=f"{source}:Small")(X), expected)


def test_network_with_weight_norm_takes_the_other_form(tmp_path: Path) -> None:
    head = "\n\ndef normed(num_classes=4):\n    network = Small(num_classes)\n"
    end = "    parametrizations.weight_norm(network.head)\n    return network\n"
    (tmp_path / "nets.py").write_text(
        f"from torch.nn.utils import parametrizations\n{SOURCE}{head}{end}"
    )
    state = dict(PLAIN)
    weight = state.pop("head.weight")
    torch.save(
        state | {"head.weight_g": weight.norm(dim=1, keepdim=True), "head.weight_v": 3 * weight},
        tmp_path / "net.pt",
    )

    with torch.no_grad():
        found = load(tmp_path / "net.pt", arch=f"{tmp_path}/nets.py:normed")(X)
        torch.testing.assert_close(found, NETWORK(X))


@pytest.mark.parametrize("arch", ["Inside", "Parallel"])
@pytest.mark.parametrize("front", ["", "model.", "module."])
def test_prefix_that_only_the_network_has_is_put_before(
    tmp_path: Path, source: str, arch: str, front: str
) -> None:
    torch.save(prefix(front, PLAIN), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{source}:{arch}")

    with torch.no_grad():
        torch.testing.assert_close(classifier(X), NETWORK(X))
    assert "in front" in classifier.identity["reading"]


NORMALISED: dict[str, Callable[[], Any]] = {
    "robustbench": lambda: {
        **prefix("model.", PLAIN),
        "normalize.mean": torch.tensor(MEAN),
        "normalize.std": torch.tensor(STD),
    },
    "sequential": lambda: OrderedDict(
        {
            "module.0.means": torch.tensor(MEAN),
            "module.0.sds": torch.tensor(STD),
            **prefix("module.1.", PLAIN),
        }
    ),
    "among": lambda: {
        "mu": torch.tensor(MEAN).view(1, 3, 1, 1),
        "sigma": torch.tensor(STD).view(1, 3, 1, 1),
        **PLAIN,
    },
    "robustness": as_robustness,
}


@pytest.mark.parametrize("form", NORMALISED)
def test_mean_and_deviation_come_from_the_layer_that_normalises(
    tmp_path: Path, source: str, form: str
) -> None:
    torch.save(NORMALISED[form](), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=f"{source}:Small")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    assert classifier.identity["normalisation"] == "from a layer in the file"
    with torch.no_grad():
        torch.testing.assert_close(classifier(X), NETWORK((X - mean) / std))


def test_what_was_done_to_names_is_said(tmp_path: Path, source: str) -> None:
    torch.save(prefix("module.net.", PLAIN) | {"criterion.weight": torch.ones(4)}, tmp_path / "w")
    reading = load(tmp_path / "w", arch=f"{source}:Small").identity["reading"]

    assert reading == (
        "names read without `module.` and `net.`; left out, as no answer depends on it:"
        " criterion.weight"
    )
    torch.save(PLAIN, tmp_path / "w")
    assert "reading" not in load(tmp_path / "w", arch=f"{source}:Small").identity


AMBIGUOUS: dict[str, tuple[Callable[[], Any], str, State]] = {
    "average beside": (
        lambda: prefix("model.", PLAIN) | prefix("ema_model.", OTHER.state_dict()),
        "model or --weights ema_model",
        PLAIN,
    ),
    "average among": (
        lambda: PLAIN | prefix("ema.", OTHER.state_dict()),
        r"\. or --weights ema",
        PLAIN,
    ),
    "compiled": (
        lambda: prefix("a._orig_mod.", PLAIN) | prefix("b.", OTHER.state_dict()),
        "a or --weights b",
        PLAIN,
    ),
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_two_sets_of_weights_that_fit_and_differ_are_a_question(
    tmp_path: Path, source: str, form: str
) -> None:
    make, said, first = AMBIGUOUS[form]
    torch.save(make(), tmp_path / "net.pt")

    with pytest.raises(UsageError, match=f"they differ: choose --weights {said}"):
        load(tmp_path / "net.pt", arch=f"{source}:Small")
    key = said.split()[0].replace("\\", "")
    state = load(tmp_path / "net.pt", arch=f"{source}:Small", weights=key).network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items())


BESIDE: dict[str, tuple[Callable[[], Any], str]] = {
    "layer behind": (
        lambda: prefix("encoder.", PLAIN) | {"linear.weight": torch.ones(2, 4)},
        r"choose --weights encoder,.*linear\.weight",
    ),
    "temperature": (
        lambda: prefix("net.", PLAIN) | {"temperature": torch.tensor(2.0)},
        "choose --weights net,.*temperature",
    ),
    "deeper variant": (
        lambda: PLAIN | {"deep.2.weight": torch.ones(5, 5, 1, 1)},
        "larger variant",
    ),
    "attention called ema": (
        lambda: PLAIN | {"deep.ema.weight": torch.ones(5)},
        "larger variant",
    ),
    "backbone": (
        lambda: {n: t for n, t in PLAIN.items() if not n.startswith("head")},
        "lacks head, as that of a backbone",
    ),
    "other images": (
        lambda: PLAIN | {"conv.weight": torch.ones(6, 4, 3, 3)},
        "images of 4 channels, the network for 3",
    ),
    "transformers": (
        lambda: {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)},
        "names are those of transformers",
    ),
    "adapters": (
        lambda: {"base_model.model.head.lora_A.weight": torch.ones(2, 5)},
        "adapters",
    ),
    "custom parametrisation": (
        lambda: {
            n.replace("head.w", "head.parametrizations.w") + ".original" * ("head.w" in n): t
            for n, t in PLAIN.items()
        },
        "remove_parametrizations",
    ),
    "other normalisers": (
        lambda: {
            **prefix("model.", PLAIN),
            "a.mean": torch.ones(3),
            "a.std": torch.ones(3),
            "b.mean": torch.zeros(3),
            "b.std": torch.ones(3),
        },
        "choose --weights model",
    ),
}


@pytest.mark.parametrize("form", BESIDE)
def test_what_an_answer_may_depend_on_is_never_left_out(
    tmp_path: Path, source: str, form: str
) -> None:
    make, said = BESIDE[form]
    torch.save(make(), tmp_path / "net.pt")

    with pytest.raises(UsageError, match=said) as refusal:
        load(tmp_path / "net.pt", arch=f"{source}:Small")
    assert len(str(refusal.value).splitlines()) <= 5


def test_very_many_names_that_end_alike_are_no_trouble(tmp_path: Path, source: str) -> None:
    torch.save({f"{n}.conv.weight": torch.zeros(1) for n in range(2500)}, tmp_path / "net.pt")

    with pytest.raises(UsageError, match="do not fit"):
        load(tmp_path / "net.pt", arch=f"{source}:Small")
