"""mAP@50 against the vectors stored of an image: how many slots, and which of them, on the picture book.

    python benchmarks/slots.py [--encoder BUNDLE] [--images 5000] [--train-images 2000] [--out DIR] [--json]

The images are encoded once, with head `cluster` for each number of slots, or with what a bundle of another
head has; rules are then compared on the same vectors, by comparison with all of them: no index, no codec.

    all       every slot of N
    cosine    keep_rule distinct: of N, those without an earlier kept slot above the threshold
    apart     keep_rule apart: of N, those whose cosine with the mean of their image's slots is at most that
    merged    those of cosine, each the mean of those that are more like it than like another kept one
    farthest  of N, m: the first, then again and again the one least like those that are kept
    claimed   of N, the m that a vocabulary claims most: highest cosine with a name less the mean over all

The vocabulary of `claimed` is the training names without those that mean or share a word with a novel
category: the novel columns show what becomes of names that nobody thought of. For each N and rule the fewest
vectors that lose at most 0.005 against all slots of N (on base, novel and all) are chosen on the train split,
and shown on val. With `--out`, `slots.png` (of a bundle with another head: `slots-<head>.png`) draws the val
split's figures into that folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.heads import ValSplit, draw_val_split, read_batches, summarise
from for_ray.datasets.captioned import training_names
from for_ray.datasets.vocabulary import meanings
from for_ray.model.boxes import apart_slots, distinct_slots
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder

NUM_SLOTS = (3, 4, 5, 6, 8, 12, 16, 25)
THRESHOLDS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.92, 0.9, 0.87, 0.85, 0.8, 0.75, 0.7)
NUMBERS_KEPT = (*range(2, 13), 14, 16, 20, 25, 30, 40)
MAX_LOSS = 0.005
GROUPS = ("base", "novel", "all")
TRAIN_SEED = 11


class Slots(NamedTuple):
    """One split's vectors for each number of slots {N: [B, N, D]}, queries [V, D], and what is right."""

    vectors: dict[int, Tensor]
    queries: Tensor
    truth: ValSplit


def load_encoders(uri: str, numbers: Sequence[int]) -> dict[int, Encoder]:
    """By their number of slots: one for each of `numbers` with head `cluster`, else the bundle as it is."""
    bundle = open_bundle(uri)
    if bundle.config.head != "cluster":
        return {bundle.num_slots: load_encoder(bundle)}
    return {num: load_encoder(open_bundle(uri, num_slots=num)) for num in numbers}


def encode_split(encoders: dict[int, Encoder], name: str, num_images: int) -> Slots:
    """Draw a split and encode it; the backbone runs once, the heads one after another."""
    any_encoder = next(iter(encoders.values()))
    found: dict[int, list[Tensor]] = {num_slots: [] for num_slots in encoders}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        seed = TRAIN_SEED if name == "train" else None
        truth = draw_val_split(Path(folder), num_images, split=name, seed=seed)
        for pixels in read_batches(truth.paths, any_encoder):
            features = any_encoder.features(pixels)
            for num_slots, encoder in encoders.items():
                found[num_slots].append(encoder.head(features, encoder.pooling)[0].cpu())
    queries = torch.from_numpy(any_encoder.embed_text(truth.names))
    return Slots({num: torch.cat(parts) for num, parts in found.items()}, queries, truth)


def known_names(truth: ValSplit) -> list[str]:
    """The training names that neither mean a novel category nor share a word with one."""
    novel = [name for name, is_novel in zip(truth.names, truth.is_novel, strict=True) if is_novel]
    words = {word for name in novel for word in name.split()}
    names = list(training_names())
    meant = np.diff(meanings(names, novel).offsets)
    return [
        name for name, num in zip(names, meant, strict=True) if num == 0 and not words & set(name.split())
    ]


