"""The report of a fitted detector, laid out from its one record: tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from robusteval.runs.detector_record import (
    AttackFigures,
    DetectorRecord,
    Estimate,
    Headline,
    Proportion,
    SimplerRule,
    TransferFigures,
    TreeChoice,
)
from robusteval.runs.plain import to_plain
from robusteval.runs.types import spell_json

from .console import (
    build_empty_table,
    make_printable,
    print_facts,
    print_heading,
    print_list,
    print_paragraph,
    print_trimmed,
)
from .formatting import format_rate

MANY = 4  # attacks, from more of which on the matrix has no room for intervals


def render_detector_json(record: DetectorRecord) -> str:
    """The record as JSON text, ASCII only."""
    return spell_json(json.dumps(to_plain(record), indent=1)) + "\n"


def print_detector(record: DetectorRecord, console: Console) -> None:
    """Print all figures, in tables of 80 columns."""
    print_paragraph(console, write_headline(record), "bold")
    print_heading(console, "Attacks it has learnt from")
    for i, attack in enumerate(record.attacks, 1):
        print_paragraph(
            console, f"{i}  {attack.attack}: succeeds on {attack.k} of {attack.n} images"
        )
    print_attacks(record, console)
    print_false_alarms(record, console)
    print_simpler_rules(record, console)
    print_transfer(record, console)
    print_leak_checks(record, console)
    print_facts(console, describe_detector_fit(record))
    marks = [f"{'!' if remark.grave else '-'} {remark.text}" for remark in record.remarks]
    print_list(console, "Remarks", marks)


def write_headline(record: DetectorRecord) -> str:
    """The one thing to know."""
    head = record.headline
    at = head.at["0.05"]
    return (
        f"AUC {write_area(head.auc)} on images that had no say: of {at.tpr.n} attacked ones"
        f" {write_proportion(at.tpr)} are flagged at a threshold set for 5 % false alarms, of"
        f" {at.fpr.n} as they are {write_proportion(at.fpr)}."
    )


def print_attacks(record: DetectorRecord, console: Console) -> None:
    """What is found of each attack, and of all."""
    rows = [
        [str(i), *write_detection(found), break_interval(write_proportion(found.undetected))]
        for i, found in enumerate(record.per_attack, 1)
    ]
    if len(rows) > 1:
        rows.append(["all", *write_detection(record.headline), ""])
    heads = ["attack", "AUC", "flagged\nat 5 %", "flagged\nat 1 %", "successful and\nnot flagged"]
    print_section(console, "Attacked images", heads, rows)


def print_false_alarms(record: DetectorRecord, console: Console) -> None:
    """What is flagged of images without any attack."""
    rows = [
        [
            f"{alarms.kind} ({alarms.flagged['0.05'].n})",
            *(write_proportion(alarms.flagged[fpr]) for fpr in ("0.05", "0.01")),
        ]
        for alarms in record.negatives
    ]
    heads = ["images", "flagged\nat 5 %", "flagged\nat 1 %"]
    print_section(console, "Images without any attack", heads, rows)


def print_simpler_rules(record: DetectorRecord, console: Console) -> None:
    """What simpler rules, and the same one with fewer channels, find of the same attacks."""
    rows = [["this detector", *write_detection(record.headline)[:2], ""]]
    for rule in record.baselines:
        gain = break_interval(write_gain(rule.gain))
        rows.append([rule.name, *write_detection(rule)[:2], gain])
    for fewer in record.simpler:
        gain = break_interval(write_gain(fewer.gain))
        rows.append([f"the same on {fewer.name}", write_area(fewer.auc), "", gain])
    heads = ["rule", "AUC", "flagged\nat 5 %", "AUC gained\nby this detector"]
    print_section(console, "Against simpler ones", heads, rows)


def print_transfer(record: DetectorRecord, console: Console) -> None:
    """What a fit on each attack finds of each; nothing for one attack."""
    names = [found.attack for found in record.per_attack]
    if len(names) < 2:
        return
    narrow = len(names) > MANY

    def write_figures(cell: TransferFigures) -> str:
        area = f"{cell.auc.value:.3f}" if narrow else break_interval(write_area(cell.auc))
        return f"{area}\n{write_proportion(cell.tpr).partition(' (')[0]}"

    rows = []
    for row in record.matrix:
        first = "all" if row.fitted_on is None else str(names.index(row.fitted_on) + 1)
        rows.append([first, *map(write_figures, row.judged_on)])
    heads = ["fitted on", *(f"judged on {i}" for i in range(1, len(names) + 1))]
    title = "Fitted on one attack, judged on another: AUC, flagged at 5 %"
    print_section(console, title, heads, rows)


def print_leak_checks(record: DetectorRecord, console: Console) -> None:
    """Whether the procedure finds something where there is nothing."""
    leaks = record.leaks
    rows = [
        ["labels exchanged within each image", write_area(leaks.shuffled), "0.5"],
        ["two copies of different noise", write_area(leaks.benign), "0.5"],
        ["attacked or not, parted by image", write_area(record.headline.auc), "as above"],
        ["attacked or not, parted by row", write_area(leaks.row_wise), "for comparison"],
    ]
    print_section(console, "Is there a leak?", ["what is told apart", "AUC", "should be"], rows)


def describe_detector_fit(record: DetectorRecord) -> list[tuple[str, str]]:
    """What else is known of a detector: names, and what they are."""
    head, counts, cost = record.headline, record.images, record.cost
    at = head.at["0.05"]
    precise = f"not known without a false alarm among {at.fpr.n} images"
    if at.precision is not None:
        precise = f"{100 * at.precision:.1f} % of the flagged, were 1 of 100 images attacked"
    return [
        (
            "images",
            f"{counts.train} to fit on, {counts.validation} to stop and set thresholds,"
            f" {counts.test} to judge; {counts.alike} much like another, kept with it",
        ),
        (
            "at one half",
            f"accuracy {head.accuracy:.3f} with as many attacked as not, Brier score"
            f" {head.brier:.3f}, average precision {head.average_precision:.3f}",
        ),
        ("precision", precise),
        (
            "cost",
            f"{cost.forwards:.3g} forward passes per image, the prediction itself included;"
            f" measured {cost.times:.3g} times its duration",
        ),
        ("features", f"{record.features}, {record.rounds} trees"),
        ("trees", write_trees(record.trees)),
        ("imitation", write_imitation(record.imitation)),
    ]


def write_imitation(fidelity: float | None) -> str:
    """How near a network comes to the score that attacks can differentiate in its place."""
    if fidelity is None:
        return "a network fitted to the score, or the score itself, is the same for all images"
    return (
        "a network fitted to the score orders images that had no say like it: rank correlation"
        f" {fidelity:.2f}"
    )


def write_trees(trees: TreeChoice) -> str:
    """How the trees grow, and what that was chosen from."""
    said = f"depth {trees.depth}, rate {trees.rate:g}, {100 * trees.columns:.0f} % of the features"
    areas = [each.auc for each in trees.tried if math.isfinite(each.auc)]
    if not areas:
        return f"{said} each"
    return (
        f"{said} each: best of {len(trees.tried)} by cross-validation in which images stay whole"
        f" (AUC {min(areas):.3f} to {max(areas):.3f})"
    )


def print_section(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table with its title; the first column takes what room is left."""
    print_heading(console, title)
    console.print()
    shown = build_empty_table()
    for i, head in enumerate(heads):
        shown.add_column(render_lines(console, head), overflow="fold", no_wrap=i > 0)
    for row in rows:
        shown.add_row(*(render_lines(console, content) for content in row))
    print_trimmed(console, shown)


def render_lines(console: Console, content: str) -> Text:
    """Several lines of text as they are."""
    return Text("\n").join([make_printable(console, line) for line in content.split("\n")])


def write_proportion(found: Proportion) -> str:
    """A share with its interval."""
    return format_rate(found)


def write_area(found: Estimate) -> str:
    """An area under the ROC curve with its interval."""
    return f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def write_gain(found: Estimate) -> str:
    """A difference of areas with its interval."""
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def break_interval(number: str) -> str:
    """A number with its interval in the line below."""
    return number.replace(" (", "\n(")


def write_detection(found: Headline | AttackFigures | SimplerRule) -> list[str]:
    """AUC, and what is flagged at both thresholds."""
    flags = [break_interval(write_proportion(found.at[fpr].tpr)) for fpr in ("0.05", "0.01")]
    return [write_area(found.auc), *flags]
