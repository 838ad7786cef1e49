"""The known answers of the method: what every head must give, for every kind of tower."""

from __future__ import annotations

import contextlib

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from for_ray.errors import ConfigError
from for_ray.model.backbone import Features, fold_norms, kind_of, make_backbone, resize_positions
from for_ray.model.boxes import distinct_slots
from for_ray.model.heads import ClipHead, ClusterHead, DenseHead, Head
from for_ray.model.pooling import Pooling, make_pooling
from for_ray.model.sum_clip import SumHead
from tests.unit.model.conftest import CONFIGS, TEXT, make_clip, make_pixels

TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def parts(clip: nn.Module, pixels: Tensor) -> tuple[Features, Pooling]:
    return make_backbone(clip.visual)(pixels), make_pooling(clip.visual)


def one_slot(pooling: Pooling, slot: Tensor) -> SumHead:
    """A `sum` head without decoder, of one slot, with the prefix among the keys."""
    head = SumHead(pooling.width, 1, num_layers=0, with_prefix=True).eval()
    head.slots.data.copy_(slot)
    return head


def test_clip_equals_encode_image(clip: nn.Module) -> None:
    pixels = make_pixels(clip, 3)
    vectors = ClipHead()(*parts(clip, pixels)).vectors
    assert vectors.shape == (3, 1, 24)
    torch.testing.assert_close(vectors[:, 0], normalize(clip.encode_image(pixels), dim=-1), **TOLERANCE)


def test_default_slot_gives_encode_image_before_normalisation(clip: nn.Module) -> None:
    pixels = make_pixels(clip, 2)
    features, pooling = parts(clip, pixels)
    pooled = pooling.attend(pooling.default_slot(features), features, with_prefix=True).embeddings[:, 0]
    torch.testing.assert_close(pooled, clip.encode_image(pixels), rtol=1e-4, atol=1e-5)


def test_sum_of_the_default_slot_without_decoder_is_clip(clip: nn.Module) -> None:
    pixels = make_pixels(clip, 1)
    features, pooling = parts(clip, pixels)
    expected = ClipHead()(features, pooling)
    actual = one_slot(pooling, pooling.default_slot(features)[0])(features, pooling)
    torch.testing.assert_close(actual.vectors, expected.vectors, **TOLERANCE)
    torch.testing.assert_close(actual.boxes, expected.boxes)


def test_sum_looks_at_cells_alone_unless_told(resnet: nn.Module) -> None:
    features, pooling = parts(resnet, make_pixels(resnet, 1))
    head = one_slot(pooling, pooling.default_slot(features)[0])
    with_mean = head(features, pooling).vectors
    head.with_prefix = False
    without = head(features, pooling).vectors
    assert not torch.allclose(with_mean, without, atol=1e-3)
    keys = features.cells + resnet.visual.attnpool.positional_embedding[1:]
    pool = resnet.visual.attnpool
    query = pool.q_proj(head.slots).view(pool.num_heads, 1, -1)
    key, value = (
        layer(keys)[0].view(9, pool.num_heads, -1).transpose(0, 1) for layer in (pool.k_proj, pool.v_proj)
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).reshape(1, -1)
    torch.testing.assert_close(without[0], normalize(pool.c_proj(mixed), dim=-1), **TOLERANCE)


def test_dense_is_what_the_pooling_gives_to_one_cell(clip: nn.Module) -> None:
    """With a single cell the softmax is 1: the pooling must give that cell's dense embedding."""
    features, pooling = parts(clip, make_pixels(clip, 2))
    dense = pooling.project_cells(features, with_positions=True)
    for cell in (0, 3, features.cells.shape[1] - 1):
        alone = Features(features.cells[:, cell : cell + 1], features.prefix, 1, 1)
        if kind_of(clip.visual) == "resnet":
            pooling_of_one = make_pooling(make_clip(CONFIGS["resnet"]).visual)
            table = clip.visual.attnpool.positional_embedding
            pooling_of_one.pool.positional_embedding = nn.Parameter(
                torch.cat([table[:1], table[1 + cell : 2 + cell]])
            )
        else:
            pooling_of_one = pooling
        # A class-token ViT adds the slot itself back: its slot is the cell.
        pooled = pooling_of_one.attend(alone.cells, alone, with_prefix=False)
        torch.testing.assert_close(pooled.embeddings[:, 0], dense[:, cell], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled.attention, torch.ones(2, 1, 1))


