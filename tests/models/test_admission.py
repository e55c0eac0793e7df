"""Whether a network is one that can be judged: it is left as it was, and called as it wants."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Bands, synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.errors import RunError, UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.admission import check_images, wrap_module
from robusteval.models.classifier import Classifier

NOISE = "noise:eps=8/255"


@pytest.fixture
def data() -> Data:
    return from_arrays(*synthetic(12, seed=2))


class Around(nn.Module):
    """A network, after something that is done to its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class AlwaysTraining(Around):
    """Whatever it is told, its normalisation goes on learning."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.norm = nn.BatchNorm2d(3)

    def train(self, mode: bool = True) -> "AlwaysTraining":
        return super().train(True)

    def forward(self, x: Tensor) -> Any:
        return self.network(self.norm(x))


class Counting(Around):
    """Counts its calls in a buffer that is a new tensor each time."""

    calls: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls = self.calls + 1
        return self.network(x)


class Adapting(Around):
    """Follows the mean of what it saw, in eval mode as well."""

    mean: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        self.mean.lerp_(x.detach().mean((0, 2, 3)), 1e-4)
        return self.network(x - self.mean.view(3, 1, 1))


class InnerTraining(Around):
    """Its `eval` leaves a part alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.inside = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3, momentum=None)))

    def eval(self) -> "InnerTraining":
        self.network.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        return self.network(self.inside(x))


CHANGING = [
    *(
        (kind, wrapped)
        for kind in (AlwaysTraining, Counting, Adapting)
        for wrapped in (False, True)
    ),
    (InnerTraining, False),  # a classifier calls `train` of its parts, not their `eval`
]


@pytest.mark.parametrize(("kind", "wrapped"), CHANGING)
def test_a_model_that_answers_change_is_refused_and_left_as_it_was(
    trained_bands: Bands, data: Data, kind: Callable[[nn.Module], nn.Module], wrapped: bool
) -> None:
    """As a module of its own or in a classifier."""
    network = kind(trained_bands)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = Classifier(network, num_classes=3) if wrapped else network

    with pytest.raises(UsageError, match="changes while it answers"):
        evaluate(model, data, [NOISE])

    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_dropout_that_stays_on_changes_no_model(trained_bands: Bands, data: Data) -> None:
    """A random model is judged, and named by the trust checks."""

    class Dropping(Around):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(network)
            self.drop = nn.Dropout(0.5)

        def train(self, mode: bool = True) -> "Dropping":
            super().train(mode)
            self.drop.train(True)
            return self

        def forward(self, x: Tensor) -> Any:
            return self.network(self.drop(x))

    network = Dropping(trained_bands)
    found = evaluate(network, data, [NOISE], probes=False)

    assert "non-deterministic" in [finding.code for finding in found.findings]


def test_a_train_of_another_kind_is_named(trained_bands: Bands, data: Data) -> None:
    class Trainer(Around):
        def train(self, loader: Any) -> Any:  # type: ignore[override]
            return [self(x) for x, _ in loader]

    with pytest.raises(UsageError, match=r"eval\(\) of the model raised TypeError .*train\(mode\)"):
        evaluate(Trainer(trained_bands), data, [NOISE])


@pytest.mark.parametrize("batch", [3, 10, 64])
def test_a_network_of_a_fixed_batch_size_is_called_with_it(
    trained_bands: Bands, data: Data, batch: int
) -> None:
    """Known sizes are tried; of others the error is the network's own."""

    class Fixed(Around):
        def forward(self, x: Tensor) -> Any:
            return self.network(x.view(batch, 3, 12, 12))

    if batch == 3:
        with pytest.raises(RunError, match="invalid for input of size"):
            wrap_module(Fixed(trained_bands), data)
        return
    wrapped = wrap_module(Fixed(trained_bands), data)
    loaded = Classifier(Fixed(trained_bands), num_classes=3)
    check_images(data, np.arange(12), loaded)
    run = evaluate(Fixed(trained_bands), data, ["pgd:eps=16/255,steps=3"], probes=False)

    assert wrapped.block == loaded.block == batch
    assert run.failures == {}
    plain = Classifier(trained_bands, num_classes=3)(data.batch(np.arange(12)).x)
    torch.testing.assert_close(wrapped.eval()(data.batch(np.arange(12)).x), plain)


@pytest.mark.parametrize(
    "answer",
    [lambda z: (z, z), lambda z: {"a": z, "b": z}, lambda z: z.unsqueeze(2), lambda z: None],
    ids=["tuple", "dict", "three axes", "nothing"],
)
def test_what_is_no_logits_is_one_sentence(
    trained_bands: Bands, data: Data, answer: Callable[[Tensor], object]
) -> None:
    class Other(Around):
        def forward(self, x: Tensor) -> Any:
            return answer(self.network(x))

    with pytest.raises(UsageError, match="one tensor of logits") as raised:
        wrap_module(Other(trained_bands), data)
    with pytest.raises(UsageError) as again:
        check_images(data, np.arange(1), Classifier(Other(trained_bands), num_classes=3))

    assert str(raised.value) == str(again.value)
    assert len(str(raised.value).splitlines()) == 1


def test_images_in_memory_are_not_written_to(trained_bands: Bands) -> None:
    class InPlace(Around):
        def forward(self, x: Tensor) -> Any:
            return self.network(x.sub_(0.5))

    x, y = synthetic(12, seed=2)
    images = (x / 255).astype(np.float32)
    before = images.copy()

    run = evaluate(InPlace(trained_bands), from_arrays(images, y), ["fgsm"], probes=False)

    assert run.failures == {}
    assert np.array_equal(images, before)
