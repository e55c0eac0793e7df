"""What is to be run: everything that decides a number, checked before the first attack."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from robusteval.art.field_names import check_attack, split_target
from robusteval.datasets.class_names import match_classes
from robusteval.datasets.dataset import Data, Positions, draw
from robusteval.errors import UsageError, check_argument, check_whole
from robusteval.evaluation.defense import Defense, prepare_defense
from robusteval.evaluation.defense_files import hide_folder
from robusteval.evaluation.goals import Goals, read_goals, spell_goal
from robusteval.evaluation.left_out import describe_left_out
from robusteval.evaluation.map_changes import describe_interpreters
from robusteval.evaluation.receiving import prepare_receivers
from robusteval.evaluation.shares import Share
from robusteval.evaluation.shortcut_checks import try_shortcuts
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.admission import check_data, check_images, check_labels, wrap_module
from robusteval.models.classifier import Classifier
from robusteval.models.environment import list_versions
from robusteval.models.failures import raise_as_usage_error
from robusteval.models.identity import identify_model
from robusteval.models.shortcuts import Shortcuts
from robusteval.progress import Progress, Silent
from robusteval.registry import ATTACKS, parse
from robusteval.runs.reading import WEIGHTS, read_bytes
from robusteval.runs.slices import encode_slices
from robusteval.runs.storage import digest
from robusteval.runs.types import Finding, Spec, Threat, name_cell
from robusteval.search.balls import TOLERANCE, measure_box

# Attacks on a detector that know it: all the maps it looks at, what it makes of them, and both
# with the detector itself to choose among the results
EVASIONS: tuple[dict[str, Any], ...] = (
    {"along": "maps", "choice": "distance"},
    {"along": "features", "choice": "distance"},
    {"along": "both", "choice": "score", "restarts": 3},
)
T = TypeVar("T")


@dataclass(frozen=True)
class Attack:
    """An attack that is ready to run on one classifier."""

    spec: Spec  # as records print it: of files the names alone
    threat: Threat
    knowledge: str
    resolved: dict[str, Any]
    perturb: Callable[..., Tensor]
    foreign: bool = False  # draws from global state: its batches are part of its definition
    role: str = "attack"
    goals: Goals | None = None  # the classes to reach, where they were chosen
    asked: Spec | None = None  # what it can be prepared from again, where that is another spec


class PlannedCell(NamedTuple):
    """An attack, what it is judged behind, and whether it knew."""

    attack: Spec
    defense: Spec | None
    adaptive: bool

    @property
    def label(self) -> str:
        """The name of the cell under which its failure is kept."""
        return name_cell(self.attack, self.defense, self.adaptive)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a run; nothing is computed yet."""

    classifier: Classifier
    data: Data
    index: Positions  # the images drawn
    attacks: tuple[Attack, ...]
    seed: int
    probes: bool
    config: dict[str, Any]
    interpreters: tuple[Interpreter, ...] = ()
    findings: tuple[Finding, ...] = ()  # what a reader must know of the choice of attacks
    defenses: tuple[Defense, ...] = ()
    adaptive: tuple[Attack, ...] = ()  # on detectors; a hardened model meets `attacks` itself
    receivers: tuple[Defense, ...] = ()  # networks that the images of attacks are judged on
    share: Share | None = None  # of the images that are attacked here; all if None
    shortcuts: Shortcuts | None = None  # that attacks take

    def list_attacks_on(self, defense: Defense | None) -> tuple[Attack, ...]:
        """List the attacks that know a defense."""
        guarded = defense is not None and defense.detector is not None
        return self.adaptive if guarded else self.attacks

    def list_questioned(self, defense: Defense | None) -> tuple[Attack, ...]:
        """List the attacks beside which others may run by themselves: none behind a detector."""
        guarded = defense is not None and defense.detector is not None
        return self.attacks if self.probes and not guarded else ()

    def asks_for(self, attack: Attack) -> bool:
        """Whether an attack is one of those that were asked for, with all its parameters."""
        named = [each for each in self.attacks if each.spec.name == attack.spec.name]
        return any(each.resolved == attack.resolved for each in named)

    def list_cells(self) -> Iterator[PlannedCell]:
        """List all that will be in the run."""
        for attack in self.attacks:
            yield from self.list_cells_of(attack, None)
        for defense in self.defenses:
            for attack in self.list_attacks_on(defense):
                yield from self.list_cells_of(attack, defense)

    def list_cells_of(self, attack: Attack, defense: Defense | None) -> Iterator[PlannedCell]:
        """List what comes of one attack on one model."""
        yield PlannedCell(attack.spec, None if defense is None else defense.spec, True)
        if defense is None:
            yield from (PlannedCell(attack.spec, each.spec, False) for each in self.defenses)

    def prepare(self, spec: Spec, model: Classifier, role: str = "attack") -> Attack:
        """Prepare an attack on a model of the run, see `prepare_attack`."""
        return prepare_attack(spec, model, self.data.shape, role, self.data)

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the numbers."""
        return digest(self.config)


def prepare_plan(
    classifier: nn.Module,
    data: Data,
    attacks: Sequence[str | Spec],
    *,
    samples: int | None = None,
    seed: int = 0,
    probes: bool = True,
    interpreters: Sequence[str | Spec] = (),
    defenses: Sequence[str | Spec | Defense] = (),
    optional: Sequence[Spec] = (),
    unusable: Mapping[str, str] | None = None,
    receivers: Mapping[str, nn.Module] | None = None,
    shortcuts: Sequence[str] = (),
    share: Share | None = None,
    fingerprint: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Check everything that can be checked before the first attack; see `evaluate`.

    The attacks and interpreters that are also `optional` are left out, with a remark, where the
    network cannot have them; of those that are known to be `unusable` the reason is given. With a
    `share` the plan is that of the whole run, of which only this part of the images is attacked.
    The images are not read for their `fingerprint` where it is known.
    """
    progress = progress or Silent()
    check_data(data)
    check_draw(samples, seed)
    attacks = list_specs("attacks", attacks, '["pgd:eps=8/255"]')
    interpreters = list_specs("interpreters", interpreters, '["cam"]')
    defenses = list_specs("defenses", defenses, '["detector.safetensors"]', Defense)
    index = draw(len(data), samples, seed)
    if share is not None:
        share.check_images(index)  # once their contents are known, duplicates count once
    model = classifier if isinstance(classifier, Classifier) else wrap_module(classifier, data)
    data = match_classes(data, model.num_classes, model.class_names)
    check_labels(data, index, model)
    check_images(data, index, model)
    left_out: dict[str, str] = {}

    def build_each(specs: Iterable[str | Spec], make: Callable[..., T]) -> tuple[T, ...]:
        found = []
        for spec in specs:
            try:
                if unusable and str(spec) in unusable:
                    raise UsageError(unusable[str(spec)])
                found.append(make(spec, model, data.shape))
            except UsageError as error:
                if spec not in optional:
                    raise
                left_out[str(spec)] = str(error)
        return tuple(found)

    if interpreters:
        progress.begin("Finding the layers that maps are made of", 0)
    explained = build_each(interpreters, Interpreter.build)
    if interpreters:
        progress.end()
    check_interpreters(explained)
    ready = tuple(
        prepare_defense(each, model) if isinstance(each, str | Spec) else each for each in defenses
    )
    check_defenses(ready, data, index)
    specs = [parse(attack) if isinstance(attack, str) else attack for attack in attacks]
    evading = [spec for spec in specs if needs_detector(spec)]
    prepare = partial(prepare_attack, data=data)
    built = build_each([spec for spec in specs if spec not in evading], prepare)
    adaptive, unmet = prepare_evasions(evading, built, ready, data)
    if left_out and not built:
        raise UsageError("; ".join(dict.fromkeys(left_out.values())))
    names = [str(attack.spec) for attack in built]
    if len({digest([attack.spec.name, attack.resolved]) for attack in built}) < len(built):
        raise UsageError(f"the same attack is asked for twice: {', '.join(names)}")

    if fingerprint is None:
        progress.begin("Reading data", len(index))
        fingerprint = data.fingerprint(index, progress.advance)
        progress.end()
    config = {
        "attacks": names,
        "resolved": [attack.resolved for attack in built],
        "samples": len(index),
        "seed": seed,
        "probes": probes,
        "model": identify_model(model, data, index),
        "data": {"name": data.name, "sha256": fingerprint},
        "versions": list_versions(),
        "device": model.device.type,
        **describe_interpreters(explained),
    }
    if ready:
        config["defenses"] = [str(defense.spec) for defense in ready]
        config["shields"] = [defense.identity for defense in ready]
    receiving = prepare_receivers(receivers or {}, model, data, index)
    if receiving:
        config["receivers"] = [str(each.spec) for each in receiving]
        config["receiving"] = [each.identity for each in receiving]
    attacked = [model, *(each.model for each in ready if each.detector is None)]
    ways, told = None, list[Finding]()
    if shortcuts:
        progress.begin("Trying shortcuts", 0)
        ways, told = try_shortcuts(shortcuts, attacked, data.batch(index[:4]).x)
        progress.end()
    if ways is not None:
        config["shortcuts"] = ways.describe()
    if share is not None:
        config["shard"] = str(share)
    if data.slices:
        config["slices"] = encode_slices(data.slices, index)
    findings = tuple(describe_left_out(left_out))
    plan = Plan(
        model,
        data,
        index,
        built,
        seed,
        probes,
        config,
        explained,
        (*findings, *unmet, *told),
        ready,
        adaptive,
        receiving,
        share,
        ways,
    )
    if ready:
        config["cells"] = [cell.label for cell in plan.list_cells()]
    return plan


