"""Folders as transformers and timm write them, opened as the networks that they were saved from."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from robusteval.cli import cli
from robusteval.commands.session import open_images
from robusteval.datasets.images import Fit, resize_image
from robusteval.errors import Refused, UsageError
from robusteval.models.checkpoint import load
from robusteval.models.hub_folder import read_labels
from robusteval.models.preparation import Preprocessing, read_processor, read_timm_preset

PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
    "image_processor_type": "ViTImageProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}
LABELS = {0: "cat", 1: "dog", 2: "owl"}
X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def make(transformers: Any, kind: str, **more: Any) -> Any:
    sizes: dict[str, dict[str, Any]] = {
        "ViT": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 32, "image_size": 32, "patch_size": 8},
        "Swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
                 "num_heads": [2, 2], "window_size": 4},
        "ConvNext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
                   "layer_type": "basic"},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes[kind], id2label=LABELS, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


def write(
    folder: Path, network: Any, processor: dict[str, Any] | None = PROCESSOR, **how: Any
) -> Path:
    network.save_pretrained(folder, **how)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def normalise(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(PROCESSOR[f"image_{n}"]).view(3, 1, 1) for n in ("mean", "std"))
    return (x - mean) / std


@pytest.mark.parametrize("kind", ["ViT", "Swin", "ConvNext", "ResNet"])
def test_folder_gives_the_logits_of_the_network_it_was_saved_from(
    tmp_path: Path, transformers: Any, kind: str
) -> None:
    network = make(transformers, kind)
    classifier = load(write(tmp_path / "net", network))

    with torch.no_grad():
        expected = network(normalise(X)).logits
        torch.testing.assert_close(classifier(X), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(classifier(X)[:1], classifier(X[:1]))
    assert classifier.class_names == ("cat", "dog", "owl")
    identity = classifier.identity
    assert identity["arch"] == f"transformers:{kind}ForImageClassification"
    assert identity["normalisation"] == "preprocessor_config.json"
    assert identity["outputs"] == "logits are `logits` of what the network returns"
    assert (identity["size"], identity["resize"], identity["stretch"]) == (32, 32, True)
    assert identity["interpolation"] == "bicubic"


def test_weights_in_several_files_and_in_those_of_torch_are_read(
    tmp_path: Path, transformers: Any
) -> None:
    network = make(transformers, "ViT")
    split = write(tmp_path / "split", network, max_shard_size="10KB")
    older = write(tmp_path / "older", network)
    state = safetensors.torch.load_file(older / "model.safetensors")
    (older / "model.safetensors").unlink()
    torch.save(state, older / "pytorch_model.bin")

    with torch.no_grad():
        expected = network(normalise(X)).logits
        for folder in (split, older):
            torch.testing.assert_close(load(folder)(X), expected)
    assert len(list(split.glob("*.safetensors"))) > 1
    next(split.glob("*00002-of*")).unlink()
    with pytest.raises(UsageError, match=r"lacks model-00002"):
        load(split)


def test_weights_beside_a_folder_are_read_with_it_as_architecture(
    tmp_path: Path, transformers: Any
) -> None:
    """As a training of one's own leaves them, prefix and all."""
    network = make(transformers, "ViT")
    folder = write(tmp_path / "net", network)
    other = make(transformers, "ViT", initializer_range=0.3)
    torch.save({f"model.{n}": t for n, t in other.state_dict().items()}, tmp_path / "w.pt")

    with torch.no_grad():
        expected = other(normalise(X)).logits
        torch.testing.assert_close(load(tmp_path / "w.pt", arch=str(folder))(X), expected)


def change(folder: Path, name: str, **facts: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | facts))


