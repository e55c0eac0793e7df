"""Robustness evaluation and defense of image classifiers.

    import robusteval

    model = robusteval.load("net.pth", arch="net.py:Net")
    data = robusteval.open_data("val.npz")
    run = robusteval.evaluate(model, data, ["pgd:eps=8/255"])
    print(run)
    run.report("report.html")

Each public name is imported when it is first asked for, so that importing the package costs
nothing and needs no torch.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time see `__getattr__`
    from robusteval.analysis.explain import explain
    from robusteval.art.to_art import as_estimator
    from robusteval.datasets.arrays import from_arrays
    from robusteval.datasets.from_torch import from_dataset
    from robusteval.datasets.sources import open_data
    from robusteval.evaluation.evaluate import evaluate
    from robusteval.models.checkpoint import load
    from robusteval.models.classifier import Classifier
    from robusteval.runs.folder import load_run
    from robusteval.runs.metrics import robust_accuracy
    from robusteval.runs.types import Run

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Run",
    "as_estimator",
    "evaluate",
    "explain",
    "from_arrays",
    "from_dataset",
    "load",
    "load_run",
    "open_data",
    "robust_accuracy",
]

# where each public name is; a test holds this to the imports above
_MODULES = {
    "Classifier": "models.classifier",
    "Run": "runs.types",
    "as_estimator": "art.to_art",
    "evaluate": "evaluation.evaluate",
    "explain": "analysis.explain",
    "from_arrays": "datasets.arrays",
    "from_dataset": "datasets.from_torch",
    "load": "models.checkpoint",
    "load_run": "runs.folder",
    "open_data": "datasets.sources",
    "robust_accuracy": "runs.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # asked for only once
    return value


def __dir__() -> list[str]:
    rest = (n for n, v in globals().items() if n.startswith("__") or isinstance(v, ModuleType))
    return sorted({*rest, *__all__})
