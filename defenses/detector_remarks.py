"""What a reader of a detector's report must not miss, in sentences."""

from __future__ import annotations

from robusteval.runs.detector_record import (
    DetectorRecord,
    DetectorRemark,
    Estimate,
    LeakChecks,
)

from .boosting import FPRS
from .detector_metrics import compute_ratio
from .detector_report import KEPT


def write_remarks(report: DetectorRecord) -> list[DetectorRemark]:
    """Write what a reader must not miss; `grave` if it speaks against the detector."""
    found = [*remark_leaks(report.leaks, report.images.total), *remark_alarms(report)]
    for baseline in report.baselines:
        if baseline.gain.low <= 0:
            text = f"It is not shown to do better than {baseline.name}"
            found.append(write_remark(True, f"{text}: AUC {show_gain(baseline.gain)}."))
    for simpler in report.simpler:
        better = simpler.gain.low > 0
        text = "It does better than" if better else "It is not shown to do better than"
        found.append(
            write_remark(not better, f"{text} on {simpler.name}: AUC {show_gain(simpler.gain)}.")
        )
    found += remark_transfer(report)
    found.append(
        write_remark(
            False,
            f"Its thresholds rest on {report.images.validation} images, the rates here on"
            f" {report.images.test}: for {show_percent(FPRS[1])} that is little.",
        )
    )
    return found


def write_remark(grave: bool, text: str) -> DetectorRemark:
    """Write one remark."""
    return DetectorRemark(grave, text)


def show_percent(part: float) -> str:
    """Show a share without digits after the point."""
    return f"{100 * part:.0f} %"


def show_gain(gain: Estimate) -> str:
    """Show a difference with its interval."""
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


FEW = 50  # images, below which a leak test that finds something may do so by chance


def remark_leaks(leaks: LeakChecks, images: int) -> list[DetectorRemark]:
    """Remark on a procedure that finds something where there is nothing, in so many images."""
    follows = "it leaks, and no figure here means anything"
    if images < FEW:
        follows = f"it leaks, or {images} images are too few to tell; give more --samples"
    found = []
    for area, what in (
        (leaks.shuffled, "images from their twins with labels exchanged"),
        (leaks.benign, "two copies of the same noise"),
    ):
        if abs(area.value - 0.5) > 0.05 and not area.low <= 0.5 <= area.high:
            found.append(
                write_remark(
                    True,
                    f"The same procedure tells {what} (AUC {area.value:.3f}), where there is"
                    f" nothing to find: {follows}.",
                )
            )
    return found


def remark_alarms(report: DetectorRecord) -> list[DetectorRemark]:
    """Remark on more false alarms than there should be."""
    often = [
        f"{each.kind} {show_percent(compute_ratio(each.flagged[KEPT]))}"
        for each in report.negatives
        if each.flagged[KEPT].n and each.flagged[KEPT].low > FPRS[0]
    ]
    if not often:
        return []
    text = f"More than {show_percent(FPRS[0])} are flagged of images without any attack"
    return [write_remark(True, f"{text}: {', '.join(often)}.")]


def remark_transfer(report: DetectorRecord) -> list[DetectorRemark]:
    """Remark on how little a detector of one attack finds of another."""
    found = []
    for row in report.matrix:
        for attack, cell in zip(report.per_attack, row.judged_on, strict=True):
            if row.fitted_on is not None and row.fitted_on != attack.attack:
                found.append((compute_ratio(cell.tpr), row.fitted_on, attack.attack))
    if not found:
        return []
    least, one, other = min(found)
    return [
        write_remark(
            least < 0.5, f"Fitted on {one} alone it flags {show_percent(least)} of {other}."
        )
    ]
