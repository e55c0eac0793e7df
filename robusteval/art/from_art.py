"""Any ART evasion attack as an attack function, and what has to be known of them for that."""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from numbers import Real
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from art.attacks import evasion
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassGradientsMixin
from art.estimators.estimator import LossGradientsMixin
from torch import Tensor, nn

from robusteval.art.field_names import ALWAYS_TARGETED, list_ways
from robusteval.art.to_art import as_estimator, select_device
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.seeds import kept_random_states, seed_everything
from robusteval.models.steps import tell_passes
from robusteval.registry import explain_unknown
from robusteval.registry.signatures import read_number
from robusteval.runs.types import Threat
from robusteval.search.losses import replace_cross_entropy

# attacks on something else, by what their constructor does not tell
UNSUITED = {
    "AdversarialPatch": "makes one patch, not adversarial images",
    "AdversarialPatchNumpy": "makes one patch, not adversarial images",
    "AdversarialPatchPyTorch": "makes one patch, not adversarial images",
    "AdversarialPatchTensorFlowV2": "makes one patch, not adversarial images",
    "FeatureAdversariesNumpy": "needs guide images",
    "GeoDA": "does not run under NumPy 2",
    "LowProFool": "is for tabular data",
    "OverTheAirFlickeringPyTorch": "is for videos",
    "ProjectedGradientDescentTensorFlowV2": "needs TensorFlow",
    "SimBA": "needs a model that answers with probabilities",
    "VirtualAdversarialMethod": "needs a model that answers with probabilities",
}
# imported only when the attack runs
PACKAGES = {
    "AutoAttack": "multiprocess",
    "CompositeAdversarialAttackPyTorch": "kornia",
    "ThresholdAttack": "cma",
}
# they ask for no gradients by name and use them all the same
GRADIENT_USERS = ("AutoAttack", "UniversalPerturbation", "TargetedUniversalPerturbation")
# ART 1.20.1 drops the sign of the gradient under linf, and what is left hardly moves an image
STUCK_UNDER_LINF = ("AutoConjugateGradient", "RescalingAutoConjugateGradient")
# `targeted` is there but wants images to start from
NEVER_TARGETED = ("SignOPTAttack",)
# takes no more than one image at a time
ONE_BY_ONE = ("ShadowAttack",)
# what an attack without an attribute `norm` keeps small
MINIMISED = {
    "BoundaryAttack": "l2",
    "CarliniL0Method": "l0",
    "CarliniL2Method": "l2",
    "CarliniLInfMethod": "linf",
    "DeepFool": "l2",
    "ElasticNet": "l1",
    "NewtonFool": "l2",
    "SignOPTAttack": "l2",
    "ZooAttack": "l2",
}
# arguments that are not for the user to set
SUPPLIED = ("batch_size", "verbose", "summary_writer", "parallel_pool_size", "estimator_orig")


# how often it all happens; what AutoAttack runs it does not say
ROUNDS = (
    *("max_iter", "nb_steps", "n_steps", "steps", "binary_search_steps"),
    *("nb_random_init", "num_random_init", "nb_restarts"),
)


def list_art_attacks() -> list[tuple[str, str]]:
    """Name and first sentence of every ART attack that `from_art` takes."""
    return [
        (name, summarise(attack))
        for name, attack in sorted(list_evasion_classes().items())
        if explain_refusal(attack) is None
    ]


def list_evasion_classes() -> dict[str, type[EvasionAttack]]:
    """The evasion attacks of the installed ART, by name."""
    found = vars(evasion).items()
    return {n: c for n, c in found if isinstance(c, type) and issubclass(c, EvasionAttack)}


def summarise(attack: type[EvasionAttack]) -> str:
    """First sentence of the docstring."""
    text = " ".join((inspect.getdoc(attack) or "").split()).partition(" | ")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0].replace("`", "")


