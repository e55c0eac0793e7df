"""A paper as a file declares it: what to run, and which published figure each result belongs to.

A file is TOML, ``NAME.toml`` in this folder; its keys are the fields of `Paper` and of what it
holds. See the README of this folder.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from itertools import product
from typing import Any, TypeVar

from robusteval.errors import UsageError
from robusteval.registry import explain_unknown, parse
from robusteval.registry.signatures import read_number

SIZES = ("small", "paper")

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Detectors:
    """What detectors of several interpreters are fitted to."""

    samples: int
    interpreters: tuple[str, ...]
    attacks: Mapping[str, str]  # by the name of the interpreter that an attack minds
    extractor: str = "raw"  # in the place of VGG-16, whose weights only a user has
    # of the detector that is attacked by those who know it: its interpreters, the attacks by short
    # name, where made_on=other stands for a detector of the attacker's own, and how many images
    watching: tuple[str, ...] = ()
    evasions: Mapping[str, str] = field(default_factory=dict)
    evaded: int = 0


@dataclass(frozen=True)
class Size:
    """How much is run: `small` in minutes on a small network, `paper` as published."""

    samples: int
    attacks: Mapping[str, Any] = field(default_factory=dict)  # in the place of those of the paper
    interpreters: tuple[str, ...] | None = None
    explained: int = 0  # images that are explained region by region
    detectors: Detectors | None = None
    seeds: int = 1  # with which attacks are run whose results are a matter of luck
    map_steps: int = 0  # of attacks on maps alone
    masked: int = 0  # images for masks of units: half rank the units, the others judge the mask

    def count_explained(self, samples: int | None) -> int:
        """How many images are explained if so many are asked for: of all, all that are asked for.

        Where some are explained, no more than these.
        """
        if samples is None:
            return self.explained
        return samples if self.explained >= self.samples else min(samples, self.explained)


@dataclass(frozen=True)
class Reading:
    """A number to be measured: of which attack, and what."""

    attack: str
    measure: str
    # of a sweep where its mean is this, as {"ssim": 0.998}, see `Results.choose_point`
    at: Mapping[str, float] = field(default_factory=dict)
    hardened: bool = False  # of the network that was trained as the paper proposes
    # of a sweep each image at the smallest setting that fools it, by the first of these parameters
    # that it has, as ("eps", "eps2")
    smallest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A row of a table: an attack for each of its columns, and what was published of it."""

    name: str
    attack: str = "{}"  # with the column in the place of the braces
    measure: str = ""  # that of the table if empty
    published: tuple[float | None, ...] = ()  # one for each column
    at: Mapping[str, float] = field(default_factory=dict)
    data: str = ""  # what it was published for; as the table says if empty
    needs: str = ""  # what is missing to measure it
    hardened: bool = False  # of the network that was trained as the paper proposes
    smallest: tuple[str, ...] = ()  # as of a reading


