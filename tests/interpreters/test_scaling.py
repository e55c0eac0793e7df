"""What is done to maps after they are made."""

from __future__ import annotations

import torch

from robusteval.interpreters.scaling import highest_cells, min_max, resize


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


def test_min_max_stretches_each_map_and_leaves_a_constant_one_empty() -> None:
    maps = torch.tensor([[1.0, 3.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]]).view(2, 1, 2, 2)
    expected = torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)

    assert torch.equal(min_max(maps), expected)
    assert len(min_max(maps[:0])) == 0


def test_resizing_keeps_a_constant_and_interpolates_between_cells() -> None:
    ramp = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)

    assert resize(ramp, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
