"""Robustness as a test among others: `assert_robust` in a test suite of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from robusteval.errors import UsageError
from robusteval.runs.types import Run, Spec, spell_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from robusteval.datasets.dataset import Data
    from robusteval.reports.record import GateRow

    Array = np.ndarray[Any, Any] | Tensor


def assert_robust(
    model: nn.Module | str | os.PathLike[str],
    data: Data | str | os.PathLike[str] | tuple[Array, Array],
    *,
    attack: str | Spec | Sequence[str | Spec],
    floor: float,
    samples: int | None = None,
    seed: int = 0,
    allow: Sequence[str] = (),
    allow_inconclusive: bool = False,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Attack a model, and raise unless its robust accuracy is at least `floor`.

    For each threat among the attacks the lower end of the Wilson 95 % interval of the worst case
    must not be below the floor, as in a gate of `robusteval check`; grave findings of the trust
    checks fail as they do there.

    Parameters
    ----------
    model : nn.Module, str or path
        A `Classifier`, any module that maps images in [0, 1] to logits, or the path of a
        checkpoint.
    data : Data, str, path, or pair of arrays or tensors
        As for the option ``--data``; or images (n, c, h, w), floats in [0, 1] or integers to 255,
        and labels (n,).
    attack : str or Spec, or several
        Such as ``"pgd:eps=8/255,steps=20"``; with a radius.
    floor : float
        Share of all images, in [0, 1].
    samples : int, optional
        Images drawn at random; all if not given. Fewer than a few hundred seldom decide.
    seed : int
        Decides the draw and every random number of the attacks.
    allow : sequence of str
        Codes of grave findings that are no reason to fail.
    allow_inconclusive : bool
        Accept a sample that leaves open on which side of the floor the model is.
    arch, mean, std, num_classes, weights
        How the checkpoint is read, as for `robusteval.load`; only with a path.
    classes : sequence of str, optional
        Names of the network's outputs in order, as for `robusteval.open_data`; only with data that
        are named.

    Raises
    ------
    AssertionError
        With the verdict, the interval, and what to do.
    UsageError
        For a mistake in what was asked.
    RunError, NothingEvaluated
        If an attack broke, or no image was classified correctly to begin with.
    """
    __tracebackhide__ = True
    from robusteval.evaluation.evaluate import evaluate
    from robusteval.reports.gate import check
    from robusteval.reports.gate_config import SHARE, Rule, Settings

    if not SHARE.holds(floor):
        raise UsageError(f"floor must be {SHARE} (0.4 is 40 %), not {floor!r}")
    given = {"arch": arch, "mean": mean, "std": std, "num_classes": num_classes, "weights": weights}
    network = load_network(
        model, {name: value for name, value in given.items() if value is not None}
    )
    attacks = [attack] if isinstance(attack, str | Spec) else list(attack)
    run = evaluate(
        network, prepare_images(network, data, classes), attacks, samples=samples, seed=seed
    )
    made = check(run, Settings(rules=(Rule(floor=floor),), allow=tuple(allow)))
    tolerated = ("passed", "inconclusive") if allow_inconclusive else ("passed",)
    unkept = [gate for gate in made.gates if gate.outcome not in tolerated]
    if unkept:
        raise AssertionError("\n".join(map(spell_line, explain_failure(run, unkept, floor))))


def load_network(model: nn.Module | str | os.PathLike[str], options: dict[str, Any]) -> nn.Module:
    """The model itself, or the one in a checkpoint that is read with these options."""
    if isinstance(model, str | os.PathLike):
        from robusteval.models.checkpoint import load

        return load(model, **options)
    if options:
        raise UsageError(
            f"{', '.join(options)}: only a checkpoint is read so, and the model is no path"
        )
    return model


def prepare_images(
    network: nn.Module,
    data: Data | str | os.PathLike[str] | tuple[Array, Array],
    classes: Sequence[str] | None = None,
) -> Data:
    """Images and labels as the network takes them; UsageError if they are none."""
    from robusteval.datasets.dataset import Data
    from robusteval.datasets.sources import open_data
    from robusteval.models.classifier import Classifier

    if classes is not None and not isinstance(data, str | os.PathLike):
        raise UsageError("classes are for data that are named: give these data their class names")
    if isinstance(data, Data):
        return data
    if isinstance(data, str | os.PathLike):
        name = os.fspath(data)
        if isinstance(network, Classifier):
            from robusteval.commands.session import open_images

            return open_images(network, name, "test", False, None, names=classes)
        return open_data(name, classes=classes)
    if not isinstance(data, tuple) or len(data) != 2:
        raise UsageError(
            "data must be a Data, a text as for --data, or a pair of images and labels, not"
            f" {type(data).__name__}"
        )
    return pair_up(*data)


def pair_up(x: Array, y: Array) -> Data:
    """Arrays or tensors as data, checked as those of a file are."""
    import numpy as np
    from torch import Tensor

    from robusteval.datasets.arrays import from_arrays

    pixels, labels = (
        part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
        for part in (x, y)
    )
    return from_arrays(pixels, labels, name="the pair (x, y)")


def explain_failure(run: Run, gates: Sequence[GateRow], floor: float) -> Iterator[str]:
    """The verdict, what was not kept, and what to do."""
    from robusteval.reports.build import build_record

    yield f"robust accuracy of at least {100 * floor:.6g} % is not shown"
    yield f"verdict: {build_record(run).verdict}"
    for gate in gates:
        yield f"{gate.outcome}: {gate.on}: {gate.reason}"
    if any(gate.kind == "findings" for gate in gates):
        yield "to do: mend what the finding says, or accept it with allow=[...] and its code"
    outcomes = {gate.outcome for gate in gates if gate.kind != "findings"}
    if "failed" in outcomes:
        yield "to do: harden the model, or lower the floor to what it really keeps"
    if "inconclusive" in outcomes:
        yield "to do: attack more images (samples=...), or accept it with allow_inconclusive=True"