@dataclass(frozen=True)
class Table:
    """A table or a figure of the paper."""

    name: str  # "Table II"
    title: str
    columns: tuple[str, ...]
    rows: tuple[Line, ...] = ()
    measure: str = ""
    data: str = ""  # the data set and network that the figures were published for
    sweep: bool = False  # a line for each setting of an attack
    unpublished: str = ""  # why there is no published figure to stand beside
    needs: str = ""  # what is missing to measure all of it
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that can be tested on any network.

    Either `more` is larger than `than` on the same images, or `reaches` is at least `value`, or
    `above` is larger than `value`, which its interval must leave out.
    """

    text: str
    where: str
    more: Reading | None = None
    than: Reading | None = None
    reaches: Reading | None = None
    above: Reading | None = None
    value: float = 1.0


@dataclass(frozen=True)
class Paper:
    """A paper: where it stands, what is run for it, and what it has published."""

    name: str
    title: str
    source: str
    setting: str  # networks and data of the publication
    small: Size
    paper: Size
    attacks: Mapping[str, tuple[str, ...]]  # by short name; several are a sweep
    tables: tuple[Table, ...]
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # sweeps as one
    interpreters: tuple[str, ...] = ()
    explained: tuple[str, ...] = ()  # attacks that are explained region by region
    chaotic: tuple[str, ...] = ()  # attacks that are run with several seeds
    on_maps: Mapping[str, float] = field(default_factory=dict)  # radii of attacks on maps alone
    masked: Mapping[str, str] = field(default_factory=dict)  # units masked, as 8 or 1/4
    mask_attack: str = ""  # what ranks them, and what masks are judged by
    detectors: tuple[str, ...] = ()  # combinations of interpreters, as grad+cam:product
    scaled: tuple[str, ...] = ()  # attacks whose radius in l2 grows with the size of an image
    published_values: int = 0  # of an image that these radii are for
    labels: Mapping[str, str] = field(default_factory=dict)  # what columns and attacks are called
    claims: tuple[Claim, ...] = ()
    remarks: tuple[str, ...] = ()  # what is known of the publication

    def choose_size(self, size: str) -> Size:
        """What is run at a size."""
        return self.small if size == "small" else self.paper

    def list_attacks(self, size: str, values: int | None = None) -> dict[str, tuple[str, ...]]:
        """The attacks of a size by short name, for images of so many values, or as published."""
        found = {**self.attacks, **expand_attacks(self.choose_size(size).attacks)}
        if values is not None and self.scaled:
            factor = math.sqrt(values / self.published_values)
            for name in self.scaled:
                found[name] = tuple(scale_radius(text, factor) for text in found[name])
        for name, each in self.together.items():
            found[name] = tuple(dict.fromkeys(text for one in each for text in found[one]))
        return found

    def list_interpreters(self, size: str) -> tuple[str, ...]:
        """The interpreters of a size."""
        theirs = self.choose_size(size).interpreters
        return self.interpreters if theirs is None else theirs

    def list_evasions(self) -> list[str]:
        """The short names of attacks on a detector, of either size."""
        found = (self.choose_size(size).detectors for size in SIZES)
        return list(dict.fromkeys(n for each in found if each is not None for n in each.evasions))

    def with_extractor(self, extractor: str) -> Paper:
        """The same with other features of maps in its detectors."""
        small, paper = (
            each
            if each.detectors is None
            else replace(each, detectors=replace(each.detectors, extractor=extractor))
            for each in (self.small, self.paper)
        )
        return replace(self, small=small, paper=paper)

    @property
    def compares_hardened(self) -> bool:
        """Whether some of it is of a network that was trained as the paper proposes."""
        return any(reading.hardened for reading in list_readings(self))

    @property
    def compares_targets(self) -> bool:
        """Whether some of it is of another network that sees the adversarial images."""
        return any(reading.measure == "transfer" for reading in list_readings(self))

    def label(self, name: str) -> str:
        """What a column or an attack is called."""
        return self.labels.get(name, name)


def list_papers() -> Iterator[str]:
    """The names of the papers that are declared."""
    for file in sorted(files("robusteval.analysis.papers").iterdir(), key=lambda file: file.name):
        name, dot, suffix = file.name.rpartition(".")
        if dot and suffix == "toml":
            yield name


def read_paper(name: str) -> Paper:
    """The declaration of a paper; UsageError if there is none of that name."""
    known = list(list_papers())
    if name not in known:
        raise UsageError(explain_unknown("paper", name, [*known, "all", "list"]))
    text = files("robusteval.analysis.papers").joinpath(f"{name}.toml").read_text("utf-8")
    return build_paper(name, tomllib.loads(text))


def build_paper(name: str, declared: Mapping[str, Any]) -> Paper:
    """A paper from the values of its file; ValueError that says which of them is none."""
    given = dict(declared)
    for size in SIZES:
        values = dict(given.get(size, {}))
        if "detectors" in values:
            title = f"{name}: detectors of {size}"
            values["detectors"] = build(Detectors, values["detectors"], title)
        given[size] = build(Size, values, f"{name}: {size}")
    given["attacks"] = expand_attacks(given.get("attacks", {}))
    given["on_maps"] = {n: read_number(text) for n, text in given.get("on_maps", {}).items()}
    given["tables"] = tuple(build_table(name, each) for each in given.get("tables", ()))
    given["claims"] = tuple(
        build_claim(name, values)
        for each in given.get("claims", ())
        for values in expand_claim(each, given.get("labels", {}))
    )
    paper = build(Paper, {**given, "name": name}, name)
    known = {*paper.attacks, *paper.on_maps, *paper.detectors, *paper.list_evasions()}
    own = (expand_attacks(paper.choose_size(size).attacks) for size in SIZES)
    known.update(paper.masked, *own)
    joined = [one for each in paper.together.values() for one in each]
    for called in (*joined, *(reading.attack for reading in list_readings(paper))):
        if called not in known and (called in joined or called not in paper.together):
            raise ValueError(f"{name}: no attack is called {called}")
    return paper


def build_table(name: str, values: Mapping[str, Any]) -> Table:
    """A table from its values; each row has a figure, or a gap, for each column."""
    title = f"{name}: {values.get('name')}"
    rows = []
    for each in values.get("rows", ()):
        published = tuple(None if isinstance(v, str) else v for v in each.get("published", ()))
        row = build(Line, {**each, "published": published}, title)
        if published and len(published) != len(values["columns"]):
            raise ValueError(f"{title}: {row.name} has not one figure for each column")
        rows.append(row)
    return build(Table, {**values, "rows": tuple(rows)}, title)


def build_claim(name: str, values: Mapping[str, Any]) -> Claim:
    """A claim from its values."""
    readings = {
        key: build(Reading, values[key], f"{name}: {values.get('text')}")
        for key in ("more", "than", "reaches", "above")
        if key in values
    }
    return build(Claim, {**values, **readings}, name)


def build(kind: type[Kind], values: Mapping[str, Any], title: str) -> Kind:
    """One of the classes above from a table of the file, lists as tuples."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"{title}: {explain_unknown('key', key, sorted(known))}")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{title}: {error}") from None


