"""Planted defects: each must be found, and a sound model must be left in peace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Bands

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.evaluation import sanity_checks
from robusteval.evaluation.company import find_company
from robusteval.evaluation.conventions import find_convention, is_better
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.votes import SURVIVAL
from robusteval.models.classifier import Classifier
from robusteval.reports.baseline import build_baseline
from robusteval.reports.build import build_record
from robusteval.reports.compare import compare
from robusteval.reports.gate import check
from robusteval.reports.gate_config import Rule, Settings
from robusteval.runs.metrics import robust_accuracy
from robusteval.runs.statistics import sign_test, wilson
from robusteval.runs.types import Outcome, Run, Spec, Threat

STRONG = "pgd:eps=8/255,steps=20"


@pytest.fixture
def data(npz: Path) -> Data:
    return open_data(str(npz))


def codes(run: Run) -> set[str]:
    return {finding.code for finding in run.findings}


class Wrapped(nn.Module):
    """A network whose logits, or images, are tampered with."""

    def __init__(
        self,
        network: nn.Module,
        *,
        logits: Callable[[Tensor], Tensor] = lambda z: z,
        images: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.network, self.logits, self.images = network, logits, images

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.network(self.images(x)))


def tampered(network: nn.Module, **how: Callable[[Tensor], Tensor]) -> Classifier:
    return Classifier(
        Wrapped(network, **how),
        mean=(0.5,),
        std=(0.25,),
        num_classes=3,
        identity={"sha256": "tampered"},
    ).eval()


def test_a_sound_model_has_no_findings(bands: Classifier, data: Data) -> None:
    """Noise, probes and a strong attack agree."""
    assert not evaluate(bands, data, [STRONG, "noise:eps=8/255"]).findings


def test_an_attack_in_l1_has_probes_in_l1(bands: Classifier, data: Data) -> None:
    """Noise of its size, no limit at all, and twice its radius, which a sound model bears out."""
    run = evaluate(bands, data, ["apgd:norm=l1,eps=2,steps=20"], samples=30)

    probes = {o.role: o.threat for o in run.outcomes if o.role != "attack"}
    assert {role: (threat.norm, threat.eps) for role, threat in probes.items()} == {
        "probe:noise": ("l1", 2.0),
        "probe:unlimited": ("l1", 1e6),
        "probe:double": ("l1", 4.0),
    }
    assert not run.findings


def test_logits_that_are_not_finite_bring_no_advice(trained_bands: Bands, data: Data) -> None:
    """Neither on how to feed the model nor on its labels: nothing is known of its answers."""

    def lose_a_class(z: Tensor) -> Tensor:
        return torch.cat([z, z.new_full((len(z), 1), torch.nan)], 1)

    def switch_off(z: Tensor) -> Tensor:
        return torch.cat([z[:, :2], z[:, 2:] - torch.inf], 1)

    for change in (lose_a_class, switch_off):
        run = evaluate(tampered(trained_bands, logits=change), data, ["noise"], samples=30)

        assert codes(run) & {"convention", "guessing", "labels-permuted"} == set()
        assert any("-1e4" in f.message for f in run.findings if f.code == "non-finite")


def test_outputs_that_differ_between_calls_are_found(trained_bands: Bands, data: Data) -> None:
    """A random defense, or dropout that is always on."""
    run = evaluate(
        tampered(trained_bands, logits=lambda z: z + torch.randn_like(z) * 0.1),
        data,
        ["noise"],
        samples=30,
        probes=False,  # what they do with such a network: test_unmasking.py
    )

    assert "non-deterministic" in codes(run)


class Crowd(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self, network: nn.Module, share: float) -> None:
        super().__init__()
        self.network, self.share = network, share

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x - self.share * x.mean((0, 2, 3), keepdim=True))
        return logits


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_answers_that_depend_on_the_company_are_found(
    trained_bands: Bands, data: Data, batch_size: int
) -> None:
    """Also where a batch fills a block or is one image, and it is not taken for chance."""
    model = Classifier(Crowd(trained_bands, 0.5), mean=(0.5,), std=(0.25,), num_classes=3).eval()
    run = evaluate(model, data, [STRONG], samples=30, batch_size=batch_size, probes=False)

    assert "company" in {finding.code for finding in run.findings if finding.grave}
    assert "non-deterministic" not in codes(run)


def test_batch_normalisation_without_running_statistics_is_found(
    trained_bands: Bands, data: Data
) -> None:
    """A range per batch."""
    network = nn.Sequential(
        nn.BatchNorm2d(3, affine=False, track_running_stats=False), trained_bands
    )
    found = find_company(Classifier(network, num_classes=3).eval(), data, np.arange(30))

    assert [finding.code for finding in found] == ["company"]


def test_chance_and_broken_logits_are_not_the_company(trained_bands: Bands, data: Data) -> None:
    """Noise has a finding of its own, and infinity equals infinity."""
    noisy = tampered(trained_bands, logits=lambda z: z + torch.randn_like(z))
    broken = tampered(trained_bands, logits=lambda z: z / torch.tensor([1.0, 0.0, 0.0]))

    for model in (noisy, broken):
        assert not find_company(model, data, np.arange(20))


def test_probabilities_are_found(trained_bands: Bands, data: Data) -> None:
    """A softmax at the end."""
    run = evaluate(
        tampered(trained_bands, logits=lambda z: z.softmax(1)), data, [STRONG], samples=30
    )

    assert "probabilities" in codes(run)


def test_masked_gradients_are_found(trained_bands: Bands, data: Data) -> None:
    """Images rounded to few levels: the gradient is zero everywhere, the model no more robust."""
    run = evaluate(
        tampered(trained_bands, images=lambda x: (x * 8).round() / 8),
        data,
        [STRONG, "art:SquareAttack:eps=40/255,max_iter=100"],
    )

    assert {"zero-gradient", "unlimited", "loss-not-rising"} <= codes(run)
    assert all(finding.grave for finding in run.findings if finding.code == "zero-gradient")


def test_black_box_attacks_that_beat_white_box_ones_are_found(
    trained_bands: Bands, data: Data
) -> None:
    """At the same radius, on the same masked model."""
    run = evaluate(
        tampered(trained_bands, images=lambda x: (x * 8).round() / 8),
        data,
        ["pgd:eps=40/255,steps=20,random_start=false", "art:SquareAttack:eps=40/255,max_iter=100"],
        probes=False,
    )

    assert "black-box-wins" in codes(run)


def test_a_constant_model_is_found(data: Data) -> None:
    """Unbreakable, and worthless."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3) + 0 * x.sum()

    assert {"guessing", "zero-gradient", "unlimited"} <= codes(evaluate(Constant(), data, [STRONG]))


