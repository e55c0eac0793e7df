"""Other networks that adversarial images are judged on: how far they transfer.

Images are made on one network, the source, and shown to others, each with its own architecture
and normalisation. That is no defense of the source: nobody chose the other network to protect it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from robusteval.datasets.dataset import Data, Positions
from robusteval.errors import UsageError, check_argument
from robusteval.evaluation.defense import ReadyDefense
from robusteval.models.admission import check_images, check_labels, wrap_module
from robusteval.models.classifier import Classifier
from robusteval.models.identity import hash_model, identify_model
from robusteval.runs.types import Spec


@dataclass(frozen=True)
class Receiver(ReadyDefense):
    """A network that images made on another one are judged on, in the form of a `Defense`."""

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of it: file, hash, architecture, normalisation."""
        known, wanted = self.identity["is"], ("file", "sha256", "arch", "mean", "std", "dtype")
        return {name: known[name] for name in wanted if name in known}


def prepare_receivers(
    networks: Mapping[str, nn.Module], source: Classifier, data: Data, index: Positions
) -> tuple[Receiver, ...]:
    """Check other networks against the source and the images.

    Parameters
    ----------
    networks : mapping of str to nn.Module
        By the names that reports give them.
    source : Classifier
        What is attacked.
    data : Data
        Images with labels as the source counts them.
    index : ndarray
        Positions in `data` of the images of the run.

    Raises
    ------
    UsageError
        If one tells other classes apart, cannot take the images, or is the source itself.
    """
    check_argument("targets", networks, Mapping, 'give networks by name: {"other": model}')
    found = []
    for name, network in networks.items():
        model = network if isinstance(network, Classifier) else wrap_module(network, data)
        if model.num_classes != source.num_classes:
            raise UsageError(
                f"the target {name} tells {model.num_classes} classes apart, the network attacked"
                f" {source.num_classes}: images can only be judged on networks of the same classes"
            )
        names = [each.class_names for each in (model, source)]
        if all(names) and list(names[0] or ()) != list(names[1] or ()):
            raise UsageError(
                f"the target {name} calls its classes otherwise, or counts them in another order"
                " than the network attacked: a label would mean something else to it"
            )
        if hash_model(model) == hash_model(source):
            raise UsageError(
                f"the target {name} is the network that is attacked: name another one, what"
                " becomes of this one is reported anyway"
            )
        check_labels(data, index, model)
        check_images(data, index, model)
        identity = {"receives": name, "is": identify_model(model, data, index)}
        found.append(Receiver(Spec(name, {}), model, identity))
    return tuple(found)
