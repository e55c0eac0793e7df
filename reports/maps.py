"""What attacks do to the maps that explain a model, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from robusteval.runs.types import Spec

from . import formatting

Record = dict[str, Any]
SAME = 0.5  # rank correlation from which maps are called much the same


class Table(NamedTuple):
    """A table that every format lays out alike."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[list[str]]]]  # its name, and the lines of each cell
    note: str = ""
    kind: str = "attack"  # what has a row each


def sentences(record: Record) -> Iterator[str]:
    """What the tables mean, and where they mean nothing."""
    part = record["interpreters"]
    for one in part["quality"]:
        yield from empty(one)
    for facts in part["measured"]:
        yield from nearest(part, facts["spec"], Names.of(part))
    for facts in part["measured"]:
        yield from unstable(part, facts["spec"], Names.of(part))
    for names in dict.fromkeys(
        tuple(sorted([facts["spec"], *facts["alike"]])) for facts in part["measured"]
    ):
        if len(names) > 1:
            yield (
                f"{' and '.join(names)} carry the same information on this network: they count as"
                " one interpreter."
            )


def nearest(part: Record, spec: str, names: Names) -> Iterator[str]:
    """How near to the benign map the best attack on this interpreter keeps it."""
    found = [
        (row, one)
        for row in part["attacks"]
        for one in row["maps"]
        if one["interpreter"] == spec and one["attacked"] and one["distance"]["n"]
    ]
    if not found:
        return
    row, one = min(found, key=lambda pair: float(pair[1]["distance"]["value"]))
    plain = [
        f", on the same images {number(-pair['difference']['value'])} nearer than"
        f" {names.short[pair['against']]}"
        if pair["difference"]["value"] < 0
        else f", on the same images no nearer than {names.short[pair['against']]}"
        for pair in part["pairs"]
        if pair["outcome"] == row["outcome"]
        and pair["interpreter"] == spec
        and pair["difference"]["value"] is not None
    ]
    yield (
        f"{spec}: {names.cell(row)} reaches its class on {formatting.percent(row['success_rate'])}"
        " of"
        f" the images and leaves a map {number(one['distance']['value'])} away from the benign"
        f" one{''.join(plain)}; {against_noise(one)}"
    )


def against_noise(one: Record) -> str:
    """Whether a map tells an attack from noise."""
    gap, noise = one["beyond_noise"], number(one["noise"]["value"])
    if gap["low"] is None:
        return f"noise of the same size takes it {noise} away."
    if gap["low"] > 0:
        return f"noise of the same size takes it only {noise} away, so the map still shows it."
    return f"noise of the same size takes it {noise} away, so the map does not give it away."


def empty(one: Record) -> Iterator[str]:
    """A warning where maps say nothing, or nothing about the network."""
    spec, insertion, deletion = one["interpreter"], one["insertion"], one["deletion"]
    gain, loss = insertion["beyond_chance"]["low"], deletion["beyond_chance"]["high"]
    if gain is not None and loss is not None and gain <= 0 <= loss:
        yield (
            f"Warning: {spec} maps point out what matters no better than random cells, neither by"
            f" insertion ({number(insertion['value']['value'])} against"
            f" {number(insertion['chance']['value'])}) nor by deletion"
            f" ({number(deletion['value']['value'])} against"
            f" {number(deletion['chance']['value'])}): little is lost when an attack moves them."
        )
    if (one["forgotten"]["low"] or 0) > SAME:
        yield (
            f"Warning: {spec} maps are much the same when the network's parameters are shuffled"
            f" (rank correlation {number(one['forgotten']['value'], 2)}): they show the image, not"
            " what the network learnt."
        )


def unstable(part: Record, spec: str, names: Names) -> Iterator[str]:
    """A warning where another seed moves a map as far as attacks do."""
    found = [
        (row, one)
        for row in part["attacks"]
        for one in row["maps"]
        if one["interpreter"] == spec and one["beyond_floor"] is not None and one["distance"]["n"]
    ]
    low = [(row, one) for row, one in found if not (one["beyond_floor"]["low"] or 0) > 0]
    if low:
        some = "; ".join(names.cell(row) for row, _ in low)
        which = "every attack" if len(low) == len(found) else some
        floor = number(low[0][1]["floor"]["value"])
        yield (
            f"Warning: {spec} maps after {which} are no farther from the benign ones than those of"
            f" another seed on the unchanged image ({floor}): at this noise floor nothing follows"
            " from their distance."
        )


