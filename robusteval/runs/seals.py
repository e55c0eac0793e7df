"""What an archive of arrays says of itself: which result it is, and a hash of its bytes.

A seal stands in the comment of the zip file, where nothing that reads arrays minds it. It shows
that a file was changed by accident or put under another name; whoever changes a file on purpose
can seal it anew.
"""

from __future__ import annotations

import hashlib

WORD = b"robusteval seal "
EMPTY = b"\x00\x00"  # length of a comment that is not there, at the very end of the file


def seal(content: bytes, key: str) -> bytes:
    """The archive with a seal for this key, in ASCII; one without a comment is expected."""
    comment = build_seal(content, key)
    return content.removesuffix(EMPTY) + len(comment).to_bytes(2, "little") + comment


def build_seal(content: bytes, key: str) -> bytes:
    """The comment that seals these bytes under this key."""
    return WORD + f"{key} {hashlib.sha256(content).hexdigest()}".encode()


def check_seal(content: bytes, key: str, *, needed: bool = True) -> None:
    """Whether this is the archive that was sealed under this key, byte for byte.

    Archives of version 0.1.0 have no seal, and pass unless one is `needed`. Raises ValueError with
    what is wrong, in a few words.
    """
    place = content.rfind(WORD)
    if place < 2:
        if needed:
            raise ValueError("it has no seal")
        return
    if content[place:] != build_seal(content[: place - 2] + EMPTY, key):
        raise ValueError("it was changed, or belongs elsewhere")
