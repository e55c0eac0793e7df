"""Attacks by the names that the field knows, and what each is called here. Imports no ART."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

from robusteval.errors import UsageError
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Spec

# By a name in lower case, of letters and digits alone, all that comes near it, the best first:
# attacks as they are asked for, or presets. Only what is there is named.
CALLED_HERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("autoattack", "aa", "standard", "autoattackstandard", "autoattackrand", "autoattackplus"),
        ("--preset autoattack", "--preset standard"),
    ),
    **dict.fromkeys(("quick",), ("--preset quick", "--preset standard")),
    **dict.fromkeys(("interpretation",), ("--preset interpretation",)),
    **dict.fromkeys(
        ("cw", "cw2", "cwl2", "carlini", "carliniwagner", "carliniwagnerl2", "l2cw"),
        ("art:CarliniL2Method", "fmn:norm=l2"),
    ),
    **dict.fromkeys(("cwlinf", "carlinilinf", "linfcw"), ("art:CarliniLInfMethod",)),
    **dict.fromkeys(("cwl0", "carlinil0"), ("art:CarliniL0Method", "sigma_zero")),
    **dict.fromkeys(("deepfool", "df"), ("fab", "art:DeepFool")),
    **dict.fromkeys(
        ("apgd", "autopgd", "apgdce", "apgddlr", "apgdt", "apgdtargeted", "autoprojected"),
        ("apgd", "art:AutoProjectedGradientDescent"),
    ),
    **dict.fromkeys(("fab", "fabt", "fastadaptiveboundary"), ("fab", "art:DeepFool")),
    **dict.fromkeys(("square", "squareattack"), ("square", "art:SquareAttack")),
    **dict.fromkeys(("fmn", "fastminimumnorm"), ("fmn", "sigma_zero")),
    **dict.fromkeys(("ddn", "decoupleddirectionandnorm"), ("ddn", "fmn", "art:CarliniL2Method")),
    **dict.fromkeys(("bim", "ifgsm", "basiciterative"), ("pgd:random_start=false",)),
    **dict.fromkeys(("mim", "mifgsm", "momentumiterative"), ("art:MomentumIterativeMethod", "pgd")),
    **dict.fromkeys(("fgm", "ffgsm", "rfgsm", "fastgradient"), ("fgsm",)),
    **dict.fromkeys(("pgdl2", "l2pgd"), ("pgd:norm=l2",)),
    **dict.fromkeys(("pgdlinf", "linfpgd", "projectedgradientdescent"), ("pgd",)),
    **dict.fromkeys(("cwpgd", "pgdcw", "pgdmargin"), ("pgd:loss=margin",)),
    **dict.fromkeys(("saliencymap", "papernot"), ("jsma", "art:SaliencyMapMethod")),
    **dict.fromkeys(("ead", "elasticnet"), ("art:ElasticNet",)),
    **dict.fromkeys(("boundary",), ("art:BoundaryAttack",)),
    **dict.fromkeys(("hsja", "hopskipjump"), ("art:HopSkipJump",)),
    **dict.fromkeys(("zoo",), ("art:ZooAttack",)),
    **dict.fromkeys(("onepixel", "pixel"), ("art:PixelAttack",)),
    **dict.fromkeys(("newtonfool",), ("art:NewtonFool",)),
    **dict.fromkeys(("spatial", "rotation"), ("art:SpatialTransformation",)),
    **dict.fromkeys(("uap", "universal"), ("art:UniversalPerturbation",)),
    **dict.fromkeys(("sparsers", "l0"), ("sigma_zero", "sparse")),
    **dict.fromkeys(("spgd", "sparsepgd", "pgd0", "pgdl0"), ("sparse_pgd",)),
    **dict.fromkeys(("sigmazero",), ("sigma_zero",)),
    **dict.fromkeys(("structuredattack", "structured", "groupsparse"), ("strattack",)),
    **dict.fromkeys(("gaussian", "uniform", "random", "gaussiannoise", "gn"), ("noise",)),
    **dict.fromkeys(("adv2", "acid"), ("advedge:variant=adv2",)),
}
AIMLESS = ("corruption",)  # norms of what has no goal
# of ART: `y` are targets, and there is no flag that says so
ALWAYS_TARGETED = ("SaliencyMapMethod", "TargetedUniversalPerturbation")
NUMBERED = re.compile(r"(pgd|apgd|bim)(\d+)")  # such as PGD-20: steps


def check_attack(spec: Spec) -> Spec:
    """The attack with its parameters read; ART's are not known before ART is imported.

    UsageError for what is none; where the field knows it, the message says how it is asked for
    here. The classes that ``target=`` chooses are those of a network that is not known yet: they
    stay as they were written.
    """
    bare, target = split_target(spec)
    if target is not None:
        read = check_attack(bare).parameters
        return Spec(spec.name, {k: read.get(k, v) for k, v in spec.parameters.items()})
    if spec.name.startswith("art:"):
        return spec
    if spec.name not in ATTACKS.entries:
        if re.search("[=,; ]", spec.name):
            name, *rest = filter(None, re.split("[,; ]+", spec.name))
            raise UsageError(
                f"{spec.name!r} is no name of an attack: write NAME:key=value,key=value, such as"
                f" {':'.join([name, *([','.join(rest)] if rest else [])])}"
            )
        ways = list(list_ways(spec.name))
        if ways:
            raise UsageError(
                f"no attack is called {spec.name!r} here: give {' or '.join(ways)}"
                f" ({describe_lists(ways)})"
            )
    checked = ATTACKS.check_spec(spec)
    if checked.parameters.get("targeted") and ATTACKS.entry(spec.name).norms == AIMLESS:
        raise UsageError(f"{spec.name} has no goal, so it cannot be targeted: leave that out")
    return checked


def split_target(spec: Spec) -> tuple[Spec, str | None]:
    """The targeted attack on any class, and the class that a spec chooses; None if it does not.

    ``target=NAME``, a number or a file, of every attack that can be targeted. Some have words of
    their own for a `target`, which are no classes. UsageError for an attack without a goal, or one
    that is said not to be targeted.
    """
    entry = ATTACKS.entries.get(spec.name)
    chosen = str(spec.parameters.get("target"))
    theirs = spec.name.startswith("art:")
    if "target" not in spec.parameters or (entry is None and not theirs):
        return spec, None
    if entry is not None and "target" in entry.parameters:
        if chosen in entry.parameters["target"].choices:
            return spec, None
    elif entry is not None and ("targeted" not in entry.parameters or entry.norms == AIMLESS):
        raise UsageError(f"{spec.name} has no goal, so no class can be its target: leave that out")
    rest = {key: value for key, value in spec.parameters.items() if key != "target"}
    if str(rest.get("targeted", True)).lower() != "true":
        raise UsageError(f"{spec.name}: target={chosen} is a class to reach: leave targeted out")
    if theirs and spec.name.removeprefix("art:") in ALWAYS_TARGETED:
        return Spec(spec.name, rest), chosen
    return Spec(spec.name, {**rest, "targeted": True}), chosen


def list_ways(name: str) -> Iterator[str]:
    """How an attack is asked for that goes by another name; nothing for one that nobody knows."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    numbered = NUMBERED.fullmatch(plain)
    if numbered is not None and plain not in CALLED_HERE:
        kind = "apgd" if numbered[1] == "apgd" and "apgd" in ATTACKS.entries else "pgd"
        yield f"{kind}:steps={numbered[2]}"
        return
    if name.lower() in ATTACKS.entries:
        yield name.lower()
        return
    ways = CALLED_HERE.get(plain) or CALLED_HERE.get(plain.removesuffix("attack"))
    if ways is None:  # the class of ART without its prefix
        known = {way for each in CALLED_HERE.values() for way in each if way.startswith("art:")}
        ways = tuple(way for way in known if way.removeprefix("art:").lower() == plain)
    yield from filter(exists, ways)


def exists(way: str) -> bool:
    """Whether a preset or an attack is there; of ART all are."""
    if way.startswith("--preset "):
        name = way.removeprefix("--preset ")
        return files("robusteval").joinpath("presets", f"{name}.toml").is_file()
    return way.startswith("art:") or parse(way).name in ATTACKS.entries


def describe_lists(ways: list[str]) -> str:
    """Where there is more of this kind."""
    if any(way.startswith("--preset ") for way in ways):
        return "a set of attacks: `robusteval list presets` shows what is in it"
    return "`robusteval list attacks` shows all"
