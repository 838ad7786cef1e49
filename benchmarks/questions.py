"""Precision@10 of two-object AND and NOT questions, on the picture book's val split.

    python benchmarks/questions.py [--images 10000] [--queries 60] [--encoder picturebook] [--json]

The images are encoded with the bundle's head and indexed (codec by the plan, one segment, a quarter of the
lists looked at), and asked through `retrieval`: grammar, index, stored vectors. Beside it stand

    one text     both names in one phrase, on the same index
    plain CLIP   the same phrase, one vector an image, compared with all of them
    CLIP, …      min and sum (AND) or difference (NOT) of the cosines with the two names, likewise
    first alone  for NOT: the first name without the rest, on the same index

AND: the pairs of categories that most images show together; an image is right where both are annotated.
NOT: the same pairs, both ways round; right where the first is annotated and the second is not. Since few of
the images with the first show the second, each NOT question has a collection of its own, given as a filter by
ids: all images with both, as many with the first alone, and ten times as many others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from for_ray.index import snapshots, table
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.segment import build_segment
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.retrieval import Filters, OpenIndex, Question, open_index
from for_ray.schema import Layout, Segment, Snapshot, images_schema, pack_boxes
from for_ray.storage import write_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.heads import ValSplit, draw_val_split, read_batches

K = 10
LEAST_TOGETHER = 10
OTHERS = 10
NPROBE_SHARE = 4  # of the lists, a quarter is looked at

Ranked = Callable[[int, int, NDArray[np.int64] | None], NDArray[np.int64]]


class Collection(NamedTuple):
    """The indexed images, their truth, and what the baselines need: image ids are rows of the split.

    Attributes:
        val: The split.
        opened: The index of it.
        clip: One vector an image [B, D].
        text: Embeds phrases.
    """

    val: ValSplit
    opened: OpenIndex
    clip: NDArray[np.float32]
    text: Callable[[list[str]], NDArray[np.float32]]


@torch.inference_mode()
def build(folder: Path, val: ValSplit, encoder: Encoder, whole: Encoder) -> tuple[str, NDArray[np.float32]]:
    """Encode all images, append them to a table, build one segment, publish.

    Returns:
        The index's uri, and the vectors of the whole images [B, D]: both heads read the same features.
    """
    bundle, layout = encoder.bundle, Layout(str(folder))
    bundle.save(layout.bundle_uri(bundle.fingerprint))
    images_uri = layout.images_uri(bundle.fingerprint)
    images = table.create_table(images_uri, images_schema(bundle.dim))
    start, clip = 0, []
    for pixels in read_batches(val.paths, encoder):
        encoded, features = encoder.encode_with_features(pixels)
        vectors, boxes, keep = (part.numpy() for part in encoded)
        clip.append(whole.head(features, whole.pooling)[0][:, 0].numpy())
        rows = [
            {
                "uri": str(path),
                "etag": "",
                "vectors": list(vectors[row][keep[row]].astype(np.float16)),
                "boxes": pack_boxes(boxes[row][keep[row]]).tolist(),
            }
            for row, path in enumerate(val.paths[start : start + len(pixels)])
        ]
        written = table.write_fragments(pa.Table.from_pylist(rows, schema=images.schema), images_uri)
        images = table.append(images, written)
        start += len(pixels)
    return publish(layout, encoder, len(val.paths)), np.concatenate(clip)


def publish(layout: Layout, encoder: Encoder, num_images: int) -> str:
    """One segment of all rows, and a snapshot of it."""
    fingerprint = encoder.bundle.fingerprint
    images = table.require_table(layout.images_uri(fingerprint))
    batches = list(table.read_vectors(images, 0, num_images, batch_rows=1000))
    vectors = np.concatenate([batch.vectors for batch in batches])
    plan = plan_index(len(vectors), encoder.dim)
    content = codec_to_bytes(train_codec(vectors.astype(np.float32), plan, threads=2))
    codec = codec_record(content, plan, num_trained_on=len(vectors))
    path = Path(layout.segment_uri(fingerprint, codec.file_name))
    write_bytes(str(path), content)
    built = build_segment(
        path, [(batch.vector_ids, batch.vectors) for batch in batches], path.parent / "one.faiss", threads=2
    )
    segment = Segment(
        segment_id="one",
        codec_id=codec.codec_id,
        file_name="one.faiss",
        sha256=built.sha256,
        num_bytes=built.num_bytes,
        num_vectors=built.num_vectors,
        first_image_id=0,
        end_image_id=num_images,
    )
    snapshots.publish(
        layout,
        Snapshot(
            snapshot_id=0,
            created_at=datetime.now(UTC),
            fingerprint=fingerprint,
            images_version=images.version,
            codec=codec,
            segments=[segment],
            deleted_image_ids=np.empty(0, np.int64),
            nprobe=max(codec.nlist // NPROBE_SHARE, 1),
            listed=num_images,
            indexed=num_images,
            quarantined=0,
            num_vectors=len(vectors),
            recall_at_50=None,
        ),
    )
    return layout.index_uri


def draw_pairs(val: ValSplit, count: int) -> list[tuple[int, int]]:
    """The pairs of categories that most images show together, each in enough of them."""
    shown = val.relevant.astype(np.int32)
    together = shown @ shown.T
    first, second = np.nonzero(np.triu(together, 1) >= LEAST_TOGETHER)
    chosen = np.argsort(-together[first, second], kind="stable")[:count]
    return [(int(first[each]), int(second[each])) for each in chosen]


def collection_of(val: ValSplit, first: int, second: int) -> NDArray[np.int64]:
    """Images with both, as many with the first alone, and `OTHERS` times as many without the first."""
    rng = np.random.default_rng([first, second])
    has, rules_out = val.relevant[first], val.relevant[second]
    both = np.flatnonzero(has & rules_out)
    alone = rng.permutation(np.flatnonzero(has & ~rules_out))[: len(both)]
    others = rng.permutation(np.flatnonzero(~has))[: OTHERS * len(both)]
    return np.sort(np.concatenate([both, alone, others]))


def asked(data: Collection, phrase: Callable[[str, str], str]) -> Ranked:
    """Ranks by a question to the index; a phrase that is no grammar is quoted."""

    def rank(first: int, second: int, only: NDArray[np.int64] | None) -> NDArray[np.int64]:
        text = phrase(data.val.names[first], data.val.names[second])
        ids = None if only is None else tuple(only.tolist())
        answer = data.opened.ask(Question(text=text, k=K, filters=Filters(image_ids=ids)))
        return np.array([hit.image_id for hit in answer.hits], np.int64)

    return rank


def compared(data: Collection, score: Callable[[str, str], NDArray[np.float32]]) -> Ranked:
    """Ranks all images by a score of theirs."""

    def rank(first: int, second: int, only: NDArray[np.int64] | None) -> NDArray[np.int64]:
        scores = score(data.val.names[first], data.val.names[second])
        ids = np.arange(len(scores)) if only is None else only
        return ids[np.argsort(-scores[ids], kind="stable")[:K]]

    return rank


def and_methods(data: Collection) -> dict[str, Ranked]:
    """What answers AND."""

    def both(first: str, second: str) -> NDArray[np.float32]:
        return np.asarray(data.clip @ data.text([first, second]).T, np.float32)

    def phrase(first: str, second: str) -> NDArray[np.float32]:
        return np.asarray(data.clip @ data.text([f"a {first} and a {second}"])[0], np.float32)

    return {
        "AND": asked(data, lambda first, second: f"a {first} AND a {second}"),
        "one text": asked(data, lambda first, second: f'"a {first} and a {second}"'),
        "plain CLIP": compared(data, phrase),
        "CLIP, min of two": compared(data, lambda *names: both(*names).min(axis=1)),
        "CLIP, sum of two": compared(data, lambda *names: both(*names).sum(axis=1)),
    }


def not_methods(data: Collection) -> dict[str, Ranked]:
    """What answers NOT."""

    def difference(first: str, second: str) -> NDArray[np.float32]:
        cosines = data.clip @ data.text([first, second]).T
        return np.asarray(cosines[:, 0] - cosines[:, 1], np.float32)

    def phrase(first: str, second: str) -> NDArray[np.float32]:
        return np.asarray(data.clip @ data.text([f"a {first} without a {second}"])[0], np.float32)

    return {
        "NOT": asked(data, lambda first, second: f"a {first} NOT a {second}"),
        "one text": asked(data, lambda first, second: f'"a {first} without a {second}"'),
        "first alone": asked(data, lambda first, _: f"a {first}"),
        "plain CLIP": compared(data, phrase),
        "CLIP, difference": compared(data, difference),
    }


def measure(data: Collection, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Mean precision@10 of every method, and what chance has."""
    lines = []
    relevant = data.val.relevant
    turned = pairs + [(second, first) for first, second in pairs]
    for kind, methods, asks in (("AND", and_methods(data), pairs), ("NOT", not_methods(data), turned)):
        only = [collection_of(data.val, *pair) if kind == "NOT" else None for pair in asks]
        right = [relevant[a] & (relevant[b] if kind == "AND" else ~relevant[b]) for a, b in asks]
        chance = [
            truth.mean() if ids is None else truth[ids].mean() for truth, ids in zip(right, only, strict=True)
        ]
        lines.append({"kind": kind, "method": "chance", "precision_at_10": float(np.mean(chance))})
        for name, rank in methods.items():
            started = time.perf_counter()
            found = [rank(*pair, ids) for pair, ids in zip(asks, only, strict=True)]
            seconds = (time.perf_counter() - started) / len(asks)
            precision = np.mean([truth[ids].sum() / K for truth, ids in zip(right, found, strict=True)])
            lines.append(
                {"kind": kind, "method": name, "precision_at_10": float(precision), "seconds": seconds}
            )
    return lines


