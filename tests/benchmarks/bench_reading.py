"""What reading photos costs an evaluation, beside the same images in memory.

`python tests/benchmarks/bench_reading.py 500`: makes so many JPEG files of 500 x 375 pixels, and
attacks them at 224 pixels by fgsm: from the files with threads that read ahead, without, and as an
array. Once with a SqueezeNet, and once with a stand-in for an accelerator, a network that waits for
some milliseconds an image while the processor is free.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import squeezenet1_0

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.datasets.image_files import FileSource
from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.runs.types import Run

WAIT = 0.005  # seconds for an image and pass


class Waiting(nn.Module):
    """Answers by mean colours after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(WAIT * len(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def write_photos(folder: Path, n: int) -> Path:
    """Files of smooth noise, with about as many bytes as photos have."""
    rng = np.random.default_rng(0)
    lines = ["file,label"]
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        fine = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = (fine + rng.normal(0, 12, fine.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.jpg", quality=85)
        lines.append(f"{i}.jpg,0")
    listed = folder / "list.csv"
    listed.write_text("\n".join(lines) + "\n")
    return listed


def time_run(model: nn.Module, data: Data) -> tuple[float, Run]:
    """Seconds of an evaluation, and what it found."""
    started = time.perf_counter()
    run = evaluate(model, data, ["fgsm:eps=2/255"], probes=False)
    return time.perf_counter() - started, run


def main(n: int) -> None:
    """Print the three times for both networks."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        listed = write_photos(Path(folder), n)
        started = time.perf_counter()
        x = open_data(str(listed), size=224).batch(range(n)).x
        print(f"{n} photos, read one by one: {(time.perf_counter() - started) / n * 1e3:.2f} ms")
        for name, network in (("squeezenet", squeezenet1_0()), ("waiting", Waiting())):
            with torch.no_grad():
                network.eval()
                labels = torch.cat([network(part).argmax(1) for part in torch.split(x, 32)]).numpy()
            (Path(folder) / "list.csv").write_text(
                "file,label\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels))
            )
            in_memory, expected = time_run(network, from_arrays(x.numpy(), labels))
            files = open_data(str(listed), size=224)
            ahead, found = time_run(network, files)
            FileSource.in_threads = False
            serial, _ = time_run(network, open_data(str(listed), size=224))
            FileSource.in_threads = True
            same = all(
                np.array_equal(found.outcomes[0].columns[c], expected.outcomes[0].columns[c])
                for c in ("id", "pred_adv", "margin_adv", "l2")
            )
            print(
                f"{name}: in memory {in_memory:.1f} s; files, read ahead {ahead:.1f} s"
                f" ({ahead / in_memory:.3f}); files, one by one {serial:.1f} s"
                f" ({serial / in_memory:.3f}); same columns: {same}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
