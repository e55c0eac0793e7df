"""Labels of class folders follow names where there are names, and are never shifted silently."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner
from PIL import Image
from torchvision.models import ResNet18_Weights

from robusteval.cli import cli
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.class_names import match_classes, read_class_names
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.models.admission import check_labels
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier
from robusteval.models.networks import digits_cnn
from robusteval.reports.build import build_record
from robusteval.reports.sentences import list_provenance
from robusteval.runs.folder import load_run

ARCH = "robusteval:digits_cnn"
NAMES = ["zebra", "ant", "fire truck", "cat", "dog", "egg", "fox", "gnu", "hen", "ibis"]


def draw_folders(root: Path, names: Sequence[str], n: int = 1) -> Path:
    """A folder of `n` grey images per class."""
    draws = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for position in range(n):
            pixels = draws.integers(0, 255, (32, 32), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{position}.png")
    return root


def build_classifier(k: int = 10, names: Sequence[str] | None = None) -> Classifier:
    classifier = Classifier(digits_cnn(num_classes=k), num_classes=k)
    classifier.class_names = None if names is None else tuple(names)
    return classifier


def label_by_folder(data: Data) -> dict[str, int]:
    source: Any = data.source
    return {f.parent.name: int(n) for f, n in zip(source.files, source.labels, strict=True)}


def check(data: Data, classifier: Classifier) -> Data:
    data = match_classes(data, classifier.num_classes, classifier.class_names)
    check_labels(data, np.arange(len(data)), classifier)
    return data


FEWER = [NAMES[:4] + NAMES[5:], [*NAMES, "yak"]]


@pytest.mark.parametrize("folders", FEWER, ids=["fewer", "more"])
def test_other_number_of_class_folders_than_outputs_is_refused(
    tmp_path: Path, folders: list[str]
) -> None:
    data = open_data(str(draw_folders(tmp_path, folders)), channels=1)

    with pytest.raises(UsageError, match=rf"{len(folders)} class folders.*10 outputs.*--classes"):
        check(data, build_classifier())


def test_folder_that_lacks_a_class_is_matched_by_the_names_given(tmp_path: Path) -> None:
    path = str(draw_folders(tmp_path, [*NAMES[:2], "Fire_Truck", *NAMES[3:9]]))
    data = check(open_data(path, channels=1, classes=NAMES), build_classifier())

    labels = label_by_folder(data)
    assert [labels[n] for n in ("zebra", "ant", "Fire_Truck", "hen")] == [0, 1, 2, 8]
    assert data.class_names == tuple(NAMES)


@pytest.mark.parametrize(("folder", "said"), [("yak", "'yak'"), ("zebras", "did you mean 'zebra'")])
def test_folder_that_no_output_is_called_is_refused(tmp_path: Path, folder: str, said: str) -> None:
    path = str(draw_folders(tmp_path, [*NAMES[1:], folder]))

    with pytest.raises(UsageError, match=said):
        open_data(path, channels=1, classes=NAMES)
    with pytest.raises(UsageError, match=said):
        check(open_data(path, channels=1), build_classifier(names=NAMES))


def test_names_in_the_metadata_decide_even_where_the_numbers_agree(tmp_path: Path) -> None:
    notes = {"class_names": json.dumps(NAMES)}
    safetensors.torch.save_file(digits_cnn().state_dict(), tmp_path / "n.safetensors", notes)
    data = open_data(str(draw_folders(tmp_path / "images", NAMES)), channels=1)
    found = check(data, load(tmp_path / "n.safetensors", arch=ARCH))

    assert label_by_folder(found) == {name: n for n, name in enumerate(NAMES)}


def test_names_decide_on_the_order_alone(tmp_path: Path) -> None:
    """What else was said of the images stands."""
    root = draw_folders(tmp_path, ["10", "9"])
    (root / "9" / "notes.txt").touch()
    opened = open_data(str(root), channels=1)
    matched = check(opened, build_classifier(2, ["9", "10"]))

    assert ["labels count" in note for note in opened.notes] == [True, False]
    assert matched.notes == opened.notes[1:]


def test_folders_without_a_word_of_the_metadata_are_counted(tmp_path: Path) -> None:
    data = open_data(str(draw_folders(tmp_path, list("0123456789"))), channels=1)

    checked = check(data, build_classifier(names=NAMES))
    assert label_by_folder(checked)["7"] == 7
    assert checked.notes == data.notes


def test_folders_that_no_output_is_called_are_counted_and_said_once(tmp_path: Path) -> None:
    data = open_data(str(draw_folders(tmp_path, ["sick", "healthy"])), channels=1)
    classifier = build_classifier(2, ["tumour", "none"])

    checked = check(check(data, classifier), classifier)
    assert label_by_folder(checked) == {"healthy": 0, "sick": 1}
    assert ["'healthy' is taken as 'tumour'" in note for note in checked.notes] == [True]
    assert check(data, build_classifier(2)).notes == ()


def test_torchvision_names_of_imagenet_are_recognised(tmp_path: Path) -> None:
    known = ResNet18_Weights.DEFAULT.meta["categories"]
    folders = [known[900], "great_white_shark", "Cardigan", "cardigan"]
    data = open_data(str(draw_folders(tmp_path, folders)), channels=1)
    labels = label_by_folder(check(data, build_classifier(1000)))

    assert [labels[n] for n in folders] == [
        900,
        2,
        known.index("Cardigan"),
        known.index("cardigan"),
    ]


def test_wordnet_ids_of_some_classes_are_recognised(tmp_path: Path) -> None:
    data = open_data(str(draw_folders(tmp_path, ["n01484850", "n01440764"])), channels=1)

    labels = label_by_folder(check(data, build_classifier(1000)))
    assert labels == {"n01484850": 2, "n01440764": 0}
    assert check(data, build_classifier(1000)).matching == "by name, WordNet ids"


def test_wordnet_ids_are_matched_with_names_of_outputs(tmp_path: Path) -> None:
    """As in Imagenette, whose folders have ids, for a network whose outputs have names."""
    names = ["church", "tench, Tinca tinca", "French horn, horn"]
    path = str(draw_folders(tmp_path, ["n01440764", "n03394916", "n03028079"]))
    data = check(open_data(path, channels=1), build_classifier(3, names))

    assert label_by_folder(data) == {"n01440764": 1, "n03394916": 2, "n03028079": 0}


def test_table_of_wordnet_ids_is_in_the_order_of_torchvision() -> None:
    from robusteval.datasets.wordnet import read_wordnet_ids

    known = ResNet18_Weights.DEFAULT.meta["categories"]
    ids = {"n01440764": "tench", "n02979186": "cassette player", "n15075141": "toilet tissue"}
    assert {wnid: known[read_wordnet_ids()[wnid]] for wnid in ids} == ids
    assert len(read_wordnet_ids()) == 1000


def test_wordnet_ids_work_with_a_list_of_ids(tmp_path: Path) -> None:
    ids = [f"n{n:08}" for n in range(1000)]
    path = str(draw_folders(tmp_path, [ids[7], ids[500]]))
    data = check(open_data(path, channels=1, classes=ids), build_classifier(1000))

    assert label_by_folder(data) == {ids[7]: 7, ids[500]: 500}


def test_list_of_another_length_than_the_outputs_is_refused(tmp_path: Path) -> None:
    path = str(draw_folders(tmp_path, NAMES))

    with pytest.raises(UsageError, match=r"11 class names.*10 outputs"):
        check(open_data(path, channels=1, classes=[*NAMES, "yak"]), build_classifier())


def test_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'zebra' twice"):
        open_data(str(draw_folders(tmp_path, NAMES)), channels=1, classes=[*NAMES, "zebra"])


def test_labels_that_are_numbers_get_the_names_of_the_checkpoint() -> None:
    data = from_arrays(np.full((10, 4, 4), 200, np.uint8), np.arange(10))
    digits = open_data("digits")

    assert match_classes(data, 10, NAMES).class_names == tuple(NAMES)
    assert match_classes(data, 10, NAMES[:9]) is match_classes(data, 10, None) is data
    assert match_classes(digits, 10, NAMES) is digits


def test_labels_that_are_numbers_get_the_names() -> None:
    named = open_data("digits", classes=NAMES)

    assert named.class_names == tuple(NAMES)
    assert named.labels.tolist() == open_data("digits").labels.tolist()
    with pytest.raises(UsageError, match="labels up to 9, the class names given are 9"):
        open_data("digits", classes=NAMES[:-1])


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(NAMES) + "\n\n",
        json.dumps(NAMES),
        json.dumps({str(i): name for i, name in sorted(enumerate(NAMES), reverse=True)}),
        json.dumps({str(i): [name, f"all {name}s"] for i, name in enumerate(NAMES)}),
        json.dumps({name: NAMES.index(name) for name in sorted(NAMES)}),
    ],
    ids=["lines", "list", "by number", "with what they mean", "with their numbers"],
)
def test_names_are_read_from_lines_and_from_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8")

    assert read_class_names(tmp_path / "names") == NAMES


@pytest.mark.parametrize(
    "raw",
    [b"[1, 2]", b"[", b"\xff\xfe", b'[[], ["a"]]', b'{"1": "a", "2": "b"}', b'{"a": 0, "b": 0}'],
)
def test_file_that_holds_no_names_is_an_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "names").write_bytes(raw)

    with pytest.raises(UsageError, match="name"):
        read_class_names(tmp_path / "names")


def test_command_refuses_then_matches_and_the_report_says_so(tmp_path: Path) -> None:
    safetensors.torch.save_file(digits_cnn().state_dict(), tmp_path / "n.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    images = draw_folders(tmp_path / "images", NAMES[:9])
    words = ["evaluate", str(tmp_path / "n.safetensors"), "--arch", ARCH, "--data", str(images)]
    words += ["--attack", "noise:eps=8/255", "--no-probes", "--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(cli, words)
    done = CliRunner().invoke(cli, [*words, "--classes", str(tmp_path / "names.txt")])

    assert (refused.exit_code, "--classes" in refused.stderr) == (2, True)
    record = build_record(load_run(tmp_path / "run"))
    assert done.exit_code in (5, 6), done.output  # it was never trained, so it guesses
    assert "by name" in dict(list_provenance(record))["labels"]


COMMANDS = [
    ["evaluate", "--attack", "noise:eps=8/255", "--no-probes"],
    ["explain", "--samples", "2"],
    ["train", "--epochs", "1", "--from"],
    ["defend", "mask", "--units", "2"],
    ["defend", "detector", "--attack", "noise:eps=8/255"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_that_opens_a_folder_refuses_shifted_labels(
    tmp_path: Path, words: list[str]
) -> None:
    file = tmp_path / "n.safetensors"
    out = tmp_path / ("out" if words[0] == "evaluate" else "out.safetensors")
    safetensors.torch.save_file(digits_cnn().state_dict(), file)
    images = draw_folders(tmp_path / "images", NAMES[:9], 8)
    options = ["--arch", ARCH, "--data", str(images), "--out", str(out)]
    refused = CliRunner().invoke(cli, [*words, str(file), *options])

    assert refused.exit_code == 2
    assert "--classes FILE" in " ".join(refused.stderr.split())
    assert not out.exists()
