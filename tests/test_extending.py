"""Each kind of extension is one file of another package, and works everywhere once it is installed.

The files are as short as CONTRIBUTING.md promises. Nothing is replaced: the package lies in a
folder on the path, with the entry points that an installer would write.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from robusteval import Classifier, evaluate, from_arrays, load_run, open_data
from robusteval.cli import cli
from robusteval.errors import UsageError
from robusteval.evaluation.defense import prepare_defense
from robusteval.registry import ATTACKS, DATA_SOURCES, DEFENSES, INTERPRETERS, REPORT_FORMATS

REGISTRIES = (ATTACKS, INTERPRETERS, DEFENSES, REPORT_FORMATS, DATA_SOURCES)
MODULES = {
    "attacks": '''
import torch
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.losses import attacker_loss

@ATTACKS.add("momentum", norms=("linf",), knowledge="white-box")
def momentum(model, x, y, *, targeted: bool = False, seeds=None, mask=None,
             eps: float = 30 / 255, steps: int = 5):
    """Signs of a summed gradient."""
    ball = Ball.around(x, "linf", eps, mask)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if len(x) == 0:
        return x
    x_adv, total = x, torch.zeros_like(x)
    for _ in range(steps):
        z = x_adv.detach().requires_grad_()
        loss = attacker_loss(model(z), y, targeted=targeted, loss="ce")
        total = total + torch.autograd.grad(loss.sum(), z)[0]
        x_adv = ball.project(x_adv - eps / steps * total.sign())
    return x_adv
''',
    "interpreters": '''
import torch
from robusteval.registry import INTERPRETERS

@INTERPRETERS.add("covering", cost="a forward per square")
def covering(model, x, y, *, seeds=None, side: int = 4):
    """Fall of the logit when a square is covered."""
    if side < 1:
        raise ValueError(f"side must be at least 1, not {side}")
    score = lambda images: model(images).gather(1, y[:, None])
    maps = x.new_zeros(len(x), 1, x.shape[2] // side, x.shape[3] // side)
    with torch.no_grad():
        for i in range(maps.shape[2]):
            for j in range(maps.shape[3]):
                covered = x.clone()
                covered[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side] = 0.5
                maps[:, :, i, j] = score(x) - score(covered)
    return maps
''',
    "defenses": '''
from torch import nn
from robusteval.registry import DEFENSES

class Squeezed(nn.Module):
    def __init__(self, model, levels):
        super().__init__()
        self.network, self.levels = model.network, levels
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)

    def forward(self, x):
        image = ((x * self.std + self.mean) * self.levels).round() / self.levels
        return self.network((image - self.mean) / self.std)

@DEFENSES.add("squeezing")
def squeeze(model, *, bits: int = 5):
    """Fewer levels of brightness."""
    if bits < 1:
        raise ValueError(f"bits must be at least 1, not {bits}")
    return model.derive(Squeezed(model, 2**bits - 1), squeezed_to=bits)
''',
    "report_formats": '''
from robusteval.registry import REPORT_FORMATS

@REPORT_FORMATS.add("lines", suffix=".lines")
def render_lines(records):
    """An attack in each line."""
    rows = [row for record in records for row in record.attacks]
    return "".join(f"{row.spec} {row.robust_accuracy.float.k}\\n" for row in rows)
''',
    "data_sources": '''
import numpy as np
from robusteval.datasets.arrays import from_arrays
from robusteval.registry import DATA_SOURCES

@DATA_SOURCES.add("raw", suffix=".raw")
def open_raw(path):
    """bytes of 4x4 grey images, the label before each."""
    values = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 17)
    return from_arrays(values[:, 1:].reshape(-1, 4, 4), values[:, 0], name=path.name)
''',
}
KINDS = dict(zip(MODULES, REGISTRIES, strict=True))
NAMES = dict(zip(MODULES, ("momentum", "covering", "squeezing", "lines", "raw"), strict=True))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed package that brings one extension of each kind."""
    folder = tmp_path / "site"
    information = folder / "extending-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: extending\nVersion: 1.0\n")
    points = []
    for kind, source in MODULES.items():
        (folder / f"extending_{kind}.py").write_text(source)
        points.append(f"[robusteval.{kind}]\nmine = extending_{kind}\n")
    (information / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(folder)
    for registry in REGISTRIES:
        registry.__dict__.pop("entries", None)  # which are read once
    yield folder
    for registry in REGISTRIES:
        registry.__dict__.pop("entries", None)
    for kind, registry in KINDS.items():
        registry._functions.pop(NAMES[kind], None)
        sys.modules.pop(f"extending_{kind}", None)


def say(*words: str) -> str:
    """What the command line prints."""
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("installed")
def test_an_attack_of_one_file_is_run_and_judged(bands: Classifier, npz: Path) -> None:
    run = evaluate(bands, open_data(str(npz)), ["momentum"], samples=12, probes=False)

    assert run.outcomes[0].columns["fault"].sum() == 0
    assert run.outcomes[0].success().sum() > 6
    assert "momentum" in say("list", "attacks")
    with pytest.raises(UsageError, match=r"^momentum: steps must be at least 1, not 0$"):
        evaluate(bands, open_data(str(npz)), ["momentum:steps=0"])


@pytest.mark.usefixtures("installed")
def test_an_interpreter_of_one_file_is_compared(bands: Classifier, npz: Path) -> None:
    data = open_data(str(npz))

    run = evaluate(
        bands, data, ["fgsm:eps=30/255"], samples=6, interpreters=["covering"], probes=False
    )

    assert np.nanmax(run.outcomes[0].columns["map_distance:covering"]) > 0
    assert "per map a forward per square" in say("list", "interpreters")
    with pytest.raises(UsageError, match=r"^covering: side must be at least 1, not 0$"):
        evaluate(bands, data, ["fgsm"], interpreters=["covering:side=0"])


@pytest.mark.usefixtures("installed")
def test_a_defense_of_one_file_has_an_identity_of_its_own(bands: Classifier, npz: Path) -> None:
    four, five = (prepare_defense(f"squeezing:bits={bits}", bands) for bits in (4, 5))

    run = evaluate(bands, open_data(str(npz)), ["noise"], samples=6, defenses=["squeezing:bits=1"])

    assert len({str(each) for each in (bands.identity, four.identity, five.identity)}) == 3
    assert four.model.identity.get("sha256") is None
    assert [str(each.spec) for each in run.defenses] == ["squeezing:bits=1"]
    assert "squeezing" in say("list", "defenses")
    with pytest.raises(UsageError, match=r"^squeezing: bits must be at least 1, not 0$"):
        prepare_defense("squeezing:bits=0", bands)


@pytest.mark.usefixtures("installed")
def test_a_report_format_of_one_file_is_written(
    bands: Classifier, npz: Path, tmp_path: Path
) -> None:
    evaluate(bands, open_data(str(npz)), ["noise"], samples=6, probes=False, out=tmp_path / "run")

    load_run(tmp_path / "run").report(tmp_path / "x.lines")
    say("report", str(tmp_path / "run"), "--out", str(tmp_path / "y.lines"))

    shown = say("report", str(tmp_path / "run"), "--format", "lines")
    assert re.fullmatch(r"noise\S* \d\n", shown)
    assert (tmp_path / "x.lines").read_text() == (tmp_path / "y.lines").read_text() == shown
    assert ".lines" in say("list", "formats")
    with pytest.raises(UsageError, match=r"end it in .*\.lines"):
        load_run(tmp_path / "run").report(tmp_path / "x.line")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (KeyError("row"), "the report format lines broke (KeyError: 'row', in test_extending.py"),
        (7, "the report format lines gave int, not text or bytes"),
    ],
)
def test_a_report_format_that_breaks_is_named(
    bands: Classifier,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: object,
    said: str,
) -> None:
    """It is code of another package, and no bug of ours."""

    def render(records: object) -> object:
        if isinstance(made, Exception):
            raise made
        return made

    evaluate(bands, open_data(str(npz)), ["noise"], samples=6, probes=False, out=tmp_path / "run")
    monkeypatch.setitem(REPORT_FORMATS._functions, "lines", render)
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "run"), "--format", "lines"])

    assert result.exit_code == 3
    assert f"Error: {said}" in result.stderr


