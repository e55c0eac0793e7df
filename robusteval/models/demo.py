"""The demo network: trained on handwritten digits where it is needed, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.datasets.dataset import Batch
from robusteval.datasets.sources import open_data
from robusteval.errors import RobustevalError, RunError, UsageError
from robusteval.models import checkpoint, networks
from robusteval.models.networks import digits_cnn
from robusteval.runs.cache_folder import cache_folder

SEED = 0
EPOCHS = 10
BATCH = 64  # images
RATE = 0.01  # at its highest; a cosine to zero
DECAY = 0.01
SHIFT = 2  # pixels, at most, in each direction


def demo(
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """The checkpoint of a `digits_cnn` trained on handwritten digits, trained if not there yet.

    Parameters
    ----------
    cache : Path, optional
        Folder to keep it in; `cache_folder` if not given.
    progress : callable, optional
        Told steps done and steps in all, from zero on; not called where nothing is trained.
    say : callable, optional
        Told in a sentence if the file is damaged, and therefore trained again.

    Returns
    -------
    Path
        A file for `robusteval.models.checkpoint.load`, named by what it was made from.

    Raises
    ------
    UsageError
        The cache folder cannot be written.
    """
    data = open_data("digits", split="train")
    images = data.batch(range(len(data)))
    path = (cache or cache_folder()) / f"digits_cnn-{_recipe(images)[:16]}.safetensors"
    if _is_sound(path):
        return path
    if path.exists():
        say(f"{path} is damaged: the demo network is trained again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise _unwritable(path.parent) from None
    mean, std = float(images.x.mean()), float(images.x.std())
    with _one_thread():
        network = _trained((images.x - mean) / std, images.y, progress or _silent)
    try:
        checkpoint.save(
            path,
            network.state_dict(),
            arch="robusteval:digits_cnn",
            num_classes=10,
            input_shape=(1, 32, 32),
            mean=[mean],
            std=[std],
            data=data.name,
            epochs=EPOCHS,
            seed=SEED,
        )
    except RunError:
        raise _unwritable(path.parent) from None
    return path


def _unwritable(folder: Path) -> UsageError:
    return UsageError(
        f"cannot write to the cache folder {folder}: "
        "set the environment variable ROBUSTEVAL_CACHE to a folder that can be written"
    )


def _recipe(images: Batch) -> str:
    """Hash of all that decides the weights, as far as one can know it."""
    facts = [Path(code).read_bytes() for code in (__file__, networks.__file__)]
    facts += [torch.__version__.encode()]
    facts += [images.ids.tobytes(), np.asarray(images.y).tobytes()]
    return hashlib.sha256(b"\n".join(facts)).hexdigest()


def _is_sound(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except RobustevalError:
        return False
    return True


def _silent(done: int, total: int) -> None:
    pass


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads changes the last digits; a network this small gains little from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(x: Tensor, y: Tensor, progress: Callable[[int, int], None]) -> nn.Module:
    """A network trained on these normalised images; the global generator stays as it was."""
    draws = torch.Generator().manual_seed(SEED)
    total = EPOCHS * (len(x) // BATCH)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        network = digits_cnn().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    done = 0
    progress(done, total)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=draws)
        for index in torch.split(order, BATCH)[: len(x) // BATCH]:
            loss = F.cross_entropy(network(_shifted(x[index], draws)), y[index])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            done += 1
            progress(done, total)
    return network


def _shifted(x: Tensor, draws: torch.Generator) -> Tensor:
    """All images of a batch moved by the same few pixels, the edge repeated."""
    top, left = torch.randint(2 * SHIFT + 1, (2,), generator=draws).tolist()
    h, w = x.shape[2:]
    return F.pad(x, [SHIFT] * 4, mode="replicate")[:, :, top : top + h, left : left + w]
