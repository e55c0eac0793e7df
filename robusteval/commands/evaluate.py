"""`robusteval evaluate`: attack a checkpoint and say how robust it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.art.field_names import check_attack
from robusteval.commands.preset import RADII, Preset, change_norm, change_radius, read_preset
from robusteval.errors import NothingEvaluated, NotToBeUsed, RunError, UsageError
from robusteval.evaluation.defense_files import parse_defense
from robusteval.registry import DEFENSES, INTERPRETERS, REPORT_FORMATS, parse
from robusteval.runs.types import Run, Spec

from .attacking import (
    Attacking,
    list_in_float32,
    list_others,
    name_out,
    name_runs,
    specify,
)
from .check import exit_by_verdicts, gate_options, judge_runs, read_gates
from .configured import EXAMPLE, ConfiguredCommand, is_configured, list_words
from .networks import load_networks, name_networks, parse_network
from .report import format_option, log_option, log_runs, print_report, require_trackers
from .running import (
    data_options,
    device_option,
    model_options,
    precision_options,
    shortcut_options,
    spell_command,
)
from .session import Request, open_session
from .shell import Whole, emit_lines, option, read_batch_size, read_radius
from .working import read_share, worker_options

if TYPE_CHECKING:
    from robusteval.evaluation.shares import Share


@click.command(cls=ConfiguredCommand, short_help="Attack a classifier and say how robust it is.")
@click.argument("checkpoint", required=False)
@click.argument("others", nargs=-1, metavar="[OTHER]...")
@model_options
@precision_options
@data_options
@option(
    "Data",
    "--samples",
    type=Whole(1),
    metavar="N",
    help="Evaluate N images, drawn at random. [default: all]",
)
@option(
    "Data",
    "--slice",
    "slices",
    multiple=True,
    metavar="COLUMN",
    help="Another column of FILE.csv, such as camera: the report says what is left of the images"
    " of each of its values; may be repeated.",
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
    "--interpreter",
    "interpreters",
    multiple=True,
    metavar="SPEC",
    help="Compare maps such as cam or grad:pool=2 before and after each attack; may be repeated."
    " See `robusteval list interpreters`.",
)
@option(
    "Defenses",
    "--defense",
    "defenses",
    multiple=True,
    metavar="SPEC",
    help="A file that `robusteval defend` or `robusteval train` wrote, or such as"
    " detector:file=FILE,fpr=0.01; may be repeated. Each attack is judged behind it, and those"
    " that know it are run as well. See `robusteval list defenses`.",
)
@option(
    "Transfer",
    "--target",
    "targets",
    multiple=True,
    metavar="FILE[,OPTION=VALUE...]",
    help="Another network, on which the adversarial images made on CHECKPOINT are judged as well;"
    " may be repeated. With options of its own: net.pth,arch=net.py:Net,mean=.5,std=.25.",
)
@option(
    "Transfer",
    "--transfer",
    is_flag=True,
    help="Of several networks: judge what is made on each on all others as well, in a table of"
    " sources against targets.",
)
@option(
    "Attacks",
    "--norm",
    type=click.Choice(tuple(RADII)),
    help="Another norm for the attacks of the preset, with the radius 8/255, 0.5 (l2), 12 (l1),"
    " 24 changed values (l0) or 20 changed pixels (l0_pixels) unless --eps says another.",
)
@option(
    "Attacks",
    "--eps",
    callback=read_radius,
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
@shortcut_options
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
    "--keep-images",
    is_flag=True,
    help="Keep all adversarial images in the run folder, as FILE.npz for --data and for"
    " `robusteval export`.",
)
@option(
    "Run",
    "--shard",
    callback=read_share,
    metavar="K/N",
    help="Attack the K-th of N parts of the images, into a run folder of its own; `robusteval"
    " merge` joins all N.",
)
@worker_options
@device_option
@option(
    "Run",
    "--batch-size",
    callback=read_batch_size,
    default="auto",
    show_default=True,
    metavar="N",
    help="Images attacked at a time; changes no result.",
)
@option(
    "Report",
    "--check",
    "checked",
    is_flag=True,
    help="Hold the run against the gates, see `robusteval check`.",
)
@gate_options(partial(option, "Report"))
@log_option(partial(option, "Report"))
@format_option
def evaluate(
    checkpoint: str | None,
    others: tuple[str, ...],
    attacks: tuple[str, ...],
    preset: str | None,
    interpreters: tuple[str, ...],
    defenses: tuple[str, ...],
    targets: tuple[str, ...],
    transfer: bool,
    norm: str | None,
    eps: float | None,
    samples: int | None,
    seed: int | None,
    batch_size: int | None,
    shard: Share | None,
    workers: int | None,
    ray: str | None,
    out: Path | None,
    fresh: bool,
    keep_images: bool,
    no_probes: bool,
    amp: bool,
    compiled: bool,
    also_float32: bool,
    checked: bool,
    baseline: Path | None,
    config: Path | None,
    logs: tuple[str, ...],
    form: str,
    **given: Any,
) -> None:
    """Attack the classifier in CHECKPOINT and say how robust it is.

    CHECKPOINT is a .safetensors, .pt, .pth or .th file with a state dict; a folder with
    config.json as transformers and timm publish networks; or `demo`: a small network that is
    trained on handwritten digits in a few seconds.

    OTHER networks may follow, each with options of its own where they differ from those given:
    other.pth,arch=net.py:Net,mean=.5,std=.25. All are attacked alike, each into a run of its own,
    and one report compares them image by image.

    Without CHECKPOINT, options not given are those of the table [evaluate] in robusteval.toml, or
    [tool.robusteval.evaluate] in pyproject.toml, by their names without dashes; with --config,
    those of that file.

    The same command continues a run that was stopped.

    Ends with exit code 6 if the numbers are not to be used, since the model is probably not fed as
    it was trained; with --check the gates decide, see `robusteval check`.

    \b
    Examples:
      robusteval evaluate demo
      robusteval evaluate net.pt --arch torchvision:resnet18 --data photos/ \\
        --samples 500 --attack pgd:eps=4/255,steps=20
      robusteval evaluate a.safetensors b.safetensors --data val.npz --transfer
    """
    if checkpoint is None:
        raise UsageError(f"name a checkpoint, `demo` for one of ours, or {EXAMPLE}")
    specs, settings = choose_attacks(preset, attacks, norm, eps)
    explained = choose_interpreters(interpreters, settings)
    optional = (*settings.attack, *settings.interpreter) if settings.adapt else ()
    defended = [DEFENSES.check_spec(parse_defense(text)) for text in defenses]
    samples = samples or settings.samples
    seed = settings.seed or 0 if seed is None else seed
    request = Request(checkpoint, **given)
    networks = [parse_network(text) for text in targets]
    name_networks(networks)
    request.require_data("say what to attack")
    device = request.device

    refuse_file(out)
    if not checked and (baseline or (config and not is_configured())):
        raise UsageError("--baseline and --config are for --check: add it, or leave them out")
    gates = read_gates(baseline, config) if checked else None
    if shard is not None and logs:
        raise UsageError("--log is for a whole run: join the shards first, then `report` it")
    require_trackers(logs)
    if keep_images and (shard or workers or ray):
        raise UsageError(
            "--keep-images keeps what one process makes: leave out --shard, --workers and --ray"
        )
    if shard is not None and checked:
        raise UsageError("--check judges a whole run: join the shards first, then `check` the run")

    requests = [request, *list_others(request, others)]
    if also_float32 and all(each.dtype == "float32" for each in requests):
        raise UsageError(
            "--also-float32 judges again what --dtype bfloat16 or float16 has judged: add that"
        )
    if transfer and len(requests) < 2:
        raise UsageError("--transfer needs several networks: name them one after another")
    if shard is not None and len(requests) > 1:
        raise UsageError("--shard divides the run of one network: give them one by one")
    attacking = Attacking(
        specs,
        explained,
        optional,
        {
            "samples": samples,
            "seed": seed,
            "probes": not no_probes,
            "shortcuts": [*(["amp"] if amp else []), *(["compile"] if compiled else [])],
            "interpreters": explained,
            "defenses": defended,
            "optional": optional,
        },
        shard,
    )
    names = name_runs(requests)
    runs = []
    for i, each in enumerate(requests):
        judging = [*networks, *(specify(it) for it in requests if transfer and it is not each)]
        with open_session(each.open_both, fresh=fresh) as session:
            if len(requests) > 1:
                session.progress.say(f"Network {i + 1} of {len(requests)}: {each.checkpoint}.")
            if not i:  # a mistake in the last shows before the first is attacked
                load_networks(list(map(specify, requests[1:])), session.progress, device=device)
            found = attacking.run_on(
                session,
                each,
                [*judging, *list_in_float32(each, also_float32, judging)],
                name_out(out, names[i], len(requests)),
                (workers, ray),
                batch_size=batch_size,
                fresh=fresh,
                keep_images=keep_images,
                command=" ".join([spell_command(), *list_words()]),
            )
            runs.append(found)
    if shard is not None and not runs[0].failures:
        lines = [
            f"Shard {shard} is done, in {runs[0].folder}; `robusteval merge` joins all shards."
        ]
        if explained or defended or networks or also_float32:
            lines.append("It also says what computes the rest, which only the whole run can tell.")
        emit_lines(lines)
        return
    if gates is None or any(run.status != "complete" or is_all_wrong(run) for run in runs):
        print_report(runs, form)
        missed = log_runs(runs, logs)
        exit_by_runs(runs)
    else:
        verdicts = judge_runs(runs, *gates)
        print_report(runs, form, verdicts)
        missed = log_runs(runs, logs, verdicts)
        exit_by_verdicts(verdicts)
    for error in missed:
        raise error


# endings of what a report, a picture or a network is written to, and no folder of a run
FILES = (".tex", ".pdf", ".png", ".svg", ".log", ".toml", ".pt", ".pth", ".safetensors", ".npz")


def refuse_file(out: Path | None) -> None:
    """Refuse a name that is a file's for the folder of a run, before it becomes one."""
    if out is None or out.is_dir() or not out.suffix:
        return
    suffix = out.suffix.lower()
    if suffix in FILES or REPORT_FORMATS.find_suffix(suffix) is not None:
        folder = out.with_suffix("")
        raise UsageError(
            f"--out names the folder of the run, and {out.name} looks like a file: give --out"
            f" {folder}, and write a report of it with `robusteval report {folder} --out FILE`"
        )


