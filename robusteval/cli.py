"""The command line: parse, call, print.

Nothing heavy is imported before it is needed, so that help, lists and reports come at once.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from robusteval import __version__
from robusteval.errors import Interrupted, NothingEvaluated, RobustevalError, RunError, UsageError
from robusteval.preset import Preset, check, read_preset, shipped, with_eps
from robusteval.records import Run, Spec, load_run, visible
from robusteval.records import show as show_value
from robusteval.registry import ATTACKS, parse, read_number

if TYPE_CHECKING:
    from types import FrameType

    from robusteval.data import Data
    from robusteval.model import Classifier
    from robusteval.progress import Bars

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group that ends in the documented exit codes, whatever happens."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; code of a user or of ART has no say in how the process ends."""
        try:
            return super().invoke(ctx)
        except SystemExit:
            raise RunError("the network or an attack tried to end the program") from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and leave; a foreseeable failure becomes one sentence and its code."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # it is None where the stream is closed
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            with suppress(OSError):
                error.show()
            code = UsageError.exit_code
        except (click.Abort, Interrupted) as error:
            tell(str(error) or "Stopped.")
            code = Interrupted.exit_code
        except RobustevalError as error:
            tell(f"Error: {error}")
            code = error.exit_code
        except SystemExit:
            code = 0  # Click's way out when the reader of its help has left
        except OSError as error:
            tell(f"Error: the system says: {error}")
            code = RunError.exit_code
        except Exception as error:
            if os.environ.get("ROBUSTEVAL_TRACEBACK"):
                traceback.print_exc()
            tell(
                f"Error: internal error ({type(error).__name__}: {error}). This is a bug in"
                " robusteval: please report it, with what ROBUSTEVAL_TRACEBACK=1 prints."
            )
            code = RunError.exit_code
        sys.exit(code)


def tell(text: str) -> None:
    """Lines on stderr, if anybody still reads it."""
    with suppress(OSError):
        click.echo("\n".join(map(visible, text.split("\n"))), err=True)


class Option(click.Option):
    """An option below a heading of its own in the help."""

    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class Command(click.Command):
    """A command whose help has its options below headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in their order."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row and isinstance(parameter, click.Option):
                rows.setdefault(getattr(parameter, "heading", "Help"), []).append(row)
        for heading, pairs in rows.items():
            with formatter.section(heading):
                formatter.write_dl(pairs)


class Whole(click.IntRange):
    """A whole number with a least value."""

    name = "whole number"


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="robusteval")
def cli() -> None:
    """Robustness evaluation of image classifiers, with numbers that can be believed.

    Start with `robusteval evaluate demo`.

    \b
    Exit codes: 0 done, 2 asked wrongly, 3 something broke (finished parts are
    saved), 4 checkpoint refused for safety, 5 nothing evaluated, 130 stopped.
    """


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Option callback: numbers or fractions separated by commas."""
    return None if value is None else [number(ctx, param, item) for item in value.split(",")]


