"""Passes in half precision or compiled: who takes them, and that bits stay an image's own.

What compiles here is torch's own stand-in that makes the graph and calls it as it is, so that no
test needs a compiler.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.evaluation.shortcut_checks import (
    differentiate_by,
    taking_shortcuts,
    try_shortcuts,
)
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.forward_modes import ImageByImage, twice_differentiable
from robusteval.models.networks import digits_cnn
from robusteval.models.shortcuts import Shortcuts, without_remarks

# torch hides this one from its users, but not where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
AMP = Shortcuts(torch.bfloat16, compiles=False)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made and called without a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> Classifier:
    """A small network in eval mode, its weights drawn."""
    torch.manual_seed(0)
    return Classifier(digits_cnn(), num_classes=10).eval().requires_grad_(False)


def draw_images(n: int) -> Tensor:
    """Images ``(n, 1, 32, 32)``."""
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def test_only_passes_that_are_differentiated_are_in_half_precision(model: Classifier) -> None:
    x = draw_images(32)
    plain = model(x)
    with taking_shortcuts(model, AMP):
        looked = model(x)
        passed = model(x.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16), ImageByImage(32, 32):
        expected = model.network(x).float()

    assert torch.equal(looked, plain)
    assert torch.equal(passed, expected)
    assert not torch.equal(passed, plain)
    assert passed.dtype == torch.float32
    assert model.shortcuts is None


def test_who_looks_inside_or_differentiates_twice_takes_no_shortcut(model: Classifier) -> None:
    z = draw_images(3).requires_grad_()
    plain = model(z)
    with taking_shortcuts(model, AMP):
        handle = model.network.register_forward_hook(lambda *_: None)
        watched = model(z)
        handle.remove()
        with twice_differentiable(z):
            twice = model(z)

    assert torch.equal(watched, plain)
    assert torch.equal(twice, plain)


@pytest.mark.parametrize("compiles", [False, True])
def test_an_image_has_the_same_bits_in_any_batch(
    model: Classifier, compiles: bool, request: pytest.FixtureRequest
) -> None:
    if compiles:
        request.getfixturevalue("traced")
    ways = Shortcuts(torch.bfloat16, compiles=compiles)
    x = draw_images(40)
    logits, grad = differentiate_by(model, ways, x)

    for rows in (range(1), range(5, 12), range(7, 40)):
        some = torch.tensor(rows)
        found = differentiate_by(model, ways, x[some])
        assert torch.equal(found[0], logits[some])
        assert torch.equal(found[1], grad[some])


@pytest.mark.usefixtures("traced")
def test_a_compiled_network_says_what_it_says_step_by_step(model: Classifier) -> None:
    x = draw_images(5)
    ways, findings = try_shortcuts(["compile"], [model], x)
    assert ways is not None
    assert not findings
    assert ways.describe() == {"compile": "inductor"}

    logits, grad = differentiate_by(model, ways, x)
    expected = differentiate_by(model, Shortcuts(None, compiles=False), x)

    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("height", [0.5, 12.0, 20.0])
def test_autocast_to_float16_loses_no_derivative_of_a_sure_answer(height: float) -> None:
    """In closed form it is -2 * weight * sigmoid(-2 * height), far below what float16 knows."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    weight = torch.tensor([[height / 4] * 4, [-height / 4] * 4])
    network.load_state_dict({"1.weight": weight, "1.bias": torch.zeros(2)})
    model = Classifier(network, num_classes=2).eval()
    z = torch.ones(3, 1, 2, 2, requires_grad=True)

    with frozen(model), taking_shortcuts(model, Shortcuts(torch.float16, compiles=False)):
        logits = model(z)
        (grad,) = torch.autograd.grad(F.softplus(logits[:, 1] - logits[:, 0]).sum(), z)

    expected = -2 * (height / 4) * torch.sigmoid(torch.tensor(-2.0 * height))
    torch.testing.assert_close(grad, expected.expand_as(grad), rtol=2e-3, atol=0.0)


def test_shortcuts_are_left_where_an_attack_breaks_and_copies_compile_anew(
    model: Classifier,
) -> None:
    with pytest.raises(ZeroDivisionError), taking_shortcuts(model, AMP):
        raise ZeroDivisionError
    assert model.shortcuts is None

    ways = Shortcuts(torch.bfloat16, compiles=True)
    ways.compiled[0] = lambda x: x
    for other in (copy.deepcopy(ways), pickle.loads(pickle.dumps(ways))):
        assert other.describe() == {"amp": "bfloat16", "compile": "inductor"}
        assert not other.compiled


def test_what_the_compiler_remarks_on_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for who asks torch for its logs; what is remarked elsewhere is as it was."""
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)

    with without_remarks():
        logger.warning("no GPU")
        logger.error("no compiler")
    logger.warning("later")
    monkeypatch.setenv("TORCH_LOGS", "dynamo")
    with without_remarks():
        logger.warning("asked for")

    # a logger that propagates is heard twice here
    heard = list(dict.fromkeys(entry.message for entry in caplog.records))
    assert heard == ["no compiler", "later", "asked for"]
