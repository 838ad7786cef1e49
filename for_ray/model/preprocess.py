"""From the bytes of an image file to the model's uint8 pixels, exactly as open_clip does it.

Order: first frame, RGB, EXIF orientation, resize (antialiased), crop or pad. The RGB conversion comes first,
as in open_clip's own loader of training images (`pilrgb`), so that palettes are not resized as indices.
Alpha is dropped (`convert("RGB")`, open_clip's way) and colour profiles are ignored, as open_clip's images in
training were; 16-bit and floating-point greys are scaled to 8 bits instead of clipped. JPEGs are decoded at
1/2, 1/4 or 1/8 of their size where at least twice the wanted size remains; all other formats give open_clip's
pixels to the last bit.

Only the formats in `FORMATS` are opened: others have decoders that run other programs, or sizes that no
header tells. HEIC needs the package pillow-heif, which is used where it is installed.
"""

from __future__ import annotations

import importlib
import io
import struct
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError, features

from for_ray.errors import DataError

ResizeMode = Literal["squash", "shortest", "longest"]
Interpolation = Literal["bicubic", "bilinear"]

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded, in Pillow's names (JPEG opens MPO too); HEIF where pillow-heif is installed."""

DEFAULT_MAX_PIXELS = 89_478_485
"""A quarter of a GiB of RGB, where Pillow begins to warn; Pillow itself refuses twice as many."""

_SPARE = 2
"""A JPEG is decoded to no less than this multiple of the wanted size: below it, the loss shows."""

_MAX_ASPECT = 8
"""Beyond this aspect `shortest` cuts the sides off before it resizes: they would be cropped anyway."""

_DRAFTED = ("JPEG", "MPO")
"""Formats that can be decoded small. Phones write MPO: a JPEG with more behind it."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112

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


class Decoded(NamedTuple):
    """One decoded image: pixels [3, H, W] uint8 RGB; width and height of the whole image as it is shown."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def decode(
    raw: bytes,
    *,
    image_size: int,
    resize_mode: ResizeMode,
    interpolation: Interpolation = "bicubic",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Decoded:
    """Decode an image file to [3, image_size, image_size] uint8.

    Args:
        raw: The file, in one of `FORMATS`; of an animation or of several pages the first one.
        image_size: Side of the model's square input, in pixels.
        resize_mode: `squash` resizes both sides to `image_size`; `shortest` resizes the shorter side to it
            and crops the middle; `longest` resizes the longer side to it and pads the rest with black.
        interpolation: The filter of the resize; always antialiased.
        max_pixels: Width times height that is accepted; checked from the header, before decoding.

    Raises:
        DataError: The file is empty, not an image, too large, truncated or broken; the message is the cause
            alone, without the file's name.
    """
    image = _open(raw, max_pixels)
    try:
        if image.format not in _DRAFTED:
            image.load()  # a PNG's EXIF may lie behind its pixels, and Pillow turns a TIFF while it loads it
        orientation = _orientation(image)
        is_turned = orientation >= 5
        width, height = image.size[::-1] if is_turned else image.size
        target = _resized_size(width, height, image_size, resize_mode)
        _draft(image, target[::-1] if is_turned else target)
        shown = to_rgb(image)
        if orientation in _TRANSPOSITIONS:
            shown = shown.transpose(_TRANSPOSITIONS[orientation])
    except Exception as error:  # Pillow's decoders raise anything on broken files
        raise DataError(_broken(image, error)) from error
    pixels = fit(shown, target, image_size, interpolation=interpolation)
    return Decoded(pixels, width, height)


