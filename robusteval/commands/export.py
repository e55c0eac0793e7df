"""`robusteval export`: the adversarial images of a run as files."""

from __future__ import annotations

from pathlib import Path

import click

from robusteval.errors import UsageError
from robusteval.runs.folder import load_run

from .measuring import spell_evaluation
from .report import RUN
from .running import handle_stops, show_bars
from .shell import emit_lines


@click.command(short_help="Write the adversarial images of a run as PNG files.")
@click.argument("run", type=RUN)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder to write to. [default: export in that of the run]",
)
@click.option("--force", is_flag=True, help="Replace the export that is there.")
def export(run: Path, out: Path | None, force: bool) -> None:
    """Write the adversarial images that RUN kept as 8-bit PNG files.

    RUN is the folder of a run of `robusteval evaluate --keep-images`. Each attack gets a folder
    with a folder for each class; manifest.csv lists all files with label, attack, prediction and
    whether it fools. The folder written, or that of one attack, can be given to --data again.

    The images as the attacks made them, without rounding, are in RUN/adversarial/*.npz.

    --force takes away what the older export wrote, and no other file.

    \b
    Example:
      robusteval export runs/demo-0123abcd --out adversarial/
    """
    from robusteval.datasets.exported import MANIFEST, export_images

    loaded = load_run(run)
    out = out or Path(str(loaded.folder)) / "export"
    if out.is_dir() and (out / MANIFEST).exists() and not force:
        raise UsageError(f"{out} is there already: choose another --out, or --force to replace it")
    with handle_stops(fresh=False) as stop, show_bars() as progress:
        stop.progress = progress
        stop.loses_nothing()
        written = export_images(loaded, out, progress.begin, progress.advance)
        progress.end()
    total = sum(written.values())
    emit_lines(
        [
            f"{total} images in {out}:",
            *(f"  {name}  {count} images" for name, count in written.items()),
            f"To use them: {spell_evaluation('CHECKPOINT', [('data', str(out))])}",
        ]
    )