def claimed_slots(vectors: Tensor, names: Tensor, num_kept: int) -> Tensor:
    """Which slots to keep: those that some name claims most, against what all names say of them.

    Args:
        vectors: Unit vectors [B, N, D]; of equally claimed ones the earlier is preferred.
        names: Unit vectors of a vocabulary [V, D]; V at least 1.
        num_kept: m, at least 1; from N on everything is kept.

    Returns:
        [B, N], bool, min(m, N) true in each row.
    """
    cosines = vectors @ names.T  # [B, N, D] -> [B, N, V]
    claims = cosines.amax(dim=2) - cosines.mean(dim=2)
    return highest(claims, num_kept)


def highest(scores: Tensor, num_kept: int) -> Tensor:
    """The m highest of each row [B, N], bool; of equal ones the earlier."""
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, ranked, True)


def farthest_order(vectors: Tensor) -> Tensor:
    """Slots [B, N] by when they are taken: the first, then again and again the one least like those before.

    Args:
        vectors: Unit vectors [B, N, D]; how much a slot is like some others is its highest cosine with one.
    """
    cosines = vectors @ vectors.transpose(1, 2)  # [B, N, D] -> [B, N, N]
    order = [torch.zeros(len(vectors), 1, dtype=torch.int64)]
    nearest = cosines[:, 0].scatter(1, order[0], torch.inf)
    for _ in range(vectors.shape[1] - 1):
        taken = nearest.argmin(dim=1, keepdim=True)
        nearest = torch.maximum(nearest, torch.take_along_dim(cosines, taken[..., None], 1)[:, 0])
        nearest = nearest.scatter(1, taken, torch.inf)
        order.append(taken)
    return torch.cat(order, dim=1)


def merged_slots(vectors: Tensor, keep: Tensor) -> Tensor:
    """Unit vectors [B, N, D]: a kept slot is the mean of the slots most like it, itself among them."""
    cosines = (vectors @ vectors.transpose(1, 2)).masked_fill(~keep[:, None], -torch.inf)
    target = cosines.argmax(dim=2)[..., None].expand_as(vectors)
    return functional.normalize(torch.zeros_like(vectors).scatter_add(1, target, vectors), dim=-1)


def rules(vectors: Tensor, names: Tensor) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """Name, setting, slots [B, N, D] and which are kept [B, N] of each rule."""
    num_slots = vectors.shape[1]
    yield "all", num_slots, vectors, torch.ones(vectors.shape[:2], dtype=torch.bool)
    for threshold in THRESHOLDS:
        keep = distinct_slots(vectors, threshold)
        yield "cosine", threshold, vectors, keep
        yield "merged", threshold, merged_slots(vectors, keep), keep
        yield "apart", threshold, vectors, apart_slots(vectors, threshold)
    order = farthest_order(vectors)
    for num_kept in (number for number in NUMBERS_KEPT if number < num_slots):
        yield "farthest", num_kept, vectors, highest(-order.argsort(dim=1), num_kept)
        yield "claimed", num_kept, vectors, claimed_slots(vectors, names, num_kept)


def measure(split: Slots, names: Tensor) -> list[dict[str, Any]]:
    """A line for each number of slots, rule and setting."""
    lines = []
    for num_slots, vectors in split.vectors.items():
        unit = functional.normalize(vectors.float(), dim=-1)
        for rule, setting, slots, keep in rules(unit, names):
            scores = slots @ split.queries.T  # [B, N, D] -> [B, N, V]
            best = scores.masked_fill_(~keep[..., None], -torch.inf).amax(dim=1)
            means = summarise(best.T, split.truth)
            number = round(float(keep.sum()) / len(keep), 2)
            line = {"slots": num_slots, "rule": rule, "setting": setting, "vectors_per_image": number}
            lines.append({**line, **{group: means[f"map_at_50_{group}"] for group in GROUPS}})
    return lines


