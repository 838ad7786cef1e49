"""Train the picture book's encoder, a tiny CLIP, from scratch on two CPU cores.

    python benchmarks/picturebook_encoder.py --out runs/picturebook               train and export
    python benchmarks/picturebook_encoder.py --out runs/picturebook --minutes 0   export again

Scenes are drawn while it trains, from Font Awesome, Phosphor and Remix; the data set draws from Material
Design Icons. The loss is CLIP's, with one exclusion: a caption that is true of another image, too, is no
negative for it. Each process trains with one thread and drains a renderer of its own; the losses
see the batches of all processes. Interrupted, it resumes from `<out>/checkpoint.pt`. It ends with
`<out>/weights.safetensors`, for `for_ray/model/assets/picturebook/`; `benchmarks/zero_shot.py` measures what
lies there on scenes of the training families, `benchmarks/heads.py` on the data set.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import queue
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads must not spin

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from for_ray.datasets.backdrops import MOODS
from for_ray.datasets.captioned import (
    KINDS,
    NUMBERS,
    Caption,
    Scene,
    claims_of,
    draw_scene,
    num_claims,
    paint_backdrops,
    training_names,
    write_caption,
)
from for_ray.datasets.scenes import COLOURS
from for_ray.model.text import SEVEN_PROMPTS

MODEL_CONFIG = Path(__file__).parents[1] / "for_ray/model/assets/picturebook/model.json"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # open_clip's default
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
START_TOKEN, END_TOKEN, PADDING = 49406, 49407, 0

BATCH = {"easy": 64, "small": 112, "medium": 64, "large": 48}  # images a process and step
BUFFER = {"easy": 16000, "small": 16000, "medium": 12000, "large": 8000}  # scenes that a process keeps
BLOCK = 64  # scenes that a renderer hands over at once
# Colours are so much easier than names that the text tower learns them and nothing else for 150,000 images;
# prompts make all names look alike to an untrained one. So captions are bare names at first.
BARE_UNTIL = 0.12  # fraction of the training
# Without a price on the spread of its scores the pooling attention grows so sharp (standard deviations of
# 30 to 700) that each head picks one cell: no other cell learns from the caption, and slots that ask the same
# layer get no gradient.
SPREAD_WEIGHT = 1e-3
# Fraction of the training from which on -> how often scenes of each kind come.
SCHEDULE: tuple[tuple[float, dict[str, float]], ...] = (
    (0.00, {"easy": 1.0}),
    (0.08, {"easy": 0.2, "small": 0.8}),
    (0.20, {"small": 0.5, "medium": 0.5}),
    (0.60, {"small": 0.25, "medium": 0.45, "large": 0.3}),
    (0.82, {"small": 0.1, "medium": 0.2, "large": 0.7}),
)


def mixture(progress: float) -> dict[str, float]:
    """How often scenes of each kind come at this fraction of the training."""
    return [shares for start, shares in SCHEDULE if progress >= start][-1]


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Warm-up over 200 steps, then flat, then a cosine to a hundredth over the last two fifths."""
    decay = 1.0 if progress < 0.6 else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.6) / 0.4)))
    return peak * min(1.0, (step + 1) / 200) * max(decay, 0.01)


# --- the model ----------------------------------------------------------------------------------------------


def build_model() -> CLIP:
    """open_clip's CLIP from the package's configuration, random weights.

    Positions start small: the dense embeddings that searches use leave them out.
    """
    config = json.loads(MODEL_CONFIG.read_text(encoding="utf-8"))
    model = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    with torch.no_grad():
        model.visual.attnpool.positional_embedding.mul_(0.2)
    return model


def feature_map(model: CLIP, pixels: Tensor) -> Tensor:
    """The last feature map: normalised pixels [B, 3, S, S] -> [B, C, S/32, S/32], float32."""
    visual = model.visual
    with torch.autocast("cpu", torch.bfloat16):
        features: Tensor = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
    return features.float()


def positions(model: CLIP, side: int) -> Tensor:
    """The pooling layer's positions [1 + side², C], bicubic where the map is not the configured one."""
    table: Tensor = model.visual.attnpool.positional_embedding
    old = math.isqrt(len(table) - 1)
    if old == side:
        return table
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False, antialias=side < old
    )
    return torch.cat([table[:1], grid.reshape(table.shape[1], -1).T])


