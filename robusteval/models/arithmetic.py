"""Arithmetic that gives the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 and the same kernels every time; torch's switches restored afterwards."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32
    with torch.backends.cudnn.flags(
        enabled=bool(torch.backends.cudnn.enabled),
        benchmark=False,
        deterministic=True,
        allow_tf32=False,
    ):
        try:
            matmul.allow_tf32 = False
            yield
        finally:
            matmul.allow_tf32 = tf32
