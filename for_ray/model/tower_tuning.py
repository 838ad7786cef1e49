"""Tuning CLIP's towers by the second paper: the model, what of it is trained, one step, and the bundle.

    gpr        ArcMargin on classes; the image tower
    mcip       λ₁ · ArcMargin on classes + λ₂ · MCArcMargin on pseudo-captions; the image tower
    realign    InfoNCE between captions and the locked image tower's vectors; the text tower (Re-A)

Source: MCIP (arXiv 2409.01936), §3.2 and §3.3. In `gpr` ArcMargin acts behind the projection to the joint
space, which is locked; the paper discards it there. Kept, it leaves the vectors the dimension of the texts:
`realign` can follow with the text tower as it is, and a search by pictures and words needs nothing else.

Batch norms keep their statistics, so that an image's vector does not depend on its batch, and many workers
learn what one learns: what a loss is divided by is the weight of the global batch.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from for_ray.errors import ConfigError
from for_ray.model.backbone import kind_of
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import load_pooling
from for_ray.model.finetuning import BETAS, TINY, LossMean
from for_ray.model.margin_loss import ArcMargin, info_nce, mc_arc_margin
from for_ray.model.objectives import num_workers
from for_ray.model.pooling import make_pooling
from for_ray.model.towers import build_clip
from for_ray.model.trainer import HaltedError, Trainer
from for_ray.storage import temporary_folder

Recipe = Literal["gpr", "realign", "mcip"]

PROXIES = "arc."
"""What the names of the proxies begin with among an objective's weights."""


@dataclass(frozen=True)
class TuneSettings:
    """What is trained, and against what.

    Attributes:
        recipe: Which.
        num_blocks: The last blocks of the image tower that are trained, with its pooling; None: all of it.
        with_projection: Whether the image tower's projection to the joint space is trained, too; the losses
            act behind it either way.
        scale: s of the margin losses.
        margin: m of theirs, radians.
        gamma_classes: λ₁.
        gamma_captions: λ₂.
        seed: Of the proxies.
    """

    recipe: Recipe
    num_blocks: int | None = None
    with_projection: bool = True
    scale: float = 30.0
    margin: float = 0.1
    gamma_classes: float = 0.5
    gamma_captions: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class AdamWSettings:
    """How it is minimised.

    Attributes:
        lr: Learning rate of the first step.
        lr_end: Of the last step; half a cosine lies between.
        num_steps: Of the run.
        weight_decay: Decoupled; of matrices alone, not of biases and norms.
        proxies_factor: What the proxies' learning rate is multiplied with.
        max_norm: Longer gradients are shortened to this.
    """

    lr: float = 1e-6
    lr_end: float = 1e-7
    num_steps: int = 1
    weight_decay: float = 1e-2
    proxies_factor: float = 100.0
    max_norm: float = 1.0

    def lr_at(self, step: int) -> float:
        """The towers' learning rate of a step, from 0."""
        share = min(1.0, step / max(1, self.num_steps - 1))
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * share))


class ImageBatch(NamedTuple):
    """This worker's part of a batch of `gpr` or `mcip`.

    pixels: Normalised [b, 3, S, S].
    labels: Classes [b], int64.
    is_known: Whether the image could be read [b], bool.
    captions: The distinct captions of the whole batch, unit vectors [M, D]; M may be 0.
    is_own: Which are whose [b, M], bool.
    """

    pixels: Tensor
    labels: Tensor
    is_known: Tensor
    captions: Tensor
    is_own: Tensor


class PairBatch(NamedTuple):
    """This worker's part of a batch of `realign`.

    tokens: Of its captions [b, L].
    images: Unit vectors of all images of the batch [B, D], those of the first worker first.
    first: Where this worker's begin among them.
    """

    tokens: Tensor
    images: Tensor
    first: int


class Sums(NamedTuple):
    """Of a loss over this worker's part: the sum, with its gradient, and the weight to divide it by."""

    loss: Tensor
    weight: Tensor


class ClassObjective(nn.Module):
    """The losses of `gpr` and `mcip`.

    ArcMargin is averaged over the images of the global batch that could be read, MCArcMargin over those of
    them that have captions: λ₂ weighs as much where few images have some as where all have.

    Args:
        clip: From `load_clip`.
        num_classes: V.
        dim: D.
        settings: What is trained; `clip`'s other weights are frozen.
    """

    def __init__(self, clip: nn.Module, num_classes: int, dim: int, settings: TuneSettings) -> None:
        super().__init__()
        self.clip, self._settings = clip, settings
        self.arc = ArcMargin(
            num_classes, dim, scale=settings.scale, margin=settings.margin, seed=settings.seed
        )
        clip.requires_grad_(False)
        for parameter in image_parameters(clip, settings):
            parameter.requires_grad_(True)

    def forward(self, batch: ImageBatch) -> dict[str, Sums]:
        """The sums over this worker's images."""
        settings = self._settings
        vectors = self.clip.encode_image(batch.pixels).float()  # type: ignore[operator]
        known = batch.is_known.to(vectors.dtype)
        with torch.autocast(vectors.device.type, enabled=False):
            found = {"classes": Sums((self.arc(vectors, batch.labels) * known).sum(), known.sum())}
            if settings.recipe == "mcip":
                loss = mc_arc_margin(
                    vectors, batch.captions, batch.is_own, scale=settings.scale, margin=settings.margin
                )
                taught = known * loss.has_captions
                found["captions"] = Sums((loss.values * taught).sum(), taught.sum())
        return found


