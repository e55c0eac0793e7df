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

from .shell import F, Whole, numbers, option

if TYPE_CHECKING:
    from types import FrameType

    from robusteval.datasets.sources import Data
    from robusteval.evaluation.work_cache import WorkCache
    from robusteval.models.classifier import Classifier
    from robusteval.progress import Bars
    from robusteval.runs.types import Spec


def together(options: Sequence[Callable[[Any], Any]]) -> Callable[[F], F]:
    """Several options as one decorator, in this order in the help."""
    return lambda function: reduce(lambda made, add: add(made), reversed(options), function)


model_options = together(
    [
        option(
            "Model",
            "--arch",
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, robusteval:NAME, path/to/file.py:function or"
            " package.module:function (runs that code); not needed if the checkpoint says it.",
        ),
        option(
            "Model",
            "--mean",
            callback=numbers,
            metavar="R,G,B",
            help="Normalisation: mean per channel, or one for all. [default: the checkpoint's or"
            " the architecture's own]",
        ),
        option(
            "Model",
            "--std",
            callback=numbers,
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
    ]
)


def data_from(split: str, *, required: bool = False, about: str = "") -> Callable[[F], F]:
    """The options that name images; `split` is the part of named data sets by default."""
    return together(
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
                "--size",
                type=Whole(1),
                metavar="N",
                help="Resize and crop images to N x N pixels.",
            ),
            option(
                "Data",
                "--download",
                is_flag=True,
                help="Let torchvision download a data set that is missing.",
            ),
        ]
    )


data_options = data_from("test")

device_option = option(
    "Run",
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps, or auto: a GPU if there is one.",
)


def out_options(about: str) -> Callable[[F], F]:
    """Where something is written that `evaluate` reads; see `check_out`."""
    return together(
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


def check_out(out: Path, force: bool, checkpoint: str) -> None:
    """Refuse a place that nothing could be written to, before the work."""
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, not {out.name}")
    if Path(checkpoint).exists() and Path(checkpoint).resolve() == out.resolve():
        raise UsageError(f"--out would replace {checkpoint} itself: choose another")
    if out.exists() and not force:
        raise UsageError(f"{out} is there already: choose another --out, or --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to the folder {out.parent}: {error.strerror}") from None


@contextmanager
def bars() -> Iterator[Bars]:
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


def opened(checkpoint: str, progress: Bars, *, device: str, **options: Any) -> Classifier:
    """The classifier in a checkpoint, on its device."""
    from robusteval.models.checkpoint import load, pick_device

    target = pick_device(device)
    if checkpoint == "demo":
        from robusteval.models.demo import demo

        def trained(done: int, total: int) -> None:
            if done == 0:
                progress.begin("Training the demo network", total)
            else:
                progress.advance(1)
            if done == total:
                progress.end()

        checkpoint = str(demo(progress=trained))
    return load(checkpoint, **options, device=target)


def images_for(
    classifier: Classifier, spec: str, split: str, download: bool, size: int | None
) -> Data:
    """The data as this classifier takes it."""
    from robusteval.datasets.sources import open_data

    hint = classifier.identity
    resize = None
    photos = Path(spec).is_dir() or spec.lower().endswith(".csv") or spec.startswith("imagenet:")
    if size is None and photos and hint.get("num_classes") == 1000:
        # what torchvision's networks for ImageNet are made for
        size, resize = hint.get("size"), hint.get("resize")
    return open_data(
        spec,
        split=split,
        download=download,
        channels=hint.get("input_channels"),
        size=size,
        resize=resize,
    )


def needs_rts(specs: Sequence[Spec]) -> bool:
    """Whether one of these attacks or interpreters needs the trained masks of RTS."""
    names = "+".join(str(spec.parameters.get("interpreter", spec.name)) for spec in specs)
    return "rts" in names.split("+")


def masks_for(
    classifier: Classifier, spec: str, images: Data, other: str, size: int | None, progress: Bars
) -> None:
    """The mask network of RTS for this classifier, kept or trained on the spot.

    On the other split of named data; on these images themselves where there is none, which a
    message says.
    """
    from robusteval.interpreters.rts_training import prepare_rts

    try:
        train = images_for(classifier, spec, other, False, size)
    except UsageError:
        train = images
    if train.name == images.name and len(train) == len(images):
        progress.say(
            "The masks of rts are trained on the images they explain: there are no others."
        )
    prepare_rts(classifier, train, progress=progress)


class Stop:
    """How often a stop was asked for, whether there is something to save, and who says so."""

    asked = 0
    politely = False
    word = "Stopped."  # where nothing is left to save
    progress: Bars | None = None


@contextmanager
def stoppable(fresh: bool) -> Iterator[Stop]:
    """Stop on Ctrl-C or SIGTERM: after the batch, at once the second time, bluntly the third."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked += 1
        if stop.progress is None or not stop.politely or stop.asked > 2:
            abandon(stop.progress, stop.word)
        if stop.asked == 2:
            raise KeyboardInterrupt
        # by another thread: this one may be in the middle of writing to the same stream
        words = ("Finishing the batch; press Ctrl-C again to stop at once.",)
        Thread(target=stop.progress.say, args=words).start()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except (Interrupted, KeyboardInterrupt):
        how = "the same command without --fresh" if fresh else "the same command"
        raise Interrupted(resumed(how)) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resumed(how: str = "the same command") -> str:
    """What to say at a stop that loses nothing."""
    return f"Stopped; {how} continues where this one ended."


def taken_up(out: Path, stop: Stop) -> WorkCache:
    """What an earlier call has finished of `out`; from now on a stop loses little."""
    from robusteval.evaluation.work_cache import WorkCache

    done = WorkCache(out.with_suffix(".part"))
    if done.has_results and stop.progress is not None:
        stop.progress.say(f"Continuing with what {done.folder} holds.")
    stop.word = resumed()
    return done


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


def command_line() -> str:
    """The command as it was given, without the folders of this machine's user."""
    here, home = f"{Path.cwd()}/", os.path.expanduser("~") + "/"
    words = []
    for word in sys.argv[1:]:
        if here != "//":
            word = word.replace(here, "")
        pieces = word.split(home) if len(home) > 2 else [word]
        words.append('"$HOME"/'.join(shlex.quote(piece) if piece else "" for piece in pieces))
    return " ".join(["robusteval", *(word or "''" for word in words)])
