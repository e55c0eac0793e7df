"""Whether the tests notice deliberate faults in what verdicts rest on.

    OMP_NUM_THREADS=1 python tests/benchmarks/deliberate_faults.py [PART OF A NAME]

In a copy of the tree each fault is put in, one at a time, the tests that fit are run, and which of
them noticed is printed. Exit code 1 if a fault was not noticed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("torch", "torchvision", "art", "scipy.special", "matplotlib.figure", "rich.console")

JUDGE = ("tests/evaluation/test_judge.py",)
GATE = ("tests/reports/test_gate.py", "-k", "not seldom_fails and not four_points")
STATISTICS = ("tests/runs/test_statistics.py",)
TYPES = ("tests/runs/test_types.py", "tests/runs/test_metrics.py")
CHECKS = ("tests/runs/test_validation.py",)
BALLS = ("tests/search/test_balls.py",)


class Fault(NamedTuple):
    """One replacement in one file, and the tests that should notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


JUDGE_FILE = "robusteval/evaluation/judge.py"
GATE_TESTS = "reports/gate_tests.py"
NUMBERS = "robusteval/runs/statistics.py"
RECORDS = "robusteval/runs/types.py"
VALIDATION = "robusteval/runs/validation.py"
BALL = "robusteval/search/balls.py"

FAULTS = (
    # the judge
    Fault(
        "judge: the 8-bit verdict is that of the image as it is",
        JUDGE_FILE,
        "pred_8bit = predict_again(classifier, rounded, x_adv, pred)",
        "pred_8bit = pred.clone()",
        JUDGE,
    ),
    Fault(
        "judge: an image outside the ball is named and not brought back",
        JUDGE_FILE,
        "        x_adv[far] = near\n",
        "",
        JUDGE,
    ),
    Fault(
        "judge: a ball a tenth too large",
        JUDGE_FILE,
        "threat.eps * (1 + TOLERANCE) + TOLERANCE",
        "threat.eps * 1.1 + TOLERANCE",
        JUDGE,
    ),
    Fault(
        "judge: pixels that are not finite become black and stay attacked",
        JUDGE_FILE,
        "x_adv = torch.where(broken.view(-1, 1, 1, 1), x, x_adv)",
        "x_adv = x_adv.nan_to_num(0.0, 0.0, 0.0)",
        JUDGE,
    ),
    Fault(
        "judge: images that were wrong count as attacked",
        JUDGE_FILE,
        '"attacked": find_right(clean),',
        '"attacked": np.ones(n, np.bool_),',
        JUDGE,
    ),
    # gates
    Fault(
        "gate: a floor is passed by the interval's upper end",
        GATE_TESTS,
        "if rate.interval.low >= self.floor:",
        "if rate.interval.high >= self.floor:",
        GATE,
    ),
    Fault(
        "gate: a drop is tested without its margin",
        GATE_TESTS,
        "statistics.drop_test(self.pairs, self.margin)",
        "statistics.drop_test(self.pairs)",
        GATE,
    ),
    Fault(
        "gate: p-values are not corrected for their number",
        "reports/gate.py",
        "adjusted = iter(statistics.holm(tests))",
        "adjusted = iter(tests)",
        GATE,
    ),
    Fault(
        "gate: grave findings that are allowed by none pass",
        "reports/gate.py",
        "if finding.code not in allow]",
        "if finding.code in allow]",
        GATE,
    ),
    Fault(
        "gate: runs on other images are compared",
        "reports/gate_measures.py",
        "if not has_same_images(here, then):",
        "if False:",
        GATE,
    ),
    Fault(
        "gate: an unfinished run is checked",
        "reports/baseline.py",
        "    if not run.finished:\n",
        "    if False:\n",
        (*GATE, "tests/reports/test_baseline.py"),
    ),
    # statistics
    Fault(
        "statistics: Wilson's interval at 90 %",
        NUMBERS,
        "z = NormalDist().inv_cdf((1 + confidence) / 2)",
        "z = NormalDist().inv_cdf(confidence)",
        STATISTICS,
    ),
    Fault(
        "statistics: the sign test leaves out the last term",
        NUMBERS,
        "for i in range(losses + 1):",
        "for i in range(losses):",
        STATISTICS,
    ),
    Fault(
        "statistics: a drop is tested by the bolder of two tests",
        NUMBERS,
        "return max(NormalDist().cdf(-z), sign_test(",
        "return min(NormalDist().cdf(-z), sign_test(",
        STATISTICS,
    ),
    Fault(
        "statistics: Holm's steps start one too low",
        NUMBERS,
        "(len(values) - rank) * values[i]",
        "(len(values) - rank - 1) * values[i]",
        STATISTICS,
    ),
    Fault(
        "statistics: ties count for nothing under the curve",
        NUMBERS,
        'ordered, positives, "right"',
        'ordered, positives, "left"',
        STATISTICS,
    ),
    Fault(
        "statistics: Tango's variance lacks the margin",
        NUMBERS,
        "variance = n * (2 * q + margin * (1 - margin))",
        "variance = n * (2 * q)",
        STATISTICS,
    ),
    # records
    Fault(
        "records: logits that are not finite count for the model",
        RECORDS,
        "self.attacked & (reached | (made == -1))",
        "self.attacked & reached & (made != -1)",
        TYPES,
    ),
    Fault(
        "records: an alarm does not stop an attack",
        RECORDS,
        'return success & ~c["flagged"] if "flagged" in c else success',
        "return success",
        TYPES,
    ),
    Fault(
        "records: what PNG cannot hold counts as fooled",
        RECORDS,
        'made = np.where(c[pred] == -2, c["pred_adv"], c[pred])',
        "made = c[pred]",
        TYPES,
    ),
    Fault(
        "records: a changed file is taken for the one that was written",
        "robusteval/runs/storage.py",
        "if hashlib.sha256(content).hexdigest() != sha256:",
        "if False:",
        TYPES,
    ),
    Fault(
        "records: a cell of another run is taken",
        "robusteval/runs/folder.py",
        'return entry["key"] in list_keys(config, entry)',
        'return bool(entry["key"])',
        CHECKS,
    ),
    Fault(
        "records: distances above the radius are taken",
        VALIDATION,
        "(far > eps * (1 + SLACK) + 1e-6).any()",
        "(far > 2 * eps + 1).any()",
        CHECKS,
    ),
    # balls
    Fault(
        "balls: rounding to 8 bit always down",
        BALL,
        "return x.mul(255).round().clamp(0, 255)",
        "return x.mul(255).floor().clamp(0, 255)",
        BALLS,
    ),
    Fault(
        "balls: bounds of linf may lie a last bit outside",
        BALL,
        "            upper = torch.where(far, torch.nextafter(upper, x), upper)\n",
        "",
        BALLS,
    ),
    Fault(
        "balls: the ball of linf leaves the pixel box",
        BALL,
        "lower, upper = lower.clamp(0, 1), upper.clamp(0, 1)",
        "lower, upper = lower, upper",
        BALLS,
    ),
    Fault(
        "balls: l2 without room for rounding",
        BALL,
        "max(self.eps - room, 0.0)",
        "self.eps * 1.0000005",
        BALLS,
    ),
    Fault(
        "balls: changed places are counted by channel",
        BALL,
        "delta.ne(0).any(1).flatten(1).sum(1)",
        "delta.ne(0).any(2).flatten(1).sum(1)",
        BALLS,
    ),
    Fault(
        "balls: masked values move with the others when rounded",
        BALL,
        "return torch.where(self.upper > self.lower, near, self.x)",
        "return near",
        BALLS,
    ),
)


