"""What decides a training: each hyper-parameter once, the options of `train` derive from it.

It imports neither torch nor anything else that is slow to load, so that help can show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from robusteval.errors import UsageError
from robusteval.registry import explain_unknown

Term = Literal["clean", "adversarial", "divergence", "maps", "own_map", "boosted", "doubtful"]
Search = Literal["pgd", "nfgsm"]
Weighting = Literal["softmax", "runner_up"]
Weights = Mapping[Term, float]
OF_MAPS: frozenset[Term] = frozenset(("maps", "own_map"))
# compare an image with its attacked self
OF_BOTH: frozenset[Term] = frozenset(("maps", "own_map", "divergence", "doubtful"))
Schedule = Literal["cosine", "step"]
Augment = Literal["auto", "none", "crop", "crop+flip"]


class Objective(NamedTuple):
    """Terms that training lowers, and those of them that the search raises."""

    lowered: frozenset[Term]
    raised: frozenset[Term]


def _list_terms(lowered: Iterable[Term], raised: Iterable[Term] = ()) -> Objective:
    return Objective(frozenset(lowered), frozenset(raised))


OBJECTIVES: Mapping[str, Objective] = {
    "standard": _list_terms(["clean"]),
    "adv": _list_terms(["adversarial"], ["adversarial"]),
    "trades": _list_terms(["clean", "divergence"], ["divergence"]),
    "mart": _list_terms(["boosted", "doubtful"], ["adversarial"]),
    "int": _list_terms(["clean", "maps"], ["maps"]),
    "int2": _list_terms(["clean", "maps"], ["adversarial"]),
    "int_adv": _list_terms(["adversarial", "maps"], ["adversarial", "maps"]),
    "int2_adv": _list_terms(["adversarial", "maps"], ["adversarial"]),
    "one_class": _list_terms(["clean", "own_map"], ["own_map"]),
}


def _describe_option(
    heading: str,
    text: str,
    *,
    metavar: str = "NUMBER",
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
) -> dict[str, Any]:
    """Describe the option of a field on the command line, as the field's metadata.

    `heading` and `help` in the list of options, `metavar`, and where there are any the `choices` of
    a word or the `least` whole number.
    """
    metadata: dict[str, Any] = {"heading": heading, "help": text, "metavar": metavar}
    more = {"choices": choices, "least": least}
    return metadata | {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a training lowers, and the attack on each batch; see `TrainingSettings`."""

    objective: str = field(
        default="adv",
        metadata=_describe_option(
            "Objective",
            "standard, adv (the images an attack finds), trades, mart, or one with the network's"
            " class activation maps (arXiv:2006.14748): int, int2, int_adv, int2_adv, one_class.",
            metavar="NAME",
            choices=tuple(OBJECTIVES),
        ),
    )
    eps: float = field(
        default=8 / 255,
        metadata=_describe_option(
            "Objective", "Radius in linf to withstand, of the [0, 1] pixel range."
        ),
    )
    steps: int = field(
        default=10,
        metadata=_describe_option(
            "Objective",
            "Steps of the attack on each batch; training takes about N + 2 times as long as"
            " without.",
            metavar="N",
            least=1,
        ),
    )
    step: float | None = field(
        default=None,
        metadata=_describe_option(
            "Objective", "Length of a step. [default: 2.5 * eps / steps; eps for nfgsm]"
        ),
    )
    search: Search = field(
        default="pgd",
        metadata=_describe_option(
            "Objective",
            "How images are attacked: pgd, or nfgsm, one step from noise of twice the radius"
            " (arXiv:2202.01181), which takes 3 passes in the place of N + 2; --steps counts for"
            " the judging alone then.",
            metavar="NAME",
            choices=get_args(Search),
        ),
    )
    awp: float = field(
        default=0.0,
        metadata=_describe_option(
            "Objective",
            "Move weights by this share of their norm to where the loss rises before each step"
            " (arXiv:2004.05884, which takes .005); half as long again. 0: not at all.",
        ),
    )
    gamma: float = field(
        default=0.5,
        metadata=_describe_option(
            "Objective",
            "Weight of the maps; they are divided by their number of positions, unlike in the code"
            " of the paper, whose .01 is .49 here for maps of 7x7.",
        ),
    )
    beta: float = field(
        default=6.0,
        metadata=_describe_option("Objective", "Weight of the divergence of trades and mart."),
    )
    weighting: Weighting = field(
        default="softmax",
        metadata=_describe_option(
            "Objective",
            "How maps of wrong classes count: softmax, or runner_up alone.",
            metavar="NAME",
            choices=get_args(Weighting),
        ),
    )
    warmup: tuple[float, float] | None = field(
        default=None,
        metadata=_describe_option(
            "Objective",
            "Epochs up to which eps is 0, and from which it is whole. [default: 0 and a quarter of"
            " them]",
            metavar="A,B",
        ),
    )

    @property
    def step_length(self) -> float:
        """Length of a step of the search at the full radius."""
        if self.step is not None:
            return self.step
        return self.eps if self.search == "nfgsm" else 2.5 * self.eps / self.steps

    @property
    def judging_step(self) -> float:
        """Length of a step of the attack by which epochs are judged, twice as many of them."""
        if self.step is None or self.search == "nfgsm":
            return 1.25 * self.eps / self.steps
        return self.step

    @property
    def terms(self) -> tuple[Weights, Weights]:
        """Weights of the terms lowered and of those raised."""
        return weigh_terms(self.objective, gamma=self.gamma, beta=self.beta)

    @property
    def has_maps(self) -> bool:
        """Whether any term needs class activation maps."""
        return any(not OF_MAPS.isdisjoint(weights) for weights in self.terms)


