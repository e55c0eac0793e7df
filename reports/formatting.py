"""Numbers and names as every format shows them: shares, distances, times, threats, files.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from typing import Any, Protocol

from robusteval.runs.types import format_number

from .measures import CORRUPTION, CostRecord, Facts, ThreatRecord

MISSING = "–"


class CountedImages(Protocol):
    """Some of `n` images."""

    @property
    def k(self) -> int:
        """How many."""
        ...

    @property
    def n(self) -> int:
        """Of how many."""
        ...


class CountedShare(CountedImages, Protocol):
    """Some of `n` images, with the interval of their share."""

    @property
    def low(self) -> float:
        """The lower end."""
        ...

    @property
    def high(self) -> float:
        """The upper end."""
        ...


def format_percent(rate: CountedImages) -> str:
    """A share as ``12.4 %``, never rounded to all or nothing; whole up to 100 images."""
    k, n = rate.k, rate.n
    if n == 0:
        return MISSING
    text = f"{100 * k / n:.{choose_decimals(n)}f}"
    if k and not float(text):
        return "< 0.1 %"
    if k < n and float(text) == 100:
        return "> 99.9 %"
    return f"{text} %"


def format_rate(rate: CountedShare) -> str:
    """A share with its interval, as ``12.4 % (9.8–15.6)``."""
    if rate.n == 0:
        return MISSING
    d = choose_decimals(rate.n)
    return f"{format_percent(rate)} ({100 * rate.low:.{d}f}–{100 * rate.high:.{d}f})"


def choose_decimals(n: int) -> int:
    """Digits after the point that a share of `n` images deserves."""
    return 0 if n <= 100 else 1


def format_quantity(value: float | None) -> str:
    """A number to three digits."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_similarity(value: float | None) -> str:
    """An SSIM to four digits, never rounded to identity."""
    if value is None:
        return MISSING
    return "> 0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def format_decibels(value: float | None) -> str:
    """A PSNR with its unit."""
    return MISSING if value is None else f"{value:.1f} dB"


def format_share(value: float | None) -> str:
    """A part of one as a percentage to a tenth, ``12.4 %``."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def format_points(value: float | None) -> str:
    """A difference of shares, ``3.2 points``."""
    return MISSING if value is None else f"{100 * value:.1f} points"


def format_ends(low: float, high: float) -> str:
    """The ends of a difference of shares in points, ``-1.2 to +3.4``."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def format_duration(seconds: float | None) -> str:
    """A time to about two digits."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_count(n: int, noun: str) -> str:
    """A number of things, as ``1 attack`` or ``2,000 attacks``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


# what a radius is a number of, where it is no distance
COUNTED_IN = {"l0": "value", "l0_pixels": "pixel"}


def format_threat(threat: ThreatRecord, shift: float | None = None) -> str:
    """A threat model, as ``linf eps 8/255 (0.0314)``; of turns with the `shift`, if known."""
    goal = " targeted" if threat.targeted else ""
    if threat.norm == CORRUPTION and threat.eps is not None:
        return f"corruption of severity {threat.eps:g}"
    if threat.norm == "patch" and threat.eps is not None:
        return f"patch of {100 * threat.eps:g} % of the image{goal}"
    if threat.norm == "spatial" and threat.eps is not None:
        far = "" if shift is None else f" up to {100 * shift:g} %"
        return f"rotation up to {threat.eps:g} degrees with shifts{far}{goal}"
    if threat.norm == "none":
        radius = "" if threat.eps is None else f", {format_budget(threat)}"
        return f"no stated norm{radius}{goal}"
    return f"{threat.norm}{',' if is_unbounded(threat) else ''} {format_budget(threat)}{goal}"


def is_unbounded(threat: ThreatRecord) -> bool:
    """Whether a threat has neither a radius nor a distance that its attacks minimise."""
    return threat.norm == "ssim" and threat.eps is None


def format_budget(threat: ThreatRecord) -> str:
    """A radius on both scales."""
    eps, levels = threat.eps, threat.eps_255
    if eps is None:
        return "no fixed radius" if is_unbounded(threat) else "minimum norm"
    if threat.norm in COUNTED_IN:
        return f"up to {format_count(round(eps), COUNTED_IN[threat.norm])}"
    if levels is None:
        return f"eps {format_number(eps)}"
    if format_number(eps) == levels:
        return f"eps {levels} ({eps:.3g})"
    return f"eps {eps:g} ({eps * 255:.4g}/255)"


def format_place(threat: ThreatRecord, defense: str | None) -> str:
    """A threat, and the defense that stands before the model."""
    return format_threat(threat) + (f" behind {defense}" if defense else "")


def name_attack(spec: str, defense: str | None) -> str:
    """An attack, and the defense that it was up against."""
    return f"{spec} behind {defense}" if defense else spec


def format_passes(cost: CostRecord) -> str:
    """Forward and backward passes per attacked image."""
    return f"{format_quantity(cost.forwards)} / {format_quantity(cost.backwards)}"


def join_parts(*parts: Any) -> str:
    """Those parts that are not empty, with commas between them."""
    return ", ".join(str(part) for part in parts if part) or MISSING


def name_file(path: Any) -> str:
    """A file without the folders above it, which are nobody's business."""
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2] if path else ""


def format_hash(facts: Facts) -> str:
    """Enough of a hash to tell files apart."""
    return f"sha256 {str(facts['sha256'])[:12]}" if facts.get("sha256") else ""


def format_shape(data: Facts) -> str:
    """The size of an image, as ``3×32×32``."""
    return "×".join(str(size) for size in data.get("shape") or ())


def format_range(data: Facts) -> str:
    """Darkest and brightest pixel, as ``pixels 0 to 1``."""
    ends = data.get("range")
    return f"pixels {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""


def format_normalisation(model: Facts) -> str:
    """What is done to pixels inside the model."""
    sides = (
        f"{name} {' '.join(f'{value:.4g}' for value in model[name])}"
        for name in ("mean", "std")
        if model.get(name)
    )
    return join_parts(model.get("normalisation"), *sides) if model.get("mean") else "none"