def explain_refusal(attack: type[EvasionAttack]) -> str | None:
    """Why an attack cannot be run here; None if it can."""
    _, *rest = inspect.signature(attack).parameters.values()
    needed = [p.name for p in rest if p.default is inspect.Parameter.empty]
    if attack.__name__ in UNSUITED:
        return UNSUITED[attack.__name__]
    if needed:
        return f"needs {', '.join(needed)}, which cannot be given here"
    package = PACKAGES.get(attack.__name__)
    if package is not None and find_spec(package) is None:
        return f"needs a package that is not installed: pip install {package}"
    if not attack.is_estimator_valid(build_stand_in(), attack._estimator_requirements or ()):
        return "is not for image classifiers in torch"
    return None


@cache
def build_stand_in() -> PyTorchClassifier:
    """An estimator on which parameters can be tried before there is a model."""
    network = nn.Sequential(nn.Flatten(), nn.PReLU())  # some ask a parameter for its device
    return as_estimator(Classifier(network, num_classes=192), input_shape=(3, 8, 8))


def from_art(name: str, parameters: Mapping[str, Any]) -> ArtFunction:
    """An ART evasion attack as an attack function.

    Parameters
    ----------
    name : str
        Class in `art.attacks.evasion`, such as ``HopSkipJump``.
    parameters : mapping
        Arguments of its constructor, as values or as text: ``8/255``, ``true``, ``none``, ``linf``.

    Raises
    ------
    UsageError
        If there is no such attack or parameter, or ART refuses a value.
    """
    return ArtFunction(name, parameters)


