"""Networks in bfloat16 and float16: what is computed in, said, and not lost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Bands, draw_uniform

from robusteval import from_arrays, load
from robusteval.cli import cli
from robusteval.commands.attacking import list_in_float32
from robusteval.commands.networks import name_networks, parse_network
from robusteval.commands.session import Request
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.interpreters.attention import rollout
from robusteval.interpreters.cam import gradcam
from robusteval.models.checkpoint import save
from robusteval.models.classifier import Classifier
from robusteval.models.identity import hash_model
from robusteval.models.networks import digits_cnn
from robusteval.reports.build import build_record
from robusteval.reports.sentences import list_provenance


def differentiate_loss(network: nn.Module, x: Tensor) -> Tensor:
    """The derivative of the cross-entropy of the first of two classes ``(n, c, h, w)``."""
    model = Classifier(network, num_classes=2).eval()
    z = x.clone().requires_grad_()
    logits = model(z)
    return torch.autograd.grad(F.softplus(logits[:, 1] - logits[:, 0]).sum(), z)[0]


@pytest.mark.parametrize("height", [0.5, 12.0, 20.0])
def test_half_precision_loses_no_derivative_of_a_sure_answer(height: float) -> None:
    """The softmax of a margin of 2 * height has a derivative of exp(-2 * height), which is below
    all that float16 knows; in closed form it is -2 * weight * sigmoid(-2 * height)."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    weight = torch.tensor([[height / 4] * 4, [-height / 4] * 4])
    network.load_state_dict({"1.weight": weight, "1.bias": torch.zeros(2)})
    x = torch.ones(3, 1, 2, 2)
    expected = -2 * (height / 4) * torch.sigmoid(torch.tensor(-2.0 * height))

    grad = differentiate_loss(network.half(), x)

    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected.expand_as(grad), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("share", [0.0, 1e-3, 1.0])
def test_derivatives_of_derivatives_are_no_multiples(share: float) -> None:
    """An attack on class and map follows the sum of both, and scales neither by the other."""
    found = []
    for dtype in (torch.float32, torch.float16):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 2))
        x = draw_uniform(3, 3, 2, 2).requires_grad_()
        logits = Classifier(network.half().to(dtype), num_classes=2).eval()(x)
        surprise = -logits.log_softmax(1)[:, 0].sum()
        (shown,) = torch.autograd.grad(0.1 * surprise, x, create_graph=True)
        found.append(torch.autograd.grad(shown.square().sum() + share * surprise, x)[0])

    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=2e-3 * float(found[0].norm()))


def test_what_is_looked_at_inside_of_half_precision_has_its_own_size() -> None:
    """A hook sees the derivative of what was asked for, not a multiple of it."""
    linear = nn.Linear(4, 2)
    network = nn.Sequential(nn.Flatten(), linear).half()
    inner: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor) -> None:
        inner.append(output)

    handle = network[0].register_forward_hook(keep)
    x = torch.ones(1, 1, 2, 2).requires_grad_()
    logits = Classifier(network, num_classes=2).eval()(x)
    handle.remove()

    grad = torch.autograd.grad(0.01 * logits[:, 0].sum(), inner[0])[0]

    torch.testing.assert_close(grad[0], 0.01 * linear.weight[0], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_image_has_the_same_bits_in_any_batch(trained_bands: Bands, dtype: torch.dtype) -> None:
    """As in float32: so results do not depend on the batch."""
    network = Bands()
    network.load_state_dict(trained_bands.state_dict())
    model = Classifier(network.to(dtype), mean=(0.5,), std=(0.25,), num_classes=3).eval()
    x = draw_uniform(7, 3, 12, 12)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        logits = model(z)
        return logits.detach(), torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), z)[0]

    for whole, alone in zip(answer(x), answer(x[4:5]), strict=True):
        assert torch.equal(whole[4:5], alone)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file with weights in bfloat16, as large networks are published."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = digits_cnn().bfloat16().state_dict()
    path = tmp_path / "net.safetensors"
    save_file(state, path)
    return path


def test_what_is_computed_in_is_part_of_the_identity_and_said(stored: Path) -> None:
    arch = "robusteval:digits_cnn"
    models = {dtype: load(stored, arch=arch, dtype=dtype) for dtype in ("bfloat16", "float16")}
    plain = load(stored, arch=arch)

    said = [each.identity["precision"] for each in (plain, *models.values())]

    assert said == [
        "float32, the weights are stored in bfloat16",
        "bfloat16, as the weights are stored",
        "float16, the weights are rounded from bfloat16",
    ]
    assert "dtype" not in plain.identity
    assert len({hash_model(each) for each in (plain, *models.values())}) == 3
    for dtype, model in models.items():
        assert {p.dtype for p in model.network.parameters()} == {getattr(torch, dtype)}
        assert model(torch.zeros(1, 1, 32, 32)).dtype == torch.float32


