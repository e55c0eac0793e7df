"""What a program sets of the process that it runs in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# tensors as of a forward pass, freed together as after a step; pages that the system gave out
STEPS = """
import resource, sys
import torch
from robusteval.models.environment import keep_freed_memory

kept = keep_freed_memory()
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**19) for _ in range(20)]
    del held
    given = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, given)
"""


def take_steps(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept in a process with such an environment, and pages of its last step."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, given = done.stdout.split()
    return kept == "True", int(given)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is another library's")
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    """40 MB are asked of the system once, unless the environment says otherwise."""
    kept, given = take_steps()
    handed_back, anew = take_steps(MALLOC_TRIM_THRESHOLD_="131072")

    assert kept
    assert given < 100
    assert not handed_back
    assert anew > 1000