def test_a_network_that_cuts_the_graph_is_found(trained_bands: Bands, data: Data) -> None:
    """No gradient at all: found, and the attack's failure is a sentence."""
    run = evaluate(tampered(trained_bands, images=Tensor.detach), data, [STRONG], samples=30)

    assert "zero-gradient" in codes(run)
    assert "gives no gradient" in run.failures[STRONG]
    assert "art:SquareAttack" in run.failures[STRONG]


def test_logits_that_are_not_finite_are_found(trained_bands: Bands, data: Data) -> None:
    """An all-NaN model must not look perfectly robust."""
    run = evaluate(
        tampered(trained_bands, logits=lambda z: z * torch.nan), data, [STRONG], samples=30
    )

    assert "non-finite" in codes(run)
    assert not run.attacks[0].attacked.any()


def test_logits_that_overflow_under_attack_count_as_broken(
    trained_bands: Bands, data: Data
) -> None:
    """NaN only where the attack leads."""

    def fragile(x: Tensor) -> Tensor:
        return torch.where(x.amax((1, 2, 3), keepdim=True) > 1.28, torch.nan, x)

    run = evaluate(tampered(trained_bands, images=fragile), data, ["pgd:eps=.3,steps=3"])

    (outcome,) = run.attacks
    lost = outcome.attacked & (outcome.columns["pred_adv"] == -1)
    assert lost.any()
    assert outcome.success()[lost].all()
    assert "non-finite-attacked" in codes(run)


