"""The main job: the same result however it is cut, and everything as it was afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Bands

from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.evaluation import batches, computation
from robusteval.evaluation.batches import run_in_halves
from robusteval.evaluation.evaluate import evaluate, execute
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import prepare_plan
from robusteval.models.classifier import Classifier
from robusteval.registry import ATTACKS
from robusteval.runs.folder import load_run
from robusteval.runs.types import Columns, Run

ATTACKS_ASKED = [
    "pgd:eps=12/255,steps=5,restarts=2",
    "noise:eps=12/255",
    "pgd:norm=l2,eps=1,steps=5",
]
FOREIGN = "art:SquareAttack:eps=12/255,max_iter=20"
SAMPLES = 24


@pytest.fixture
def data(npz: Path) -> Data:
    return open_data(str(npz))


def same(one: Run, other: Run, *, order: bool = True) -> None:
    """All columns equal but for the clock; if the order may differ, joined by id."""
    assert [o.attack for o in one.outcomes] == [o.attack for o in other.outcomes]
    for a, b in zip(
        (one.clean, *(o.columns for o in one.outcomes)),
        (other.clean, *(o.columns for o in other.outcomes)),
        strict=True,
    ):
        if not order:
            a, b = sorted_by_id(a), sorted_by_id(b)
        assert a.keys() == b.keys()
        for name in a.keys() - {
            "seconds",
            *(() if order else ("index", "steady", "slope_ce", "slope_margin")),
        }:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def sorted_by_id(columns: Columns) -> Columns:
    order = np.argsort(columns["id"])
    return {name: column[order] for name, column in columns.items()}


@pytest.fixture(scope="module")
def reference(trained_bands: Bands, npz: Path) -> Run:
    """One run in one go."""
    classifier = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    )
    attacks = [*ATTACKS_ASKED, FOREIGN]
    return evaluate(classifier.eval(), open_data(str(npz)), attacks, samples=SAMPLES)


def test_the_reference_is_no_trivial_case(reference: Run) -> None:
    """Some images break, some hold, or the tests below prove nothing."""
    for outcome in reference.attacks:
        if outcome.attack.name == "pgd":
            assert 3 < outcome.success().sum() < outcome.attacked.sum() - 3
    assert reference.status == "complete"


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(
    bands: Classifier, data: Data, reference: Run, batch_size: int
) -> None:
    """Bit for bit, foreign attacks included."""
    bands.identity = {"sha256": "bands"}

    run = evaluate(bands, data, [*ATTACKS_ASKED, FOREIGN], samples=SAMPLES, batch_size=batch_size)

    same(reference, run)


def test_batches_that_are_done_together_change_nothing(
    bands: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of attacks that leave few images, where they are quick."""
    bands.identity = {"sha256": "bands"}
    monkeypatch.setattr(computation, "choose_batch_size", lambda *_: 2)
    sizes: list[int] = []

    def count(work: Any, rows: Any, shrink: Any) -> Any:
        sizes.append(len(rows))
        return run_in_halves(work, rows, shrink)

    def run(quick: float) -> tuple[Run, int]:
        monkeypatch.setattr(batches, "QUICK", quick)
        monkeypatch.setattr(batches, "run_in_halves", count)
        sizes.clear()
        return evaluate(bands, data, ATTACKS_ASKED, samples=SAMPLES, probes=False), max(sizes)

    (apart, least), (together, most) = run(0.0), run(1e9)

    assert (least, most) == (4, 16)
    same(apart, together)


def test_the_order_of_the_images_changes_nothing(
    bands: Classifier, data: Data, npz: Path, tmp_path: Path
) -> None:
    """The same images in another order: the same columns for each."""
    bands.identity = {"sha256": "bands"}
    with np.load(npz) as arrays:
        order = np.random.default_rng(0).permutation(len(arrays["x"]))
        np.savez(tmp_path / "bands.npz", x=arrays["x"][order], y=arrays["y"][order])

    one, other = (
        evaluate(bands, images, [*ATTACKS_ASKED, FOREIGN], probes=False)
        for images in (data, open_data(str(tmp_path / "bands.npz")))
    )

    same(one, other, order=False)


def test_a_stored_run_is_the_run(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """What is read back equals what was returned."""
    run = evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES)

    stored = load_run(tmp_path / "run")

    same(run, stored)
    assert stored.findings == run.findings
    assert (stored.config, stored.model, stored.data) == (run.config, run.model, run.data)


