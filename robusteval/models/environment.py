"""The libraries and the machine that numbers depend on."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from robusteval import __version__


def versions() -> dict[str, str]:
    """The libraries that numbers depend on."""
    names = {
        "torch": "torch",
        "torchvision": "torchvision",
        "art": "adversarial-robustness-toolbox",
        "numpy": "numpy",
        "pillow": "pillow",
    }
    found = {name: metadata.version(package) for name, package in names.items()}
    return {"robusteval": __version__, **found}


def environment(device: torch.device) -> dict[str, str]:
    """Where a run was made, without names of machines or people."""
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
