"""`robusteval defend mask`: a checkpoint with units switched off, and what that is worth."""

from __future__ import annotations

import shlex
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.commands.preset import check
from robusteval.errors import UsageError
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Spec

from .running import (
    bars,
    check_out,
    data_from,
    device_option,
    images_for,
    model_options,
    opened,
    out_options,
    stoppable,
    taken_up,
)
from .shell import Command, Whole, emit, option

if TYPE_CHECKING:
    from robusteval.datasets.sources import Data
    from robusteval.defenses.masking import Chosen, Judgement
    from robusteval.reports.mask import MaskRecord


def some_units(ctx: click.Context, param: click.Parameter, value: str) -> int | Fraction:
    """Option callback: a whole number of units, or a share of them."""
    try:
        return int(value) if value.strip().isdecimal() else Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(
            f"{value!r} is neither a number of units, such as 16, nor a share, such as 0.25"
        ) from None


@click.command(cls=Command, short_help="Switch off the units that an attack moves.")
@click.argument("checkpoint")
@model_options
@data_from("train")
@option(
    "Data",
    "--samples",
    type=Whole(2),
    metavar="N",
    default=500,
    show_default=True,
    help="Images, drawn at random: half of them rank the units, the others judge the mask.",
)
@option(
    "Mask",
    "--rank",
    type=click.Choice(("sensitivity", "importance", "random")),
    metavar="NAME",
    default="sensitivity",
    show_default=True,
    help="What is masked: sensitivity, the units that the attack moves most; importance, those"
    " without which the logit of the true class changes least; or random ones.",
)
@option(
    "Mask",
    "--units",
    callback=some_units,
    required=True,
    metavar="N|SHARE",
    help="How many units are masked (16), or what share of the layer's (0.25); with --per-class"
    " that many of each class, so that the others are kept.",
)
@option(
    "Mask",
    "--layer",
    metavar="NAME",
    help="Layer whose units are masked. [default: what is pooled for the final linear layer]",
)
@option(
    "Mask",
    "--per-class",
    is_flag=True,
    help="A mask for each class, by its own images; a prediction then takes two passes, of which"
    " the first decides on the masks.",
)
@option(
    "Mask",
    "--attack",
    metavar="SPEC",
    default="pgd:eps=1/255,steps=20,stop=never",
    show_default=True,
    help="What moves the units, and what the mask is judged by; see `robusteval list attacks`.",
)
@option(
    "Mask",
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Decides which images are drawn, which units are random, and all noise.",
)
@out_options("checkpoint to write, ending in .safetensors.")
@device_option
def mask(
    checkpoint: str,
    arch: str | None,
    mean: list[float] | None,
    std: list[float] | None,
    num_classes: int | None,
    data: str | None,
    split: str,
    size: int | None,
    download: bool,
    samples: int,
    rank: str,
    units: int | Fraction,
    layer: str | None,
    per_class: bool,
    attack: str,
    seed: int,
    out: Path,
    force: bool,
    device: str,
) -> None:
    """Switch off units of the classifier in CHECKPOINT, as a checkpoint of its own.

    Units are ranked by some images and the mask is judged on others: as they are, under the attack
    made for the unmasked network, and under the attack made for the masked one, beside a random
    mask of equal size. Only what remains under an attack that knows the mask is robustness. The
    same command continues one that was stopped.

    \b
    Examples:
      robusteval defend mask demo --units 0.25 --out masked.safetensors
      robusteval defend mask net.pt --arch torchvision:resnet18 \\
        --data cifar10:data --rank importance --per-class --units 0.9 \\
        --out masked.safetensors
    """
    spec = check(parse(attack))
    if data is None and checkpoint != "demo":
        raise UsageError("say which images with --data; `robusteval list data` shows the forms")
    check_out(out, force, checkpoint)
    with stoppable(fresh=False) as stop, bars() as progress:
        stop.progress = progress
        from robusteval.defenses.masking import choose, judge_masks
        from robusteval.models.checkpoint import contents, save
        from robusteval.models.masked import masked

        options = {"arch": arch, "mean": mean, "std": std, "num_classes": num_classes}
        classifier = opened(checkpoint, progress, device=device, **options)
        images = images_for(classifier, data or "digits", split, download, size)
        for note in images.notes:
            progress.say(note)
        done = taken_up(out, stop)
        chosen = choose(
            classifier,
            images,
            rank=rank,  # type: ignore[arg-type]  # a choice
            units=units,
            layer=layer,
            per_class=per_class,
            attack=spec,
            samples=samples,
            seed=seed,
            done=done,
            progress=progress,
        )
        found = judge_masks(
            classifier,
            images,
            chosen,
            attack=spec,
            seed=seed,
            done=done,
            progress=progress,
        )
        network = masked(classifier, chosen.layer, chosen.masks, chosen.ranking.ids).network
        state, facts = contents(network)
        facts["mask"] |= {"rank": rank, "attack": str(spec), "data": images.name, "seed": seed}
        assert classifier.arch is not None  # it was loaded
        save(
            out,
            state,
            arch=classifier.arch,
            num_classes=classifier.num_classes,
            input_shape=classifier.input_shape or images.shape,
            mean=classifier.identity["mean"],
            std=classifier.identity["std"],
            **facts,
        )
    from robusteval.reports.mask import render_mask

    done.clear()
    words = ["robusteval", "evaluate", checkpoint, "--defense", str(out)]
    emit(render_mask(describe_mask(found, chosen, out, rank, spec, images)))
    emit(how_to_measure(words, images, data or "digits", size, spec, options))


def describe_mask(
    found: Judgement, chosen: Chosen, out: Path, rank: str, spec: Spec, images: Data
) -> MaskRecord:
    """The record of a mask."""
    from robusteval.reports.mask import MaskFigures, MaskRecord

    return MaskRecord(
        file=str(out),
        layer=chosen.layer,
        units=chosen.masks.shape[-1],
        masked=chosen.masked,
        per_class=chosen.masks.ndim == 2,
        rank=rank,
        ranked=chosen.ranked,
        data=images.name,
        attack=str(spec),
        stops_early=stops_early(spec),
        unmasked=MaskFigures(*found.plain),
        mask=MaskFigures(*found.masked),
        random_mask=MaskFigures(*found.control),
        verdict=found.verdict,
        findings=tuple(finding.message for finding in found.findings),
    )


def stops_early(spec: Spec) -> bool:
    """Whether an attack is content with the first success, which carries over worst."""
    if spec.name not in ATTACKS.entries:
        return False
    known = ATTACKS.entry(spec.name).resolve(spec)
    return "stop" in known and known["stop"] != "never"


def how_to_measure(
    words: list[str], images: Data, data: str, size: int | None, spec: Spec, options: dict[str, Any]
) -> str:
    """The command that measures more."""
    from .train import has_other_part

    tested = has_other_part(images, data, size)
    words += ["--data", data if tested else "IMAGES"]
    if size is not None:
        words += ["--size", str(size)]
    for name, value in options.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    words += ["--attack", str(spec)]
    unseen = "" if tested else f" on images it has not seen ({data} has no other part)"
    return f"\nMeasure more{unseen} with\n  {shlex.join(words)}\n"
