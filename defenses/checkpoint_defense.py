"""Another checkpoint instead of the model: trained to withstand attacks, or with units masked."""

from __future__ import annotations

from functools import partial

from robusteval.errors import UsageError
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier
from robusteval.registry import DEFENSES


@DEFENSES.add("checkpoint")
def replace_by_checkpoint(
    model: Classifier, *, file: str = "", arch: str | None = None, weights: str | None = None
) -> Classifier:
    """A hardened checkpoint, such as `robusteval train` and `robusteval defend mask` write.

    Parameters
    ----------
    model : Classifier
        The undefended one, on whose device and in whose type the other computes. Where the file
        does not say how its network is built and fed, it is taken to be like this one.
    file : str
        What `robusteval.models.checkpoint.load` reads.
    arch, weights : str, optional
        As in `load`.

    Returns
    -------
    Classifier
        In eval mode, parameters frozen.

    Raises
    ------
    ValueError
        If no file is named.
    UsageError, Refused
        As `load` does.
    """
    if not file:
        raise ValueError("say which: checkpoint:file=FILE")
    open_file = partial(
        load,
        file,
        weights=weights,
        device=model.device,
        dtype=model.identity.get("dtype", "float32"),
    )
    try:
        replacement = open_file(arch=arch)
    except UsageError as error:
        if arch is not None or model.arch is None:
            raise
        arch = model.arch
        try:
            replacement = open_file(arch=arch)
        except UsageError:
            raise error from None
    if replacement.identity["normalisation"] != "none":
        return replacement
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return open_file(arch=arch, mean=mean, std=std)