def choose_attacks(
    preset: str | None, attacks: tuple[str, ...], norm: str | None, eps: float | None
) -> tuple[list[Spec], Preset]:
    """The attacks asked for, names and parameters checked, and other settings of the preset."""
    specs = [check_attack(parse(text)) for text in attacks]
    if attacks and not preset:
        for name, value in (("norm", norm), ("eps", eps)):
            if value is not None:
                raise UsageError(
                    f"--{name} is for the attacks of a preset: write --attack NAME:{name}=..."
                )
        return specs, Preset(())
    settings = read_preset(preset or "quick")
    theirs = settings.attack
    if norm is not None:
        known = [change_norm(spec, norm) for spec in theirs]
        theirs = tuple(spec for spec in known if spec is not None)
        if not theirs:
            raise UsageError(f"no attack of the preset {preset or 'quick'} knows the norm {norm}")
    if eps is not None:
        theirs = tuple(change_radius(spec, eps) for spec in theirs)
        if all("eps" not in spec.parameters for spec in theirs):
            raise UsageError(f"no attack of the preset {preset} has a radius that --eps could set")
    return [*theirs, *specs], settings


def choose_interpreters(interpreters: tuple[str, ...], settings: Preset) -> list[Spec]:
    """The interpreters asked for, names and parameters checked, after those of the preset."""
    asked = [INTERPRETERS.check_spec(parse(text)) for text in interpreters]
    return [*settings.interpreter, *(spec for spec in asked if spec not in settings.interpreter)]


def exit_by_runs(runs: Sequence[Run]) -> None:
    """Leave with the code that fits the first run which is not as it should be."""
    for run in runs:
        exit_by_run(run)


def exit_by_run(run: Run) -> None:
    """Leave with the code that fits the run."""
    if run.failures:
        raise RunError(
            f"{len(run.failures)} of {len(run.failures) + len(run.attacks)} attacks have no result"
        )
    if is_all_wrong(run):
        raise NothingEvaluated("no image is classified correctly, so there is nothing to attack")
    wrong = ", ".join(dict.fromkeys(finding.code for finding in run.findings if finding.misfed))
    if wrong:
        raise NotToBeUsed(
            f"the numbers are not to be used ({wrong}): the model is probably not fed as it was"
            " trained; mend that first, as the findings say"
        )


def is_all_wrong(run: Run) -> bool:
    """Whether no image was right to begin with."""
    return not (run.clean["pred_clean"] == run.clean["label"]).any()