def send_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "code of its own": (
        lambda f: change(f, "config.json", auto_map={"AutoModel": "evil.Evil"}),
        Refused,
        "code of its own",
    ),
    "no classifier": (
        lambda f: change(f, "config.json", architectures=["ViTModel"]),
        UsageError,
        "ViTModel of .* is no image classifier",
    ),
    "unknown": (
        lambda f: change(f, "config.json", model_type="os", architectures=["system"]),
        UsageError,
        "no image classifier",
    ),
    "no processor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        UsageError,
        "nothing says how images are normalised",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        UsageError,
        "no weights: model.safetensors or pytorch_model.bin",
    ),
    "quantised": (
        lambda f: change(f, "config.json", quantization_config={"bits": 4}),
        UsageError,
        "quantised",
    ),
    "another size": (
        lambda f: change(f, "config.json", hidden_size=24),
        UsageError,
        "do not fit",
    ),
    "enormous": (
        lambda f: change(f, "config.json", hidden_size=60_000, num_hidden_layers=9),
        UsageError,
        "do not belong together",
    ),
    "deep": (
        lambda f: change(f, "config.json", num_hidden_layers=10**8),
        UsageError,
        "num_hidden_layers is 100000000, at most 1000",
    ),
    "stages without end": (
        lambda f: change(f, "config.json", depths=[1] * 900),
        UsageError,
        "its depths is .*, at most 1000 are taken",
    ),
    "buffers that stand in no file": (
        lambda f: change(f, "config.json", model_type="swin", window_size=80, image_size=160,
                         patch_size=2, embed_dim=2, num_heads=[1] * 4, depths=[1] * 4,
                         architectures=["SwinForImageClassification"]),
        UsageError,
        "do not belong together",
    ),
    "impossible": (
        lambda f: change(f, "config.json", hidden_act="none"),
        UsageError,
        "config.json was not followed",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), UsageError, "is no JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), UsageError, "no JSON object"),
    "not square": (
        lambda f: change(f, "preprocessor_config.json", size={"height": 32, "width": 16}),
        UsageError,
        "preprocessor_config.json is not understood: give --mean, --std",
    ),
    "grey levels": (
        lambda f: change(f, "preprocessor_config.json", image_mean=[123.0, 117.0, 104.0]),
        UsageError,
        r"the mean from preprocessor_config.json is 123, which looks like grey levels",
    ),
    "outside": (
        send_outside,
        Refused,
        "outside its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_wrong_with_a_folder_is_one_sentence(
    tmp_path: Path, transformers: Any, way: str
) -> None:
    folder = write(tmp_path / "net", make(transformers, "ViT"))
    damage, kind, said = BROKEN[way]
    damage(folder)

    with pytest.raises(kind, match=said):
        load(folder)


def test_nothing_in_a_configuration_fetches_or_runs_anything(
    tmp_path: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An implementation of attention can be named by a repository, which would be fetched."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = write(tmp_path / "net", make(transformers, "ViT"))
    change(folder, "config.json", attn_implementation="evil/kernel", _attn_implementation="e/k",
           _name_or_path="evil/model", use_kernels=True, dtype="float16")  # fmt: skip

    assert load(folder).network(X).dtype == torch.float32


def test_folder_that_is_none_and_adapters_alone_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without a config\.json: give the file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="adapters"):
        load(tmp_path)


def test_folder_of_timm_is_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 16}
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    recipe = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "crop_pct": 0.8,
              "interpolation": "bicubic", "crop_mode": "center"}  # fmt: skip
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "model_args": {**sizes, "checkpoint_path": "elsewhere.pth"},  # which timm would open
        "pretrained_cfg": recipe,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    classifier = load(tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(classifier(X), network((X - 0.5) / 0.25))
    assert classifier.identity["arch"] == "timm:vit_tiny_patch16_224"
    assert classifier.identity["resize"] == 40
    assert classifier.class_names == ("a", "b", "c")
    change(tmp_path, "config.json", architecture="hf-hub:someone/evil")
    with pytest.raises(UsageError, match="timm has no model hf-hub:someone/evil"):
        load(tmp_path)


P = Preprocessing
RECIPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"size": 32, "resize": 32, "stretch": True, "interpolation": "bicubic"}),
    ({"size": 384}, {"size": 384, "resize": 384, "stretch": True}),
    (
        {"size": {"shortest_edge": 256}, "do_center_crop": True,
         "crop_size": {"height": 224, "width": 224}, "resample": 2},
        {"size": 224, "resize": 256, "stretch": False, "interpolation": "bilinear"},
    ),
    ({"size": 256, "do_center_crop": True, "crop_size": 224}, {"size": 224, "resize": 256}),
    (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
        {"size": 224, "resize": 256, "stretch": False},
    ),
    (
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875},
        {"size": 384, "resize": 384, "stretch": True},
    ),
    # files of before 2023, as those of microsoft/resnet-50 and of the first DeiT
    (
        {"size": 224, "crop_pct": 0.875, "image_processor_type": "ConvNextFeatureExtractor"},
        {"size": 224, "resize": 256, "stretch": False},
    ),
    (
        {"size": 256, "do_center_crop": True, "crop_size": 224,
         "image_processor_type": "DeiTImageProcessor"},
        {"size": 224, "resize": 256, "stretch": True},
    ),
    (
        {"size": 256, "do_center_crop": True, "crop_size": 224,
         "image_processor_type": "BitImageProcessorFast"},
        {"size": 224, "resize": 256, "stretch": False},
    ),
    (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.9, "do_center_crop": True, "crop_size": 224},
        {"size": 224, "resize": 248, "stretch": False},
    ),
    (
        {"size": 224, "image_processor_type": "LevitFeatureExtractor"},
        {"size": 224, "resize": 256, "stretch": False},
    ),
    ({"do_resize": False}, {"size": 32, "resize": 32}),
    ({"do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
    (
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3},
        {"mean": [0.5] * 3, "std": [0.2] * 3},
    ),
    ({"include_top": True, "image_std": [0.5] * 3}, {"std": [0.25] * 3}),
    ({"do_flip_channel_order": True}, {"flip": True}),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "expected"), RECIPES)