def test_types_that_cannot_be_are_refused(tmp_path: Path) -> None:
    state = digits_cnn().state_dict()
    state[next(iter(state))].fill_(1e5)
    save_file(state, tmp_path / "net.safetensors")
    arch = "robusteval:digits_cnn"

    with pytest.raises(UsageError, match="holds values beyond 65504, the largest of float16"):
        load(tmp_path / "net.safetensors", arch=arch, dtype="float16")
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, float16, not f8"):
        load(tmp_path / "net.safetensors", arch=arch, dtype="f8")
    assert load(tmp_path / "net.safetensors", arch=arch, dtype=torch.bfloat16)


def test_the_verdict_in_float32_is_what_a_count_by_hand_gives(tmp_path: Path) -> None:
    """Where two grey levels become equal rounding decides: these images are counted and said."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom toys import Affine\n"
        "def net():\n    return Affine(torch.zeros(2, 1, 1, 2))\n"
    )
    path = tmp_path / "net.safetensors"
    # the logits are the pixels, but for a factor that bfloat16 does not know
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.003]]).view(2, 1, 1, 2)
    save(
        path,
        {"weight": weight},
        arch="net.py:net",
        num_classes=2,
        input_shape=(1, 1, 2),
        mean=None,
        std=None,
    )
    base, more = torch.meshgrid(torch.arange(130, 150), torch.arange(5, 9), indexing="ij")
    x = torch.stack([(base + more).flatten(), base.flatten()], 1).view(-1, 1, 1, 2)
    data = from_arrays(x.byte().numpy(), [0] * len(x))
    half, whole = (
        load(path, arch=f"{tmp_path / 'net.py'}:net", dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )

    run = evaluate(half, data, ["fgsm:eps=0.013"], targets={"whole": whole}, probes=False)

    record = build_record(run)
    assert record.received is not None
    (again,) = record.received.rejudged
    assert (again.own, again.dtype, again.differing.k) == ("bfloat16", "float32", 0)
    (case,) = again.cases
    ours, theirs = (outcome.success() for outcome in (run.attacks[0], run.transfers[0]))
    assert (case.own.k, case.robust.k) == (int((~ours).sum()), int((~theirs).sum()))
    assert (case.alone, case.spared) == (0, 20)  # those that become equal
    assert int((theirs & ~ours).sum()) == 20
    assert "judged in float32 at most" in record.verdict
    said = dict(list_provenance(record))["computed in"]
    assert said == "bfloat16, the weights are rounded from float32"


@pytest.mark.parametrize("explain", [gradcam, rollout])
def test_maps_of_layers_in_half_precision_are_refused_with_the_way_on(
    explain: Callable[..., Tensor],
) -> None:
    model = Classifier(digits_cnn().bfloat16(), num_classes=10).eval()

    with pytest.raises(UsageError, match="computes in bfloat16: explain it without --dtype"):
        explain(model, torch.rand(1, 1, 32, 32), torch.tensor([0]))


def test_the_command_judges_again_in_float32_only_what_was_not(tmp_path: Path) -> None:
    words = ["evaluate", "demo", "--samples", "3", "--attack", "fgsm", "--also-float32"]
    result = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "run")])

    assert result.exit_code == 2
    assert "--also-float32 judges again what --dtype bfloat16" in result.stderr
    assert name_networks([parse_network("demo,dtype=float32")]) == ["demo in float32"]


def test_a_network_that_judges_in_float32_anyway_does_so_once(tmp_path: Path) -> None:
    """Beside --also-float32, as a target or as one of several networks."""
    words = ["evaluate", "demo", "--dtype", "bfloat16", "--samples", "3", "--attack", "fgsm"]
    words += ["--no-probes", "--also-float32", "--target", "demo,dtype=float32"]
    result = CliRunner().invoke(cli, [*words, "--format", "json", "--out", str(tmp_path / "run")])

    assert result.exit_code == 0, result.stderr
    receivers = json.loads(result.stdout)["received"]["receivers"]
    assert [each["name"] for each in receivers] == ["demo in float32"]


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([], ["demo in float32"]),
        (["demo"], ["demo"]),
        (["demo,dtype=float32"], ["demo in float32"]),
        (["demo,dtype=float16"], ["demo in float16", "demo in float32"]),
    ],
)
def test_float32_is_added_to_those_that_judge_where_it_is_not_among_them(
    others: list[str], names: list[str]
) -> None:
    given = dict.fromkeys(each.name for each in dataclasses.fields(Request))
    request = Request(**{**given, "checkpoint": "demo", "dtype": "bfloat16"})  # type: ignore[arg-type]
    judging = [parse_network(each) for each in others]

    assert name_networks([*judging, *list_in_float32(request, True, judging)]) == names
