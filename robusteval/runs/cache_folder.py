"""Where what can be made again is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's caches belong, or what ``ROBUSTEVAL_CACHE`` says."""
    if chosen := os.environ.get("ROBUSTEVAL_CACHE"):
        return Path(chosen).expanduser()
    home = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(home) or Path.home() / ".cache") / "robusteval"