def tables(record: Record, *, brief: bool = False) -> list[Table]:
    """All tables on explanations; in brief without numbers that stand elsewhere, too."""
    part = record["interpreters"]
    found = [quality(part)] if part["quality"] else []
    if not part["attacks"]:
        return found
    found += [strength(part, brief), distances(part), *against(part)]
    return found if brief else found + list(transferred(part))


class Names(NamedTuple):
    """Attacks by what tells them apart."""

    short: dict[str, str]
    shared: dict[str, list[str]]  # by attack: the parameters that all of its name have

    @classmethod
    def of(cls, part: Record) -> Names:
        """Those of all attacks of a record."""
        found: dict[str, list[list[str]]] = {}
        specs = list(dict.fromkeys(row["spec"] for row in part["attacks"]))
        for spec in specs:
            name, _, rest = spec.partition(":")
            found.setdefault(name, []).append(rest.split(",") if rest else [])
        shared = {
            name: [item for item in each[0] if all(item in other for other in each)]
            for name, each in found.items()
            if len(each) > 1
        }
        short = {}
        for spec in specs:
            name, _, rest = spec.partition(":")
            left = [item for item in rest.split(",") if item not in shared.get(name, ())]
            short[spec] = ":".join(filter(None, (name, ",".join(left))))
        return cls(short, {name: items for name, items in shared.items() if items})

    def cell(self, row: Record) -> str:
        """An attack and what it was up against."""
        return formatting.cell({**row, "spec": self.short[row["spec"]]})

    def note(self) -> str:
        """What was left out of the names."""
        return "".join(f" Every {name}: {','.join(items)}." for name, items in self.shared.items())


def strength(part: Record, brief: bool) -> Table:
    """Success, confidence, likeness, edges and cost of each attack."""
    names = Names.of(part)
    price = [] if brief else ["forward / back", "time"]
    rows = []
    for row in part["attacks"]:
        cells = [
            stacked(row["success_rate"]),
            [number(row["confidence"]["value"])],
            [number(row["noise_rate"]["value"])],
            [formatting.share(row["edge_energy"]["value"])],
        ]
        if not brief:
            cells += [
                [formatting.passes(row["cost"])],
                [formatting.duration(row["cost"]["seconds"])],
            ]
        rows.append((names.cell(row), cells))
    return Table(
        "Attacks on model and explanation",
        ["success", "confidence", "1 - SSIM", "on edges", *price],
        rows,
        "Of successes the mean probability of the class reached, likeness lost, and share of the"
        f" squared change on edges (stronger than {part['edge']:g}), which are"
        f" {formatting.share(edges(part))} of the pixels. Passes, per attacked image, and time are"
        f" without those that measure maps.{names.note()}",
    )


def quality(part: Record) -> Table:
    """Whether maps say anything about the network, without any attack."""
    images = max(int(one["insertion"]["value"]["n"]) for one in part["quality"])
    return Table(
        "What maps are worth",
        ["insertion", "deletion", "weights shuffled"],
        [
            (
                one["interpreter"],
                [
                    held_cell(one["insertion"]),
                    held_cell(one["deletion"]),
                    [number(one["forgotten"]["value"], 2), *half(one["forgotten"], 2)],
                ],
            )
            for one in part["quality"]
        ],
        f"Of {formatting.plural(images, 'image')} as they are, ± the 95 % interval (Student's t)."
        " Insertion: mean probability of the class while the pixels of a blurred image are made"
        " sharp, highest of the map first; better if higher than chance, random cells as coarse"
        " as the map's. Deletion: while they are made black; better if lower than chance. p: sign"
        " test against chance (two-sided, exact). Weights shuffled: rank correlation with the map"
        " when the network's parameters are shuffled; near 1 a map shows the image, not what the"
        " network learnt.",
        "interpreter",
    )


def held_cell(one: Record) -> list[str]:
    """An area under a curve, and what chance gives."""
    if not one["value"]["n"]:
        return [formatting.MISSING]
    return [
        number(one["value"]["value"]),
        *half(one["value"]),
        f"chance {number(one['chance']['value'])}",
        chance(one["beyond_chance"]["p"]),
    ]


def edges(part: Record) -> float | None:
    """Share of the pixels on edges."""
    known = [row["edge_area"] for row in part["attacks"] if row["edge_area"]["n"]]
    most = max(known, key=lambda mean: int(mean["n"]), default={"value": None})
    value: float | None = most["value"]
    return value


