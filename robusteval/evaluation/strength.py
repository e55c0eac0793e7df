"""Whether the attacks of a run were a serious attempt: which of them ran, for how many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robusteval.evaluation.goals import spell_goal
from robusteval.registry import ATTACKS
from robusteval.runs.metrics import group_by_threat, worst_case
from robusteval.runs.types import Finding, Outcome, Spec, Threat

FEWEST_STEPS = 10  # along the gradient in a row, on the images that withstand them
SUGGESTED_STEPS = 50
SHOWN = 4  # attacks that are named
# how often an attack started anew: the steps after it are not in a row with those before
RESTARTS = ("restarts", "num_random_init", "nb_random_init")


def is_strong(outcome: Outcome) -> bool:
    """Whether an attack follows the model's gradient for `FEWEST_STEPS` in a row.

    Also if no image withstood it, unless it is a single step by its definition.
    """
    if outcome.knowledge != "white-box" or outcome.attack.name == "fgsm":
        return False
    steps = count_steps(outcome)
    return steps is None or steps >= FEWEST_STEPS


def count_steps(outcome: Outcome) -> float | None:
    """Gradient steps in a row: the mean over images that withstood them, None if none did.

    Backward passes, divided by how often the attack started.
    """
    passes = outcome.columns["backwards"][outcome.attacked & ~outcome.success()]
    if not len(passes):
        return None
    starts = [outcome.resolved.get(name) for name in RESTARTS]
    return float(passes.mean()) / max([1, *(n for n in starts if isinstance(n, int))])


def check_strength(attacks: Sequence[Outcome]) -> Iterator[Finding]:
    """A grave finding for each threat under which images withstood nothing but weak attacks.

    Under threats without an attack along the gradient of any radius, a strong one under another
    threat will do.
    """
    threats = group_by_threat(attacks)
    elsewhere = any(map(is_strong, attacks))
    for threat, group in threats.items():
        # a corruption nobody looks for, and of moves a grid finds more than gradients do
        if threat.norm in ("corruption", "spatial"):
            continue
        if any(map(is_strong, group)) or not worst_case(group).k:
            continue
        missing = suggest_attack(threat, [outcome.attack for outcome in group])
        if missing is None and elsewhere:
            continue
        ran = [describe_effort(outcome) for outcome in group[:SHOWN]]
        if len(group) > SHOWN:
            ran.append(f"{len(group) - SHOWN} more")
        where = f" at {threat}" if len(threats) > 1 else ""
        yield Finding(
            "weak-attacks",
            True,
            f"Only weak attacks ran{where}: {', '.join(ran)}. At least one should follow the"
            f" model's gradient for {FEWEST_STEPS} steps in a row, or what survives says little"
            f" about a determined attacker: {suggest_more(threat, missing)}.",
        )


def describe_effort(outcome: Outcome) -> str:
    """An attack, and for how many steps it followed the gradient."""
    steps = count_steps(outcome) or 0.0
    if outcome.knowledge != "white-box":
        effort = "does not see the model"
    else:
        effort = f"{steps:.3g} gradient step{'' if steps == 1 else 's'}"
    return f"{outcome.attack} ({effort})"


def suggest_more(threat: Threat, missing: Spec | None) -> str:
    """What to do where only weak attacks ran."""
    if missing is None and threat.norm == "patch":
        return f"give patch steps={SUGGESTED_STEPS}"
    return f"add {missing or 'pgd'}"


def suggest_attack(threat: Threat, specs: Sequence[Spec]) -> Spec | None:
    """A strong attack under the threat of others; None if there is none for any radius."""
    if not threat.eps:
        return None
    for name in ("pgd", "apgd"):
        entry = ATTACKS.entries.get(name)
        if entry is not None and threat.norm in entry.norms:
            norm = {} if threat.norm == entry.norms[0] else {"norm": threat.norm}
            goal = spell_goal(threat, specs)
            return Spec(name, {**goal, **norm, "eps": threat.eps, "steps": SUGGESTED_STEPS})
    return None
