"""Files as buckets hold them: every kind of image, and what only looks like one.

`make_kinds()` draws them; nothing of it lies in the repository. What is an image comes with a *reference*:
the upright RGB picture that a plain decode gives (Pillow: open, `exif_transpose`, `convert("RGB")`), or numpy
arithmetic where Pillow clips; and with what was *drawn*, which knows nothing of any decoder.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

LOSSLESS, LOSSY = 0.0, 6.0
"""Mean distance, in levels of 255, that a coding may put between what was drawn and what is decoded."""

SIZE = (72, 48)


class Kind(NamedTuple):
    """One file.

    Attributes:
        name: Of the file; its suffix is one that is listed.
        raw: Its bytes.
        cause: A regular expression that finds the reason of its quarantine; None: it is encoded.
        reference: The picture [H, W, 3], uint8, upright, of an image that is encoded.
        drawn: What was drawn, likewise; within `tolerance` of the reference.
        tolerance: Mean distance in levels.
    """

    name: str
    raw: bytes
    cause: str | None = None
    reference: NDArray[np.uint8] | None = None
    drawn: NDArray[np.uint8] | None = None
    tolerance: float = LOSSLESS


@cache
def make_kinds() -> tuple[Kind, ...]:
    """All kinds; pillow-heif must be installed to draw the HEIC ones."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    good = [*_pngs(), *_jpegs(), *_turned(), *_animated(), *_tiffs(), *_others(), *_odd_sizes()]
    bad = [*_no_images(), *_foreign(), *_cut(), *_broken(), *_bombs()]
    return (*good, *bad)


def good_kinds() -> list[Kind]:
    """Those that are encoded."""
    return [kind for kind in make_kinds() if kind.cause is None]


def bad_kinds() -> list[Kind]:
    """Those that are quarantined."""
    return [kind for kind in make_kinds() if kind.cause is not None]


# Drawing


