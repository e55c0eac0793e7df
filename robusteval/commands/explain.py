"""`robusteval explain`: what an attack did, and to which parts of an image and a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.registry import parse
from robusteval.runs.types import Spec
from robusteval.runs.writing import write_atomically

from .running import clear_finished_work, data_options, device_option, model_options, spell_command
from .session import Request, open_session
from .shell import Command, Whole, emit, option, writing_stdout

if TYPE_CHECKING:
    from robusteval.analysis.attack_comparison import ExplainedAttacks
    from robusteval.evaluation.work_cache import WorkCache

RESULTS = ("explanation.json", "explanations.json")  # of one attack, of several
DEFAULT = "pgd:eps=8/255"


@click.command(cls=Command, short_help="Explain what an attack does to a classifier.")
@click.argument("checkpoint")
@model_options
@data_options
@option(
    "Data",
    "--samples",
    type=Whole(1),
    metavar="N",
    default=20,
    show_default=True,
    help="Explain N images, drawn at random among those classified correctly.",
)
@option(
    "Analysis",
    "--attack",
    "attacks",
    multiple=True,
    metavar="SPEC",
    help="What to explain; several are set side by side. See `robusteval list attacks`."
    f" [default: {DEFAULT}]",
)
@option(
    "Analysis",
    "--side",
    type=Whole(1),
    metavar="N",
    help="Pixels along a region. [default: a 23rd of the height, at least 2]",
)
@option(
    "Analysis",
    "--layer",
    metavar="NAME",
    help="Layer whose maps and units are looked at. [default: the last feature maps]",
)
@option(
    "Analysis",
    "--concepts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Images with masks that units may stand for: images/ and masks/CONCEPT/, or Broden."
    " [default: drawn colours, textures and shapes]",
)
@option(
    "Analysis",
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Decides which images are drawn, and all noise.",
)
@option(
    "Report",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write explanation.json and a picture of each image there; of several attacks each into"
    " a folder of its own, and report.html, explanations.json and figures beside them.",
)
@option("Report", "--force", is_flag=True, help="Write over an explanation that DIR holds.")
@option(
    "Report",
    "--format",
    "form",
    type=click.Choice(("table", "json")),
    default="table",
    show_default=True,
    metavar="FORMAT",
    help="How to print the summary on stdout: table or json.",
)
@device_option
def explain(
    checkpoint: str,
    attacks: tuple[str, ...],
    samples: int,
    side: int | None,
    layer: str | None,
    concepts: Path | None,
    seed: int,
    out: Path | None,
    force: bool,
    form: str,
    **given: Any,
) -> None:
    """Explain what an attack does to the classifier in CHECKPOINT.

    Promotion-suppression analysis (arXiv:1904.02057): which regions of a perturbation hold the
    true class down and which push another up, whether it sits where the network looks, how little
    of it would do, and whether the units it moves stand for anything. Every figure has its control.
    Several attacks are explained on the same images, and their scores compared image by image.
    The same command continues one that was stopped.

    \b
    Examples:
      robusteval explain demo --out explained
      robusteval explain net.pt --arch torchvision:resnet18 --data photos/ \\
        --attack pgd:eps=2/255 --samples 5
      robusteval explain demo --attack pgd --attack sigma_zero --out compared
    """
    specs = [check_attack(parse(text)) for text in attacks or (DEFAULT,)]
    request = Request(checkpoint, **given)
    request.require_data("say what to attack")
    if out is not None:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is no folder: choose another")
        clear_finished_work(out, out / choose_result(specs))
    if out is not None and not force and any((out / name).exists() for name in RESULTS):
        raise UsageError(
            f"{out} holds an explanation: choose another --out, or --force to replace it"
        )
    with open_session(request.open_both) as session:
        from robusteval.analysis.attack_comparison import explain_attacks
        from robusteval.datasets.concepts import open_concepts

        # without a folder there is nothing to go on with
        done = None if out is None else session.resume_work(out)
        shape = session.images.shape
        found = explain_attacks(
            session.classifier,
            session.images,
            specs,
            samples=samples,
            seed=seed,
            side=side,
            layer=layer,
            concepts=(
                None
                if concepts is None
                else open_concepts(concepts, shape, allow_outside=request.allow_outside)
            ),
            progress=session.progress,
            cache=done,
            command=spell_command(),
        )
    written = ""
    if out is not None:
        assert done is not None
        written = write_explanations(found, out, done)
    print_explanations(found, form, written)


def choose_result(specs: Sequence[Spec]) -> str:
    """The file that is written last: of one attack, or of several."""
    return RESULTS[len(specs) > 1]


def name_folders(found: ExplainedAttacks) -> list[str]:
    """The folder of each of several attacks below that of all."""
    specs = [parse(each.record.attack) for each in found.explanations]
    return [f"{i}-{re.sub('[^a-z0-9_]+', '-', s.name.lower())}" for i, s in enumerate(specs, 1)]


def write_explanations(found: ExplainedAttacks, out: Path, done: WorkCache) -> str:
    """Write records and pictures, the one that says that all is there last; what they are."""
    from robusteval.reports.explained_attacks import (
        render_attacks_html,
        render_comparison_of_attacks,
    )
    from robusteval.reports.explanation import render_explanation_json
    from robusteval.reports.explanation_charts import draw_comparison
    from robusteval.reports.explanation_picture import render_explained_image

    several = len(found.explanations) > 1
    names = name_folders(found)
    for explanation, name in zip(found.explanations, names, strict=True):
        record, folder = explanation.record, out / name if several else out
        for panel, image in zip(explanation.panels, record.images, strict=True):
            picture = render_explained_image(panel, record.attack, image)
            write_atomically(folder / f"image-{panel.position:06d}.png", picture)
        if several:
            text = render_explanation_json(record)
            write_atomically(folder / RESULTS[0], text.encode())
    pictures = sum(len(explanation.panels) for explanation in found.explanations)
    if not several:
        content = render_explanation_json(found.explanations[0].record).encode()
        done.finish(out / RESULTS[0], partial(write_atomically, content=content))
        return f"{pictures} pictures and {RESULTS[0]} in {out}"
    for title, chart in draw_comparison(found.comparison):
        write_atomically(out / f"{title}.svg", chart.svg.encode())
    write_atomically(out / "report.html", render_attacks_html(found.comparison, names).encode())
    content = render_comparison_of_attacks(found.comparison).encode()
    done.finish(out / RESULTS[1], partial(write_atomically, content=content))
    return f"report.html, {RESULTS[1]} and, attack by attack, {pictures} pictures in {out}"


def print_explanations(found: ExplainedAttacks, form: str, written: str) -> None:
    """Print one explanation, or several side by side."""
    from robusteval.reports.explained_attacks import (
        print_explained_attacks,
        render_comparison_of_attacks,
    )
    from robusteval.reports.explanation import print_explanation, render_explanation_json

    alone = found.explanations[0].record if len(found.explanations) == 1 else None
    if form == "json":
        emit(
            render_comparison_of_attacks(found.comparison)
            if alone is None
            else render_explanation_json(alone)
        )
        return
    from rich.console import Console

    from robusteval.reports.console import make_printable

    console = Console()
    with writing_stdout(), console.capture() as page:
        if alone is None:
            print_explained_attacks(found.comparison, console)
        else:
            print_explanation(alone, console)
        if written:
            console.print()
            console.print(make_printable(console, written))
    emit(page.get())