def distances(part: Record) -> Table:
    """How far each attack leaves each map from the benign one."""
    kept = [facts["spec"] for facts in part["measured"] if not facts["stretched"]]
    scale = "Maps are stretched to [0, 1]" + (f", but for {', '.join(kept)}" if kept else "")
    floors = any(facts["seeded"] for facts in part["measured"])
    said = (
        f"Mean absolute difference between the map of the image as it is and of a success, each"
        f" for the class predicted, ± its 95 % interval (Student's t). {scale}; numbers of"
        " different interpreters cannot be compared. * the attack was made on this interpreter."
        " Noise: Gaussian noise of the same l2 size instead of the attack."
        + (" Seed: another seed, nothing else." if floors else "")
        + f" IoU: of the highest {100 * part['top']:g} % of the cells."
    )
    names = Names.of(part)
    return Table(
        "Distance of maps from the benign ones",
        [facts["spec"] for facts in part["measured"]],
        [(names.cell(row), [map_cell(one) for one in row["maps"]]) for row in part["attacks"]],
        said,
    )


def map_cell(one: Record) -> list[str]:
    """The distance of one map, and what to hold it against."""
    mean = one["distance"]
    if not mean["n"]:
        return [formatting.MISSING]
    mark = " *" if one["attacked"] else ""
    floor = [f"seed {number(one['floor']['value'])}"] if one["floor"] else []
    return [
        number(mean["value"]) + mark,
        *half(mean),
        f"noise {number(one['noise']['value'])}",
        *floor,
        f"IoU {number(one['iou']['value'], 2)}",
    ]


def against(part: Record) -> Iterator[Table]:
    """Attacks on maps against what they are held against, image by image."""
    names = Names.of(part)
    for spec, defense in dict.fromkeys((p["against"], p["defense"]) for p in part["pairs"]):
        pairs = [p for p in part["pairs"] if (p["against"], p["defense"]) == (spec, defense)]
        rows = []
        for place in dict.fromkeys(pair["outcome"] for pair in pairs):
            mine = [pair for pair in pairs if pair["outcome"] == place]
            name = names.cell({**mine[0], "spec": mine[0]["attack"]})
            both = max(pair["difference"]["n"] for pair in mine)
            rows.append((name, [[f"{both:,}"], *(pair_cell(pair) for pair in mine)]))
        yield Table(
            f"Distance of maps less that after {names.short[spec]}",
            ["images", *(facts["spec"] for facts in part["measured"])],
            rows,
            "On the images that both attacks succeed on: mean difference, its 95 % interval, sign"
            " test (two-sided, exact). Below zero: nearer to the benign map.",
        )


def pair_cell(pair: Record) -> list[str]:
    """A paired difference with its test."""
    gap = pair["difference"]
    if not gap["n"]:
        return [formatting.MISSING]
    mark = " *" if pair["attacked"] else ""
    return [f"{gap['value']:+.3f}{mark}", *half(gap), chance(gap["p"])]


def transferred(part: Record) -> Iterator[Table]:
    """Attacked against measured interpreters, for each way to attack."""
    for found in part["transfer"]:
        behind = f" behind {found['defense']}" if found["defense"] else ""
        yield Table(
            f"Transfer of {found['attack']}{behind}",
            found["measured"],
            [
                (
                    str(Spec(f"on {row['attacked']}", row["effort"])),
                    [
                        [number(mean["value"]), *half(mean)] if mean["n"] else [formatting.MISSING]
                        for mean in row["distances"]
                    ],
                )
                for row in found["rows"]
            ],
            "Attacked interpreters in rows, those measured in columns: distance from the benign"
            " map.",
        )


def number(value: float | None, digits: int = 3) -> str:
    """A number in [-1, 1], never rounded to nothing."""
    if value is None:
        return formatting.MISSING
    least = 10.0**-digits
    return f"< {least:g}" if 0 < value < least / 2 else f"{value:.{digits}f}"


def half(mean: Record, digits: int = 3) -> Iterator[str]:
    """Half the width of an interval."""
    if mean["high"] is not None:
        yield f"± {mean['high'] - mean['value']:.{digits}f}"


def stacked(rate: Record) -> list[str]:
    """A share above its interval."""
    value = formatting.percent(rate)
    interval = formatting.with_interval(rate).removeprefix(value).strip()
    return [value, *filter(None, [interval])]


def chance(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
