"""The plain types that flow and are stored. NumPy and JSON only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs.showing import Showable
from robusteval.runs.slices import decode_slices

Values = np.ndarray[Any, Any]
Columns = dict[str, Values]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def keep_different(columns: Columns) -> Columns:
    """The rows of different images: of those with the same content `id` the first.

    An image that is in the data several times is one draw, not several.
    """
    ordered = np.sort(columns["id"]) if columns else np.zeros(0)  # fastest for a million
    if not (ordered[1:] == ordered[:-1]).any():
        return columns
    rows = np.sort(np.unique(columns["id"], return_index=True)[1])
    return {name: column[rows] for name, column in columns.items()}


class Threat(NamedTuple):
    """What the attacker may do: a norm, a radius (None: as near as possible), a goal."""

    norm: str
    eps: float | None
    targeted: bool

    def __str__(self) -> str:
        budget = "minimum" if self.eps is None else f"eps {format_number(self.eps)}"
        return f"{self.norm} {budget}" + (" targeted" if self.targeted else "")


class Spec(NamedTuple):
    """A name and the parameters a user gave; reads and prints as ``pgd:eps=8/255,steps=20``."""

    name: str
    parameters: dict[str, Any]

    def __str__(self) -> str:
        parameters = ",".join(
            f"{key}={format_value(value)}" for key, value in self.parameters.items()
        )
        return f"{self.name}:{parameters}" if parameters else self.name


def format_value(value: Any) -> str:
    """A parameter as a user would write it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return format_number(value) if isinstance(value, float) else str(value)


def format_number(value: float) -> str:
    """A number as a user would write it: grey levels as ``8/255``, others as decimals."""
    levels = round(value * 255) if 0 < value < 1 else 0
    exact = float(f"{value:g}") == value
    # of more levels only what is no short decimal and no simpler fraction: 128/255, but 0.4
    short = exact or gcd(levels, 255) > 5
    if levels / 255 == value and (1 <= levels <= 64 or not short):
        return f"{levels}/255"
    return f"{value:g}" if exact else repr(value)


STAGE = "passes:"  # begins the name of a column that holds the cost of a stage
TRANSFER = "transfer"  # the role of a cell that says what another network makes of the images
MADE = "made:"  # and of one that says whose success was kept


def name_cell(attack: Spec, defense: Spec | None, adaptive: bool) -> str:
    """What a cell is called where it has no result."""
    if defense is None:
        return str(attack)
    return f"{attack} behind {defense}" + ("" if adaptive else " (oblivious)")


# findings that say that model and data do not belong together as they are
MISFED = ("convention", "labels-permuted", "guessing", "black-images")


class Finding(NamedTuple):
    """Something a reader must know before believing a number."""

    code: str  # "zero-gradient", …
    grave: bool  # numbers are upper bounds at best or, if its code is in MISFED, of no use
    message: str  # one sentence
    cell: str | None = None  # the attack it is about

    @property
    def misfed(self) -> bool:
        """Whether it says that the model is fed wrongly."""
        return self.code in MISFED


