"""CLIP's pooling attention, asked by any slots instead of the one that CLIP asks with.

One interface for the three kinds of towers. What CLIP returns itself is `attend` with `default_slot` and the
prefix among the keys. `project_cells` is what the layer would return if it looked at one cell alone, with
weight 1: the value and output projections, and whatever follows (MaskCLIP's dense features).

    ModifiedResNet   y = c(v(x)); positions only in queries and keys unless asked for (FOR, eq. 2)
    MAP (SigLIP)     y = proj(v(x)), then the pool's own residual MLP and the head
    class-token ViT  the last block with the cell's value for its attention: x + out(v(ln_1 x)), then the
                     residual MLP, ln_post and proj, as MaskCLIP's published ViT code does. A slot is the
                     block's input in the class token's place, so its residual is the slot itself
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from for_ray.model.backbone import Features, kind_of


class Pooled(NamedTuple):
    """embeddings [B, N, D], not normalised; attention of each slot to each cell, mean of heads [B, N, K]."""

    embeddings: Tensor
    attention: Tensor


class Pooling(nn.Module):
    """The pooling layer of a CLIP vision tower.

    Attributes:
        width: C, size of cells and slots.
        dim: D, size of the joint space.
    """

    width: int
    dim: int
    pool: Any
    block: Any

    def positions(self) -> Tensor | None:
        """What a key adds to its cell to know its place [K, C]; None where cells carry it already."""
        return None

    def default_slot(self, features: Features) -> Tensor:
        """The slot that CLIP asks with [B, 1, C], position included."""
        raise NotImplementedError

    def attend(self, slots: Tensor, features: Features, *, with_prefix: bool) -> Pooled:
        """Pool the cells for slots [B, N, C]; `with_prefix` puts the prefix tokens among the keys."""
        raise NotImplementedError

    def project_cells(self, features: Features, *, with_positions: bool = False) -> Tensor:
        """Each cell alone in the joint space [B, K, D], not normalised."""
        raise NotImplementedError


class ResNetPooling(Pooling):
    """AttentionPool2d of a ModifiedResNet."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.pool = visual.attnpool
        self.width, self.dim = self.pool.c_proj.in_features, self.pool.c_proj.out_features

    def positions(self) -> Tensor:
        """The table without the mean token's row."""
        return cast(Tensor, self.pool.positional_embedding)[1:]

    def default_slot(self, features: Features) -> Tensor:
        """The mean cell with its position."""
        position: Tensor = self.pool.positional_embedding[:1]
        return features.prefix + position.to(features.prefix.dtype)

    def attend(self, slots: Tensor, features: Features, *, with_prefix: bool) -> Pooled:
        """Eq. 3; with the default slot and the prefix, eq. 1 as open_clip runs it."""
        pool = self.pool
        keys = features.cells + self.positions().to(features.cells.dtype)
        if with_prefix:
            keys = torch.cat([self.default_slot(features), keys], dim=1)
        queries, keys, values = pool.q_proj(slots), pool.k_proj(keys), pool.v_proj(keys)
        mixed, attention = multi_head_attention(queries, keys, values, pool.num_heads)
        return Pooled(pool.c_proj(mixed), attention[..., -features.cells.shape[1] :])

    def project_cells(self, features: Features, *, with_positions: bool = False) -> Tensor:
        """Eq. 2."""
        cells = features.cells
        if with_positions:
            cells = cells + self.positions().to(cells.dtype)
        return cast(Tensor, self.pool.c_proj(self.pool.v_proj(cells)))


