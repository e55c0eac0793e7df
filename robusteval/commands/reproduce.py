"""`robusteval reproduce`: the tables of a paper for a network, published beside measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from robusteval.analysis.papers.declaration import SIZES, Detectors, Paper, list_papers, read_paper
from robusteval.art.field_names import check_attack
from robusteval.errors import RobustevalError, RunError, UsageError
from robusteval.registry import parse
from robusteval.runs.writing import write_atomically

from .detector import load_vgg
from .networks import load_networks, name_networks, parse_network
from .reproducing import PaperRequest, describe_shard
from .running import build_data_options, device_option, model_options, spell_command
from .session import Request, Session, ensure_masks, needs_rts, open_session
from .shell import Command, Whole, emit, emit_lines, option, writing_stdout
from .working import read_share, worker_options

if TYPE_CHECKING:
    from robusteval.analysis.papers.masked import MaskWorth
    from robusteval.datasets.dataset import Data
    from robusteval.evaluation.plan import Attack
    from robusteval.evaluation.shares import Share
    from robusteval.evaluation.work_cache import WorkCache
    from robusteval.runs.detector_record import Combination


@click.command(cls=Command, short_help="Measure the tables of a paper on a network.")
@click.argument("paper")
@option(
    "Model",
    "--checkpoint",
    default="demo",
    show_default=True,
    metavar="FILE",
    help="The network, as for `robusteval evaluate`.",
)
@model_options
@build_data_options("test", pixels="--pixels")
@option(
    "Data",
    "--samples",
    type=Whole(1),
    metavar="N",
    help="Images, drawn at random. [default: as --size says]",
)
@option(
    "Transfer",
    "--target",
    "targets",
    multiple=True,
    metavar="FILE[,OPTION=VALUE...]",
    help="Another network, on which the adversarial images are judged as well, as for `robusteval"
    " evaluate`; tables of transfer are of the first.",
)
@option(
    "Transfer",
    "--hardened",
    metavar="FILE[,OPTION=VALUE...]",
    help="A network trained as the paper proposes, such as by `robusteval train --objective int`,"
    " for the rows that `int` has of one; in the form of --target.",
)
@option(
    "Run",
    "--size",
    "scale",
    type=click.Choice(SIZES),
    default="small",
    show_default=True,
    help="How much is run: in minutes on a small network, or as published.",
)
@option(
    "Run",
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Decides which images are drawn, and all noise.",
)
@option(
    "Run",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("reproduced"),
    show_default=True,
    metavar="DIR",
    help="Runs and reports, in a folder for each paper; what is there is continued.",
)
@option(
    "Run",
    "--fresh",
    is_flag=True,
    help="Throw away what the folders hold, and start anew; what shards have done stays. With"
    " --shard: what this shard has done alone.",
)
@option(
    "Run",
    "--shard",
    "share",
    callback=read_share,
    metavar="K/N",
    help="Measure the K-th of N parts of the images, into a folder of its own below --out, which"
    " all N may share; the same command without --shard joins them and makes the tables.",
)
@worker_options
@option(
    "Run",
    "--vgg-weights",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Weights of torchvision's vgg16 for ImageNet, with which `detector` makes features of maps"
    " as published. [default: maps of 16x16 cells, or a small network]",
)
@device_option
@option(
    "Report",
    "--format",
    "form",
    type=click.Choice(("table", "markdown", "json")),
    default="table",
    show_default=True,
    metavar="FORMAT",
    help="How to print on stdout: table, markdown or json. The folders have it as HTML, too.",
)
def reproduce(
    paper: str,
    checkpoint: str,
    samples: int | None,
    scale: str,
    seed: int,
    out: Path,
    fresh: bool,
    form: str,
    vgg_weights: Path | None,
    targets: tuple[str, ...],
    hardened: str | None,
    share: Share | None,
    workers: int | None,
    ray: str | None,
    **given: Any,
) -> None:
    """Measure what PAPER has published on a network of yours.

    PAPER is one of those that `robusteval reproduce list` shows, or `all`. Each figure of its
    tables stands beside the measured one with a 95 % interval, and says whether they agree or why
    they cannot be compared; its claims are tested on the same images.

    The same command continues one that was stopped.

    Attacks, also those on --hardened and with other seeds, can be divided among workers and
    shards; explanations among shards alone. Attacks on maps, masks of units, and detectors with
    the attacks on them, are measured by one process, that which makes the tables.

    \b
    Examples:
      robusteval reproduce pgap
      robusteval reproduce advedge --checkpoint net.pt --arch net.py:Net \\
        --data cifar10:data --samples 100 --size paper
    """
    if paper == "list":
        if share is not None:
            raise UsageError("--shard divides the images of a paper: name one in place of list")
        emit_lines(list(describe_papers()))
        return
    papers = [read_paper(name) for name in (list_papers() if paper == "all" else [paper])]
    if vgg_weights is not None:
        papers = [each.with_extractor("vgg16") for each in papers]
    request = Request(checkpoint, **given)
    request.require_data("say what to attack")
    networks = [parse_network(text) for text in targets]
    name_networks(networks)
    proposed = [parse_network(hardened, "--hardened")] if hardened else []
    check_used(
        papers,
        {
            "--target": bool(targets),
            "--hardened": bool(proposed),
            "--vgg-weights": vgg_weights is not None,
        },
    )
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is no folder: choose another")
    found, shards, broken = [], [], []
    with open_session(request.open_both, fresh=fresh) as session:
        from robusteval.analysis.papers.planning import Subject
        from robusteval.analysis.papers.running import reproduce as run_paper
        from robusteval.analysis.papers.shards import check_share, find_shards, measure_share

        classifier, images, progress, stop = session
        receivers = load_networks(networks, progress, device=request.device)
        trained = load_networks(proposed, progress, device=request.device)
        stop.politely = True
        for number, each in enumerate(papers, 1):
            progress.say(f"Paper {number} of {len(papers)}, {each.name}: {each.title}.")
            folder = out / f"{each.name}-{scale}"
            asked = PaperRequest(request, each, scale, samples, seed, networks, proposed, share)
            subject = Subject(each, classifier, images, scale, samples, seed, receivers, trained)
            options: dict[str, Any] = {
                "fresh": fresh,
                "progress": progress,
                "stopping": lambda: stop.asked > 0,
                "command": spell_command(),
                "hire": asked.hire(session, workers, ray),
            }
            try:
                check_samples(each, samples)
                # what is wrong with shards shows before masks are trained
                if share is None:
                    find_shards(folder)
                else:
                    check_share(subject, folder, share)
                prepare_masks(session, request, each, scale)
                if share is not None:
                    shards.append(measure_share(subject, folder, share, **options))
                    continue
                reproduction = run_paper(
                    subject,
                    folder,
                    detect=partial(fit_detectors, session, vgg_weights),
                    mask=partial(mask_units, session),
                    write=partial(write_detector, session, vgg_weights),
                    start=vgg_weights,
                    **options,
                )
            except RobustevalError as error:
                if stop.asked or len(papers) == 1:
                    raise
                broken.append(each.name)
                progress.say(f"{each.name} has no result: {error}")
                continue
            found.append(reproduction)
            write_reports(reproduction, folder)
    if share is None:
        print_reproductions(found, form, out)
    else:
        emit_lines([line for each in shards for line in describe_shard(each)])
    if broken:
        raise RunError(f"{len(broken)} of {len(papers)} papers have no result: {', '.join(broken)}")


# which papers an option is for, and which of them that are
USES: dict[str, tuple[str, Callable[[Paper], bool]]] = {
    "--target": ("have rows of transfer", lambda paper: paper.compares_targets),
    "--hardened": ("have rows of such a network", lambda paper: paper.compares_hardened),
    "--vgg-weights": ("fit detectors", lambda paper: bool(paper.detectors)),
}


def check_used(papers: Sequence[Paper], given: Mapping[str, bool]) -> None:
    """UsageError if an option is given that none of these papers has a use for."""
    for asked, (what, uses) in USES.items():
        if given[asked] and not any(map(uses, papers)):
            names = ", ".join(name for name in list_papers() if uses(read_paper(name)))
            raise UsageError(f"{asked} is for papers that {what}: {names}")


def check_samples(paper: Paper, samples: int | None) -> None:
    """UsageError if a paper of detectors is asked for with too few images to part."""
    from robusteval.defenses.splits import count_least

    if paper.detectors and samples is not None and samples < count_least():
        raise UsageError(
            f"{samples} images are too few for the detectors of {paper.name}: give --samples at"
            f" least {count_least()}"
        )


def prepare_masks(session: Session, request: Request, paper: Paper, size: str) -> None:
    """Make sure of the masks of RTS where a paper needs them; why there are none is said."""
    from robusteval.analysis.papers.planning import list_specs_of

    if needs_rts(list_specs_of(paper, size)):
        try:
            ensure_masks(session, request, "train" if request.split == "test" else "test")
        except RunError as error:
            session.progress.say(str(error))


def fit_detectors(
    session: Session,
    weights: Path | None,
    wanted: Detectors,
    names: Sequence[str],
    seed: int,
    done: WorkCache,
) -> tuple[list[Combination], dict[str, str]]:
    """Fit and judge the detectors of a paper; with figures, and why a detector has none."""
    from robusteval.defenses.detector_tables import measure_combinations

    return measure_combinations(
        session.classifier,
        session.images,
        names,
        wanted.interpreters,
        prepare_attacks(session, wanted.attacks),
        extractor=wanted.extractor,  # type: ignore[arg-type]  # its file says it
        samples=wanted.samples,
        seed=seed,
        start=None if weights is None else load_vgg(weights, session.progress),
        done=done,
        progress=session.progress,
    )


def mask_units(
    session: Session, attack: str, units: str, samples: int, seed: int, done: WorkCache
) -> MaskWorth:
    """Mask so many units, those that the attack moves most, and say what that is worth."""
    from robusteval.analysis.papers.masked import MaskWorth
    from robusteval.defenses.mask_judgement import judge_masks
    from robusteval.defenses.masking import choose_masks

    spec = check_attack(parse(attack))
    common: dict[str, Any] = {
        "attack": spec,
        "seed": seed,
        "done": done,
        "progress": session.progress,
    }
    chosen = choose_masks(
        session.classifier, session.images, units=Fraction(units), samples=samples, **common
    )
    found = judge_masks(session.classifier, session.images, chosen, **common)
    rates = {
        "none_clean": found.plain.clean,
        "none_attacked": found.plain.adaptive,
        **{f"mask_{kind}": rate for kind, rate in found.masked._asdict().items()},
        **{f"random_{kind}": rate for kind, rate in found.control._asdict().items()},
    }
    name = f"{chosen.masked} of {chosen.masks.shape[-1]} units of layer {chosen.layer}, {spec}"
    return MaskWorth(name, rates, found.verdict)


def write_detector(
    session: Session, weights: Path | None, wanted: Detectors, images: Data, seed: int, out: Path
) -> None:
    """Fit the detector that a paper has attacked to these images, and write its file."""
    from robusteval.defenses.detection import fit_unjudged

    chosen = [each for each in wanted.interpreters if parse(each).name in wanted.watching]
    attacks = {name: text for name, text in wanted.attacks.items() if name in wanted.watching}
    fit_unjudged(
        session.classifier,
        images,
        chosen,
        list(prepare_attacks(session, attacks).values()),
        extractor=wanted.extractor,  # type: ignore[arg-type]
        seed=seed,
        start=None if weights is None else load_vgg(weights, session.progress),
        progress=session.progress,
    ).save(out)


def prepare_attacks(session: Session, texts: Mapping[str, str]) -> dict[str, Attack]:
    """Attacks by name, but those that the network cannot have, as by its maps: that is said."""
    from robusteval.evaluation.plan import prepare_attack

    attacks = {}
    for name, text in texts.items():
        with suppress(UsageError):
            spec = check_attack(parse(text))
            attacks[name] = prepare_attack(spec, session.classifier, session.images.shape)
    return attacks


def describe_papers() -> Iterator[str]:
    """Each paper in lines of 80 columns at most."""
    names = list(list_papers())
    width = max(map(len, names)) + 2
    for paper in map(read_paper, names):
        text = f"{paper.name.ljust(width)}{paper.title} ({paper.source})"
        yield from wrap(text, 80, subsequent_indent=" " * width)


def write_reports(found: Any, folder: Path) -> None:
    """Write the report of a paper in all formats."""
    from robusteval.reports import paper

    for name, render in (
        ("report.md", paper.render_paper_markdown),
        ("report.json", paper.render_paper_json),
        ("report.html", paper.render_paper_html),
    ):
        write_atomically(folder / name, render(found).encode())


def print_reproductions(found: list[Any], form: str, out: Path) -> None:
    """Print the reports of some papers on stdout."""
    from robusteval.reports import paper

    if form == "json":
        texts = [paper.render_paper_json(each).rstrip() for each in found]
        emit("[\n" + ",\n".join(texts) + "\n]\n" if len(texts) != 1 else texts[0] + "\n")
        return
    if form == "markdown":
        emit("\n".join(paper.render_paper_markdown(each) for each in found))
        return
    from rich.console import Console

    from robusteval.reports.console import make_printable

    console = Console()
    with writing_stdout(), console.capture() as page:
        for each in found:
            paper.print_paper(each, console)
            console.print()
        written = "report.html, report.md and report.json in " + ", ".join(
            f"{out / f'{each.name}-{each.size}'}" for each in found
        )
        console.print(make_printable(console, written))
    emit(page.get())
