"""The part of a run, or of a baseline, that a gate is about, and how it is called."""

from __future__ import annotations

from typing import Any, NamedTuple

from robusteval.art.field_names import split_target
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Flags, Outcome, Run, Spec

from .baseline import Baseline, BaselineCell, canonicalize, normalize_parameters, say_behind
from .gate_config import CLEAN, Rule


class Scene(NamedTuple):
    """Everything gates look at."""

    run: Run
    here: Baseline  # the run's own verdicts
    then: Baseline | None


def is_in_scope(rule: Rule, outcome: Outcome) -> bool:
    """Whether a gate is about this cell."""
    if isinstance(rule.on, Spec):
        return is_same_attack(rule.on, str(outcome.attack), outcome.resolved)
    return rule.threat is None or rule.threat.includes(outcome.threat)


def group_cells(rule: Rule, side: Baseline) -> dict[str, list[BaselineCell]]:
    """The cells a gate looks at, together where one worst case is made of them."""
    name = find_defense(rule, side)
    if rule.defense is not None and name is None:
        return {}
    found: dict[str, list[BaselineCell]] = {}
    for cell in side.cells:
        if cell.defense != name:
            continue
        if isinstance(rule.on, Spec):
            if is_same_attack(rule.on, cell.attack, cell.resolved):
                knows = "" if cell.adaptive else " (oblivious)"
                found.setdefault(f"{rule.on}{knows}", []).append(cell)
        elif rule.threat is None or rule.threat.includes(cell.threat):
            found.setdefault(f"worst case at {cell.threat}", []).append(cell)
    return found


def is_same_attack(spec: Spec, attack: str, resolved: dict[str, Any]) -> bool:
    """Whether a gate's attack is this one of a run: with the same parameters, however written."""
    if canonicalize(str(spec)) == canonicalize(attack):
        return True
    entry = ATTACKS.entries.get(spec.name)
    if entry is None or parse(attack).name != spec.name:
        return False
    bare, target = split_target(spec)
    chosen = {} if target is None else {"target": int(target) if target.isdecimal() else target}
    return normalize_parameters(entry.resolve(bare) | chosen) == normalize_parameters(resolved)


def find_defense(rule: Rule, side: Baseline) -> str | None:
    """The gate's defense as this side calls it; None if it has none such, or none is asked for."""
    if rule.defense is None:
        return None
    wanted = canonicalize(str(rule.defense))
    known = [cell.defense for cell in side.cells if cell.defense]
    known += [each.defense for each in side.defenses]
    return next((name for name in known if canonicalize(name) == wanted), None)


def find_clean_verdicts(rule: Rule, side: Baseline) -> Flags | None:
    """Clean verdicts ``(n,)``, behind the defense that the gate names; None if there are none."""
    name = find_defense(rule, side)
    return None if rule.defense is not None and name is None else side.clean_behind(name)


def describe_scope(rule: Rule) -> str:
    """What a gate looks at, if there is nothing of it."""
    if isinstance(rule.on, Spec) or rule.on == CLEAN:
        return str(rule.on)
    if rule.threat is None:
        return "worst case"
    return f"worst case at {rule.threat}"


def describe_subject(rule: Rule, on: str) -> str:
    """What a gate looks at, with the defense it names."""
    return on + say_behind(str(rule.defense) if rule.defense else None)


def explain_lack(rule: Rule, side: Baseline) -> str:
    """That the run has not what a gate is about, and what it has."""
    if rule.defense is not None and find_defense(rule, side) is None:
        known = ", ".join(each.defense for each in side.defenses) or "none"
        return f"The run has no defense {rule.defense}; it has {known}."
    name = find_defense(rule, side)
    cells = [cell for cell in side.cells if cell.defense == name]
    if isinstance(rule.on, Spec):
        known = ", ".join(cell.attack for cell in cells) or "none"
        return f"The run has no attack {describe_subject(rule, str(rule.on))}; it has {known}."
    if rule.on == CLEAN:
        return f"The run has no verdicts on {describe_subject(rule, 'clean images')}."
    known = ", ".join(dict.fromkeys(str(cell.threat) for cell in cells)) or "none"
    wanted = describe_subject(rule, describe_scope(rule))
    return f"The run has no attack for the {wanted}; it has {known}."
