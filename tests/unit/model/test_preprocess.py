"""Pixels against open_clip's own transform; formats, orientations, broken files."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from for_ray.errors import DataError
from for_ray.model.preprocess import decode, uncrop_boxes

MODES = ["squash", "shortest", "longest"]


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + seed), np.cos(7 * y), np.sin(11 * (x + y))], axis=-1)
    values = 127.5 + 100 * waves + 27 * (waves[..., ::-1] > 0.5)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def to_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def of_open_clip(
    image: Image.Image, size: int, mode: str, interpolation: str = "bicubic"
) -> NDArray[np.uint8]:
    config = PreprocessCfg(
        size=size, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    return np.round(image_transform_v2(config, is_train=False)(image).numpy() * 255).astype(np.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(301, 200), (200, 301), (96, 96), (31, 47), (640, 90), (1, 1), (97, 96)])
def test_pixels_are_open_clips(mode: str, size: tuple[int, int]) -> None:
    image = scene(*size)
    decoded = decode(to_bytes(image, "PNG"), image_size=96, resize_mode=mode)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    assert (decoded.width, decoded.height) == size
    np.testing.assert_array_equal(decoded.pixels, of_open_clip(image, 96, mode))


def test_the_filter_can_be_bilinear() -> None:
    image = scene(120, 80)
    pixels = decode(
        to_bytes(image, "PNG"), image_size=64, resize_mode="squash", interpolation="bilinear"
    ).pixels
    np.testing.assert_array_equal(pixels, of_open_clip(image, 64, "squash", "bilinear"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_stays_close(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = to_bytes(scene(1600, 900), "JPEG", quality=92, exif=exif)
    decoded = decode(raw, image_size=96, resize_mode=mode)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    assert (decoded.width, decoded.height) == whole.size
    difference = np.abs(decoded.pixels.astype(int) - of_open_clip(whole, 96, mode).astype(int))
    assert difference.mean() < 1.0
    assert np.quantile(difference, 0.99) <= 8


def test_a_jpeg_below_twice_the_size_is_exact() -> None:
    raw = to_bytes(scene(350, 250), "JPEG", quality=90)
    expected = of_open_clip(Image.open(io.BytesIO(raw)), 96, "squash")
    np.testing.assert_array_equal(decode(raw, image_size=96, resize_mode="squash").pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = to_bytes(scene(80, 50), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    decoded = decode(raw, image_size=64, resize_mode="longest")
    assert (decoded.width, decoded.height) == upright.size
    np.testing.assert_array_equal(decoded.pixels, of_open_clip(upright, 64, "longest"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_as_none() -> None:
    raw = to_bytes(scene(40, 40), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken")
    assert decode(raw, image_size=32, resize_mode="squash").width == 40


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_is_converted_as_open_clip_does(mode: str) -> None:
    image = scene(120, 80).convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    raw = to_bytes(image, kind)
    reopened = Image.open(io.BytesIO(raw)).convert("RGB")
    expected = of_open_clip(reopened, 64, "squash")
    np.testing.assert_array_equal(decode(raw, image_size=64, resize_mode="squash").pixels, expected)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = decode(to_bytes(Image.fromarray(ramp), "PNG"), image_size=64, resize_mode="squash").pixels
    for channel in pixels:
        np.testing.assert_allclose(channel, ramp / 257, atol=0.51)


def test_floating_point_grey_is_scaled_to_its_range() -> None:
    ramp = np.linspace(-3, 5, 32 * 32, dtype=np.float32).reshape(32, 32)
    pixels = decode(to_bytes(Image.fromarray(ramp), "TIFF"), image_size=32, resize_mode="squash").pixels
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_an_animation_is_its_first_frame() -> None:
    frames = [scene(60, 60, seed) for seed in range(3)]
    raw = to_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    expected = of_open_clip(frames[0], 32, "squash")
    np.testing.assert_array_equal(decode(raw, image_size=32, resize_mode="squash").pixels, expected)


@pytest.mark.parametrize("size", [(40_000, 2), (3, 30_000)])
@pytest.mark.parametrize("mode", MODES)
def test_a_strip_needs_no_memory(size: tuple[int, int], mode: str) -> None:
    raw = to_bytes(Image.new("RGB", size, (10, 200, 30)), "PNG")
    decoded = decode(raw, image_size=64, resize_mode=mode)
    assert decoded.pixels.shape == (3, 64, 64)
    assert decoded.pixels[:, 31, 31].tolist() == [10, 200, 30]


def test_a_bomb_is_refused_from_its_header() -> None:
    raw = to_bytes(Image.new("L", (5000, 4000)), "PNG")
    with pytest.raises(DataError, match="too many pixels: 5000×4000, at most 1000000"):
        decode(raw, image_size=64, resize_mode="squash", max_pixels=1_000_000)


def test_a_bomb_that_pillow_refuses_itself_is_a_data_error() -> None:
    raw = bytearray(to_bytes(Image.new("L", (8, 8)), "PNG"))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="too many pixels: more than"):
        decode(bytes(raw), image_size=64, resize_mode="squash", max_pixels=10**10)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!doctype html><p>gone", "not an image: begins with '<'"),
        (b"anything else", "not an image: begins with anything$"),
        (b"\x00\xff\x01" * 9, "not an image: begins with 0x00ff"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "HEIC"),
        (b"\x89PNG\r\n\x1a\nrubbish", "broken header: begins as PNG"),
        (to_bytes(scene(200, 200), "PNG")[:2000], "broken PNG: "),
        (to_bytes(scene(200, 200), "JPEG")[:1500], "broken JPEG: .*truncated"),
        (to_bytes(scene(20, 20), "PNG")[:20], "broken header"),
        (to_bytes(scene(90, 90), "GIF")[:1200], "broken GIF"),
    ],
)
def test_what_is_no_image_says_why(raw: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode(raw, image_size=64, resize_mode="squash")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_ends_in_pixels_or_a_data_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = to_bytes(scene(60, 40), kind)
        for _ in range(40):
            damaged = bytearray(whole)
            for position in rng.integers(0, len(whole), 4):
                damaged[position] = rng.integers(256)
            try:
                decoded = decode(bytes(damaged), image_size=32, resize_mode="longest")
            except DataError:
                continue
            assert decoded.pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(200, 100), (100, 230), (64, 64)])
def test_boxes_come_back_to_the_whole_image(mode: str, size: tuple[int, int]) -> None:
    """A white rectangle in the image, found in the pixels, comes back to where it was drawn."""
    width, height = size
    box = np.array([0.4, 0.45, 0.6, 0.65])
    canvas = np.zeros((height, width, 3), np.uint8)
    x0, x1 = (round(v * width) for v in box[[0, 2]])
    y0, y1 = (round(v * height) for v in box[[1, 3]])
    canvas[y0:y1, x0:x1] = 255
    raw = to_bytes(Image.fromarray(canvas), "PNG")
    pixels = decode(raw, image_size=64, resize_mode=mode).pixels[0] > 127
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32) / 64
    np.testing.assert_allclose(uncrop_boxes(found, width, height, resize_mode=mode), box, atol=0.035)


def test_boxes_of_many_images_at_once() -> None:
    boxes = np.random.default_rng(0).random((3, 5, 4)).astype(np.float32)
    widths, heights = np.array([100, 50, 80]), np.array([50, 90, 80])
    for mode in MODES:
        together = uncrop_boxes(boxes, widths, heights, resize_mode=mode)
        for image in range(3):
            alone = uncrop_boxes(boxes[image], widths[image], heights[image], resize_mode=mode)
            np.testing.assert_allclose(together[image], alone)
    assert uncrop_boxes(np.zeros((0, 5, 4), np.float32), [], [], resize_mode="longest").shape == (0, 5, 4)