class PairObjective(nn.Module):
    """The loss of `realign`; the image tower takes no part, its vectors are given.

    Args:
        clip: From `load_clip`.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        clip.requires_grad_(False)
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(not name.startswith(("visual.", "logit_")))
        self._scale = float(clip.logit_scale.detach().exp())  # type: ignore[operator]

    def forward(self, batch: PairBatch) -> dict[str, Sums]:
        """The loss over the whole batch, its value shared out, its gradient that of one's own captions."""
        texts = self.clip.encode_text(batch.tokens).float()  # type: ignore[operator]
        world = num_workers()
        if world > 1:
            texts = _among_all(texts, batch.first, len(batch.images))
        with torch.autocast(texts.device.type, enabled=False):
            total = info_nce(batch.images, texts, scale=self._scale).sum()
        loss = total - (1 - 1 / world) * total.detach()
        return {"pairs": Sums(loss, torch.full_like(loss.detach(), len(batch.images) / world))}


def _among_all(mine: Tensor, first: int, num_rows: int) -> Tensor:
    """The rows of all workers [B, D], the gradient that of one's own."""
    everyone = torch.zeros(num_rows, mine.shape[1], device=mine.device, dtype=mine.dtype)
    everyone[first : first + len(mine)] = mine.detach()
    distributed.all_reduce(everyone)
    return torch.cat([everyone[:first], mine, everyone[first + len(mine) :]])