def pool(model: CLIP, features: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's image embedding, for a map of any size.

    Args:
        model: The model.
        features: Its last feature map [B, C, h, h].

    Returns:
        Unit vectors [B, D]; the variance of the attention's scores over the tokens, a scalar.
    """
    attnpool = model.visual.attnpool
    cells = features.flatten(2).transpose(1, 2)  # [B, C, h, h] -> [B, K, C]
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + positions(model, features.shape[-1])
    batch, _, channels = tokens.shape

    def split(x: Tensor) -> Tensor:
        return x.view(batch, -1, attnpool.num_heads, channels // attnpool.num_heads).transpose(1, 2)

    asking = split(attnpool.q_proj(tokens[:, :1])) * (channels // attnpool.num_heads) ** -0.5
    scores = asking @ split(attnpool.k_proj(tokens)).transpose(2, 3)  # [B, heads, 1, 1 + K]
    pooled = (scores.softmax(-1) @ split(attnpool.v_proj(tokens))).transpose(1, 2).reshape(batch, channels)
    return functional.normalize(attnpool.c_proj(pooled), dim=-1), scores.var(-1).mean()


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """open_clip's text embedding of tokens [B, L], L at most the context's: unit vectors [B, D]."""
    length = tokens.shape[1]
    is_whole = len(model.token_embedding.weight) == model.vocab_size
    rows = tokens if is_whole else torch.searchsorted(used_tokens(), tokens)
    x = model.token_embedding(rows) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return functional.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection, dim=-1)


def keep_used_tokens(model: CLIP) -> None:
    """Shrink the token table to the rows that captions use; the others only slow down the optimizer."""
    rows = model.token_embedding.weight.detach()[used_tokens()].clone()
    model.token_embedding = nn.Embedding(len(rows), rows.shape[1], _weight=rows)


def to_input(pixels: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Normalise uint8 [B, S, S, 3] to channels-last [B, 3, S, S]; a generator also varies the light."""
    x = pixels.permute(0, 3, 1, 2).float() / 255

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(generator.uniform(low, high, (len(x), 1, 1, 1)).astype(np.float32))

    if rng is not None:
        generator = rng
        x = (x - 0.5) * draw(0.75, 1.2) + 0.5 + draw(-0.1, 0.1)
        x = x + torch.randn_like(x[:1]) * draw(0, 0.06)
    return ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)


# --- captions as tensors ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=65536)
def word_tokens(word: str) -> tuple[int, ...]:
    """CLIP's tokens of one word; a caption's are those of its words, one after the other."""
    return tuple(_tokenizer().encode(word))


@functools.cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def _words(caption: str) -> list[str]:
    return caption.replace(".", " .").split()


def tokenize(captions: Sequence[str], context: int = 24) -> Tensor:
    """Tokens [B, L], int64, as the standard tokenizer gives them, cut to the longest caption; L ≤ context."""
    rows = [[t for word in _words(caption) for t in word_tokens(word)][: context - 2] for caption in captions]
    tokens = torch.full((len(rows), max(map(len, rows)) + 2), PADDING)
    for index, row in enumerate(rows):
        tokens[index, : len(row) + 2] = torch.tensor([START_TOKEN, *row, END_TOKEN])
    return tokens


@functools.cache
def used_tokens() -> Tensor:
    """Every token that a caption can hold, ascending, int64."""
    nouns = [word for name in training_names() for word in name.split()]
    words = {*nouns, *(noun + "s" for noun in nouns), *COLOURS, *NUMBERS.values(), "many", "a", "an", "and"}
    words.update(word for text in (*SEVEN_PROMPTS, *MOODS) for word in _words(text.replace("{}", "")))
    tokens = {START_TOKEN, END_TOKEN, PADDING}.union(*(word_tokens(word) for word in words))
    return torch.tensor(sorted(tokens))


def claim_matrix(rows: Sequence[set[int] | tuple[int, ...]]) -> Tensor:
    """Claims as a matrix of 0 and 1, float32 [B, all claims]."""
    matrix = torch.zeros(len(rows), num_claims())
    for index, row in enumerate(rows):
        matrix[index, list(row)] = 1
    return matrix


# --- scenes in store ----------------------------------------------------------------------------------------