class ArtFunction:
    """An ART evasion attack with its parameters, called like any attack function.

    ART draws from global random state: it is seeded from all seeds of the batch and put back
    afterwards. Hence the result is reproducible, but depends on how images are batched.

    Attributes
    ----------
    threat : Threat
    knowledge : str
        "white-box" or "black-box".
    summary : str
        First sentence of ART's description.
    resolved : dict
        All parameters, defaults included, JSON-able.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        known = list_evasion_classes()
        if name not in known or explain_refusal(known[name]) is not None:
            why = f"art:{name} {explain_refusal(known[name])}" if name in known else None
            available = [attack for attack, _ in list_art_attacks()]
            unknown, ways = explain_unknown("ART attack", name, available), list(list_ways(name))
            if ways and "did you mean" not in unknown:
                unknown = f"no ART attack is called {name!r} here: give {', '.join(ways)}"
            raise UsageError(why or unknown)
        self.name = name
        self.summary = summarise(known[name])
        self._make: Callable[..., EvasionAttack] = known[name]
        self._masks = ":param mask:" in (known[name].generate.__doc__ or "")
        _, *arguments = inspect.signature(self._make).parameters.values()
        self._arguments = {p.name: p for p in arguments}
        if "targeted" in parameters and "targeted" not in self._arguments:
            self._flagged = False
            self._check_goal(bool(parameters["targeted"]))
        self._given = self._read(parameters)

        defaults = {n: p.default for n, p in self._arguments.items() if n not in SUPPLIED}
        self._flagged = "targeted" in defaults and name != "AutoAttack"  # there: try those as well
        if self._flagged:
            self._given.setdefault("targeted", False)
        self.resolved: dict[str, Any] = {
            n: to_json_value(v) for n, v in (defaults | self._given).items()
        }
        goal = name in ALWAYS_TARGETED or bool(self._flagged and self._given["targeted"])
        self._check_goal(goal)
        self.threat = derive_threat(self._build(build_stand_in(), 1, goal), goal)
        if self.threat.norm == "linf" and name in STUCK_UNDER_LINF:
            raise UsageError(
                f"art:{name} hardly moves an image under linf in this version of ART: use norm=2,"
                " or AutoProjectedGradientDescent"
            )
        self.knowledge = "white-box" if uses_gradients(known[name]) else "black-box"
        # forward passes per image: two an iteration, until a batch has shown how many there are
        rounds = [self.resolved.get(name) for name in ROUNDS]
        self._expected = 2.0 * math.prod(n for n in rounds if isinstance(n, int) and n > 0)

    def _read(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of the ART class with their texts read as values."""
        given = dict(parameters)
        settable = [name for name in self._arguments if name not in SUPPLIED]
        for name, value in given.items():
            if name not in settable:
                raise UsageError(explain_unknown(f"parameter of art:{self.name}", name, settable))
            try:
                if isinstance(value, str):
                    given[name] = read_argument(value, self._arguments[name])
                to_json_value(given[name])
            except ValueError as error:
                raise UsageError(
                    f"art:{self.name}: {name} must be {error}, not {value!r}"
                ) from None
        return given

    def _check_goal(self, targeted: bool) -> None:
        always, never = self.name in ALWAYS_TARGETED, self.name in NEVER_TARGETED
        if targeted != always and (not self._flagged or never):
            raise UsageError(f"art:{self.name} is for {'' if always else 'un'}targeted runs only")

    def _build(self, estimator: PyTorchClassifier, n: int, targeted: bool) -> EvasionAttack:
        """The ART object for batches of `n`; UsageError if ART refuses the parameters."""
        ours = {"batch_size": n, "verbose": False}
        given = self._given | {k: v for k, v in ours.items() if k in self._arguments}
        if self._flagged:
            given["targeted"] = targeted
        try:
            with isolate_art(0, estimator.device):
                made = self._make(estimator, **given)
        except Exception as error:  # also what ART stumbles over instead of checking it
            raise UsageError(f"art:{self.name}: {shorten_error(error)}") from None
        for each in (made, *getattr(made, "attacks", ())):  # some wrap the network once more
            if isinstance(loss := getattr(each.estimator, "loss", None), nn.Module):
                replace_cross_entropy(loss)
        return made

    def validate(self, classifier: Classifier, shape: tuple[int, int, int]) -> None:
        """UsageError if the attack cannot be run on this classifier of images ``(c, h, w)``."""
        uses = "AutoAttack" if self.name == "AutoAttack" else self.resolved.get("loss_type")
        if uses in ("AutoAttack", "difference_logits_ratio") and classifier.num_classes < 3:
            raise UsageError(
                f"art:{self.name}: the difference_logits_ratio loss needs at least 3 classes"
            )
        with frozen(classifier):
            self._build(as_estimator(classifier, input_shape=shape), 1, self.threat.targeted)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        targeted: bool | None = None,
        seeds: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images ``(n, c, h, w)``, as ART returns them: not necessarily in [0, 1].

        Parameters
        ----------
        model : Classifier
            What to attack.
        x : Tensor
            Images ``(n, c, h, w)`` in [0, 1].
        y : Tensor
            Labels ``(n,)`` int64, or the classes to reach when `targeted`.
        targeted : bool, optional
            Reach class `y` instead of leaving it; as in the parameters if not given.
        seeds : Tensor, optional
            One seed per image ``(n,)``; zeros if not given.
        mask : Tensor, optional
            Broadcastable to `x`; zero where a pixel may not change.

        Raises
        ------
        UsageError
            If the attack has no such goal or knows no masks.
        RunError
            If it breaks; lack of memory is passed on as it is.
        """
        assert isinstance(model, Classifier), "an ART attack needs the number of classes"
        targeted = self.threat.targeted if targeted is None else targeted
        self._check_goal(targeted)
        if mask is not None and not self._masks:
            raise UsageError(f"art:{self.name} cannot keep to a mask")
        if len(x) == 0:
            return x.clone()

        one_hot = nn.functional.one_hot(y, model.num_classes).float()
        given = {"x": x, "y": one_hot}
        if mask is not None:
            given["mask"] = mask.expand_as(x).float()
        arrays = {name: values.cpu().numpy() for name, values in given.items()}
        size = 1 if self.name in ONE_BY_ONE else len(x)
        _, c, h, w = x.shape
        estimator = as_estimator(model, input_shape=(c, h, w))
        with frozen(model):
            attack = self._build(estimator, size, targeted)
            try:
                with (
                    isolate_art(join_seeds(seeds, len(x)), x.device),
                    tell_passes(model, self._expected * len(x)) as spent,
                ):
                    parts = [
                        attack.generate(**{n: a[i : i + size] for n, a in arrays.items()})
                        for i in range(0, len(x), size)
                    ]
                x_adv = np.concatenate(parts).astype(np.float32)
                assert x_adv.shape == x.shape, f"images came back as {x_adv.shape}"
                self._expected = spent.passes / len(x)
            except Interrupted:
                raise
            except Exception as error:
                if isinstance(error, MemoryError) or "memory" in str(error):
                    raise  # a smaller batch may do
                raise RunError(f"art:{self.name} failed: {shorten_error(error)}") from error
        return torch.from_numpy(x_adv).to(x.device)


def read_argument(text: str, argument: inspect.Parameter) -> Any:
    """The value a user wrote for an argument of ART; ValueError, saying what would do."""
    kinds = argument_kinds(argument)
    if text.lower() == "none" and "None" in kinds:
        return None
    if argument.name == "norm":
        norm = text.lower().removeprefix("l")
        numbers = {"inf": np.inf, "0": 0, "1": 1, "2": 2}
        return numbers.get(norm, text) if kinds & {"int", "float"} else norm
    if "bool" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "int" in kinds and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if "float" in kinds:
        return read_number(text)
    if "str" in kinds:
        return text
    wanted = {"bool": "true or false", "int": "a whole number"}
    known = [wanted[kind] for kind in wanted if kind in kinds]
    raise ValueError(known[0] if known else "left out, as it cannot be written as text")


def argument_kinds(argument: inspect.Parameter) -> set[str]:
    """Names of the types of an argument, of which ART writes most annotations as text."""
    kinds = argument.annotation
    if isinstance(kinds, str):
        found = {kind.strip(" '\"") for kind in kinds.split("|")}
    else:
        found = {getattr(kind, "__name__", "") for kind in get_args(kinds) or (kinds,)}
    return found | ({"None"} if argument.default is None else set())


def to_json_value(value: Any) -> Any:
    """A parameter as JSON can hold it; ValueError if it cannot."""
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, Real) and not np.isfinite(float(value)):
        return str(float(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("a number, a word, true, false or a list of these")


def derive_threat(attack: EvasionAttack, targeted: bool) -> Threat:
    """Norm, budget and goal of an ART attack."""
    norms = {"inf": "linf", "2": "l2", "1": "l1", "0": "l0"}
    norm = getattr(attack, "norm", None)
    name = norms.get(f"{norm:g}" if isinstance(norm, Real) else str(norm))
    eps = getattr(attack, "eps", None)
    return Threat(
        name or MINIMISED.get(type(attack).__name__, "none"),
        float(eps) if isinstance(eps, Real) else None,
        targeted,
    )


def uses_gradients(attack: type[EvasionAttack]) -> bool:
    """Whether an ART attack looks into the model."""
    flat: list[Any] = []
    for requirement in attack._estimator_requirements or ():
        flat += requirement if isinstance(requirement, tuple) else [requirement]
    gradients = LossGradientsMixin in flat or ClassGradientsMixin in flat
    return gradients or attack.__name__ in GRADIENT_USERS


def shorten_error(error: Exception) -> str:
    """The first line of an error's message; with its kind, unless it was raised on purpose."""
    message = " ".join((str(error).strip().splitlines() or [""])[0].split())
    on_purpose = isinstance(error, ValueError | TypeError | AssertionError | NotImplementedError)
    return message if message and on_purpose else f"{type(error).__name__}: {message}".rstrip(": ")


def join_seeds(seeds: Tensor | None, n: int) -> int:
    """One seed for a batch, from those of its images."""
    seeds = torch.zeros(n, dtype=torch.int64) if seeds is None else seeds
    digest = hashlib.sha256(seeds.cpu().numpy().astype("<i8").tobytes()).digest()
    return int.from_bytes(digest[:4], "big")  # NumPy's global state takes 32 bits


class SeededState(np.random.RandomState):
    """NumPy's generator, seeded from the global one where it would ask the operating system.

    BoundaryAttack and HopSkipJump make one for every image.
    """

    def __init__(self, seed: Any = None) -> None:
        super().__init__(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002


@contextmanager
def isolate_art(seed: int, device: torch.device) -> Iterator[None]:
    """Run ART inside: seeded, silent, and without a trace in any global random state."""
    logger = logging.getLogger("art")
    level = logger.level
    with (
        select_device(device),
        kept_random_states(device),
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        patch.object(np.random, "RandomState", SeededState),
    ):
        try:
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL + 1)
            seed_everything(seed, device)
            yield
        finally:
            logger.setLevel(level)
