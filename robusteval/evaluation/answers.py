"""What a network was asked besides its columns: a few answers, kept for who does not have it.

The parts of a run are joined without the network (`robusteval.evaluation.merging`). All that a run
says is made of columns and of these answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from robusteval.evaluation.false_gradients import FalseLayer, Suspects
from robusteval.evaluation.unmasking import Examination
from robusteval.runs.types import Finding


class Answers:
    """Answers by question; each is asked for once.

    Parameters
    ----------
    known : mapping, optional
        What `known` of another object held, JSON-able.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.known: dict[str, Any] = dict(known or {})

    def count(self, question: str, ask: Callable[[], int]) -> int:
        """A number."""
        if question not in self.known:
            self.known[question] = ask()
        return int(self.known[question])

    def explain(self, question: str, ask: Callable[[], str]) -> str:
        """Why something cannot be done; empty if it can."""
        if question not in self.known:
            self.known[question] = ask()
        return str(self.known[question])

    def find(self, question: str, ask: Callable[[], list[Finding]]) -> list[Finding]:
        """What a check found."""
        if question not in self.known:
            self.known[question] = [finding._asdict() for finding in ask()]
        return [Finding(**finding) for finding in self.known[question]]

    def examine(self, question: str, ask: Callable[[], Examination]) -> Examination:
        """What in the network leads attacks astray, as far as its answers to images do not tell."""
        if question not in self.known:
            found = ask()
            self.known[question] = {
                "layers": [layer._asdict() for layer in found.suspects.layers],
                "steps": list(found.suspects.steps),
                "is_random": found.is_random,
                "is_mixed": found.is_mixed,
            }
        told = self.known[question]
        layers = tuple(FalseLayer(**layer) for layer in told["layers"])
        suspects = Suspects(layers, tuple(told["steps"]))
        return Examination(suspects, bool(told["is_random"]), is_mixed=bool(told["is_mixed"]))
