"""How high the maps of two classes rise before and after an attack (arXiv:1904.02057, Figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from robusteval.analysis.focus import spread_over_images
from robusteval.analysis.summaries import OF_SHARES, average_images
from robusteval.runs.explanation_record import MapHeight


def compare_heights(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The highest value of each map as a share of the highest of its image in all views.

    Parameters
    ----------
    views : mapping of str to Tensor
        Maps ``(n, 1, h, w)`` of the same images; what is negative speaks against the class and
        counts as nothing.

    Returns
    -------
    dict of str to Tensor
        For each view ``(n,)`` from 0 to 1; nan for an image whose maps are positive nowhere.
    """
    tops = {view: maps.double().amax((1, 2, 3)).clamp_min(0) for view, maps in views.items()}
    highest = torch.stack(list(tops.values())).amax(0)
    highest = torch.where(highest > 0, highest, torch.nan)
    return {view: top / highest for view, top in tops.items()}


def measure_heights(
    maps: Mapping[str, Mapping[str, Tensor]], fooled: Tensor
) -> Iterator[MapHeight]:
    """Measure how high each map rises on the images that are fooled ``(n,)``, view by view."""
    if not bool(fooled.any()):
        return
    for name, views in maps.items():
        for view, heights in compare_heights(views).items():
            of_fooled = heights[fooled]
            yield MapHeight(
                map=name,
                view=view,
                height=average_images(of_fooled.cpu().numpy(), OF_SHARES),
                heights=spread_over_images(of_fooled, fooled),
            )
