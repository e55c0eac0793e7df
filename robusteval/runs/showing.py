"""What people ask of a run in Python and in a notebook; `robusteval.reports` lays it out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, overload

from robusteval.errors import check_path


class View(Sequence[Any]):
    """Some things of a run, to go on with and to look at.

    A sequence of what it shows. A notebook shows its HTML, a terminal its text; where there is
    nothing, both are a sentence that says why.
    """

    def __init__(self, items: Sequence[Any], html: str, text: str) -> None:
        self._items, self._html, self._text = tuple(items), html, text

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._html


class Showable:
    """The ways in which a run shows itself."""

    def _repr_html_(self) -> str:
        """The first screen of the HTML report, as notebooks show it."""
        fragment: str = open_report("notebook").render_fragment(self)
        return fragment

    def table(self) -> View:
        """The attacks with what each left of the model, and what the images are as they are.

        Returns
        -------
        View
            A mapping for each row with the columns of the CSV report, numbers in full precision:
            ``pandas.DataFrame(run.table())`` takes them.
        """
        view: View = open_report("notebook").show_table(self)
        return view

    def figure(self, name: str = "curve") -> View:
        """The charts of one sort.

        Parameters
        ----------
        name : str
            "curve": robust accuracy against the radius, for attacks that looked for the nearest
            success or were run at several radii; "roc": what detectors tell apart.

        Returns
        -------
        View
            Each chart as SVG text.

        Raises
        ------
        UsageError
            If there is no such sort; the message names those there are.
        """
        view: View = open_report("notebook").show_figures(self, name)
        return view

    def images(self, attack: str = "") -> View:
        """Images before and after attacks, as they are in the gallery of the HTML report.

        Parameters
        ----------
        attack : str
            The attacks whose name begins like this, such as ``"pgd"``; all if empty.

        Returns
        -------
        View
            The easiest, a median and the hardest image of each attack, as `Picture`. They are kept
            by runs that have a folder (`out` of `evaluate`).

        Raises
        ------
        UsageError
            If no attack is called so; the message names those there are.
        RunError
            If a picture in the folder is missing or was changed.
        """
        view: View = open_report("notebook").show_images(self, attack)
        return view

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file, in the format that its suffix says.

        A file that is there is replaced, as by `numpy.save` or pandas' `to_csv`, so that a cell of
        a notebook can be run again. Pictures are in the HTML page of a run that has a folder (`out`
        of `evaluate`).

        Parameters
        ----------
        path : path
            Such as ``report.html``, ``report.md``, ``report.json`` or ``report.csv``.

        Raises
        ------
        UsageError
            If no format has this suffix; the message names those there are.
        RunError
            If the file cannot be written.
        """
        check_path("a report", path)
        open_report("rendering").write_report(self, Path(path))


def open_report(module: str) -> ModuleType:
    """A module of `robusteval.reports`, by name as the registry opens what it registers.

    A run lies below everything that lays it out and must not depend on it: nothing of it is
    imported before somebody asks a run to show itself.
    """
    return import_module(f"robusteval.reports.{module}")
