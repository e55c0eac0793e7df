"""What names a classifier: in caches, in the folder of a run, and in what was fitted to it.

A hash belongs to one network. A classifier that is made from another one, by a mask, by a
transform of its images or by training, may take over what is known of it, but not its hash: see
`robusteval.models.classifier.WeightsHash`. It is then named by its own contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from robusteval.datasets.dataset import Data, Positions
from robusteval.models.classifier import MADE_FROM, Classifier, absorb, frozen
from robusteval.models.failures import raise_as_run_error
from robusteval.runs.storage import digest

FORMAT = 1  # of what goes into a hash; mask networks of rts are kept under it


def identify_model(classifier: Classifier, data: Data, index: Positions) -> dict[str, Any]:
    """The identity of a classifier; of one without a hash, with that of its weights and answers.

    Weights alone do not tell what code does with them, hence the logits of a few images.

    Parameters
    ----------
    classifier : Classifier
        The model, whole.
    data : Data
        Images that it takes.
    index : ndarray
        Positions in `data`, of which the first four are used.

    Returns
    -------
    dict
        JSON-able, with sha256, arch and num_classes at least.

    Raises
    ------
    RunError
        The network cannot take the images.
    """
    identity = classifier.identity
    if "sha256" in identity:
        return identity
    content = hashlib.sha256()
    _absorb_origin(content, classifier, identity)
    absorb(content, classifier.state_dict())
    what = "the network cannot take the images"
    with frozen(classifier), torch.no_grad(), raise_as_run_error(what):
        logits = classifier(data.batch(index[:4]).x.to(classifier.device))
    content.update(logits.cpu().numpy().tobytes())
    kind = type(classifier.network)
    return {
        "sha256": content.hexdigest(),
        "arch": f"{kind.__module__}:{kind.__qualname__}",
        "num_classes": classifier.num_classes,
        **identity,
    }


def hash_model(model: nn.Module) -> str:
    """SHA-256 of what a model computes: its file and normalisation, or all its tensors."""
    return _hash(model, model.identity if isinstance(model, Classifier) else {})


def hash_answers(model: nn.Module) -> str:
    """SHA-256 as by `hash_model`, the same with and without a detector beside the model."""
    return _hash(model, model.answers if isinstance(model, Classifier) else {})


def _hash(model: nn.Module, identity: Mapping[str, Any]) -> str:
    if isinstance(model, Classifier) and "sha256" in identity:
        normalisation = [model.mean.flatten().tolist(), model.std.flatten().tolist()]
        facts = [FORMAT, identity["sha256"], identity.get("arch_sha256"), normalisation]
        # of weights in float32 the hash is what it was before there were others
        return digest([*facts, identity["dtype"]] if "dtype" in identity else facts)
    inner = [part for part in model.modules() if isinstance(part, Classifier)]
    network = inner[0].network if len(inner) == 1 else model
    content = hashlib.sha256(f"{FORMAT} {network}".encode())
    _absorb_origin(content, model, identity)
    absorb(content, model.state_dict())
    return content.hexdigest()


def _absorb_origin(content: hashlib._Hash, model: nn.Module, identity: Mapping[str, Any]) -> None:
    """Let a hash take up what tells a model from others that were made from the same one.

    Some differ by a number in the code alone, such as the bits that images are rounded to.
    """
    if MADE_FROM in identity:
        facts = [dict(identity), list(_list_settings(model))]
        content.update(json.dumps(facts, sort_keys=True, default=repr).encode())


def _list_settings(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Module, name and value of every plain number and word that a module's code may look at."""
    for name, part in model.named_modules():
        for key, value in sorted(vars(part).items()):
            if isinstance(value, int | float | str | tuple) and key != "training":
                yield name, key, repr(value)