def choose(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of slots and rule the line with the fewest vectors that loses at most `MAX_LOSS`."""
    chosen: dict[tuple[int, str], dict[str, Any]] = {}
    whole = {line["slots"]: line for line in lines if line["rule"] == "all"}
    for line in lines:
        key = line["slots"], line["rule"]
        best = chosen.get(key, whole[line["slots"]])
        loss = max(whole[line["slots"]][group] - line[group] for group in GROUPS)
        is_better = key not in chosen or line["vectors_per_image"] < best["vectors_per_image"]
        if loss <= MAX_LOSS + 1e-9 and is_better:  # the figures have four digits
            chosen[key] = line
    return list(chosen.values())


def shown(chosen: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of another split for the same slots, rules and settings."""
    wanted = {(line["slots"], line["rule"], line["setting"]) for line in chosen}
    return [line for line in lines if (line["slots"], line["rule"], line["setting"]) in wanted]


def draw_figure(lines: list[dict[str, Any]], path: Path) -> None:
    """mAP@50 over vectors an image, base and novel side by side; 8 and 6 slots, or all, show the rules."""
    from matplotlib.figure import Figure

    numbers = sorted({line["slots"] for line in lines})
    curves: list[tuple[str, str, int | None, str]] = [("all slots of N", "all", None, "o-")]
    for size, look in ((8, "s"), (6, "^")) if len(numbers) > 1 else ((numbers[0], "s"),):
        if size in numbers:
            curves.append((f"{size} slots, cosine threshold", "cosine", size, f"{look}--"))
            curves.append((f"{size} slots, apart", "apart", size, f"{look}-."))
            curves.append((f"{size} slots, claimed most", "claimed", size, f"{look}:"))
    ticks = numbers if len(numbers) > 1 else [number for number in NUM_SLOTS if number < numbers[0]] + numbers
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, group in zip(figure.subplots(1, 2), ("base", "novel"), strict=True):
        for name, rule, num_slots, look in curves:
            found = [line for line in lines if line["rule"] == rule and num_slots in (None, line["slots"])]
            found.sort(key=lambda line: line["vectors_per_image"])
            x, y = [line["vectors_per_image"] for line in found], [line[group] for line in found]
            axes.plot(x, y, look, markersize=5, label=name if group == "base" else None)
        axes.set(xlabel="vectors an image", ylabel=f"mAP@50, {group} categories", xscale="log")
        axes.set_xticks(ticks, [str(number) for number in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def print_table(lines: list[dict[str, Any]]) -> None:
    """As Markdown, so that it can stand in README."""
    print("| slots | rule | vectors an image | base | novel | all |\n| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        setting = "" if line["rule"] == "all" else f" {line['setting']:g}"
        scores = " | ".join(f"{line[group]:.3f}" for group in GROUPS)
        print(f"| {line['slots']} | {line['rule']}{setting} | {line['vectors_per_image']:.4g} | {scores} |")


def main() -> int:
    """Encode both splits, choose on train, show on val."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="val images to show (default 5000)")
    parser.add_argument("--train-images", type=int, default=2000, help="to choose on (default 2000)")
    parser.add_argument("--encoder", default="picturebook", help="a bundle or open_clip:MODEL@PRETRAINED")
    parser.add_argument(
        "--slots", nargs="+", type=int, default=NUM_SLOTS, help="numbers of slots to compare, head cluster"
    )
    parser.add_argument("--out", type=Path, help="folder for slots.png")
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON, all lines of both splits"
    )
    options = parser.parse_args()
    encoders = load_encoders(options.encoder, options.slots)
    train = encode_split(encoders, "train", options.train_images)
    val = encode_split(encoders, "val", options.images)
    names = torch.from_numpy(next(iter(encoders.values())).embed_text(known_names(val.truth)))
    on_train, on_val = measure(train, names), measure(val, names)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        head = next(iter(encoders.values())).bundle.config.head
        draw_figure(on_val, options.out / ("slots.png" if head == "cluster" else f"slots-{head}.png"))
    if options.json:
        print(json.dumps({"train": on_train, "val": on_val, "chosen": shown(choose(on_train), on_val)}))
    else:
        print(f"Chosen on {options.train_images} images of train, shown on {options.images} of val, mAP@50\n")
        print_table(shown(choose(on_train), on_val))
    return 0


if __name__ == "__main__":
    sys.exit(main())