def test_a_convention_that_mends_too_little_is_not_tried_further() -> None:
    """What it does to images that are right only takes from it: no verdict changes by that."""
    for n in (10, 64, 128):
        for wins in range(n + 1):
            named = [is_better(wins, losses, n) for losses in range(n - wins + 1)]
            assert named == sorted(named, reverse=True)
            base = (n - wins) / n
            told = [
                base + (wins - losses) / n - base >= 0.05 and sign_test(wins, losses) <= 0.001
                for losses in range(n - wins + 1)
            ]
            assert named == told


def test_of_conventions_only_those_that_could_be_better_see_all_images(
    bands: Classifier, data: Data
) -> None:
    """A network that is fed as it should be is asked about the images that it has wrong."""
    index = np.arange(40)
    pred = np.where(index < 5, -1, data.labels[index])
    seen: list[int] = []
    handle = bands.register_forward_hook(lambda _model, args, _logits: seen.append(len(args[0])))
    try:
        assert not find_convention(bands, data, index, pred, lambda _: None)
    finally:
        handle.remove()

    assert set(seen) == {5}  # of 40 ten must be mended


@pytest.mark.parametrize(
    ("trained_for", "words"),
    [
        (lambda x: x, "without the normalisation"),
        (lambda x: 2 * x - 1, "images in [-1, 1]"),
        (lambda x: 255 * x, "images in [0, 255]"),
    ],
)
def test_a_wrong_normalisation_is_named(
    trained_bands: Bands, data: Data, trained_for: Callable[[Tensor], Tensor], words: str
) -> None:
    """By measuring what would do better."""
    zero, one = trained_for(torch.tensor(0.0)), trained_for(torch.tensor(1.0))

    def back(z: Tensor) -> Tensor:  # from what it was trained for to what `Bands` takes
        return ((z - zero) / (one - zero) - 0.5) / 0.25

    classifier = Classifier(
        Wrapped(trained_bands, images=back),
        mean=(3.0,),
        std=(0.1,),
        num_classes=3,
        identity={"sha256": "x"},
    ).eval()

    run = evaluate(classifier, data, [], probes=False)

    (finding,) = [f for f in run.findings if f.code == "convention"]
    assert finding.grave
    assert words in finding.message


def test_reversed_channels_are_named(data: Data, tmp_path: Path) -> None:
    """A model of one channel's brightness, fed with BGR."""

    class Red(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x[:, 0].mean((1, 2)) - 0.5
            return torch.stack([-level, level], 1)

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 40)
    x = rng.integers(0, 255, (40, 8, 8, 3))
    x[..., 2] = np.where(y == 1, 200, 50)[:, None, None] + rng.integers(0, 9, (40, 8, 8))
    np.savez(tmp_path / "bgr.npz", x=x.astype(np.uint8), y=y)

    run = evaluate(Red(), open_data(str(tmp_path / "bgr.npz")), [], probes=False)

    (finding,) = [f for f in run.findings if f.code == "convention"]
    assert "channels reversed" in finding.message


