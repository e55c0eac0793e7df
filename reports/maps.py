"""What attacks do to the maps that explain a model, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from robusteval.runs.types import Spec

from . import formatting
from .map_record import AreaRecord, MapPairRow, MapQualityRow, MapRow, MapsRecord
from .measures import DifferenceRecord, MeanRecord, RateRecord

SAME = 0.5  # rank correlation from which maps are called much the same


class Table(NamedTuple):
    """A table that every format lays out alike."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[list[str]]]]  # its name, and the lines of each cell
    note: str = ""
    kind: str = "attack"  # what has a row each


def write_sentences(part: MapsRecord) -> Iterator[str]:
    """What the tables mean, and where they mean nothing."""
    for one in part.quality:
        yield from warn_of_empty_maps(one)
    for facts in part.measured:
        yield from write_nearest(part, facts.spec, ShortNames.collect(part))
    for facts in part.measured:
        yield from warn_of_unstable_maps(part, facts.spec, ShortNames.collect(part))
    for names in dict.fromkeys(
        tuple(sorted([facts.spec, *facts.alike])) for facts in part.measured
    ):
        if len(names) > 1:
            yield (
                f"{' and '.join(names)} carry the same information on this network: they count as"
                " one interpreter."
            )


def write_nearest(part: MapsRecord, spec: str, names: ShortNames) -> Iterator[str]:
    """How near to the benign map the best attack on this interpreter keeps it."""
    found = [
        (row, one)
        for row in part.attacks
        for one in row.maps
        if one.interpreter == spec and one.attacked and one.distance.n
    ]
    if not found:
        return
    row, one = min(found, key=lambda pair: pair[1].distance.value or 0.0)
    plain = [
        f", on the same images {format_fraction(-pair.difference.value)} nearer than"
        f" {names.short[pair.against]}"
        if pair.difference.value < 0
        else f", on the same images no nearer than {names.short[pair.against]}"
        for pair in part.pairs
        if pair.outcome == row.outcome
        and pair.interpreter == spec
        and pair.difference.value is not None
    ]
    yield (
        f"{spec}: {names.name_cell(row.spec, row.defense)} reaches its class on"
        f" {formatting.format_percent(row.success_rate)} of the images and leaves a map"
        f" {format_fraction(one.distance.value)} away from the benign"
        f" one{''.join(plain)}; {compare_with_noise(one)}"
    )


def compare_with_noise(one: MapRow) -> str:
    """Whether a map tells an attack from noise."""
    gap, noise = one.beyond_noise, format_fraction(one.noise.value)
    if gap.low is None:
        return f"noise of the same size takes it {noise} away."
    if gap.low > 0:
        return f"noise of the same size takes it only {noise} away, so the map still shows it."
    return f"noise of the same size takes it {noise} away, so the map does not give it away."


def warn_of_empty_maps(one: MapQualityRow) -> Iterator[str]:
    """A warning where maps say nothing, or nothing about the network."""
    spec, insertion, deletion = one.interpreter, one.insertion, one.deletion
    gain, loss = insertion.beyond_chance.low, deletion.beyond_chance.high
    if gain is not None and loss is not None and gain <= 0 <= loss:
        yield (
            f"Warning: {spec} maps point out what matters no better than random cells, neither by"
            f" insertion ({format_fraction(insertion.value.value)} against"
            f" {format_fraction(insertion.chance.value)}) nor by deletion"
            f" ({format_fraction(deletion.value.value)} against"
            f" {format_fraction(deletion.chance.value)}): little is lost when an attack moves them."
        )
    if (one.forgotten.low or 0) > SAME:
        yield (
            f"Warning: {spec} maps are much the same when the network's parameters are shuffled"
            f" (rank correlation {format_fraction(one.forgotten.value, 2)}): they show the image,"
            " not what the network learnt."
        )


def warn_of_unstable_maps(part: MapsRecord, spec: str, names: ShortNames) -> Iterator[str]:
    """A warning where another seed moves a map as far as attacks do."""
    found = [
        (row, one.beyond_floor, one.floor)
        for row in part.attacks
        for one in row.maps
        if one.interpreter == spec and one.beyond_floor and one.distance.n
    ]
    low = [(row, floor) for row, beyond, floor in found if not (beyond.low or 0) > 0]
    if low:
        some = "; ".join(names.name_cell(row.spec, row.defense) for row, _ in low)
        which = "every attack" if len(low) == len(found) else some
        first = low[0][1]
        floor = format_fraction(first.value if first else None)
        yield (
            f"Warning: {spec} maps after {which} are no farther from the benign ones than those of"
            f" another seed on the unchanged image ({floor}): at this noise floor nothing follows"
            " from their distance."
        )