def check_draw(samples: int | None, seed: int) -> None:
    """Refuse numbers that decide no draw; UsageError."""
    if samples is not None:
        check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)


def list_specs(name: str, given: Sequence[T], example: str, *others: type) -> list[T]:
    """What was asked for of one kind as a list; UsageError if it is none, or holds other things."""
    advice = f"give a list such as {example}"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"{name} cannot be {type(given).__name__}: {advice}")
    asked = list(given)
    for each in asked:
        check_argument(f"one of the {name}", each, (str, Spec, *others), advice)
    return asked


def check_defenses(ready: Sequence[Defense], data: Data, index: Positions) -> None:
    """Refuse a defense that is asked for twice, or cannot take the images."""
    names = [str(defense.spec) for defense in ready]
    if len(set(names)) < len(names):
        raise UsageError(
            f"two defenses go by the same name ({', '.join(names)}): name each once, and give files"
            " of the same name in two folders other names"
        )
    if len({digest(defense.identity) for defense in ready}) < len(ready):
        raise UsageError(f"the same defense is asked for twice: {', '.join(names)}")
    for defense in ready:
        check_images(data, index, defense.model)


def needs_detector(spec: Spec) -> bool:
    """Whether an attack is one on detectors."""
    return spec.name in ATTACKS.entries and ATTACKS.entries[spec.name].detector