def picture(width: int = SIZE[0], height: int = SIZE[1], *, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours, others in each corner and for each seed: no turn or flip goes unseen; [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    channels = [np.sin(3 * x + seed), np.cos(4 * y + 2 * seed), np.sin(3 * x + 2 * y - seed)]
    return np.round(127.5 + 110 * np.stack(channels, axis=-1)).astype(np.uint8)


def saved(image: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    """The image as a file in one of Pillow's formats."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(raw: bytes) -> NDArray[np.uint8]:
    """A plain decode: first frame, upright, RGB; [H, W, 3]."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))


def plain_pixels(image: NDArray[np.uint8], side: int, resize_mode: str) -> NDArray[np.uint8]:
    """An upright RGB picture [H, W, 3] as a model's input [3, side, side], by open_clip's own transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    height, width = image.shape[:2]
    if resize_mode == "longest" and side * min(height, width) < max(height, width):
        return _line_pixels(image, side)
    config = PreprocessCfg(size=side, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode)
    transform = image_transform_v2(config, is_train=False)
    return np.round(transform(Image.fromarray(image)).numpy() * 255).astype(np.uint8)


def _line_pixels(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A strip that open_clip refuses, since less than a pixel is left of its shorter side: one pixel is."""
    height, width = image.shape[:2]
    middle = slice((side - 1) // 2, (side - 1) // 2 + 1)
    place = (middle, slice(None)) if width > height else (slice(None), middle)
    pixels = np.zeros((side, side, 3), np.uint8)
    line = Image.fromarray(image).resize(pixels[place].shape[1::-1], Image.Resampling.BICUBIC)
    pixels[place] = np.asarray(line)
    return pixels.transpose(2, 0, 1)


def _kind(name: str, raw: bytes, drawn: NDArray[np.uint8] | None = None, tolerance: float = LOSSLESS) -> Kind:
    """An image that Pillow decodes rightly by itself; `picture()` was drawn where nothing else is said."""
    drawn = picture() if drawn is None else drawn
    return Kind(name, raw, reference=plain(raw), drawn=drawn, tolerance=tolerance)


def _grey(drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One channel [H, W] as three."""
    return np.repeat(drawn[..., None], 3, axis=-1)


def png_chunk(name: bytes, content: bytes, *, crc: int | None = None) -> bytes:
    """One chunk of a PNG, with its own checksum or a wrong one."""
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def make_png(
    width: int,
    height: int,
    *,
    depth: int,
    colour: int,
    rows: bytes,
    extra: bytes = b"",
    crc: int | None = None,
) -> bytes:
    """A PNG from its parts; `colour` 0 is grey, 2 RGB; `rows` are packed and begin with their filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows), crc=crc)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + pixels + png_chunk(b"IEND", b"")


def _rows_16(values: NDArray[np.uint16]) -> bytes:
    big = values.astype(">u2").reshape(len(values), -1)
    return b"".join(b"\0" + row.tobytes() for row in big)


# Images that are encoded


def _pngs() -> Iterator[Kind]:
    drawn = picture()
    image = Image.fromarray(drawn)
    yield _kind("rgb.png", saved(image, "PNG"))
    yield _kind("png-named.jpg", saved(image, "PNG"))
    alpha = Image.fromarray(drawn[..., 0])
    yield _kind("rgba.png", saved(Image.merge("RGBA", (*image.split(), alpha)), "PNG"))
    grey = Image.fromarray(drawn[..., 1])
    yield _kind("grey.png", saved(grey, "PNG"), _grey(drawn[..., 1]))
    yield _kind("grey-alpha.png", saved(Image.merge("LA", (grey, alpha)), "PNG"), _grey(drawn[..., 1]))
    palette = image.quantize(128)
    yield _kind("palette.png", saved(palette, "PNG"), tolerance=LOSSY)
    yield _kind("palette-alpha.png", saved(palette, "PNG", transparency=bytes(range(128))), tolerance=LOSSY)
    yield _kind("palette-one-clear.png", saved(palette, "PNG", transparency=3), tolerance=LOSSY)
    is_white = drawn[..., 0] > 127
    yield _kind("bit.png", saved(Image.fromarray(is_white), "PNG"), _grey(np.uint8(255) * is_white))
    yield from _deep_pngs(drawn)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2_000_000)
    yield _kind("long-text.png", saved(image, "PNG", pnginfo=text))
    rows = b"".join(b"\0" + row.tobytes() for row in drawn)
    yield _kind("pixels-crc.png", make_png(*SIZE, depth=8, colour=2, rows=rows, crc=0))


def _deep_pngs(drawn: NDArray[np.uint8]) -> Iterator[Kind]:
    deep = (drawn[..., 0].astype(np.uint16) * 257) ^ 1
    grey = _grey(np.round(deep / 257).astype(np.uint8))
    raw = make_png(*SIZE, depth=16, colour=0, rows=_rows_16(deep))
    yield Kind("grey-16.png", raw, reference=grey, drawn=_grey(drawn[..., 0]))
    colours = make_png(*SIZE, depth=16, colour=2, rows=_rows_16(drawn.astype(np.uint16) * 257))
    yield _kind("rgb-16.png", colours)


def _jpegs() -> Iterator[Kind]:
    drawn = picture()
    image = Image.fromarray(drawn)
    raw = saved(image, "JPEG", quality=90)
    yield _kind("rgb.jpg", raw, tolerance=LOSSY)
    yield _kind("jpeg-named.png", raw, tolerance=LOSSY)
    yield _kind("UPPER.JPG", raw, tolerance=LOSSY)
    yield _kind("progressive.jpg", saved(image, "JPEG", progressive=True), tolerance=LOSSY)
    yield _kind("stored-as-rgb.jpg", saved(image, "JPEG", keep_rgb=True, quality=90), tolerance=LOSSY)
    grey = saved(Image.fromarray(drawn[..., 1]), "JPEG", quality=90)
    yield _kind("grey.jpg", grey, _grey(drawn[..., 1]), LOSSY)
    yield _kind("with-garbage-behind.jpg", raw + b"\0garbage\xff" * 99, tolerance=LOSSY)
    yield _kind("broken-exif.jpg", _with_broken_exif(image), tolerance=LOSSY)
    yield _kind(
        "profile.jpg", saved(image, "JPEG", quality=90, icc_profile=_swapped_profile()), tolerance=LOSSY
    )
    yield _kind(
        "profile-broken.jpg", saved(image, "JPEG", quality=90, icc_profile=b"x" * 99), tolerance=LOSSY
    )
    mpo = saved(image, "MPO", quality=90, save_all=True, append_images=[Image.fromarray(picture(seed=1))])
    yield _kind("mpo.jpg", mpo, tolerance=LOSSY)
    yield from _inked()


def _with_broken_exif(image: Image.Image) -> bytes:
    return saved(image, "JPEG", quality=90, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken")


def _swapped_profile() -> bytes:
    """SRGB with red for blue: who converts by it sees it at once."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"xXYZ").replace(b"bXYZ", b"rXYZ").replace(b"xXYZ", b"bXYZ")


def _inked() -> Iterator[Kind]:
    """Four inks: as Photoshop writes them (Adobe's marker, inverted), as YCCK, and without the marker."""
    black = np.full(SIZE[::-1], 60, np.uint8)
    inks = np.dstack([255 - picture(), black])
    light = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    drawn = np.round(light).astype(np.uint8)
    cmyk = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)
    marker = cmyk.index(b"Adobe")
    yield _kind("cmyk.jpg", cmyk, drawn, LOSSY)
    # libjpeg turns (Y, Cb, Cr, K) into (255 - RGB, K), and Pillow writes what is 255 minus its own inks.
    ycc = np.asarray(Image.fromarray(inks[..., :3], "RGB").convert("YCbCr"))
    ycck = bytearray(saved(Image.fromarray(np.dstack([255 - ycc, black]), "CMYK"), "JPEG", quality=95))
    ycck[marker + 11] = 2  # the transform that Adobe's marker names
    yield _kind("ycck.jpg", bytes(ycck), drawn, LOSSY)
    unmarked = cmyk[: marker - 4] + cmyk[marker + 12 :]
    yield _kind("cmyk-unmarked.jpg", unmarked, drawn, LOSSY)


def _turned() -> Iterator[Kind]:
    """All eight orientations: `stored` is what a camera writes that was held so."""
    undo = {
        1: lambda upright: upright,
        2: lambda upright: upright[:, ::-1],
        3: lambda upright: upright[::-1, ::-1],
        4: lambda upright: upright[::-1],
        5: lambda upright: upright.transpose(1, 0, 2),
        6: lambda upright: np.rot90(upright),
        7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
        8: lambda upright: np.rot90(upright, -1),
    }
    for orientation, turn in undo.items():
        stored = np.ascontiguousarray(turn(picture()))
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield _kind(f"turned-{orientation}.jpg", saved(stored, "JPEG", exif=exif, quality=90), None, LOSSY)
        yield _kind(f"turned-{orientation}.png", saved(stored, "PNG", exif=exif))
        yield _kind(f"turned-{orientation}.webp", saved(stored, "WEBP", exif=exif, lossless=True))
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        yield _kind(f"turned-{orientation}.tif", saved(stored, "TIFF", tiffinfo=tags))


def _animated() -> Iterator[Kind]:
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    more: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 80}
    yield _kind("animated.gif", saved(frames[0], "GIF", **more), tolerance=LOSSY)
    yield _kind("animated.webp", saved(frames[0], "WEBP", lossless=True, **more))
    yield _kind("animated.png", saved(frames[0], "PNG", **more))
    yield _kind("animated.avif", saved(frames[0], "AVIF", quality=90, **more), tolerance=LOSSY)
    yield _kind("still.gif", saved(frames[0], "GIF"), tolerance=LOSSY)


def _tiffs() -> Iterator[Kind]:
    drawn = picture()
    image = Image.fromarray(drawn)
    yield _kind("lzw.tif", saved(image, "TIFF", compression="tiff_lzw"))
    yield _kind("pages.tiff", saved(image, "TIFF", save_all=True, append_images=[image.rotate(90)]))
    profiles = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    yield _kind("lab.tif", saved(lab, "TIFF"), tolerance=LOSSY)
    yield _kind("cmyk.tif", saved(Image.fromarray(255 - drawn).convert("CMYK"), "TIFF"), 255 - drawn)
    deep = (drawn[..., 0].astype(np.uint16) * 257) ^ 1
    grey = _grey(np.round(deep / 257).astype(np.uint8))
    for name, stored in (("little", Image.fromarray(deep)), ("big", _big_endian(deep))):
        yield Kind(f"grey-16-{name}.tif", saved(stored, "TIFF"), reference=grey, drawn=_grey(drawn[..., 0]))
    yield from _floats(drawn[..., 0])


def _floats(drawn: NDArray[np.uint8]) -> Iterator[Kind]:
    """Stretched to the range that they use; what is no number is black, infinity white."""
    values = drawn / np.float32(100) - 1
    low, high = int(drawn.min()), int(drawn.max())
    stretched = np.round((drawn.astype(float) - low) * 255 / (high - low)).astype(np.uint8)
    raw = saved(Image.fromarray(values), "TIFF")
    yield Kind("float.tif", raw, reference=_grey(stretched), drawn=_grey(stretched))
    holed, filled = values.copy(), stretched.copy()
    holed[5, 7:9], filled[5, 7:9] = (np.nan, np.inf), (0, 255)
    raw = saved(Image.fromarray(holed), "TIFF")
    yield Kind("float-nan.tif", raw, reference=_grey(filled), drawn=_grey(filled))


def _big_endian(values: NDArray[np.uint16]) -> Image.Image:
    height, width = values.shape
    return Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes())


def _others() -> Iterator[Kind]:
    import pillow_heif

    drawn = picture()
    image = Image.fromarray(drawn)
    yield _kind("rgb.bmp", saved(image, "BMP"))
    yield _kind("palette.bmp", saved(image.quantize(200), "BMP"), tolerance=LOSSY)
    yield _kind("rgb.webp", saved(image, "WEBP", quality=90), tolerance=LOSSY)
    clear = Image.merge("RGBA", (*image.split(), Image.fromarray(drawn[..., 0] | np.uint8(1))))
    yield _kind("rgba.webp", saved(clear, "WEBP", lossless=True, exact=True))
    yield _kind("rgb.avif", saved(image, "AVIF", quality=90), tolerance=LOSSY)
    yield _kind("rgb.jp2", saved(image, "JPEG2000"))
    yield _kind("stream.jp2", saved(image, "JPEG2000", no_jp2=True))
    yield _kind("rgb.ppm", saved(image, "PPM"))
    deep = (drawn[..., 0].astype(np.uint16) * 257) ^ 1
    raw = b"P5\n72 48\n65535\n" + deep.astype(">u2").tobytes()
    grey = _grey(np.round(deep / 257).astype(np.uint8))
    yield Kind("grey-16.ppm", raw, reference=grey, drawn=_grey(drawn[..., 0]))
    yield _kind("rgb.heic", saved(image, "HEIF", quality=90), tolerance=LOSSY)
    heic = io.BytesIO()
    turned = pillow_heif.from_pillow(Image.fromarray(np.ascontiguousarray(np.rot90(drawn))))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(heic, quality=90, exif=exif.tobytes())
    yield _kind("turned-6.heic", heic.getvalue(), tolerance=LOSSY)


def _odd_sizes() -> Iterator[Kind]:
    dot = np.array([[[200, 30, 60]]], np.uint8)
    yield _kind("one-pixel.png", saved(dot, "PNG"), dot)
    yield _kind("one-pixel.gif", saved(dot, "GIF"), dot)
    yield _kind("one-pixel.jpg", saved(dot, "JPEG", quality=95), dot, LOSSY)
    for width, height in ((30_000, 10), (10, 30_000)):
        strip = picture(width, height)
        yield _kind(f"strip-{width}-{height}.png", saved(strip, "PNG"), strip)
        yield _kind(f"strip-{width}-{height}.jpg", saved(strip, "JPEG", quality=90), strip, LOSSY)


# What is quarantined


def _no_images() -> Iterator[Kind]:
    yield Kind("empty.jpg", b"", "^the file is empty$")
    yield Kind("zeros.jpg", bytes(4096), "not an image: nothing but zero bytes")
    yield Kind("page.jpg", b"<!DOCTYPE html><title>404</title>", r"not an image: .*HTML")
    yield Kind("page-with-mark.png", b"\xef\xbb\xbf\n<html>gone</html>", r"not an image: .*HTML")
    yield Kind("drawing.png", b"<?xml version='1.0'?><svg/>", r"not an image: .*SVG")
    yield Kind("answer.png", json.dumps({"error": "no such key"}).encode(), r"not an image: .*JSON")
    yield Kind("words.jpg", b"version https://git-lfs", "not an image: begins with version")
    yield Kind("noise.jpg", bytes(range(128, 256)), "not an image: begins with 0x8081")


def _foreign() -> Iterator[Kind]:
    image = Image.fromarray(picture())
    yield Kind("paper.jpg", saved(image, "PDF"), "the format PDF is not read here: convert it")
    yield Kind("script.jpg", saved(image, "EPS"), "the format PostScript is not read here")
    yield Kind("icon.png", saved(image, "ICO"), "the format ICO is not read here")
    yield Kind("layers.jpg", b"8BPS\0\1" + bytes(99), "the format Photoshop is not read here")
    yield Kind("packed.jpg", gzip.compress(b"x"), "the format gzip is not read here")
    yield Kind(
        "film.heic", b"\0\0\0\x18ftypisom\0\0\2\0isommp42" + bytes(99), "^a video or other media .*isom"
    )


def _cut() -> Iterator[Kind]:
    image = Image.fromarray(picture(200, 150))
    for suffix, form, cause in (
        ("jpg", "JPEG", "^broken JPEG: .*truncated"),
        ("png", "PNG", "^broken PNG: .*truncated"),
        ("webp", "WEBP", "^the file is truncated: "),
        ("gif", "GIF", "^broken GIF: .*truncated"),
        ("tif", "TIFF", "^broken TIFF: .*truncated"),
        ("bmp", "BMP", "^broken BMP: .*truncated"),
        ("jp2", "JPEG2000", "^broken JPEG2000: .*"),
        ("avif", "AVIF", "^the file is truncated: begins as AVIF"),
        ("heic", "HEIF", "^broken HEIF: .*Unexpected end of file"),
        ("ppm", "PPM", "^broken PPM: .*truncated"),
    ):
        raw = saved(image, form)
        yield Kind(f"cut.{suffix}", raw[: len(raw) * 2 // 3], cause)
    yield Kind("stub.jpg", saved(image, "JPEG")[:14], "^broken header: Truncated File Read")
    yield Kind("stub.webp", saved(image, "WEBP")[:14], "^the file is truncated: begins as WebP")
    for suffix, form in (("png", "PNG"), ("tif", "TIFF")):
        yield Kind(f"stub.{suffix}", saved(image, form)[:14], f"^broken header: begins as {form}")


def _broken() -> Iterator[Kind]:
    raw = saved(picture(200, 150), "PNG")
    header_crc = bytearray(raw)
    header_crc[29] ^= 1
    yield Kind("header-crc.png", bytes(header_crc), "^broken header: begins as PNG")
    stream = bytearray(raw)
    start = raw.index(b"IDAT") + 40
    stream[start : start + 64] = bytes(range(64))
    yield Kind("stream.png", bytes(stream), "^broken PNG: broken data stream")
    yield Kind("text-bomb.png", _text_bomb(), "Decompressed data too large")
    none = make_png(0, 5, depth=8, colour=0, rows=b"")
    yield Kind("no-pixels.png", none, "^broken header: begins as PNG")


def _text_bomb() -> bytes:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8_000_000)))
    return make_png(8, 8, depth=8, colour=0, rows=bytes(72), extra=text)


def _bombs() -> Iterator[Kind]:
    """Little to send, much to hold: each is refused for what its header says."""
    yield Kind("bomb.png", make_png(60_000, 60_000, depth=8, colour=2, rows=b""), "^too many pixels: ")
    rows = bytes(12_000 * (1 + 12_000 // 8))
    real = make_png(12_000, 12_000, depth=1, colour=0, rows=rows)
    yield Kind("bomb-real.png", real, "^too many pixels: 12000×12000, at most 89478485")
    jpeg = bytearray(saved(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
    yield Kind("bomb.jpg", bytes(jpeg), "^too many pixels: ")
    gif = bytearray(saved(picture(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    yield Kind("bomb.gif", bytes(gif), "^too many pixels: ")
    yield Kind("bomb.ppm", b"P6\n20000 20000\n255\n", "^too many pixels: ")