def copy_tree(room: Path) -> None:
    """Everything that tests need, links as links."""
    for name in ("attacks", "defenses", "reports", "robusteval", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, room / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, room / name)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, room / name)


def run_tests(room: Path, tests: tuple[str, ...], log: Path) -> int:
    """Exit code of the tests in a process of its own, which stops at the first that fails."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(room)
    sys.path.insert(0, str(room))
    import pytest

    options = ("-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly")
    code = int(pytest.main([*options, *tests]))
    import robusteval

    where = str(Path(robusteval.__file__).resolve())
    os._exit(code if where.startswith(str(room.resolve())) else 99)


def describe_failure(log: Path) -> str:
    """The test that noticed."""
    failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].partition("::")[2].partition(" - ")[0] if failed else "?"


def try_faults(wanted: str) -> int:
    """Put in each fault whose name holds a word, and print what came of it; 1 if one slipped by."""
    slipped = 0
    with tempfile.TemporaryDirectory() as place:
        room = Path(place) / "tree"
        room.mkdir()
        copy_tree(room)
        chosen = [fault for fault in FAULTS if wanted in fault.name]
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            code = run_tests(room, tests, Path(place) / "log")
            print(f"without a fault: {' '.join(tests[:1])}: {code}", flush=True)
            if code:
                print((Path(place) / "log").read_text()[-2000:])
                return 2
        for fault in chosen:
            path = room / fault.file
            text = path.read_text()
            if text.count(fault.right) != 1:
                print(f"NOT PUT IN  {fault.name}: {text.count(fault.right)} places", flush=True)
                slipped = 1
                continue
            path.write_text(text.replace(fault.right, fault.wrong))
            started = time.monotonic()
            code = run_tests(room, fault.tests, Path(place) / "log")
            path.write_text(text)
            noticed = describe_failure(Path(place) / "log") if code == 1 else f"code {code}"
            slipped |= code != 1
            word = "noticed " if code == 1 else "SLIPPED "
            seconds = time.monotonic() - started
            print(f"{word}  {fault.name}  [{noticed}]  {seconds:.0f} s", flush=True)
    return slipped


if __name__ == "__main__":
    for name in LARGE:
        importlib.import_module(name)
    sys.exit(try_faults(sys.argv[1] if len(sys.argv) > 1 else ""))
