"""Runs whose attacks take shortcuts: verdicts without, differences counted, refusals in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from toys import draw_uniform

from robusteval import from_arrays
from robusteval.cli import cli
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.perturbing import perturb
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.shortcut_checks import (
    BY_SHORTCUTS,
    LOST,
    WON,
    choose_autocast_type,
    compare_verdicts,
    try_shortcuts,
)
from robusteval.models.classifier import Classifier
from robusteval.models.networks import digits_cnn
from robusteval.models.shortcuts import Shortcuts
from robusteval.reports.build import build_record
from robusteval.reports.sentences import list_provenance

AMP = Shortcuts(torch.bfloat16, compiles=False)


class Fickle(nn.Module):
    """Says class 1 of bright images, and of those that are less so where it is differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, 2)``."""
        bright = x.flatten(1).mean(1)
        limit = 0.2 if torch.is_autocast_enabled("cpu") else 0.5
        return torch.stack([limit - bright, bright - limit], 1)


def test_images_that_fool_by_shortcuts_alone_are_told_from_others() -> None:
    model = Classifier(Fickle(), num_classes=2).eval()
    x = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 1, 2, 2)

    leave, reach = (
        compare_verdicts(model, AMP, x, torch.full((3,), goal), targeted=targeted)
        for goal, targeted in ((0, False), (0, True))
    )

    assert leave.tolist() == [0, LOST, 0]
    assert reach.tolist() == [0, WON, 0]


class Placed(nn.Module):
    """Adds to each image's logits something that depends on its place."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, 2)``."""
        bright = x.flatten(1).mean(1) + 1e-3 * torch.arange(len(x))
        return torch.stack([-bright, bright], 1)


def test_bits_that_depend_on_the_place_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    x = torch.rand(3, 1, 2, 2)

    _, told = try_shortcuts(["compile"], [Classifier(Placed(), num_classes=2).eval()], x)

    assert [finding.code for finding in told] == ["compiled"]
    assert "--batch-size" in told[0].message
    assert not told[0].grave


