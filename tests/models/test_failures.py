"""Other people's exceptions become one sentence each; running out of memory stays what it is."""

import re

import pytest
import torch
from torch import Tensor

from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.models.failures import (
    is_out_of_memory,
    raise_as_run_error,
    raise_as_usage_error,
    run_in_parts,
)


def test_what_breaks_is_one_line_with_its_type() -> None:
    with pytest.raises(RunError) as caught, raise_as_run_error("the attack broke"):
        raise KeyError("first\n   second")

    place = r", in test_failures\.py, line \d+\)"
    assert re.fullmatch(
        re.escape(r"the attack broke (KeyError: 'first\n second'") + place, str(caught.value)
    )


def test_a_long_message_is_cut() -> None:
    with pytest.raises(RunError) as caught, raise_as_run_error("it broke"):
        raise RuntimeError("a " * 1000)

    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "error",
    [
        UsageError("mend this"),
        Interrupted("stopped"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
)
def test_ours_and_memory_and_the_user_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, raise_as_run_error("it broke"):
        raise error

    assert caught.value is error


@pytest.mark.parametrize(
    ("name", "message", "sentence"),
    [
        (None, "steps must be positive", "steps must be positive"),
        ("pgd", "steps must be positive", "pgd: steps must be positive"),
        ("rts", "rts needs feature maps", "rts: needs feature maps"),
    ],
)
def test_a_value_error_is_a_mistake_of_the_user(
    name: str | None, message: str, sentence: str
) -> None:
    with pytest.raises(UsageError) as caught, raise_as_usage_error(name):
        raise ValueError(message)

    assert str(caught.value) == sentence


def test_other_errors_are_not_the_users() -> None:
    with pytest.raises(TypeError), raise_as_usage_error("pgd"):
        raise TypeError("ours")


def test_memory_is_known_by_type_and_by_words() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert not is_out_of_memory(RuntimeError("no such operator"))


@pytest.mark.parametrize(
    ("rows", "size", "room", "tried"),
    [
        (9, None, 3, [9, 4, 2, 2, 2, 2, 1]),
        (9, 8, 9, [8, 1]),
        (3, None, 2, [3, 2, 1]),  # not one and two: a part of two is the least
        (0, None, 9, [0]),
    ],
)
def test_parts_are_halved_until_they_fit_and_stay_as_small(
    rows: int, size: int | None, room: int, tried: list[int]
) -> None:
    asked: list[int] = []

    def work(part: Tensor) -> Tensor:
        asked.append(len(part))
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part**2

    least = 1 if rows == 9 else 2
    parts = run_in_parts(work, torch.arange(rows), size, least=least)

    assert asked == tried
    assert torch.cat([found for _, found in parts]).tolist() == [n**2 for n in range(rows)]


def test_part_that_is_least_is_not_halved() -> None:
    tried: list[int] = []

    def work(part: Tensor) -> None:
        tried.append(len(part))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_in_parts(work, torch.arange(8), least=4)
    assert tried == [8, 4]
