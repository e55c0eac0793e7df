"""What an exception says of a user's own code: type, message, file and line, and what to do."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from types import FrameType


def describe_exception(error: BaseException) -> str:
    """An exception as its type, its message and, if a user's own code raised it, file and line.

    The line is the last one that was executed outside of robusteval, the standard library and
    installed packages.
    """
    text = " ".join(str(error).split())[:300].removesuffix(".")
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = locate_in_user_code(error)
    return f"{said}, in {place}" if place else said


def locate_in_user_code(error: BaseException) -> str:
    """File and line of a user's own code that an exception came through last; empty if none."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if is_user_code(trace.tb_frame):
            name = trace.tb_frame.f_code.co_filename
            found = f"{Path(name).name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def is_user_code(frame: FrameType) -> bool:
    """Whether a frame is of code that is neither ours nor installed."""
    name = frame.f_code.co_filename
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == "robusteval"
    if ours or name.startswith("<"):
        return not ours and name in ("<stdin>", "<string>")
    path = Path(name)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not path.is_relative_to(sysconfig.get_path("stdlib"))


def suggest_image_shape(error: BaseException | None) -> str:
    """What to do about images that a network cannot take, as the end of a sentence.

    Empty where the error does not sound as if the shape of the images were the matter.
    """
    if not isinstance(error, RuntimeError | ValueError | AssertionError):
        return ""
    text = str(error)
    if re.search(r"\bchannels?\b", text):
        return ": give images with as many channels as it takes"
    if re.search(r"size|shape|dimension|mat1|height|width|padd|pixel", text, re.IGNORECASE):
        return ": bring them to another size with --size"
    return ""
