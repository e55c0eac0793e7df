"""Logits are found in what a network returns, or it is said why not."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import robusteval
from robusteval.errors import UsageError
from robusteval.models.outputs import LogitsOf, Reading, read_output, refuse_probabilities

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, -2.0]])


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Bare:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (LOGITS, ""),
        (Named(LOGITS, torch.zeros(2, 5, 4)), "`logits` of what"),
        (Bare(LOGITS), "`logits` of what"),
        ({"loss": torch.zeros(()), "logits": LOGITS}, "`logits` of what"),
        ({"prediction": LOGITS, "features": torch.zeros(2, 9)}, "`prediction` of what"),
        ({"anything": LOGITS, "maps": torch.zeros(2, 5, 4, 4)}, "`anything` of what"),
        ((LOGITS, torch.zeros(2, 5, 4)), "the first of what"),
        ([LOGITS], "the first of what"),
        ((LOGITS, None), "the first of what"),
    ],
)
def test_logits_are_found(output: Any, said: str) -> None:
    reading = read_output(output, 2)

    assert reading is not None
    assert torch.equal(reading.pick(output), LOGITS)
    assert said in reading.describe()
    assert bool(said) == bool(reading.describe())


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(2, 512), LOGITS),  # features or logits
        {"a": LOGITS, "b": LOGITS},
        {"a": 3},
        (),
        (3, LOGITS),
        torch.zeros(2, 3, 4),
        torch.zeros(3, 4),
        "logits",
        None,
    ],
)
def test_what_could_be_read_in_two_ways_is_not_read(output: Any) -> None:
    assert read_output(output, 2) is None


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
def test_one_logit_stands_for_two_classes(shape: tuple[int, ...]) -> None:
    """The softmax of 0 and z is the sigmoid of z."""
    z = torch.tensor([1.5, -0.5]).view(shape)
    reading = read_output(z, 2)

    assert reading is not None
    assert reading == Reading(single=True)
    torch.testing.assert_close(reading.pick(z).softmax(1)[:, 1], z.flatten().sigmoid())
    assert reading.describe() == "one logit z is read as two classes, 0 and z"


def test_one_probability_is_no_logit() -> None:
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(16, 1)
    nn.init.ones_(linear.weight)
    logit = nn.Sequential(nn.Flatten(), linear)
    refuse_probabilities(logit, Reading(single=True), x)

    with pytest.raises(UsageError, match="leave the sigmoid"):
        refuse_probabilities(nn.Sequential(logit, nn.Sigmoid()), Reading(single=True), x)


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(x)}


def test_module_that_returns_a_dict_is_evaluated() -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 4, 4)
    module = Answering().eval()
    y = module(x)["logits"].argmax(1)
    data = robusteval.from_arrays(x, y)
    run = robusteval.evaluate(module, data, ["fgsm:eps=1/255"], probes=False)

    assert run.model["outputs"] == "logits are `logits` of what the network returns"
    assert (run.clean["pred_clean"] == run.clean["label"]).all()


def test_channels_can_be_taken_in_reverse() -> None:
    module = nn.Flatten()
    flipped = LogitsOf(module, Reading(), flip=True)

    assert flipped(torch.arange(3.0).view(1, 3, 1, 1)).tolist() == [[2, 1, 0]]
