"""Whether two runs are the same, which one process and many, killed or not, must give."""

from __future__ import annotations

import numpy as np

from robusteval.runs.folder import load_pictures
from robusteval.runs.types import Run


def assert_same(one: Run, other: Run) -> None:
    """All columns, findings and pictures but the clock, and what was asked but the command."""
    assert other.findings == one.findings
    asked, again = ({**run.config, "command": None} for run in (one, other))
    assert again == asked
    assert (other.model, other.data) == (one.model, one.data)
    assert other.environment == one.environment
    assert (other.status, other.failures) == (one.status, one.failures)
    assert [o.to_record() for o in other.outcomes] == [o.to_record() for o in one.outcomes]
    tables = [(one.clean, other.clean)]
    tables += [(a.columns, b.columns) for a, b in zip(one.outcomes, other.outcomes, strict=True)]
    for a, b in tables:
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    shown, seen = load_pictures(one), load_pictures(other)
    assert shown.keys() == seen.keys()
    for position, pictures in shown.items():
        for picture, same in zip(pictures, seen[position], strict=True):
            assert (picture.place, picture.row) == (same.place, same.row)
            np.testing.assert_array_equal(picture.clean, same.clean)
            np.testing.assert_array_equal(picture.delta, same.delta)
