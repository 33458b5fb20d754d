"""Remove text chunks from PNG files: Pillow refuses an image with large ones, which do not affect its pixels."""

import io
import struct
from typing import BinaryIO

TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks with text (an editor's history, a workflow, XMP), and with the colour profile, which is not applied."""
REFUSED = "PngImagePlugin.MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"
"""Ends of Pillow's messages about a text of more than 1 MB when unpacked, and about more than 64 MB of texts in all."""


def is_refused_for_its_texts(error: Exception) -> bool:
    """Whether this is what Pillow raises for a PNG with large texts."""
    return isinstance(error, ValueError) and str(error).endswith(REFUSED)


def without_texts(stream: BinaryIO) -> io.BytesIO:
    """A PNG file without the chunks `TEXTS`; nothing in them is unpacked."""
    stream.seek(0)
    content = memoryview(stream.read())
    kept, at = io.BytesIO(), 8
    kept.write(content[:at])
    while at < len(content):
        length, kind = struct.unpack(">I4s", bytes(content[at : at + 8]).ljust(8, b"\0"))
        if kind not in TEXTS:
            kept.write(content[at : at + 12 + length])
        at += 12 + length
    kept.seek(0)
    return kept