@pytest.mark.usefixtures("installed")
def test_a_data_source_of_one_file_is_opened(tmp_path: Path) -> None:
    path, images = tmp_path / "my.raw", np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    path.write_bytes(b"\0" + images[0].tobytes() + b"\1" + images[1].tobytes())

    data = open_data(str(path))

    known = from_arrays(images, np.arange(2))
    assert data.labels.tolist() == [0, 1]
    assert np.array_equal(data.batch([0, 1]).x, known.batch([0, 1]).x)
    assert "FILE.raw" in say("list", "data")
    path.write_bytes(b"\0\1")
    with pytest.raises(UsageError, match=r"my\.raw cannot be read .*the data source raw broke$"):
        open_data(str(path))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("first", [True, False], ids=["at the top", "inside"])
def test_a_package_that_is_missing_is_named(installed: Path, kind: str, first: bool) -> None:
    path = installed / f"extending_{kind}.py"
    add, registry = "import absent_package.part\n", KINDS[kind]
    source = MODULES[kind]
    path.write_text(
        add + source
        if first
        else re.sub(r'(def \w+\([^"]*?\):\n    )(""".*"""\n)', rf"\1\2    {add}", source)
    )

    message = f"^{NAMES[kind]} needs the package absent_package, which is not installed: install it"
    with pytest.raises(UsageError, match=message):
        registry.load(NAMES[kind])(*([None] * (3 if kind in ("attacks", "interpreters") else 1)))
