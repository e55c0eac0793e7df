"""Text that a spreadsheet shows and does not calculate."""

from __future__ import annotations

# what a spreadsheet takes for a formula, also as a full-width character; tab and carriage
# return hide one
ACTIVE = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def defuse_formula(text: str) -> str:
    """The text, behind an apostrophe where a spreadsheet would calculate it."""
    return f"'{text}" if text.lstrip(" ").startswith(ACTIVE) else text