def test_preprocessing_is_read_as_it_is_meant(
    facts: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = read_processor(PROCESSOR | facts, "preprocessor_config.json")

    for name, value in expected.items():
        assert getattr(found, name) == (pytest.approx(value) if name in ("mean", "std") else value)


@pytest.mark.parametrize(
    "facts",
    [
        {"image_std": [0, 1, 1]},
        {"image_mean": "high"},
        {"size": {"longest_edge": 32}},
        {"size": {"height": -1, "width": -1}},
        {"resample": 77},
        {"rescale_factor": 1e-400},
        {"rescale_offset": True},
        {"crop_pct": 0, "size": {"shortest_edge": 224}},
    ],
)
def test_preprocessing_that_is_not_known_is_refused(facts: dict[str, Any]) -> None:
    if facts == {"rescale_factor": 1e-400}:  # zero counts as not given, as it does there
        assert read_processor(PROCESSOR | facts, "p").mean == PROCESSOR["image_mean"]
        return
    with pytest.raises(UsageError, match="is not understood"):
        read_processor(PROCESSOR | facts, "preprocessor_config.json")


def test_crops_of_timm_are_read() -> None:
    recipe = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    squash = read_timm_preset(recipe | {"crop_mode": "squash"}, "timm", True)

    assert (squash.resize, squash.stretch, squash.interpolation) == (248, True, "bicubic")
    border = read_timm_preset(recipe | {"crop_mode": "border", "mean": [0.5, 0.4, 0.1]}, "t", True)
    assert (border.resize, border.stretch, border.crop) == (248, False, "padded")
    assert border.fill == (128, 102, 26)
    assert read_timm_preset(recipe | {"input_size": [3, 224, 160]}, "timm", True).size is None
    with pytest.raises(UsageError, match="mean or std is missing"):
        read_timm_preset({"input_size": [3, 224, 224]}, "timm", True)


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
@pytest.mark.parametrize("share", [0.9, 1.0])
@pytest.mark.parametrize("sides", [(50, 71), (83, 40), (33, 32)])
def test_photos_are_cropped_as_timm_does(mode: str, share: float, sides: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    recipe = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.1], "std": [1, 1, 1],
              "crop_pct": share, "crop_mode": mode, "interpolation": "bicubic"}  # fmt: skip
    photo = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    theirs = timm.data.transforms_factory.transforms_imagenet_eval(
        32, crop_pct=share, crop_mode=mode, interpolation="bicubic", mean=recipe["mean"],
        normalize=False,
    )(Image.fromarray(photo))  # fmt: skip
    p = read_timm_preset(recipe, "timm", True)
    fit = Fit(32, p.resize, p.interpolation, p.stretch, p.crop, p.fill)  # type: ignore[arg-type]
    ours = resize_image(photo.transpose(2, 0, 1), fit, "photo")

    assert np.array_equal(np.rint(ours * 255), theirs.numpy())


