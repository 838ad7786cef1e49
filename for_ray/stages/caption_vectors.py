"""Vectors of captions: made once, kept as a table of ours, and taken again for the same captions and encoder.

    spool_captions   the driver: captions, as they are read → files of 65,536 texts on its disk
    embed_captions   the files go to the store; an actor pool: texts → unit vectors; writing tasks → fragments
                     of a table; the driver commits them, in the captions' order
    local_vectors    the driver: the table's vectors → a file that is mapped, to be indexed and compared
    captions_at      the driver: some of the captions with their vectors, some thousands at a time

<vectors>/captions-<hash>.json         the record; written last: where it lies the table is whole
<vectors>/captions-<hash>-<run>.lance  `text` and `vector` [D] float16; row id = place of the caption
<vectors>/texts-<run>/                 the texts, while they are embedded

At 10⁷ captions of 60 bytes and D = 1024: the texts are 0.6 GB (0.3 GB compressed, in the driver's temporary
folder and in the store), the table 21.1 GB in the store, the mapped vectors 20.5 GB on the driver's disk. In
memory the driver holds 160 MB of hashes while it reads, 65,536 texts, and 1,221 descriptions of fragments; an
embedding actor, beside its model, 8,192 vectors (50 MB: float32 and float16); a writing task 17 MB.

A run that dies while it embeds begins anew, and leaves its table and its texts: what no record names may be
deleted when no run is on.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.data import ActorPoolStrategy, DataContext

from for_ray.errors import DataError, StageError
from for_ray.index.table import append, create_table, require_table, take_rows, write_fragments
from for_ray.model.bundle import Bundle
from for_ray.stages.encode import HALF_A_CPU, Pool, actor_options, data_context, quiet_options
from for_ray.stages.failures import TASK_RETRIES
from for_ray.storage import delete_tree, exists, join_uri, read_bytes, shown, upload, write_bytes
from for_ray.storage.refusals import disk_refusals, lance_refusals

PART_CAPTIONS = 1 << 16
"""Texts of a file."""

FEW_CAPTIONS, MANY_CAPTIONS = 256, 8192
"""Captions that an actor takes at once: at least, so that each pays for its way, and at most: 17 MB at 1024
dimensions."""


class SpooledCaptions(NamedTuple):
    """Distinct captions on this disk, in their order.

    paths: Files of `PART_CAPTIONS` texts each, but for the last.
    num_captions: In all of them.
    content: A hash of the captions.
    """

    paths: list[Path]
    num_captions: int
    content: str


class KeptVectors(BaseModel):
    """`captions-<hash>.json`.

    Attributes:
        table: The table's name beside the record.
        encoder: Its name.
        num_captions: Rows of the table.
        dim: D.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    encoder: str
    num_captions: int
    dim: int


@dataclass(frozen=True)
class CaptionJob:
    """What the workers have to know.

    Attributes:
        bundle: The encoder; files that it names must be where all workers reach them.
        device: Where an actor computes.
        texts_uri: Where the files of texts lie.
        table_uri: The table; it exists.
    """

    bundle: Bundle
    device: str
    texts_uri: str
    table_uri: str


def spool_captions(
    captions: Iterable[list[str]], folder: Path, *, on_progress: Callable[[int], None]
) -> SpooledCaptions:
    """Bring captions, as they are read, to this disk.

    Args:
        captions: Lists of distinct ones.
        folder: For this alone; the caller removes it.
        on_progress: Called with the number of captions that were read.

    Raises:
        StorageError: The disk refused.
    """
    folder.mkdir()
    content, paths, num_captions = hashlib.sha256(), list[Path](), 0
    for texts in _in_parts(captions):
        path = folder / _part_name(len(paths))
        with disk_refusals("write", path):
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, compression="zstd")
        for text in texts:
            content.update(text.encode() + b"\n")
        paths.append(path)
        num_captions += len(texts)
        on_progress(num_captions)
    return SpooledCaptions(paths, num_captions, content.hexdigest())


def _in_parts(captions: Iterable[list[str]]) -> Iterator[list[str]]:
    part: list[str] = []
    for texts in captions:
        part += texts
        while len(part) >= PART_CAPTIONS:
            yield part[:PART_CAPTIONS]
            part = part[PART_CAPTIONS:]
    if part:
        yield part


