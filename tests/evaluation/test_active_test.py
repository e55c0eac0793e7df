"""The active test: strong attacks find what is planted, weak and misled ones do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Bands, draw_uniform, synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.errors import UsageError
from robusteval.evaluation import active_test
from robusteval.evaluation.active_test import (
    PLANTED,
    Planter,
    check_active_tests,
    draw_border,
    draw_inner,
    look_for_planted,
)
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.read_outs import ReadOut, fit_read_out
from robusteval.models.classifier import Classifier
from robusteval.models.seeds import sample_seeds
from robusteval.models.steps import book_rows
from robusteval.reports.build import build_record
from robusteval.reports.sentences import write_probes
from robusteval.runs.folder import load_run
from robusteval.runs.types import Run, Threat

EPS = 32 / 255
AS_IT_IS = {"SMALL": 10, "SEARCH": 10, "STARTS": 3, "DRAWS": 25}  # but for fewer images
SEEDS = torch.arange(40)


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searches are as long as they are."""
    for name, value in AS_IT_IS.items():
        monkeypatch.setattr(active_test, name, value)


@pytest.fixture
def data() -> Data:
    return from_arrays(*synthetic(40, seed=2))


@pytest.fixture
def x(data: Data) -> Tensor:
    return data.batch(np.arange(40)).x


def share(model: Classifier, x: Tensor, attack: str) -> float:
    ready = prepare_attack(attack, model, (3, 12, 12))
    _, found, _, planted = look_for_planted(Planter(model, x[:2]), ready, x, SEEDS[: len(x)])
    assert planted.all()
    return float(found.float().mean())


def test_a_read_out_parts_the_border_point_from_all_others() -> None:
    """With more points than features as well, where no hyperplane is equally far from all."""
    for n, d in ((10, 40), (30, 8)):
        inner = draw_uniform(n, d, seed=1)
        border = torch.full((d,), 1.3)
        fit = fit_read_out(inner, border)
        assert fit is not None
        weight, bias = fit

        assert 0 < border @ weight + bias < 0.01
        assert (inner @ weight + bias).max() == pytest.approx(-1, abs=0.01)
    among = torch.cat([torch.eye(3), -torch.eye(3)])
    assert fit_read_out(among, torch.zeros(3)) is None


def test_features_that_only_the_border_wakes_are_not_weighed(x: Tensor) -> None:
    """They are at rest at the image and all inner points: no gradient leads to what they answer."""
    threat = Threat("linf", EPS, False)
    change = (draw_border(x[:1], SEEDS[:1], threat) - x[:1]).flatten()
    weight = torch.cat([draw_uniform(24, len(change), seed=4) - 0.5, 50 * change.expand(8, -1)])
    hidden = nn.Linear(len(change), 32)
    with torch.no_grad():
        hidden.weight.copy_(weight)
        hidden.bias.copy_(-(weight @ x[0].flatten()) + 5)
        hidden.bias[24:] -= 5 + 0.97 * 50 * (change @ change)
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, 3)).eval()
    planter = Planter(Classifier(network, num_classes=3).eval(), x[:2])
    with torch.no_grad():
        woken = planter.features(draw_border(x[:1], SEEDS[:1], threat))[0, 24:]
        asleep = planter.features(draw_inner(x[0], 0, threat, 60))[:, 24:]
    model, ready = planter.plant(x[:1], SEEDS[:1], threat)

    assert woken.min() > 0
    assert asleep.max() == 0
    assert ready.all()
    assert model.weight[0, :24].abs().min() > 0
    assert model.weight[0, 24:].abs().max() == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_lie_where_they_should(x: Tensor, norm: str) -> None:
    inside = x[:1] * 0 + 0.5
    threat = Threat(norm, 0.3, False)
    order = {"linf": torch.inf, "l2": 2}[norm]
    inner = (draw_inner(inside[0], 3, threat, 50) - 0.5).flatten(1).norm(order, dim=1)
    border = (draw_border(inside, SEEDS[:1], threat) - 0.5).flatten(1).norm(order, dim=1)

    assert inner.max() <= 0.95 * 0.3 + 1e-6
    torch.testing.assert_close(border, torch.tensor([0.3]))


def test_strong_attacks_find_it_and_weak_ones_do_not(bands: Classifier, x: Tensor) -> None:
    """One step, five steps and random search fall short on a sound network."""
    assert share(bands, x, f"fgsm:eps={EPS}") < 0.5
    assert share(bands, x, f"noise:eps={EPS},tries=100") < 0.1
    assert share(bands, x, f"pgd:eps={EPS},steps=5") < 0.85
    assert share(bands, x, f"pgd:eps={EPS},steps=40,restarts=3") >= 0.95


class Rounded(nn.Module):
    """A network behind a step of rounding, which has no gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network((x * 8).round() / 8)


def test_an_attack_that_a_mask_misleads_fails(trained_bands: Bands, x: Tensor) -> None:
    masked = Classifier(Rounded(trained_bands), mean=(0.5,), std=(0.25,), num_classes=3).eval()

    assert share(masked, x[:20], f"pgd:eps={EPS},steps=40") < 0.5


def test_what_is_planted_is_planted_once_for_all_attacks(
    bands: Classifier, data: Data, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other images under the same seeds it is planted anew."""
    fitted: list[Tensor] = []

    def fit(inner: Tensor, border: Tensor) -> tuple[Tensor, float] | None:
        fitted.append(border)
        return fit_read_out(inner, border)

    monkeypatch.setattr("robusteval.evaluation.active_test.fit_read_out", fit)
    planter, threat = Planter(bands, x[:2]), Threat("linf", EPS, False)
    first, _ = planter.plant(x[:2], SEEDS[:2], threat)
    assert planter.plant(x[:2], SEEDS[:2], threat)[0] is first
    assert planter.plant(x[2:4], SEEDS[:2], threat)[0] is not first
    assert planter.plant(x[:2], SEEDS[:2], threat._replace(eps=EPS / 2))[0] is not first

    fitted.clear()
    attacks = [f"pgd:eps={EPS},steps={steps}" for steps in (20, 30)]
    run = evaluate(bands, data, attacks, samples=12)

    tests = [outcome for outcome in run.outcomes if outcome.role == PLANTED]
    assert len(tests) == 3
    assert len(fitted) == int(tests[0].attacked.sum())