def prepare_evasions(
    asked: Sequence[Spec],
    attacks: Sequence[Attack],
    ready: Sequence[Defense],
    data: Data,
) -> tuple[tuple[Attack, ...], list[Finding]]:
    """The attacks that know the detectors, and what is missing of them.

    Those that were asked for; otherwise for each linf radius of the other attacks the three of
    `EVASIONS`.
    """
    guarded = [defense for defense in ready if defense.detector is not None]
    if asked and not guarded:
        raise UsageError(f"{asked[0].name} attacks a detector: name one with --defense")
    if asked and not attacks:
        raise UsageError(
            f"{asked[0].name} alone leaves nothing to compare with: add an attack on the model"
            " itself, such as pgd"
        )
    found: list[Finding] = []
    # of attacks that look for an error: corruptions and noise need to know no detector
    threats = list(dict.fromkeys(a.threat for a in attacks if a.knowledge != "none"))
    specs = list(asked)
    if not asked:
        for threat in threats:
            if threat.norm == "linf" and threat.eps:
                goal = spell_goal(threat, [a.spec for a in attacks if a.threat == threat])
                reach = {"eps": threat.eps, **goal}
                specs += [Spec("evade", {**kind, **reach}) for kind in EVASIONS]
    made: list[Attack] = []
    for defense in guarded:
        try:
            made = [prepare_attack(spec, defense.model, data.shape, data=data) for spec in specs]
        except UsageError as error:
            if asked:
                raise
            message = f"No attack could be made that knows {defense.spec}: {error}."
            return (), [Finding("no-adaptive-attack", True, message)]
    names = [str(attack.spec) for attack in made]
    if len(set(names)) < len(names):
        raise UsageError(
            f"two attacks go by the same name ({', '.join(names)}): name each once, and give files"
            " of the same name in two folders other names"
        )
    met = {attack.threat for attack in made}
    open_ = [str(threat) for threat in threats if threat not in met]
    if guarded and open_:
        found.append(
            Finding(
                "no-adaptive-attack",
                False,
                f"No attack at {', '.join(open_)} knows the detector: there it is only measured"
                " against attackers who do not expect it.",
            )
        )
    return tuple(made), found