def test_a_second_call_computes_nothing(
    bands: Classifier, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells are taken from the folder; --fresh computes them again."""
    run = evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES)
    judged: list[int] = []

    def counted(*args: Any) -> Columns:
        judged.append(1)
        return judge(*args)

    monkeypatch.setattr("robusteval.evaluation.columns.judge", counted)

    same(run, evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES))
    assert not judged

    same(
        run, evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES, fresh=True)
    )
    assert judged


@pytest.mark.parametrize("batches", [0, 3, 14])
def test_a_stopped_run_continues_to_the_same_result(
    bands: Classifier, data: Data, reference: Run, tmp_path: Path, batches: int
) -> None:
    """Stopped after so many batches, continued with another batch size."""
    bands.identity = {"sha256": "bands"}
    plan = prepare_plan(bands, data, [*ATTACKS_ASKED, FOREIGN], samples=SAMPLES)
    asked = iter(range(batches + 1))

    with pytest.raises(Interrupted):
        execute(plan, tmp_path / "run", batch_size=5, stopping=lambda: next(asked, None) is None)

    assert load_run(tmp_path / "run").status == "incomplete"
    same(reference, execute(plan, tmp_path / "run", batch_size=7))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from toys import trained
from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
import robusteval.art.to_art
import robusteval.evaluation.batches as module
module.SAVE_EVERY = 0.0

class Deadly:
    def __init__(self, batches): self.left = batches
    def begin(self, what, total): pass
    def advance(self, n):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
    def estimate(self, done, where): pass
    def end(self): pass
    def say(self, text): pass

classifier = Classifier(
    trained(), mean=(0.5,), std=(0.25,), num_classes=3, identity={{"sha256": "bands"}}
).eval()
data = open_data({npz!r})
for batches in {moments!r}:
    child = os.fork()
    if not child:
        evaluate(
            classifier, data, {attacks!r}, samples={samples}, batch_size=4,
            out=f"{out}{{batches}}", progress=Deadly(batches),
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_a_killed_run_continues_to_the_same_result(
    bands: Classifier, data: Data, reference: Run, npz: Path, tmp_path: Path
) -> None:
    """SIGKILL in the clean images, in an attack and in the trust checks."""
    bands.identity = {"sha256": "bands"}
    asked, moments = [*ATTACKS_ASKED, FOREIGN], (3, 20, 33)
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]),
        npz=str(npz),
        attacks=asked,
        samples=SAMPLES,
        moments=moments,
        out=tmp_path / "run",
    )
    subprocess.run([sys.executable, "-c", script], check=True)

    for finished in moments:
        out = tmp_path / f"run{finished}"
        same(reference, evaluate(bands, data, asked, samples=SAMPLES, out=out))


def test_another_model_or_data_set_cannot_reuse_a_run(
    bands: Classifier, data: Data, npz: Path, tmp_path: Path
) -> None:
    """The difference is named, and nothing is overwritten."""
    evaluate(bands, data, ["noise"], out=tmp_path / "run", probes=False)
    content = (tmp_path / "run" / "run.json").read_bytes()
    bands.identity = {"sha256": "another", "num_classes": 3}
    with pytest.raises(UsageError, match=r"model.sha256: \"bands\" there, \"another\" here"):
        evaluate(bands, data, ["noise"], out=tmp_path / "run", probes=False)

    bands.identity = {"sha256": "bands", "num_classes": 3}
    with np.load(npz) as arrays:
        x = arrays["x"].copy()
        x[0, 0, 0, 0] ^= 1
        np.savez(tmp_path / "bands.npz", x=x, y=arrays["y"])
    with pytest.raises(UsageError, match=r"data.sha256"):
        evaluate(
            bands,
            open_data(str(tmp_path / "bands.npz")),
            ["noise"],
            out=tmp_path / "run",
            probes=False,
        )

    assert (tmp_path / "run" / "run.json").read_bytes() == content


def test_a_damaged_cell_is_computed_again(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """A flipped bit on disk never reaches a report."""
    run = evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES)
    for path in (tmp_path / "run" / "samples").glob("*.npz"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(RunError, match="changed after the run"):
        load_run(tmp_path / "run")

    same(run, evaluate(bands, data, ATTACKS_ASKED, out=tmp_path / "run", samples=SAMPLES))


def test_a_user_module_comes_out_as_it_went_in(data: Data) -> None:
    """Mode, gradients wanted, gradients, parameters, hooks."""
    torch.manual_seed(0)
    network = nn.Sequential(Bands(), nn.Dropout(0.3))
    network.train()
    network[1].eval()
    weight = network.get_parameter("0.conv1.weight")
    weight.grad = torch.ones_like(weight)
    state = {name: value.clone() for name, value in network.state_dict().items()}

    evaluate(network, data, ["pgd:steps=2", "art:FastGradientMethod:eps=.1"], samples=20)

    assert [part.training for part in network.modules()] == [True, True, True, True, True, False]
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert [p.grad for name, p in network.named_parameters() if name != "0.conv1.weight"] == [
        None
    ] * 5
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_an_anonymous_model_is_known_by_weights_and_answers(
    trained_bands: Bands, data: Data, tmp_path: Path
) -> None:
    """The same weights with other code around them are another model."""

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = trained_bands.conv1, trained_bands.conv2
            self.linear = trained_bands.linear

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = trained_bands(x)
            return logits.flip(1)

    same_again = prepare_plan(trained_bands, data, [], samples=9).config["model"]

    assert prepare_plan(trained_bands, data, [], samples=9).config["model"] == same_again
    assert (
        prepare_plan(Flipped(), data, [], samples=9).config["model"]["sha256"]
        != same_again["sha256"]
    )


def test_no_more_images_are_held_than_a_batch(
    bands: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory grows by columns only, however many images there are."""
    asked: list[int] = []
    batch = Data.batch

    def counted(self: Data, index: Any) -> Any:
        asked.append(len(index))
        return batch(self, index)

    monkeypatch.setattr(Data, "batch", counted)

    evaluate(bands, data, ["pgd:steps=2", "noise"], batch_size=8)

    assert max(asked) <= 16


def test_images_that_are_wrong_already_are_not_attacked(data: Data) -> None:
    """They count as not robust, and cost nothing."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3) + 0 * x.sum()

    run = evaluate(Constant(), data, ["pgd:steps=2"], probes=False)

    (outcome,) = run.attacks
    wrong = run.clean["label"] != 1
    assert not outcome.attacked[wrong].any()
    assert outcome.columns["forwards"][wrong].sum() == 0
    assert (outcome.columns["l2"][wrong] == 0).all()
    assert not outcome.success()[wrong].any()


def test_passes_are_counted_per_image(bands: Classifier, data: Data) -> None:
    """A survivor costs every step, an image that falls at once two passes or three."""
    run = evaluate(bands, data, ["pgd:eps=12/255,steps=5"], probes=False)

    (outcome,) = run.attacks
    held = outcome.attacked & ~outcome.success()
    assert set(outcome.columns["backwards"][held]) == {5}
    assert set(outcome.columns["forwards"][held]) == {6}
    assert outcome.columns["backwards"][outcome.success()].max() <= 5
    assert outcome.columns["backwards"][~outcome.attacked].sum() == 0


@pytest.fixture
def _broken_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """`noise` passes every check and breaks on the first image."""
    load = ATTACKS.load

    def broken(model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
        if len(x):
            raise ZeroDivisionError("out of\nluck")
        return x

    def loaded(name: str) -> Callable[..., Any]:
        return broken if name == "noise" else load(name)

    monkeypatch.setattr(ATTACKS, "load", loaded)


@pytest.mark.usefixtures("_broken_noise")
def test_an_attack_that_breaks_leaves_the_others(bands: Classifier, data: Data) -> None:
    """Its failure is a sentence in the run, and the run is incomplete."""
    run = evaluate(bands, data, ["noise", "pgd:steps=2"])

    assert run.status == "incomplete"
    assert list(run.failures) == ["noise"]
    assert "ZeroDivisionError: out of luck" in run.failures["noise"]
    assert [str(o.attack) for o in run.attacks] == ["pgd:steps=2"]


@pytest.mark.usefixtures("_broken_noise")
def test_a_probe_that_breaks_is_a_remark(bands: Classifier, data: Data) -> None:
    """The attacks have their results; only the check is missing."""
    run = evaluate(bands, data, ["pgd:eps=8/255,steps=12"])

    assert run.status == "complete"
    (finding,) = run.findings
    assert (finding.code, finding.grave) == ("probe-failed", False)
    assert "ZeroDivisionError: out of luck" in finding.message


def test_memory_that_runs_out_halves_the_batch(
    bands: Classifier, data: Data, reference: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdicts stay, and the run says what happened."""
    bands.identity = {"sha256": "bands"}

    def tight(classifier: Classifier, x_adv: Tensor, *rest: Any) -> Columns:
        if len(x_adv) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judge(classifier, x_adv, *rest)

    monkeypatch.setattr("robusteval.evaluation.columns.judge", tight)

    run = evaluate(bands, data, ATTACKS_ASKED, samples=SAMPLES, probes=False)

    assert "memory ran out" in run.outcomes[0].notes[0]
    assert bands.block is None
    for mine, theirs in zip(run.outcomes, reference.outcomes, strict=False):
        np.testing.assert_array_equal(mine.success(), theirs.success())


def test_memory_that_is_never_enough_is_a_sentence(
    bands: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an endless loop."""

    def full(*_: Any) -> Columns:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("robusteval.evaluation.columns.judge", full)

    run = evaluate(bands, data, ["noise"], samples=5, probes=False)

    assert "even for one image" in run.failures["noise"]


def test_images_that_change_under_way_are_an_error(
    bands: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set that is written to while it is read."""
    batch = Data.batch

    def drifting(self: Data, index: Any) -> Any:
        found = batch(self, index)
        return found._replace(ids=found.ids + np.uint64(1)) if len(index) == 5 else found

    monkeypatch.setattr(Data, "batch", drifting)

    run = evaluate(bands, data, ["noise"], samples=9, batch_size=5, probes=False)

    assert "changed while" in run.failures["noise"]


def test_a_model_that_returns_something_else_is_refused(data: Data) -> None:
    """A feature map is no classification."""
    with pytest.raises(UsageError, match="one tensor of logits"):
        evaluate(nn.Conv2d(3, 3, 3), data, ["noise"])


def test_labels_beyond_the_network_are_refused(bands: Classifier, tmp_path: Path) -> None:
    """Before anything is run."""
    np.savez(tmp_path / "d.npz", x=np.full((4, 12, 12, 3), 200, np.uint8), y=np.array([0, 1, 2, 3]))

    with pytest.raises(UsageError, match=r"0 to 3.*0 to 2"):
        evaluate(bands, open_data(str(tmp_path / "d.npz")), ["noise"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples"),
        ({"batch_size": 0}, "batch-size"),
    ],
)
def test_settings_out_of_range_are_refused(
    bands: Classifier, data: Data, options: dict[str, Any], message: str
) -> None:
    """One sentence."""
    with pytest.raises(UsageError, match=message):
        evaluate(bands, data, ["noise"], **options)


def test_the_same_attack_twice_is_refused(bands: Classifier, data: Data) -> None:
    """Also where one spells out a default."""
    with pytest.raises(UsageError, match="twice"):
        evaluate(bands, data, ["noise", "noise:eps=8/255"])


def test_targeted_attacks_aim_at_another_class(bands: Classifier, data: Data) -> None:
    """Chosen per image from its seed; success is reaching it."""
    run = evaluate(bands, data, ["pgd:targeted=true,eps=.3,steps=20"], probes=False)

    (outcome,) = run.attacks
    c = outcome.columns
    assert outcome.threat.targeted
    assert (c["target"] != c["label"])[outcome.attacked].all()
    assert outcome.success().sum() > 0.8 * outcome.attacked.sum()
    np.testing.assert_array_equal(outcome.success(), (c["pred_adv"] == c["target"]) & c["attacked"])


def test_a_smaller_draw_is_part_of_a_larger_one(bands: Classifier, data: Data) -> None:
    """And its images have the same results there."""
    small, large = (
        evaluate(bands, data, ["pgd:eps=12/255,steps=5"], samples=n, probes=False) for n in (20, 40)
    )

    for name, column in small.attacks[0].columns.items():
        if name != "seconds":
            np.testing.assert_array_equal(column, large.attacks[0].columns[name][:20])


@pytest.fixture
def _benchmark_on() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("_benchmark_on")
def test_torch_switches_are_restored(bands: Classifier, data: Data) -> None:
    """A library must not leave global switches turned."""
    evaluate(bands, data, ["noise"], samples=3, probes=False)

    assert torch.backends.cudnn.benchmark


def test_a_network_that_cannot_take_the_images_is_a_sentence(data: Data) -> None:
    """With what torch said."""
    classifier = Classifier(nn.Conv2d(1, 3, 3), num_classes=3, identity={"sha256": "x"})

    with pytest.raises(UsageError, match=r"cannot take images \(3, 12, 12\)"):
        evaluate(classifier, data, ["noise"], probes=False)


def test_environment_holds_no_names_of_machine_or_user(reference: Run) -> None:
    """Reports are shared."""
    text = repr((reference.environment, reference.config, reference.model, reference.data))

    for name in (os.uname().nodename, str(Path.home())):
        assert name not in text
