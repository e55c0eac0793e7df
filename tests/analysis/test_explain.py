"""The analysis of an attack, from a classifier to figures, pictures and the command."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from toys import synthetic

from robusteval.analysis import case
from robusteval.analysis.explain import Explanation, explain
from robusteval.analysis.summaries import ANYWHERE, OF_SHARES, average_images
from robusteval.cli import cli
from robusteval.datasets.concepts import Generated
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.classifier import Classifier
from robusteval.progress import Silent
from robusteval.reports.explanation import (
    print_explanation,
    render_explanation_json,
    write_explanation_verdict,
    write_mean_share,
)
from robusteval.reports.explanation_picture import WIDEST, fold_title, render_explained_image
from robusteval.runs.explanation_record import ExplanationRecord, ImageCount

FEW = Generated((3, 12, 12), count=12)


@pytest.fixture(scope="module")
def data(npz: Path) -> Data:
    return open_data(str(npz))


@pytest.fixture
def found(bands: Classifier, data: Data) -> Explanation:
    return explain(bands, data, "pgd:eps=24/255,steps=10", samples=5, concepts=FEW)


def shown(record: ExplanationRecord, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    with console.capture() as page:
        print_explanation(record, console)
    return page.get()


def test_the_figures_fit_together(found: Explanation) -> None:
    record = found.record

    samples = record.samples
    assert (samples.asked, samples.attacked, samples.fooled) == (5, 5, 5)
    assert len(found.panels) == len(record.images) == 5
    types = record.regions.types
    active = sum(types[name].value for name in ("suppression", "balanced", "promotion"))
    assert active == pytest.approx(1)
    for image in record.images:
        assert sum(image.types.values()) == record.regions.count == 36
        assert image.predicted != image.label
        assert len(image.suppression) == 36


def test_maps_that_the_network_cannot_have_are_left_out_with_a_remark(found: Explanation) -> None:
    """It has no pooling before its linear layer, hence no CAM."""
    assert {row.map for row in found.record.focus} == {"gradcam", "gradcam_plus_plus"}
    (remark,) = found.record.remarks
    assert remark.startswith("No cam maps: ")


def test_every_way_of_refining_still_fools_with_fewer_values(found: Explanation) -> None:
    """At no more forward passes than the others."""
    before, *ways = found.record.refinement

    assert before.way == "as attacked"
    assert {"by region score", "by size of change", "pruned without a map"} <= {
        way.way for way in ways
    }
    for way in ways:
        assert way.still_fooled == ImageCount(5, 5)
        assert way.l0 <= before.l0
        assert way.forwards <= 11


def test_the_result_is_the_same_every_time(bands: Classifier, data: Data) -> None:
    """But for the time it took."""
    records = []
    for _ in range(2):
        record = explain(bands, data, "noise:eps=.4", samples=4, concepts=FEW).record
        record = replace(
            record,
            provenance=replace(record.provenance, seconds=0.0, created=""),
            refinement=tuple(replace(way, seconds=0.0) for way in record.refinement),
        )
        records.append(render_explanation_json(record))

    assert records[0] == records[1]


def test_a_call_after_a_stop_goes_on_from_there_and_finds_the_same(
    bands: Classifier, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the attack nor the scores of regions are computed again."""
    stops = [True]

    class Stopping(Silent):
        def begin(self, what: str, total: int) -> None:
            if what == "Drawing maps" and stops:
                raise KeyboardInterrupt

    def explain_some(cache: WorkCache | None) -> ExplanationRecord:
        attack = "pgd:eps=24/255,steps=10"
        options: dict[str, Any] = {"samples": 5, "concepts": FEW, "progress": Stopping()}
        return explain(bands, data, attack, cache=cache, **options).record

    cache = WorkCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        explain_some(cache)
    stops.clear()
    whole = explain_some(None)
    kept = sorted(tmp_path.rglob("*.npz"))
    monkeypatch.setattr(case, "perturb", None)

    rest = explain_some(cache)

    assert rest.images == whole.images
    assert repr(rest.regions) == repr(whole.regions)
    assert sorted(tmp_path.rglob("*.npz")) == kept
    assert len(kept) == 2
    cache.clear()
    assert not list(tmp_path.rglob("*.npz"))


