"""What can be read of an attack that was run several times with other random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robusteval.analysis.papers.measures import Measured, Summary, summarize_median
from robusteval.runs.metrics import rate
from robusteval.runs.statistics import mean_interval
from robusteval.runs.types import Outcome, Values


class OverSeeds(NamedTuple):
    """A figure of one attack with several seeds; `read` takes values changed ``(seeds, n)``.

    These are infinite where an image was not fooled.
    """

    title: str
    summary: Summary
    read: Callable[[Values], Measured]


def stack_changes(outcomes: Sequence[Outcome]) -> Values:
    """Values changed ``(seeds, n)`` of the images that were right at first, inf if not fooled.

    Images are those of the first outcome in its order, found in the others by their content ids;
    ValueError if one of these lacks some.
    """
    wanted = outcomes[0].columns["id"][outcomes[0].attacked]
    rows = []
    for outcome in outcomes:
        place = {content: i for i, content in enumerate(outcome.columns["id"].tolist())}
        missing = [content for content in wanted.tolist() if content not in place]
        if missing:
            raise ValueError(f"{len(missing)} images were not run with every seed")
        changed = outcome.columns["l0"].astype(np.float64)
        fooled = np.where(outcome.success(), changed, np.inf)
        rows.append(fooled[[place[content] for content in wanted.tolist()]])
    return np.stack(rows)


def read_median(changed: Values) -> Measured:
    """The median over images of each image's median over seeds, infinite where that is."""
    return summarize_median(np.median(changed, 0) if changed.size else np.empty(0))


def read_spread(changed: Values) -> Measured:
    """The mean standard deviation over seeds, of images that are fooled with each of them."""
    always = np.isfinite(changed).all(0)
    return Measured(*mean_interval(changed[:, always].std(0, ddof=1)))


def read_always(changed: Values) -> Measured:
    """The share of images that are fooled with every seed."""
    found = rate(np.asarray(np.isfinite(changed).all(0)))
    return Measured(found.value, *found.interval, found.n)


OVER_SEEDS: Mapping[str, OverSeeds] = {
    "seeds_l0_median": OverSeeds(
        "values changed, median of medians over seeds; no end where most miss an image",
        "median",
        read_median,
    ),
    "seeds_l0_spread": OverSeeds(
        "standard deviation of values changed over seeds, mean of images", "mean", read_spread
    ),
    "seeds_fooled": OverSeeds("images fooled with every seed", "share", read_always),
}


def find_over_seeds(name: str) -> OverSeeds | None:
    """A figure over seeds by name; None if there is none of that name."""
    return OVER_SEEDS.get(name)
