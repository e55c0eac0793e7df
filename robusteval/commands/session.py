"""Opening what a command works on, its model and its images, with progress and an orderly stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robusteval.errors import UsageError

from .running import Stop, handle_stops, locate_work, show_bars

if TYPE_CHECKING:
    from robusteval.datasets.dataset import Data
    from robusteval.evaluation.work_cache import WorkCache
    from robusteval.models.classifier import Classifier
    from robusteval.progress import Bars
    from robusteval.runs.types import Spec


@dataclass(frozen=True)
class Request:
    """The model and the images that a command was asked for: its options of these names."""

    checkpoint: str
    arch: str | None
    mean: list[float] | None
    std: list[float] | None
    num_classes: int | None
    weights: str | None
    device: str
    data: str | None
    split: str
    size: int | None
    resize: int | None
    interpolation: str | None
    value_range: list[float] | None
    download: bool
    classes: Path | None
    columns: list[str] | None
    allow_outside: bool
    dtype: str = "float32"
    slices: tuple[str, ...] = ()

    @property
    def data_name(self) -> str:
        """What names the images: the demo network has some of its own."""
        return "digits" if self.data is None else self.data

    @property
    def model_options(self) -> list[tuple[str, Any]]:
        """The options that say how the checkpoint is read, by name; None where not given."""
        names = ("arch", "mean", "std", "num_classes", "weights")
        return [(name, getattr(self, name)) for name in names]

    def require_data(self, ask: str) -> None:
        """Refuse to go on without a file and images, unless the model is the demo network."""
        if self.checkpoint != "demo" and not os.path.exists(self.checkpoint):
            raise UsageError(f"there is no file {self.checkpoint}")
        if self.data is None and self.checkpoint != "demo":
            raise UsageError(f"{ask} with --data; `robusteval list data` shows the forms")

    def load_model(self, progress: Bars) -> Classifier:
        """The classifier in the checkpoint, on its device."""
        options = dict(self.model_options) | {"dtype": self.dtype}
        return load_model(self.checkpoint, progress, device=self.device, **options)

    def open_images(self, classifier: Classifier, split: str | None = None) -> Data:
        """The images as this classifier takes them; of another part of the data if one is named."""
        download = self.download and split is None
        split = split or self.split
        return open_images(
            classifier,
            self.data_name,
            split,
            download,
            self.size,
            resize=self.resize,
            interpolation=self.interpolation,
            value_range=self.value_range,
            classes=self.classes,
            columns=self.columns,
            allow_outside=self.allow_outside,
            slices=self.slices,
        )

    def open_both(self, progress: Bars) -> tuple[Classifier, Data]:
        """The classifier and its images."""
        classifier = self.load_model(progress)
        return classifier, self.open_images(classifier)


class Session(NamedTuple):
    """What a command works on, while it is open."""

    classifier: Classifier
    images: Data
    progress: Bars
    stop: Stop

    def say_if_fewer(self, samples: int | None) -> None:
        """Tell the user if there are fewer images than were asked for."""
        if samples and samples > len(self.images):
            count = len(self.images)
            self.progress.say(f"{self.images.name} has no more than {count} images: all are taken.")

    def resume_work(self, out: Path) -> WorkCache:
        """What an earlier call has finished of `out`; from now on a stop loses little."""
        from robusteval.evaluation.work_cache import WorkCache

        done = WorkCache(locate_work(out), self.progress.say)
        if done.has_results:
            self.progress.say(f"Continuing with what {done.folder} holds.")
        self.stop.loses_nothing()
        return done


@contextmanager
def open_session(
    open_both: Callable[[Bars], tuple[Classifier, Data]], *, fresh: bool = False
) -> Iterator[Session]:
    """Open model and images: as they are named in a `Request`, or as a command has its own way.

    Until it is left, progress is shown, and Ctrl-C and SIGTERM stop the work in good order.
    """
    with handle_stops(fresh) as stop, show_bars() as progress:
        stop.progress = progress
        classifier, images = open_both(progress)
        from robusteval.models.environment import keep_freed_memory  # torch is loaded by now

        keep_freed_memory()
        for note in images.notes:
            progress.say(note)
        yield Session(classifier, images, progress, stop)


def load_model(checkpoint: str, progress: Bars, *, device: str, **options: Any) -> Classifier:
    """The classifier in a checkpoint, on its device; the demo network is trained if need be."""
    from robusteval.models.checkpoint import load
    from robusteval.models.environment import pick_device

    target = pick_device(device)
    if checkpoint == "demo":
        from robusteval.models.demo import demo

        def show_training(done: int, total: int) -> None:
            if done == 0:
                progress.begin("Training the demo network", total)
            else:
                progress.advance(1)
            if done == total:
                progress.end()

        checkpoint = str(demo(progress=show_training, say=progress.say))
    classifier = load(checkpoint, **options, device=target)
    if reading := classifier.identity.get("reading"):
        progress.say(f"{classifier.identity['file']}: {reading}.")
    return classifier


def open_images(
    classifier: Classifier,
    spec: str,
    split: str,
    download: bool,
    size: int | None,
    *,
    resize: int | None = None,
    interpolation: str | None = None,
    value_range: Sequence[float] | None = None,
    classes: Path | None = None,
    columns: Sequence[str] | None = None,
    allow_outside: bool = False,
    names: Sequence[str] | None = None,
    slices: Sequence[str] = (),
) -> Data:
    """The data as this classifier takes it, with labels as it counts them."""
    from robusteval.datasets.class_names import list_classes, match_classes, read_class_names
    from robusteval.datasets.sources import open_data

    hint = classifier.identity
    published: dict[str, Any] = {}
    tables = (".csv", ".parquet")
    photos = os.path.isdir(spec) or spec.lower().endswith(tables) or spec.startswith("imagenet:")
    # the network's own folder says so, or it is one for ImageNet as its architecture is published
    if photos and resize is None and (hint.get("certain") or hint.get("num_classes") == 1000):
        published = hint
        size, resize = scale_published(hint, size)
    data = open_data(
        spec,
        split=split,
        download=download,
        channels=hint.get("input_channels"),
        size=size,
        resize=resize,
        interpolation=interpolation or hint.get("interpolation") or "bilinear",
        stretch=bool(published.get("stretch")),
        classes=names if classes is None else read_class_names(classes),
        columns=columns,
        allow_outside=allow_outside,
        value_range=value_range,
        slices=slices,
    )
    numbered = classes is not None and not list_classes(data) and bool(data.class_names)
    if numbered and len(data.class_names or ()) != classifier.num_classes:
        raise UsageError(
            f"{classes} has {len(data.class_names or ())} names, the network"
            f" {classifier.num_classes} outputs: name each of them, in their order"
        )
    if published and data.fit is not None:
        crop, fill = published.get("crop", "rounded"), tuple(published.get("fill", ()))
        data = replace(data, fit=data.fit._replace(crop=crop, fill=fill))
    elif published and size is None:
        check_sides(data, published.get("input_shape"))
    return match_classes(data, classifier.num_classes, classifier.class_names)


def check_sides(data: Data, shape: Sequence[int] | None) -> None:
    """Refuse photos of other sides than those of a network that takes no square ones."""
    if shape and tuple(shape[1:]) != data.shape[1:]:
        wanted, found = (f"{sides[1]}x{sides[2]}" for sides in (shape, data.shape))
        raise UsageError(
            f"the network takes images of {wanted} pixels, which are not square, and {data.name}"
            f" begins with one of {found}: resize the images to {wanted} as for training, or give"
            " --size N if the network takes squares too"
        )


def scale_published(hint: Mapping[str, Any], size: int | None) -> tuple[int | None, int | None]:
    """Sides of the crop and before it as a network is published, or in proportion to `size`."""
    crop, resize = hint.get("size"), hint.get("resize")
    if not crop or not resize:
        return size, None
    if size is None or size == crop:
        return crop, resize
    return size, size * resize // crop


def needs_rts(specs: Sequence[Spec]) -> bool:
    """Whether one of these attacks or interpreters needs the trained masks of RTS."""
    names = "+".join(str(spec.parameters.get("interpreter", spec.name)) for spec in specs)
    return "rts" in names.split("+")


def ensure_masks(session: Session, request: Request, other: str) -> None:
    """Make sure of the mask network of RTS for this classifier: kept, or trained on the spot.

    It is trained on the part `other` of named data; on these images themselves where there is
    none, which a message says.
    """
    from robusteval.interpreters.rts_training import prepare_rts

    classifier, images, progress, _ = session
    try:
        train = request.open_images(classifier, other)
    except UsageError:
        train = images
    if train.name == images.name and len(train) == len(images):
        progress.say(
            "The masks of rts are trained on the images they explain: there are no others."
        )
    prepare_rts(classifier, train, progress=progress)
