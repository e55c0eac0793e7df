"""Files that hold more than one state dict: the user says which, or only one can be meant."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from robusteval.cli import cli
from robusteval.errors import UsageError
from robusteval.models.checkpoint import load
from robusteval.models.identity import hash_model
from robusteval.models.networks import digits_cnn
from robusteval.reports.build import build_record
from robusteval.reports.sentences import list_provenance
from robusteval.runs.folder import load_run

State = dict[str, Tensor]
ARCH = "robusteval:digits_cnn"


def draw_state(seed: int) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits_cnn().eval().state_dict()


A, B = draw_state(0), draw_state(1)


def write(folder: Path, content: Mapping[Any, Any]) -> Path:
    torch.save(content, folder / "net.pt")
    return folder / "net.pt"


def has(path: Path, state: State, **options: Any) -> bool:
    loaded = load(path, arch=ARCH, **options).network.state_dict()
    return all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


PAIRS = [
    ("state_dict", "state_dict_ema"),
    ("model", "model_ema"),
    ("last", "best"),
    ("student", "teacher"),
]


@pytest.mark.parametrize("keys", PAIRS)
def test_two_state_dicts_that_fit_are_refused_until_one_is_chosen(
    tmp_path: Path, keys: tuple[str, str]
) -> None:
    first, second = keys
    path = write(tmp_path, {"epoch": 3, first: A, second: B})

    with pytest.raises(UsageError, match="--weights") as refusal:
        load(path, arch=ARCH)
    assert all(key in str(refusal.value) for key in keys)
    assert has(path, A, weights=first)
    assert has(path, B, weights=second)


def test_wrapped_copies_and_prefixes_are_seen(tmp_path: Path) -> None:
    prefixed = {f"module.{name}": tensor for name, tensor in B.items()}
    path = write(tmp_path, {"models": {"last": A, "best": prefixed}})

    with pytest.raises(UsageError, match=r"models\.last or models\.best"):
        load(path, arch=ARCH)
    assert has(path, B, weights="models.best")


def test_tensors_beside_a_copy_of_them_are_two_state_dicts(tmp_path: Path) -> None:
    path = write(tmp_path, {**A, "ema": B})

    with pytest.raises(UsageError, match=r"ema or \."):
        load(path, arch=ARCH)
    assert has(path, A, weights=".")


def test_only_state_dict_that_fits_is_taken(tmp_path: Path) -> None:
    discriminator = {"a.weight": torch.zeros(2, 2)}
    path = write(tmp_path, {"model": discriminator, "generator": B, "seen": torch.tensor(7)})

    assert has(path, B)
    assert "weights" not in load(path, arch=ARCH).identity


def test_equal_copies_are_no_question(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": A, "best": {n: t.clone() for n, t in A.items()}})

    assert has(path, A)
    assert "weights" not in load(path, arch=ARCH).identity


def test_copies_of_other_classes_fit_too(tmp_path: Path) -> None:
    smaller = digits_cnn(num_classes=4).state_dict()
    path = write(tmp_path, {"model": A, "finetuned": smaller})

    with pytest.raises(UsageError, match="model or finetuned"):
        load(path, arch=ARCH)
    assert load(path, arch=ARCH, num_classes=4).num_classes == 4


def test_key_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": A, "ema": B})

    with pytest.raises(UsageError, match=r"no state dict best: --weights can be model or ema"):
        load(path, arch=ARCH, weights="best")


def test_prefixes_that_could_be_meant_are_listed_too(tmp_path: Path) -> None:
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in A.items()}

    with pytest.raises(UsageError, match="best: --weights can be student or teacher"):
        load(write(tmp_path, both), arch=ARCH, weights="best")
    with pytest.raises(UsageError, match="best: leave out --weights"):
        load(write(tmp_path, A), arch=ARCH, weights="best")


def test_optimizer_moments_are_no_copies(tmp_path: Path) -> None:
    steps = {
        "state": {0: {"exp_avg": A["0.weight"] if "0.weight" in A else next(iter(A.values()))}}
    }
    path = write(tmp_path, {"model": A, "optimizer": steps})

    assert has(path, A)


def test_many_layouts_are_not_all_tried(tmp_path: Path) -> None:
    parts = {f"part{n}": {"w": torch.zeros(n)} for n in range(30)}
    path = write(tmp_path, {**parts, "mine": A})

    with pytest.raises(UsageError, match=r"31 groups.*18 more|31 groups.*19 more"):
        load(path, arch=ARCH)
    assert has(path, A, weights="mine")


def test_copies_of_one_file_have_identities_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": A, "model_ema": B})
    one, other = (load(path, arch=ARCH, weights=key) for key in ("model", "model_ema"))

    assert one.identity["sha256"] != other.identity["sha256"]
    assert hash_model(one) != hash_model(other)
    assert [m.identity["weights"] for m in (one, other)] == ["model", "model_ema"]


def test_report_says_which_copy_was_used(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": A, "model_ema": B})
    common = ["evaluate", str(path), "--arch", ARCH, "--data", "digits", "--samples", "4"]
    options = [*common, "--attack", "noise:eps=8/255", "--no-probes", "--out", str(tmp_path / "r")]
    refused = CliRunner().invoke(cli, options)
    done = CliRunner().invoke(cli, [*options, "--weights", "model_ema"])

    assert (refused.exit_code, done.exit_code) == (2, 0), done.output
    assert "--weights model or model_ema" in " ".join(refused.stderr.split())
    record = build_record(load_run(tmp_path / "r"))
    assert "weights model_ema" in dict(list_provenance(record))["model"]