def test_an_attack_that_fools_nothing_leaves_nothing_to_explain(
    bands: Classifier, data: Data
) -> None:
    record = explain(bands, data, "pgd:eps=0", samples=3, concepts=FEW).record

    assert record.samples.fooled == 0
    assert record.units is None
    assert write_explanation_verdict(record).endswith("There is nothing to explain.")
    assert (
        json.loads(render_explanation_json(record))["regions"]["types"]["promotion"]["value"]
        is None
    )
    assert "nothing to explain" in shown(record)


def test_sparse_noise_is_told_apart(bands: Classifier, data: Data) -> None:
    """Into what obscures and what leads; of dense noise every place would be either."""
    found = explain(bands, data, "sigma_zero:steps=100", samples=4, concepts=FEW)

    noise = found.record.noise
    assert noise is not None
    shares = {name: place.share.value for name, place in noise.places.items()}
    both = shares["both"]
    assert shares["obscuring"] + shares["leading"] - both + shares["neither"] == pytest.approx(1)
    assert 0 <= noise.roles.obscuring.value + noise.roles.leading.value <= 1
    assert "mostly obscure" in shown(found.record)
    assert explain(bands, data, "noise:eps=.4", samples=4, concepts=FEW).record.noise is None


def test_targeted_attacks_are_explained_by_their_target(bands: Classifier, data: Data) -> None:
    found = explain(bands, data, "pgd:eps=.4,targeted=true", samples=4, concepts=FEW)

    assert found.record.samples.fooled == 4
    assert found.record.refinement[1].still_fooled == ImageCount(4, 4)


def test_a_network_without_feature_maps_is_explained_by_region(data: Data) -> None:
    """No maps, no units; remarks say so."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 12 * 12, 3)
            with torch.no_grad():
                rows = torch.arange(12).view(1, 1, 1, 12) // 4
                self.linear.weight.copy_(
                    torch.cat(
                        [(rows == k).float().expand(1, 3, 12, 12).flatten(1) for k in range(3)]
                    )
                )
                self.linear.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x.flatten(1))
            return logits

    flat = Classifier(Flat(), num_classes=3).eval()

    record = explain(flat, data, "pgd:eps=.3", samples=3, concepts=FEW).record

    assert record.samples.fooled == 3
    assert (record.focus, record.units) == ((), None)
    assert [remark[:8] for remark in record.remarks] == [
        "No cam m",
        "No gradc",
        "No gradc",
        "No units",
    ]
    # regions of a linear model do not interact
    assert record.regions.residual.promotion < 1e-4
    assert "no maps to be guided by" in shown(record)


def test_mistakes_are_named(bands: Classifier, data: Data, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"side": 13}, "side must be from 1 to 12"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"layer": "conv9"}, "did you mean"),
    ]
    for options, words in mistakes:
        with pytest.raises(UsageError, match=words):
            explain(bands, data, "pgd", concepts=FEW, **options)
    x, y = synthetic(5, seed=1)
    np.savez(tmp_path / "wrong.npz", x=x, y=(y + 1) % 3)
    with pytest.raises(NothingEvaluated, match="nothing to explain"):
        explain(bands, open_data(str(tmp_path / "wrong.npz")), "pgd", concepts=FEW)
    np.savez(tmp_path / "high.npz", x=x, y=y + 5)
    with pytest.raises(UsageError, match="belong together"):
        explain(bands, open_data(str(tmp_path / "high.npz")), "pgd", concepts=FEW)


def test_intervals_of_means_are_over_images() -> None:
    found = average_images(np.array([0.0, 1.0, np.nan, 1.0, 0.0] * 40), OF_SHARES)

    assert (found.value, found.n) == (0.5, 160)
    assert found.high - found.low == pytest.approx(4 * math.sqrt(0.25 / 160), rel=0.15)
    assert average_images(np.array([np.nan]), OF_SHARES).n == 0


def test_intervals_of_few_images_are_as_wide_as_few_images_make_them() -> None:
    """Student's t by hand; means of images drawn again lie closer than the truth may."""
    found = average_images(np.array([0.2, 0.3, 0.7]), ANYWHERE)

    half = 4.3027 * np.std([0.2, 0.3, 0.7], ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-4)
    assert average_images(np.array([0.2, 0.3, 0.7]), OF_SHARES).low == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.3], "30 % (one image)"), ([0.0, 0.0], "0 % (all 2 alike)"), ([np.nan], "–")],
)
def test_a_mean_without_an_interval_says_why(values: list[float], said: str) -> None:
    assert write_mean_share(average_images(np.array(values), OF_SHARES)) == said


