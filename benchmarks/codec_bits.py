"""Recall@50 of RaBitQ's codes by their bits, before and after the exact re-rank: `index/plan.py` rests on it.

    python benchmarks/codec_bits.py [--images 25000] [--slots 8] [--dims 128 512] [--book 2000] [--json]

Through the package's own codec, segment and search: all lists are looked at, so that the code alone costs
recall; the candidates, max(4k, k + 100) images, are ranked again with their float16 vectors, as every search
does. Three kinds of vectors: `clustered`, unit vectors that scatter around 100 directions, queries among
them; `one cluster`, where all scatter around one, so that a query has 100 times as many neighbours, as in a
larger index; and the picture book's, embedded by the package's encoder, with names and slots of other images
as queries. `bytes` is what a vector takes in a segment, its id included; `of float16` the share of its stored
vector.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from for_ray.datasets.picturebook import write_picturebook
from for_ray.datasets.vocabulary import imagenet21k_names
from for_ray.evaluation.exact import exact_top_images, recall_at_k
from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.plan import plan_index
from for_ray.index.search import ImageVectors, SegmentSet, search_images
from for_ray.index.segment import build_segment
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.preprocess import decode
from for_ray.schema import pack_vector_ids

BITS = (1, 2, 3, 4, 6, 8)
RANKED, NUM_QUERIES = 50, 200
DIRECTIONS = {"clustered": 100, "one cluster": 1}
NOISE = 0.7
BATCH = 64


class Vectors(NamedTuple):
    """Images of as many slots each [B, N, D], float16, and queries [Q, D], float32; unit length."""

    name: str
    images: NDArray[np.float16]
    queries: NDArray[np.float32]


def scattered(kind: str, num_images: int, num_slots: int, dim: int, *, seed: int = 0) -> Vectors:
    """Vectors around directions, each slot of an image around one of its own; queries likewise."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((DIRECTIONS[kind], dim), np.float32)

    def draw(count: int) -> NDArray[np.float32]:
        chosen = directions[rng.integers(len(directions), size=count)]
        return unit(chosen + NOISE * rng.standard_normal((count, dim), np.float32))

    images = draw(num_images * num_slots).astype(np.float16).reshape(num_images, num_slots, dim)
    return Vectors(f"{kind}, D {dim}", images, draw(NUM_QUERIES))


def picture_book(num_images: int) -> Vectors:
    """The picture book's val split; as queries names of ImageNet-21K and slots of another split's images."""
    encoder = load_encoder(open_bundle("picturebook"), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        images = embed(encoder, write_picturebook(Path(folder) / "val", images=num_images, split="val"))
        others = write_picturebook(Path(folder) / "train", images=NUM_QUERIES // 2, split="train")
        seen = embed(encoder, others)[:, 0].astype(np.float32)
    names = imagenet21k_names()
    said = encoder.embed_text(names[:: len(names) // (NUM_QUERIES // 2)][: NUM_QUERIES // 2])
    queries = np.concatenate([np.asarray(said, np.float32), unit(seen)])
    return Vectors(f"picture book, D {images.shape[2]}", images, queries)


def embed(encoder: Encoder, annotations: Path) -> NDArray[np.float16]:
    """All slots of a drawn set's images [B, N, D]."""
    paths = sorted((annotations.parent / "images").iterdir())
    return np.concatenate([encoder.encode(batch).vectors.half().numpy() for batch in read(encoder, paths)])


def read(encoder: Encoder, paths: Sequence[Path]) -> Iterator[torch.Tensor]:
    """The images as uint8 [B, 3, S, S], in their order."""
    config = encoder.bundle.config
    for start in range(0, len(paths), BATCH):
        pixels = [
            decode(
                path.read_bytes(),
                image_size=config.image_size,
                resize_mode=config.resize_mode,
                interpolation=config.interpolation,
            ).pixels
            for path in paths[start : start + BATCH]
        ]
        yield torch.from_numpy(np.stack(pixels))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors [n, D] with length 1."""
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def stored(vectors: Vectors) -> Callable[[NDArray[np.int64]], ImageVectors]:
    """What gives the stored vectors of images by their ids, for the re-rank."""
    num_slots, dim = vectors.images.shape[1:]

    def take(image_ids: NDArray[np.int64]) -> ImageVectors:
        offsets = np.arange(len(image_ids) + 1) * num_slots
        return image_ids, offsets, vectors.images[image_ids].reshape(-1, dim)

    return take


def measure(vectors: Vectors, *, threads: int) -> list[dict[str, Any]]:
    """One line for each number of bits."""
    num_images, num_slots, dim = vectors.images.shape
    take, image_ids = stored(vectors), np.arange(num_images)
    right = list(exact_top_images([take(image_ids)], vectors.queries, RANKED)[0])
    ids = pack_vector_ids(np.repeat(image_ids, num_slots), np.tile(np.arange(num_slots), num_images))
    flat, lines = vectors.images.reshape(-1, dim), []
    for bits in BITS:
        before = "HR" if dim & (dim - 1) == 0 else f"RR{dim}"
        plan = plan_index(len(flat), dim, codec=f"{before},IVF64,RaBitQ{bits}")
        with tempfile.TemporaryDirectory() as folder:
            codec_path = Path(folder) / "codec.faiss"
            sample = flat[:: max(1, len(flat) // plan.training_vectors)].astype(np.float32)
            codec_path.write_bytes(codec_to_bytes(train_codec(sample, plan, threads=threads)))
            built = build_segment(codec_path, [(ids, flat)], Path(folder) / "segment.faiss", threads=threads)
            index = SegmentSet([built.path], nprobe=plan.nlist, threads=threads)
            found = {
                name: [
                    search_images(index, query, RANKED, exact=exact).image_ids for query in vectors.queries
                ]
                for name, exact in (("codes", None), ("reranked", take))
            }
        lines.append(
            {
                "vectors": vectors.name,
                "bits": bits,
                "bytes": plan.bytes_per_vector,
                "of_float16": round(plan.bytes_per_vector / (2 * dim), 3),
                **{f"recall_{name}": round(recall_at_k(ids, right), 4) for name, ids in found.items()},
            }
        )
    return lines


def main() -> int:
    """Draw, encode, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=25_000, help="images of the first two kinds (default 25000)"
    )
    parser.add_argument("--slots", type=int, default=8, help="vectors of each (default 8)")
    parser.add_argument("--dims", type=int, nargs="*", default=[128, 512], help="their dimensions")
    parser.add_argument("--book", type=int, default=2000, help="pages of the picture book; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="FAISS's (default 2)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options = parser.parse_args()
    lines = [
        line
        for kind in DIRECTIONS
        for dim in options.dims
        for line in measure(scattered(kind, options.images, options.slots, dim), threads=options.threads)
    ]
    if options.book:
        lines += measure(picture_book(options.book), threads=options.threads)
    if options.json:
        print(json.dumps({"results": lines}))
        return 0
    print("| vectors | bits | bytes | of float16 | recall@50, codes | re-ranked |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print("| " + " | ".join(str(value) for value in line.values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
