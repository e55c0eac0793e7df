"""The numbers of a run as documents for others carry them, and what they may be evidence for.

A figure is a share with its interval and a pointer (RFC 6901) to where it stands in the JSON
report of the run. No figure leaves a run whose numbers are not to be used, and none is called a
pass: a requirement is met by a system and those who run it, not by a measurement.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from robusteval.runs.types import visible

from . import sentences
from .corruptions import CorruptionsRecord, format_mean
from .formatting import format_count, format_rate, format_threat, join_parts, name_file
from .measures import CORRUPTION, Facts, MeanRecord, RateRecord
from .record import RunRecord, to_json

CLEAN = "accuracy on images as they are"
ROBUST = "robust accuracy"
EIGHT_BIT = "robust accuracy after rounding to 8 bit"
CORRUPTED = "mean accuracy under corruptions"
FALSE_ALARMS = "false positive rate of the detector"
CAUGHT = "true positive rate of the detector"


class Figure(NamedTuple):
    """A share of images, or the mean of one over corruptions."""

    metric: str
    about: str  # threat and defense; empty: neither
    rate: RateRecord | MeanRecord
    pointer: str  # into the JSON report
    knowledge: frozenset[str] = frozenset()  # of the attacks that it is over

    @property
    def title(self) -> str:
        """Metric and circumstances in one line."""
        return join_parts(self.metric, self.about)

    @property
    def text(self) -> str:
        """The share with its interval."""
        rate = self.rate
        return format_mean(rate) if isinstance(rate, MeanRecord) else format_rate(rate)


def list_figures(record: RunRecord) -> list[Figure]:
    """List the shares that may be handed on; none of a run whose numbers are not to be used."""
    if record.misfed or sentences.explain_missing_number(record):
        return []
    return [each for each in gather_figures(record) if each.rate.n and each.rate.low is not None]


def gather_figures(record: RunRecord) -> Iterator[Figure]:
    """Go through a record for its shares."""
    yield Figure(CLEAN, "", record.clean_accuracy, "/clean_accuracy")
    for i, case in enumerate(record.worst_cases):
        about = join_parts(format_threat(case.threat), describe_defense(case.defense))
        if case.defense:
            about += ", which the attacks know" if case.adaptive else ", unknown to the attacks"
        at = f"/worst_cases/{i}/robust_accuracy"
        knowledge = frozenset(
            row.knowledge
            for row in record.attacks
            if (row.threat, row.defense) == (case.threat, case.defense)
        )
        if case.threat.norm == CORRUPTION:
            continue  # nobody chooses the worst of them: their means follow
        yield Figure(ROBUST, about, case.robust_accuracy.float, f"{at}/float", knowledge)
        yield Figure(EIGHT_BIT, about, case.robust_accuracy.eight_bit, f"{at}/eight_bit", knowledge)
    for i, found in enumerate(record.corruptions):
        yield from gather_means(found, f"/corruptions/{i}")
    for i, defense in enumerate(record.defenses):
        about = describe_defense(defense.spec)
        yield Figure(CLEAN, about, defense.clean_accuracy, f"/defenses/{i}/clean_accuracy")
        if defense.detector is None:
            continue
        at = f"/defenses/{i}/detector"
        yield Figure(FALSE_ALARMS, about, defense.detector.fpr, f"{at}/fpr")
        for k, row in enumerate(defense.detector.attacks):
            yield Figure(CAUGHT, join_parts(row.attack, about), row.tpr, f"{at}/attacks/{k}/tpr")


def gather_means(found: CorruptionsRecord, at: str) -> Iterator[Figure]:
    """The mean over all corruptions behind one defense, and that of each severity of several."""
    about = describe_defense(found.defense)
    over = join_parts(format_count(found.cells, "corruption"), about)
    yield Figure(CORRUPTED, over, found.accuracy, f"{at}/accuracy")
    for k, each in enumerate(found.severities if len(found.severities) > 1 else ()):
        said = join_parts(f"severity {each.severity:g}", about)
        yield Figure(CORRUPTED, said, each.accuracy, f"{at}/severities/{k}/accuracy")


def describe_defense(spec: str | None) -> str:
    """Behind what a figure was measured; empty: nothing."""
    return f"behind {spec}" if spec else ""


def list_limitations(record: RunRecord) -> list[str]:
    """List what has to be known beside the figures, as the report says it."""
    bound = "Robust accuracy is an upper bound: what these attacks have not broken yet."
    weak = "Trust checks found reasons to doubt these attacks, see the findings."
    found = [sentences.write_finding(finding)[2:] for finding in record.findings]
    if record.corruptions and not sentences.list_attacked_cases(record):
        bound = "No attacker was tried: what one would leave is not known."
    return [bound, *([weak] if record.upper_bound else []), *found, *list_absences(record)]


def list_absences(record: RunRecord) -> Iterator[str]:
    """What is not there."""
    if record.misfed or sentences.explain_missing_number(record) or not record.complete:
        yield record.verdict
    yield from sentences.write_absences(record)


class Reference(NamedTuple):
    """A place in a regulation, a standard or a catalogue that figures may be evidence for."""

    document: str
    place: str
    wants: str
    metrics: tuple[str, ...]
    knowledge: tuple[str, ...] = ()  # only figures over an attack with such knowledge

    def is_about(self, figure: Figure) -> bool:
        """Whether a figure speaks to it."""
        knows = not self.knowledge or not figure.knowledge.isdisjoint(self.knowledge)
        return figure.metric in self.metrics and knows


REFERENCES = (
    Reference(
        "Regulation (EU) 2024/1689 (AI Act)",
        "Article 15(3)",
        "levels of accuracy, declared with their metrics",
        (CLEAN,),
    ),
    Reference(
        "Regulation (EU) 2024/1689 (AI Act)",
        "Article 15(4)",
        "resilience regarding errors and faults of the system or its environment",
        (CORRUPTED,),
    ),
    Reference(
        "Regulation (EU) 2024/1689 (AI Act)",
        "Article 15(5)",
        "resilience against adversarial examples and model evasion",
        (ROBUST, EIGHT_BIT),
    ),
    Reference(
        "ISO/IEC TR 24029-1:2021",
        "statistical and empirical methods",
        "assessment of a neural network's robustness by tests; nothing here is a formal proof",
        (ROBUST, EIGHT_BIT, CORRUPTED),
    ),
    Reference("NIST AI RMF 1.0 (NIST AI 100-1)", "MEASURE 2.5", "validity, reliability", (CLEAN,)),
    Reference(
        "NIST AI RMF 1.0 (NIST AI 100-1)",
        "MEASURE 2.7",
        "security and resilience, evaluated and documented",
        (ROBUST, EIGHT_BIT),
    ),
    Reference("MITRE ATLAS", "AML.T0015", "evasion of a model", (ROBUST, EIGHT_BIT)),
    Reference(
        "MITRE ATLAS",
        "AML.T0043.000",
        "adversarial data by white-box optimization",
        (ROBUST, EIGHT_BIT),
        ("white-box",),
    ),
    Reference(
        "MITRE ATLAS",
        "AML.T0043.001",
        "adversarial data by black-box optimization",
        (ROBUST, EIGHT_BIT),
        ("black-box",),
    ),
    Reference(
        "MITRE ATLAS",
        "AML.M0015",
        "detection of adversarial inputs, as a mitigation",
        (CAUGHT, FALSE_ALARMS),
    ),
)


class Evidence(NamedTuple):
    """Figures of a run that speak to a reference."""

    reference: Reference
    figures: tuple[Figure, ...]

    @property
    def title(self) -> str:
        """What it may be evidence for."""
        return f"evidence for {self.reference.document}, {self.reference.place}"

    @property
    def text(self) -> str:
        """What is asked there, and the figures with their places in the JSON report."""
        said = (f"{each.title}: {each.text} [{each.pointer}]" for each in self.figures)
        return f"{self.reference.wants}: {'; '.join(said)}"


def list_evidence(record: RunRecord) -> list[Evidence]:
    """List the references to which a run has something to say, in the order of `REFERENCES`."""
    figures = list_figures(record)
    found = (
        Evidence(each, tuple(figure for figure in figures if each.is_about(figure)))
        for each in REFERENCES
    )
    return [each for each in found if each.figures]


def name_model(record: RunRecord) -> str:
    """What a model is called: its file, else its architecture."""
    model = record.provenance.model
    return visible(name_file(model.get("file")) or str(model.get("arch") or "classifier"))


def name_data(record: RunRecord) -> str:
    """What data are called."""
    return visible(name_file(record.provenance.data.get("name")) or "data")


def find_hash(facts: Facts) -> str:
    """A SHA-256 among facts as 64 hexadecimal digits; empty if there is none."""
    text = str(facts.get("sha256") or "").lower()
    return text if re.fullmatch("[0-9a-f]{64}", text) else ""


def name_record(record: RunRecord) -> uuid.UUID:
    """A name for what is written of a run, the same whenever it is written."""
    return uuid.uuid5(uuid.NAMESPACE_URL, to_json(record))


def name_document(names: Sequence[uuid.UUID]) -> str:
    """The URN of a document on runs of these names, the same whenever it is written."""
    return uuid.uuid5(uuid.NAMESPACE_URL, " ".join(map(str, names))).urn


def spell_time(record: RunRecord) -> str:
    """When a run was made, in UTC as SBOMs write it; the epoch where nobody knows."""
    try:
        made = datetime.fromisoformat(record.provenance.created)
    except ValueError:
        made = datetime.fromtimestamp(0, UTC)
    made = made if made.tzinfo else made.replace(tzinfo=UTC)
    return made.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_share(value: float | None) -> str:
    """A share to four digits behind the point, as documents of other makers hold numbers."""
    return "" if value is None else f"{value:.4f}"
