"""Workers beside the process of a command: its options, and what the workers are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from .networks import NetworkSpec, load_networks
from .running import combine_options
from .session import Request, Session
from .shell import Whole, option

if TYPE_CHECKING:
    import click

    from robusteval.evaluation.pieces import Pool
    from robusteval.evaluation.plan import Plan
    from robusteval.evaluation.shares import Share
    from robusteval.progress import Bars
    from robusteval.runs.types import Spec


def read_share(ctx: click.Context, param: click.Parameter, value: str | None) -> Share | None:
    """Option callback: one part of a run, such as ``3/16``."""
    if value is None:
        return None
    from robusteval.evaluation.shares import Share

    return Share.parse(value)


def require_ray(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Option callback: where Ray is, if it is installed and there, before anything is loaded."""
    if value is not None:
        from robusteval.evaluation.ray_workers import check_address, import_ray

        import_ray()
        check_address(value)
    return value


worker_options = combine_options(
    [
        option(
            "Run",
            "--workers",
            type=Whole(1),
            metavar="N",
            help="Attack by N processes at once, which share the cores or the GPU; changes no"
            " result. Small networks gain by as many as there are cores.",
        ),
        option(
            "Run",
            "--ray",
            callback=require_ray,
            metavar="ADDRESS",
            help="The workers are on this cluster of Ray's (the extra robusteval[ray]), such as"
            " auto or head:6379: one for each GPU, or core, unless --workers says how many.",
        ),
    ]
)


def build_plan(
    request: Request,
    specs: Sequence[Spec],
    networks: Sequence[NetworkSpec],
    settings: Mapping[str, Any],
    fingerprint: str,
) -> Plan:
    """Make the plan of a command once more, in a worker.

    Parameters
    ----------
    request : Request
        Model and images.
    specs : sequence of Spec
        The attacks.
    networks : sequence of NetworkSpec
        Others that their images are judged on.
    settings : mapping
        Other arguments of `prepare_plan`.
    fingerprint : str
        Of the images, as the first plan has it.
    """
    from robusteval.evaluation.plan import prepare_plan
    from robusteval.progress import Silent

    silent = cast("Bars", Silent())
    classifier, images = request.open_both(silent)
    receivers = load_networks(networks, silent, device=request.device)
    return prepare_plan(
        classifier, images, specs, **settings, receivers=receivers, fingerprint=fingerprint
    )


@contextmanager
def open_pool(
    session: Session,
    plan: Plan,
    recipe: Callable[..., Plan],
    workers: int | None,
    address: str | None,
) -> Iterator[Pool | None]:
    """The workers that were asked for, if any; `recipe` lacks the fingerprint of `build_plan`."""
    if workers is None and address is None:
        yield None
        return
    from robusteval.datasets.reading_ahead import count_cores
    from robusteval.evaluation.ray_workers import open_ray
    from robusteval.evaluation.workers import open_processes

    def stopping() -> bool:
        return session.stop.asked > 0

    recipe = partial(recipe, fingerprint=plan.config["data"]["sha256"])
    with ExitStack() as stack:
        if address is not None:
            session.progress.say(f"Connecting to Ray, {address}.")
            session.stop.politely = False  # there is no step that could be waited for
            pool = stack.enter_context(open_ray(plan, recipe, address, workers, stopping))
            session.stop.politely = True
            yield pool
        elif workers is not None:
            cores = count_cores()
            if workers > cores and plan.classifier.device.type == "cpu":
                session.progress.say(
                    f"{workers} workers share {cores} cores: more than these make nothing faster."
                )
            yield stack.enter_context(open_processes(plan, recipe, workers, stopping))