def test_dense_leaves_positions_out(resnet: nn.Module) -> None:
    """Eq. 2, written as the two 1 × 1 convolutions of MaskCLIP's ResNet head."""
    features, pooling = parts(resnet, make_pixels(resnet, 2))
    pool = resnet.visual.attnpool
    grid = features.cells.transpose(1, 2).reshape(2, -1, 3, 3)
    convolved = torch.nn.functional.conv2d(grid, pool.v_proj.weight[..., None, None], pool.v_proj.bias)
    convolved = torch.nn.functional.conv2d(convolved, pool.c_proj.weight[..., None, None], pool.c_proj.bias)
    output = DenseHead()(features, pooling)
    expected = normalize(convolved.flatten(2).transpose(1, 2), dim=-1)
    torch.testing.assert_close(output.vectors, expected, **TOLERANCE)
    assert not torch.allclose(DenseHead(with_positions=True)(features, pooling).vectors, expected, atol=1e-3)
    assert output.boxes[0, 5].tolist() == pytest.approx([2 / 3, 1 / 3, 1, 2 / 3])


def test_cluster_of_all_cells_is_dense_up_to_order(clip: nn.Module) -> None:
    features, pooling = parts(clip, make_pixels(clip, 2))
    dense = DenseHead()(features, pooling)
    cluster = ClusterHead(features.cells.shape[1])(features, pooling)
    cosines = cluster.vectors @ dense.vectors.transpose(1, 2)
    match = cosines.argmax(dim=2)
    assert all(sorted(row.tolist()) == list(range(features.cells.shape[1])) for row in match)
    torch.testing.assert_close(
        cluster.vectors, torch.take_along_dim(dense.vectors, match[..., None], 1), **TOLERANCE
    )
    torch.testing.assert_close(cluster.boxes, torch.take_along_dim(dense.boxes, match[..., None], 1))


def test_cluster_of_one_is_the_mean_of_dense(clip: nn.Module) -> None:
    features, pooling = parts(clip, make_pixels(clip, 2))
    mean = normalize(DenseHead()(features, pooling).vectors.mean(dim=1, keepdim=True), dim=-1)
    output = ClusterHead(1)(features, pooling)
    torch.testing.assert_close(output.vectors, mean, **TOLERANCE)
    assert output.boxes[:, 0].tolist() == [[0, 0, 1, 1]] * 2


def diverse(features: Features) -> Features:
    """Cells that differ: a random tower gives nearly the same everywhere, and k-means would sort rounding."""
    pattern = torch.randn(features.cells.shape[1:], generator=torch.Generator().manual_seed(0))
    return Features(features.cells + pattern, features.prefix, features.height, features.width)


@pytest.mark.parametrize("name", ["clip", "dense", "cluster", "sum"])
def test_a_batch_equals_its_images(clip: nn.Module, name: str) -> None:
    pixels = make_pixels(clip, 5)
    pooling = make_pooling(clip.visual)
    torch.manual_seed(3)
    heads: dict[str, Head] = {
        "clip": ClipHead(),
        "dense": DenseHead(),
        "cluster": ClusterHead(4),
        "sum": SumHead(pooling.width, 4, num_layers=2, feedforward_width=16).eval(),
    }
    backbone = make_backbone(clip.visual)
    together = heads[name](diverse(backbone(pixels)), pooling)
    for sizes in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        apart = [heads[name](diverse(backbone(part)), pooling) for part in pixels.split(sizes)]
        torch.testing.assert_close(torch.cat([part.vectors for part in apart]), together.vectors, **TOLERANCE)
        torch.testing.assert_close(torch.cat([part.boxes for part in apart]), together.boxes)


def test_vectors_are_unit_and_boxes_lie_inside(clip: nn.Module) -> None:
    features, pooling = parts(clip, make_pixels(clip, 3))
    for head in (ClipHead(), DenseHead(), ClusterHead(4), SumHead(pooling.width, 4, num_layers=1).eval()):
        vectors, boxes = head(features, pooling)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]))
        assert boxes.shape == (*vectors.shape[:2], 4)
        assert bool((boxes >= 0).all() and (boxes <= 1).all() and (boxes[..., 2:] > boxes[..., :2]).all())


def test_cluster_of_an_image_of_one_colour_gives_equal_finite_slots(resnet: nn.Module) -> None:
    features, pooling = parts(resnet, make_pixels(resnet, 1))
    flat = Features(features.cells[:, :1].expand(-1, 9, -1), features.prefix, 3, 3)
    vectors = ClusterHead(4)(flat, pooling).vectors
    assert bool(vectors.isfinite().all())
    torch.testing.assert_close(vectors, vectors[:, :1].expand(-1, 4, -1))


