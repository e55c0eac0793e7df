"""What a training starts from: a network with random weights, and whether it fits the images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from robusteval.datasets.class_names import check_folders
from robusteval.datasets.dataset import Data
from robusteval.errors import UsageError
from robusteval.interpreters.heads import observe_head
from robusteval.models.architecture import build_network
from robusteval.models.classifier import Classifier, frozen

from .held_out import hold_out_images
from .training_settings import TrainingSettings

MEASURED = 2000  # images that mean and deviation are taken from


def build_untrained(
    arch: str,
    data: Data,
    settings: TrainingSettings,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> Classifier:
    """Build an architecture with random weights, for these images.

    Parameters
    ----------
    arch : str
        As in `robusteval.models.checkpoint.load`.
    data : Data
        The images that it will be trained on.
    settings : TrainingSettings
        How it will be trained; they decide the images that are measured.
    num_classes : int, optional
        Number of logits; as many as there are class names or labels if not given.
    mean, std : sequence of float, optional
        Normalisation per channel or one for all, both or neither; if not given, those of the
        first 2,000 images to train on.
    device : torch.device, optional
        The device that it goes to.

    Raises
    ------
    UsageError
        There is no such architecture, or one of mean and std is missing.
    """
    if (mean is None) != (std is None):
        raise UsageError("give both --mean and --std, or neither")
    labels = int(data.labels.max()) + 1 if len(data) else 0
    classes = num_classes or max(len(data.class_names or ()), labels, 2)
    built = build_network(arch, classes, {}, seed=settings.seed)
    if mean is None or std is None:
        x = data.batch(hold_out_images(data, settings.held_out, settings.seed)[0][:MEASURED]).x
        mean = [round(value, 4) for value in x.mean((0, 2, 3)).tolist()]
        std = [max(round(value, 4), 1e-4) for value in x.std((0, 2, 3)).tolist()]
    return Classifier(
        built.network,
        mean=mean,
        std=std,
        num_classes=classes,
        input_shape=data.shape,
        identity={"arch": built.name, "arch_sha256": built.sha256, "mean": mean, "std": std},
    ).to(device)


def find_input_channels(arch: str) -> int | None:
    """Find how many channels an architecture takes, where its first convolution says so."""
    network = build_network(arch, 2, {}).network
    first = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 3) else None


def check_trainable(
    classifier: Classifier, data: Data, positions: np.ndarray, settings: TrainingSettings
) -> None:
    """Raise UsageError if the network cannot be trained on these images in this way."""
    arch = str(classifier.identity.get("arch") or type(classifier.network).__name__)
    images = data.batch(positions[:2])
    x = images.x.to(classifier.device)
    with frozen(classifier), torch.no_grad():
        try:
            classes = classifier(x).shape[1]
        except Exception as error:  # whatever a network does on images it was not made for
            shape = "x".join(map(str, data.shape))
            text = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{arch} cannot take the images of {data.name} ({shape}): {text}"
            ) from None
        check_folders(data, classes)
        if int(data.labels.max()) >= classes:
            raise UsageError(
                f"{data.name} has labels up to {int(data.labels.max())}, {arch} has {classes}"
                " outputs: give --num-classes, or another checkpoint"
            )
        if classes != classifier.num_classes:
            raise UsageError(
                f"{arch} has {classes} outputs, not {classifier.num_classes}: give --num-classes"
                f" {classes}"
            )
        if settings.has_maps:
            try:
                observe_head(classifier, x)
            except ValueError:
                raise UsageError(
                    f"--objective {settings.objective} needs a network that ends in global average"
                    f" pooling and one linear layer, which {arch} does not: use adv or trades, or"
                    " such an architecture (robusteval:digits_cnn, torchvision:resnet18, ...)"
                ) from None


def check_extra(extra: Data, data: Data, held_out: np.ndarray) -> None:
    """Raise UsageError if more images to train on are of another form or other classes.

    Nor may they be among those of `data` at positions `held_out`, on which epochs are judged, as
    far as what is stored of them tells.
    """
    if extra.shape != data.shape:
        one, other = ("x".join(map(str, each.shape)) for each in (extra, data))
        raise UsageError(
            f"--extra-data {extra.name} has images of {one}, {data.name} of {other}: give both one"
            " --size, or images of one form"
        )
    if extra.class_names and data.class_names and extra.class_names != data.class_names:
        raise UsageError(
            f"--extra-data {extra.name} has other classes, or counts them in another order, than"
            f" {data.name}: a label would mean something else"
        )
    judged = {hash_image(data, position) for position in held_out.tolist()}
    found = [i for i in range(len(extra)) if hash_image(extra, i) in judged]
    if found:
        raise UsageError(
            f"--extra-data {extra.name} has {len(found)} of the images that are held out of"
            f" {data.name} to judge the network on, such as {extra.source.where(found[0])}: it"
            " would have seen them; give images that are not in --data"
        )


def hash_image(data: Data, position: int) -> bytes:
    """Hash what is stored of an image, without its label."""
    return hashlib.sha256(data.source.raw(position)).digest()


def replace_head(
    classifier: Classifier, data: Data, settings: TrainingSettings, num_classes: int | None
) -> Classifier:
    """The network of a checkpoint with a new last layer for the classes of other data.

    Everything but the last layer keeps its weights; what is new is drawn by the seed.

    Parameters
    ----------
    classifier : Classifier
        As it was loaded, with its architecture in the identity.
    data : Data
        The images that it will be trained on.
    settings : TrainingSettings
        Their seed decides the new weights.
    num_classes : int, optional
        Number of logits; as many as there are class names or labels if not given.

    Raises
    ------
    UsageError
        If other layers than the last depend on the number of classes.
    """
    identity = classifier.identity
    made = build_untrained(
        str(identity["arch"]),
        data,
        settings,
        num_classes=num_classes,
        mean=classifier.mean.flatten().tolist(),
        std=classifier.std.flatten().tolist(),
        device=classifier.device,
    )
    old, new = classifier.network.state_dict(), made.network.state_dict()
    # the head is what depends on the number of classes, which may be the same as before
    other = build_network(str(identity["arch"]), made.num_classes + 1, {}).network.state_dict()
    head = {name for name, v in new.items() if name not in other or other[name].shape != v.shape}
    kept = {
        name: old[name]
        for name, v in new.items()
        if name not in head and name in old and old[name].shape == v.shape
    }
    drawn = {name.rpartition(".")[0] for name in new if name not in kept}
    if not head:
        raise UsageError(
            f"{identity['arch']} has no last layer that follows the number of classes, so that it"
            " cannot have a new head"
        )
    if len(drawn) > 1 or len(kept) < len(old) - 2:
        raise UsageError(
            f"{identity['arch']} cannot have a new head for {made.num_classes} classes: other"
            f" layers change, too ({', '.join(sorted(drawn)[:4])})"
        )
    made.network.load_state_dict({**new, **kept})
    made.identity = {**made.identity, "head_of": identity.get("sha256")}
    return made
