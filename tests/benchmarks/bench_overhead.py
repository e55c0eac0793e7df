"""What a whole `robusteval evaluate` costs beyond the attack that was asked for. Run by hand.

    python tests/benchmarks/bench_overhead.py CHECKPOINT --data DATA --arch SPEC … --samples 500
        --attack pgd:eps=1/255,steps=20,stop=never

The arguments are those of `evaluate`. One command in this process, with processor seconds of all
threads by part; a part inside another is counted for itself alone. Shares are of the attack's time,
which without an early stop is that of all its steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

ATTACK = "the attack"
spent: dict[str, float] = defaultdict(float)
inside: list[tuple[str, float]] = []  # parts that are under way, and when their time goes on


def enter(name: str) -> None:
    """A part begins; the clock of the one around it stands still."""
    now = time.process_time()
    if inside:
        outer, since = inside[-1]
        spent[outer] += now - since
    inside.append((name, now))


def leave() -> None:
    """A part ends."""
    now = time.process_time()
    name, since = inside.pop()
    spent[name] += now - since
    if inside:
        inside[-1] = (inside[-1][0], now)


def clock(owner: Any, function: str, name: str, unless: tuple[str, ...] = ()) -> None:
    """Book what a function takes under a name, unless a part of these names is under way."""
    original: Callable[..., Any] = getattr(owner, function)

    @wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if any(part in unless for part, _ in inside):
            return original(*args, **kwargs)
        enter(name)
        try:
            return original(*args, **kwargs)
        finally:
            leave()

    setattr(owner, function, timed)


def main() -> None:
    """Run `evaluate` with the arguments of this script, and print what its parts took."""
    enter("importing torch and the rest")
    import robusteval.models.checkpoint  # noqa: F401
    from robusteval.cli import cli
    from robusteval.evaluation import columns
    from robusteval.evaluation import evaluate as evaluation
    from robusteval.evaluation.computation import Computation
    from robusteval.evaluation.recording import Recording
    from robusteval.runs.folder import Store

    leave()
    extra, planted = "extra attacks of the trust checks", "planted examples"
    others = (extra, planted)
    clock(evaluation, "execute", "what is between these parts")
    clock(evaluation, "examine_network", "looking into the network")
    clock(evaluation, "ask_network", "company and conventions")
    clock(Computation, "measure_clean", "images as they are")
    clock(Computation, "run_attack", "judging", unless=others)
    clock(columns, "perturb", ATTACK, unless=others)
    clock(evaluation.Evaluation, "run_extra", extra)
    clock(evaluation.Evaluation, "plant_examples", planted)
    clock(Recording, "write", "writing")
    clock(Store, "save_cell", "writing")
    with tempfile.TemporaryDirectory() as folder:
        enter("opening network and images, the screen")
        with suppress(SystemExit):
            cli(["evaluate", *sys.argv[1:], "--out", str(Path(folder, "run"))])
        leave()
    attack = spent.pop(ATTACK, 0.0)
    if not attack:
        sys.exit("No attack ran in this process: give an attack, and no --workers.")
    print(f"\n{ATTACK}: {attack:.2f} s of processor time")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:40} {seconds:6.2f} s  {seconds / attack:6.1%}")
    whole = sum(spent.values())
    print(f"{'beyond the attack':40} {whole:6.2f} s  {whole / attack:6.1%}")


if __name__ == "__main__":
    main()
