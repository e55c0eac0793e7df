"""Whether corruptions get harder and go farther from one severity to the next, by run folder.

    python tests/benchmarks/bench_severities.py RUN...

Of each kind the accuracy and the mean l2 distance at each severity, and each step at which accuracy
rises or distance falls: the images gained and lost, the difference with Tango's interval for pairs,
and McNemar's exact p, corrected by Holm's method over all rises of the run. Then the means over
the fifteen kinds that are counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.attacks.severities import KINDS, SEVERITIES
from robusteval.reports.compare import compute_p
from robusteval.reports.corruptions import COUNTED_KINDS, group_by, is_corruption
from robusteval.runs.folder import load_run
from robusteval.runs.statistics import count_pairs, holm

Series = list[np.ndarray[Any, Any]]


def read_series(folder: Path) -> dict[str, tuple[Series, Series]]:
    """For each kind, by severity, which images ``(n,)`` are right and how far they went."""
    run = load_run(folder).keep_different()
    found = {}
    for kind, group in group_by([o for o in run.attacks if is_corruption(o)], "kind").items():
        steps = sorted(group, key=lambda o: float(o.resolved["severity"]))
        rows = [np.argsort(o.columns["id"]) for o in steps]
        right = [(o.attacked & ~o.success())[at] for o, at in zip(steps, rows, strict=True)]
        far = [o.columns["l2"][at] for o, at in zip(steps, rows, strict=True)]
        found[kind] = (right, [np.where(steps[0].attacked[rows[0]], d, np.nan) for d in far])
    return found


def print_run(folder: Path) -> None:
    """Print what a run says of severities."""
    series = read_series(folder)
    print(f"\n{folder.name}: {len(next(iter(series.values()))[0][0])} images")
    rises = []
    for kind in (kind for kind in KINDS if kind in series):
        right, far = series[kind]
        shares = " ".join(f"{100 * step.mean():5.1f}" for step in right)
        means = [float(np.nanmean(d)) for d in far]
        print(f"{kind:18s} {shares}   l2", " ".join(f"{d:6.2f}" for d in means))
        for i in range(len(right) - 1):
            change = count_pairs(right[i], right[i + 1])
            if change.gained > change.lost:
                rises.append((f"{kind} {i + 1} to {i + 2}", change))
            if means[i + 1] < means[i]:
                print(f"    falls in distance from severity {i + 1} to {i + 2}")
    ps = holm([compute_p(change) for _, change in rises])
    for (name, change), p in zip(rises, ps, strict=True):
        low, high = (-100 * end for end in reversed(change.interval))
        print(
            f"rises: {name}: {change.gained} gained, {change.lost} lost,"
            f" {-100 * change.drop:+.1f} points ({low:+.1f} to {high:+.1f}), p {p:.3g}"
        )
    counted = [series[kind] for kind in KINDS[:COUNTED_KINDS] if kind in series]
    for name, values in (
        ("accuracy", [100 * np.mean([r[s].mean() for r, _ in counted]) for s in range(SEVERITIES)]),
        ("l2", [np.mean([np.nanmean(f[s]) for _, f in counted]) for s in range(SEVERITIES)]),
    ):
        print(f"mean {name} over {len(counted)} kinds:", " ".join(f"{v:.1f}" for v in values))


def main() -> None:
    """Print each run."""
    for folder in sys.argv[1:]:
        print_run(Path(folder))


if __name__ == "__main__":
    main()
