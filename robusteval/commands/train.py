"""`robusteval train`: a checkpoint that is right under attack more often."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.errors import UsageError
from robusteval.runs.types import format_number

from .measuring import find_unseen, spell_evaluation
from .running import (
    classes_option,
    combine_options,
    device_option,
    model_options,
    table_options,
)
from .session import Session, load_model, open_session
from .shell import (
    Command,
    Option,
    Whole,
    emit,
    emit_lines,
    option,
    read_factor,
    read_numbers,
    read_radius,
)

if TYPE_CHECKING:
    from robusteval.datasets.dataset import Data
    from robusteval.defenses.training import TrainingResult
    from robusteval.defenses.training_settings import TrainingSettings
    from robusteval.models.classifier import Classifier
    from robusteval.progress import Bars
    from robusteval.reports.training import TrainingRecord
# hyper-parameters as the help lists them below each heading; those not named here come last
ORDER = (
    *("held_out", "augment"),
    *("objective", "eps", "steps", "step", "search", "warmup", "awp"),
    *("gamma", "weighting", "beta"),
)


def read_warmup(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    """Option callback: two numbers separated by a comma."""
    found = read_numbers(ctx, param, value)
    if found is None:
        return None
    if len(found) != 2:
        raise UsageError("--warmup takes two numbers of epochs, such as --warmup 1,5")
    return found[0], found[1]


def build_option(field: Field[Any]) -> Option:
    """The option of a hyper-parameter, from the field's default and metadata."""
    known = field.metadata
    attributes: dict[str, Any] = {}
    if "choices" in known:
        attributes["type"] = click.Choice(known["choices"])
    elif "least" in known:
        attributes["type"] = Whole(known["least"])
    else:
        special = {"eps": read_radius, "warmup": read_warmup}
        attributes["callback"] = special.get(field.name, read_factor)
    default: Any = field.default
    if default is not None:
        number = isinstance(default, float)
        attributes["default"] = format_number(default) if number else default
        attributes["show_default"] = True
    return Option(
        [f"--{field.name.replace('_', '-')}"],
        heading=known["heading"],
        metavar=known["metavar"],
        help=known["help"],
        **attributes,
    )


