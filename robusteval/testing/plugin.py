"""Robustness in a test suite: `pytest --robusteval`, and the fixture `robust`.

With the option, the settings of pytest's root folder become a test: what ``[evaluate]`` in
``robusteval.toml`` or ``pyproject.toml`` asks for is run, as `robusteval evaluate --check` does it,
and a gate that is failed or inconclusive fails. Without the option nothing is attacked, and tests
that use `robust` are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robusteval.testing import assert_robust

FLAG = "--robusteval"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that lets attacks run."""
    parser.getgroup("robusteval").addoption(
        FLAG,
        action="store_true",
        help="run tests that attack networks, and the gates of robusteval.toml or pyproject.toml",
    )


@pytest.fixture
def robust(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`robusteval.testing.assert_robust`; the test is skipped without ``--robusteval``."""
    if not request.config.getoption(FLAG):
        pytest.skip(f"attacks take their time: give {FLAG}")
    return assert_robust


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the gates of the root folder, whichever tests were named; once where there are workers.

    UsageError of pytest if the settings are wrong.
    """
    if not session.config.getoption(FLAG):
        return
    from robusteval.errors import UsageError
    from robusteval.reports.gate_config import find_table

    try:
        path, table = find_table(session.config.rootpath)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    if "evaluate" in table:
        items.append(Gates.from_parent(session, name=path.name, path=path))


class NotPassed(Exception):
    """What the command printed."""


class Gates(pytest.Item):
    """The evaluation that a file asks for, held against its gates."""

    path: Path

    def runtest(self) -> None:
        """Run the command in the root folder."""
        words = ["-m", "robusteval", "evaluate", "--check", "--config", self.path.name]
        done = subprocess.run(
            [sys.executable, *words], cwd=self.path.parent, capture_output=True, text=True
        )
        if done.returncode:
            raise NotPassed(f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What the command printed, without where it was called."""
        if isinstance(excinfo.value, NotPassed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the gates are."""
        return self.path, None, f"robustness gates of {self.name}"