def render_for_ever(seed: int, niceness: int, progress: Any, blocks: Any) -> None:
    """A process that fills the queue with (kind, scenes), of the kinds that the progress asks for."""
    os.nice(niceness)
    rng = np.random.default_rng(seed)
    backdrops = paint_backdrops(rng, 300)
    while True:
        if rng.random() < 0.1:
            backdrops = backdrops[len(backdrops) // 20 :]
            backdrops += paint_backdrops(rng, 300 - len(backdrops))
        shares = mixture(min(1.0, progress.value + 0.02))  # ahead, so that a new kind is there in time
        kind = str(rng.choice(list(shares), p=list(shares.values())))
        scenes = [draw_scene(rng, KINDS[kind], backdrops) for _ in range(BLOCK)]
        blocks.put((kind, [scene for scene in scenes if scene.objects]))


class SceneStore:
    """The latest scenes of each kind, drawn from several times with other captions and flips.

    Args:
        blocks: The queue that `render_for_ever` fills.
    """

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks
        self.scenes: dict[str, deque[Scene]] = {kind: deque(maxlen=BUFFER[kind]) for kind in KINDS}
        self.num_received = 0

    def receive(self, at_least: int = 0) -> None:
        """Take in what the renderer has finished; wait until it has sent so many scenes in all."""
        while True:
            try:
                kind, scenes = self.blocks.get(self.num_received < at_least)
            except queue.Empty:
                return
            self.scenes[kind].extend(scenes)
            self.num_received += len(scenes)

    def sample(self, rng: np.random.Generator, shares: dict[str, float]) -> list[Scene]:
        """A batch of one kind; kinds that have not arrived yet are left out."""
        ready = {kind: share for kind, share in shares.items() if len(self.scenes[kind]) >= 4 * BLOCK}
        kind = str(rng.choice(list(ready), p=np.array(list(ready.values())) / sum(ready.values())))
        scenes = self.scenes[kind]
        return [self._flipped(rng, scenes[int(rng.integers(len(scenes)))]) for _ in range(BATCH[kind])]

    @staticmethod
    def _flipped(rng: np.random.Generator, scene: Scene) -> Scene:
        """The scene or its mirror image."""
        return scene if rng.random() < 0.5 else dataclasses.replace(scene, pixels=scene.pixels[:, ::-1])


# --- training -----------------------------------------------------------------------------------------------


@dataclass
class State:
    """What a checkpoint holds: the model, its running average, the optimizer, and how far it came."""

    model: CLIP
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    images: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        content = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "counts": {"step": self.step, "images": self.images, "seconds": self.seconds},
        }
        torch.save(content, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        content = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.average = content["average"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.images, self.seconds = (content["counts"][k] for k in ("step", "images", "seconds"))


def new_state(peak_rate: float) -> State:
    """A state before the first step; AdamW decays matrices only, the token table not."""
    model = build_model()
    keep_used_tokens(model)
    model = model.to(memory_format=torch.channels_last).train()
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in named if p.ndim <= 1 or "embedding" in n]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98))
    return State(model, {n: v.clone() for n, v in model.state_dict().items()}, optimizer)


def gather(x: Tensor) -> Tensor:
    """All processes' rows, with gradient through the own ones; their numbers may differ."""
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(x)]))
    padded = torch.zeros(max(int(count) for count in counts), x.shape[1])
    padded[: len(x)] = x.detach()
    parts = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([x if r == rank else parts[r][: int(counts[r])] for r in range(world)])


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, also_true: Tensor) -> Tensor:
    """CLIP's loss.

    Args:
        image: Unit vectors [B, D].
        text: Unit vectors [B, D]; row i is a caption of image i.
        scale: What cosines are multiplied with, a scalar.
        also_true: bool [B, B]; where caption j is true of image i ≠ j, which makes it no negative.
    """
    logits = (scale * image @ text.T).masked_fill(also_true, float("-inf"))
    matching = torch.arange(len(image))
    return (functional.cross_entropy(logits, matching) + functional.cross_entropy(logits.T, matching)) / 2


def batch_loss(model: CLIP, scenes: list[Scene], captions: list[Caption], rng: np.random.Generator) -> Tensor:
    """The loss over all processes' scenes, differentiable by this one's."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    own, spread = pool(model, feature_map(model, to_input(pixels, rng)))
    image = gather(own)
    text = gather(encode_text(model, tokenize([caption.text for caption in captions], model.context_length)))
    true = gather(claim_matrix([claims_of(scene.objects, scene.mood) for scene in scenes]))
    claimed = gather(claim_matrix([caption.claims for caption in captions]))
    also_true = true @ claimed.T > claimed.sum(1) - 0.5  # [B, B]: all that caption j claims holds for image i
    also_true.fill_diagonal_(fill_value=False)
    loss = contrastive_loss(image, text, model.logit_scale.exp(), also_true)
    return loss + SPREAD_WEIGHT * spread / dist.get_world_size()


def take_step(state: State, loss: Tensor, rate: float) -> None:
    """One step of AdamW on the sum of the processes' gradients; the average follows."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=False)
    torch.autograd.backward(loss)
    sum_gradients(state.model)
    nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    keep = min(0.998, state.step / (state.step + 50))
    with torch.no_grad():
        state.model.logit_scale.clamp_(max=math.log(100))
        for name, value in state.model.state_dict().items():
            if value.dtype.is_floating_point:
                state.average[name].lerp_(value, 1 - keep)
    state.step += 1


