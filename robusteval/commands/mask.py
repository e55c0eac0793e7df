"""`robusteval defend mask`: a checkpoint with units switched off, and what that is worth."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.art.field_names import check_attack
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Spec

from .measuring import find_unseen, spell_evaluation
from .running import (
    build_data_options,
    build_out_options,
    check_output,
    device_option,
    model_options,
)
from .session import Request, open_session
from .shell import Command, Whole, emit, emit_lines, option

if TYPE_CHECKING:
    from robusteval.datasets.dataset import Data
    from robusteval.defenses.mask_judgement import MaskJudgement
    from robusteval.defenses.masking import ChosenMasks
    from robusteval.reports.mask import MaskRecord


def read_units(ctx: click.Context, param: click.Parameter, value: str) -> int | Fraction:
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
@build_data_options("train")
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
    callback=read_units,
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
@build_out_options("checkpoint to write, ending in .safetensors.")
@device_option
def mask(
    checkpoint: str,
    samples: int,
    rank: str,
    units: int | Fraction,
    layer: str | None,
    per_class: bool,
    attack: str,
    seed: int,
    out: Path,
    force: bool,
    **given: Any,
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
    spec = check_attack(parse(attack))
    request = Request(checkpoint, **given)
    request.require_data("say which images")
    check_output(out, force, checkpoint)
    with open_session(request.open_both) as session:
        from robusteval.defenses.mask_judgement import judge_masks
        from robusteval.defenses.masking import choose_masks
        from robusteval.models.checkpoint import collect_state, save
        from robusteval.models.masked import mask_units

        classifier, images, progress, _ = session
        done = session.resume_work(out)
        chosen = choose_masks(
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
        network = mask_units(classifier, chosen.layer, chosen.masks, chosen.ranking.ids).network
        state, facts = collect_state(network)
        facts["mask"] |= {"rank": rank, "attack": str(spec), "data": images.name, "seed": seed}
        assert classifier.arch is not None  # it was loaded
        done.finish(
            out,
            partial(
                save,
                state=state,
                arch=classifier.arch,
                num_classes=classifier.num_classes,
                input_shape=classifier.input_shape or images.shape,
                mean=classifier.identity["mean"],
                std=classifier.identity["std"],
                **facts,
            ),
        )
    from robusteval.reports.mask import render_mask

    emit(render_mask(describe_mask(found, chosen, out, rank, spec, images)))
    emit_lines(explain_measuring(request, images, out, spec))


def describe_mask(
    found: MaskJudgement, chosen: ChosenMasks, out: Path, rank: str, spec: Spec, images: Data
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


def explain_measuring(request: Request, images: Data, out: Path, spec: Spec) -> list[str]:
    """How to measure more of a mask, in lines."""
    unseen = find_unseen(images, request.data_name, request.size)
    command = spell_evaluation(
        request.checkpoint,
        [
            ("defense", out),
            ("data", unseen.data),
            ("size", request.size),
            ("classes", request.classes),
            *request.model_options,
            ("attack", spec),
        ],
    )
    return ["", f"Measure more{unseen.clause} with", f"  {command}"]
