"""Other people's exceptions become one sentence each; running out of memory stays what it is."""

import pytest
import torch

from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.models.failures import (
    is_out_of_memory,
    raise_as_run_error,
    raise_as_usage_error,
)


def test_what_breaks_is_one_line_with_its_type() -> None:
    with pytest.raises(RunError) as caught, raise_as_run_error("the attack broke"):
        raise KeyError("first\n   second")

    assert str(caught.value) == "the attack broke (KeyError: 'first\\n second')"


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