def decode_image(
    image: Image.Image, *, image_size: int, resize_mode: ResizeMode, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """The pixels [3, image_size, image_size] uint8 of an image that is already open; EXIF is honoured."""
    shown = to_rgb(image)
    orientation = _orientation(image)
    if orientation in _TRANSPOSITIONS:
        shown = shown.transpose(_TRANSPOSITIONS[orientation])
    target = _resized_size(*shown.size, image_size, resize_mode)
    return fit(shown, target, image_size, interpolation=interpolation)


def uncrop_boxes(
    boxes: NDArray[np.float32], width: ArrayLike, height: ArrayLike, *, resize_mode: ResizeMode
) -> NDArray[np.float32]:
    """Boxes of the model's input as boxes of the whole image; exact up to the rounding of the resize.

    Args:
        boxes: [n, ..., 4] or [4], x0, y0, x1, y1 as fractions of the model's input.
        width: Of the whole image as `Decoded` gives it: one number, or one an image [n].
        height: Likewise.
        resize_mode: As it was given to `decode`.

    Returns:
        Same shape, as fractions of the whole image's width and height, float32, within 0..1.
    """
    boxes = np.asarray(boxes, np.float64)
    sides = np.stack([np.asarray(width, np.float64), np.asarray(height, np.float64)], axis=-1)
    if resize_mode == "squash":
        shown = np.ones_like(sides)
    else:
        whole = sides.min(axis=-1) if resize_mode == "shortest" else sides.max(axis=-1)
        shown = (
            whole[..., None] / sides
        )  # what the input shows, as a fraction of each side; 1 and more is padded
    shown = shown.reshape(*shown.shape[:-1], *(1,) * (boxes.ndim - shown.ndim), 2)
    low, high = (0.5 + (corner - 0.5) * shown for corner in (boxes[..., :2], boxes[..., 2:]))
    return np.asarray(np.clip(np.concatenate([low, high], axis=-1), 0.0, 1.0), np.float32)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, decoded; high-depth greys are scaled to 8 bits, alpha is dropped."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    return image.convert("RGB")


def fit(
    image: Image.Image, target: tuple[int, int], image_size: int, *, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """Resize RGB to `target` (width, height), crop or pad the middle; uint8 [3, image_size, image_size]."""
    image, target = _cut_far_sides(image, target, image_size)
    resized = image.resize(target, _RESAMPLING[interpolation])
    if target != (image_size, image_size):
        left, top = (_offset(side, image_size) for side in target)
        # Outside of the image, `crop` is black: this is the padding of `longest` too.
        resized = resized.crop((left, top, left + image_size, top + image_size))
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))  # [H, W, 3] -> [3, H, W]


def _open(raw: bytes, max_pixels: int) -> Image.Image:
    if not raw:
        raise DataError("the file is empty")
    try:
        image = Image.open(io.BytesIO(raw), formats=_formats(raw))
    except UnidentifiedImageError as error:
        raise DataError(_unidentified(raw)) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"too many pixels: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}") from error
    except Exception as error:  # a broken header can raise anything
        raise DataError(_unreadable(_is_cut(raw), _reason(error))) from error
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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF block is broken, as viewers do."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _resized_size(width: int, height: int, image_size: int, resize_mode: str) -> tuple[int, int]:
    """Width and height after the resize, before crop or pad; torchvision's and timm's rounding."""
    if resize_mode == "squash":
        return image_size, image_size
    if resize_mode == "shortest":
        if width <= height:
            return image_size, int(image_size * height / width)
        return int(image_size * width / height), image_size
    ratio = max(width, height) / image_size
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _offset(side: int, image_size: int) -> int:
    """Where the input begins on the resized side; negative where it is padded; open_clip's rounding."""
    return -((image_size - side) // 2) if side < image_size else round((side - image_size) / 2)


def _draft(image: Image.Image, target: tuple[int, int]) -> None:
    if image.format in _DRAFTED:
        image.draft(None, (_SPARE * target[0], _SPARE * target[1]))


def _cut_far_sides(
    image: Image.Image, target: tuple[int, int], image_size: int
) -> tuple[Image.Image, tuple[int, int]]:
    """Keep the middle of an extreme strip: resized whole, its long side could need gigabytes."""
    if max(target) <= _MAX_ASPECT * image_size:
        return image, target
    width, height = image.size
    keep = _MAX_ASPECT * min(width, height)
    if width > height:
        left = (width - keep) // 2
        return image.crop((left, 0, left + keep, height)), (_MAX_ASPECT * image_size, image_size)
    top = (height - keep) // 2
    return image.crop((0, top, width, top + keep)), (image_size, _MAX_ASPECT * image_size)


def _to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Greys [H, W] of any depth -> uint8: 16-bit by their full range, others by the range they use."""
    if values.dtype == np.uint8 or values.dtype == np.bool_:
        return values.astype(np.uint8)
    grey = values.astype(np.float64)
    finite = grey[np.isfinite(grey)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
    if values.dtype.str[1:] == "u2" or (values.dtype.kind == "i" and low >= 0 and high <= 65535):
        return np.round(grey / 257).astype(np.uint8)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.round((grey - low) * (255 / (high - low))).astype(np.uint8)


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


def _broken(image: Image.Image, error: Exception) -> str:
    return f"broken {image.format or 'image'}: {_reason(error)}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:_REASON_LENGTH]
    return text if text and text.isprintable() else repr(text)[1:-1] or type(error).__name__
