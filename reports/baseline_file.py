"""The file of a baseline: small, for the repository, with a digest of itself.

Its text depends on the run alone.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import UsageError
from robusteval.registry import parse
from robusteval.runs.plain import from_plain, to_plain
from robusteval.runs.reading import RECORD, read_text
from robusteval.runs.storage import digest
from robusteval.runs.types import Flags, Threat
from robusteval.runs.validation import check_threat

from .baseline import Baseline, BaselineCell, BaselineDefense, DataIdentity, ModelIdentity

KIND = "robusteval baseline"
VERSION = 1
# what reading a record raises that does not fit together
UNFIT = (AttributeError, KeyError, TypeError, ValueError, RecursionError, UsageError)


@dataclass(frozen=True)
class StoredThreat:
    """A threat in the file."""

    norm: str
    eps: float | None
    targeted: bool


@dataclass(frozen=True)
class StoredCell:
    """A cell in the file; `robust` is one bit per image, in base 64."""

    attack: str
    resolved: dict[str, Any]
    threat: StoredThreat
    defense: str | None
    adaptive: bool
    robust: str


@dataclass(frozen=True)
class StoredDefense:
    """A defense in the file; `clean` is one bit per image, in base 64."""

    defense: str
    fpr: float | None
    clean: str


@dataclass(frozen=True)
class StoredBaseline:
    """All that the file holds besides a digest of it; its keys are these names."""

    kind: str
    version: int
    created: str
    model: ModelIdentity
    data: DataIdentity
    seed: int | None
    versions: dict[str, str]
    images: int
    clean: str
    cells: tuple[StoredCell, ...]
    defenses: tuple[StoredDefense, ...]
    ids: str  # eight bytes per image, the lowest first, in base 64


def render_baseline(baseline: Baseline) -> str:
    """The baseline as JSON text: ASCII, the same for the same run, with a digest of itself.

    UsageError if `read_baseline` could not read it again, as of a run that somebody changed.
    """
    try:
        record = to_plain(store_baseline(baseline))
        whole = {**record, "digest": digest(record)}
        text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
        decode_baseline(json.loads(text))
    except UNFIT as error:
        raise UsageError(f"no baseline can be made of this run: {error}") from None
    return text


def store_baseline(baseline: Baseline) -> StoredBaseline:
    """The baseline as the file holds it."""
    return StoredBaseline(
        kind=KIND,
        version=VERSION,
        created=baseline.created,
        model=baseline.model,
        data=baseline.data,
        seed=baseline.seed,
        versions=baseline.versions,
        images=len(baseline.ids),
        clean=encode_bits(baseline.clean),
        cells=tuple(
            StoredCell(
                attack=cell.attack,
                resolved=cell.resolved,
                threat=StoredThreat(*cell.threat),
                defense=cell.defense,
                adaptive=cell.adaptive,
                robust=encode_bits(cell.robust),
            )
            for cell in baseline.cells
        ),
        defenses=tuple(
            StoredDefense(known.defense, known.fpr, encode_bits(known.clean))
            for known in baseline.defenses
        ),
        ids=encode_bytes(baseline.ids.astype("<u8").tobytes()),
    )


def encode_bytes(content: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(content).decode("ascii")


def encode_bits(bits: Flags) -> str:
    """A mask ``(n,)`` as text, eight images to a byte, the first in its highest bit."""
    return encode_bytes(np.packbits(bits).tobytes())


def decode_bits(text: str, n: int) -> Flags:
    """The reverse of `encode_bits`; ValueError if it is not of n images."""
    content = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(content) != (n + 7) // 8:
        raise ValueError(f"{len(content)} bytes for {n} images")
    bits: Flags = np.unpackbits(content, count=n).astype(np.bool_)
    return bits


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    UsageError if there is none, if it was written by a later version or changed by hand, or if it
    is damaged.
    """
    try:
        record = json.loads(read_text(path, RECORD))
    except OSError as error:
        raise UsageError(
            f"cannot read the baseline {path} ({error.strerror or error}):"
            " make one with `robusteval baseline update RUN`"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a baseline, or it is damaged: it is no JSON") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UsageError(
            f"{path} is not a baseline: make one with `robusteval baseline update RUN`"
        )
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UsageError(
            f"{path} has version {version}, this version of robusteval reads {VERSION}: install a"
            " newer one, or make the baseline again"
        )
    said = record.get("digest")
    if said is None or said != try_digest(record):
        raise UsageError(
            f"{path} was changed after it was made, or it is damaged: restore it, or make it again"
            " with `robusteval baseline update RUN`"
        )
    try:
        return decode_baseline(record)
    except UNFIT as error:
        raise UsageError(
            f"{path} is damaged ({error}): make it again with `robusteval baseline update RUN`"
        ) from None


def try_digest(record: dict[str, Any]) -> str | None:
    """The digest of a record; None if there are values in it that no record can have."""
    try:
        return digest({name: value for name, value in record.items() if name != "digest"})
    except (ValueError, RecursionError):
        return None


def decode_baseline(record: dict[str, Any]) -> Baseline:
    """The baseline in the record of a file; one of `UNFIT` if it does not fit together."""
    stored = from_plain(StoredBaseline, {k: v for k, v in record.items() if k != "digest"})
    ids = np.frombuffer(base64.b64decode(stored.ids, validate=True), dtype="<u8")
    n = len(ids)
    if stored.version != VERSION or stored.images != n or n == 0:
        raise ValueError(f"it holds {n} images where it names {stored.images}")
    baseline = Baseline(
        created=stored.created,
        model=stored.model,
        data=stored.data,
        seed=stored.seed,
        versions=stored.versions,
        ids=ids.astype(np.uint64),
        clean=decode_bits(stored.clean, n),
        cells=tuple(
            BaselineCell(
                attack=cell.attack,
                resolved=cell.resolved,
                threat=Threat(cell.threat.norm, cell.threat.eps, cell.threat.targeted),
                defense=cell.defense,
                adaptive=cell.adaptive,
                robust=decode_bits(cell.robust, n),
            )
            for cell in stored.cells
        ),
        defenses=tuple(
            BaselineDefense(known.defense, known.fpr, decode_bits(known.clean, n))
            for known in stored.defenses
        ),
    )
    titles = [cell.title for cell in baseline.cells]
    if len(set(titles)) < len(titles):
        raise ValueError("two of its cells have one name")
    for cell in baseline.cells:
        digest(cell.settings)  # its parts can be read
        check_threat(cell.threat, f"the cell {cell.title}")
        right = baseline.clean_behind(cell.defense)
        if right is None:
            raise ValueError(f"the cell {cell.title} is behind a defense that is not there")
        if (cell.robust & ~right).any():
            raise ValueError(f"the cell {cell.title} has robust images that were wrong before")
    for known in baseline.defenses:
        parse(known.defense)
        if known.fpr is not None and not 0 <= known.fpr <= 1:
            raise ValueError(f"the rate of false alarms of {known.defense} is none")
    return baseline
