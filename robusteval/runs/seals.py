"""What an archive of arrays says of itself: which result it is, and a hash of its bytes.

A seal stands in the comment of the zip file, where nothing that reads arrays minds it. It shows
that a file was changed by accident or put under another name; whoever changes a file on purpose
can seal it anew.
"""

from __future__ import annotations

import hashlib
from io import SEEK_END, BytesIO

WORD = b"robusteval seal "
EMPTY = b"\x00\x00"  # length of a comment that is not there, at the very end of the file


def seal(archive: BytesIO, key: str) -> None:
    """Seal an archive for this key, in ASCII, where it is; one without a comment is expected."""
    with archive.getbuffer() as content:
        comment = build_seal(content, key)
    archive.seek(-len(EMPTY), SEEK_END)
    archive.write(len(comment).to_bytes(2, "little") + comment)


def build_seal(content: bytes | memoryview, key: str) -> bytes:
    """The comment that seals an archive, whose end is that of one without a comment."""
    digest = hashlib.sha256(content[: -len(EMPTY)])
    digest.update(EMPTY)
    return WORD + f"{key} {digest.hexdigest()}".encode()


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
    # a view: of a million images the bytes are too many to be copied
    if content[place:] != build_seal(memoryview(content)[:place], key):
        raise ValueError("it was changed, or belongs elsewhere")
