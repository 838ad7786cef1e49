"""From an encoder whose head is to be trained to the bundle that comes of it, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.slot_model import SlotModel
from for_ray.model.trained_bundle import HeadSettings, save_trained, untrained_bundle

HEADS = [("sum", "qkvo"), ("sum", "vo"), ("sum", "none"), ("clip", "none"), ("clip", "vo"), ("dense", "none")]


def trained(encoder: Encoder, freeze: str) -> SlotModel:
    """As if trained: everything that may change has changed."""
    slots = SlotModel(encoder.head, encoder.pooling, freeze=freeze)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in slots.trained_parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return slots


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Images of coloured fields."""
    side = open_bundle("picturebook").image_size // 4
    fields = torch.randint(
        0, 255, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return fields.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


@pytest.mark.parametrize(("head", "freeze"), HEADS)
def test_a_trained_encoder_comes_back_bit_for_bit(tmp_path: Path, pixels, head, freeze):
    settings = HeadSettings(head=head, num_slots=5, num_layers=1, feedforward_width=32, mean_token=True)
    bundle = untrained_bundle("picturebook", settings)
    encoder = load_encoder(bundle, "cpu")
    before = encoder.encode(pixels).vectors
    slots = trained(encoder, freeze)
    saved = save_trained(bundle, slots.trained_state(), str(tmp_path / "bundle"), name="mine")
    again = load_encoder(open_bundle(str(tmp_path / "bundle")), "cpu")
    encoder.requires_grad_(False)  # torch's attention takes another way where weights could be trained
    expected = encoder.encode(pixels)
    for mine, its in zip(expected, again.encode(pixels), strict=True):
        assert torch.equal(mine, its)
    assert not torch.equal(before, expected.vectors)
    assert (saved.name, saved.config.head, saved.config.mean_token) == (
        "mine",
        head,
        head == "sum",
    )
    assert saved.config.tuned_pooling == (freeze != "qkvo")
    assert saved.keep_rule == ("apart" if head == "sum" else "distinct")
    assert open_bundle(str(tmp_path / "bundle"), head="cluster").keep_rule == "distinct"
    for name, value in slots.trained_state().items():
        assert torch.equal(value, SlotModel(again.head, again.pooling, freeze=freeze).trained_state()[name])


def test_the_fingerprint_hangs_on_what_was_trained(tmp_path: Path):
    """Also with another head, where the pooling layer was trained; not where only a `sum` head was."""
    fingerprints = {"cluster": [open_bundle("picturebook").fingerprint]}
    for number, (head, freeze) in enumerate(HEADS):
        bundle = untrained_bundle("picturebook", HeadSettings(head=head, num_layers=0))
        saved = save_trained(
            bundle, trained(load_encoder(bundle, "cpu"), freeze).trained_state(), str(tmp_path / str(number))
        )
        assert saved.backbone_fingerprint == bundle.backbone_fingerprint
        fingerprints.setdefault("own", []).append(saved.fingerprint)
        as_cluster = open_bundle(
            str(tmp_path / str(number)), head="cluster", num_slots=open_bundle("picturebook").num_slots
        )
        fingerprints["cluster"].append(as_cluster.fingerprint)
    assert len(set(fingerprints["own"])) == len(HEADS)
    assert fingerprints["cluster"][0] == fingerprints["cluster"][1]
    assert len(set(fingerprints["cluster"])) == len(HEADS)


def test_a_tuned_pooling_layer_serves_other_heads_and_copies_whole(tmp_path: Path, pixels):
    bundle = untrained_bundle("picturebook", HeadSettings(head="dense"))
    encoder = load_encoder(bundle, "cpu")
    save_trained(bundle, trained(encoder, "none").trained_state(), str(tmp_path / "dense"))
    open_bundle(str(tmp_path / "dense"), head="clip").save(str(tmp_path / "clip"))
    clip = load_encoder(open_bundle(str(tmp_path / "clip")), "cpu")
    own = load_encoder(open_bundle("picturebook", head="clip"), "cpu")
    assert not torch.allclose(clip.encode(pixels).vectors, own.encode(pixels).vectors, atol=1e-3)
    features = encoder.features(pixels)
    expected = torch.nn.functional.normalize(
        encoder.pooling.attend(encoder.pooling.default_slot(features), features, with_prefix=True).embeddings,
        dim=-1,
    )
    assert torch.equal(clip.encode(pixels).vectors, expected)


def test_training_starts_from_clips_own_pooling_and_a_head_of_its_seed(tmp_path: Path, pixels):
    bundle = untrained_bundle("picturebook", HeadSettings(num_slots=3, num_layers=1))
    slots = trained(load_encoder(bundle, "cpu"), "none")
    save_trained(bundle, slots.trained_state(), str(tmp_path / "bundle"))
    again = untrained_bundle(str(tmp_path / "bundle"), HeadSettings(num_slots=3, num_layers=1))
    assert again.fingerprint == bundle.fingerprint
    assert torch.equal(
        load_encoder(again, "cpu").encode(pixels).vectors, load_encoder(bundle, "cpu").encode(pixels).vectors
    )
    other = untrained_bundle("picturebook", HeadSettings(num_slots=3, num_layers=1, seed=1))
    assert other.fingerprint != bundle.fingerprint


def test_what_does_not_fit_or_was_damaged_is_refused(tmp_path: Path):
    bundle = untrained_bundle("picturebook", HeadSettings(head="dense"))
    state = trained(load_encoder(bundle, "cpu"), "none").trained_state()
    save_trained(bundle, state, str(tmp_path / "dense"))
    with pytest.raises(ConfigError, match=r"head.safetensors doesn't fit picturebook: Missing key"):
        load_encoder(open_bundle(str(tmp_path / "dense"), head="sum"), "cpu")
    save_trained(bundle, {"pooling.pool.other": torch.zeros(3)}, str(tmp_path / "other"))
    with pytest.raises(
        ConfigError, match=r"head.safetensors doesn't fit picturebook: Unexpected key.*pool.other"
    ):
        load_encoder(open_bundle(str(tmp_path / "other")), "cpu")
    path = tmp_path / "dense" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged or was replaced"):
        load_encoder(open_bundle(str(tmp_path / "dense")), "cpu")
