"""From the bytes of an image file to the model's uint8 pixels, exactly as open_clip does it.

Order: first frame, RGB, EXIF orientation, resize (antialiased), crop or pad. The RGB conversion comes first,
as in open_clip's own loader of training images (`pilrgb`), so that palettes are not resized as indices.
Alpha is dropped (`convert("RGB")`, open_clip's way) and colour profiles are ignored, as open_clip's images in
training were; 16-bit and floating-point greys are scaled to 8 bits instead of clipped. JPEGs are decoded at
1/2, 1/4 or 1/8 of their size where at least twice the wanted size remains; all other formats give open_clip's
pixels to the last bit.

Which files are images at all, `image_files.py` knows.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from for_ray.errors import DataError
from for_ray.model.image_files import open_image, reason_of

ResizeMode = Literal["squash", "shortest", "longest"]
Interpolation = Literal["bicubic", "bilinear"]

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
        raw: The file, in one of `image_files.FORMATS`; of an animation or of several pages the first one.
        image_size: Side of the model's square input, in pixels.
        resize_mode: `squash` resizes both sides to `image_size`; `shortest` resizes the shorter side to it
            and crops the middle; `longest` resizes the longer side to it and pads the rest with black.
        interpolation: The filter of the resize; always antialiased.
        max_pixels: Width times height that is accepted; checked from the header, before decoding.

    Raises:
        DataError: The file is empty, not an image, too large, truncated or broken; the message is the cause
            alone, without the file's name.
    """
    image = open_image(raw, max_pixels=max_pixels)
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
        raise DataError(f"broken {image.format or 'image'}: {reason_of(error)}") from error
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
