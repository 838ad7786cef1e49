"""Encoding a gap to its end, also where an image kills the process that decodes it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from for_ray.errors import StageError, StorageError
from for_ray.index import table
from for_ray.schema import WorkTime
from for_ray.stages.diff import ROWS_PER_FILE, Gap, write_gap
from for_ray.stages.failures import DEAD_ENCODER, OF_NODES, RESULTS_LOST, UNREACHABLE
from for_ray.storage import Lease, Spill, delete_tree, join_uri

# Ray takes seconds to import: a run that finds nothing to do is done before.
if TYPE_CHECKING:
    from for_ray.stages.blocks import TableJob
    from for_ray.stages.encode import Encoded, Pool

MOST_IN_VAIN = 4
"""Passes of an encode stage, running, that a crash may end before they have stored an image. Those that have
may be as many as they like: nodes that are let on the spot go all night long."""


def encode_gap(
    images: Any,
    gap: Gap,
    *,
    work_uri: str,
    folder: Path,
    job: TableJob,
    pool: Pool,
    commit_seconds: float,
    most_bad: float,
    lease: Lease,
    on_progress: Callable[[int], None],
    stage: str = "encode",
) -> Encoded:
    """Encode a gap; where processes or nodes die, go on with what is left.

    Where a process died, the images of the first file of what is left are decoded apart, one by one: what was
    being read is among them, and one that kills its decoder is found so. The others go on as before. Behind
    the next crash two files are, then four, until a pass over all has stored as many images as these hold.

    Args:
        images: The table, at its latest version; nobody else writes to it.
        gap: Its files are on this disk.
        work_uri: Where the workers find the same files; what is left is written below it. The caller removes
            it.
        folder: On this disk, for this function alone.
        job: As for `encode`, like all that follows.
        pool: See `encode`.
        commit_seconds: See `encode`.
        most_bad: See `encode`.
        lease: See `encode`.
        on_progress: See `encode`.
        stage: What an error calls it.

    Raises:
        StageError: Processes die also where images are decoded apart, or before any is stored, again and
            again: images are not the cause. Or an encoder dies at every image, or is out of reach twice
            running before it has stored one.
    """
    from for_ray.stages.blocks import EncodeCounts
    from for_ray.stages.encode import encode

    asked: str | list[str] = work_uri
    latest, num_images, is_whole = images, gap.num_to_encode, True
    done, work, crashes = EncodeCounts(), WorkTime(), _Crashes(stage)
    rests = _Rests(gap, images, work_uri=work_uri, folder=folder, lease=lease)
    while True:
        encoded = encode(
            latest,
            asked,
            job=job,
            pool=pool,
            num_images=num_images,
            commit_seconds=commit_seconds,
            most_bad=most_bad - done.quarantined,
            lease=lease,
            on_progress=partial(_tell, on_progress, done.stored),
            is_apart=crashes.is_apart,
        )
        work, latest = _sum(work, encoded.work), encoded.table
        counts = done.plus(encoded.counts)
        has_ended = encoded.crash is None and is_whole
        if has_ended or counts.quarantined + counts.skipped > most_bad:
            return encoded._replace(counts=counts, work=work, crash=None)
        gc.collect()  # Ray Data's error holds actors, which would keep the GPUs from those of the next pass
        crashes.add(encoded)
        # Images that were skipped are in no table: they are met, and counted, again.
        done = counts._replace(gone=0, changed=0, denied=0)
        rest = rests.write(latest)
        if not rest.num_to_encode:
            return encoded._replace(counts=done, work=work, crash=None)
        asked, num_images, is_whole = rests.uri, rest.num_to_encode, True
        if crashes.is_apart:
            asked = rest.file_uris[: crashes.num_apart]
            num_images = min(num_images, crashes.num_apart * ROWS_PER_FILE)
            is_whole = len(asked) == len(rest.file_uris)


class _Crashes:
    """What the ends of passes so far say of the next one.

    Args:
        stage: What an error calls it.
    """

    def __init__(self, stage: str) -> None:
        self.num_apart = 0
        """Files of what is left that the next pass decodes apart, and no others; 0: none, it is over all."""
        self._stage = stage
        self._next_apart = 1
        self._num_in_vain = 0
        self._in_vain: str | None = None  # why the last pass ended, if it stored nothing

    @property
    def is_apart(self) -> bool:
        """Whether the next pass decodes apart."""
        return self.num_apart > 0

    def add(self, encoded: Encoded) -> None:
        """Take a pass that is not the last.

        Raises:
            StageError: There is no sense in another one.
        """
        crash, num_stored = encoded.crash, encoded.counts.stored
        if crash is None:  # what it decoded apart is done
            self.num_apart = 0
            if num_stored:
                self._num_in_vain, self._in_vain = 0, None
            return
        if not self.is_apart and num_stored >= self._next_apart * ROWS_PER_FILE:
            self._next_apart = 1  # so much went at full speed that a search may begin anew
        before, self._in_vain = self._in_vain, None if num_stored else crash
        self._num_in_vain = self._num_in_vain + 1 if self._in_vain else 0
        if self._in_vain == before == UNREACHABLE:  # so is, at times, one that dies at every image
            raise StageError(self._stage, DEAD_ENCODER)
        if self._num_in_vain == MOST_IN_VAIN:
            raise StageError(
                self._stage,
                f"processes of workers died in {MOST_IN_VAIN} attempts that stored nothing, though no image "
                f"is to blame: {crash}; have the nodes memory for them, and do they stay? Run again to go "
                "on: what was committed stays",
            )
        if crash not in OF_NODES or self._in_vain == RESULTS_LOST:
            # Many nodes read many files at once: what was being read may lie in a later one than the first.
            self.num_apart, self._next_apart = self._next_apart, 2 * self._next_apart


class _Rests:
    """What is left of a gap, pass by pass; the rest before goes, and of the last one only its files stay.

    Args:
        gap: See `encode_gap`.
        before: The table as it was before the first pass.
        work_uri: See `encode_gap`.
        folder: See `encode_gap`.
        lease: Checked before something is deleted.
    """

    def __init__(self, gap: Gap, before: Any, *, work_uri: str, folder: Path, lease: Lease) -> None:
        self.uri = ""
        """The folder or prefix of the files that were written last."""
        self._gap, self._before, self._work_uri = gap, before, work_uri
        self._folder, self._lease = folder, lease
        self._num_written = 0

    def write(self, after: Any) -> Gap:
        """Write what is left; of the gap that comes back, the ids of rows are on no disk any more.

        Args:
            after: The table as it is now.
        """
        self._num_written += 1
        last, self.uri = self.uri, join_uri(self._work_uri, f"rest-{self._num_written}")
        folder = self._folder / f"{self._num_written}"
        rest = _write_rest(self._gap, self._before, after, folder=folder, rest_uri=self.uri)
        delete_tree(str(folder))
        if last:
            self._lease.check()
            with contextlib.suppress(StorageError):  # the caller removes it with the others
                delete_tree(last)
        return rest


def _tell(on_progress: Callable[[int], None], done: int, count: int) -> None:
    on_progress(done + count)


def _write_rest(gap: Gap, before: Any, after: Any, *, folder: Path, rest_uri: str) -> Gap:
    """Write what was to be encoded without the rows that came into the table since `before`."""
    wanted = Spill(folder / "wanted", pq.read_schema(gap.file_uris[0]))
    for uri in gap.file_uris:
        with pq.ParquetFile(uri) as file:
            for batch in file.iter_batches():
                wanted.add(batch)
    wanted.finish()
    added = table.scan_state(after, since=before)
    return write_gap(wanted, added, folder=folder / "rest", gap_uri=rest_uri)


def _sum(one: WorkTime, other: WorkTime) -> WorkTime:
    names = ("read_seconds", "wait_seconds", "encode_seconds", "write_seconds")
    return other.model_copy(update={name: getattr(one, name) + getattr(other, name) for name in names})
