"""`robusteval defend detector`: a detector of attacked images, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.registry import INTERPRETERS, parse
from robusteval.runs.types import Spec
from robusteval.runs.writing import write_atomically

from .measuring import has_other_part, spell_evaluation
from .running import (
    build_data_options,
    build_out_options,
    check_output,
    device_option,
    model_options,
    spell_command,
)
from .session import Request, ensure_masks, needs_rts, open_session
from .shell import Command, Whole, emit, option, writing_stdout

if TYPE_CHECKING:
    from torch import nn

    from robusteval.progress import Bars

CHANNELS = ("pair", "pair_product", "triple")
EXTRACTORS = ("raw", "small_cnn", "vgg16")
VGG = "vgg16-397923af.pth"  # as torchvision calls what it downloads


def split_interpreters(ctx: click.Context, param: click.Parameter, value: str) -> list[Spec]:
    """Option callback: interpreters separated by commas, each with parameters of its own."""
    texts: list[str] = []
    for piece in value.split(","):
        # after the first parameter of an interpreter its others are separated by commas, too
        if texts and "=" in piece and ":" not in piece:
            texts[-1] += f",{piece}"
        else:
            texts.append(piece)
    return [INTERPRETERS.check_spec(parse(text)) for text in texts]


@click.command(cls=Command, short_help="Fit a detector of attacked images.")
@click.argument("checkpoint")
@model_options
@build_data_options("train", required=True, about=" A detector must not be judged on them again.")
@option(
    "Data",
    "--samples",
    type=Whole(1),
    metavar="N",
    default=600,
    show_default=True,
    help="Images drawn at random: 60 % to fit on, 20 % to set thresholds, 20 % to judge.",
)
@option(
    "Detector",
    "--interpreters",
    callback=split_interpreters,
    metavar="NAME,NAME",
    default="grad,cam",
    show_default=True,
    help="Two or three of those `robusteval list interpreters` has a derivative of, such as"
    " grad,cam,mask:blur=15.",
)
@option(
    "Detector",
    "--attack",
    "attacks",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="Whose results it learns to flag; may be given more than once. See `robusteval list"
    " attacks`.",
)
@option(
    "Detector",
    "--channels",
    type=click.Choice(CHANNELS),
    metavar="NAME",
    help="pair, pair_product (two maps and their product) or triple. [default: by the number of"
    " interpreters]",
)
@option(
    "Detector",
    "--extractor",
    type=click.Choice(EXTRACTORS),
    metavar="NAME",
    default="small_cnn",
    show_default=True,
    help="What makes features of maps, besides statistics of how they agree: raw (maps of 16x16;"
    " quick), small_cnn (trained here) or vgg16 (pretrained; slow without a GPU).",
)
@option(
    "Detector",
    "--vgg-weights",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Weights of torchvision's vgg16 for ImageNet. [default: those that torchvision has"
    " downloaded before]",
)
@option(
    "Detector",
    "--tune",
    is_flag=True,
    help="Choose depth, rate and columns of the trees by cross-validation in which images stay"
    " whole: sixty fits more.",
)
@option(
    "Detector",
    "--confidence",
    is_flag=True,
    help="Let it look at how sure the classifier is as well, which is no explanation.",
)
@option(
    "Detector",
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Decides which images are drawn, how they are parted, and all noise.",
)
@build_out_options("detector to write, ending in .safetensors; its report goes beside it.")
@device_option
def detector(
    checkpoint: str,
    samples: int,
    interpreters: list[Spec],
    attacks: tuple[str, ...],
    channels: str | None,
    extractor: str,
    vgg_weights: Path | None,
    tune: bool,
    confidence: bool,
    seed: int,
    out: Path,
    force: bool,
    **given: Any,
) -> None:
    """Fit a detector of attacked images to the classifier in CHECKPOINT.

    It looks at the maps of several interpreters and how they agree (the adversarial detector of
    arXiv:2211.15926), and is judged on images that had no say, next to simpler rules and to
    comparisons in which there is nothing to find. That it withstands an attack that knows it is
    another question: `robusteval evaluate CHECKPOINT --defense FILE` answers it. The same command
    continues one that was stopped.

    \b
    Examples:
      robusteval defend detector demo --data digits \\
        --attack advedge:interpreter=cam --out detector.safetensors
      robusteval defend detector net.pt --arch torchvision:resnet18 \\
        --data photos/ --interpreters grad,cam,rts --attack pgd \\
        --attack advedge:interpreter=grad --out detector.safetensors
    """
    specs = [check_attack(parse(text)) for text in attacks]
    request = Request(checkpoint, **given)
    check_output(out, force, checkpoint)
    if vgg_weights is not None and extractor != "vgg16":
        raise UsageError("--vgg-weights is for --extractor vgg16: add it, or leave them out")
    with open_session(request.open_both) as session:
        from robusteval.defenses.detection import fit_detector
        from robusteval.evaluation.plan import prepare_attack

        classifier, images, progress, _ = session
        session.say_if_fewer(samples)
        if needs_rts([*specs, *interpreters]):
            ensure_masks(session, request, "train")
        done = session.resume_work(out)
        found = fit_detector(
            classifier,
            images,
            [str(spec) for spec in interpreters],
            [prepare_attack(spec, classifier, images.shape, data=images) for spec in specs],
            channels=channels,  # type: ignore[arg-type]  # a choice
            extractor=extractor,  # type: ignore[arg-type]
            confidence=confidence,
            tune=tune,
            samples=samples,
            seed=seed,
            start=load_vgg(vgg_weights, progress) if extractor == "vgg16" else None,
            done=done,
            progress=progress,
        )
    from rich.console import Console

    from robusteval.reports.console import make_printable, print_paragraph
    from robusteval.reports.detector import print_detector, render_detector_json

    tested = request.split == "train" and has_other_part(images, request.data_name, request.size)
    command = spell_evaluation(
        checkpoint,
        [
            ("data", request.data_name if tested else "IMAGES"),
            *((name, value) for name, value in request.model_options if name != "num_classes"),
            ("size", request.size),
            ("classes", request.classes),
            ("defense", out),
            *(("attack", spec) for spec in specs),
        ],
    )
    beside = out.with_suffix(".report.json")
    record = replace(found.report, command=spell_command())
    # the detector last: where it is, all is there
    write_atomically(beside, render_detector_json(record).encode())
    done.finish(out, found.detector.save)
    console = Console()
    with writing_stdout(), console.capture() as page:
        print_detector(record, console)
        console.print()
        unseen = "" if tested else " Take images it has not seen."
        print_paragraph(
            console,
            f"{out} holds the detector, {beside.name} all figures. What an attack that knows it"
            f" leaves of it:{unseen}",
        )
        console.print(make_printable(console, f"  {command}"), soft_wrap=True)
    emit(page.get())


def load_vgg(path: Path | None, progress: Bars) -> nn.Module:
    """VGG-16 as torchvision publishes it; never downloaded here."""
    import torch

    from robusteval.models.checkpoint import load

    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / VGG
        if not path.exists():
            raise UsageError(
                f"torchvision has not downloaded the weights of VGG-16 yet ({VGG}): give them with"
                " --vgg-weights, or take --extractor small_cnn"
            )
    progress.begin("Reading VGG-16", 1)
    network = load(path, arch="torchvision:vgg16").network
    progress.end()
    return network