@dataclass(frozen=True)
class Outcome:
    """One cell: an attack and what it did to each image.

    `columns` are ``(n,)`` arrays; the images of the run in their order, or for a probe the first
    few of those that were classified correctly:

    index, id, label : position in the data set, content id, true class
    pred_clean, attacked : clean prediction; whether it was right, hence attacked
    target : the class to reach, -1 if any other than the label will do
    pred_adv, pred_8bit, pred_png : predictions of the result as it is, rounded to 8 bit, and read
        back from a PNG file; -1 where logits were not finite, -2 where PNG cannot hold the image
    l0, l0_pixels, l1, l2, linf, psnr, ssim : distances, measured in float64 but for `ssim`
    margin_clean, margin_adv : logit of the label minus the best other
    confidence_adv : softmax probability of `pred_adv`
    forwards, backwards, seconds : the image's share of the cost
    fault : what had to be repaired before judging, bits 1 box, 2 ball, 4 not finite
    by_shortcuts : of an attack that took shortcuts, 1 where its result fooled the network through
        them alone, so that it was attacked again without, 2 where it did without alone, else 0
    passes:NAME : what the stage NAME of the attack cost, forwards and backwards, 0 where an image
        was not given to it
    made:NAME : whether the result is a success that this stage found
    score, flagged : behind a detector, what it says of the attacked image, and its alarm
    map_distance:NAME, map_iou:NAME, map_noise:NAME, map_floor:NAME, edge_energy, edge_area : where
        interpreters were asked for, see `robusteval.evaluation.map_changes.Measurement`; with them
        map_l2:NAME to noise_energy_ratio:NAME, see `robusteval.evaluation.change_places`
    """

    attack: Spec
    threat: Threat
    knowledge: str
    columns: Columns
    role: str = "attack"  # or the name of a probe
    notes: tuple[str, ...] = ()
    resolved: dict[str, Any] = field(default_factory=dict)
    defense: Spec | None = None  # None: the model as it is
    adaptive: bool = True  # the attack knew the defense

    @property
    def attacked(self) -> Flags:
        """The images ``(n,)`` that were right at first."""
        attacked: Flags = self.columns["attacked"]
        return attacked

    def success(self, pred: str = "pred_adv") -> Flags:
        """The attacked images ``(n,)`` on which the attack reached its goal.

        Judged by the column `pred`; logits that are not finite count for the attacker, and what
        a PNG file cannot hold is judged in float. An image that a detector flags is no success.
        """
        c = self.columns
        made = np.where(c[pred] == -2, c["pred_adv"], c[pred])
        reached = made != c["label"]  # also where that is the class to reach: it was left alone
        if self.threat.targeted:
            reached &= made == c["target"]
        success: Flags = self.attacked & (reached | (made == -1))
        return success & ~c["flagged"] if "flagged" in c else success

    def keep_different(self) -> Outcome:
        """The same without images that are there already; itself if all are different."""
        columns = keep_different(self.columns)
        return self if columns is self.columns else replace(self, columns=columns)

    def to_record(self) -> dict[str, Any]:
        """JSON-able: all but the columns."""
        return {
            "role": self.role,
            "attack": self.attack._asdict(),
            "threat": self.threat._asdict(),
            "knowledge": self.knowledge,
            "resolved": self.resolved,
            "notes": list(self.notes),
            "defense": self.defense and self.defense._asdict(),
            "adaptive": self.adaptive,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], columns: Columns) -> Outcome:
        """The outcome of a record and its columns; KeyError or TypeError if it is none."""
        return cls(
            attack=Spec(**record["attack"]),
            threat=Threat(**record["threat"]),
            knowledge=record["knowledge"],
            columns=columns,
            role=record["role"],
            notes=tuple(record["notes"]),
            resolved=record["resolved"],
            defense=Spec(**record["defense"]) if record.get("defense") else None,
            adaptive=record.get("adaptive", True),
        )


class Defended(NamedTuple):
    """A defense, and what it does to the images as they are.

    `clean` has the columns of `Run.clean`, as the defended model classifies; behind a detector
    also `score` and `flagged` ``(n,)``.
    """

    spec: Spec
    # "model": another network; "detector": alarms beside the same one; "receiver": another network
    # that what was made on the run's own is judged on, and no defense of it
    kind: str
    clean: Columns
    facts: dict[str, Any]  # threshold, fpr it was set at, forwards per prediction

    def keep_different(self) -> Defended:
        """The same without images that are there already."""
        return self._replace(clean=keep_different(self.clean))

    def to_record(self) -> dict[str, Any]:
        """JSON-able: all but the columns."""
        return {
            "role": self.kind if self.kind == "receiver" else "defense",
            "defense": self.spec._asdict(),
            "kind": self.kind,
            "facts": self.facts,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], columns: Columns) -> Defended:
        """The defense of a record and its columns; KeyError or TypeError if it is none."""
        return cls(Spec(**record["defense"]), record["kind"], columns, record["facts"])


