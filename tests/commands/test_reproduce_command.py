"""`robusteval reproduce`: a paper in one command, continued after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_paper import tiny

from robusteval.analysis.map_attack import attack_maps
from robusteval.analysis.papers import running
from robusteval.cli import cli
from robusteval.commands import reproduce
from robusteval.evaluation import computation


def ran(*words: str) -> Result:
    """The command, as far as it comes."""
    return CliRunner().invoke(cli, ["reproduce", *words])


def test_a_paper_is_reproduced_and_continued_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables with figures of attacks, maps and explanations; nothing is attacked twice.

    Nor is the network that was trained as the paper proposes, here the same one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "read_paper", tiny)

    def stop(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "explain", stop)
        stopped = ran("pgap", "--format", "json", "--hardened", "demo")
    assert stopped.exit_code == 130
    assert "the same command continues where this one ended" in stopped.stderr

    with monkeypatch.context() as patch:
        patch.setattr(computation, "perturb", stop, raising=False)
        whole = ran("pgap", "--format", "json", "--hardened", "demo")
    assert whole.exit_code == 0, whole.stderr
    found = json.loads(whole.stdout)
    assert found["images"] == 4
    rows = found["tables"][0]["rows"]
    assert [row["verdict"] for row in rows] == ["nothing published"] * 8
    assert rows[3]["measured"] == rows[0]["measured"]
    assert rows[7]["measured"] == rows[5]["measured"]
    assert rows[5]["attack"] == "cells of the map lowered, eps 8/255, 2 steps"
    assert "The hardened network is demo, which has 4 of 4 images right." in found["remarks"]
    assert any("It is the network beside it" in text for text in found["remarks"])
    assert rows[6]["attack"] == "16 of 64 units of layer 10, fgsm:eps=0.1"
    assert rows[6]["measured"][3] == 20  # the others have ranked the units
    assert any(text.startswith("Masked, 16 of 64 units") for text in found["remarks"])
    maps, places = found["claims"]
    assert (maps["holding"], maps["measured"][0], maps["measured"][3]) == ("not decided", 0, 4)
    assert places["measured"][3] == 2
    folder = Path("reproduced/pgap-small")
    assert json.loads((folder / "report.json").read_text()) == found
    assert "Table I: Two attacks" in (folder / "report.md").read_text()
    assert "<h1>pgap: On little</h1>" in (folder / "report.html").read_text()


def test_what_begins_anew_does_no_maps_of_a_network_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of both networks are kept in one place, here those of the same one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "read_paper", tiny)
    radii: list[float] = []

    def count(*given: Any, **more: Any) -> Any:
        radii.append(more["eps"])
        return attack_maps(*given, **more)

    monkeypatch.setattr(running, "attack_maps", count)

    assert ran("pgap", "--hardened", "demo", "--fresh").exit_code == 0

    assert len(radii) == len(set(radii)) > 0


def test_papers_are_listed() -> None:
    listed = ran("list")

    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "advedge",
        "detector",
        "int",
        "isi",
        "pgap",
        "pse",
        "wifgsm",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pgpa",), "unknown paper 'pgpa' (did you mean 'pgap'?)"),
        (("pgap", "--checkpoint", "net.pt"), "there is no file net.pt"),
        (("pgap", "--size", "big"), "small"),
        (("pgap", "--samples", "0"), "--samples"),
        (("pgap", "--hardened", "demo"), "papers that have rows of such a network: int"),
        (("pgap", "--target", "demo"), "papers that have rows of transfer: isi, wifgsm"),
        (("isi", "--vgg-weights", "vgg.pth"), "papers that fit detectors: detector"),
        (("detector", "--samples", "20"), "give --samples at least 34"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    refused = ran(*words)

    assert refused.exit_code == 2
    assert message in refused.stderr
