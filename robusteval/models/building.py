"""An architecture with the weights of a file in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.models.architecture import build_network, raise_as_architecture_error
from robusteval.models.built import Built, State, escape
from robusteval.models.classifier import switch_to_eval
from robusteval.models.filling import adopt_weights
from robusteval.models.hub_folder import convert_names
from robusteval.models.matching import Match, choose_match, match_names

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Filled:
    """A network with weights in it, and how their names were read."""

    built: Built
    match: Match


def build_with_weights(
    arch: str, num_classes: int | None, state: State, file: str, *, plain: bool = False
) -> Filled:
    """The architecture with the weights in it; its class count is found from theirs.

    Parameters
    ----------
    arch, num_classes
        As in `robusteval.models.checkpoint.load`.
    state : dict
        The tensors of the file.
    file : str
        What to call it in messages.
    plain : bool
        Whether the user asked for these tensors: names as they are come first then.

    Raises
    ------
    UsageError
        The weights do not fit, fit in two ways that differ, are not finite, or quantised.
    """
    built, matches = _build_matching(arch, num_classes, state)
    asked = [match for match in matches if plain and not match.part]
    match = choose_match(asked or matches, file, built.name)
    network = built.network
    buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
    check_finite(match.state, buffers, file)
    check_floating(network, match.state, file)
    check_tied(network, match.state, file)
    complete = network.state_dict()  # with the format versions that some modules look up
    complete.update(match.state)
    with raise_as_architecture_error(built.name):
        adopt_weights(network, match.state)
        network.load_state_dict(complete)  # before float(), which lazy layers do not know
        network.float()
    switch_to_eval(network)
    return Filled(built, match)


def fits_network(arch: str, num_classes: int | None, state: State) -> bool:
    """Whether the architecture takes the weights; what is wrong otherwise is not said."""
    try:
        first = _build_matching(arch, num_classes, state)[1][0]
    except UsageError:
        return False
    return not first.misfit


def _build_matching(arch: str, num_classes: int | None, state: State) -> tuple[Built, list[Match]]:
    """The architecture with as many classes as the weights have, and readings of their names."""
    built = build_network(arch, num_classes, state, fill=False)
    matches = match_names(built.network, state)
    if matches[0].misfit and (converted := convert_names(built.network, state)) is not None:
        matches = match_names(built.network, converted)
    if num_classes is None and (classes := matches[0].misfit.find_classes()):
        other = build_network(arch, classes, state, fill=False)
        others = match_names(other.network, state)
        if not others[0].misfit:
            return other, others
    return built, matches


def check_tied(network: nn.Module, weights: Mapping[str, Tensor], file: str) -> None:
    """Refuse tensors that differ where the network has one under both names; UsageError."""
    first: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name not in weights:
            continue
        other = first.setdefault(id(parameter), name)
        if other != name and not bool((weights[other] == weights[name]).all()):
            raise UsageError(
                f"the network has one tensor as {escape(other)} and {escape(name)}, which differ in"
                f" {file}: it is of a network that does not share them"
            )


def check_finite(weights: Mapping[str, Tensor], buffers: set[str], file: str) -> None:
    """Refuse weights that are not finite; UsageError."""
    for name, tensor in weights.items():
        masks = name in buffers and not name.endswith(STATISTICS)  # -inf, added to scores
        wrong = tensor.isnan() if masks else ~tensor.isfinite()
        if bool(wrong.any()):
            raise UsageError(
                f"tensor {escape(name)} in {file} contains NaN or infinity: the model would "
                "answer nothing"
            )


def check_floating(network: nn.Module, weights: Mapping[str, Tensor], file: str) -> None:
    """Refuse whole numbers in the place of weights, whose scale is not known; UsageError."""
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tensor = weights.get(name)
        if tensor is None or not parameter.is_floating_point() or tensor.is_floating_point():
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(
            f"tensor {escape(name)} in {file} is {kind} where the network has floating point:"
            " it is quantised, and what its numbers stand for is not said; save the state_dict() of"
            " the network in floating point"
        )