class MapPooling(Pooling):
    """AttentionPoolLatent of a timm ViT, with the layers behind it."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.pool = visual.trunk.attn_pool
        self.behind = nn.Sequential(visual.trunk.fc_norm, visual.trunk.head, visual.head)
        self.width = cast(Tensor, self.pool.latent).shape[-1]
        with torch.no_grad():
            self.dim = self._behind(torch.zeros(1, 1, self.pool.kv.in_features)).shape[-1]

    def default_slot(self, features: Features) -> Tensor:
        """The learnt latent, the same for all images."""
        return cast(Tensor, self.pool.latent)[:, :1].expand(len(features.cells), -1, -1)

    def attend(self, slots: Tensor, features: Features, *, with_prefix: bool) -> Pooled:
        """The pool's attention with other latents."""
        tokens = torch.cat([features.prefix, features.cells], dim=1) if with_prefix else features.cells
        keys, values = self.pool.kv(tokens).chunk(2, dim=-1)
        norms = {"query_norm": self.pool.q_norm, "key_norm": self.pool.k_norm}
        mixed, attention = multi_head_attention(
            self.pool.q(slots), keys, values, self.pool.num_heads, **norms
        )
        return Pooled(self._behind(mixed), attention[..., -features.cells.shape[1] :])

    def project_cells(self, features: Features, *, with_positions: bool = False) -> Tensor:  # noqa: ARG002
        """Cells carry their positions already: `with_positions` changes nothing."""
        return self._behind(self.pool.kv(features.cells).chunk(2, dim=-1)[1])

    def _behind(self, mixed: Tensor) -> Tensor:
        mixed = self.pool.proj(mixed)
        if self.pool.mlp is not None:
            mixed = mixed + self.pool.mlp(self.pool.norm(mixed))
        return cast(Tensor, self.behind(mixed))


class ClassTokenPooling(Pooling):
    """The last block of an open_clip VisionTransformer, with ln_post and proj."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.block = visual.transformer.resblocks[-1]
        self.ln_post, self.proj = visual.ln_post, visual.proj
        self.width, self.dim = self.proj.shape[0], self.proj.shape[1]

    def default_slot(self, features: Features) -> Tensor:
        """The class token as it enters the last block."""
        return features.prefix

    def attend(self, slots: Tensor, features: Features, *, with_prefix: bool) -> Pooled:
        """The last block, with the slots in the class token's place."""
        block = self.block
        tokens = torch.cat([features.prefix, features.cells], dim=1) if with_prefix else features.cells
        tokens = block.ln_1(tokens)
        queries = self._project(block.ln_1(slots), 0)
        keys, values = self._project(tokens, 1), self._project(tokens, 2)
        mixed, attention = multi_head_attention(queries, keys, values, block.attn.num_heads)
        return Pooled(self._behind(slots, mixed), attention[..., -features.cells.shape[1] :])

    def project_cells(self, features: Features, *, with_positions: bool = False) -> Tensor:  # noqa: ARG002
        """Cells carry their positions already: `with_positions` changes nothing."""
        return self._behind(features.cells, self._project(self.block.ln_1(features.cells), 2))

    def _project(self, tokens: Tensor, part: int) -> Tensor:
        """Query (part 0), key (1) or value (2) of the block's attention."""
        attention, rows = self.block.attn, slice(part * self.width, (part + 1) * self.width)
        return functional.linear(tokens, attention.in_proj_weight[rows], attention.in_proj_bias[rows])

    def _behind(self, residual: Tensor, mixed: Tensor) -> Tensor:
        block = self.block
        tokens = residual + block.ls_1(block.attn.out_proj(mixed))
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return cast(Tensor, self.ln_post(tokens) @ self.proj)


def make_pooling(visual: nn.Module) -> Pooling:
    """The pooling layer of an open_clip vision tower; shares its weights.

    Raises:
        ConfigError: The tower has none that can be asked about cells.
    """
    kind = kind_of(visual)
    return {"resnet": ResNetPooling, "map": MapPooling, "class_token": ClassTokenPooling}[kind](visual)


def multi_head_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    *,
    query_norm: nn.Module | None = None,
    key_norm: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of projected queries [B, N, C] over keys and values [B, K, C].

    Returns:
        The mixed values, heads side by side [B, N, C]; the weights, mean of heads [B, N, K].
    """
    queries, keys, values = (_split_heads(tokens, num_heads) for tokens in (queries, keys, values))
    queries = query_norm(queries) if query_norm is not None else queries
    keys = key_norm(keys) if key_norm is not None else keys
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)  # [B, heads, N, K]
    weights = scores.softmax(dim=-1)
    mixed = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)  # -> [B, N, C]
    return mixed, weights.mean(dim=1)


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return tokens.view(*tokens.shape[:2], num_heads, -1).transpose(1, 2)