def test_images_of_the_class_to_reach_are_not_fooled(bands: Classifier, data: Data) -> None:
    """The attack leaves them alone; it has reached nothing there."""
    every = explain(bands, data, "pgd:target=1,eps=.4,steps=10", samples=9, concepts=FEW).record

    there = [image for image in every.images if image.label == 1]
    assert there
    assert not any(image.fooled for image in there)
    assert every.samples.attacked == 9 - len(there)
    assert every.samples.fooled == sum(image.fooled for image in every.images) > 0
    assert f"{len(there)} images are of the class" in " ".join(every.remarks)


def test_nothing_but_the_class_to_reach_is_said(bands: Classifier, tmp_path: Path) -> None:
    x, y = synthetic(30, seed=1)
    np.savez(tmp_path / "one.npz", x=x[y == 1], y=y[y == 1])
    record = explain(
        bands, open_data(str(tmp_path / "one.npz")), "pgd:target=1", samples=3, concepts=FEW
    ).record

    assert "0 of 0 images" in shown(record)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_summary_fits_and_holds_the_figures(found: Explanation, width: int) -> None:
    page = shown(found.record, width)

    assert all(len(line) <= width for line in page.splitlines())
    assert page.startswith("pgd:eps=24/255,steps=10 fooled")
    for word in ("suppression", "Pearson", "Focused", "pruned", "unit "):
        assert word in page


def test_json_is_ascii_and_finite(found: Explanation) -> None:
    text = render_explanation_json(found.record)

    assert text.isascii()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["schema"] == 1


def test_pictures_show_everything_and_survive_strange_names(found: Explanation) -> None:
    """Dollar signs are no formulas; the same picture, the same bytes."""
    record = found.record
    image = replace(record.images[0], label_name="$x^2", predicted_name="\x1b[31m漢字" * 9)

    first, second = (
        render_explained_image(found.panels[0], record.attack, image) for _ in range(2)
    )

    assert first == second
    picture = Image.open(io.BytesIO(first))
    assert picture.size[0] > 900
    without = found.panels[0]._replace(maps={}, portrait={})
    lower = Image.open(io.BytesIO(render_explained_image(without, record.attack, image)))
    assert lower.size[1] < picture.size[1]


def ran(*words: str) -> Result:
    result = CliRunner().invoke(cli, ["explain", *words])
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result


def test_the_command_writes_what_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with JSON and pictures, never over an old one unless forced."""
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--samples", "2", "--attack", "pgd:eps=24/255,steps=5", "--side", "8"]
    monkeypatch.setattr("sys.argv", ["robusteval", "explain", *words])

    result = ran(*words, "--out", "folder")

    assert result.exit_code == 0
    record = json.loads(Path("folder/explanation.json").read_text())
    assert record["provenance"]["command"] == " ".join(["robusteval explain", *words])
    assert len(list(Path("folder").glob("image-*.png"))) == 2
    assert "2 pictures" in result.stdout
    assert ran(*words, "--out", "folder").exit_code == 2
    again = ran(*words, "--out", "folder", "--force", "--format", "json")
    assert json.loads(again.stdout)["samples"]["attacked"] == 2
    assert ran("net.pt").exit_code == 2
    assert ran("demo", "--attack", "pdg").exit_code == 2
    assert ran("demo", "--concepts", ".", "--samples", "1").exit_code == 2


@pytest.mark.parametrize("word", ["integrated_gradients", "x" * 70, "of a few short words each"])
def test_titles_of_neighbours_stay_apart(word: str) -> None:
    """No line is wider than the picture below it, and nothing is lost."""
    title = f"adversarial: {word} of counter-productive"
    lines = fold_title(title).split("\n")

    assert max(map(len, lines)) <= WIDEST
    assert "".join(lines).replace(" ", "") == title.replace(" ", "")
