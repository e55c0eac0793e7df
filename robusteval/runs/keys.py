"""The name of a cell: a hash of everything that its numbers depend on.

A record says what its cells are hashes of, so that a cell of another run is known by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robusteval.runs.storage import digest
from robusteval.runs.types import TRANSFER, Spec

BASIS = ("model", "data", "samples", "seed", "versions", "device")  # of every number
QUALITY = 32  # images on which maps are held against chance


def select_basis(config: Mapping[str, Any]) -> dict[str, Any]:
    """Select what every cell's numbers depend on."""
    return {name: config.get(name) for name in BASIS}


def hash_clean(config: Mapping[str, Any], defense: Any = None) -> str:
    """Hash what the numbers of clean images depend on.

    Parameters
    ----------
    config : mapping
        What the run was asked for, JSON-able.
    defense : JSON-able, optional
        Identity of the defense that they are behind.
    """
    role = "clean" if defense is None else "defense"
    # of the images as they are alone: a slice that was changed by hand is noticed
    slices = config.get("slices") if defense is None else None
    known = {"slices": slices} if slices else {}
    return digest({"role": role, "basis": select_basis(config), **name_defense(defense), **known})


def hash_quality(config: Mapping[str, Any], images: int = QUALITY) -> str:
    """Hash what the numbers on the worth of maps depend on."""
    facts = {"role": "quality", "maps": config.get("maps"), "images": images}
    return digest({**facts, "basis": select_basis(config)})


def hash_attack(
    config: Mapping[str, Any],
    role: str,
    spec: Spec,
    resolved: Mapping[str, Any],
    defense: Any = None,
    *,
    maps: bool = False,
) -> str:
    """Hash what the numbers of an attack depend on; `maps` says whether they tell of maps too.

    `resolved` are its parameters with all defaults; the others are as for `hash_clean`.
    """
    facts = {
        "role": role,
        "attack": spec.name,
        "resolved": resolved or spec.parameters,
        "basis": select_basis(config),
        **name_defense(defense),
        **({"maps": config.get("maps")} if maps else {}),
        **({"shortcuts": config["shortcuts"]} if config.get("shortcuts") else {}),
    }
    return digest(facts)


def hash_oblivious(key: str, defense: Any) -> str:
    """Hash what the numbers of an attack depend on that is judged behind a defense as well.

    `key` is that of the attack on the model as it is.
    """
    return digest({"oblivious": key, **name_defense(defense)})


def name_defense(defense: Any) -> dict[str, Any]:
    """What a cell's numbers depend on because of a defense; nothing without one."""
    return {} if defense is None else {"defense": defense}


def list_keys(config: Mapping[str, Any], cell: Mapping[str, Any]) -> set[str]:
    """List the keys that a cell of a record may have.

    There are two of an attack, as the record does not say whether the network could have maps.

    Parameters
    ----------
    config : mapping
        What the run was asked for.
    cell : mapping
        The entry of the cell: its role, attack, parameters and defense.

    Raises
    ------
    KeyError, TypeError, ValueError
        It is none.
    """
    role = cell["role"]
    spec = Spec(**cell["defense"]) if cell.get("defense") else None
    defense = None if spec is None else find_identity(config, spec)
    if role in ("clean", "defense", "receiver"):
        return {hash_clean(config, defense)}
    if role == "quality":
        return {hash_quality(config)}
    attack = Spec(**cell["attack"])
    oblivious = spec is not None and not cell.get("adaptive", True)
    knows = None if oblivious else defense
    keys = {
        hash_attack(
            config,
            "attack" if role == TRANSFER else role,
            attack,
            cell["resolved"],
            knows,
            maps=maps,
        )
        for maps in (False, True)
    }
    return {hash_oblivious(key, defense) for key in keys} if oblivious else keys


def find_identity(config: Mapping[str, Any], spec: Spec) -> Any:
    """Find what identifies a defense or receiver of a run; its name where no record says."""
    found: dict[str, Any] = {}
    for names, known in (("defenses", "shields"), ("receivers", "receiving")):
        found |= dict(zip(config.get(names) or [], config.get(known) or [], strict=False))
    return found.get(str(spec), str(spec))
