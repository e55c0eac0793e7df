"""What works on which architecture, each with random weights: that proves mechanics, no figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import small_architectures
import torch
from safetensors.torch import save_file
from small_architectures import ROWS
from torch import Tensor, nn

from robusteval import evaluate, from_arrays, load
from robusteval.attacks.advedge import advedge
from robusteval.attacks.pgd import pgd
from robusteval.interpreters.attention import rollout
from robusteval.interpreters.cam import cam, gradcam
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.gradient import grad
from robusteval.interpreters.observing import describe_layer
from robusteval.models.classifier import Classifier, frozen

TABLE = [
    pytest.param(name, marks=[pytest.mark.slow] if row.slow else []) for name, row in ROWS.items()
]


@pytest.fixture(params=TABLE)
def name(request: pytest.FixtureRequest) -> str:
    """A row of the table, whose package is there."""
    row: str = request.param
    pytest.importorskip(ROWS[row].package, exc_type=ImportError)
    return row


def open_file(name: str, network: nn.Module, path: Path) -> Classifier:
    """The network from a file of its weights."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    save_file(state, path / "net.safetensors")
    arch = f"{small_architectures.__file__}:{name}"
    return load(path / "net.safetensors", arch=arch, mean=(0.5,) * 3, std=(0.25,) * 3)


def open_folder(network: nn.Module, folder: Path, side: int) -> Classifier:
    """The network from a folder as transformers writes it, of which nothing else is said."""
    cast(Any, network.get_submodule("network")).save_pretrained(folder)
    recipe = {
        "size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    return load(folder)


@pytest.fixture
def classifier(name: str, tmp_path: Path) -> Iterator[Classifier]:
    """The network as a user opens it."""
    network = small_architectures.build(name)
    side = ROWS[name].side
    if ROWS[name].package == "transformers":
        made = open_folder(network, tmp_path, side)
    else:
        made = open_file(name, network, tmp_path)
    assert made.num_classes == 5
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        assert torch.allclose(made(x), network((x - 0.5) / 0.25), atol=1e-4)
    made.block = 4
    with frozen(made):
        yield made


def check_batches(run: Callable[[Tensor, Tensor, Tensor], Tensor], side: int) -> Tensor:
    """What `run` makes of seven images, which alone get the same bits."""
    x = torch.rand(7, 3, side, side, generator=torch.Generator().manual_seed(0))
    y, seeds = torch.arange(7) % 5, torch.arange(7)
    whole = run(x, y, seeds)
    for i in (0, 6):
        part = slice(i, i + 1)
        assert torch.equal(run(x[part], y[part], seeds[part]), whole[part])
    return whole


def run_unseeded(
    explain: Callable[..., Tensor], model: Classifier, x: Tensor, y: Tensor, _: Tensor
) -> Tensor:
    return explain(model, x, y)


def check_complete(classifier: Classifier, side: int) -> None:
    """The mean of a `cam` is the logit, less what the head adds to every image alike."""
    x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    y = torch.full((4,), 2)
    means = cam(classifier, x, y).mean((1, 2, 3))
    rest = classifier(x)[:, 2] - means
    assert float((rest - rest[0]).abs().max()) <= 1e-4 * float(means.abs().max()) + 1e-6


def test_an_architecture_works_or_says_the_way_on(name: str, classifier: Classifier) -> None:
    """Load, evaluate, saliency, Grad-CAM, CAM, rollout, an attack and a dual attack."""
    row = ROWS[name]
    shape = (3, row.side, row.side)

    logits = check_batches(lambda x, _y, _s: classifier(x), row.side)
    assert logits.shape == (7, 5)
    assert bool(logits.isfinite().all())

    saliency = check_batches(lambda x, y, _s: grad(classifier, x, y), row.side)
    assert bool((saliency > 0).any())  # a class whose last rectifier is off has none

    maps = check_batches(lambda x, y, _s: gradcam(classifier, x, y), row.side)
    assert min(maps.shape[2:]) > 1
    assert describe_layer(classifier, shape, None)

    usable = {"gradcam": True, "cam": row.cam, "rollout": row.attention}
    for spec, works in usable.items():  # as a command has it, before there are images
        if works:
            assert Interpreter.build(spec, classifier, shape).spec.name == spec

    explainers = [(cam, row.cam, "use gradcam"), (rollout, row.attention, "use gradcam")]
    for explain, works, words in explainers:
        if works:
            found = check_batches(partial(run_unseeded, explain, classifier), row.side)
            assert float(found.std()) > 0
            if explain is cam:
                check_complete(classifier, row.side)
        else:
            with pytest.raises(ValueError, match=words):
                explain(classifier, torch.rand(2, *shape), torch.tensor([0, 1]))

    def attack(x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        return pgd(classifier, x, y, eps=8 / 255, steps=1, seeds=seeds)

    def attack_both(x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        given: dict[str, Any] = {"interpreter": "gradcam", "steps": 1, "warmup": 0}
        return advedge(classifier, x, y, seeds=seeds, variant="adv2", stop="never", **given)

    for perturb in (attack, attack_both):
        x_adv = check_batches(perturb, row.side)
        assert x_adv.shape == (7, *shape)

    images = (255 * torch.rand(3, *shape)).byte().numpy()
    run = evaluate(
        classifier,
        from_arrays(images, classifier(torch.from_numpy(images) / 255).argmax(1).numpy()),
        attacks=["fgsm:eps=8/255"],
        probes=False,
    )
    assert len(run.clean["id"]) == 3
