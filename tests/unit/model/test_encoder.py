"""The whole encoder: pixels and words in, unit vectors out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from for_ray.errors import ConfigError, DataError
from for_ray.model import encoder as encoder_module
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.preprocess import decode
from tests.unit.model.conftest import CONFIGS, make_clip


def make_folder(path: Path, kind: str, **settings: object) -> str:
    path.mkdir(parents=True)
    (path / "model.json").write_text(json.dumps(CONFIGS[kind]))
    save_file(make_clip(CONFIGS[kind]).state_dict(), path / "weights.safetensors")
    values = {"name": kind, "model": "model.json", "pretrained": "weights.safetensors"} | settings
    (path / "encoder.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    return str(path)


@pytest.fixture(scope="module", params=["resnet", "class_token", "map"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp(request.param) / "b", request.param, num_slots=4)


@pytest.fixture(scope="module")
def resnet_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("one") / "b", "resnet", num_slots=4)


def png(seed: int, width: int = 90, height: int = 70) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(bundle: Bundle, num_images: int) -> torch.Tensor:
    images = [
        decode(png(seed), image_size=bundle.image_size, resize_mode=bundle.resize_mode)
        for seed in range(num_images)
    ]
    return torch.from_numpy(np.stack([image.pixels for image in images]))


def test_clip_is_open_clip_from_file_to_vector(uri: str) -> None:
    bundle = open_bundle(uri, head="clip", resize_mode="shortest")
    encoder = load_encoder(bundle, "cpu")
    reference = make_clip(CONFIGS[bundle.name])
    transform = image_transform_v2(
        PreprocessCfg(size=bundle.image_size, resize_mode="shortest"), is_train=False
    )
    images = torch.stack([transform(Image.open(io.BytesIO(png(seed)))) for seed in range(3)])
    expected = normalize(reference.encode_image(images), dim=-1)
    encoded = encoder.encode(pixels_of(bundle, 3))
    torch.testing.assert_close(encoded.vectors[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_image(png(0)), expected[:1], rtol=1e-4, atol=1e-5)


def test_text_is_open_clips(uri: str) -> None:
    encoder = load_encoder(open_bundle(uri))
    reference = make_clip(CONFIGS[encoder.bundle.name])
    texts = [prompt.replace("{}", "red car") for prompt in encoder.bundle.config.prompts]
    each = normalize(reference.encode_text(open_clip.tokenize(texts)), dim=-1)
    expected = normalize(each.mean(dim=0, keepdim=True), dim=-1)
    vectors = encoder.embed_text(["a red car", "dog"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:1], expected, rtol=1e-4, atol=1e-6)
    assert encoder.embed_text([]).shape == (0, encoder.dim)


@pytest.mark.parametrize("head", ["clip", "dense", "cluster", "sum"])
def test_shapes_are_what_the_bundle_says(uri: str, head: str) -> None:
    bundle = open_bundle(uri, head=head, allow_untrained=True)
    encoder = load_encoder(bundle)
    encoded = encoder.encode(pixels_of(bundle, 2))
    assert encoded.vectors.shape == (2, bundle.num_slots, bundle.dim) == (2, encoder.num_slots, encoder.dim)
    assert encoded.boxes.shape == (2, bundle.num_slots, 4)
    assert encoded.keep.shape == (2, bundle.num_slots)
    assert encoded.keep.dtype == torch.bool
    assert bool(encoded.keep[:, 0].all())
    torch.testing.assert_close(encoded.vectors.norm(dim=-1), torch.ones(2, bundle.num_slots))


def test_the_threshold_decides_what_is_kept(resnet_uri: str) -> None:
    pixels = pixels_of(open_bundle(resnet_uri), 3)
    kept = [
        load_encoder(open_bundle(resnet_uri, head="dense", keep_threshold=value))
        .encode(pixels)
        .keep.sum()
        .item()
        for value in (0.01, 1.0)
    ]
    assert kept == [3, 27]


def test_encoding_again_and_in_numpy_is_the_same_to_the_bit(resnet_uri: str) -> None:
    encoder = load_encoder(open_bundle(resnet_uri))
    pixels = pixels_of(encoder.bundle, 3)
    first, second = encoder.encode(pixels), load_encoder(open_bundle(resnet_uri)).encode(pixels.numpy())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_image_size_resizes_positions(uri: str) -> None:
    for size in (32, 128):
        bundle = open_bundle(uri, image_size=size, head="dense")
        side = size // (32 if bundle.name == "resnet" else 16)
        assert bundle.num_slots == side * side
        assert load_encoder(bundle).encode(pixels_of(bundle, 1)).vectors.shape[1] == side * side


def test_captions_are_embedded_as_open_clip_does_in_any_precision(uri: str, monkeypatch) -> None:
    monkeypatch.setattr(encoder_module, "CAPTIONS_AT_ONCE", 2)
    encoder = load_encoder(open_bundle(uri), "cpu")
    texts = ["a red car", "two dogs", "a naïve cow"]
    reference = make_clip(CONFIGS[encoder.bundle.name])
    expected = normalize(reference.encode_text(open_clip.tokenize(texts)), dim=-1)
    exact = encoder.embed_captions(texts)
    np.testing.assert_allclose(exact, expected, rtol=1e-4, atol=1e-6)
    assert encoder.embed_captions([]).shape == (0, encoder.dim)
    close = load_encoder(open_bundle(uri), "cpu", precision="bfloat16").embed_captions(texts)
    assert (close.dtype, close.shape) == (np.float32, exact.shape)
    assert (exact * close).sum(axis=-1).min() > 0.999
    assert np.abs(exact - close).max() > 1e-4  # as on a GPU, where that is faster


@pytest.mark.parametrize("head", ["clip", "dense", "sum"])
def test_lower_precision_stays_close(uri: str, head: str) -> None:
    """Autocast as on a GPU; `cluster` is left out, since a cell between two clusters may change sides."""
    bundle = open_bundle(uri, head=head, allow_untrained=True)
    pixels = pixels_of(bundle, 2)
    exact = load_encoder(bundle, precision="float32").encode(pixels).vectors
    close = load_encoder(bundle, precision="bfloat16").encode(pixels).vectors
    assert close.dtype == torch.float32
    assert (exact * close).sum(dim=-1).min() > 0.999


def test_clusters_in_lower_precision_are_means_of_whole_precision(resnet_uri: str) -> None:
    encoded = load_encoder(open_bundle(resnet_uri), precision="bfloat16").encode(
        pixels_of(open_bundle(resnet_uri), 2)
    )
    torch.testing.assert_close(encoded.vectors.norm(dim=-1), torch.ones(2, 4))


def test_wrong_pixels_are_refused(resnet_uri: str) -> None:
    encoder = load_encoder(open_bundle(resnet_uri))
    for wrong in (torch.zeros(1, 3, 96, 96), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            encoder.encode(wrong)
    with pytest.raises(DataError, match="the file is empty"):
        encoder.embed_image(b"")


def test_an_unknown_device_is_refused(resnet_uri: str) -> None:
    with pytest.raises(ConfigError, match="no device 'tpu9000'"):
        load_encoder(open_bundle(resnet_uri), "tpu9000")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no device 'cuda'"):
            load_encoder(open_bundle(resnet_uri), "cuda")


def test_a_trained_sum_head_is_loaded_and_must_fit(resnet_uri: str, tmp_path: Path) -> None:
    fresh: Encoder = load_encoder(open_bundle(resnet_uri, head="sum", allow_untrained=True))
    state = {name: tensor + 0.01 for name, tensor in fresh.head.state_dict().items()}
    uri = make_folder(tmp_path / "b", "resnet", num_slots=4, head="sum")
    save_file(state, tmp_path / "b" / "head.safetensors")
    import hashlib

    sha256 = hashlib.sha256((tmp_path / "b" / "head.safetensors").read_bytes()).hexdigest()
    with (tmp_path / "b" / "encoder.toml").open("a") as file:
        file.write(f'head_sha256 = "{sha256}"\n')
    trained = load_encoder(open_bundle(uri))
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.head.state_dict().items())
    assert trained.fingerprint != fresh.fingerprint
    with pytest.raises(ConfigError, match=r"head.safetensors doesn't fit resnet: size mismatch for slots"):
        load_encoder(open_bundle(uri, num_slots=5))
    trained.bundle.save(str(tmp_path / "saved"))
    assert load_encoder(open_bundle(str(tmp_path / "saved"))).fingerprint == trained.fingerprint


def test_an_untrained_sum_head_is_the_same_every_time(resnet_uri: str) -> None:
    heads = [load_encoder(open_bundle(resnet_uri, head="sum", allow_untrained=True)).head for _ in range(2)]
    states = [head.state_dict() for head in heads]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_logit_scale_is_clips(resnet_uri: str) -> None:
    expected = make_clip(CONFIGS["resnet"]).logit_scale.exp().item()
    assert load_encoder(open_bundle(resnet_uri)).logit_scale == pytest.approx(expected)


def test_encoding_gives_its_features_away_when_asked(uri: str) -> None:
    encoder = load_encoder(open_bundle(uri, head="cluster"), "cpu")
    pixels = pixels_of(encoder.bundle, 3)
    encoded, features = encoder.encode_with_features(pixels)
    alone, plain = encoder.features(pixels), encoder.encode(pixels)
    assert torch.equal(features.cells, alone.cells)
    assert torch.equal(features.prefix, alone.prefix)
    assert all(torch.equal(one, other) for one, other in zip(encoded, plain, strict=True))
    again = encoder.head(alone, encoder.pooling).vectors
    assert torch.allclose(again, encoded.vectors, atol=1e-5)