def build_tables(part: MapsRecord, *, brief: bool = False) -> list[Table]:
    """All tables on explanations; in brief without numbers that stand elsewhere, too."""
    found = [build_quality_table(part)] if part.quality else []
    if not part.attacks:
        return found
    found += [build_attack_table(part, brief), build_distance_table(part), *build_pair_tables(part)]
    return found if brief else found + list(build_transfer_tables(part))


class ShortNames(NamedTuple):
    """Attacks by what tells them apart."""

    short: dict[str, str]
    shared: dict[str, list[str]]  # by attack: the parameters that all of its name have

    @classmethod
    def collect(cls, part: MapsRecord) -> ShortNames:
        """The short names of all attacks of a record."""
        found: dict[str, list[list[str]]] = {}
        specs = list(dict.fromkeys(row.spec for row in part.attacks))
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

    def name_cell(self, spec: str, defense: str | None) -> str:
        """An attack by its short name, and what it was up against."""
        return formatting.name_attack(self.short[spec], defense)

    def list_shared(self) -> str:
        """What was left out of the names."""
        return "".join(f" Every {name}: {','.join(items)}." for name, items in self.shared.items())


def build_attack_table(part: MapsRecord, brief: bool) -> Table:
    """Success, confidence, likeness, edges and cost of each attack."""
    names = ShortNames.collect(part)
    price = [] if brief else ["forward / back", "time"]
    rows = []
    for row in part.attacks:
        cells = [
            stack_rate(row.success_rate),
            [format_fraction(row.confidence.value)],
            [format_fraction(row.noise_rate.value)],
            [formatting.format_share(row.edge_energy.value)],
        ]
        if not brief:
            cells += [
                [formatting.format_passes(row.cost)],
                [formatting.format_duration(row.cost.seconds)],
            ]
        rows.append((names.name_cell(row.spec, row.defense), cells))
    return Table(
        "Attacks on model and explanation",
        ["success", "confidence", "1 - SSIM", "on edges", *price],
        rows,
        "Of successes the mean probability of the class reached, likeness lost, and share of the"
        f" squared change on edges (stronger than {part.edge:g}), which are"
        f" {formatting.format_share(choose_edge_area(part))} of the pixels. Passes, per attacked"
        f" image, and time are without those that measure maps.{names.list_shared()}",
    )


def build_quality_table(part: MapsRecord) -> Table:
    """Whether maps say anything about the network, without any attack."""
    images = max(int(one.insertion.value.n) for one in part.quality)
    return Table(
        "What maps are worth",
        ["insertion", "deletion", "weights shuffled"],
        [
            (
                one.interpreter,
                [
                    build_area_cell(one.insertion),
                    build_area_cell(one.deletion),
                    [format_fraction(one.forgotten.value, 2), *format_half_width(one.forgotten, 2)],
                ],
            )
            for one in part.quality
        ],
        f"Of {formatting.format_count(images, 'image')} as they are, ± the 95 % interval (Student's"
        " t). Insertion: mean probability of the class while the pixels of a blurred image are made"
        " sharp, highest of the map first; better if higher than chance, random cells as coarse"
        " as the map's. Deletion: while they are made black; better if lower than chance. p: sign"
        " test against chance (two-sided, exact). Weights shuffled: rank correlation with the map"
        " when the network's parameters are shuffled; near 1 a map shows the image, not what the"
        f" network learnt.{name_layers(part)}",
        "interpreter",
    )


def name_layers(part: MapsRecord) -> str:
    """A sentence on the layers whose features maps are made of; empty if they are made of none."""
    made: dict[str, list[str]] = {}
    for facts in part.measured:
        if facts.layer:
            made.setdefault(facts.layer, []).append(facts.spec)
    each = [f"{layer} ({', '.join(specs)})" for layer, specs in made.items()]
    return f" Features are those of {'; '.join(each)}." if each else ""


def build_area_cell(one: AreaRecord) -> list[str]:
    """An area under a curve, and what chance gives."""
    if not one.value.n:
        return [formatting.MISSING]
    return [
        format_fraction(one.value.value),
        *format_half_width(one.value),
        f"chance {format_fraction(one.chance.value)}",
        format_p_value(one.beyond_chance.p),
    ]


def choose_edge_area(part: MapsRecord) -> float | None:
    """Share of the pixels on edges."""
    known = [row.edge_area for row in part.attacks if row.edge_area.n]
    return max(known, key=lambda mean: mean.n).value if known else None


