"""Names: read from source, found in other packages, owned once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest

from robusteval.errors import UsageError
from robusteval.registry import (
    ATTACKS,
    DATA_SOURCES,
    DEFENSES,
    INTERPRETERS,
    REPORT_FORMATS,
    Registry,
    parse,
)
from robusteval.registry.signatures import Needs, describe_needs, explain_idle, read_number
from robusteval.runs.types import Spec, Threat

MODULE = '''
from typing import Literal
from robusteval.registry import ATTACKS

@ATTACKS.add("shift", norms=("linf",), knowledge="none")
def shift(model, x, y, *, targeted: bool = False, seeds=None, mask=None,
          eps: float = 4 / 255, way: Literal["up", "down"] = "up", label: str = "a"):
    """Make every pixel brighter.

    More.
    """
    return (x + eps).clamp(0, 1)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that brings an attack of its own."""
    (tmp_path / "shifting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("shifting", "shifting", "robusteval.attacks")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints([point]))
    monkeypatch.delitem(sys.modules, "shifting", raising=False)
    return "shifting"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry without what it has read so far."""
    monkeypatch.delitem(ATTACKS.__dict__, "entries", raising=False)
    monkeypatch.setattr(ATTACKS, "_functions", dict(ATTACKS._functions))
    return ATTACKS


@pytest.mark.usefixtures("plugin")
def test_an_attack_of_another_package_is_like_our_own(fresh: Registry) -> None:
    """Listed without being imported, checked, loaded by name."""
    entry = fresh.entry("shift")

    assert "shifting" not in sys.modules
    assert entry.summary == "Make every pixel brighter."
    assert entry.norms == ("linf",)
    assert entry.knowledge == "none"
    assert entry.parameters["way"].choices == ("up", "down")
    assert entry.threat(Spec("shift", {})) == Threat("linf", 4 / 255, False)
    with pytest.raises(UsageError, match="one of up, down"):
        fresh.check_spec(parse("shift:way=left"))
    assert fresh.load("shift").__name__ == "shift"


ALIASES = '''
from __future__ import annotations
import elsewhere
from typing import Literal, Optional
from elsewhere import Far as Away
from robusteval.registry import ATTACKS, DATA_SOURCES, REPORT_FORMATS

Way = Literal["up", "down"]

@ATTACKS.add("push", norms=("linf",))
def push(model, x, y, *, way: Way = "up", away: Away | None = None, far: elsewhere.Far = "a",
         one: "Literal['only']" = "only", free: str = "", number: int | None = None):
    """Push."""
    return way

@REPORT_FORMATS.add("leaflet", suffix=".leaf")
def render_leaflet(records):
    """A table on a leaflet."""
    return ""

@DATA_SOURCES.add("punched", suffix=(".punched", ".pc"), written="FILE.punched")
def open_punched(path, *, column: Away = "b"):
    """Images in a column of a Parquet file."""
'''


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that brings something of each kind, and cannot even be imported."""
    (tmp_path / "elsewhere.py").write_text("raise ImportError\nFar = Literal['a', 'b']\n")
    (tmp_path / "bringing.py").write_text(ALIASES)
    monkeypatch.syspath_prepend(tmp_path)

    def entry_points(group: str) -> metadata.EntryPoints:
        known = {f"robusteval.{kind}" for kind in ("attacks", "report_formats", "data_sources")}
        point = metadata.EntryPoint("bringing", "bringing", group)
        return metadata.EntryPoints([point] if group in known else [])

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    registries = (ATTACKS, DEFENSES, INTERPRETERS, REPORT_FORMATS, DATA_SOURCES)
    for registry in registries:
        registry.__dict__.pop("entries", None)  # which are read once
    yield
    for registry in registries:
        registry.__dict__.pop("entries", None)


@pytest.mark.usefixtures("brought")
def test_names_of_types_are_followed_in_source() -> None:
    """Assigned in the module, imported under another name, or reached through a module."""
    parameters = ATTACKS.entry("push").parameters

    choices = {name: parameter.choices for name, parameter in parameters.items()}

    assert choices == {
        "way": ("up", "down"),
        "away": ("a", "b"),
        "far": ("a", "b"),
        "one": ("only",),
        "free": (),
        "number": (),
    }
    assert ATTACKS.check_spec(parse("push:away=none")).parameters == {"away": None}
    with pytest.raises(UsageError, match="push: far must be one of a, b, not 'c'"):
        ATTACKS.check_spec(parse("push:far=c"))
    with pytest.raises(UsageError, match="push: way must be one of up, down, not 3"):
        ATTACKS.check_spec(Spec("push", {"way": 3}))


@pytest.mark.usefixtures("brought")
def test_one_module_may_bring_several_kinds() -> None:
    """Each registry takes what is decorated for it, and what it has to know of that."""
    leaflet, punched = REPORT_FORMATS.entry("leaflet"), DATA_SOURCES.entry("punched")

    assert (leaflet.summary, leaflet.suffixes) == ("A table on a leaflet.", (".leaf",))
    assert (punched.suffixes, punched.written) == ((".punched", ".pc"), "FILE.punched")
    assert DATA_SOURCES.find_suffix(".PC") == punched
    assert DATA_SOURCES.find_suffix(".leaf") is None
    assert not {"push", "punched"} & set(REPORT_FORMATS.entries)
    assert "bringing" not in sys.modules


def test_a_wrong_word_stops_a_call_before_it_runs() -> None:
    """What the function would have to check by hand otherwise; None only where it is allowed."""
    calls: list[object] = []

    @Registry("robusteval.attacks", "attack").add("x")
    def move(*, way: Literal["up", "down"] = "up", far: Literal["a"] | None = None) -> None:
        calls.append((way, far))

    move(way="down", far=None)
    with pytest.raises(ValueError, match="way must be one of up, down, not 'left'"):
        move(way="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="way must be one of up, down, not None"):
        move(way=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="far must be one of a, none, not 'b'"):
        move(far="b")  # type: ignore[arg-type]

    assert calls == [("down", None)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("advedge:search=cw,eps=4/255", "eps does nothing unless search=pgd"),
        ("advedge:alpha=.2", "alpha does nothing unless variant=advedge_plus"),
        ("advedge:variant=adv2,edges=random", "edges does nothing unless variant=advedge or"),
        ("sparse:rounds=10", "rounds does nothing unless variant=paper"),
        ("apgd:by=logits", "by does nothing unless targets is 1 or more"),
        ("apgd:targets=3,by=logits,candidates=5", "candidates does nothing unless by=distance"),
        ("isi:eps=3", "eps does nothing unless norm=l2 or linf"),
        ("isi:centre=black", "nothing unless indicator=relevance or variant=paper"),
        ("fab:targeted=true,targets=3", "targets does nothing unless targeted=false"),
        ("refine:guide=change,where=label", "where does nothing unless guide is not change$"),
        ("strattack:tau=0,side=3", "side does nothing unless tau is not 0$"),
        ("advedge:smoothing=none,interpreter=mask", "nothing unless interpreter is not mask$"),
        ("advedge:warmup=0", "variant=advedge does nothing unless edge_stage=all or settings"),
        ("advedge:warmup=0,variant=advedge_plus", "variant=advedge_plus does nothing unless"),
    ],
)
def test_what_does_nothing_beside_the_others_is_refused(text: str, reason: str) -> None:
    """A default that is spelled out, too: who writes it believes that it counts."""
    with pytest.raises(UsageError, match=reason):
        ATTACKS.check_spec(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "advedge:search=pgd,eps=4/255",
        "advedge:variant=advedge_plus,alpha=.2,edges=random",
        "sparse:variant=paper,rounds=10",
        "apgd:targets=3,candidates=5",
        "isi:eps=none",
        "isi:variant=paper,centre=black",
        "isi:indicator=relevance,norm=l2,centre=black",
        "refine:guide=cam,where=label",
        "strattack:tau=0",
        "advedge:smoothing=none,interpreter=mask+cam",
        "advedge:warmup=0,variant=adv2",
        "advedge:warmup=0,settings=paper",
    ],
)
def test_what_does_something_is_not_refused(text: str) -> None:
    """One way of several is enough, and none given is nothing given."""
    ATTACKS.check_spec(parse(text))


