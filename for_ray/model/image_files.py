"""Image files: which formats are read, how large they may be, and why a file is not one of them.

Only the formats in `FORMATS` are opened: others have decoders that run other programs, or sizes that no
header tells. HEIC needs the package pillow-heif, which is used where it is installed.
"""

from __future__ import annotations

import importlib
import io

from PIL import Image, UnidentifiedImageError, features

from for_ray.errors import DataError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded, in Pillow's names (JPEG opens MPO too); HEIF where pillow-heif is installed."""

_SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}

_FOREIGN = {
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "ICO",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"PK\3\4": "ZIP",
    b"\x1f\x8b": "gzip",
}

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}
)

_CONVERT = "convert it to JPEG, PNG or WebP"

_REASON_LENGTH = 200
"""Of what a decoder says, in characters: some quote the file."""


def open_image(raw: bytes, *, max_pixels: int) -> Image.Image:
    """The image, its header read and nothing decoded yet.

    Args:
        raw: The file.
        max_pixels: Width times height that is accepted.

    Raises:
        DataError: It is empty, not an image, of a format that is not read, too large, or its header is
            broken; the message is the cause alone.
    """
    if not raw:
        raise DataError("the file is empty")
    try:
        image = Image.open(io.BytesIO(raw), formats=_formats(raw))
    except UnidentifiedImageError as error:
        raise DataError(_unidentified(raw)) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"too many pixels: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}") from error
    except Exception as error:  # a broken header can raise anything
        raise DataError(_unreadable(_is_cut(raw), reason_of(error))) from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"too many pixels: {width}×{height}, at most {max_pixels} are accepted")
    return image


def _formats(raw: bytes) -> tuple[str, ...]:
    return (*FORMATS, "HEIF") if _brands(raw) & _HEIF_BRANDS and _has_heif() else FORMATS


def _has_heif() -> bool:
    """Whether pillow-heif is installed; it is known to Pillow from then on."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError:
        return False
    return True


def _brands(raw: bytes) -> frozenset[bytes]:
    """The major and the compatible brands of a file of the ISO base media family: AVIF, HEIC, videos."""
    if raw[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(raw[:4], "big"), 256)
    return frozenset([raw[8:12], *(raw[start : start + 4] for start in range(16, end, 4))])


def reason_of(error: Exception) -> str:
    """What a decoder says, in one short line that can be printed."""
    text = " ".join(str(error).split())[:_REASON_LENGTH]
    return text if text and text.isprintable() else repr(text)[1:-1] or type(error).__name__


def _unidentified(raw: bytes) -> str:
    """What Pillow doesn't open: a broken header of a known format, another format, or no image at all."""
    if raw[4:8] == b"ftyp":
        return _unidentified_media(raw)
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return _unreadable(_is_cut(raw), _begins_as("WebP"))
    if kind := _kind(raw, _SIGNATURES):
        return _unreadable(False, _begins_as(kind))
    if kind := _kind(raw, _FOREIGN):
        return _foreign(kind)
    if raw.count(0) == len(raw):
        return "not an image: nothing but zero bytes"
    head = raw[:80].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"<"):
        return "not an image: begins with '<' (HTML, XML or SVG)"
    if head.startswith((b"{", b"[")):
        return f"not an image: begins with '{head[:1].decode()}' (JSON)"
    text = raw[:8].decode("ascii", "replace")
    is_text = text.isascii() and text.isprintable()
    return f"not an image: begins with {text if is_text else '0x' + raw[:8].hex()}"


def _unidentified_media(raw: bytes) -> str:
    brands = _brands(raw)
    if brands & _AVIF_BRANDS:
        if features.check("avif"):
            return _unreadable(_is_cut(raw), _begins_as("AVIF"))
        return "AVIF cannot be read here: install a Pillow of 11.3 or later that has AVIF, on all nodes"
    if brands & _HEIF_BRANDS:
        if _has_heif():
            return _unreadable(_is_cut(raw), _begins_as("HEIC"))
        return "HEIC cannot be read here: install the package pillow-heif, on all nodes"
    return f"a video or other media (brand {raw[8:12]!r}) is not read here: {_CONVERT}"


def _kind(raw: bytes, signatures: dict[bytes, str]) -> str | None:
    return next((kind for signature, kind in signatures.items() if raw.startswith(signature)), None)


def _is_cut(raw: bytes) -> bool:
    """Whether a file of a family that tells its length (RIFF, ISO base media) is shorter than it says."""
    if raw[:4] == b"RIFF":
        return 8 + int.from_bytes(raw[4:8], "little") > len(raw)
    end = 0
    while raw[4:8] == b"ftyp" and (size := int.from_bytes(raw[end : end + 4], "big")) >= 8:
        end += size  # of one box; 0 and 1 stand for sizes that are told elsewhere
    return end > len(raw)


def _begins_as(kind: str) -> str:
    return f"begins as {kind}, but Pillow can't read on"


def _unreadable(is_cut: bool, reason: str) -> str:
    return f"the file is truncated: {reason}" if is_cut else f"broken header: {reason}"


def _foreign(kind: str) -> str:
    return f"the format {kind} is not read here: {_CONVERT}"
