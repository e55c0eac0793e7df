"""Runs for trackers of experiments, MLflow and Weights & Biases: handed on, never read back.

Both are imported only when they are asked for. Where they keep what they are given is theirs to
know, from their own environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from robusteval import __version__
from robusteval.errors import RunError, UsageError
from robusteval.runs.types import visible

from .evidence import find_hash, list_figures, list_limitations, name_data, name_model
from .html import to_html
from .measures import RateRecord
from .record import RunRecord, to_json

LONGEST = 200  # characters of a name, 50 below what MLflow takes
TEXT = 500  # characters of a value, as MLflow takes them in any version
WHERE = {
    "mlflow": "MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME",
    "wandb": "WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE",
}


class Tracked(NamedTuple):
    """What a tracker is given of a run."""

    name: str
    settings: dict[str, str]
    notes: dict[str, str]  # what has to be known beside the numbers
    numbers: dict[str, float]  # NAME, and with _low, _high and _n its interval and images
    files: dict[str, str]  # reports by name


def require_tracker(name: str) -> None:
    """UsageError if the tracker is not installed; looked up without importing it."""
    try:
        found = find_spec(name) is not None
    except ValueError:  # a module without a specification: there, but not from a file
        found = True
    if not found:
        raise UsageError(f"--log {name} needs the package {name}: pip install {name}")


def track(record: RunRecord, name: str) -> None:
    """Hand a run on to a tracker, as a run of its own there.

    UsageError if it is not installed, RunError if it did not take the run.
    """
    require_tracker(name)
    tracked = build_tracked(record)
    try:
        TRACKERS[name](import_module(name), tracked)
    except Exception as error:  # whatever a tracker, its network or its server raises
        text = visible(" ".join(str(error).split()))[:300]
        raise RunError(
            f"{name} did not take the run ({type(error).__name__}: {text}); it reads {WHERE[name]},"
            f" and `robusteval report {record.run.folder or 'RUN'} --log {name}` tries again"
        ) from error


def build_tracked(record: RunRecord) -> Tracked:
    """Everything of a run that trackers show; no number of one that is not to be used."""
    source = record.provenance
    settings = {
        "model": name_model(record),
        "model_sha256": find_hash(source.model),
        "arch": source.model.get("arch"),
        "data": name_data(record),
        "data_sha256": find_hash(source.data),
        "samples": source.data.get("samples"),
        "seed": source.seed,
        "attacks": "; ".join(row.spec for row in record.attacks),
        "robusteval": __version__,
    }
    gates = {} if record.gates is None else {"robusteval.gates": record.gates.outcome}
    notes = {
        "robusteval.verdict": record.verdict,
        "robusteval.limitations": " ".join(list_limitations(record)),
        "robusteval.upper_bound": str(record.upper_bound).lower(),
        "robusteval.command": source.command or "",
        "robusteval.folder": source.folder or "",
        **gates,
    }
    return Tracked(
        f"{name_model(record)} on {name_data(record)}",
        {key: shorten(str(value)) for key, value in settings.items() if value not in (None, "")},
        {key: shorten(value) for key, value in notes.items() if value},
        dict(list_numbers(record)),
        {"report.html": to_html([record]), "report.json": to_json(record)},
    )


def list_numbers(record: RunRecord) -> Iterator[tuple[str, float]]:
    """Each share with its interval and number of images, by a name that trackers take."""
    figures = list_figures(record)
    named = [(f"{figure.metric} {figure.about}", figure.rate) for figure in figures]
    if figures:
        named += [
            (f"attack {row.spec} {row.defense or ''}", row.robust_accuracy.float)
            for row in record.attacks
        ]
    taken: set[str] = set()
    for text, rate in named:
        name = spell_name(text)
        while name in taken:  # two that differ only in what a name cannot hold
            name += "_"
        taken.add(name)
        ends = {"": rate.value, "_low": rate.low, "_high": rate.high, "_n": rate.n}
        if isinstance(rate, RateRecord):
            ends["_k"] = rate.k
        yield from (
            (f"{name}{end}", float(value)) for end, value in ends.items() if value is not None
        )


def spell_name(text: str) -> str:
    """A name of letters, digits and underscores; eps once, in grey levels where it has them."""
    bare = re.sub(r" \([^)]*\)", "", text)
    return re.sub("[^A-Za-z0-9.]+", "_", bare).strip("_")[:LONGEST]


def shorten(text: str) -> str:
    """A text that trackers keep, its cut shown."""
    text = visible(text)
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"


def log_to_mlflow(mlflow: Any, tracked: Tracked) -> None:
    """A run of MLflow: parameters, metrics, tags, and the reports as artifacts."""
    with mlflow.start_run(run_name=tracked.name):
        mlflow.log_params(tracked.settings)
        mlflow.set_tags(tracked.notes)
        mlflow.log_metrics(tracked.numbers)
        for name, text in tracked.files.items():
            mlflow.log_text(text, name)


def log_to_wandb(wandb: Any, tracked: Tracked) -> None:
    """A run of Weights & Biases: config, summary, and the reports as an artifact."""
    config: Mapping[str, str] = {**tracked.settings, **tracked.notes}
    with wandb.init(name=tracked.name, job_type="robusteval", config=config) as run:
        run.summary.update(tracked.numbers)
        artifact = wandb.Artifact("robusteval", type="evaluation")
        for name, text in tracked.files.items():
            with artifact.new_file(name, encoding="utf-8") as file:
                file.write(text)
        run.log_artifact(artifact)


TRACKERS: dict[str, Callable[[Any, Tracked], None]] = {
    "mlflow": log_to_mlflow,
    "wandb": log_to_wandb,
}