def number(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A number or a fraction."""
    try:
        return read_number(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not {error}", ctx, param) from None


def radius(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Option callback: a number or a fraction, not negative."""
    if value is None:
        return None
    eps = number(ctx, param, value)
    if eps < 0:
        raise click.BadParameter(f"{value!r} is negative")
    return eps


def batches(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Option callback: a positive whole number, or auto."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a whole number above 0 nor 'auto'")
    return int(value)


def option(heading: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """An option below a heading."""
    return click.option(*names, cls=Option, heading=heading, **attributes)


FORMAT: dict[str, Any] = {
    "type": click.Choice(("table", "json", "markdown")),
    "default": "table",
    "show_default": True,
    "metavar": "FORMAT",
    "help": "How to print the report on stdout: table, json or markdown.",
}


@cli.command(cls=Command)
@click.argument("checkpoint")
@option(
    "Model",
    "--arch",
    metavar="SPEC",
    help="torchvision:NAME, timm:NAME, robusteval:NAME, path/to/file.py:function or"
    " package.module:function (runs that code); not needed if the checkpoint says it.",
)
@option(
    "Model",
    "--mean",
    callback=numbers,
    metavar="R,G,B",
    help="Normalisation: mean per channel, or one for all. [default: the checkpoint's or the"
    " architecture's own]",
)
@option(
    "Model",
    "--std",
    callback=numbers,
    metavar="R,G,B",
    help="Normalisation: deviation per channel, or one for all.",
)
@option(
    "Model",
    "--num-classes",
    type=Whole(2),
    metavar="N",
    help="Passed to the architecture. [default: found from the weights]",
)
@option(
    "Data",
    "--data",
    metavar="DATA",
    help="Images and labels: digits, cifar10:DIR, a folder, FILE.csv, FILE.npz, ...;"
    " see `robusteval list data`.",
)
@option(
    "Data",
    "--split",
    type=click.Choice(("test", "train")),
    metavar="NAME",
    default="test",
    show_default=True,
    help="Part of a named data set: test or train.",
)
@option(
    "Data", "--size", type=Whole(1), metavar="N", help="Resize and crop images to N x N pixels."
)
@option(
    "Data", "--download", is_flag=True, help="Let torchvision download a data set that is missing."
)
@option(
    "Data",
    "--samples",
    type=Whole(1),
    metavar="N",
    help="Evaluate N images, drawn at random. [default: all]",
)
@option(
    "Attacks",
    "--attack",
    "attacks",
    multiple=True,
    metavar="SPEC",
    help="Such as pgd:eps=8/255,steps=20 or art:SquareAttack:eps=8/255; may be repeated."
    " See `robusteval list attacks`.",
)
@option(
    "Attacks",
    "--preset",
    metavar="NAME",
    help="A set of attacks by name, or a TOML file; see `robusteval list presets`."
    " [default: quick, unless --attack is given]",
)
@option(
    "Attacks",
    "--eps",
    callback=radius,
    metavar="NUMBER",
    help="Another radius for the attacks of the preset, such as 4/255.",
)
@option(
    "Attacks",
    "--seed",
    type=Whole(0),
    metavar="N",
    help="Decides which images are drawn, and all noise. [default: 0]",
)
@option(
    "Attacks",
    "--no-probes",
    is_flag=True,
    help="Skip the extra attacks of the trust checks.",
)
@option(
    "Run",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; one that holds this run is continued. [default: one below runs/]",
)
@option(
    "Run", "--fresh", is_flag=True, help="Throw away what the run folder holds, and start anew."
)
@option(
    "Run",
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps, or auto: a GPU if there is one.",
)
@option(
    "Run",
    "--batch-size",
    callback=batches,
    default="auto",
    show_default=True,
    metavar="N",
    help="Images attacked at a time; changes no result.",
)
@option("Run", "--format", "form", **FORMAT)
def evaluate(
    checkpoint: str,
    data: str | None,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    num_classes: int | None,
    attacks: tuple[str, ...],
    preset: str | None,
    eps: float | None,
    samples: int | None,
    seed: int | None,
    device: str,
    batch_size: int | None,
    split: str,
    size: int | None,
    download: bool,
    out: Path | None,
    fresh: bool,
    no_probes: bool,
    form: str,
) -> None:
    """Attack the classifier in CHECKPOINT and say how robust it is.

    CHECKPOINT is a .safetensors, .pt, .pth or .th file with a state dict, or `demo`: a small
    network that is trained on handwritten digits in a few seconds.

    The same command continues a run that was stopped.

    \b
    Examples:
      robusteval evaluate demo
      robusteval evaluate net.pt --arch torchvision:resnet18 --data photos/ \\
        --samples 500 --attack pgd:eps=4/255,steps=20
    """
    specs, settings = chosen(preset, attacks, eps)
    samples = samples or settings.samples
    seed = settings.seed or 0 if seed is None else seed
    if data is None and checkpoint != "demo":
        raise UsageError("say what to attack with --data; `robusteval list data` shows the forms")

    with stoppable(fresh) as stop, bars() as progress:
        stop.progress = progress
        from robusteval.evaluate import execute
        from robusteval.plan import prepare

        classifier = opened(
            checkpoint,
            progress,
            arch=arch,
            mean=mean,
            std=std,
            num_classes=num_classes,
            device=device,
        )
        images = images_for(classifier, data or "digits", split, download, size)
        for note in images.notes:
            progress.say(note)
        if samples and samples > len(images):
            progress.say(f"{images.name} has no more than {len(images)} images: all are taken.")
        plan = prepare(
            classifier,
            images,
            specs,
            samples=samples,
            seed=seed,
            probes=not no_probes,
            progress=progress,
        )
        name = "demo" if checkpoint == "demo" else Path(checkpoint).stem
        stop.politely = True
        run = execute(
            plan,
            out or Path("runs") / f"{name}-{plan.key[:8]}",
            batch_size=batch_size,
            fresh=fresh,
            progress=progress,
            stopping=lambda: stop.asked > 0,
            command=command_line(),
        )
    show(run, form)
    conclude(run)


def chosen(
    preset: str | None, attacks: tuple[str, ...], eps: float | None
) -> tuple[list[Spec], Preset]:
    """The attacks asked for, names and parameters checked, and other settings of the preset."""
    specs = [check(parse(text)) for text in attacks]
    if attacks and not preset:
        if eps is not None:
            raise UsageError("--eps is for the attacks of a preset: write --attack NAME:eps=...")
        return specs, Preset(())
    settings = read_preset(preset or "quick")
    theirs = settings.attack
    if eps is not None:
        theirs = tuple(with_eps(spec, eps) for spec in theirs)
        if all("eps" not in spec.parameters for spec in theirs):
            raise UsageError(f"no attack of the preset {preset} has a radius that --eps could set")
    return [*theirs, *specs], settings


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
    from robusteval.checkpoint import load, pick_device

    target = pick_device(device)
    if checkpoint == "demo":
        from robusteval.zoo import demo

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
    from robusteval.data import open_data

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


class Stop:
    """How often a stop was asked for, whether there is something to save, and who says so."""

    asked = 0
    politely = False
    progress: Bars | None = None


@contextmanager
def stoppable(fresh: bool) -> Iterator[Stop]:
    """Stop on Ctrl-C or SIGTERM: after the batch, at once the second time, bluntly the third."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked += 1
        if stop.progress is None or not stop.politely or stop.asked > 2:
            abandon(stop.progress)
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
        raise Interrupted(f"Stopped; {how} continues where this one ended.") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def abandon(progress: Bars | None) -> NoReturn:
    """Leave from within a signal handler, when there is nothing to save.

    Without an exception: torch aborts with a dump if one comes while it is imported.
    """
    words = "Stopped.\n"
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


def show(run: Run, form: str) -> None:
    """Print the report on stdout."""
    if form == "json":
        from robusteval.reports.tables import to_json

        emit(to_json(run) + "\n")
    elif form == "markdown":
        from robusteval.reports.markdown import to_markdown

        emit(to_markdown(run))
    else:
        from rich.console import Console

        from robusteval.reports.terminal import print_table

        console = Console()
        with written(), console.capture() as page:  # leaving it writes, if only nothing
            print_table(run, console)
        emit(page.get())


def emit(text: str) -> None:
    """Write to stdout."""
    with written():
        click.echo(text, nl=False, color=True)  # or Click would undo what rich has decided


@contextmanager
def written() -> Iterator[None]:
    """Say what is wrong with stdout; that its reader has left, as `head` does, is not."""
    try:
        yield
    except BrokenPipeError:
        # or Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise RunError(f"cannot write to stdout: {error.strerror}") from None


def conclude(run: Run) -> None:
    """Leave with the code that fits the run."""
    if run.failures:
        raise RunError(
            f"{len(run.failures)} of {len(run.failures) + len(run.attacks)} attacks have no result"
        )
    if not (run.clean["pred_clean"] == run.clean["label"]).any():
        raise NothingEvaluated("no image is classified correctly, so there is nothing to attack")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "form", **FORMAT)
def report(run: Path, form: str) -> None:
    """Print the report of RUN, a run folder, again.

    \b
    Example:
      robusteval report runs/demo-0123abcd --format markdown
    """
    show(load_run(run), form)


@cli.command(name="list")
@click.argument(
    "what",
    metavar="[WHAT]",
    type=click.Choice(("attacks", "data", "presets")),
    required=False,
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def list_(what: str | None, as_json: bool) -> None:
    """Show what there is: WHAT is attacks, data or presets; all three if not given."""
    from robusteval.data import list_kinds

    attacks = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "norms": list(entry.norms),
            "knowledge": entry.knowledge,
            "parameters": {p.name: p.default for p in entry.parameters.values()},
        }
        for entry in ATTACKS.entries.values()
    ]
    attacks.append(
        {
            "name": "art:CLASS",
            "summary": "Any evasion attack of the Adversarial Robustness Toolbox, by class.",
            "norms": [],
            "knowledge": "",
            "parameters": {},
        }
    )
    everything: dict[str, list[dict[str, Any]]] = {
        "attacks": attacks,
        "data": [{"name": name, "summary": summary} for name, summary in list_kinds()],
        "presets": [
            {
                "name": name,
                "summary": preset.description,
                "attack": [str(spec) for spec in preset.attack],
            }
            for name, preset in shipped()
        ],
    }
    if what:
        everything = {what: everything[what]}
    if as_json:
        emit(json.dumps(everything, indent=1) + "\n")
    else:
        emit("\n".join(listed(everything)) + "\n")


def listed(everything: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Names with what is to say of each; lines as wide as the terminal, or whole for a pipe."""
    terminal = bool(sys.stdout) and sys.stdout.isatty()
    width = max(shutil.get_terminal_size().columns, 40) if terminal else sys.maxsize
    for heading, items in everything.items():
        yield heading
        margin = max(len(item["name"]) for item in items) + 4
        for item in items:
            given = item.get("parameters", {}).items()
            lines = [
                item["summary"],
                ", ".join(filter(None, (*item.get("norms", ()), item.get("knowledge", "")))),
                " ".join(f"{key}={show_value(value)}" for key, value in given),
                *item.get("attack", ()),
            ]
            first, *more = filter(None, lines)
            for mark, line in ((f"  {item['name']}", first), *(("", line) for line in more)):
                yield textwrap.fill(
                    line,
                    width,
                    initial_indent=mark.ljust(margin),
                    subsequent_indent=" " * margin,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        yield ""
