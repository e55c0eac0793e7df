"""What commands that run a model share: its options, progress, and an orderly stop."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import reduce
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

import click

from robusteval.errors import Interrupted, UsageError

from .shell import F, Whole, ask_for_details, option, read_numbers

if TYPE_CHECKING:
    from types import FrameType

    from robusteval.progress import Bars


def combine_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[F], F]:
    """Several options as one decorator, in this order in the help."""
    return lambda function: reduce(lambda made, add: add(made), reversed(options), function)


model_options = combine_options(
    [
        option(
            "Model",
            "--arch",
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, robusteval:NAME, path/to/file.py:function or"
            " package.module:function (runs that code), or a folder with config.json; not needed if"
            " the checkpoint says it.",
        ),
        option(
            "Model",
            "--mean",
            callback=read_numbers,
            metavar="R,G,B",
            help="Normalisation: mean per channel, or one for all. [default: the checkpoint's or"
            " the architecture's own]",
        ),
        option(
            "Model",
            "--std",
            callback=read_numbers,
            metavar="R,G,B",
            help="Normalisation: deviation per channel, or one for all.",
        ),
        option(
            "Model",
            "--num-classes",
            type=Whole(2),
            metavar="N",
            help="Passed to the architecture. [default: found from the weights]",
        ),
        option(
            "Model",
            "--weights",
            metavar="KEY",
            help="Which state dict of a file that holds several, such as state_dict_ema, or the"
            " prefix of the tensors that are meant. [default: the only one that fits]",
        ),
        option(
            "Model",
            "-v",
            "--verbose",
            is_flag=True,
            expose_value=False,
            callback=ask_for_details,
            help="If weights do not fit, list every tensor that differs.",
        ),
    ]
)


precision_options = combine_options(
    [
        option(
            "Model",
            "--dtype",
            type=click.Choice(("float32", "bfloat16", "float16")),
            default="float32",
            show_default=True,
            metavar="NAME",
            help="What the network computes in, as it is deployed: float32, bfloat16 or float16."
            " Weights are rounded to it if they are stored in another.",
        ),
        option(
            "Model",
            "--also-float32",
            is_flag=True,
            help="Judge what --dtype bfloat16 or float16 has judged in float32 as well, and count"
            " the images on which the two differ.",
        ),
    ]
)


shortcut_options = combine_options(
    [
        option(
            "Attacks",
            "--amp",
            is_flag=True,
            help="Attacks differentiate the network in half precision (torch's autocast), which is"
            " faster where the device has it; verdicts stay in float32, and the report counts on"
            " how many images the two differ.",
        ),
        option(
            "Attacks",
            "--compile",
            "compiled",
            is_flag=True,
            help="Attacks differentiate the network as torch.compile makes it, which takes a"
            " compiler and a minute first; verdicts stay as they are.",
        ),
    ]
)


INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

classes_option = option(
    "Data",
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the network's outputs in order, one a line or a JSON list: class folders are"
    " matched by name. [default: the checkpoint's or ImageNet's names, else their order]",
)


def split_names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Option callback: names separated by commas."""
    return None if value is None else value.split(",")


table_options = (
    option(
        "Data",
        "--columns",
        callback=split_names,
        metavar="IMAGE,LABEL",
        help="Columns of a CSV file with the image's path and its label. [default: file,label]",
    ),
    option(
        "Data",
        "--allow-outside",
        is_flag=True,
        help="Paths in a table (FILE.csv, index.csv of concepts) may lead out of its folder.",
    ),
)


def build_data_options(
    split: str, *, required: bool = False, about: str = "", pixels: str = "--size"
) -> Callable[[F], F]:
    """The options that name images; `split` is the part of named data sets by default.

    `pixels` is the option that resizes images, where `--size` says something else.
    """
    return combine_options(
        [
            option(
                "Data",
                "--data",
                metavar="DATA",
                required=required,
                help="Images and labels: digits, cifar10:DIR, a folder, FILE.csv, FILE.npz, ...;"
                f" see `robusteval list data`.{about}",
            ),
            option(
                "Data",
                "--split",
                type=click.Choice(("test", "train")),
                metavar="NAME",
                default=split,
                show_default=True,
                help="Part of a named data set: test or train.",
            ),
            option(
                "Data",
                pixels,
                "size",
                type=Whole(1),
                metavar="N",
                help="Resize and crop images to N x N pixels.",
            ),
            option(
                "Data",
                "--resize",
                type=Whole(1),
                metavar="N",
                help=f"Pixels of the shorter side before {pixels} crops the centre. [default: as"
                f" much larger as the network's publisher has it, else {pixels}]",
            ),
            option(
                "Data",
                "--interpolation",
                type=click.Choice(INTERPOLATIONS),
                metavar="NAME",
                help="Filter for resizing, such as bicubic. [default: as the network is published,"
                " else bilinear]",
            ),
            option(
                "Data",
                "--range",
                "value_range",
                callback=read_numbers,
                metavar="LOW,HIGH",
                help="Values of black and white in arrays and image files, such as 0,65535."
                " [default: 0,255 of integers, 0,1 of floats]",
            ),
            option(
                "Data",
                "--download",
                is_flag=True,
                help="Let torchvision download a data set that is missing.",
            ),
            classes_option,
            *table_options,
        ]
    )


