"""`robusteval explain`: what an attack did, and to which parts of an image and a network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.registry import parse
from robusteval.runs.writing import write_atomically

from .running import clear_finished_work, data_options, device_option, model_options, spell_command
from .session import Request, open_session
from .shell import Command, Whole, emit, option, writing_stdout

EXPLANATION = "explanation.json"


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
    help="What to explain, one attack; see `robusteval list attacks`. [default: pgd:eps=8/255]",
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
    help="Write explanation.json and a picture of each image there.",
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

    \b
    Examples:
      robusteval explain demo --out explained
      robusteval explain net.pt --arch torchvision:resnet18 --data photos/ \\
        --attack pgd:eps=2/255 --samples 5
    """
    if len(attacks) > 1:
        raise UsageError(
            f"explain takes one attack, not {len(attacks)}: explain each with an --out of its own,"
            " or set several side by side with `robusteval reproduce pse`"
        )
    spec = check_attack(parse(attacks[0] if attacks else "pgd:eps=8/255"))
    request = Request(checkpoint, **given)
    request.require_data("say what to attack")
    if out is not None:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is no folder: choose another")
        clear_finished_work(out, out / EXPLANATION)
    if out is not None and (out / EXPLANATION).exists() and not force:
        raise UsageError(
            f"{out} holds an explanation: choose another --out, or --force to replace it"
        )
    with open_session(request.open_both) as session:
        from robusteval.analysis.explain import explain as explain_attack
        from robusteval.datasets.concepts import open_concepts

        # without a folder there is nothing to go on with
        done = None if out is None else session.resume_work(out)
        shape = session.images.shape
        found = explain_attack(
            session.classifier,
            session.images,
            spec,
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
    from robusteval.reports.explanation import print_explanation, render_explanation_json
    from robusteval.reports.explanation_picture import render_explained_image

    record = found.record
    if out is not None:
        for panel, image in zip(found.panels, record.images, strict=True):
            picture = render_explained_image(panel, record.attack, image)
            write_atomically(out / f"image-{panel.position:06d}.png", picture)
        assert done is not None
        content = render_explanation_json(record).encode()
        done.finish(out / EXPLANATION, partial(write_atomically, content=content))
    if form == "json":
        emit(render_explanation_json(record))
        return
    from rich.console import Console

    from robusteval.reports.terminal import make_printable

    console = Console()
    with writing_stdout(), console.capture() as page:
        print_explanation(record, console)
        if out is not None:
            console.print()
            written = f"{len(found.panels)} pictures and explanation.json in {out}"
            console.print(make_printable(console, written))
    emit(page.get())
