"""What is done to maps after they are made."""

from __future__ import annotations

import torch

from robusteval.interpreters.scaling import highest_cells


def test_the_highest_cells_are_counted_in_the_open() -> None:
    """With ties, and none at the bottom."""
    rising = torch.arange(10.0)[None]

    assert highest_cells(rising, 0.2).nonzero()[:, 1].tolist() == [8, 9]
    assert not highest_cells(torch.ones(1, 16), 0.2).any()
    assert highest_cells(torch.eye(4).flatten()[None], 0.05).nonzero()[:, 1].tolist() == [
        0,
        5,
        10,
        15,
    ]
    few = torch.zeros(1, 25)
    few[0, 0] = 1  # zeros are not among the highest, though five cells were asked for
    assert highest_cells(few, 0.2).sum() == 1


def test_each_map_has_highest_cells_of_its_own() -> None:
    """Rows do not mix."""
    maps = torch.tensor([[1.0, 2, 3, 4], [40.0, 30, 20, 10]])

    assert highest_cells(maps, 0.25).tolist() == [
        [False, False, False, True],
        [True, False, False, False],
    ]