def test_what_is_not_to_be_had_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore\n")

    monkeypatch.setattr(torch, "compile", break_off)
    model = Classifier(digits_cnn(), num_classes=10).eval()
    x = torch.rand(2, 1, 32, 32)
    for names, words in (
        (["compile"], r"could not be compiled \(RuntimeError: InvalidCxxCompiler: No working"),
        (["fast"], "shortcuts are amp and compile, not 'fast'"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            try_shortcuts(names, [model], x)
        assert "\n" not in str(caught.value)

    half = Classifier(digits_cnn().bfloat16(), num_classes=10).eval()
    with pytest.raises(UsageError, match="leave --amp or --dtype out"):
        try_shortcuts(["amp"], [half], x)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda _: False)
    with pytest.raises(UsageError, match="no autocast on cpu: leave --amp out"):
        choose_autocast_type(torch.device("cpu"))


class Rounded(nn.Module):
    """Gives no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, 2)``."""
        bright = x.detach().flatten(1).mean(1)
        return torch.stack([-bright, bright], 1)


class Pair(nn.Module):
    """Returns no logits, but a pair of them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two times logits ``(n, 2)``."""
        return x.flatten(1)[:, :2], x.flatten(1)[:, :2]


def test_shortcuts_are_not_blamed_for_what_a_network_does_in_any_case() -> None:
    x = torch.rand(2, 1, 2, 2)
    cases: tuple[tuple[nn.Module, str], ...] = (
        (Rounded(), r"attacks cannot differentiate this network \(RuntimeError: element 0"),
        (Pair(), "^the model must return one tensor of logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2).double()), "in float64: leave --amp out"),
    )
    for network, words in cases:
        with pytest.raises(UsageError, match=words):
            try_shortcuts(["amp"], [Classifier(network, num_classes=2).eval()], x)
    with pytest.raises(UsageError, match=r"give a list such as \['amp'\]"):
        try_shortcuts("amp", [Classifier(Fickle(), num_classes=2).eval()], x)


def test_networks_that_take_no_shortcuts_are_not_said_to() -> None:
    """Where somebody looks on inside, passes are made as ever."""
    x = torch.rand(2, 1, 32, 32)
    plain, hooked = (Classifier(digits_cnn(), num_classes=10).eval() for _ in range(2))
    next(hooked.network.children()).register_forward_hook(lambda *_: None)

    with pytest.raises(UsageError, match=r"has hooks .*: leave --amp and --compile out"):
        try_shortcuts(["amp", "compile"], [hooked], x)
    ways, told = try_shortcuts(["amp"], [plain, hooked], x)

    assert ways is not None
    assert [finding.code for finding in told] == ["no-shortcuts"]
    assert "on 1 of the 2 networks" in told[0].message


def test_images_of_the_class_to_reach_are_counted_by_no_shortcut() -> None:
    """They are left alone: through the shortcuts the middle one is not of its class at all."""
    model = Classifier(Fickle(), num_classes=2).eval()
    x = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    labels = torch.tensor([0, 0, 1])
    attack = prepare_attack("pgd:eps=0.01,steps=1,targeted=true", model, (1, 2, 2))
    goal = torch.tensor([1, 0, 0])

    found = perturb(attack, model, x, labels, seeds=torch.arange(3), goal=goal, shortcuts=AMP)

    assert found.by_shortcuts is not None
    assert found.by_shortcuts.tolist() == [0, 0, 0]
    assert torch.equal(found.x_adv[1], x[1])
    assert found.passes.forwards[1] == 0


def test_numbers_depend_on_no_batch_and_say_what_was_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(digits_cnn(), num_classes=10).eval()
    x = torch.rand(12, 1, 32, 32)
    labels = model(x).argmax(1)
    data = from_arrays(x.numpy(), labels.tolist())
    attacks = ["pgd:eps=2/255,steps=4", "sigma_zero:steps=6"]

    small, large, plain = (
        evaluate(
            model,
            data,
            attacks,
            probes=False,
            batch_size=size,
            shortcuts=ways,
            out=tmp_path / f"{size}",
        )
        for size, ways in ((5, ("amp",)), (12, ("amp",)), (7, ()))
    )

    for a, b in zip(small.attacks, large.attacks, strict=True):
        assert a.columns.keys() == b.columns.keys()
        for name in a.columns.keys() - {"seconds"}:
            assert np.array_equal(a.columns[name], b.columns[name], equal_nan=True), name
        assert set(np.unique(a.columns[BY_SHORTCUTS])) <= {0, LOST, WON}
    differing = [int((each.columns[BY_SHORTCUTS] > 0).sum()) for each in small.attacks]
    notes = [f.message for f in small.findings if "shortcuts" in f.message]
    assert len(notes) == sum(count > 0 for count in differing)
    assert small.config["shortcuts"] == {"amp": "bfloat16"}
    said = dict(list_provenance(build_record(small)))["differentiated"]
    assert said == (
        "in bfloat16 (autocast), by attacks; verdicts are made without, and differ in"
        f" {sum(differing)} of {sum(int(each.attacked.sum()) for each in small.attacks)} results"
    )
    assert "shortcuts" not in plain.config
    assert BY_SHORTCUTS not in plain.attacks[0].columns
    # images as they are have nothing to do with it, and attacks are no others' cells
    keys = [list_keys_of(tmp_path / name) for name in ("5", "12", "7")]
    assert keys[0] == keys[1]
    assert [a == b for a, b in zip(keys[0], keys[2], strict=True)] == [True, False, False]


def list_keys_of(folder: Path) -> list[str]:
    """Keys of the cells of a run, in their order."""
    record = json.loads((folder / "run.json").read_text())
    return [cell["key"] for cell in record["cells"]]


def test_what_fools_by_shortcuts_alone_is_attacked_again_without() -> None:
    """Through these every image of class 0 is one of class 1 from the start, and left alone."""
    data = from_arrays(0.3 + 0.1 * draw_uniform(8, 1, 6, 6).numpy(), [0] * 8)
    model = Classifier(Fickle(), num_classes=2).eval()

    run, plain = (
        evaluate(model, data, ["pgd:eps=0.3,steps=5,stop=float"], probes=False, shortcuts=ways)
        for ways in (("amp",), ())
    )

    ours, theirs = (each.attacks[0] for each in (run, plain))
    attacked = ours.attacked
    assert attacked.any()
    assert ours.success()[attacked].all()
    assert (ours.columns[BY_SHORTCUTS][attacked] == LOST).all()
    (note,) = ours.notes
    assert f"{attacked.sum()} of 8 images fooled the network that hold without them" in note
    for name in ("pred_adv", "linf", "l2", "margin_adv"):
        assert np.array_equal(ours.columns[name], theirs.columns[name])
    assert (ours.columns["forwards"] > theirs.columns["forwards"])[attacked].all()


def test_the_command_takes_shortcuts_and_refuses_them_with_half_precision(tmp_path: Path) -> None:
    words = ["evaluate", "demo", "--samples", "5", "--attack", "fgsm", "--no-probes", "--amp"]
    runner = CliRunner()
    run = runner.invoke(cli, [*words, "--out", str(tmp_path / "run")])
    refused = runner.invoke(cli, [*words, "--dtype", "bfloat16", "--out", str(tmp_path / "other")])

    assert run.exit_code == 0, run.output
    assert "in bfloat16 (autocast), by attacks" in run.stdout
    assert refused.exit_code == 2
    assert "leave --amp or --dtype out" in refused.stderr
