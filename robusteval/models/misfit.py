"""How weights differ from a network's, and what would explain it, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from robusteval.errors import UsageError
from robusteval.models.built import escape

MOST_REASONS = 3
FEW = 8  # tensors that a part of a network, such as its head, can have
# parts of names that tell whose names they are, and what to do
LIBRARIES = {
    "embeddings.patch_embeddings.projection": "transformers",
    "embedder.stem_layer": "transformers",
    "encoder.stages.0.layers": "transformers",
    "attention.attention.query": "transformers",
    "encoder.layers.encoder_layer_0": "torchvision",
    "attn.qkv": "timm",
    "conv_stem": "timm",
}
ADAPTERS = ("lora_A", "lora_B", "lora_down", "lora_up", "adapter")
QUANTISED = (
    *("_packed_params", "zero_point", "qweight", "qzeros", "weight_scale", "scale_weight"),
    *(".SCB", ".absmax", ".quant_map"),  # of bitsandbytes
)


@dataclass(frozen=True)
class Misfit:
    """How weights differ from a network's.

    Attributes
    ----------
    missing, unexpected : list
        Names that the network has and the file lacks, and the other way round, with shapes.
    shapes : list
        Names that both have, with the shapes in the file and in the network.
    common : int
        How many names both have.
    """

    missing: list[tuple[str, torch.Size]]
    unexpected: list[tuple[str, torch.Size]]
    shapes: list[tuple[str, torch.Size, torch.Size]]
    common: int = 0

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    @property
    def distance(self) -> tuple[int, int]:
        """How far from a fit: tensors of the network without numbers, then those too many."""
        return len(self.missing) + len(self.shapes), len(self.unexpected)

    def find_classes(self) -> int | None:
        """The class count that could explain all shapes that differ."""
        counts = {(inside[0], wanted[0]) for _, inside, wanted in self.shapes if inside and wanted}
        alike = all(inside[1:] == wanted[1:] for _, inside, wanted in self.shapes)
        if self.missing or self.unexpected or len(counts) != 1 or not alike:
            return None
        return int(counts.pop()[0])

    def build_error(self, file: str, arch: str) -> UsageError:
        """The error that says why weights do not fit: the likeliest reasons, then counts."""
        first, *others = list(_list_reasons(self, arch))[:MOST_REASONS]
        counts = (
            f"tensors: {len(self.missing)} missing, {len(self.unexpected)} unexpected,"
            f" {len(self.shapes)} of another shape, {self.common} names in common"
        )
        return UsageError(
            f"the weights in {file} do not fit {arch}: {first}",
            [*(f"  or: {reason}" for reason in others), f"  {counts} (-v lists them)"],
            details=self.list_all(),
        )

    def list_all(self) -> list[str]:
        """Every tensor that differs, a line each."""
        lines = [f"  missing: {escape(name)} {tuple(shape)}" for name, shape in self.missing]
        lines += [f"  unexpected: {escape(name)} {tuple(shape)}" for name, shape in self.unexpected]
        lines += [
            f"  shape: {escape(name)} is {tuple(inside)} in the file, {tuple(wanted)} in the"
            " architecture"
            for name, inside, wanted in self.shapes
        ]
        return lines


def _list_reasons(misfit: Misfit, arch: str) -> Iterator[str]:
    """What would explain that weights do not fit, the likeliest first; never empty."""
    unexpected = [name for name, _ in misfit.unexpected]
    missing = [name for name, _ in misfit.missing]
    yield from _list_conversions(unexpected)
    yield from _compare_libraries(unexpected, missing, arch)
    yield from _compare_shapes(misfit.shapes)
    if not misfit.common:
        yield "no name is in both, so it is another architecture, or another program's names for it"
        return
    if missing and not unexpected and len(missing) <= FEW:
        yield f"the file lacks {_name_part(missing)}, as that of a backbone without its head does"
    elif missing and unexpected and max(len(missing), len(unexpected)) <= FEW:
        yield (
            f"the network has {_name_part(missing)} where the file has {_name_part(unexpected)}:"
            " a head or a layer is another one"
        )
    elif unexpected and not missing:
        yield (
            f"the file has {_name_part(unexpected)} in addition, so that it is of a larger variant,"
            " or of one with another layer"
        )
    elif missing and not unexpected:
        yield f"the file lacks {_name_part(missing)}, so that it is of a smaller variant"
    if missing or unexpected:
        yield "it is another variant of this architecture, or made for another version of its code"


def _list_conversions(names: Iterable[str]) -> Iterator[str]:
    """What the weights were turned into and has to be undone first."""
    names = list(names)
    if any(mark in name for name in names for mark in ADAPTERS):
        yield (
            "it holds adapters (LoRA), not a network: merge them first (in peft,"
            " model.merge_and_unload()) and save its state_dict()"
        )
    if any(mark in name for name in names for mark in QUANTISED):
        yield "it is quantised: save the state_dict() of the network in floating point"
    if any(".parametrizations." in f".{name}" for name in names):
        yield (
            "its layers are parametrised: call"
            " torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') on each and save"
            " the state_dict() again"
        )
    if any(name.endswith("_flat_param") or "_flat_param_" in name for name in names):
        yield (
            "it holds flattened shards of FSDP: save it with"
            " torch.distributed.checkpoint.state_dict.get_state_dict and full_state_dict=True"
        )


def _compare_libraries(
    unexpected: Iterable[str], missing: Iterable[str], arch: str
) -> Iterator[str]:
    """Whose names the file has and whose the network has, where they tell."""
    theirs = {lib for mark, lib in LIBRARIES.items() if any(mark in n for n in unexpected)}
    ours = {lib for mark, lib in LIBRARIES.items() if any(mark in n for n in missing)}
    for library in sorted(theirs - ours - {arch.partition(":")[0]}):
        form = {
            "timm": "--arch timm:NAME",
            "torchvision": "--arch torchvision:NAME",
            "transformers": "the folder with its config.json in the place of the file",
        }[library]
        yield f"its names are those of {library}: give {form}"


def _compare_shapes(shapes: Iterable[tuple[str, torch.Size, torch.Size]]) -> Iterator[str]:
    """What shapes that differ have in common."""
    known: Mapping[str, tuple[torch.Size, torch.Size]] = {n: (a, b) for n, a, b in shapes}
    if not known:
        return
    said = False
    for name, (inside, wanted) in known.items():
        stem = len(inside) == len(wanted) == 4 and inside[0] == wanted[0]
        if stem and inside[2:] == wanted[2:] and inside[1] != wanted[1] and len(known) <= 2:
            said = True
            yield f"it is made for images of {inside[1]} channels, the network for {wanted[1]}"
        if "pos_embed" in name or "position_embedding" in name or "relative_position" in name:
            yield (
                f"it is made for images of another size: {escape(name)} is {tuple(inside)} in the"
                f" file, {tuple(wanted)} in the network"
            )
            said = True
            break
    if said and len(known) == 1:
        return
    name, (inside, wanted) = next(iter(known.items()))
    yield (
        f"it is of another width or variant: {escape(name)} is {tuple(inside)} in the file,"
        f" {tuple(wanted)} in the architecture"
    )


def _name_part(names: list[str]) -> str:
    """What a few tensors have in common, for a sentence."""
    tops = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    listed = ", ".join(escape(top) for top in list(tops)[:3])
    return listed + (" and others" if len(tops) > 3 else "")