def build_distance_table(part: MapsRecord) -> Table:
    """How far each attack leaves each map from the benign one."""
    kept = [facts.spec for facts in part.measured if not facts.stretched]
    scale = "Maps are stretched to [0, 1]" + (f", but for {', '.join(kept)}" if kept else "")
    floors = any(facts.seeded for facts in part.measured)
    said = (
        f"Mean absolute difference between the map of the image as it is and of a success, each"
        f" for the class predicted, ± its 95 % interval (Student's t). {scale}; numbers of"
        " different interpreters cannot be compared. * the attack was made on this interpreter."
        " Noise: Gaussian noise of the same l2 size instead of the attack."
        + (" Seed: another seed, nothing else." if floors else "")
        + f" IoU: of the highest {100 * part.top:g} % of the cells."
    )
    names = ShortNames.collect(part)
    return Table(
        "Distance of maps from the benign ones",
        [facts.spec for facts in part.measured],
        [
            (names.name_cell(row.spec, row.defense), [build_distance_cell(one) for one in row.maps])
            for row in part.attacks
        ],
        said,
    )


def build_distance_cell(one: MapRow) -> list[str]:
    """The distance of one map, and what to hold it against."""
    mean = one.distance
    if not mean.n:
        return [formatting.MISSING]
    mark = " *" if one.attacked else ""
    floor = [f"seed {format_fraction(one.floor.value)}"] if one.floor else []
    return [
        format_fraction(mean.value) + mark,
        *format_half_width(mean),
        f"noise {format_fraction(one.noise.value)}",
        *floor,
        f"IoU {format_fraction(one.iou.value, 2)}",
    ]


def build_pair_tables(part: MapsRecord) -> Iterator[Table]:
    """Attacks on maps against what they are held against, image by image."""
    names = ShortNames.collect(part)
    for spec, defense in dict.fromkeys((p.against, p.defense) for p in part.pairs):
        pairs = [p for p in part.pairs if (p.against, p.defense) == (spec, defense)]
        rows = []
        for place in dict.fromkeys(pair.outcome for pair in pairs):
            mine = [pair for pair in pairs if pair.outcome == place]
            name = names.name_cell(mine[0].attack, mine[0].defense)
            both = max(pair.difference.n for pair in mine)
            rows.append((name, [[f"{both:,}"], *(build_difference_cell(pair) for pair in mine)]))
        yield Table(
            f"Distance of maps less that after {names.short[spec]}",
            ["images", *(facts.spec for facts in part.measured)],
            rows,
            "On the images that both attacks succeed on: mean difference, its 95 % interval, sign"
            " test (two-sided, exact). Below zero: nearer to the benign map.",
        )


def build_difference_cell(pair: MapPairRow) -> list[str]:
    """A paired difference with its test."""
    gap = pair.difference
    if not gap.n:
        return [formatting.MISSING]
    mark = " *" if pair.attacked else ""
    return [f"{gap.value:+.3f}{mark}", *format_half_width(gap), format_p_value(gap.p)]


def build_transfer_tables(part: MapsRecord) -> Iterator[Table]:
    """Attacked against measured interpreters, for each way to attack."""
    for found in part.transfer:
        behind = f" behind {found.defense}" if found.defense else ""
        yield Table(
            f"Transfer of {found.attack}{behind}",
            list(found.measured),
            [
                (
                    str(Spec(f"on {row.attacked}", dict(row.effort))),
                    [
                        [format_fraction(mean.value), *format_half_width(mean)]
                        if mean.n
                        else [formatting.MISSING]
                        for mean in row.distances
                    ],
                )
                for row in found.rows
            ],
            "Attacked interpreters in rows, those measured in columns: distance from the benign"
            " map.",
        )


def format_fraction(value: float | None, digits: int = 3) -> str:
    """A number in [-1, 1], never rounded to nothing."""
    if value is None:
        return formatting.MISSING
    least = 10.0**-digits
    return f"< {least:g}" if 0 < value < least / 2 else f"{value:.{digits}f}"


def format_half_width(mean: MeanRecord | DifferenceRecord, digits: int = 3) -> Iterator[str]:
    """Half the width of an interval."""
    if mean.high is not None and mean.value is not None:
        yield f"± {mean.high - mean.value:.{digits}f}"


def stack_rate(rate: RateRecord) -> list[str]:
    """A share above its interval."""
    value = formatting.format_percent(rate)
    interval = formatting.format_rate(rate).removeprefix(value).strip()
    return [value, *filter(None, [interval])]


def format_p_value(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
