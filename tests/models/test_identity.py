"""A model's identity is of its own parts; whatever is made from it is another model."""

import copy
import hashlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.evaluation.defense import Detector, WithDetector
from robusteval.models import checkpoint
from robusteval.models.classifier import MADE_FROM, Classifier, absorb, derive_identity
from robusteval.models.identity import hash_answers, hash_model, identify_model
from robusteval.models.masked import mask_units
from robusteval.models.networks import digits_cnn
from robusteval.runs.storage import digest

FACTS = {"sha256": "of a file", "arch": "robusteval:digits_cnn", "arch_sha256": None}


class Squeezed(nn.Module):
    """Rounds images to a few bits; equal but for a number in the code."""

    def __init__(self, network: nn.Module, bits: int) -> None:
        super().__init__()
        self.network, self.bits = network, bits
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)``."""
        levels = 2**self.bits - 1
        return cast(Tensor, self.network((x * levels).round() / levels))


@pytest.fixture
def parent() -> Classifier:
    torch.manual_seed(0)
    network = digits_cnn().eval()
    return Classifier(network, mean=(0.5,), std=(0.25,), num_classes=10, identity=FACTS)


@pytest.fixture
def data() -> Data:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    return from_arrays(images, np.arange(6))


def squeezed(parent: Classifier, bits: int = 4, **facts: Any) -> Classifier:
    """A defense as people write it: all facts passed on."""
    network = Squeezed(parent.network, bits)
    identity = {**parent.identity, **facts}
    return Classifier(network, mean=(0.5,), std=(0.25,), num_classes=10, identity=identity)


def retrained(parent: Classifier) -> Classifier:
    """The network copied and trained on."""
    network = copy.deepcopy(parent.network)
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    identity = {**parent.identity, "trained": "adv"}
    return Classifier(network, mean=(0.5,), std=(0.25,), num_classes=10, identity=identity)


def guarded(parent: Classifier, threshold: float = 0.5) -> WithDetector:
    detector = SimpleNamespace(facts={"threshold": threshold})
    return WithDetector(parent, cast(Detector, detector))


def list_derived(parent: Classifier) -> dict[str, Classifier]:
    """One of everything that can be made from a classifier."""
    other = copy.deepcopy(parent)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    replaced = copy.deepcopy(parent)
    replaced.network = digits_cnn().eval()
    return {
        "mask": mask_units(parent, "13", torch.tensor([0.0] + [1.0] * 9)),
        "another mask": mask_units(parent, "13", torch.tensor([1.0] * 9 + [0.0])),
        "squeezed to 4 bits": squeezed(parent),
        "squeezed to 5 bits": squeezed(parent, 5),
        "squeezed by our own means": parent.derive(Squeezed(parent.network, 6), bits=6),
        "retrained": retrained(parent),
        "retrained copy": other,
        "another network put in": replaced,
        "detector": guarded(parent),
        "another threshold": guarded(parent, 0.25),
        "detector on a mask": guarded(mask_units(parent, "13", torch.tensor([0.0] + [1.0] * 9))),
    }


def test_what_is_made_from_a_model_never_has_its_hash(parent: Classifier, data: Data) -> None:
    models = {"parent": parent, **list_derived(parent)}
    hashes = {name: hash_model(model) for name, model in models.items()}
    names = {name: identify_model(m, data, np.arange(6))["sha256"] for name, m in models.items()}

    assert len(set(hashes.values())) == len(models)
    assert len(set(names.values())) == len(models)
    assert names["parent"] == "of a file"


def test_what_is_made_from_a_model_says_so(parent: Classifier) -> None:
    for name, model in list_derived(parent).items():
        assert "sha256" not in model.identity, name
        assert model.identity[MADE_FROM] in ("of a file", None), name
        assert model.identity["arch"] == FACTS["arch"]
        json.dumps(model.identity)

    assert parent.identity == FACTS


def test_a_derived_classifier_is_given_images_alike(parent: Classifier) -> None:
    made = parent.derive(Squeezed(parent.network, 8), bits=8)
    x = torch.randint(0, 256, (3, 1, 32, 32)) / 255

    assert made.identity == {**made.identity, MADE_FROM: "of a file", "bits": 8}
    assert (made.mean, made.std, made.num_classes) == (parent.mean, parent.std, 10)
    assert made(x).shape == parent(x).shape


def test_a_model_made_from_one_that_was_made_is_told_apart(parent: Classifier) -> None:
    once = squeezed(parent)

    assert hash_model(squeezed(once)) != hash_model(once)
    assert squeezed(once).identity[MADE_FROM] == "of a file"
    assert once.derive(once.network, again=True).identity[MADE_FROM] == "of a file"


def test_a_detector_alone_changes_no_answers(parent: Classifier) -> None:
    """A mask network of rts that was trained for the model explains it behind a detector, too."""
    assert hash_answers(guarded(parent)) == hash_answers(parent) == hash_model(parent)
    assert hash_model(guarded(parent)) != hash_model(parent)
    assert hash_answers(squeezed(parent)) != hash_answers(parent)


def test_hashes_are_those_of_the_first_release(parent: Classifier, data: Data) -> None:
    """Its caches and run folders go by them."""
    network = parent.network
    bare = Classifier(network, mean=(0.5,), std=(0.25,), num_classes=10)
    state = hashlib.sha256(f"1 {network}".encode())
    absorb(state, bare.state_dict())
    content = hashlib.sha256()
    absorb(content, bare.state_dict())
    content.update(bare(data.batch(range(4)).x).detach().numpy().tobytes())

    assert hash_model(parent) == digest([1, "of a file", None, [[0.5], [0.25]]])
    assert hash_model(bare) == state.hexdigest()
    assert identify_model(parent, data, np.arange(6)) == FACTS
    assert identify_model(bare, data, np.arange(6)) == {
        "sha256": content.hexdigest(),
        "arch": "torch.nn.modules.container:Sequential",
        "num_classes": 10,
    }


def test_a_module_that_is_no_classifier_goes_by_its_tensors(parent: Classifier) -> None:
    network = parent.network
    content = hashlib.sha256(f"1 {network}".encode())
    absorb(content, network.state_dict())

    assert hash_model(network) == content.hexdigest()


def test_a_file_loaded_twice_is_one_model(parent: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    checkpoint.save(
        path,
        parent.network.state_dict(),
        arch="robusteval:digits_cnn",
        num_classes=10,
        input_shape=(1, 32, 32),
        mean=None,
        std=None,
    )
    one, other = checkpoint.load(path), checkpoint.load(path)

    assert one.identity == other.identity
    assert one.identity["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_model(one) == hash_model(other)
    assert list(json.loads(json.dumps(one.identity)))[:3] == ["sha256", "file", "arch"]


def test_a_copy_keeps_no_hash_it_could_outlive(parent: Classifier) -> None:
    for copied in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert "sha256" not in copied.identity
        assert copied.identity[MADE_FROM] == "of a file"


def test_moving_and_freezing_keep_the_identity(parent: Classifier) -> None:
    assert parent.requires_grad_(False).double().to("cpu").identity == FACTS


def test_the_identity_that_is_handed_out_is_a_copy(parent: Classifier) -> None:
    parent.identity["sha256"] = "changed"

    assert parent.identity == FACTS


def test_a_model_without_a_hash_passes_none_on() -> None:
    bare = Classifier(nn.Flatten(), num_classes=4, identity={"arch": "mine"})

    assert derive_identity(bare, bits=4) == {"arch": "mine", MADE_FROM: None, "bits": 4}
