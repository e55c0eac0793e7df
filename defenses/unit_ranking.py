"""How much the units of a layer matter: to an attack, or to the logit of the true class."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.dataset import Batch
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.evaluation.batches import ResumableMap, split_rows
from robusteval.evaluation.perturbing import choose_goals, perturb
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances, hash_inputs
from robusteval.interpreters.heads import agree, observe_head
from robusteval.interpreters.observing import Call, observe_calls
from robusteval.models.classifier import Classifier, choose_block_size, predict_classes
from robusteval.models.failures import raise_as_run_error
from robusteval.models.masked import (
    find_layer,
    find_unit_axis,
    mask_units,
    measure_activations,
)
from robusteval.models.places import find_tensor
from robusteval.models.scripted import is_scripted
from robusteval.models.seeds import sample_seeds
from robusteval.progress import Progress
from robusteval.runs.types import Columns

LISTED = 5  # layers that a message names


def find_penultimate_layer(classifier: Classifier, x: Tensor) -> str:
    """Find the layer whose units are averaged and given to the final linear layer.

    It is not guessed from names: masking it must do to what the final layer is given what it says.
    UsageError, with the layers there are, if the network ends in another way.
    """
    x = x[:2]  # one call of the network
    with torch.no_grad():
        _, calls = observe_calls(classifier, x)
        layers = list_layers(classifier, x)
        means = read_pooled(calls[0])
        if means is not None:
            keep = (torch.arange(means.shape[1]) % 2).to(means)
            features = calls[0].read_maps()
            assert features is not None
            for name in reversed(layers):
                before = layers[name][0].numel() >= features[0].numel()  # they are averaged
                if not before or count_units(classifier, x, name, layers[name]) != len(keep):
                    continue
                _, tried = observe_calls(mask_units(classifier, name, keep), x)
                masked = read_pooled(tried[0], checked=False)
                if masked is not None and agree(means * keep, masked):
                    return name
    known = [
        f"{name} ({count} units)"
        for name, tensor in layers.items()
        if (count := count_units(classifier, x, name, tensor)) is not None
    ]
    raise UsageError(
        "the network does not end in average pooling of a layer and one linear layer: say which"
        " units are meant with --layer; the last hidden ones there are:"
        f" {', '.join(known[-LISTED:]) or 'none'}"
    )


def read_pooled(call: Call, *, checked: bool = True) -> Tensor | None:
    """Read the means of features ``(m, K)`` that a call gave to its head.

    None if they are not what the final linear layer was given, or a normalisation before it; where
    that is not to be `checked`, what one of the two was given.
    """
    features, linear, norm = call.read_maps(), call.linear, call.norm
    if features is None or linear is None or not agree(linear.output, call.logits):
        return None
    between = norm is not None and agree(norm.output, linear.input)
    given = norm.input if norm is not None and between else linear.input
    means = features.mean((2, 3))
    return given if not checked or agree(means, given) else None


def count_units(classifier: Classifier, x: Tensor, layer: str, output: Tensor) -> int | None:
    """Count the units of a layer from what it gave; None if it is not known which axis has them."""
    try:
        return output.shape[find_unit_axis(classifier.network, layer, x)]
    except UsageError:
        return None


def list_layers(classifier: Classifier, x: Tensor) -> dict[str, Tensor]:
    """List the hidden layers that run once in a pass, in the order in which they end.

    With what they give for one block of images. Those that give the classes themselves are none.
    """
    found: dict[str, Tensor] = {}
    runs: dict[str, int] = {}

    def see(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        found.pop(name, None)
        tensor = find_tensor(output)
        if tensor is not None and tensor.ndim in (2, 3, 4):
            found[name] = tensor

    network = classifier.network
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if not is_scripted(module):
                stack.callback(module.register_forward_hook(partial(see, name)).remove)
        classifier(x[:1])
    logits = found.pop("")
    return {
        name: tensor
        for name, tensor in found.items()
        if runs[name] == 1 and len(tensor) == len(logits) and not is_class_output(tensor, logits)
    }


def is_class_output(tensor: Tensor, logits: Tensor) -> bool:
    """Whether what a layer gives, or its mean over places, is the logits."""
    means = tensor.mean((2, 3)) if tensor.ndim == 4 else tensor
    return agree(means, logits)


def check_hidden(classifier: Classifier, x: Tensor, layer: str) -> None:
    """Raise UsageError if a layer gives the classes themselves: masked ones are never answered."""
    module, found = find_layer(classifier.network, layer), []
    handle = module.register_forward_hook(lambda _module, _args, out: found.append(out))
    root = classifier.network.register_forward_hook(lambda _module, _args, out: found.append(out))
    try:
        with torch.no_grad():
            classifier(x[:1])
    finally:
        handle.remove()
        root.remove()
    tensor = find_tensor(found[0]) if len(found) > 1 else None  # a layer that does not run
    if tensor is not None and is_class_output(tensor, found[-1]):
        known = list(list_layers(classifier, x))[-LISTED:]
        raise UsageError(
            f"layer {layer!r} gives the classes themselves, and those masked would never be"
            f" answered: name a hidden layer, such as {', '.join(known) or 'none'}"
        )


def attack_images(
    classifier: Classifier,
    batch: Batch,
    attack: Attack,
    seed: int,
    done: WorkCache,
    progress: Progress,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack the images that are classified correctly: these, the results, and labels."""
    device = classifier.device
    x, y, seeds = batch.x.to(device), batch.y.to(device), sample_seeds(seed, batch.ids)
    with torch.no_grad(), raise_as_run_error("the network broke"):
        fine = predict_classes(classifier(x)) == y
    if not bool(fine.any()):
        raise NothingEvaluated(
            f"none of {len(x)} images is classified correctly: check that data and checkpoint"
            " belong together, and the normalisation"
        )
    x, y, seeds = x[fine], y[fine], seeds[fine.cpu()].to(device)
    goal = choose_goals(attack, y, seeds, classifier.num_classes)

    def perturb_rows(rows: np.ndarray[Any, Any]) -> Columns:
        some = torch.from_numpy(rows).to(device)
        made = perturb(attack, classifier, x[some], y[some], seeds=seeds[some], goal=goal[some])
        return {"x_adv": made.x_adv.cpu().numpy()}

    facts = [*describe_circumstances(classifier, seed), attack.spec.name, attack.resolved]
    found = ResumableMap(done.parts, progress).map(
        f"{attack.spec}, to rank units",
        hash_inputs(facts, tuple(each.cpu().numpy() for each in (x, goal, seeds))),
        split_rows(np.arange(len(x)), 4 * choose_block_size(x[0].numel(), device)),
        perturb_rows,
    )
    return x, torch.from_numpy(found["x_adv"]).to(x), y