class Picture(NamedTuple):
    """One image of a cell as people look at it."""

    place: str  # "easiest", "median" or "hardest" of those attacked
    row: int  # in the columns of its cell
    clean: np.ndarray[Any, Any]  # (h, w, c) uint8
    delta: np.ndarray[Any, Any]  # (h, w, c) float32, in units of the [0, 1] pixel range
    # by interpreter the maps before and after, (h', w') float16 in [0, 1]
    maps: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = MappingProxyType({})


@dataclass(frozen=True, repr=False)
class Run(Showable):
    """Everything a report needs; read with `load_run`, made by `robusteval.evaluation.evaluate`."""

    config: dict[str, Any]  # as resolved: attacks, samples, seed, …
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    # index, id, label, pred_clean, margin_clean, confidence_clean; where interpreters were asked
    # for also what their maps are worth, see `Measurement.measure_worth` in `map_changes`
    clean: Columns
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    status: str  # "complete", "incomplete"
    failures: dict[str, str] = field(default_factory=dict)  # attack -> why it has no result
    seconds: float = 0.0
    created: str = ""
    folder: str | None = None
    defenses: tuple[Defended, ...] = ()
    receivers: tuple[Defended, ...] = ()  # other networks that adversarial images are judged on

    @property
    def attacks(self) -> tuple[Outcome, ...]:
        """The cells that were asked for, without the probes."""
        return tuple(o for o in self.outcomes if o.role == "attack")

    @property
    def transfers(self) -> tuple[Outcome, ...]:
        """What `receivers` say of the images made on the network itself."""
        return tuple(o for o in self.outcomes if o.role == TRANSFER)

    def keep_different(self) -> Run:
        """The same without images that are there already; itself if all are different.

        What intervals and tests are made of: they take images for independent draws.
        """
        clean = keep_different(self.clean)
        if clean is self.clean:
            return self
        return replace(
            self,
            clean=clean,
            outcomes=tuple(outcome.keep_different() for outcome in self.outcomes),
            defenses=tuple(each.keep_different() for each in self.defenses),
            receivers=tuple(each.keep_different() for each in self.receivers),
        )

    @property
    def shard(self) -> str:
        """Which part of a run it is, such as ``3/16``; empty for a whole one."""
        return str(self.config.get("shard") or "")

    def list_asked(self) -> list[str]:
        """The names of the cells that the configuration asks for, behind defenses too."""
        asked = [*(self.config.get("attacks") or ()), *(self.config.get("cells") or ())]
        return list(dict.fromkeys(map(str, asked)))

    def list_unfinished(self) -> Iterator[str]:
        """What was asked for, and has neither a result nor an entry in `failures`.

        Whatever `status` says: cells and defenses are told by what the configuration asks for.
        """
        done = {name_cell(o.attack, o.defense, o.adaptive) for o in self.attacks}
        done.update(self.failures)
        unfinished = [cell for cell in self.list_asked() if cell not in done]
        yield from unfinished
        ready = {str(defended.spec) for defended in self.defenses}
        for defense in map(str, self.config.get("defenses") or ()):
            told = any(f" behind {defense}" in cell for cell in (*unfinished, *self.failures))
            if defense not in ready and not told:
                yield f"clean images behind {defense}"

    def list_missing(self) -> Iterator[str]:
        """What was asked for and has no result, each with the reason if there is one."""
        yield from (f"{cell}: {reason}" for cell, reason in self.failures.items())
        if not self.shard:
            yield from (f"{cell}: not finished" for cell in self.list_unfinished())

    def explain_incompleteness(self) -> str:
        """What a run is that is not `finished`, what to do about it, and what it lacks."""
        told = (
            f"shard {self.shard} of a run: join all shards with `robusteval merge` first"
            if self.shard
            else "not complete: give its command again to finish it"
        )
        return "; ".join([told, *self.list_missing()])

    @property
    def finished(self) -> bool:
        """Whether all that was asked for has a result."""
        whole = self.status == "complete" and not self.shard
        return whole and next(self.list_missing(), None) is None

    def __repr__(self) -> str:
        """One line for people: which model on which images, and what is left of its accuracy."""
        model = self.model.get("arch") or "a classifier"
        run = self.keep_different()
        right = run.clean["pred_clean"] == run.clean["label"] if run.clean else np.zeros(0)
        different = "different " if run is not self else ""
        parts = [f"{model} on {self.data.get('name', 'images')}", f"{len(right)} {different}images"]
        if len(right):
            parts.append(f"{right.mean():.1%} right")
        attackers = [o for o in run.attacks if o.threat.norm != "corruption"]
        plain = [o for o in attackers if o.defense is None and len(o.attacked) == len(right)]
        if plain:
            fallen = np.logical_or.reduce([outcome.success() for outcome in plain])
            attacks = "1 attack" if len(plain) == 1 else f"all of {len(plain)} attacks"
            parts.append(f"{(right & ~fallen).mean():.1%} after {attacks}")
        if self.defenses:
            parts.append("behind " + ", ".join(str(defense.spec) for defense in self.defenses))
        where = f", in {self.folder}" if self.folder else ""
        return visible(f"<Run of {', '.join(parts)}; {self.status}{where}>")

    def to_record(self) -> dict[str, Any]:
        """JSON-able: what ``run.json`` says besides its cells."""
        return {
            "status": self.status,
            "created": self.created,
            "seconds": self.seconds,
            "command": self.config.get("command", ""),
            "config": {name: value for name, value in self.config.items() if name != "command"},
            "model": self.model,
            "data": self.data,
            "environment": self.environment,
            "findings": [finding._asdict() for finding in self.findings],
            "failures": self.failures,
        }

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        cells: Iterable[tuple[Mapping[str, Any], Columns]],
        folder: str | None = None,
    ) -> Run:
        """The run of a record and its cells, each the record of one and its columns.

        KeyError, TypeError or ValueError if it is none.
        """
        clean: Columns = {}
        defenses, outcomes = [], []
        for cell, columns in cells:
            if cell["role"] in ("clean", "quality"):
                clean |= {**columns, **decode_slices(record["config"])}
            elif cell["role"] in ("defense", "receiver"):
                defenses.append(Defended.from_record(cell, columns))
            else:
                outcomes.append(Outcome.from_record(cell, columns))
        return cls(
            config={**record["config"], "command": record["command"]},
            model=record["model"],
            data=record["data"],
            environment=record["environment"],
            clean=clean,
            outcomes=tuple(outcomes),
            findings=tuple(Finding(**finding) for finding in record["findings"]),
            status=record["status"],
            failures=record["failures"],
            seconds=record["seconds"],
            created=record["created"],
            folder=folder,
            defenses=tuple(each for each in defenses if each.kind != "receiver"),
            receivers=tuple(each for each in defenses if each.kind == "receiver"),
        )


COMMAND = "##["  # how runners of GitHub and Azure know a command anywhere in a line


def spell_json(text: str) -> str:
    """JSON in which no runner finds a command: it stands in strings only, where it is escaped."""
    return text.replace(COMMAND, "#\\u0023[")


def spell_line(text: str) -> str:
    """The text as one line of a stream, of which neither a terminal nor a CI runner obeys a part.

    GitHub's runners look for commands in whatever a step prints: ``::`` at the start of a line,
    ``##[`` anywhere. Everything that is printed goes through here, or through the escaping of its
    format.
    """
    return visible(text).replace("::", ":\\x3a")


def visible(text: str) -> str:
    """The text with everything that would not show, or would steer a reader, spelled out.

    A reader is a terminal, or a CI runner: GitHub's and Azure's obey ``##[`` wherever it stands.
    """
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return shown.replace(COMMAND, "#\\x23[")