def test_another_crop_is_named(tmp_path: Path) -> None:
    """A model of what stands at the rim, given images whose rim was cut off."""

    class Rim(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x[:, 0, :, 0].mean(1) - 0.5
            return torch.stack([-level, level], 1)

    y = np.random.default_rng(0).integers(0, 2, 40)
    x = np.full((40, 32, 32), 128, np.uint8)
    x[:, :, :2] = np.where(y == 1, 255, 0)[:, None, None]
    x[:, :, 2:4] = np.where(y == 1, 100, 160)[:, None, None]
    np.savez(tmp_path / "rim.npz", x=x, y=y)
    spec = str(tmp_path / "rim.npz")
    cropped = evaluate(Rim(), open_data(spec, size=16, resize=18), [], probes=False)
    whole = evaluate(Rim(), open_data(spec, size=16), [], probes=False)

    (finding,) = [f for f in cropped.findings if f.code == "convention"]
    assert "16 pixels before the crop" in finding.message
    assert not [f for f in whole.findings if f.code == "convention"]


def test_labels_that_start_at_one_are_named(bands: Classifier, npz: Path, tmp_path: Path) -> None:
    """Every label one too high."""
    with np.load(npz) as arrays:
        keep = arrays["y"] < 2
        np.savez(tmp_path / "d.npz", x=arrays["x"][keep], y=arrays["y"][keep] + 1)

    run = evaluate(bands, open_data(str(tmp_path / "d.npz")), [], probes=False)

    (finding,) = [f for f in run.findings if f.code == "convention"]
    assert "every label were 1 less" in finding.message


def test_permuted_labels_are_named(bands: Classifier, npz: Path, tmp_path: Path) -> None:
    """A one-to-one renumbering explains everything."""
    with np.load(npz) as arrays:
        np.savez(tmp_path / "d.npz", x=arrays["x"], y=np.array([1, 0, 2])[arrays["y"]])

    run = evaluate(bands, open_data(str(tmp_path / "d.npz")), [], probes=False)

    assert "labels-permuted" in codes(run)


def test_a_single_step_is_called_weak(bands: Classifier, data: Data) -> None:
    """So is noise alone."""
    assert "weak-attacks" in codes(evaluate(bands, data, ["fgsm", "noise"]))
    assert "weak-attacks" in codes(evaluate(bands, data, ["pgd:steps=3,eps=2/255"]))


@pytest.mark.parametrize("steps", [2, 5, 7, 9])
def test_what_is_said_of_few_steps_is_true(bands: Classifier, data: Data, steps: int) -> None:
    """PGD-7 is iterative and sees the model: its steps are named, and what is missing."""
    run = evaluate(bands, data, [f"pgd:eps=2/255,steps={steps}"], probes=False)

    (finding,) = (f for f in run.findings if f.code == "weak-attacks")
    assert finding.grave
    assert f"pgd:eps=2/255,steps={steps} ({steps} gradient steps)" in finding.message
    assert "for 10 steps in a row" in finding.message
    assert finding.message.endswith("add pgd:eps=2/255,steps=50.")


def test_ten_steps_are_enough_and_restarts_are_none(bands: Classifier, data: Data) -> None:
    """Three starts of five steps each are fifteen backward passes and five steps."""
    assert "weak-attacks" not in codes(evaluate(bands, data, ["pgd:eps=2/255,steps=10"]))
    assert "weak-attacks" in codes(evaluate(bands, data, ["pgd:eps=2/255,steps=5,restarts=3"]))


def test_a_radius_or_norm_without_a_strong_attack_is_named(bands: Classifier, data: Data) -> None:
    """A strong attack under another threat says nothing of this one."""
    run = evaluate(
        bands, data, ["pgd:eps=1/255,steps=20", "fgsm:norm=l2,eps=.01", "noise:eps=2/255"]
    )

    said = [f.message for f in run.findings if f.code == "weak-attacks"]
    assert len(said) == 2
    assert "at l2 eps 0.01: fgsm:norm=l2,eps=0.01 (1 gradient step)." in said[0]
    assert said[0].endswith("add pgd:norm=l2,eps=0.01,steps=50.")
    assert "at linf eps 2/255: noise:eps=2/255 (does not see the model)." in said[1]


def test_where_nothing_withstood_no_attack_is_weak() -> None:
    """There is nothing left that a stronger attack could take."""
    assert not found(outcome([True] * 9, spec="fgsm", steps=1))
    assert found(outcome([True] * 8 + [False], spec="fgsm", steps=1)) == {"weak-attacks"}


def test_a_radius_of_zero_is_remarked_upon(bands: Classifier, data: Data) -> None:
    """Robust accuracy is then clean accuracy, whatever the attack."""
    run = evaluate(bands, data, ["pgd:eps=0", "pgd:eps=2/255", "fgsm:norm=l2,eps=0"], probes=False)

    (first, second) = (f for f in run.findings if f.code == "zero-radius")
    assert (first.cell, second.cell) == ("pgd:eps=0", "fgsm:norm=l2,eps=0")
    assert not first.grave
    assert "may change nothing" in first.message


def repeat_images(npz: Path, rows: list[int], labels: list[int] | None = None) -> Data:
    with np.load(npz) as arrays:
        x, y = arrays["x"][rows], arrays["y"][rows]
    return from_arrays(x, y if labels is None else np.array(labels))


@pytest.mark.parametrize("rows", [[*range(6)] * 8, [*range(7)] * 2 + [0] * 9, [3] * 20])
def test_intervals_are_over_different_images(bands: Classifier, npz: Path, rows: list[int]) -> None:
    """An image that is there eight times is one draw: everything is as if it were there once."""
    some = sorted(set(rows))
    attacks = ["pgd:eps=2/255,steps=20", "noise:eps=2/255"]
    many, once = (
        evaluate(bands, repeat_images(npz, chosen), attacks, probes=False)
        for chosen in (rows, some)
    )

    (finding,) = (f for f in many.findings if f.code == "repeated-images")
    assert finding.message.startswith(f"{len(rows)} images, {len(some)} different ones")
    assert not finding.grave
    assert "repeated-images" not in codes(once)
    for one, other in zip(many.attacks, once.attacks, strict=True):
        assert robust_accuracy(one) == robust_accuracy(other)
        assert robust_accuracy(one).interval == wilson(robust_accuracy(one).k, len(some))
    here, there = build_record(many), build_record(once)
    assert here.clean_accuracy == there.clean_accuracy
    assert [w.robust_accuracy for w in here.worst_cases] == [
        w.robust_accuracy for w in there.worst_cases
    ]
    assert f"{len(some)} different images" in repr(many)
    rules = Settings(rules=(Rule(floor=0.3),))
    assert check(many, rules).gates[0] == check(once, rules).gates[0]
    assert len(build_baseline(many).ids) == len(some)
    (pair, *_) = compare(many, many).pairs
    assert pair.before.n == len(some)


def test_an_image_with_two_labels_is_named(bands: Classifier, npz: Path) -> None:
    """One of them at most is right."""
    data = repeat_images(npz, [0, 1, 1, 2, 2, 2], [0, 1, 2, 1, 1, 0])
    run = evaluate(bands, data, [], probes=False)

    (finding,) = (f for f in run.findings if f.code == "repeated-images")
    assert finding.message.startswith("6 images, 3 different ones")
    assert "2 of them have several labels" in finding.message


def outcome(
    broken: list[bool],
    *,
    spec: str = "pgd",
    role: str = "attack",
    knowledge: str = "white-box",
    eps: float = 0.1,
    steps: int = 20,
) -> Outcome:
    """An attack that breaks these images and no other."""
    n = len(broken)
    label = np.zeros(n, np.int64)
    hit = np.array(broken)
    return Outcome(
        attack=Spec(spec, {"eps": eps}),
        threat=Threat("linf", eps, False),
        knowledge=knowledge,
        columns={
            "id": np.arange(n),
            "label": label,
            "pred_clean": label,
            "attacked": np.ones(n, bool),
            "target": np.full(n, -1),
            "pred_adv": hit.astype(np.int64),
            "margin_clean": np.ones(n),
            "margin_adv": np.where(hit, -1.0, 0.5),
            "backwards": np.full(n, float(steps)),
            "fault": np.zeros(n, np.uint8),
        },
        role=role,
        resolved={"eps": eps},
    )


def found(*outcomes: Outcome) -> set[str]:
    return {finding.code for finding in sanity_checks.check_outcomes(outcomes)}


def test_noise_that_beats_an_attack_is_found() -> None:
    """Even on a single image of the probe."""
    attack = outcome([True] * 50 + [False] * 50)
    noise = outcome([False] * 63 + [True], spec="noise", role="probe:noise", knowledge="none")

    assert found(attack, noise) == {"noise-wins"}
    assert not found(attack, outcome([True] * 50 + [False] * 14, role="probe:noise"))


def test_noise_that_beats_an_attack_by_luck_is_no_finding() -> None:
    """Verdicts of a network that answers at random come from few answers."""
    attack = outcome([True] * 10 + [False] * 10)
    noise = outcome([False] * 19 + [True], role="probe:noise", knowledge="none")
    attack.columns["survival"] = np.where(attack.success(), 0.2, 0.55)
    noise.columns["survival"] = np.where(noise.success(), 0.45, 0.6)
    assert not found(attack, noise)

    attack.columns["survival"] = np.where(attack.success(), 0.2, 0.95)
    assert found(attack, noise) == {"noise-wins"}


def test_a_larger_budget_that_does_worse_is_found() -> None:
    """Beyond what chance could do."""
    attack = outcome([True] * 50 + [False] * 50)
    worse = outcome([True] * 40 + [False] * 24, role="probe:double", eps=0.2)
    better = outcome([True] * 60 + [False] * 4, role="probe:double", eps=0.2)

    assert found(attack, worse) == {"larger-budget"}
    assert not found(attack, better)


def test_images_that_come_no_nearer_to_an_error_are_found() -> None:
    """More than one in ten; ART's attacks need not return their best image."""
    for name, codes_expected in (("pgd", {"loss-not-rising"}), ("art:APGD", set())):
        attack = outcome([True] * 5 + [False] * 5, spec=name)
        attack.columns["margin_adv"][5:7] = 1.5

        assert found(attack) == codes_expected
        attack.columns[SURVIVAL] = np.ones(10)  # random answers, of which all can stay right
        assert found(attack) == set()


def test_an_unlimited_attack_that_fails_is_found() -> None:
    """It may change every pixel to anything."""
    attack = outcome([True] * 50 + [False] * 50)
    stuck = outcome([True] * 63 + [False], role="probe:unlimited", eps=1.0)

    assert found(attack, stuck) == {"unlimited"}


def test_probes_are_asked_for_strong_attacks_with_a_radius() -> None:
    """Once per threat."""
    strong, single = outcome([False] * 5), outcome([False] * 5, spec="fgsm", steps=1)
    black = outcome([False] * 5, spec="art:SquareAttack", knowledge="black-box")

    roles = [probe.role for probe in sanity_checks.list_probes([strong, strong, single, black])]

    assert roles == ["probe:noise", "probe:unlimited", "probe:double"]


def test_twice_the_budget_ends_with_success_where_answers_stand_still() -> None:
    """Whether it succeeds is all that is asked; of random answers one success is no verdict."""
    attack = outcome([True] * 50 + [False] * 50)
    attack.attack.parameters["stop"] = attack.resolved["stop"] = "never"
    steady, moving = (
        sanity_checks.list_probes([attack], moving=moving)[-1].spec for moving in (False, True)
    )

    assert steady == Spec("pgd", {"eps": 0.2, "stop": "8bit"})
    assert moving == Spec("pgd", {"eps": 0.2, "stop": "never"})
    for spec in (steady, moving):
        worse = outcome([True] * 40 + [False] * 24, role="probe:double", eps=0.2)
        assert found(attack, replace(worse, attack=spec)) == {"larger-budget"}


def test_repairs_are_reported() -> None:
    """An attack that left box or ball."""
    attack = outcome([True] * 4)
    attack.columns["fault"][:] = [1, 2, 3, 4]

    messages = [f.message for f in sanity_checks.check_outcomes([attack]) if f.code == "repaired"]

    assert [message.split()[0] for message in messages] == ["2", "2", "1"]


def test_saturated_cross_entropy_is_found() -> None:
    """Its gradient is flat where the margin's is not."""
    ce = np.array([0.0, 0.0, 1.0, 1.0, np.nan])
    margin = np.array([1.0, 1.0, 1.0, 1.0, np.nan])

    assert [f.code for f in sanity_checks.check_slopes(ce, margin)] == ["saturated"]
    assert [f.code for f in sanity_checks.check_slopes(ce, ce)] == ["zero-gradient"]
    assert not sanity_checks.check_slopes(margin, margin)


def test_an_attack_without_a_radius_stands_beside_one_with(
    make_outcome: Callable[..., Outcome],
) -> None:
    """The probe of twice the radius says nothing of it."""
    free = make_outcome([True] * 8, spec=Spec("sigma_zero", {}), threat=Threat("l0", None, False))
    ball = make_outcome(
        [True] * 8, spec=Spec("pgd", {"eps": 0.1}), threat=Threat("linf", 0.1, False)
    )
    probe = make_outcome(
        [True] * 8,
        spec=Spec("pgd", {"eps": 0.2}),
        threat=Threat("linf", 0.2, False),
        role="probe:double",
    )

    assert not [
        f for f in sanity_checks.check_outcomes([free, ball, probe]) if f.code == "larger-budget"
    ]


def test_attacks_that_also_keep_a_map_are_not_repeated(
    make_outcome: Callable[..., Outcome],
) -> None:
    """They cost many times as much and say less of the class."""
    dual = replace(
        make_outcome([True] * 8, spec=Spec("advedge", {"eps": 0.1})),
        resolved={"eps": 0.1, "interpreter": "cam"},
    )

    assert sanity_checks.list_probes([dual]) == []
