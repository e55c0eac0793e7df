"""What people save beside state dicts: each is refused in a sentence that names the way on."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from robusteval.errors import UsageError
from robusteval.models.weights import read_contents


def refuse(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_contents(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pack(*names: str) -> bytes:
    """A zip file with empty files of these names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return content.getvalue()


def make_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.pth"))
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("net.pth.tar.gz", gzip.compress(b"weights", mtime=0), "is an archive of files: unpack it"),
        ("net.tar", make_tar(), "is an archive of files: unpack it"),
        ("net.gguf", b"GGUF" + bytes(60), "is of GGUF, which is made for running"),
        ("net.tflite", bytes(4) + b"TFL3" + bytes(60), "is of TensorFlow Lite"),
        ("net.pte", bytes(4) + b"ET12" + bytes(60), "is of ExecuTorch"),
        ("net.onnx", b"\x08\x08\x12\x07pytorch", "save the weights where it was exported from"),
        ("net.keras", pack("metadata.json", "config.json", "model.weights.h5"), "file of Keras"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "give the folder it is in"),
        ("net.mar", pack("MAR-INF/MANIFEST.json", "net.pth"), "with net.pth in it: unpack it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # zip files hold the time
)
def test_files_of_other_forms_name_the_way_on(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)

    assert said in refuse(tmp_path / name)


def test_arrays_of_a_vision_transformer_go_through_timm(tmp_path: Path) -> None:
    np.savez(tmp_path / "ViT-B_16.npz", kernel=np.zeros(3))

    assert "model.load_pretrained('ViT-B_16.npz')" in refuse(tmp_path / "ViT-B_16.npz")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([".metadata", "__0_0.distcp", "__1_0.distcp"], "format_utils dcp_to_torch"),
        (["latest", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["saved_model.pb", "variables/variables.index"], "a SavedModel of TensorFlow"),
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl"], "/model.safetensors"),
        (["MLmodel", "data/model.pth"], "/data/model.pth"),
        (["a.pt", "b.pt"], "without a config.json: give the file with the weights"),
    ],
)
def test_folders_of_other_forms_name_the_way_on(
    tmp_path: Path, names: list[str], said: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert said in refuse(tmp_path)
