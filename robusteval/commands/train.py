"""`robusteval train`: a checkpoint that is right under attack more often."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.errors import RobustevalError, UsageError
from robusteval.runs.statistics import Rate
from robusteval.runs.types import format_number

from .running import bars, device_option, model_options, opened, stoppable
from .shell import Command, Whole, emit, number, numbers, option, radius

if TYPE_CHECKING:
    from robusteval.datasets.sources import Data
    from robusteval.defenses.training import TrainingResult
    from robusteval.defenses.training_settings import TrainingSettings
    from robusteval.models.classifier import Classifier
    from robusteval.progress import Bars
    from robusteval.reports.training import TrainingRecord

OBJECTIVES = ("standard", "adv", "trades", "int", "int2", "int_adv", "int2_adv", "one_class")


def factor(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: a number or a fraction."""
    return None if value is None else number(ctx, param, value)


@click.command(cls=Command, short_help="Train a classifier that withstands attacks.")
@option(
    "Data",
    "--data",
    metavar="DATA",
    required=True,
    help="Images and labels: digits, cifar10:DIR, a folder, FILE.csv, FILE.npz, ...; see"
    " `robusteval list data`. Of named data sets the part for training is taken.",
)
@option(
    "Data", "--size", type=Whole(1), metavar="N", help="Resize and crop images to N x N pixels."
)
@option(
    "Data",
    "--download",
    is_flag=True,
    help="Let torchvision download a data set that is missing.",
)
@option(
    "Data",
    "--held-out",
    type=Whole(1),
    metavar="N",
    help="Images that epochs are judged on instead of trained on. [default: a tenth or 200, at"
    " most a fifth and 1000]",
)
@option(
    "Data",
    "--augment",
    type=click.Choice(("auto", "none", "crop", "crop+flip")),
    metavar="NAME",
    default="auto",
    show_default=True,
    help="Shift images by up to an eighth, and mirror them; auto: both for colour images, neither"
    " for grey ones.",
)
@model_options
@option(
    "Model",
    "--from",
    "start",
    metavar="CHECKPOINT",
    help="Start from these weights instead of random ones; demo is one.",
)
@option(
    "Objective",
    "--objective",
    type=click.Choice(OBJECTIVES),
    metavar="NAME",
    default="adv",
    show_default=True,
    help="standard, adv (the images an attack finds), trades, or one with the network's class"
    " activation maps (arXiv:2006.14748): int, int2, int_adv, int2_adv, one_class.",
)
@option(
    "Objective",
    "--eps",
    callback=radius,
    default="8/255",
    show_default=True,
    metavar="NUMBER",
    help="Radius in linf to withstand, of the [0, 1] pixel range.",
)
@option(
    "Objective",
    "--steps",
    type=Whole(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Steps of the attack on each batch; training takes about N + 2 times as long as without.",
)
@option(
    "Objective",
    "--step",
    callback=factor,
    metavar="NUMBER",
    help="Length of a step. [default: 2.5 * eps / steps]",
)
@option(
    "Objective",
    "--warmup",
    callback=numbers,
    metavar="A,B",
    help="Epochs up to which eps is 0, and from which it is whole. [default: 0 and a quarter of"
    " them]",
)
@option(
    "Objective",
    "--gamma",
    callback=factor,
    default="0.5",
    show_default=True,
    metavar="NUMBER",
    help="Weight of the maps; they are divided by their number of positions, unlike in the code"
    " of the paper, whose .01 is .49 here for maps of 7x7.",
)
@option(
    "Objective",
    "--weighting",
    type=click.Choice(("softmax", "runner_up")),
    metavar="NAME",
    default="softmax",
    show_default=True,
    help="How maps of wrong classes count: softmax, or runner_up alone.",
)
@option(
    "Objective",
    "--beta",
    callback=factor,
    default="6",
    show_default=True,
    metavar="NUMBER",
    help="Weight of the divergence of trades.",
)
@option(
    "Training",
    "--epochs",
    type=Whole(1),
    default=20,
    show_default=True,
    metavar="N",
    help="Passes over the images.",
)
@option(
    "Training",
    "--batch-size",
    type=Whole(2),
    default=64,
    show_default=True,
    metavar="N",
    help="Images per step.",
)
@option(
    "Training",
    "--rate",
    callback=factor,
    default="0.003",
    show_default=True,
    metavar="NUMBER",
    help="Learning rate of Adam at its highest.",
)
@option(
    "Training",
    "--schedule",
    type=click.Choice(("cosine", "step")),
    metavar="NAME",
    default="cosine",
    show_default=True,
    help="How the rate falls: along a cosine, or tenfold after 4/7 and 6/7 of the training.",
)
@option(
    "Training",
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Decides the first weights, which images are held out, the order of the others, and all"
    " noise.",
)
@option(
    "Run",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The checkpoint to write, ending in .safetensors; history and curve go beside it.",
)
@option("Run", "--fresh", is_flag=True, help="Replace what is there, and begin anew.")
@device_option
def train(
    data: str,
    size: int | None,
    download: bool,
    held_out: int | None,
    augment: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    num_classes: int | None,
    start: str | None,
    objective: str,
    eps: float,
    steps: int,
    step: float | None,
    warmup: list[float] | None,
    gamma: float,
    weighting: str,
    beta: float,
    epochs: int,
    batch_size: int,
    rate: float,
    schedule: str,
    seed: int,
    out: Path,
    fresh: bool,
    device: str,
) -> None:
    """Train a classifier that withstands attacks, or go on training one.

    The epoch that is most often right under attack is kept, as a checkpoint that `robusteval
    evaluate` opens without options. The same command continues a training that was stopped. With
    several GPUs: torchrun --nproc-per-node N -m robusteval train ...

    \b
    Examples:
      robusteval train --data digits --arch robusteval:digits_cnn \\
        --out net.safetensors
      robusteval train --data cifar10:data --from net.pt \\
        --arch torchvision:resnet18 --objective int_adv --epochs 10 \\
        --out hardened.safetensors
    """
    if arch is None and start is None:
        raise UsageError(
            "say what to train: --arch for random weights, such as --arch robusteval:digits_cnn,"
            " or --from a checkpoint"
        )
    if start is not None and Path(start).resolve() == out.resolve():
        raise UsageError(f"--out would replace {start}, which --from starts from: choose another")
    if warmup is not None and len(warmup) != 2:
        raise UsageError("--warmup takes two numbers of epochs, such as --warmup 1,5")
    with stoppable(fresh) as stop, bars() as progress:
        stop.progress = progress
        from robusteval.defenses.training import train as trained
        from robusteval.defenses.training_files import is_helper
        from robusteval.defenses.training_settings import TrainingSettings

        progress.console.quiet = is_helper()
        if device in ("auto", "cuda") and "LOCAL_RANK" in os.environ:
            device = own_device(int(os.environ["LOCAL_RANK"]))

        settings = TrainingSettings(
            objective=objective,
            eps=eps,
            steps=steps,
            step=step,
            gamma=gamma,
            beta=beta,
            weighting=weighting,  # type: ignore[arg-type]  # a choice
            epochs=epochs,
            batch_size=batch_size,
            rate=rate,
            schedule=schedule,  # type: ignore[arg-type]
            warmup=None if warmup is None else (warmup[0], warmup[1]),
            augment=augment,  # type: ignore[arg-type]
            held_out=held_out,
            seed=seed,
        )
        classifier, images = begun(
            start,
            data,
            size,
            download,
            settings,
            device,
            progress,
            arch,
            mean=mean,
            std=std,
            num_classes=num_classes,
        )
        for note in images.notes:
            progress.say(note)
        stop.politely = True
        found = trained(
            classifier,
            images,
            out,
            settings,
            fresh=fresh,
            progress=progress,
            stopping=lambda: stop.asked > 0,
        )
    if not is_helper():
        from robusteval.reports.training import render_training

        emit(
            render_training(describe_training(found, settings, images))
            + how_to_judge(found.path, settings, images, data, size, arch)
        )


def own_device(rank: int) -> str:
    """The GPU of this process among those that `torchrun` has started on this machine."""
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def begun(
    start: str | None,
    data: str,
    size: int | None,
    download: bool,
    settings: TrainingSettings,
    device: str,
    progress: Bars,
    arch: str | None,
    **options: Any,
) -> tuple[Classifier, Data]:
    """The classifier to train, and its images."""
    from robusteval.datasets.sources import open_data
    from robusteval.defenses.training_start import build_untrained, find_input_channels
    from robusteval.models.checkpoint import pick_device

    def images(channels: int | None) -> Data:
        return open_data(data, split="train", download=download, channels=channels, size=size)

    if start is not None:
        classifier = opened(start, progress, device=device, arch=arch, **options)
        if "mask" in classifier.identity:
            raise UsageError(f"{start} has masked units, which training cannot keep: train before")
        return classifier, images(classifier.identity.get("input_channels"))
    assert arch is not None
    target = pick_device(device)
    found = images(find_input_channels(arch))
    return build_untrained(arch, found, settings, device=target, **options), found


def describe_training(
    found: TrainingResult, settings: TrainingSettings, images: Data
) -> TrainingRecord:
    """The record of a training."""
    from robusteval.reports.training import TrainingRecord

    best = found.best
    return TrainingRecord(
        file=str(found.path),
        stem=found.path.stem,
        epoch=best.epoch,
        epochs=len(found.history),
        data=images.name,
        clean=Rate(best.clean, best.held_out),
        robust=Rate(best.robust, best.held_out),
        steps=2 * settings.steps,
        eps=settings.eps,
        bound_ratio=best.bound_ratio,
        below_bound=best.below_bound,
    )


def how_to_judge(
    path: Path,
    settings: TrainingSettings,
    images: Data,
    data: str,
    size: int | None,
    arch: str | None,
) -> str:
    """The command that measures what was trained."""
    words = ["robusteval", "evaluate", str(path), "--data"]
    if tested := has_other_part(images, data, size):
        words.append(data)
    else:
        words.append("IMAGES")
    if size is not None:
        words += ["--size", str(size)]
    if arch is not None and not arch.startswith(("torchvision:", "robusteval:")):
        words += ["--arch", arch]
    if settings.eps:
        words += ["--attack", f"pgd:eps={format_number(settings.eps)},steps=100,restarts=5"]
    unseen = "" if tested else f" on images it has not seen ({data} has no other part)"
    return (
        f"The epoch was chosen by these images, which flatters it. Measure it{unseen} with\n"
        f"  {shlex.join(words)}\n"
    )


def has_other_part(images: Data, data: str, size: int | None) -> bool:
    """Whether `evaluate` would by itself take other images of this data than were trained on."""
    from robusteval.datasets.sources import open_data

    try:
        other = open_data(data, channels=images.shape[0], size=size)
    except RobustevalError:
        return False
    return other.source.raw(0) != images.source.raw(0) or len(other) != len(images)