@torch.no_grad()
def measure_sensitivity(classifier: Classifier, x: Tensor, x_adv: Tensor, layer: str) -> Tensor:
    """Measure how far an attack moves each unit ``(n, K)``, in standard deviations over the images.

    Reconstructed, see above. Without the deviation, units of large values would always come first.
    """
    before, after = (measure_activations(classifier, z, layer).double().cpu() for z in (x, x_adv))
    natural = before.std(0) if len(x) > 1 else torch.ones_like(before[0])
    # of a unit that never moves by itself nothing can be said
    return (after - before).abs() / torch.where(natural > 0, natural, torch.inf)


@torch.no_grad()
def measure_importance(
    classifier: Classifier, x: Tensor, y: Tensor, layer: str, progress: Progress
) -> Tensor:
    """Measure by how much the logit of class `y` ``(n,)`` changes without each unit: ``(n, K)``.

    arXiv:2409.15190, the ranking by leaving one out: a forward pass of each image per unit. Where
    the units are averaged for the final linear layer, one pass in all: their share of the logit.
    """
    with suppress(UsageError):
        if layer == find_penultimate_layer(classifier, x):
            features, weight, _ = observe_head(classifier, x)
            return (features.double().mean((2, 3)) * weight[y]).abs().cpu()
    width = measure_activations(classifier, x[:1], layer).shape[1]

    def logit(model: Classifier) -> Tensor:
        logits: Tensor = model(x)
        return logits.double().gather(1, y.unsqueeze(1))

    whole = logit(classifier)
    columns = []
    progress.begin("Leaving out units", width)
    for unit in range(width):
        keep = torch.ones(width)
        keep[unit] = 0
        columns.append((logit(mask_units(classifier, layer, keep)) - whole).abs())
        progress.advance(1)
    progress.end()
    return torch.cat(columns, 1).cpu()