def print_table(lines: list[dict[str, Any]], about: str) -> None:
    """As Markdown, so that it can stand in README."""
    print(f"{about}\n")
    print("| question | method | precision@10 | ms a question |\n| --- | --- | --- | --- |")
    for line in lines:
        took = f"{1000 * line['seconds']:.0f}" if "seconds" in line else ""
        print(f"| {line['kind']} | {line['method']} | {line['precision_at_10']:.3f} | {took} |")


def main() -> int:
    """Draw, encode, build, ask, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000, help="images to draw (default 10000)")
    parser.add_argument("--queries", type=int, default=60, help="pairs of names to ask for (default 60)")
    parser.add_argument("--encoder", default="picturebook", help="a bundle or open_clip:MODEL@PRETRAINED")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        val = draw_val_split(Path(folder) / "val", options.images)
        encoder = load_encoder(open_bundle(options.encoder), device="cpu")
        whole = load_encoder(open_bundle(options.encoder, head="clip"), device="cpu")
        pairs = draw_pairs(val, options.queries)
        if not pairs:
            print("questions: no two names are together in ten images: draw more", file=sys.stderr)
            return 2
        index_uri, clip = build(Path(folder) / "index", val, encoder, whole)
        index = open_index(index_uri)
        lines = measure(Collection(val, index, clip, index.encoder.embed_text), pairs)
    if options.json:
        found = {"images": options.images, "encoder": options.encoder, "pairs": len(pairs), "results": lines}
        print(json.dumps(found))
    else:
        print_table(lines, f"{options.images:,} images of the val split, {len(pairs)} pairs of names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