def _part_name(number: int) -> str:
    return f"{number:06d}.parquet"


def _record_uri(vectors_uri: str, captions: SpooledCaptions, bundle: Bundle) -> str:
    """Named after what decides the vectors: captions, text tower and its weights."""
    name = hashlib.sha256(f"{bundle.text_fingerprint} {captions.content}".encode()).hexdigest()[:16]
    return join_uri(vectors_uri, f"captions-{name}.json")


def find_kept(vectors_uri: str, captions: SpooledCaptions, bundle: Bundle) -> Any | None:
    """The table that an earlier run has made of these captions with this encoder; None where there is none.

    Raises:
        DataError: There is a record, but no such table.
        StorageError: The store refused.
    """
    uri = _record_uri(vectors_uri, captions, bundle)
    if not exists(uri):
        return None
    try:
        kept = KeptVectors.model_validate_json(read_bytes(uri))
    except ValidationError as error:
        raise DataError(
            f"{shown(uri)} is no record of captions' vectors: delete it, then run again"
        ) from error
    return require_table(join_uri(vectors_uri, kept.table))


def embed_captions(
    captions: SpooledCaptions,
    bundle: Bundle,
    pool: Pool,
    vectors_uri: str,
    *,
    device: str,
    on_progress: Callable[[int], None],
) -> Any:
    """The table of the captions and their vectors; a run that fails leaves nothing of it.

    Args:
        captions: At least one.
        bundle: The encoder; files that it names must be where all workers reach them.
        pool: The actors.
        vectors_uri: Where it is kept: a folder or prefix that all workers reach.
        device: Where an actor computes.
        on_progress: Called with the number of captions that came through.

    Raises:
        StageError: Captions were lost on the way.
        StorageError: The store refused (from a worker: wrapped by Ray).
    """
    record_uri, run = _record_uri(vectors_uri, captions, bundle), secrets.token_hex(4)
    table_uri = record_uri.removesuffix(".json") + f"-{run}.lance"
    job = CaptionJob(
        bundle, "cpu" if device == "cpu" else "auto", join_uri(vectors_uri, f"texts-{run}"), table_uri
    )
    try:
        for path in captions.paths:
            upload(path, join_uri(job.texts_uri, path.name))
        table = create_table(table_uri, _schema(bundle.dim))
        table = append(table, _embed(captions.num_captions, job, pool, on_progress))
        kept = KeptVectors(
            table=table_uri.rpartition("/")[2],
            encoder=bundle.name,
            num_captions=captions.num_captions,
            dim=bundle.dim,
        )
        write_bytes(record_uri, kept.model_dump_json(indent=1).encode())
    except BaseException:
        delete_tree(table_uri)
        raise
    finally:
        delete_tree(job.texts_uri)
    return table


def _schema(dim: int) -> pa.Schema:
    return pa.schema([("text", pa.string()), ("vector", pa.list_(pa.float16(), dim))])