def sum_gradients(model: CLIP) -> None:
    """Add up the processes' gradients: each differentiated the whole loss by its own rows only."""
    model.logit_scale.grad.div_(dist.get_world_size())  # which has no rows: each has all of it
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def train_process(rank: int, options: argparse.Namespace, port: int) -> None:
    """One of the training processes, with its renderer; all see the same clock."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.processes)
    torch.manual_seed(options.seed)
    state, checkpoint = new_state(options.lr), options.out / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    rng = np.random.default_rng([options.seed, rank, state.step])
    fork = mp.get_context("fork")
    progress, blocks = fork.Value("d", state.seconds / (60 * options.minutes)), fork.Queue(maxsize=24)
    seed = int(rng.integers(2**31))
    renderer = fork.Process(
        target=render_for_ever, args=(seed, options.renderer_niceness, progress, blocks), daemon=True
    )
    renderer.start()
    store = SceneStore(blocks)
    store.receive(at_least=options.scenes_before)
    dist.barrier()
    run(state, store, rng, options, progress)
    renderer.terminate()
    dist.destroy_process_group()


def run(
    state: State, store: SceneStore, rng: np.random.Generator, options: argparse.Namespace, progress: Any
) -> None:
    """Train until the time is up; the first process logs and saves."""
    started, saved_at, is_first = time.time() - state.seconds, time.time(), dist.get_rank() == 0
    losses: deque[float] = deque(maxlen=100)
    while True:
        clock = torch.tensor([time.time() - started])
        dist.broadcast(clock, 0)
        state.seconds = float(clock)
        progress.value = state.seconds / (60 * options.minutes)
        is_over = progress.value >= 1
        if is_first and (is_over or time.time() - saved_at > options.save_seconds):
            state.save(options.out / "checkpoint.pt")
            saved_at = time.time()
        if is_over:
            return
        store.receive()
        scenes = store.sample(rng, mixture(progress.value))
        is_bare = progress.value < BARE_UNTIL
        captions = [write_caption(rng, scene, SEVEN_PROMPTS, bare=is_bare) for scene in scenes]
        loss = batch_loss(state.model, scenes, captions, rng)
        take_step(state, loss, learning_rate(progress.value, state.step, options.lr))
        state.images += len(scenes) * dist.get_world_size()
        losses.append(float(loss.detach()))
        if is_first and state.step % 50 == 0:
            print(
                f"{state.seconds / 60:.1f} min, step {state.step}, about {state.images} images, "
                f"loss {np.mean(losses):.3f}, scale {float(state.model.logit_scale.detach().exp()):.1f}",
                flush=True,
            )


# --- what comes out -----------------------------------------------------------------------------------------


def load_average(checkpoint: Path) -> CLIP:
    """The averaged weights as a whole model in evaluation mode; unused token rows as they began."""
    torch.manual_seed(0)
    model = build_model()
    weights = torch.load(checkpoint, weights_only=True)["average"]
    table = model.token_embedding.weight.detach().clone()
    table[used_tokens()] = weights["token_embedding.weight"]
    model.load_state_dict({**weights, "token_embedding.weight": table})
    return model.eval()


def settle_statistics(model: CLIP, num_batches: int = 40) -> None:
    """Measure batch normalisation's means and variances anew, on large scenes alone.

    The running ones mix all sizes, whose borders differ, and belong to weights that were averaged since.
    """
    rng = np.random.default_rng(7)
    backdrops = paint_backdrops(rng, 100)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    with torch.no_grad():
        for _ in range(num_batches):
            scenes = [draw_scene(rng, KINDS["large"], backdrops) for _ in range(32)]
            feature_map(model, to_input(torch.from_numpy(np.stack([scene.pixels for scene in scenes])), rng))
    model.eval()


def export(model: CLIP, path: Path) -> None:
    """Write a model's weights as float16 safetensors, whole or not at all."""
    weights = {
        name: value.half().contiguous() if value.dtype.is_floating_point else value.contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, path.with_suffix(".part"))
    path.with_suffix(".part").chmod(0o644)  # safetensors leaves it to its owner alone
    path.with_suffix(".part").replace(path)


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the picture book's encoder.")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoint and weights go")
    parser.add_argument("--minutes", type=float, default=77, help="of training, earlier runs counted")
    parser.add_argument("--processes", type=int, default=2, help="that train, one thread each")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--renderer-niceness", type=int, default=5)
    parser.add_argument("--scenes-before", type=int, default=6000, help="a process's scenes before it trains")
    parser.add_argument("--save-seconds", type=float, default=120)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    training_names(), used_tokens()  # before forking: reading the names takes seconds
    if options.minutes > 0:
        arguments = (options, free_port())
        processes = [
            mp.get_context("fork").Process(target=train_process, args=(rank, *arguments))
            for rank in range(options.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a training process ended with {process.exitcode}")
    model = load_average(options.out / "checkpoint.pt")
    settle_statistics(model)
    export(model, options.out / "weights.safetensors")
    print(f"wrote {options.out / 'weights.safetensors'}; with it in {MODEL_CONFIG.parent}, measure it by")
    print("python benchmarks/zero_shot.py; python benchmarks/heads.py")


if __name__ == "__main__":
    main()
