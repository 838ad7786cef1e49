"""A draft is found again as it was written, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from for_ray.index.drafts import Draft, DraftRecord, find_draft, write_draft
from for_ray.schema import Codec, Layout, Segment


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """With the files of two segments and their codec."""
    folder = tmp_path / "encoder-f" / "segments"
    folder.mkdir(parents=True)
    for name in ("codec-c.faiss", "segment-1.faiss", "segment-2.faiss"):
        (folder / name).write_bytes(b"seven b")
    return Layout(str(tmp_path))


def draft(*, base_id: int | None = 3) -> Draft:
    codec = Codec(
        codec_id="c",
        file_name="codec-c.faiss",
        sha256="0",
        num_bytes=7,
        factory="IVF8,Flat",
        dim=2,
        nlist=8,
        num_trained_on=9,
    )
    segments = [
        Segment(
            segment_id=str(number),
            codec_id="c",
            file_name=f"segment-{number}.faiss",
            sha256="0",
            num_bytes=7,
            num_vectors=1,
            first_image_id=number,
            end_image_id=number + 1,
        )
        for number in (1, 2)
    ]
    record = DraftRecord(
        base_id=base_id,
        images_version=5,
        codec=codec,
        segments=segments,
        first_new=1,
        is_new=True,
        retrained="why\nnot",
    )
    return Draft(record, np.array([10, 266, 1 << 50]))  # 10 is a line's end, among the bytes


@pytest.mark.parametrize("base_id", [3, None])
def test_it_is_found_as_it_was_written(layout, base_id):
    written = draft(base_id=base_id)
    write_draft(layout, "f", written)
    found = find_draft(layout, "f", base_id=base_id)
    assert found.record == written.record
    assert (found.deleted.dtype, found.deleted.tolist()) == (np.int64, written.deleted.tolist())
    assert find_draft(layout, "f", base_id=4) is None
    assert find_draft(layout, "another", base_id=base_id) is None


@pytest.mark.parametrize("name", ["codec-c.faiss", "segment-2.faiss"])
@pytest.mark.parametrize("content", [None, b"six by"])
def test_it_is_nothing_without_its_files(layout, name, content):
    write_draft(layout, "f", draft())
    path = Path(layout.segment_uri("f", name))
    path.unlink() if content is None else path.write_bytes(content)
    assert find_draft(layout, "f", base_id=3) is None


def test_one_of_another_version_is_nothing(layout):
    write_draft(layout, "f", draft())
    path = Path(layout.draft_uri("f"))
    path.write_bytes(path.read_bytes().replace(b'"first_new"', b'"last_old"'))
    assert find_draft(layout, "f", base_id=3) is None
    path.write_bytes(b"")
    assert find_draft(layout, "f", base_id=3) is None


def test_one_that_is_cut_short_is_nothing(layout):
    write_draft(layout, "f", draft())
    path = Path(layout.draft_uri("f"))
    path.write_bytes(path.read_bytes()[:-3])
    assert find_draft(layout, "f", base_id=3) is None