data_options = build_data_options("test")

device_option = option(
    "Run",
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps, or auto: a GPU if there is one.",
)


def build_out_options(about: str) -> Callable[[F], F]:
    """Where something is written that `evaluate` reads; see `check_output`."""
    return combine_options(
        [
            option(
                "Run",
                "--out",
                type=click.Path(path_type=Path, dir_okay=False),
                required=True,
                metavar="FILE",
                help=f"The {about}",
            ),
            option("Run", "--force", is_flag=True, help="Replace what is there."),
        ]
    )


def check_output(out: Path, force: bool, checkpoint: str) -> None:
    """Refuse a place that nothing could be written to, before the work."""
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, not {out.name}")
    if Path(checkpoint).exists() and Path(checkpoint).resolve() == out.resolve():
        raise UsageError(f"--out would replace {checkpoint} itself: choose another")
    clear_finished_work(out, out)
    if out.exists() and not force:
        raise UsageError(f"{out} is there already: choose another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to the folder {out.parent}: {error.strerror}") from None


def locate_work(out: Path) -> Path:
    """The folder of what is finished of something that goes to `out`."""
    return out.with_suffix(".part")


def clear_finished_work(out: Path, result: Path) -> None:
    """Remove that folder where a kill has left it beside a `result` that is finished."""
    if locate_work(out).is_dir():
        from robusteval.evaluation.work_cache import WorkCache

        WorkCache(locate_work(out)).clear_if_done(result)


@contextmanager
def show_bars() -> Iterator[Bars]:
    """Progress on stderr; whatever other people's code prints or warns of goes there, too."""
    from robusteval.progress import Bars, Stderr

    with Bars(Stderr()) as progress, redirect_stdout(sys.stderr), warnings.catch_warnings():

        def said(
            message: Warning | str, category: type[Warning], *place: object, **more: object
        ) -> None:
            # without the place, which is a path of this machine
            progress.say(f"{category.__name__}: {' '.join(str(message).split())}")

        warnings.showwarning = said
        yield progress


class Stop:
    """How often a stop was asked for, whether there is something to save, and who says so."""

    asked = 0
    politely = False
    word = "Stopped."  # where nothing is left to save
    progress: Bars | None = None

    def loses_nothing(self) -> None:
        """From now on a stop, however sudden, is one to continue from."""
        self.word = describe_resumption()


@contextmanager
def handle_stops(fresh: bool) -> Iterator[Stop]:
    """Stop on Ctrl-C or SIGTERM: after a step, at once the second time, bluntly the third."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked += 1
        if stop.progress is None or not stop.politely or stop.asked > 2:
            abandon(stop.progress, stop.word)
        if stop.asked == 2:
            raise KeyboardInterrupt
        # by another thread: this one may be in the middle of writing to the same stream
        words = ("Stopping after this step; press Ctrl-C again to stop at once.",)
        Thread(target=stop.progress.say, args=words).start()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except (Interrupted, KeyboardInterrupt):
        how = "the same command without --fresh" if fresh else "the same command"
        raise Interrupted(describe_resumption(how)) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_resumption(how: str = "the same command") -> str:
    """What to say at a stop that loses nothing."""
    return f"Stopped; {how} continues where this one ended."


def abandon(progress: Bars | None, word: str) -> NoReturn:
    """Leave with a word from within a signal handler, when there is nothing to save.

    Without an exception: torch aborts with a dump if one comes while it is imported.
    """
    words = f"{word}\n"
    if progress is not None and progress.live:
        progress.console.quiet = True
        words = f"\r\x1b[2K\x1b[?25h{words}"  # take the bar away, show the cursor again
    with suppress(OSError):
        os.write(2, words.encode())
    os._exit(Interrupted.exit_code)


def spell_command() -> str:
    """The command as it was given, without the folders of this machine's user."""
    here, home = f"{Path.cwd()}/", os.path.expanduser("~") + "/"
    words = []
    for word in sys.argv[1:]:
        if here != "//":
            word = word.replace(here, "")
        pieces = word.split(home) if len(home) > 2 else [word]
        words.append('"$HOME"/'.join(shlex.quote(piece) if piece else "" for piece in pieces))
    return " ".join(["robusteval", *(word or "''" for word in words)])