def _embed(num_captions: int, job: CaptionJob, pool: Pool, on_progress: Callable[[int], None]) -> list[str]:
    """Fragments of the table, in the captions' order."""
    most = min(MANY_CAPTIONS, max(FEW_CAPTIONS, -(-num_captions // (4 * pool.max_actors))))
    with DataContext.current(data_context()), quiet_options():
        written = (
            ray.data.from_arrow(_ranges(num_captions, most))
            .repartition(target_num_rows_per_block=1)
            .map_batches(
                EmbedCaptions,
                fn_constructor_args=(job,),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
                num_gpus=pool.num_gpus,
                num_cpus=pool.num_cpus,
                ray_remote_args_fn=actor_options,
            )
            .map_batches(
                write_rows,
                fn_kwargs={"table_uri": job.table_uri},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=HALF_A_CPU,
                max_retries=TASK_RETRIES,
            )
        )
    found: dict[int, list[str]] = {}
    num_done = 0
    for block in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        found |= dict(zip(block["first"].to_pylist(), block["fragments"].to_pylist(), strict=True))
        num_done += sum(block["num_rows"].to_pylist())
        on_progress(num_done)
    if num_done != num_captions:
        raise StageError("captions", f"{num_done:,} of {num_captions:,} captions came back; run again")
    return [fragment for first in sorted(found) for fragment in found[first]]


def _ranges(num_captions: int, most: int) -> pa.Table:
    """Captions from `first` on, `num_rows` of them; none lies in two files."""
    firsts = [
        first
        for start in range(0, num_captions, PART_CAPTIONS)
        for first in range(start, min(start + PART_CAPTIONS, num_captions), most)
    ]
    ends = np.array([*firsts[1:], num_captions], np.int64)
    return pa.table({"first": np.array(firsts, np.int64), "num_rows": ends - np.array(firsts, np.int64)})


class EmbedCaptions:
    """An encoder on its device: ranges of captions become texts and unit vectors.

    Args:
        job: The job.
    """

    def __init__(self, job: CaptionJob) -> None:
        import torch

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(1)  # a CPU has an actor
        self._job = job
        self._encoder = load_encoder(job.bundle, job.device)

    def __call__(self, ranges: pa.Table) -> pa.Table:
        """`first`, `text` and `vector`, float16 [D], of a range of `first` and `num_rows`.

        Raises:
            DataError: The encoder gives no finite vector for a caption.
            StorageError: The store refused.
        """
        first, num_rows = ranges["first"][0].as_py(), ranges["num_rows"][0].as_py()
        part, start = divmod(first, PART_CAPTIONS)
        content = pa.BufferReader(read_bytes(join_uri(self._job.texts_uri, _part_name(part))))
        texts = pq.read_table(content)["text"].slice(start, num_rows)
        vectors = self._encoder.embed_captions(texts.to_pylist()).astype(np.float16)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise DataError(
                f"the encoder gives no finite vector for {texts[int(bad[0])].as_py()[:80]!r}: take another "
                "--encoder, or --device cpu, where it computes in float32"
            )
        return pa.table({"first": np.full(num_rows, first), "text": texts, "vector": _half_lists(vectors)})


def write_rows(block: pa.Table, *, table_uri: str) -> pa.Table:
    """Write ranges of captions as files of the table; a row for each comes back, with its fragments."""
    found: dict[str, list[Any]] = {"first": [], "num_rows": [], "fragments": []}
    for first in pc.unique(block["first"]).to_pylist():
        rows = block.filter(pc.equal(block["first"], first)).select(["text", "vector"])
        found["first"].append(first)
        found["num_rows"].append(rows.num_rows)
        found["fragments"].append(write_fragments(rows.combine_chunks(), table_uri))
    return pa.table(found)


def local_vectors(table: Any, path: Path) -> NDArray[np.float16]:
    """The vectors of a table [C, D], in a file that is mapped.

    Args:
        table: From `embed_captions` or `find_kept`.
        path: The file; the caller removes it.

    Raises:
        DataError: The table does not have its rows in their order any more.
        StorageError: The store or the disk refused.
    """
    dim = table.schema.field("vector").type.list_size
    num_captions = table.count_rows()
    with disk_refusals("write", path), path.open("wb") as file:
        os.posix_fallocate(
            file.fileno(), 0, 2 * num_captions * dim
        )  # a full disk would kill who writes to the map
    vectors = np.memmap(path, np.float16, "r+", shape=(num_captions, dim))
    with lance_refusals(table.uri):
        for batch in table.scanner(columns=["vector"], with_row_id=True).to_batches():
            rows = batch["_rowid"].to_numpy()
            if len(rows) and int(rows.max()) >= len(vectors):
                raise DataError(f"{shown(table.uri)} was changed: delete what lies there, then run again")
            flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
            vectors[rows] = flat.reshape(-1, dim)
    return vectors


def captions_at(table: Any, vectors: NDArray[np.float16], places: NDArray[np.int64]) -> Iterator[pa.Table]:
    """`text` and `vector` of the captions at these places, in this order; `MANY_CAPTIONS` at a time.

    Args:
        table: From `embed_captions` or `find_kept`.
        vectors: From `local_vectors`.
        places: From 0, ascending.

    Raises:
        StorageError: The store refused.
    """
    for start in range(0, len(places), MANY_CAPTIONS):
        some = places[start : start + MANY_CAPTIONS]
        texts = take_rows(table, some, ["text"])["text"]
        yield pa.table({"text": texts, "vector": _half_lists(np.asarray(vectors[some]))})


def _half_lists(vectors: NDArray[np.float16]) -> pa.FixedSizeListArray:
    """Vectors [C, D] as a column of lists; nothing is copied."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
