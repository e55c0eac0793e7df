"""RTS: a trained mask network keeps its promises, a useless one is never kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import small_architectures
import torch
from safetensors import safe_open
from torch import Tensor, autograd, nn
from toys import Bands

from robusteval.datasets.dataset import Data
from robusteval.errors import RunError, UsageError
from robusteval.interpreters import rts_training
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.rts import (
    Acceptance,
    MaskNetwork,
    collect_features,
    find_mask_network,
    locate_mask_network,
    rts,
)
from robusteval.interpreters.rts_training import (
    RtsTraining,
    UselessMaskNetwork,
    measure_unevenness,
    prepare_rts,
    train_rts,
)
from robusteval.models.classifier import Classifier
from robusteval.models.identity import hash_model
from robusteval.testing import pair_up

STEPS = 90


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Grey noise with a checked square on the left, in the middle or on the right."""
    draws = torch.Generator().manual_seed(seed)
    x = 0.5 + 0.05 * torch.randn(n, 3, 12, 12, generator=draws)
    y = torch.randint(3, (n,), generator=draws)
    top = torch.randint(9, (n,), generator=draws)
    checks = 0.3 * (2 * (torch.arange(4).unsqueeze(1) + torch.arange(4)).remainder(2) - 1)
    for image, label, row in zip(x, y.tolist(), top.tolist(), strict=True):
        image[:, row : row + 4, 4 * label : 4 * label + 4] += checks
    return x.clamp(0, 1), y


@pytest.fixture(scope="module")
def network() -> Bands:
    """A network that finds the square; do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Bands()
    x, y = images(600, seed=0)
    optimiser = torch.optim.Adam(made.parameters(), 0.01)
    for step in range(150):
        rows = torch.arange(step * 100, step * 100 + 100) % 600
        logits = made((x[rows] - 0.5) / 0.25)
        loss = nn.functional.cross_entropy(logits, y[rows], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    made.requires_grad_(False)
    return made.eval()


def classifier(network: nn.Module) -> Classifier:
    return Classifier(
        network,
        mean=(0.5,),
        std=(0.25,),
        num_classes=3,
        identity={"sha256": "rts"},
        block=4,
    ).eval()


@pytest.fixture(scope="module")
def data() -> Data:
    """Three hundred synthetic images."""
    return pair_up(*images(300, seed=3))


class Told:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done = 0
        self.said: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self.stages.append((what, total))

    def advance(self, n: int) -> None:
        self.done += n

    def estimate(self, done: float, where: str) -> None:
        pass

    def end(self) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, network: Bands, data: Data) -> Path:
    """A cache folder with the mask network of the trained network."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("ROBUSTEVAL_CACHE")
    os.environ["ROBUSTEVAL_CACHE"] = str(folder)
    try:
        train_rts(classifier(network), data, steps=STEPS)
    finally:
        if before is None:
            del os.environ["ROBUSTEVAL_CACHE"]
        else:
            os.environ["ROBUSTEVAL_CACHE"] = before
    return folder