def expand_attacks(values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Attacks by short name, each as the list of its settings.

    An entry is the text of an attack, a list of such, or a table with ``spec`` and lists of words:
    one attack for each combination, in name and spec in the place of the words in braces.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, each in values.items():
        if isinstance(each, Mapping):
            words = {key: value for key, value in each.items() if key != "spec"}
            for chosen in product(*words.values()):
                pairs = dict(zip(words, chosen, strict=True))
                found[name.format(**pairs)] = (each["spec"].format(**pairs),)
        else:
            found[name] = (each,) if isinstance(each, str) else tuple(each)
    return found


def expand_claim(
    values: Mapping[str, Any], labels: Mapping[str, str]
) -> Iterator[Mapping[str, Any]]:
    """A claim for each combination of the words that it is ``over``, if over any.

    In readings the words stand in the place of braces, in its sentence what they are called.
    """
    words = values.get("over", {})
    for chosen in product(*words.values()):
        pairs = dict(zip(words, chosen, strict=True))
        called = {key: labels.get(word, word) for key, word in pairs.items()}
        filled: dict[str, Any] = {}
        for key, each in values.items():
            if isinstance(each, Mapping):
                filled[key] = {
                    k: v.format(**pairs) if words and isinstance(v, str) else v
                    for k, v in each.items()
                }
            else:
                filled[key] = each.format(**called) if words and key == "text" else each
        filled.pop("over", None)
        yield filled


def scale_radius(text: str, factor: float) -> str:
    """The text of an attack with so many times its radius, to three digits."""
    spec = parse(text)
    radius = float(f"{float(spec.parameters['eps']) * factor:.3g}")
    return str(spec._replace(parameters={**spec.parameters, "eps": radius}))


def list_readings(paper: Paper) -> Iterator[Reading]:
    """Everything that tables and claims read."""
    for table in paper.tables:
        for row in table.rows:
            if not (table.needs or row.needs):
                yield from read_row(table, row)
    for claim in paper.claims:
        yield from filter(None, (claim.more, claim.than, claim.reaches, claim.above))


def read_row(table: Table, row: Line) -> Sequence[Reading]:
    """What a row reads, column by column: of each attack one figure, of a sweep each measure."""
    if table.sweep:
        return [Reading(row.attack, column) for column in table.columns]
    measure = row.measure or table.measure
    attacks = [row.attack.format(column) for column in table.columns]
    return [Reading(attack, measure, row.at, row.hardened, row.smallest) for attack in attacks]