def test_crops_begin_where_those_of_transformers_do(transformers: Any) -> None:
    processor = transformers.PoolFormerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=0.9
    )
    p = read_processor(processor.to_dict(), "preprocessor_config.json")
    for width in (49, 50, 51, 52):
        photo = np.zeros((46, width, 3), np.uint8)
        photo[:, width // 2 :] = 255
        theirs = processor(photo, do_normalize=False, return_tensors="np")["pixel_values"][0]
        fit = Fit(32, p.resize, p.interpolation, p.stretch, p.crop)  # type: ignore[arg-type]
        assert p.size == 32

        assert np.abs(resize_image(photo.transpose(2, 0, 1), fit, "photo") - theirs).max() < 0.02


def write_timm(folder: Path, recipe: dict[str, Any]) -> Path:
    """A folder as timm publishes them, with what it says of preprocessing."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 16}
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": sizes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | recipe))
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def test_what_a_folder_of_timm_does_not_say_is_known_of_its_architecture(tmp_path: Path) -> None:
    classifier = load(write_timm(tmp_path / "net", {}))

    assert classifier.identity["normalisation"].startswith("timm's preset for vit_tiny")
    assert classifier.identity["mean"] == [0.5] * 3
    assert classifier.identity["certain"] is False


def test_another_size_keeps_the_published_proportion(tmp_path: Path) -> None:
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "crop_pct": 0.8}
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (70, 50)).save(tmp_path / "photos" / "a" / "1.png")
    for mode, size, words in (
        ("squash", None, "both sides to 40 (bicubic"),
        ("squash", 48, "both sides to 60 (bicubic"),
        ("center", 48, "shorter side to 60 (bicubic"),
        ("border", 64, "longer side to 80 (bicubic, antialiased), centre crop 64, the rest"),
    ):
        folder = tmp_path / f"{mode}{size}"
        classifier = load(write_timm(folder, {"pretrained_cfg": {**cfg, "crop_mode": mode}}))
        data = open_images(classifier, str(tmp_path / "photos"), "test", False, size)
        assert data.transform.startswith(words)
        own = open_images(classifier, str(tmp_path / "photos"), "test", False, 32, resize=32)
        assert own.transform.startswith("shorter side to 32")


def test_photos_for_a_network_of_oblong_images_must_have_its_sides(tmp_path: Path) -> None:
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 48, 32]}
    (tmp_path / "photos" / "a").mkdir(parents=True)
    sizes = {"img_size": [48, 32], "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 16}
    folder = write_timm(tmp_path / "net", {"pretrained_cfg": cfg, "model_args": sizes})
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["pos_embed"] = torch.zeros(1, 25, 16)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    classifier = load(folder)
    for sides, right in (((32, 48), True), ((70, 50), False)):
        Image.new("RGB", sides).save(tmp_path / "photos" / "a" / "1.png")
        if right:
            data = open_images(classifier, str(tmp_path / "photos"), "test", False, None)
            assert data.shape == (3, 48, 32)
        else:
            with pytest.raises(UsageError, match="48x32 pixels, which are not square"):
                open_images(classifier, str(tmp_path / "photos"), "test", False, None)


@pytest.mark.parametrize(
    "facts",
    [
        {"input_size": [3, float("inf"), 32]},
        {"mean": [10**400, 0, 0]},
        {"std": [0, 0.5, 0.5]},
        {"mean": [0.5, 0.5], "std": [0.5, 0.5]},
        {"mean": [], "std": []},
    ],
)
def test_recipes_of_timm_that_are_impossible_are_refused(facts: dict[str, Any]) -> None:
    recipe = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}

    with pytest.raises(UsageError, match=r"the recipe (is damaged|needs)"):
        read_timm_preset(recipe | facts, "the recipe", True)


def test_numbered_labels_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    )
    assert read_labels(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": None}))
    assert read_labels(tmp_path) is None


def test_photos_are_prepared_as_the_folder_says_and_matched_by_its_labels(
    tmp_path: Path, transformers: Any
) -> None:
    folder = write(tmp_path / "net", make(transformers, "ResNet"))
    draw = np.random.default_rng(0)
    for name in ("owl", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(2):
            pixels = draw.integers(0, 256, (50, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{n}.png")
    done = CliRunner().invoke(
        cli,
        ["evaluate", str(folder), "--data", str(tmp_path / "photos"), "--no-probes",
         "--attack", "noise:eps=8/255", "--out", str(tmp_path / "run"), "--format", "json"],
    )  # fmt: skip
    assert done.exit_code in (0, 5, 6), done.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())

    assert record["data"]["transform"].startswith("both sides to 32 (bicubic, antialiased)")
    assert record["data"]["labels"] == "by name, the network's own list"
    shutil.rmtree(tmp_path / "run")


def test_photos_in_a_table_are_prepared_as_those_in_folders(
    tmp_path: Path, transformers: Any
) -> None:
    pa = pytest.importorskip("pyarrow")
    content = io.BytesIO()
    Image.fromarray(np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3)).save(content, "PNG")
    table = pa.table({"image": [{"bytes": content.getvalue(), "path": None}], "label": ["owl"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    classifier = load(write(tmp_path / "net", make(transformers, "ResNet")))
    data = open_images(classifier, str(tmp_path / "a.parquet"), "test", False, None)

    assert data.transform.startswith("both sides to 32 (bicubic, antialiased)")
    assert data.labels.tolist() == [2]
