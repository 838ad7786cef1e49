"""What is trained, what stays frozen, and what of it ends in `head.safetensors`."""

from __future__ import annotations

import pytest
import torch

from for_ray.errors import ConfigError
from for_ray.model.backbone import Features
from for_ray.model.bundle import Bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.heads import ClipHead, DenseHead, Head
from for_ray.model.slot_model import Freeze, SlotModel, as_features, as_tokens
from for_ray.model.sum_clip import SumHead

SIDES = {"num_prefix": 1, "height": 3, "width": 3}


@pytest.fixture
def encoder(tiny_bundle: Bundle) -> Encoder:
    return load_encoder(tiny_bundle, device="cpu")


def small_head(encoder: Encoder) -> SumHead:
    torch.manual_seed(0)
    return SumHead(encoder.pooling.width, 4, num_layers=1, feedforward_width=16)


def test_tokens_are_features_again(encoder: Encoder) -> None:
    side = encoder.image_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    features = encoder.features(pixels)
    shape = {"num_prefix": features.prefix.shape[1], "height": features.height, "width": features.width}
    again = as_features(as_tokens(features), **shape)
    assert torch.equal(again.cells, features.cells)
    assert torch.equal(again.prefix, features.prefix)
    assert (again.height, again.width) == (features.height, features.width)


def test_tokens_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 1 \+ 3 · 3, C\]"):
        as_features(torch.zeros(2, 9, 8), **SIDES)


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [("qkvo", set()), ("vo", {"q_proj", "k_proj"}), ("none", {"q_proj", "k_proj", "v_proj", "c_proj"})],
)
def test_one_step_changes_what_is_trained_and_nothing_else(
    encoder: Encoder, freeze: str, trained: set[str]
) -> None:
    features = _features(encoder)
    model = SlotModel(small_head(encoder), encoder.pooling, freeze=freeze)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=0.1)
    model(features)[..., 0].sum().backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    of_pool = {name.split(".")[-2] for name in changed if name.startswith("pooling.pool.")}
    assert of_pool == trained
    assert any(name.startswith("head.layers") for name in changed)
    assert "head.slots" in changed
    saved = model.trained_state()
    assert {name.split(".")[2] for name in saved if name.startswith("pooling.")} == trained
    assert {name for name in saved if not name.startswith("pooling.")} == set(model.head.state_dict())


def _features(encoder: Encoder) -> Features:
    side = encoder.image_size
    with torch.no_grad():
        return encoder.features(torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("head", "freeze", "layers"),
    [
        (ClipHead(), "none", ("q_proj", "k_proj", "v_proj", "c_proj")),
        (ClipHead(), "vo", ("q_proj", "k_proj")),
        (DenseHead(), "none", ("v_proj", "c_proj")),  # a cell on its own is neither asked nor compared
    ],
)
def test_heads_without_weights_train_the_pooling_layer(
    encoder: Encoder, head: Head, freeze: Freeze, layers: tuple[str, ...]
) -> None:
    model = SlotModel(head, encoder.pooling, freeze=freeze)
    assert model.trained_state().keys() == {
        f"pooling.pool.{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("head", "freeze"), [(ClipHead(), "qkvo"), (DenseHead(), "qkvo"), (DenseHead(), "vo")]
)
def test_nothing_to_train_is_refused(encoder: Encoder, head: Head, freeze: Freeze) -> None:
    with pytest.raises(ConfigError, match=f"with freeze {freeze} this head has nothing to train"):
        SlotModel(head, encoder.pooling, freeze=freeze)


def test_vectors_have_unit_length(encoder: Encoder) -> None:
    vectors = SlotModel(small_head(encoder), encoder.pooling)(_features(encoder))
    assert vectors.shape == (2, 4, encoder.dim)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 4))