def check_interpreters(interpreters: Sequence[Interpreter]) -> None:
    """Refuse an interpreter that is asked for twice."""
    if len({digest([each.spec.name, each.resolved]) for each in interpreters}) < len(interpreters):
        names = ", ".join(str(each.spec) for each in interpreters)
        raise UsageError(f"the same interpreter is asked for twice: {names}")


def prepare_attack(
    spec: str | Spec,
    classifier: Classifier,
    shape: tuple[int, int, int],
    role: str = "attack",
    data: Data | None = None,
) -> Attack:
    """An attack ready to run, its parameters checked; UsageError if they are wrong.

    Of the data come the names of classes to reach, and how many lines a file of such must have.
    """
    spec = check_attack(parse(spec) if isinstance(spec, str) else spec)
    bare, target = split_target(spec)
    goals, k = None, classifier.num_classes
    if target is not None:
        known = (None if data is None else data.class_names, classifier.class_names)
        names = next((each for each in known if each and len(each) == k), None)
        goals = read_goals(target, k, names, None if data is None else len(data))
    chosen = {} if goals is None else {"target": goals.identity}
    if spec.name.startswith("art:"):
        from robusteval.art.from_art import from_art

        theirs = from_art(spec.name.removeprefix("art:"), bare.parameters)
        theirs.validate(classifier, shape)
        check_radius(spec.name, theirs.threat, shape)  # probes are none of ART's
        resolved = theirs.resolved | chosen
        return Attack(
            spec, theirs.threat, theirs.knowledge, resolved, theirs, foreign=True, goals=goals
        )
    entry = ATTACKS.entry(spec.name)
    given = {key: value for key, value in bare.parameters.items() if key != "targeted"}
    perturb = partial(ATTACKS.load(spec.name), **given)
    threat = entry.threat(bare)
    targeted = threat.targeted
    nothing = torch.empty(0, *shape, device=classifier.device)
    no_class = torch.empty(0, dtype=torch.int64, device=classifier.device)
    # parameters are checked before there is anything to do
    with raise_as_usage_error(spec.name):
        perturb(classifier, nothing, no_class, targeted=targeted)
    resolved = hash_files(entry.resolve(bare), entry.files) | chosen
    shown = hide_folders(spec)
    attack = Attack(
        shown, threat, entry.knowledge, resolved, perturb, role=role, goals=goals, asked=spec
    )
    if role == "attack":  # the radius of a probe may be no limit
        check_radius(spec.name, threat, shape)
    if targeted and classifier.num_classes < 2:
        raise UsageError("a targeted attack needs at least two classes")
    return attack


def hash_files(resolved: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Parameters with the content of the files that some of them name in the place of the paths."""
    named = {name: resolved[name] for name in names if resolved[name]}
    contents = {name: read_bytes(Path(path), WEIGHTS) for name, path in named.items()}
    hashed = {name: f"sha256:{hashlib.sha256(raw).hexdigest()}" for name, raw in contents.items()}
    return resolved | hashed


def hide_folders(spec: Spec) -> Spec:
    """The spec of an attack whose files are named without their folders, so that these may move."""
    files = ATTACKS.entry(spec.name).files
    shown = {k: hide_folder(v) if k in files else v for k, v in spec.parameters.items()}
    return Spec(spec.name, shown)


def check_radius(name: str, threat: Threat, shape: tuple[int, int, int]) -> None:
    """Refuse a radius within which lie all images ``(c, h, w)``; UsageError."""
    most = measure_box(threat.norm, shape)
    if most is not None and threat.eps is not None and threat.eps > most * (1 + TOLERANCE):
        size = "" if threat.norm == "linf" else f" on images of {'x'.join(map(str, shape))}"
        raise UsageError(
            f"{name}: eps must be from 0 to {most:.6g} for {threat.norm}{size}, in units of the"
            f" [0, 1] pixel range (8/255 is eight grey levels), not {threat.eps:g}"
        )
