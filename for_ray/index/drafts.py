"""What a run has built and not published yet: the next run goes on from there if this one dies.

One file beside the segments, written anew whenever one is done, so that it never names what is not there
whole. It is of the snapshot that the run went on from: with the next one it counts no more, and is swept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from for_ray.schema import Codec, Layout, Segment
from for_ray.storage import exists, list_objects, read_bytes, write_bytes


class DraftRecord(BaseModel):
    """A draft but for its deleted image ids.

    Attributes:
        base_id: The snapshot that the run went on from; None where there was none.
        images_version: Of the table that the run reads.
        codec: Of all segments.
        segments: Those of the base that stay, those that are built, those that are merged; by image id.
        first_new: From this image id on the run builds: what no segment covers is still to do.
        is_new: Whether segments were built.
        retrained: Why the codec was trained anew; None where it was not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_id: int | None
    images_version: int
    codec: Codec
    segments: list[Segment]
    first_new: int
    is_new: bool
    retrained: str | None

    @property
    def file_names(self) -> set[str]:
        """Of segments and codec."""
        return {self.codec.file_name, *(segment.file_name for segment in self.segments)}


class Draft(NamedTuple):
    """A record, and the ids of images that its segments hold and the table does not: int64 [n], ascending."""

    record: DraftRecord
    deleted: NDArray[np.int64]


def write_draft(layout: Layout, fingerprint: str, draft: Draft) -> None:
    """Put a draft in the place of the last one, whole or not at all; only the holder of the lease may."""
    content = draft.record.model_dump_json().encode() + b"\n" + draft.deleted.astype("<i8").tobytes()
    write_bytes(layout.draft_uri(fingerprint), content)


def find_draft(layout: Layout, fingerprint: str, *, base_id: int | None) -> Draft | None:
    """The draft of a run that went on from this snapshot; None where there is none that is whole.

    Raises:
        StorageError: The store refused.
    """
    uri = layout.draft_uri(fingerprint)
    if not exists(uri):
        return None
    line, _, ids = read_bytes(uri).partition(b"\n")
    try:
        record = DraftRecord.model_validate_json(line)
    except ValidationError:  # of another version of this package: what it has built is built again
        return None
    pages = list_objects(layout.segment_uri(fingerprint, ""))
    sizes = {entry.uri.rpartition("/")[2]: entry.size_bytes for page in pages for entry in page}
    parts: list[Codec | Segment] = [record.codec, *record.segments]
    is_whole = all(sizes.get(part.file_name) == part.num_bytes for part in parts)
    if record.base_id != base_id or not is_whole or len(ids) % 8:
        return None
    return Draft(record, np.frombuffer(ids, "<i8").astype(np.int64))
