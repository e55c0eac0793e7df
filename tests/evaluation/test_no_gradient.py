"""Models without a gradient are judged by attacks that need none, and others are told so."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Bands, synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.models.failures import explain_no_gradient

PGD, NOISE = "pgd:eps=8/255,steps=10", "noise:eps=8/255"


@pytest.fixture
def data() -> Data:
    return from_arrays(*synthetic(20, seed=2))


class OneWay(torch.autograd.Function):
    """An operation of the user's own that knows no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def in_scipy_and_back(x: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.fft.ifft2(np.fft.fft2(x.numpy())).real)).to(x)


class Before(nn.Module):
    def __init__(self, network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Any:
        return self.network(self.change((x - 0.5) / 0.25))


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NumPy": in_scipy_and_back,
    "no backward": OneWay.apply,
    "data": lambda x: x.data * 1,
    "whole numbers": lambda x: (x * 64).long() / 64,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_model_without_a_gradient(
    trained_bands: Bands, data: Data, cut: Callable[[Tensor], Tensor]
) -> None:
    """Black-box attacks have a result, the others a sentence that names them."""
    run = evaluate(Before(trained_bands, cut), data, [NOISE, PGD], probes=False)

    assert [str(outcome.attack) for outcome in run.outcomes] == [NOISE]
    assert "zero-gradient" in [finding.code for finding in run.findings]
    assert run.failures[PGD].startswith("the model gives no gradient (")
    assert "art:SquareAttack" in run.failures[PGD]


def test_a_zero_gradient_is_one(bands: Classifier) -> None:
    """Rounding has a derivative, which is zero; an attack runs and finds nothing."""
    x = torch.rand(2, 3, 12, 12)

    assert explain_no_gradient(bands, x) is None
    assert explain_no_gradient(lambda z: bands(z.round()), x) is None
    assert explain_no_gradient(lambda z: bands(z.detach()), x) is not None


@pytest.mark.filterwarnings(
    "ignore:.*quanti:UserWarning", "ignore:.*quanti:DeprecationWarning"
)  # users have such networks all the same
def test_quantised_layers_run_from_python(data: Data) -> None:
    """Their state dict holds tuples and types; two that differ are told apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [nn.Sequential(nn.Flatten(), nn.Linear(432, 3)).eval() for _ in range(2)]
    quantise: Any = torch.ao.quantization.quantize_dynamic
    quantised = [quantise(network, {nn.Linear}, dtype=torch.qint8) for network in made]

    runs = [evaluate(network, data, [NOISE], probes=False) for network in quantised]

    assert all(len(run.outcomes) == 1 for run in runs)
    assert runs[0].model["sha256"] != runs[1].model["sha256"]
