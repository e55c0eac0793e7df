"""Probes drawn, or read from folders in the known layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robusteval.datasets.concepts import Generated, open_concepts
from robusteval.errors import UsageError

SHAPE = (3, 24, 24)


def save(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def test_drawn_probes_show_what_their_masks_say() -> None:
    """A colour, a texture and a shape each, all at the same places and nowhere else."""
    concepts = Generated(SHAPE, count=60)
    names = [concept.name for concept in concepts.concepts]
    seen = set()

    for i in range(len(concepts)):
        image, masks, categories = concepts.probe(i)
        assert image.shape == SHAPE
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        kinds = sorted(concepts.concepts[k].category for k in masks)
        assert kinds == ["colour", "shape", "texture"] == sorted(categories)
        (mask,) = {id(mask): mask for mask in masks.values()}.values()
        assert 0 < float(mask.double().mean()) < 0.9
        grey = image.std(0) < 1e-6
        assert bool(grey[~mask].all())
        seen |= {names[k] for k in masks}

    assert seen == set(names)


def test_red_is_red() -> None:
    concepts = Generated(SHAPE, count=80)
    red = [concept.name for concept in concepts.concepts].index("red")

    for i in range(80):
        image, masks, _ = concepts.probe(i)
        if red in masks:
            inside = image[:, masks[red]].mean(1)
            assert inside[0] > 2 * inside[1:].max()


def test_a_probe_depends_on_seed_and_position_alone() -> None:
    one, same = (Generated(SHAPE, seed=1).probe(5) for _ in range(2))

    assert torch.equal(one.image, same.image)
    assert not torch.equal(one.image, Generated(SHAPE, seed=2).probe(5).image)


def test_grey_images_are_not_asked_for_colours() -> None:
    concepts = Generated((1, 16, 20), count=5)

    names = [c.name for c in concepts.concepts if c.category == "colour"]

    assert names == ["white", "black"]
    assert concepts.probe(0).image.shape == (1, 16, 20)


def test_a_folder_of_images_and_masks_is_read(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", np.full((48, 48, 3), 255))
    save(tmp_path / "images" / "b.jpg", np.zeros((24, 24, 3)))
    mask = np.zeros((48, 48))
    mask[:24] = 255
    save(tmp_path / "masks" / "sky" / "a.png", mask)
    save(tmp_path / "masks" / "grass" / "a.png", 255 - mask)

    concepts = open_concepts(tmp_path, SHAPE)

    assert [c.name for c in concepts.concepts] == ["grass", "sky"]
    assert len(concepts) == 2
    first = concepts.probe(0)
    assert bool((first.image == 1).all())
    assert first.masks[1].double().mean(1).tolist() == [1.0] * 12 + [0.0] * 12
    assert torch.equal(first.masks[0], ~first.masks[1])
    assert concepts.probe(1).masks == {}


def broden(folder: Path) -> None:
    save(folder / "images" / "x" / "a.png", np.full((24, 24, 3), 128))
    colours = np.zeros((24, 24, 3))
    colours[:12, :, 0] = 7
    colours[12:, :, 0], colours[12:, :, 1] = 4, 1  # 4 + 256
    save(folder / "images" / "x" / "a_color.png", colours)
    (folder / "label.csv").write_text(
        "number,name,category,frequency\n7,red,color(11),5\n260,blue,color(9),5\n"
        "30,striped,texture(3),2\n"
    )
    (folder / "index.csv").write_text(
        "image,split,ih,iw,sh,sw,color,object,texture\n"
        "x/a.png,train,24,24,24,24,x/a_color.png,,30\n"
        "x/a.png,val,24,24,24,24,,,\n"
    )


def test_the_layout_of_broden_is_understood(tmp_path: Path) -> None:
    """Pictures of numbers in red and green, and labels of whole images."""
    broden(tmp_path)

    concepts = open_concepts(tmp_path, SHAPE)

    assert [tuple(c) for c in concepts.concepts] == [
        ("red", "color"),
        ("blue", "color"),
        ("striped", "texture"),
    ]
    probe = concepts.probe(0)
    assert probe.masks[0].double().mean(1).tolist() == [1.0] * 12 + [0.0] * 12
    assert torch.equal(probe.masks[1], ~probe.masks[0])
    assert bool(probe.masks[2].all())
    assert probe.categories == {"color", "texture"}
    assert concepts.probe(1).masks == {}
    assert concepts.probe(1).categories == frozenset()


def test_folders_that_hold_no_concepts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder of concepts"):
        open_concepts(tmp_path, SHAPE)
    save(tmp_path / "images" / "a.png", np.zeros((4, 4, 3)))
    with pytest.raises(UsageError, match="holds no images with masks"):
        open_concepts(tmp_path, SHAPE)
    (tmp_path / "index.csv").write_text("image\na.png\n")
    with pytest.raises(UsageError, match=r"label\.csv cannot be read"):
        open_concepts(tmp_path, SHAPE)
    (tmp_path / "label.csv").write_text("number,name\n1,a\n")
    with pytest.raises(UsageError, match="number, name and category"):
        open_concepts(tmp_path, SHAPE)
    (tmp_path / "label.csv").write_text("number,name,category\n1,a,color\n")
    with pytest.raises(UsageError, match="names no image, or no category"):
        open_concepts(tmp_path, SHAPE)


@pytest.mark.parametrize("column", ["image", "color"])
def test_paths_of_an_index_stay_in_its_folder_unless_allowed(tmp_path: Path, column: str) -> None:
    root = tmp_path / "broden"
    for path in (tmp_path / "out.png", root / "images" / "in.png"):
        save(path, np.full((4, 4, 3), (1, 1, 0)))
    row = {"image": "in.png", "color": "in.png", column: "../../out.png"}
    (root / "index.csv").write_text(f"image,color\n{row['image']},{row['color']}\n")
    (root / "label.csv").write_text("number,name,category\n257,a,color\n")

    with pytest.raises(UsageError, match=r"index\.csv: .*out\.png is not in the folder"):
        open_concepts(root, SHAPE).probe(0)
    assert open_concepts(root, SHAPE, allow_outside=True).probe(0).masks.keys() == {0}


def test_a_concept_and_its_mask_are_turned_upright_together(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    values = np.zeros((24, 24, 3), np.uint8)
    values[0] = 255
    for folder in ("images", "masks/one"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / folder / "a.png", exif=exif)
    image, masks, _ = open_concepts(tmp_path, SHAPE).probe(0)

    assert image[:, -1].min() == 1 == image.sum() / 72
    assert torch.equal(masks[0], image[0] > 0)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    broden(tmp_path)
    (tmp_path / "images" / "x" / "a_color.png").write_text("no")

    with pytest.raises(UsageError, match=r"a_color\.png cannot be read"):
        open_concepts(tmp_path, SHAPE).probe(0)