def test_a_decoder_layer_is_detrs(resnet: nn.Module) -> None:
    """Against torch's post-norm decoder layer, which is DETR's but for the query embedding."""
    width = make_pooling(resnet.visual).width
    head = SumHead(width, 3, num_layers=1, feedforward_width=32).eval()
    layer = head.layers[0]
    reference = nn.TransformerDecoderLayer(width, width // 64, 32, batch_first=True).eval()
    reference.self_attn.load_state_dict(layer.self_attention.state_dict())
    reference.multihead_attn.load_state_dict(layer.cross_attention.state_dict())
    reference.linear1.load_state_dict(layer.expand.state_dict())
    reference.linear2.load_state_dict(layer.contract.state_dict())
    target, cells = torch.randn(2, 3, width), torch.randn(2, 9, width)
    no_slots = torch.zeros_like(target)  # torch's layer has no query embedding
    torch.testing.assert_close(layer(target, no_slots, cells, cells), reference(target, cells), **TOLERANCE)


def test_slots_are_added_where_the_decoder_asks_and_positions_to_keys_only() -> None:
    width = 64
    layer = SumHead(width, 2, num_layers=1, feedforward_width=8).eval().layers[0]
    target, slots, cells, keys = (torch.randn(1, n, width) for n in (2, 2, 5, 5))
    target2 = layer.norms[0](target + layer.self_attention(target + slots, target + slots, target)[0])
    target3 = layer.norms[1](target2 + layer.cross_attention(target2 + slots, keys, cells)[0])
    expected = layer.norms[2](target3 + layer.contract(layer.expand(target3).relu()))
    torch.testing.assert_close(layer(target, slots, cells, keys), expected)


@pytest.mark.parametrize("image_size", [64, 96, 160])
def test_positions_fit_another_image_size(image_size: int) -> None:
    clip = make_clip(CONFIGS["resnet"])
    before = clip.visual.attnpool.positional_embedding.clone()
    resize_positions(clip.visual, image_size)
    table, side = clip.visual.attnpool.positional_embedding, image_size // 32
    assert table.shape == (side * side + 1, before.shape[1])
    torch.testing.assert_close(table[0], before[0])
    if side == 3:
        assert torch.equal(table, before)
    # open_clip's resize for ViTs, on the same table
    state = {"visual.positional_embedding": before}
    holder = nn.Module()
    holder.visual = nn.Module()
    holder.visual.grid_size = (side, side)
    open_clip.model.resize_pos_embed(state, holder)
    torch.testing.assert_close(table.data, state["visual.positional_embedding"])
    pixels = torch.randn(2, 3, image_size, image_size)
    expected = normalize(clip.encode_image(pixels), dim=-1)
    torch.testing.assert_close(ClipHead()(*parts(clip, pixels)).vectors[:, 0], expected, **TOLERANCE)


def test_rn50_at_full_size_equals_encode_image() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.create_model("RN50").eval()
        pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        features, pooling = parts(clip, pixels)
        assert features.cells.shape == (2, 49, 2048)
        assert (pooling.width, pooling.dim) == (2048, 1024)
        expected = normalize(clip.encode_image(pixels), dim=-1)
        torch.testing.assert_close(ClipHead()(features, pooling).vectors[:, 0], expected, **TOLERANCE)
        assert ClusterHead(20)(features, pooling).vectors.shape == (2, 20, 1024)


def test_folded_norms_change_nothing() -> None:
    clip = make_clip(CONFIGS["resnet"])
    for module in clip.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    pixels = make_pixels(clip, 2)
    before = clip.encode_image(pixels)
    fold_norms(clip.visual)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in clip.visual.modules())
    torch.testing.assert_close(clip.encode_image(pixels), before, rtol=1e-4, atol=1e-5)


def test_a_tower_without_pooling_attention_is_refused() -> None:
    vision = {
        "image_size": 32,
        "layers": 2,
        "width": 16,
        "head_width": 8,
        "patch_size": 16,
        "pool_type": "avg",
    }
    clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=TEXT)
    with pytest.raises(ConfigError, match="no pooling attention"):
        make_backbone(clip.visual)


def test_nothing_comes_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whatever asked for one would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not for this device
    clip = make_clip(CONFIGS["resnet"]).to("meta")
    features, pooling = parts(clip, torch.empty(2, 3, 96, 96, device="meta"))
    heads = (
        ClipHead(),
        DenseHead(),
        ClusterHead(4),
        SumHead(pooling.width, 4, num_layers=1).eval().to("meta"),
    )
    for head in heads:
        vectors, boxes = head(features, pooling)
        keep = distinct_slots(vectors, 0.97)
        assert vectors.shape[:2] == boxes.shape[:2] == keep.shape