@pytest.fixture
def model(kept: Path, network: Bands, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """The network whose mask network is in the cache."""
    monkeypatch.setenv("ROBUSTEVAL_CACHE", str(kept))
    return classifier(network)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it."""
    monkeypatch.setenv("ROBUSTEVAL_CACHE", str(tmp_path))
    return tmp_path


# The map


def test_a_map_is_a_share_at_the_resolution_of_the_finest_features(model: Classifier) -> None:
    x, y = images(7, seed=9)
    maps = rts(model, x, y)

    assert maps.shape == (7, 1, 12, 12)
    assert not maps.requires_grad
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1
    assert float(maps.mean()) < 0.5


def test_a_map_does_not_depend_on_the_batch(model: Classifier) -> None:
    x, y = images(7, seed=9)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    whole = rts(model, x, y)

    assert torch.equal(rts(model, x[order], y[order]), whole[order])
    assert torch.equal(rts(model, x[2:3], y[2:3]), whole[2:3])
    assert torch.equal(rts(model, x[[1, 1]], y[[1, 1]]), whole[[1, 1]])
    assert rts(model, x[:0], y[:0]).shape == (0, 1, 12, 12)


def test_the_logits_of_the_same_pass_are_the_models(model: Classifier) -> None:
    x, y = images(5, seed=9)
    maps, logits = find_mask_network(model).draw_masks(model, x, y)

    assert torch.equal(logits, model(x))
    assert torch.equal(maps, rts(model, x, y))


def test_derivatives_of_the_map_match_finite_differences(model: Classifier) -> None:
    x, y = images(1, seed=9)
    x = x.double().requires_grad_()
    masker = MaskNetwork((3, 12, 12), find_mask_network(model).scales, 3)
    masker.load_state_dict(find_mask_network(model).state_dict())
    masker.eval().double().requires_grad_(False)
    wide = classifier(Bands())
    wide.load_state_dict(model.state_dict())
    wide.double().requires_grad_(False)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()

    def total(x: Tensor) -> Tensor:
        return masker.draw_masks(wide, x, y)[0].sum()

    (slope,) = autograd.grad(total(x), x)
    step = 1e-7 * direction
    found = (total(x.detach() + step) - total(x.detach() - step)) / 2e-7

    assert float(found) == pytest.approx(float((slope * direction).sum()), rel=1e-3)


def test_more_confidence_is_asked_of_the_gate(model: Classifier) -> None:
    x, y = images(5, seed=9)

    assert not torch.equal(rts(model, x, y, confidence=6.0), rts(model, x, y))


# RtsTraining


def test_a_kept_mask_network_passed_its_test(model: Classifier) -> None:
    found = find_mask_network(model).acceptance

    assert found.images == 60
    assert found.preserved - found.destroyed >= 0.3
    assert found.area < 0.5
    with safe_open(locate_mask_network(model), framework="pt") as file:
        assert '"acceptance"' in file.metadata()["robusteval_rts"]


def test_training_leaves_model_and_generator_alone(empty: Path, network: Bands, data: Data) -> None:
    model = classifier(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    told = Told()

    with pytest.raises(RunError):
        train_rts(model, data, steps=1, progress=told)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model.network._forward_hooks
    assert [total for _, total in told.stages] == [32, 32]
    assert told.done == 64


def test_a_useless_mask_network_stops_with_its_figures(
    empty: Path, network: Bands, data: Data
) -> None:
    with pytest.raises(RunError, match=r"useless.*60 images.*% with.*% without.*train with more"):
        train_rts(classifier(network), data, steps=1)

    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("figures", "passed"),
    [((0.9, 0.6, 0.3), True), ((0.9, 0.61, 0.3), False), ((0.9, 0.1, 0.5), False)],
)
def test_acceptance_asks_for_both_gap_and_area(
    figures: tuple[float, float, float], passed: bool
) -> None:
    assert Acceptance(*figures, 100).passed is passed


def test_the_two_parts_of_an_image_share_it(network: Bands, data: Data) -> None:
    training = RtsTraining(classifier(network), data, 3, 0)
    x, _ = images(4, seed=9)
    everything = torch.ones(4, 1, 12, 12)
    shown, hidden = training.split_images(x, everything, torch.Generator().manual_seed(0))

    assert float((shown - x).abs().max()) < 0.1  # noise alone
    assert float((hidden - x).abs().mean()) > 0.04


def test_unevenness_counts_neighbours_and_border() -> None:
    masks = torch.zeros(2, 1, 3, 3)
    masks[0, 0, 1, 1] = 1.0  # four neighbours
    masks[1] = 1.0  # twelve border values

    torch.testing.assert_close(measure_unevenness(masks), torch.tensor([2.0, 1.8]))


# The cache


def test_without_a_mask_network_the_error_says_how_to_train_one(
    empty: Path, network: Bands
) -> None:
    x, y = images(2, seed=9)

    with pytest.raises(UsageError, match=r"train_rts\(model, data\)"):
        rts(classifier(network), x, y)


def test_ready_trains_only_once(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> MaskNetwork:
        raise AssertionError("trained again")

    monkeypatch.setattr(rts_training, "train_rts", fail)

    assert prepare_rts(model, data) is find_mask_network(model)


def test_a_mask_network_that_missed_its_test_gets_more_steps_once(
    empty: Path, network: Bands, data: Data
) -> None:
    """Both tries are shown, and the second one's figures are the error."""
    told = Told()

    with pytest.raises(UselessMaskNetwork, match=r"useless.*train with more"):
        prepare_rts(classifier(network), data, steps=1, progress=told)

    assert [total for _, total in told.stages] == [32, 32, 128, 128]
    assert told.said == ["The masks of rts miss their test at 1 training steps: they get 4."]
    assert [path.suffixes for path in empty.iterdir()] == [[".missed", ".json"]]


def test_a_training_that_missed_is_not_repeated_from_the_same_start(
    empty: Path, network: Bands, data: Data
) -> None:
    model, told = classifier(network), Told()
    with pytest.raises(UselessMaskNetwork):
        prepare_rts(model, data, steps=1)
    (missed,) = empty.iterdir()

    with pytest.raises(UselessMaskNetwork, match=r"useless.*trained before; remove .*missed.json"):
        prepare_rts(model, data, steps=1, progress=told)
    assert told.stages == []
    with pytest.raises(UselessMaskNetwork, match=r"more images$"):  # another start
        prepare_rts(model, data, steps=1, seed=1, progress=told)
    assert len(told.stages) == 4

    missed.write_bytes(b"\xff{")  # not ours
    with pytest.raises(UselessMaskNetwork, match=r"more images$"):
        prepare_rts(model, data, steps=1, progress=told)
    assert len(told.stages) == 8


def test_the_cache_goes_by_weights_and_normalisation(network: Bands) -> None:
    plain, again, other = Bands(), Bands(), Bands()
    again.load_state_dict(plain.state_dict())
    named = classifier(network)
    shifted = Classifier(
        network, mean=(0.4,), std=(0.25,), num_classes=3, identity={"sha256": "rts"}
    )

    assert hash_model(plain) == hash_model(again)
    assert hash_model(plain) != hash_model(other)
    assert hash_model(named) != hash_model(shifted)
    assert hash_model(named) == hash_model(classifier(other))  # what the checkpoint's hash says


def test_a_damaged_file_is_refused(empty: Path, network: Bands) -> None:
    model = classifier(network)
    locate_mask_network(model).write_bytes(b"\x08" + bytes(7) + b"{}      ")

    with pytest.raises(UsageError, match="damaged"):
        find_mask_network(model)


def test_a_flipped_byte_is_noticed_said_and_trained_again(
    kept: Path, empty: Path, network: Bands, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(network)
    path = locate_mask_network(model)
    raw = (kept / path.name).read_bytes()
    trained: list[str] = []
    monkeypatch.setattr(rts_training, "train_rts", lambda *_, **named: trained.append("again"))
    for place in (30, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        told = Told()

        prepare_rts(model, data, progress=told)
        assert ["is damaged" in text for text in told.said] == [True]
    assert trained == ["again"] * 3
    path.write_bytes(raw)
    assert isinstance(prepare_rts(model, data), MaskNetwork)
    assert trained == ["again"] * 3


def test_a_mask_network_of_another_model_is_not_taken(
    kept: Path, empty: Path, network: Bands
) -> None:
    name = locate_mask_network(classifier(network)).name
    other = Classifier(network, mean=(0.4,), std=(0.25,), num_classes=3, identity={"sha256": "x"})
    locate_mask_network(other).write_bytes((kept / name).read_bytes())

    with pytest.raises(UsageError, match="of another model"):
        find_mask_network(other)


# Mistakes


def test_images_of_another_size_are_refused(model: Classifier) -> None:
    with pytest.raises(ValueError, match="trained on images"):
        rts(model, torch.zeros(1, 3, 8, 8), torch.tensor([0]))


def test_a_class_that_does_not_exist_is_refused(model: Classifier) -> None:
    x, _ = images(2, seed=9)

    with pytest.raises(ValueError, match="classes must lie between 0 and 2"):
        rts(model, x, torch.tensor([0, 3]))


def test_a_network_without_feature_maps_is_refused(empty: Path, data: Data) -> None:
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), num_classes=3).eval()

    with pytest.raises(UsageError, match="no feature maps"):
        train_rts(flat, data)


def test_a_network_that_can_have_no_mask_network_is_not_told_to_train_one(empty: Path) -> None:
    """It would be told the reason by the training."""
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), num_classes=3).eval()
    rounded = Classifier(Bands().bfloat16(), num_classes=3).eval()

    for model, reason in ((flat, "no feature maps"), (rounded, "computes in bfloat16")):
        with pytest.raises(UsageError, match=reason):
            Interpreter.build("rts", model, (3, 12, 12))
    with pytest.raises(UsageError, match="no mask network has been trained"):
        Interpreter.build("rts", classifier(Bands()), (3, 12, 12))


