"""Patches: one square, where and how it is found."""

from __future__ import annotations

import pytest
import torch
from toys import Affine, draw_uniform

from robusteval.attacks.patch import draw_window, find_window, mark, patch
from robusteval.search.descent import build_class_objective


def corner(row: int, column: int) -> Affine:
    """Class 1 is what is bright in the 3 x 3 pixels from here; class 0 wants a quarter of that."""
    weight = torch.zeros(2, 1, 12, 12)
    weight[1, :, row : row + 3, column : column + 3] = 1
    weight[0] = 0.02
    return Affine(weight)


def test_the_square_is_found_where_the_network_looks() -> None:
    """On a linear network the gradient is its weight."""
    model, x = corner(5, 2), draw_uniform(2, 1, 12, 12) * 0.1
    objective = build_class_objective(model, torch.zeros(2).long(), targeted=False, loss="margin")

    window = find_window(objective, x, torch.ones_like(x), 3)

    assert torch.equal(window, mark(torch.tensor([5, 5]), torch.tensor([2, 2]), 3, x))


def test_only_one_square_of_the_size_changes_and_it_fools() -> None:
    """Six percent of 144 pixels are a square of two by two; nine percent of three."""
    model, x = corner(7, 8), draw_uniform(3, 1, 12, 12) * 0.05
    y = model(x).argmax(1)
    for share, side in ((0.0277, 1), (0.0625, 3)):
        found = patch(model, x, y, share=share, steps=20, places=2)
        changed = (found != x).any(1)
        for image in changed:
            rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
            assert int(rows.max() - rows.min()) < side
            assert int(columns.max() - columns.min()) < side
    assert bool((model(found).argmax(1) != y).all())


def test_drawn_squares_are_each_image_own_and_inside() -> None:
    """From its seed alone."""
    x, seeds = draw_uniform(4, 1, 9, 7), torch.tensor([1, 2, 3, 1])

    window = draw_window(seeds, x, 4)

    assert window.sum((1, 2, 3)).tolist() == [16] * 4
    assert torch.equal(window[0], window[3])
    assert torch.equal(draw_window(seeds[1:2], x[1:2], 4), window[1:2])


@pytest.mark.parametrize(
    ("name", "value"),
    [("share", 0), ("share", 1.5), ("share", 0.006), ("step", 0), ("steps", 0), ("places", 0)],
)
def test_parameters_out_of_range_are_refused(name: str, value: float) -> None:
    """By name."""
    x = draw_uniform(0, 1, 12, 12)

    with pytest.raises(ValueError, match=name):
        patch(corner(0, 0), x, torch.zeros(0).long(), **{name: value})  # type: ignore[arg-type]