def test_every_rule_is_about_parameters_that_are_there() -> None:
    """A rule with a slip of the pen would refuse nothing, or everything."""
    for entry in ATTACKS.entries.values():
        for name, rule in entry.needs.items():
            for condition in rule if isinstance(rule, tuple) else (rule,):
                assert {name, *condition} <= entry.parameters.keys()
                for other, wanted in condition.items():
                    known = entry.parameters[other].choices
                    words = wanted["not"] if isinstance(wanted, dict) else wanted
                    if known and isinstance(words, tuple):
                        assert set(words) <= {*known, None}
                    assert not isinstance(wanted, dict) or set(wanted) == {"not"}
            assert entry.find_idle(Spec(entry.name, {})) == {}  # of defaults alone


def test_a_rule_is_spelled_as_the_refusal_is() -> None:
    """What a parameter may not be, alternatives, and a rule about values of its own."""
    needs: Needs = {
        "far": {"way": {"not": ("down", "left")}},
        "near": ({"far": 2}, {"way": ("up",), "far": 1}, {"way": ("up",)}),
        "way": ({"way": ("up",)}, {"far": {"not": (0,)}}),
    }

    assert list(describe_needs(needs)) == [
        "far does nothing unless way is not down or left",
        "near does nothing unless far is 2 or more, or way=up and far is 1 or more, or way=up",
        "way other than up does nothing unless far is not 0",
    ]
    assert explain_idle("far", needs, {"way": "up", "far": 0}) is None
    none = {"way": "down", "far": 0.0, "near": 1}
    assert explain_idle("far", needs, none) == "far does nothing unless way is not down or left"
    # the second way asks for more than the third
    assert (
        explain_idle("near", needs, none) == "near does nothing unless far is 2 or more or way=up"
    )
    assert explain_idle("way", needs, none) == "way=down does nothing unless far is not 0"


