"""Rotations and shifts: how images move, and what the grid finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import Affine, draw_uniform

from robusteval.attacks.spatial import list_moves, move, spatial

LEFT_OR_RIGHT = torch.zeros(2, 1, 8, 8)
LEFT_OR_RIGHT[0, ..., :4] = 1
LEFT_OR_RIGHT[1, ..., 4:] = 1


def draw_dots(*columns: int) -> Tensor:
    """Black images with a white pixel in row 3, at a column each."""
    x = torch.zeros(len(columns), 1, 8, 8)
    for i, column in enumerate(columns):
        x[i, :, 3, column] = 1
    return x


def test_whole_shifts_move_pixels_and_leave_black_behind() -> None:
    """To the bit where shares are whole pixels."""
    x = draw_uniform(2, 3, 10, 10)

    found = move(x, 0, 0.2, -0.1)

    torch.testing.assert_close(found[:, :, 2:, :9], x[:, :, :8, 1:], atol=1e-6, rtol=0)
    assert float(found[:, :, :2].abs().max()) < 1e-6
    assert float(found[:, :, :, 9].abs().max()) < 1e-6


def test_a_quarter_turn_is_that_of_the_array() -> None:
    """Square images; and no turn is the image itself."""
    x = draw_uniform(2, 3, 9, 9)

    turned = move(x, 90, 0, 0)

    either = [torch.rot90(x, k, (2, 3)) for k in (1, -1)]
    assert any(torch.allclose(turned, each, atol=1e-5) for each in either)
    assert torch.equal(move(x, 0, 0, 0), x)


def test_a_dot_is_moved_over_the_boundary_where_the_shift_reaches() -> None:
    """Of columns 3, 2 and 0 with a shift of up to two pixels, two cross the middle."""
    x, y = draw_dots(3, 2, 0), torch.zeros(3, dtype=torch.int64)

    found = spatial(Affine(LEFT_OR_RIGHT), x, y, degrees=0, shift=0.25, angles=1, places=5)

    assert Affine(LEFT_OR_RIGHT)(found).argmax(1).tolist() == [1, 1, 0]


def test_small_moves_come_first_and_each_once() -> None:
    """Thirty-one angles and five by five shifts, as in the paper."""
    moves = list_moves(30, 0.1, 31, 5)

    assert len(moves) == 775
    assert moves[0] == (0, 0, 0)
    assert abs(moves[-1][0]) == 30
    assert list_moves(0, 0, 3, 2) == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("name", "value"), [("degrees", -1), ("degrees", 181), ("shift", 1.5), ("places", 0)]
)
def test_parameters_out_of_range_are_refused(name: str, value: float) -> None:
    """By name."""
    x, y = draw_dots(), torch.zeros(0, dtype=torch.int64)

    with pytest.raises(ValueError, match=name):
        spatial(Affine(LEFT_OR_RIGHT), x, y, **{name: value})  # type: ignore[arg-type]