@dataclass(frozen=True)
class TrainingSettings(ObjectiveSettings):
    """How to train: each field's `help` says what it decides, and in which unit.

    Raises
    ------
    UsageError
        A value is out of range; the message names its option.
    """

    epochs: int = field(
        default=20,
        metadata=_describe_option("Training", "Passes over the images.", metavar="N", least=1),
    )
    batch_size: int = field(
        default=64, metadata=_describe_option("Training", "Images per step.", metavar="N", least=2)
    )
    rate: float = field(
        default=3e-3, metadata=_describe_option("Training", "Learning rate of Adam at its highest.")
    )
    average: float = field(
        default=0.0,
        metadata=_describe_option(
            "Training",
            "Judge and keep the moving average of the weights, of which a step leaves this share,"
            " such as .995. 0: the weights themselves.",
        ),
    )
    schedule: Schedule = field(
        default="cosine",
        metadata=_describe_option(
            "Training",
            "How the rate falls: along a cosine, or tenfold after 4/7 and 6/7 of the training.",
            metavar="NAME",
            choices=get_args(Schedule),
        ),
    )
    augment: Augment = field(
        default="auto",
        metadata=_describe_option(
            "Data",
            "Shift images by up to an eighth, and mirror them; auto: both for colour images,"
            " neither for grey ones.",
            metavar="NAME",
            choices=get_args(Augment),
        ),
    )
    held_out: int | None = field(
        default=None,
        metadata=_describe_option(
            "Data",
            "Images that epochs are judged on instead of trained on. [default: a tenth or 200, at"
            " most a fifth and 1000]",
            metavar="N",
            least=1,
        ),
    )
    seed: int = field(
        default=0,
        metadata=_describe_option(
            "Training",
            "Decides the first weights, which images are held out, the order of the others, and all"
            " noise.",
            metavar="N",
            least=0,
        ),
    )

    def __post_init__(self) -> None:
        check_settings(self)


def warm_up_radius(eps: float, step: float, start: float, full: float) -> float:
    """Warm up the radius at a step: zero up to `start`, whole from `full` on, linear in between."""
    if step >= full:
        return eps
    return eps * max(step - start, 0.0) / (full - start)


def schedule_rate(rate: float, done: float, schedule: Schedule) -> float:
    """Schedule the learning rate after a share `done` in [0, 1] of all steps."""
    if schedule == "cosine":
        return rate * (1 + math.cos(math.pi * done)) / 2
    return rate * 0.1 ** sum(done >= share for share in (4 / 7, 6 / 7))


def weigh_terms(objective: str, *, gamma: float, beta: float) -> tuple[Weights, Weights]:
    """Weigh the terms that are lowered and those that are raised.

    A term of weight zero is left out, so that it costs nothing and changes no bit.
    """
    weight: Weights = {
        "clean": 1.0,
        "adversarial": 1.0,
        "divergence": beta,
        "maps": gamma,
        "own_map": gamma,
        "boosted": 1.0,
        "doubtful": beta,
    }

    def present(terms: frozenset[Term]) -> Weights:
        return {term: weight[term] for term in sorted(terms) if weight[term]}

    lowered, raised = OBJECTIVES[objective]
    return present(lowered), present(raised)


def check_settings(settings: TrainingSettings) -> None:
    """Raise UsageError if a value is out of range; the message names its option."""
    if settings.objective not in OBJECTIVES:
        raise UsageError(explain_unknown("objective", settings.objective, list(OBJECTIVES)))
    if not 0 <= settings.eps <= 1:
        raise UsageError(
            f"--eps must be from 0 to 1, in units of the [0, 1] pixel range (8/255 is eight"
            f" grey levels), not {settings.eps:g}"
        )
    for name in ("steps", "epochs"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.batch_size < 2:
        raise UsageError(f"--batch-size must be at least 2, not {settings.batch_size}")
    for name in ("rate", "step"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be positive, not {value:g}")
    for name in ("gamma", "beta"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise UsageError(f"--{name} must be 0 or more, not {getattr(settings, name):g}")
    if settings.warmup is not None and not 0 <= settings.warmup[0] <= settings.warmup[1] < math.inf:
        raise UsageError(
            "--warmup must be two numbers of epochs, the second not smaller than the first,"
            f" not {settings.warmup[0]:g},{settings.warmup[1]:g}"
        )
    if not 0 <= settings.average < 1:
        raise UsageError(f"--average must be from 0 to below 1, not {settings.average:g}")
    if not 0 <= settings.awp < 1:
        raise UsageError(f"--awp must be from 0 to below 1, not {settings.awp:g}")
    words = (
        *(("weighting", Weighting), ("schedule", Schedule), ("augment", Augment)),
        ("search", Search),
    )
    for name, kind in words:
        if getattr(settings, name) not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise UsageError(f"--{name} must be one of {known}, not {getattr(settings, name)!r}")
    if settings.search == "nfgsm" and not OBJECTIVES[settings.objective][1]:
        raise UsageError(
            f"--search does nothing with --objective {settings.objective}, which attacks no images"
        )
    plain = {"gamma": 1.0, "beta": 1.0}
    weighed = weigh_terms(settings.objective, **plain)
    for each in fields(settings):
        if each.name not in plain or getattr(settings, each.name) == each.default:
            continue
        if weigh_terms(settings.objective, **{**plain, each.name: 2.0}) == weighed:
            raise UsageError(f"--{each.name} does nothing with --objective {settings.objective}")