class TowerTrainer(Trainer):
    """Trains an objective step by step; where a process group exists, together with the other workers.

    Args:
        objective: On its device.
        settings: The weights of the losses.
        adam: The optimizer's settings.
        dtype: Of the computation: float32, or a lower one by autocast, float16 with scaled gradients.
    """

    def __init__(
        self,
        objective: ClassObjective | PairObjective,
        settings: TuneSettings,
        adam: AdamWSettings,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(objective.eval(), dtype=dtype)
        self._settings, self._adam = settings, adam
        self.optimizer = torch.optim.AdamW(
            _groups(self.trained, adam), lr=adam.lr, betas=BETAS, fused=self.device.type == "cuda"
        )

    def step(self, batch: ImageBatch | PairBatch, *, step: int) -> dict[str, LossMean]:
        """Learn from one global batch; this worker has its part of it, at least one image.

        Args:
            batch: This worker's part.
            step: From 0, counted from the start of the run.

        Returns:
            Each loss over the global batch, the same on all workers.

        Raises:
            HaltedError: A loss is not finite; nothing was changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._adam.lr_at(step) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            sums: dict[str, Sums] = self._model(batch)
        means = _means(sums)
        if not all(math.isfinite(each.mean) for each in means.values()):
            raise HaltedError(f"step {step}: the loss is not finite: take a lower --lr, or float32")
        if not any(each.weight for each in means.values()):
            return means
        # DDP averages the gradients of the workers; their sum is wanted.
        parts = [self._gamma(name) / max(means[name].weight, TINY) * each.loss for name, each in sums.items()]
        self._scaler.scale(num_workers() * torch.stack(parts).sum()).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained.values(), self._adam.max_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return means

    def _gamma(self, name: str) -> float:
        if self._settings.recipe != "mcip":
            return 1.0
        return self._settings.gamma_classes if name == "classes" else self._settings.gamma_captions


def _means(sums: dict[str, Sums]) -> dict[str, LossMean]:
    """The losses over all workers; a step waits for the device here."""
    totals = torch.stack([part.detach().double() for each in sums.values() for part in each])
    if num_workers() > 1:
        distributed.all_reduce(totals)
    values = totals.tolist()
    return {
        name: LossMean(values[2 * i] / max(values[2 * i + 1], TINY), values[2 * i + 1], 0, 0)
        for i, name in enumerate(sums)
    }


def _groups(trained: dict[str, nn.Parameter], adam: AdamWSettings) -> list[dict[str, Any]]:
    """Parameters by how they are trained: proxies faster, biases and norms without decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in trained.items():
        factor = adam.proxies_factor if name.startswith(PROXIES) else 1.0
        decay = adam.weight_decay if value.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(value)
    return [
        {"params": values, "factor": factor, "weight_decay": decay}
        for (factor, decay), values in groups.items()
    ]


def image_parameters(clip: nn.Module, settings: TuneSettings) -> list[nn.Parameter]:
    """The weights of the image tower that are trained.

    Raises:
        ConfigError: The tower has not so many blocks.
    """
    blocks, projection = _blocks(clip.visual)
    if settings.num_blocks is not None and settings.num_blocks > len(blocks):
        raise ConfigError(
            f"--tune-blocks {settings.num_blocks}: the image tower has {len(blocks)} blocks; leave it out to "
            "train all of it"
        )
    visual = dict(clip.visual.named_parameters())  # type: ignore[union-attr]
    first = 0 if settings.num_blocks is None else len(blocks) - settings.num_blocks
    locked = {id(parameter) for block in blocks[:first] for parameter in block.parameters()}
    if settings.num_blocks is not None:  # what stands before the first block is none of the last
        locked |= {id(visual[name]) for name in visual if name.startswith(_STEM)}
    if not settings.with_projection:
        locked |= {id(parameter) for parameter in projection}
    return [parameter for parameter in visual.values() if id(parameter) not in locked]


def checkpoint_activations(clip: nn.Module, recipe: Recipe) -> None:
    """Let the tower that is trained keep what each block begins with, and compute the rest again.

    Raises:
        ConfigError: The tower cannot do it: a ResNet, or a text tower of Hugging Face.
    """
    if recipe == "realign":
        tower, blocks = "text", getattr(clip, "text", clip).transformer
    else:
        tower, visual = "image", clip.visual
        blocks = getattr(visual, "trunk", None) or getattr(visual, "transformer", None)
    if not hasattr(blocks, "grad_checkpointing"):
        raise ConfigError(no_checkpointing(tower))
    blocks.grad_checkpointing = True


def no_checkpointing(tower: str) -> str:
    """Why `checkpoint_activations` is refused, and what to do."""
    return (
        f"--grad-checkpointing: the {tower} tower has none in open_clip, which has none for ResNets and text "
        "towers of Hugging Face: leave it out; where memory is short take more --workers, or a smaller "
        "--batch-size"
    )


_STEM = (
    *("conv", "bn", "class_embedding", "positional_embedding", "ln_pre"),
    *("trunk.patch_embed", "trunk.pos_embed", "trunk.cls_token", "trunk.reg_token", "trunk.norm_pre"),
)
"""What the names of an image tower's weights before its first block begin with."""


def _blocks(visual: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The blocks of an image tower, first to last, and its projection to the joint space."""
    kind = kind_of(visual)
    if kind == "resnet":
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return stages, list(visual.attnpool.c_proj.parameters())
    if kind == "class_token":
        return list(visual.transformer.resblocks), [visual.proj] if visual.proj is not None else []
    return list(visual.trunk.blocks), list(visual.head.parameters())


def load_clip(bundle: Bundle) -> nn.Module:
    """Both towers with the bundle's weights, a tuned pooling layer among them; float32, frozen, on the CPU.

    Raises:
        ConfigError: The weights can't be had, or don't fit.
        DataError: A file of the bundle is not what its checksum says.
        StorageError: The store refused.
    """
    clip = build_clip(bundle)
    if bundle.config.tuned_pooling:
        load_pooling(bundle, make_pooling(clip.visual))  # type: ignore[arg-type]
    return clip


def embed(
    clip: nn.Module, batches: Iterable[Tensor], *, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unit vectors [B, D], float16, of batches of normalised pixels, on the device of these.

    Args:
        clip: Its image tower looks at them.
        batches: May be none.
        dim: D.
        dtype: Of the computation: float32, or a lower one by autocast.
    """
    parts = [torch.empty(0, dim, dtype=torch.float16)]
    with torch.inference_mode():
        for pixels in batches:
            with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
                vectors = clip.encode_image(pixels)  # type: ignore[operator]
            parts.append(functional.normalize(vectors.float(), dim=1).half())
    return torch.cat([part.to(parts[-1].device) for part in parts])


def save_tuned(
    bundle: Bundle, clip: nn.Module, uri: str, *, recipe: Recipe, name: str | None = None
) -> Bundle:
    """Write a bundle of head `mcip` with both towers as they are now.

    Args:
        bundle: What was tuned: one vector an image.
        clip: Its towers.
        uri: A folder or `s3://bucket/prefix`.
        recipe: By which; those that tuned the encoder before stay named.
        name: What people call the encoder; as before where None.

    Returns:
        The bundle as it lies there.

    Raises:
        StorageError: The store or the disk refused.
    """
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in clip.state_dict().items()}
    content = save(state)
    model_config = copy.deepcopy(bundle.model_config)
    model_config["vision_cfg"]["image_size"] = bundle.image_size  # positions were fitted to it
    changes = {
        "name": name or bundle.name,
        "model": "model.json",
        "pretrained": "weights.safetensors",
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "head": "mcip",
        "head_sha256": None,
        "head_seed": None,
        "tuned_pooling": False,
        "recipes": ",".join([*(bundle.config.recipes or "").split(","), recipe]).strip(","),
    }
    with temporary_folder() as folder:
        path = folder / "weights.safetensors"
        path.write_bytes(content)
        Bundle(bundle.config.model_copy(update=changes), model_config, str(path)).save(uri)
    return open_bundle(uri)