def test_too_few_images_are_refused(empty: Path, network: Bands) -> None:
    with pytest.raises(UsageError, match="at least 100"):
        train_rts(classifier(network), pair_up(*images(99, seed=3)))


def test_labels_that_the_model_lacks_are_refused(empty: Path, network: Bands) -> None:
    x, y = images(120, seed=3)

    with pytest.raises(UsageError, match="labels"):
        train_rts(classifier(network), pair_up(x, y + 1))


def test_feature_maps_are_the_last_of_each_resolution(network: Bands) -> None:
    x, _ = images(2, seed=9)
    fine = torch.relu(network.conv1(x))

    _, [features] = collect_features(network, x)

    assert torch.equal(features[0], fine)
    assert torch.equal(features[1], torch.relu(network.conv2(fine)))
    assert np.array_equal([len(f) for f in features], [2, 2])


def test_feature_maps_of_a_transformer_are_tokens_of_its_last_block() -> None:
    """Not its queries, keys and values, some of which have the image's proportions."""
    network = small_architectures.build("vit_class")
    blocks = dict(network.named_modules())
    seen: dict[str, Tensor] = {}
    for name in ("patch_embed.proj", "blocks.0"):
        blocks[name].register_forward_hook(lambda *args, n=name: seen.update({n: args[2]}))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, [features] = collect_features(network, x)

    assert [tuple(f.shape) for f in features] == [(2, 24, 4, 4)] * 2
    assert torch.equal(features[0], seen["patch_embed.proj"])
    assert torch.equal(features[1], seen["blocks.0"][:, 1:].transpose(1, 2).reshape(2, 24, 4, 4))
