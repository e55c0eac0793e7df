"""What a network takes and gives, found by showing it images of nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from robusteval.errors import UsageError
from robusteval.models.built import Built
from robusteval.models.outputs import (
    Reading,
    describe_output,
    read_output,
    refuse_probabilities,
)
from robusteval.models.preparation import Shape
from robusteval.models.user_code import describe_exception

SIZES = (32, 28, 224)  # tried in this order where nothing says what images the network takes


class Probe(NamedTuple):
    """Channels (None if unknown) and classes of a network, and where its logits are."""

    channels: int | None
    classes: int
    reading: Reading


def probe_network(built: Built, shape: Shape | None) -> Probe:
    """Show a network black images, of a shape or of the usual ones; UsageError if none will do."""
    first = next((m for m in built.network.modules() if isinstance(m, nn.Conv2d)), None)
    channels = shape[0] if shape else first.in_channels if first else None
    candidates = [channels] if channels else [3, 1]
    shapes = [shape] if shape else [(c, size, size) for c in candidates for size in SIZES]
    failure: object = "it returned another number of rows"
    for c, h, w in shapes:
        x = torch.zeros(2, c, h, w)
        try:
            with torch.no_grad():
                output = built.network(x)
        except UsageError as error:  # of masks
            raise UsageError(f"the masks do not fit {built.name}: {error}") from None
        except Exception as error:  # whatever a network does on images it was not made for
            failure = describe_exception(error)
            continue
        reading = read_output(output, 2)
        if reading is None and isinstance(output, torch.Tensor) and output.ndim == 2:
            continue
        if reading is None:
            raise UsageError(
                f"{built.name} returned {describe_output(output)} for two images; a classifier"
                " returns one tensor (n, num_classes): wrap it in a module that picks it out"
            )
        refuse_probabilities(built.network, reading, x[:1])
        return Probe(c, reading.pick(output).shape[1], reading)
    if shape:
        raise UsageError(f"{built.name} cannot take images of shape {shape}: {failure}")
    matrices = [p for p in built.network.parameters() if p.ndim == 2]
    if not matrices:
        raise UsageError(f"{built.name} took no image of {SIZES} pixels a side: {failure}")
    return Probe(channels, len(matrices[-1]), Reading())