def test_a_default_is_judged_where_a_rule_is_about_values() -> None:
    """In a call as in a command: nobody has to give it."""
    calls: list[object] = []
    needs: Needs = {"way": ({"way": ("up",)}, {"far": {"not": (0,)}})}

    @Registry("robusteval.attacks", "attack").add("x", needs=needs)
    def move(*, way: Literal["up", "down"] = "down", far: int = 1) -> None:
        calls.append((way, far))

    move()
    move(way="up", far=0)
    with pytest.raises(ValueError, match="way=down does nothing unless far is not 0"):
        move(far=0)

    assert calls == [("down", 1), ("up", 0)]


def test_a_call_with_what_does_nothing_is_refused() -> None:
    """From Python, where the defaults may be passed on: only what differs from them."""
    calls: list[object] = []

    @Registry("robusteval.attacks", "attack").add("x", needs={"far": {"way": ("up",)}})
    def move(*, way: Literal["up", "down"] = "up", far: int = 1) -> None:
        calls.append((way, far))

    move(way="down", far=1)
    move(far=3)
    with pytest.raises(ValueError, match="far does nothing unless way=up"):
        move(way="down", far=3)

    assert calls == [("down", 1), ("up", 3)]


@pytest.mark.usefixtures("plugin")
def test_a_name_with_two_owners_is_an_error(fresh: Registry, tmp_path: Path) -> None:
    """The message names both."""
    text = (tmp_path / "shifting.py").read_text()
    (tmp_path / "shifting.py").write_text(text.replace('"shift"', '"pgd"'))

    with pytest.raises(UsageError, match=r"robusteval\.attacks\.pgd and shifting"):
        _ = fresh.entries


def test_a_package_that_is_gone_is_named(fresh: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point may outlive its module."""
    point = metadata.EntryPoint("gone", "gone.attacks", "robusteval.attacks")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints([point]))

    with pytest.raises(UsageError, match=r"gone\.attacks"):
        _ = fresh.entries


def test_a_function_cannot_take_over_a_name() -> None:
    """Two modules that register one name are an error at import, too."""
    registry = Registry("robusteval.attacks", "attack")

    def mine() -> None: ...

    def theirs() -> None: ...

    theirs.__module__ = "elsewhere"
    registry.add("x")(mine)

    with pytest.raises(RuntimeError, match="elsewhere"):
        registry.add("x")(theirs)


def test_specs_are_taken_apart() -> None:
    """Ours, and ART's with a class name."""
    assert parse("pgd") == Spec("pgd", {})
    assert parse(" pgd:eps=8/255, steps=20 ") == Spec("pgd", {"eps": "8/255", "steps": "20"})
    assert parse("art:Foo:eps=1") == Spec("art:Foo", {"eps": "1"})
    with pytest.raises(UsageError):
        parse("art:")


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), (".5", 0.5), ("1e-3", 0.001)])
def test_numbers_are_decimals_or_fractions(text: str, value: float) -> None:
    """As users write them."""
    assert read_number(text) == value


def test_a_word_may_leave_an_attack_without_a_radius() -> None:
    """Its results must not be brought into a ball it never knew."""
    entry = ATTACKS.entry("advedge")

    threats = [entry.threat(Spec("advedge", {"search": word})) for word in ("pgd", "cw", "stadv")]

    assert threats == [
        Threat("linf", 8 / 255, False),
        Threat("l2", None, False),
        Threat("none", None, False),
    ]
