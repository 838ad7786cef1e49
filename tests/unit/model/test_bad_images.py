"""Every kind of file is decoded as a plain decode does it, or refused with its cause, and nothing else."""

from __future__ import annotations

import io
import re
import resource
import sys
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, features

from for_ray.errors import DataError
from for_ray.model.preprocess import decode
from tests.bad_images import Kind, bad_kinds, good_kinds, make_kinds, picture, plain, plain_pixels, saved

MODES = ["squash", "shortest", "longest"]
SIDE = 32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def kind(name: str) -> Kind:
    return next(kind for kind in make_kinds() if kind.name == name)


def names(kinds: list[Kind]) -> list[str]:
    return [kind.name for kind in kinds]


def of_open_clip(image: NDArray[np.uint8], mode: str) -> NDArray[np.uint8]:
    return plain_pixels(image, SIDE, mode)


def mean_distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def reason_of(raw: bytes) -> str:
    with pytest.raises(DataError) as caught:
        decode(raw, image_size=SIDE, resize_mode="squash")
    return str(caught.value)


def test_there_are_many_kinds_and_their_names_differ():
    assert len(good_kinds()) >= 25
    assert len(bad_kinds()) >= 25
    assert len(set(names(list(make_kinds())))) == len(make_kinds())


@pytest.mark.parametrize("name", names(good_kinds()))
def test_a_good_kind_is_decoded_as_a_plain_decode_does_it(name):
    raw, reference = kind(name).raw, kind(name).reference
    # A strip is cut before it is resized, and a large JPEG decoded small: close, but not to the last bit.
    most = 1.0 if name.startswith("strip") else 0.0
    for mode in MODES:
        decoded = decode(raw, image_size=SIDE, resize_mode=mode)
        assert (decoded.height, decoded.width) == reference.shape[:2]
        assert mean_distance(decoded.pixels, of_open_clip(reference, mode)) <= most


@pytest.mark.parametrize("name", names(good_kinds()))
def test_a_good_kind_shows_what_was_drawn(name):
    drawn = kind(name)
    assert drawn.reference.shape == drawn.drawn.shape
    assert mean_distance(drawn.reference, drawn.drawn) <= drawn.tolerance


def test_what_was_drawn_is_told_apart():
    """Turned, negative, or with its colours swapped, it would be far beyond any tolerance here."""
    drawn = picture()
    others = [drawn[::-1], drawn[:, ::-1], drawn[::-1, ::-1], 255 - drawn, drawn[..., ::-1], picture(seed=1)]
    assert min(mean_distance(drawn, other) for other in others) > 20
    turned = [np.rot90(drawn), np.rot90(drawn, -1), drawn.transpose(1, 0, 2)]
    squares = [of_open_clip(np.ascontiguousarray(each), "squash") for each in (drawn, *turned)]
    assert min(mean_distance(squares[0], other) for other in squares[1:]) > 20


@pytest.mark.parametrize("name", names(bad_kinds()))
def test_a_bad_kind_is_refused_with_its_cause(name):
    reason = reason_of(kind(name).raw)
    assert re.search(kind(name).cause, reason), reason
    assert reason.isprintable()
    assert len(reason) < 300


@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_any_damage_ends_in_pixels_or_a_data_error(damage):
    rng = np.random.default_rng(len(damage))
    num_decoded, reasons = 0, []
    for each in make_kinds():
        if not 14 < len(each.raw) < 50_000:
            continue
        for _ in range(4):
            raw = damaged(each.raw, damage, rng)
            try:
                decoded = decode(raw, image_size=SIDE, resize_mode="longest", max_pixels=1_000_000)
            except DataError as error:
                reasons.append(str(error))
            else:
                assert decoded.pixels.shape == (3, SIDE, SIDE)
                num_decoded += 1
    assert [reason for reason in reasons if not reason.isprintable() or len(reason) > 300] == []
    assert min(num_decoded, len(reasons)) > 10


def damaged(raw: bytes, damage: str, rng: np.random.Generator) -> bytes:
    if damage == "cut":
        return raw[: rng.integers(1, len(raw))]
    changed = bytearray(raw)
    if damage == "zero":
        start = int(rng.integers(len(raw)))
        end = min(start + 64, len(raw))
        changed[start:end] = bytes(end - start)
        return bytes(changed)
    # Half of them near the beginning, where the headers are.
    positions = [*rng.integers(0, min(200, len(raw)), 2), *rng.integers(0, len(raw), 2)]
    for position in positions:
        changed[position] = rng.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("name", ["bomb.png", "bomb-real.png", "bomb.jpg", "bomb.gif", "bomb.ppm"])
def test_a_bomb_is_refused_from_its_header(name):
    """In no time, in no memory, and by its first bytes alone."""
    raw = kind(name).raw
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    reason = reason_of(raw)
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; it would take 400,000
    assert reason.startswith("too many pixels: ")
    assert reason_of(raw[:800]) == reason


def test_a_profile_is_ignored_as_open_clip_does():
    """The profile in it says that red is blue."""
    from PIL import ImageCms

    raw = kind("profile.jpg").raw
    opened = Image.open(io.BytesIO(raw))
    own = ImageCms.ImageCmsProfile(io.BytesIO(opened.info["icc_profile"]))
    converted = np.asarray(ImageCms.profileToProfile(opened, own, ImageCms.createProfile("sRGB")))
    assert mean_distance(converted, plain(raw)) > 20
    without = decode(kind("rgb.jpg").raw, image_size=SIDE, resize_mode="squash").pixels
    np.testing.assert_array_equal(decode(raw, image_size=SIDE, resize_mode="squash").pixels, without)


def test_a_large_mpo_is_decoded_small_as_a_jpeg():
    large = Image.fromarray(picture(1600, 900))
    jpeg = saved(large, "JPEG", quality=90)
    mpo = saved(large, "MPO", quality=90, save_all=True, append_images=[large])
    one, other = (decode(raw, image_size=SIDE, resize_mode="squash") for raw in (jpeg, mpo))
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert (other.width, other.height) == (1600, 900)


@pytest.mark.parametrize("name", ["rgb.heic", "turned-6.heic", "cut.heic"])
def test_without_its_package_heic_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # makes the import fail
    reason = reason_of(kind(name).raw)
    assert reason == "HEIC cannot be read here: install the package pillow-heif, on all nodes"


def test_an_avif_needs_no_heic_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoded = decode(kind("rgb.avif").raw, image_size=SIDE, resize_mode="squash")
    np.testing.assert_array_equal(decoded.pixels, of_open_clip(kind("rgb.avif").reference, "squash"))


@pytest.mark.parametrize("name", ["rgb.avif", "animated.avif"])
def test_a_pillow_without_avif_is_told(monkeypatch, name):
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    reason = reason_of(kind(name).raw)
    assert reason == "AVIF cannot be read here: install a Pillow of 11.3 or later that has AVIF, on all nodes"


def test_a_container_of_several_kinds_is_told_by_its_brands():
    """Both AVIF and HEIC may begin with the brand mif1 and name themselves behind it."""
    for brand, reason in ((b"avif", "begins as AVIF"), (b"heic", "begins as HEIC")):
        raw = b"\0\0\0\x18ftypmif1\0\0\0\0mif1" + brand + b"\0\0\0\x08mdat"
        assert reason in reason_of(raw)
