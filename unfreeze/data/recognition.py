"""Recognise files that Pillow cannot read as images, and say what to do about them."""

from typing import BinaryIO

from PIL import Image, TiffImagePlugin

HEAD = 4096
"""Bytes of a file that are looked at."""
LFS = b"version https://git-lfs.github.com/spec/"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BITS, BANDS = 258, 277
"""TIFF tags BitsPerSample and SamplesPerPixel."""
# fmt: off
BEGINNINGS = (
    (LFS, "a Git LFS pointer in its place; fetch the images with `git lfs pull`"),
    (b"\xff\x0a", "JPEG XL; convert it to PNG or JPEG (djxl)"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL; convert it to PNG or JPEG (djxl)"),
    (b"%PDF", "a PDF; export its pages as PNG"),
    (b"SIMPLE  =", "FITS; convert it to 16-bit PNG or TIFF"),
    (b"\x89HDF", "HDF5; export its images as PNG"),
    (b"\x93NUMPY", "an array of NumPy; save it as PNG or TIFF"),
    (b"PK\x03\x04", "an archive (zip); unpack it"),
    (b"\x1f\x8b", "packed (gzip); unpack it"),
    (b"\x1aE\xdf\xa3", "a video; extract its frames"),
)
"""First bytes of other files that are found among images, and what the files are."""
# fmt: on


def recognised(stream: BinaryIO) -> str:
    """What a file is and what to do about it, in a few words; empty if it is not recognised.

    Args:
        stream: the file, at any position.
    """
    stream.seek(0)
    head = stream.read(HEAD)
    for beginning, what in BEGINNINGS:
        if head.startswith(beginning):
            return what
    if head[128:132] == b"DICM":
        return "DICOM; convert it to 16-bit PNG or TIFF"
    if head[4:8] == b"ftyp":
        return _in_boxes(head)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(stream)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text:
        return "SVG, a drawing; export it as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, perhaps of a download that failed"
    return ""


def _in_boxes(head: bytes) -> str:
    """What a file in the ISO base media file format (``ftyp`` box) is: an image, or a video."""
    size = int.from_bytes(head[:4])
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))}
    if brands & set(HEIF_BRANDS):
        return (
            "HEIC that is damaged"
            if "HEIF" in Image.OPEN
            else "HEIC; install its reader with `pip install pillow-heif`"
        )
    return "AVIF that is damaged" if b"avif" in brands else "a video; extract its frames"


def _tiff(stream: BinaryIO) -> str:
    """Why Pillow cannot read a TIFF: usually because of its number of bands, or of bits per band."""
    stream.seek(0)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(tags.next)
        tags.load(stream)
        bands, bits = int(tags[BANDS]), tags[BITS]
    except Exception:  # whatever is wrong in it
        return "a TIFF that is damaged"
    kind = f"a TIFF of {bands} band{'s' * (bands != 1)} of {'/'.join(map(str, sorted(set(bits))))} bits"
    return f"{kind}; save one band, or three as 8-bit RGB"