def test_each_image_has_its_own_read_out(bands: Classifier, x: Tensor) -> None:
    """Alone and in any batch; what is booked to other rows is answered by theirs."""
    planter, threat = Planter(bands, x[:2]), Threat("linf", EPS, False)
    together, _ = planter.plant(x[:5], SEEDS[:5], threat)
    alone, _ = planter.plant(x[3:4], SEEDS[3:4], threat)
    rows = torch.tensor([3, 1])

    torch.testing.assert_close(together.weight[3:4], alone.weight, rtol=1e-3, atol=1e-5)
    with book_rows(rows):
        some = together(x[rows])
    torch.testing.assert_close(some, together(x[:5])[rows])
    assert isinstance(together, ReadOut)


def test_networks_without_a_linear_layer_at_the_end_are_left_alone(x: Tensor, data: Data) -> None:
    """It is said what is missing; the run is as it would be without."""
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    with pytest.raises(UsageError, match="not those of a linear layer"):
        Planter(Classifier(network, num_classes=3).eval(), x[:2])
    small = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(UsageError, match="3 inputs, and 16 are needed"):
        Planter(Classifier(small, num_classes=3).eval(), x[:2])


def test_a_convolution_that_gives_the_logits_is_a_linear_layer(x: Tensor) -> None:
    """As of SqueezeNet: what goes into it, its mean over all places, is what is weighed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.Conv2d(24, 3, 1))
    pooled = nn.Sequential(network, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    planter = Planter(Classifier(pooled, num_classes=3).eval(), x[:2])
    read_out, ready = planter.plant(x[:4], SEEDS[:4], Threat("linf", EPS, False))
    with torch.no_grad():
        features = planter.features(x[:4])

        torch.testing.assert_close(features, network[:2](x[:4]).mean((2, 3)))
        assert ready.all()
        assert (read_out(x[:4]).argmax(1) == 0).all()


class Steps(nn.Module):
    """Features that no change inside a small ball moves."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 0.002).round()


@pytest.mark.parametrize("kind", ["narrow", "still"])
def test_where_nothing_could_be_planted_nothing_was_missed(
    data: Data, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of features in ten directions alone read-outs tell few border points from all others."""
    monkeypatch.setattr(active_test, "SEARCH", 2)
    monkeypatch.setattr(active_test, "DRAWS", 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = (
            [nn.Linear(432, 10), nn.Linear(10, 32)] if kind == "narrow" else [nn.Linear(432, 32)]
        )
        hidden = nn.ReLU() if kind == "narrow" else Steps()
        network = nn.Sequential(nn.Flatten(), *inner, hidden, nn.Linear(32, 3)).eval()
    model = Classifier(network, num_classes=3, identity={"sha256": kind}).eval()
    x, _, ids, _ = data.batch(np.arange(8))
    with torch.no_grad():
        right = from_arrays(x.numpy(), model(x).argmax(1).numpy())
    _, ready = Planter(model, x[:2]).plant(x, sample_seeds(0, ids), Threat("linf", 0.01, False))

    run = evaluate(model, right, ["pgd:eps=0.01,steps=2"])

    tests = [outcome for outcome in run.outcomes if outcome.role == PLANTED]
    codes = [finding.code for finding in run.findings]
    assert 0 < ready.sum() < 8 if kind == "narrow" else not ready.any()
    assert {len(outcome.attacked) for outcome in tests} == {int(ready.sum())}
    assert ("nothing-planted" in codes) == (kind == "still")
    assert any("finds planted" in line for line in write_probes(build_record(run))) == ready.any()


def planted(run: Run) -> list[str]:
    return [str(outcome.attack) for outcome in run.outcomes if outcome.role == PLANTED]


def test_it_runs_with_the_trust_checks_and_stands_in_the_report(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """Evaluations that are too weak for what they leave are named; one strong attack is enough."""
    weak, strong = f"pgd:eps={EPS},steps=5", f"pgd:eps={EPS},steps=40,restarts=3"

    run = evaluate(bands, data, [weak], out=tmp_path / "weak")
    both = evaluate(bands, data, [weak, strong])
    none = evaluate(bands, data, [weak], probes=False)

    assert not check_active_tests(run.outcomes)  # nothing is left that a better attack could find
    for outcome in (*run.outcomes, *both.outcomes):
        if outcome.role == "attack":
            outcome.columns["pred_8bit"][0] = outcome.columns["label"][0]  # now something is
    (named,) = check_active_tests(run.outcomes)
    assert named.code == "attack-too-weak"
    assert named.grave
    assert "25 random points" in named.message
    assert not check_active_tests(both.outcomes)
    assert len(planted(run)) == 2
    assert planted(none) == []
    lines = list(write_probes(build_record(load_run(tmp_path / "weak"))))
    assert any("finds planted adversarial examples on this network" in line for line in lines)
    again = evaluate(bands, data, [weak], out=tmp_path / "weak")
    assert [f.message for f in again.findings] == [f.message for f in run.findings]
