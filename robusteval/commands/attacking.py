"""What a command does to each of the networks that it names, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robusteval.errors import RunError, UsageError
from robusteval.runs.types import Run, Spec

from .networks import NetworkSpec, load_networks, parse_network
from .session import Request, Session, ensure_masks, needs_rts
from .working import build_plan, open_pool

if TYPE_CHECKING:
    from robusteval.evaluation.shares import Share


@dataclass(frozen=True)
class Attacking:
    """What is done to each network of a command."""

    specs: list[Spec]
    interpreters: list[Spec]
    optional: tuple[Spec, ...]
    chosen: Mapping[str, Any]  # other arguments of `prepare_plan`
    share: Share | None

    def run_on(
        self,
        session: Session,
        request: Request,
        networks: list[NetworkSpec],
        out: Path | None,
        helpers: tuple[int | None, str | None],
        **options: Any,
    ) -> Run:
        """Attack one network, and judge the images on others; `helpers` are of `open_pool`."""
        from robusteval.evaluation.evaluate import execute
        from robusteval.evaluation.plan import prepare_plan

        classifier, images, progress, stop = session
        session.say_if_fewer(self.chosen["samples"])
        asked = [*self.specs, *self.interpreters]
        unusable: dict[str, str] = {}
        if needs_rts(asked):
            try:
                ensure_masks(session, request, "train" if request.split == "test" else "test")
            except (RunError, UsageError) as error:
                if needs_rts([spec for spec in asked if spec not in self.optional]):
                    raise
                progress.say(str(error))
                unusable = {str(spec): str(error) for spec in asked if needs_rts([spec])}
        chosen = {**self.chosen, "share": self.share, "unusable": unusable}
        receivers = load_networks(networks, progress, device=request.device)
        plan = prepare_plan(
            classifier, images, self.specs, **chosen, receivers=receivers, progress=progress
        )
        stop.politely = True
        recipe = partial(build_plan, request, self.specs, networks, chosen)
        with open_pool(session, plan, recipe, *helpers) as pool:
            return execute(
                plan,
                out or Path("runs") / f"{name_run(request)}-{plan.key[:8]}",
                progress=progress,
                stopping=lambda: stop.asked > 0,
                pool=pool,
                **options,
            )


def list_others(request: Request, texts: Sequence[str]) -> list[Request]:
    """The networks after the first: read as it is where their own options do not say otherwise."""
    found = []
    for text in texts:
        checkpoint, options = parse_network(text, "CHECKPOINT")
        found.append(replace(request, checkpoint=checkpoint, **options))
    names = [specify(each) for each in (request, *found)]
    if len({(each.checkpoint, str(each.options)) for each in names}) < len(names):
        raise UsageError("the same network is given twice: name each once")
    return found


def specify(request: Request) -> NetworkSpec:
    """The network of a request, as one that images are judged on."""
    known = {name: value for name, value in request.model_options if value is not None}
    if request.dtype != "float32":
        known["dtype"] = request.dtype
    return NetworkSpec(request.checkpoint, known)


def list_in_float32(
    request: Request, asked: bool, others: Sequence[NetworkSpec]
) -> list[NetworkSpec]:
    """The network of a request in float32, where that was asked for and it computes otherwise.

    Not where it is already among the others that judge.
    """
    if not asked or request.dtype == "float32":
        return []
    known = specify(request)
    wanted = known._replace(options={**known.options, "dtype": "float32"})
    named = [
        each._replace(options={**each.options, "dtype": each.options.get("dtype", "float32")})
        for each in others
    ]
    return [] if wanted in named else [wanted]


def name_run(request: Request) -> str:
    """What the folder of a run is called after."""
    return "demo" if request.checkpoint == "demo" else Path(request.checkpoint).stem


def name_runs(requests: Sequence[Request]) -> list[str]:
    """A folder's name for each network, no two the same: with the type if that tells them apart."""
    names = [name_run(each) for each in requests]
    typed = [
        f"{name}-{each.dtype}" if names.count(name) > 1 else name
        for name, each in zip(names, requests, strict=True)
    ]
    return [
        name if typed.count(name) == 1 else f"{names[i]}-{i + 1}" for i, name in enumerate(typed)
    ]


def name_out(out: Path | None, name: str, count: int) -> Path | None:
    """The folder of one of so many runs."""
    return out if out is None or count == 1 else out / name
