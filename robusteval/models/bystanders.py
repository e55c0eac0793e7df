"""Objects beside the weights in a file of PyTorch that nobody needs and that are not built.

Training scripts save their settings, scores and paths with the weights. In their place stands an
object that keeps nothing of what it is given, so that none of their own code runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.serialization import safe_globals

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_KINDS = ("Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64", "UInt8", "Bool")
BYSTANDERS = frozenset(
    (
        "argparse.Namespace",
        "types.SimpleNamespace",
        "datetime.datetime",
        "datetime.date",
        "datetime.timedelta",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.dtypes.{kind}DType" for kind in _KINDS),
        *(f"{core}.multiarray.scalar" for core in ("numpy.core", "numpy._core")),
        *(f"{core}.multiarray._reconstruct" for core in ("numpy.core", "numpy._core")),
        *(f"pathlib.{name}" for name in _PATHS),
        *(f"pathlib._local.{name}" for name in _PATHS),
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
    )
)


class Bystander:
    """Takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: object) -> Bystander:
        """An object, whatever it is made of."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...


@contextmanager
def stand_in() -> Iterator[None]:
    """Let torch make bystanders of these names, and know nothing of it afterwards."""
    with safe_globals([(Bystander, name) for name in BYSTANDERS]):
        yield
