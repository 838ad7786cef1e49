"""Encode: the images that the gap names → rows of `images.lance`, by Ray Data.

    read_parquet(gap) → blocks of a few hundred images
    read_block    CPU tasks: fetch (one request an object, bound to its etag), decode → uint8 pixels
    EncodeImages  an actor pool, one GPU each where the cluster has GPUs: pixels → vectors and boxes
    write_block   CPU tasks: files of the table; their description goes to the driver
    encode        the driver: commits what has come, every few seconds

A row that is committed is never encoded again; a task that is retried leaves an orphaned file, never a row.
Where processes of tasks die again and again, `encode` says so in what it returns: the caller may go on with
what is left, and have each image decoded apart, so that one that kills its process is quarantined.
Another `TableJob` fills another table in the same way with its own actor; an `ImageJob` alone writes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from for_ray.index.table import append
from for_ray.schema import WorkTime
from for_ray.stages.blocks import EncodeCounts, ImageJob, TableJob
from for_ray.stages.failures import TASK_RETRIES, crash_of
from for_ray.stages.metrics import SECONDS, MeasuredActor, measured_read, measured_write, show
from for_ray.stages.reading import read_block
from for_ray.storage import Lease, arrow_filesystem

NO_PROGRESS_SECONDS = 1200
"""Ray Data gives up when nothing has moved for this long; a GPU node may take minutes to come."""

HALF_A_CPU = 0.5
"""What a reading or writing task reserves, and an actor without a GPU: half of each other's room, so that
neither kind can keep the other from starting, and both cores of a small machine are busy."""


@dataclass(frozen=True)
class Pool:
    """The actors that encode.

    Attributes:
        min_actors: How many to start with.
        max_actors: How many the pool may grow to.
        num_gpus: GPUs of an actor, 0 or 1.
        num_cpus: CPUs of an actor. An actor with a GPU takes none: it would starve the tasks that feed it.
    """

    min_actors: int
    max_actors: int
    num_gpus: int
    num_cpus: float


def choose_pool(
    resources: dict[str, float],
    *,
    num_batches: int,
    min_actors: int = 1,
    max_actors: int | None = None,
    device: str = "auto",
) -> Pool:
    """How many actors encode, and on what.

    Without GPUs there is an actor with one thread for each CPU, and half a CPU of it in Ray's books.

    Args:
        resources: What the cluster has, in Ray's names.
        num_batches: Batches to encode: more actors than these would idle.
        min_actors: How many to start with.
        max_actors: The most; what the cluster has room for where None.
        device: `auto` takes the GPUs that are there, `cuda` also those that come when asked for, `cpu` none.
    """
    num_gpus = int(resources.get("GPU", 0))
    has_gpus = device == "cuda" or (device == "auto" and num_gpus > 0)
    room = num_gpus if has_gpus else int(resources.get("CPU", 1))
    most = max(1, min(max_actors or max(room, min_actors), num_batches))
    return Pool(min(min_actors, most), most, num_gpus=int(has_gpus), num_cpus=0 if has_gpus else HALF_A_CPU)


class Encoded(NamedTuple):
    """What came of an encode stage.

    Attributes:
        table: After the last commit.
        counts: Of the rows that came through.
        work: What the workers did.
        crash: Why the stage broke off: processes of tasks died again and again. What had come is committed.
            None where it did not.
    """

    table: Any
    counts: EncodeCounts
    work: WorkTime
    crash: str | None = None


def encode(
    table: Any,
    gap: str | list[str],
    *,
    job: TableJob,
    pool: Pool,
    num_images: int,
    commit_seconds: float,
    most_bad: float,
    lease: Lease,
    on_progress: Callable[[int], None],
    is_apart: bool = False,
) -> Encoded:
    """Encode what the gap names and append it to the table.

    Args:
        table: The table, at its latest version; nobody else writes to it.
        gap: A folder of Parquet files, or the files: `LISTING_SCHEMA` and metadata columns.
        job: What the workers have to know.
        pool: The actors.
        num_images: Rows of the gap.
        commit_seconds: Time between two commits.
        most_bad: The stage stops when more images than this turn out to be unreadable, gone or changed.
        lease: Checked before each commit.
        on_progress: Called with the number of rows that came through.
        is_apart: Decode each image in a child process; see `read_block`.

    Returns:
        What came of it; where the processes of tasks died too often, with the reason why it is not all.
    """
    intake = _Intake(table, lease, num_images=num_images, tag=job.tag)
    read = partial(read_block, is_apart=True) if is_apart else read_block
    dataset = make_dataset(gap, job=job, pool=pool, num_images=num_images, read=read)
    crash = None
    try:
        for written in _drain(dataset, commit_seconds):
            if written is not None:
                intake.add(written)
                on_progress(intake.counts.total)
            if intake.seconds_waiting >= commit_seconds:
                intake.commit()
            if intake.counts.quarantined + intake.counts.skipped > most_bad:
                break
    except Exception as error:  # Ray Data raises what is no RayError, too
        crash = crash_of(error)
        if crash is None:
            raise
    finally:
        # Also when the stage fails: the next run need not encode these again.
        intake.commit()
    work = WorkTime(**intake.seconds, num_actors=pool.max_actors, has_gpus=pool.num_gpus > 0)
    return Encoded(intake.table, intake.counts, work, crash)


class _Intake:
    """What has come from the workers, and the table that it goes into."""

    def __init__(self, table: Any, lease: Lease, *, num_images: int, tag: str) -> None:
        self.table, self.counts = table, EncodeCounts()
        self.seconds = dict.fromkeys((*SECONDS, "write_seconds"), 0.0)
        self._lease, self._num_images, self._tag = lease, num_images, tag
        self._fragments: list[str] = []
        self._num_pending = self._num_committed = 0
        self._last_commit = time.monotonic()

    @property
    def seconds_waiting(self) -> float:
        """Since the last commit."""
        return time.monotonic() - self._last_commit

    def add(self, written: pa.Table) -> None:
        """Take a row of `measured_write`."""
        counts = EncodeCounts.of(written)
        self.counts = self.counts.plus(counts)
        for name in self.seconds:
            self.seconds[name] += written[name][0].as_py()
        self._fragments += written["fragments"][0].as_py()
        self._num_pending += counts.stored
        show("queue_images", self._num_images - self.counts.total, job=self._tag)

    def commit(self) -> None:
        """Make what has come a part of the table."""
        self._last_commit = time.monotonic()
        if not self._fragments:
            return
        self._lease.check()
        self.table, self._fragments = append(self.table, self._fragments), []
        self._num_committed, self._num_pending = self._num_committed + self._num_pending, 0
        show("committed_images", self._num_committed, job=self._tag)


def data_context() -> DataContext:
    """How Ray Data runs here: quiet on the console, patient, and with a bound to its retries."""
    context = copy.deepcopy(DataContext.get_current())
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    context.retried_map_errors = ["StorageError"]
    context.max_map_retries = TASK_RETRIES
    context.max_consecutive_actor_init_deaths = TASK_RETRIES  # a node may go while an actor starts on it
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # what it says to the console; its log file stays
            handler.setLevel(logging.CRITICAL)
    return context


def make_dataset(
    gap: str | list[str],
    *,
    job: TableJob,
    pool: Pool,
    num_images: int,
    read: Callable[..., pa.Table] = read_block,
    encode_with: type[Any] | None = None,
) -> Dataset:
    """The stage as a lazy dataset whose rows are those of `measured_write`; the arguments are `encode`'s.

    Args:
        gap: See `encode`.
        job: See `encode`.
        pool: See `encode`.
        num_images: See `encode`.
        read: Gives blocks their pixels, as `read_block` does.
        encode_with: The actors' class instead of the job's own.
    """
    encoded = make_encoded(gap, job=job, pool=pool, num_images=num_images, read=read, encode_with=encode_with)
    with DataContext.current(encoded.context), quiet_options():
        return encoded.map_batches(
            measured_write,
            fn_kwargs={"job": job},
            batch_size=job.fragment_rows(num_images),
            batch_format="pyarrow",
            num_cpus=HALF_A_CPU,
            max_retries=TASK_RETRIES,
        )


def make_encoded(
    gap: str | list[str] | pa.Table,
    *,
    job: ImageJob,
    pool: Pool,
    num_images: int,
    read: Callable[..., pa.Table] = read_block,
    encode_with: type[Any] | None = None,
) -> Dataset:
    """The stage up to its actors, as a lazy dataset of what these answer; nothing is written.

    Args:
        gap: A folder of Parquet files, the files, or the rows themselves where they are few:
            `LISTING_SCHEMA` and metadata columns.
        job: What the workers have to know.
        pool: The actors.
        num_images: Rows of the gap.
        read: Gives blocks their pixels, as `read_block` does.
        encode_with: The actors' class instead of the job's own.
    """
    block_rows = job.block_rows(num_images, pool.max_actors)
    with DataContext.current(data_context()), quiet_options():
        decoded = (
            _listed(gap)
            .repartition(target_num_rows_per_block=block_rows)
            .map_batches(
                measured_read,
                fn_kwargs={"job": job, "read": read},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=HALF_A_CPU,
                max_retries=TASK_RETRIES,
            )
        )
        return decoded.map_batches(
            MeasuredActor,
            fn_constructor_args=(encode_with or job.actor, job, 1),
            batch_size=block_rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=pool.min_actors, max_size=pool.max_actors, max_concurrent_calls_per_actor=2
            ),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
            ray_remote_args_fn=actor_options,
        )


def _listed(gap: str | list[str] | pa.Table) -> Dataset:
    if isinstance(gap, pa.Table):
        return ray.data.from_arrow(gap)
    uris = [gap] if isinstance(gap, str) else gap
    places = [arrow_filesystem(uri) for uri in uris]
    return ray.data.read_parquet(
        [path for _, path in places],
        filesystem=places[0][0],
        partitioning=None,  # a folder named `a=b` is no column
        num_cpus=HALF_A_CPU,
    )


@contextlib.contextmanager
def quiet_options() -> Iterator[None]:
    """Without Ray's warnings about the options that stages are given."""
    # Named options for what bounds the retries do not exist yet; the old way is said to end with Ray 2.64.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def actor_options() -> dict[str, int]:
    """How often Ray tries an actor's call again."""
    return {"max_task_retries": TASK_RETRIES}


def _drain(dataset: Dataset, seconds: float) -> Iterator[pa.Table | None]:
    """The dataset's blocks as they come, and None when none has come for `seconds`."""
    blocks: queue.Queue[pa.Table | BaseException | None] = queue.Queue()
    is_over = threading.Event()

    def pull() -> None:
        try:
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                blocks.put(block)
                if is_over.is_set():  # Ray Data stops its tasks when nobody holds the iterator any more
                    break
            blocks.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            blocks.put(error)

    threading.Thread(target=pull, name="encoded-blocks", daemon=True).start()
    try:
        yield from _rows(blocks, seconds)
    finally:
        is_over.set()


def _rows(blocks: queue.Queue[pa.Table | BaseException | None], seconds: float) -> Iterator[pa.Table | None]:
    while True:
        try:
            block = blocks.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if block is None:
            return
        if isinstance(block, BaseException):
            raise block
        for row in range(block.num_rows):
            yield block.slice(row, 1)