class TrainCommand(Command):
    """A command with an option for each hyper-parameter of a training.

    They are read from `TrainingSettings` when somebody asks for them: defenses are opened late, as
    by all commands.
    """

    _own: list[click.Parameter]
    _all: list[click.Parameter] | None = None

    @property
    def params(self) -> list[click.Parameter]:
        """Options and arguments; hyper-parameters stand before those of the run."""
        if self._all is None:
            place = [parameter.name for parameter in self._own].index("out")
            self._all = [*self._own[:place], *list_hyper_parameters(), *self._own[place:]]
        return self._all

    @params.setter
    def params(self, own: list[click.Parameter]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._own = own


def list_hyper_parameters() -> Iterator[Option]:
    """The options of a training, in the order of the help."""
    from robusteval.defenses.training_settings import TrainingSettings

    known = {field.name: field for field in fields(TrainingSettings)}
    for name in dict.fromkeys([*ORDER, *known]):
        yield build_option(known[name])


@click.command(cls=TrainCommand, short_help="Train a classifier that withstands attacks.")
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
    "--extra-data",
    metavar="DATA",
    help="More images of the same classes, such as generated ones: all are trained on, none is held"
    " out.",
)
@option(
    "Data",
    "--download",
    is_flag=True,
    help="Let torchvision download a data set that is missing.",
)
@classes_option
@combine_options(table_options)
@model_options
@option(
    "Model",
    "--from",
    "start",
    metavar="CHECKPOINT",
    help="Start from these weights instead of random ones; demo is one.",
)
@option(
    "Model",
    "--new-head",
    is_flag=True,
    help="Give the network of --from a new last layer for the classes of DATA, to fine-tune it.",
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
    classes: Path | None,
    columns: list[str] | None,
    allow_outside: bool,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    num_classes: int | None,
    weights: str | None,
    start: str | None,
    new_head: bool,
    extra_data: str | None,
    out: Path,
    fresh: bool,
    device: str,
    **hyper_parameters: Any,
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
    if start is None and weights is not None:
        raise UsageError("--weights chooses in a checkpoint: name one with --from")
    if start is None and new_head:
        raise UsageError("--new-head is for the network of a checkpoint: name one with --from")
    if start is not None and Path(start).resolve() == out.resolve():
        raise UsageError(f"--out would replace {start}, which --from starts from: choose another")
    from robusteval.defenses.training_settings import TrainingSettings

    settings = TrainingSettings(**hyper_parameters)

    def open_both(progress: Bars) -> tuple[Classifier, Data]:
        from robusteval.datasets.class_names import read_class_names
        from robusteval.datasets.sources import open_data
        from robusteval.defenses.training_files import is_helper

        progress.console.quiet = is_helper()
        options = {"mean": mean, "std": std, "num_classes": num_classes}
        place = choose_device(device)
        open_images = partial(
            open_data,
            data,
            split="train",
            download=download,
            size=size,
            classes=None if classes is None else read_class_names(classes),
            columns=columns,
            allow_outside=allow_outside,
        )
        if start is None:
            return start_untrained(str(arch), open_images, settings, place, **options)
        if new_head:
            known = {"arch": arch, "weights": weights, "mean": mean, "std": std, "device": place}
            return fine_tune(start, open_images, progress, settings, num_classes, **known)
        return continue_trained(
            start, open_images, progress, arch=arch, weights=weights, device=place, **options
        )

    with open_session(open_both, fresh=fresh) as session:
        from robusteval.defenses.training import train as train_classifier
        from robusteval.defenses.training_files import is_helper

        session.stop.politely = True
        extra = None
        if extra_data is not None:
            extra = open_extra(session, extra_data, size, classes, columns, allow_outside)
        found = train_classifier(
            session.classifier,
            session.images,
            out,
            settings,
            extra=extra,
            fresh=fresh,
            progress=session.progress,
            stopping=lambda: session.stop.asked > 0,
        )
    if not is_helper():
        from robusteval.reports.training import render_training

        emit(render_training(describe_training(found, settings, session.images)))
        # a folder of the hub has the architecture as well
        built = start if arch is None and start is not None and os.path.isdir(start) else arch
        emit_lines(
            explain_measuring(found.path, settings, session.images, data, size, built, classes)
        )


def choose_device(device: str) -> str:
    """The device named; of several processes that `torchrun` has started, each one its own GPU."""
    if device not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return f"cuda:{int(os.environ['LOCAL_RANK'])}" if torch.cuda.is_available() else "cpu"


def start_untrained(
    arch: str,
    open_images: Callable[..., Data],
    settings: TrainingSettings,
    device: str,
    **options: Any,
) -> tuple[Classifier, Data]:
    """A classifier with random weights, and the images to train it on."""
    from robusteval.defenses.training_start import build_untrained, find_input_channels
    from robusteval.models.environment import pick_device

    target = pick_device(device)
    channels = find_input_channels(arch)
    images = open_images(channels=channels)
    return build_untrained(arch, images, settings, device=target, **options), images


def continue_trained(
    start: str,
    open_images: Callable[..., Data],
    progress: Bars,
    **options: Any,
) -> tuple[Classifier, Data]:
    """The classifier in a checkpoint, and the images to go on training it on."""
    from robusteval.datasets.class_names import match_classes

    classifier = load_model(start, progress, **options)
    if "mask" in classifier.identity:
        raise UsageError(f"{start} has masked units, which training cannot keep: train before")
    channels = classifier.identity.get("input_channels")
    images = open_images(channels=channels)
    return classifier, match_classes(images, classifier.num_classes, classifier.class_names)


def fine_tune(
    start: str,
    open_images: Callable[..., Data],
    progress: Bars,
    settings: TrainingSettings,
    num_classes: int | None,
    **options: Any,
) -> tuple[Classifier, Data]:
    """The network in a checkpoint with a new last layer, and the images to train it on."""
    from robusteval.defenses.training_start import replace_head

    classifier = load_model(start, progress, **options)
    images = open_images(channels=classifier.identity.get("input_channels"))
    return replace_head(classifier, images, settings, num_classes), images


def open_extra(
    session: Session,
    data: str,
    size: int | None,
    classes: Path | None,
    columns: list[str] | None,
    allow_outside: bool,
) -> Data:
    """More images to train on, in the form of the others."""
    from robusteval.datasets.class_names import match_classes, read_class_names
    from robusteval.datasets.sources import open_data

    found = open_data(
        data,
        split="train",
        channels=session.images.shape[0],
        size=size,
        classes=None if classes is None else read_class_names(classes),
        columns=columns,
        allow_outside=allow_outside,
    )
    return match_classes(found, session.classifier.num_classes, session.classifier.class_names)


def describe_training(
    found: TrainingResult, settings: TrainingSettings, images: Data
) -> TrainingRecord:
    """The record of a training."""
    from robusteval.reports.training import TrainingRecord
    from robusteval.runs.statistics import Rate

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


def explain_measuring(
    path: Path,
    settings: TrainingSettings,
    images: Data,
    data: str,
    size: int | None,
    arch: str | None,
    classes: Path | None,
) -> list[str]:
    """How to measure what was trained, in lines."""
    unseen = find_unseen(images, data, size)
    known = arch is None or arch.startswith(("torchvision:", "robusteval:"))
    attack = f"pgd:eps={format_number(settings.eps)},steps=100,restarts=5"
    command = spell_evaluation(
        str(path),
        [
            ("data", unseen.data),
            ("size", size),
            ("classes", classes),
            ("arch", None if known else arch),
            ("attack", attack if settings.eps else None),
        ],
    )
    flatters = "The epoch was chosen by these images, which flatters it."
    return [f"{flatters} Measure it{unseen.clause} with", f"  {command}"]
