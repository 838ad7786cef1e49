"""A merged segment answers exactly as its parts do, without what is dead, or there is no file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.errors import ConfigError, DataError, StorageError
from for_ray.index.codec import read_codec
from for_ray.index.merge import merge_segments
from for_ray.index.search import SegmentSet
from for_ray.index.segment import build_segment
from for_ray.schema import image_ids_of

NONE = np.empty(0, np.int64)

CODECS = [
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,RaBitQ",
    "HR,IVF8,RaBitQ4",
    "HR,IVF8_HNSW32,RaBitQ4",
    "RR16,IVF8,RaBitQ2",
    "IVF8,PQ4x4",
    "OPQ4,IVF8,PQ4x4",
]


@pytest.fixture
def images(make_images):
    return make_images(150)


@pytest.fixture
def dead(images) -> NDArray[np.int64]:
    """Every fifth image and a whole part, in disorder, with ids that no segment has."""
    ids = np.concatenate([images.image_ids[::5], images.image_ids[40:41], [7, 1 << 50]])
    return np.random.default_rng(0).permutation(np.unique(ids))


CUTS = (40, 41, 41, 100)
"""Five parts: one of a single image, one without any."""


def contents(path: Path) -> list[tuple[list[int], list[bytes]]]:
    """Ids and codes of each list, in their order."""
    index = faiss.read_index(str(path))
    lists = faiss.extract_index_ivf(index).invlists
    found: list[tuple[list[int], list[bytes]]] = []
    for number in range(lists.nlist):
        size = lists.list_size(number)
        if not size:
            found.append(([], []))
            continue
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        found.append((ids.tolist(), [code.tobytes() for code in codes]))
    return found


def expected(paths: Sequence[Path], dead: NDArray[np.int64]) -> list[tuple[list[int], list[bytes]]]:
    """The lists of the parts behind each other, one vector at a time."""
    gone = set(dead.tolist())
    merged: list[tuple[list[int], list[bytes]]] = []
    for lists in zip(*map(contents, paths), strict=True):
        pairs = [pair for ids, codes in lists for pair in zip(ids, codes, strict=True)]
        pairs = [(number, code) for number, code in pairs if number >> 8 not in gone]
        merged.append(([number for number, _ in pairs], [code for _, code in pairs]))
    return merged


@pytest.mark.parametrize("codec", CODECS)
def test_a_merged_segment_answers_exactly_as_its_parts(images, dead, build, make_queries, codec, tmp_path):
    parts = build(images, codec, cuts=CUTS).paths
    before = [path.read_bytes() for path in parts]
    merged = merge_segments(parts, tmp_path / "merged.faiss", dead_image_ids=dead)
    assert contents(merged.path) == expected(parts, dead)
    assert merged.num_vectors == np.isin(image_ids_of(images.vector_ids), dead, invert=True).sum() > 300
    queries = make_queries(20)
    for nprobe, k in ((1, 5), (3, 10), (8, 1000)):
        apart = SegmentSet(parts, nprobe=nprobe).search(queries, k, exclude_image_ids=np.sort(dead))
        whole = SegmentSet([merged.path], nprobe=nprobe).search(queries, k)
        np.testing.assert_array_equal(whole.scores, apart.scores)
        # Of vectors with the same code in the last place FAISS gives any; k = 1000 is all of them.
        is_sure = (whole.scores > whole.scores[:, -1:]) | (k == 1000)
        np.testing.assert_array_equal(whole.vector_ids[is_sure], apart.vector_ids[is_sure])
        assert is_sure.sum() > 40
    assert [path.read_bytes() for path in parts] == before


@pytest.mark.parametrize(
    "codec",
    [
        "IVF8,Flat",
        "IVF8,SQ8",
        "HR,IVF8,RaBitQ4",
        "HR,IVF8_HNSW32,RaBitQ4",
        "RR16,IVF8,RaBitQ4",
        "PCA8,IVF8,RaBitQ4",
    ],
)
def test_merging_gives_the_file_that_building_at_once_gives(images, dead, build, codec, tmp_path):
    built = build(images, codec, cuts=CUTS)
    left = images.take(np.setdiff1d(images.image_ids, dead))
    whole = build_segment(
        built.codec_path, [(left.vector_ids, left.vectors)], tmp_path / "whole.faiss", threads=1
    )
    merged = merge_segments(built.paths, tmp_path / "merged.faiss", dead_image_ids=dead)
    assert merged == whole._replace(path=merged.path)
    assert merged.path.read_bytes() == whole.path.read_bytes()


def in_memory(paths: Sequence[Path], dead: NDArray[np.int64], path: Path) -> bytes:
    """What FAISS writes of an index that holds the lists of the parts behind each other."""
    index = faiss.read_index(str(paths[0]))
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    lists.this.disown()
    ivf.replace_invlists(lists, True)
    for number, (ids, codes) in enumerate(expected(paths, dead)):
        if ids:
            numbers, content = np.array(ids), np.frombuffer(b"".join(codes), np.uint8)
            lists.add_entries(number, len(ids), faiss.swig_ptr(numbers), faiss.swig_ptr(content))
    index.ntotal = ivf.ntotal = sum(lists.list_size(number) for number in range(lists.nlist))
    faiss.write_index(index, str(path))
    return path.read_bytes()


@pytest.mark.parametrize("is_dead", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_the_file_is_what_faiss_writes(images, dead, build, codec, is_dead, tmp_path, monkeypatch):
    monkeypatch.setattr("for_ray.index.merge.PIECE_BYTES", 100)
    parts = build(images, codec, cuts=CUTS).paths
    gone = dead if is_dead else NONE
    merged = merge_segments(parts, tmp_path / "merged.faiss", dead_image_ids=gone)
    assert merged.path.read_bytes() == in_memory(parts, gone, tmp_path / "reference.faiss")


@pytest.mark.parametrize("num_held", range(8))
def test_few_lists_with_vectors_are_written_as_faiss_does(images, num_held, tmp_path):
    """Up to half of the lists are written as pairs, more as a whole; of an odd number of lists."""
    quantizer = faiss.IndexFlatIP(16)
    quantizer.add(images.vectors[:7].astype(np.float32))
    index = faiss.IndexIVFFlat(quantizer, 16, 7, faiss.METRIC_INNER_PRODUCT)
    vectors, ids = images.vectors[: 3 * num_held].astype(np.float32), images.vector_ids[: 3 * num_held]
    numbers = np.repeat(np.arange(num_held), 3)[::-1].copy()
    index.add_core(len(vectors), *map(faiss.swig_ptr, (vectors, ids, numbers)))
    faiss.write_index(index, str(tmp_path / "part"))
    merged = merge_segments([tmp_path / "part"], tmp_path / "merged", dead_image_ids=NONE)
    assert merged.path.read_bytes() == (tmp_path / "part").read_bytes()
    assert merged.num_vectors == 3 * num_held


BOUNDED = """
import resource, sys
from pathlib import Path
import faiss, numpy as np
from for_ray.index.merge import merge_segments

*parts, merged = map(Path, sys.argv[1:])
dead = np.arange(0, 1 << 20, 7)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (48 << 20), -1))
print(merge_segments(parts, merged, dead_image_ids=dead).num_vectors)
"""


def test_memory_does_not_grow_with_the_segments(tmp_path):
    """Two parts of 64 MB each in two lists become one, in a process that may take 48 MB."""
    quantizer, dim = faiss.IndexFlatIP(1024), 1024
    quantizer.add(np.eye(2, dim, dtype=np.float32))
    random = np.random.default_rng(0)
    for part in range(2):
        index = faiss.IndexIVFFlat(quantizer, dim, 2, faiss.METRIC_INNER_PRODUCT)
        ids = 256 * (np.arange(1 << 14) + (part << 14))
        index.add_with_ids(random.random((1 << 14, dim), np.float32), ids)
        faiss.write_index(index, str(tmp_path / f"part-{part}"))
    paths = [str(tmp_path / name) for name in ("part-0", "part-1", "merged")]
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *paths], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, str((1 << 15) - -(-(1 << 15) // 7))), done.stderr


def test_what_is_returned_is_what_is_there(images, build, tmp_path):
    parts = build(images, "IVF8,SQ8", cuts=CUTS).paths
    path = tmp_path / "merged.faiss"
    merged = merge_segments(parts, path, dead_image_ids=NONE)
    content = path.read_bytes()
    sizes = np.array([len(ids) for ids, _ in contents(path)])
    assert merged[:4] == (path, len(images.vectors), len(content), hashlib.sha256(content).hexdigest())
    assert merged.imbalance == pytest.approx(8 * (sizes**2).sum() / sizes.sum() ** 2)
    assert merged.imbalance > 1
    assert list(tmp_path.glob("*.part")) == []


def test_merging_in_steps_is_merging_at_once(images, dead, build, tmp_path):
    a, b, c, d, e = build(images, "HR,IVF8,RaBitQ4", cuts=CUTS).paths
    at_once = merge_segments([a, b, c, d, e], tmp_path / "at-once", dead_image_ids=dead)
    first = merge_segments([a, b], tmp_path / "first", dead_image_ids=dead[::2])
    second = merge_segments([c, d, e], tmp_path / "second", dead_image_ids=NONE)
    last = merge_segments([first.path, second.path], tmp_path / "last", dead_image_ids=dead)
    assert last.sha256 == at_once.sha256


def test_one_part_without_dead_is_copied(images, build, tmp_path):
    (part,) = build(images, "HR,IVF8,RaBitQ4").paths
    merged = merge_segments([part], tmp_path / "merged", dead_image_ids=NONE)
    assert merged.path.read_bytes() == part.read_bytes()


def test_all_dead_leaves_the_codec(images, build, tmp_path):
    built = build(images, "HR,IVF8,RaBitQ4", cuts=CUTS)
    merged = merge_segments(built.paths, tmp_path / "merged", dead_image_ids=images.image_ids)
    assert (merged.num_vectors, merged.imbalance) == (0, 1.0)
    assert merged.path.read_bytes() == built.codec_path.read_bytes()
    assert read_codec(merged.path).ntotal == 0


def test_lists_that_are_empty_stay_empty(images, build, tmp_path):
    """Three images in eight lists."""
    built = build(images, "IVF8,Flat", cuts=(1, 2, 3))
    merged = merge_segments(built.paths[:3], tmp_path / "merged", dead_image_ids=images.image_ids[1:2])
    assert [] in [ids for ids, _ in contents(merged.path)]
    assert contents(merged.path) == expected(built.paths[:3], images.image_ids[1:2])


def test_another_codec_is_refused(images, build, make_images, tmp_path):
    parts = build(images, "IVF8,SQ8").paths
    others = build(make_images(150, seed=5), "IVF8,SQ8", name="b").paths
    with pytest.raises(DataError, match=r"b-0\.faiss is of another codec than .*a-0\.faiss"):
        merge_segments(parts + others, tmp_path / "merged", dead_image_ids=NONE)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("factory", ["IVF2,PQ4x4fs", "IVF2,RaBitQfs", "IVF2,FlatPanorama4"])
def test_lists_that_are_not_plain_are_refused(images, factory, tmp_path):
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    index.train(images.vectors.astype(np.float32))
    index.add_with_ids(images.vectors.astype(np.float32), images.vector_ids)
    faiss.write_index(index, str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"other keeps its vectors in \w+, which cannot be merged; choose"):
        merge_segments([tmp_path / "other"], tmp_path / "merged", dead_image_ids=NONE)


def test_a_part_that_is_cut_short_is_named(images, build, tmp_path):
    parts = build(images, "IVF8,SQ8", cuts=(70,)).paths
    parts[1].write_bytes(parts[1].read_bytes()[:-500])
    with pytest.raises(DataError, match=r"a-1\.faiss is not a whole FAISS inverted file"):
        merge_segments(parts, tmp_path / "merged", dead_image_ids=NONE)


@pytest.mark.parametrize("is_dead", [False, True])
def test_a_disk_that_gets_full_leaves_no_half_file(images, dead, build, is_dead, little_space, tmp_path):
    """Whatever is missing: the last byte, ids, codes, or a part of the codec."""
    parts = build(images, "IVF8,SQ8", cuts=(70,)).paths
    gone = dead if is_dead else NONE
    whole = merge_segments(parts, tmp_path / "whole", dead_image_ids=gone)
    path = tmp_path / "merged"
    path.write_bytes(b"what was there")
    for num_bytes in (whole.num_bytes - 1, whole.num_bytes - 300, whole.num_bytes // 2, 1000, 100):
        with (
            little_space(num_bytes),
            pytest.raises(
                StorageError, match=r"^cannot write segment .*/merged: .*File too large; free space"
            ),
        ):
            merge_segments(parts, path, dead_image_ids=gone)
        assert path.read_bytes() == b"what was there"
        assert list(tmp_path.glob("*.part")) == []
    with little_space(whole.num_bytes):
        assert merge_segments(parts, path, dead_image_ids=gone) == whole._replace(path=path)
    assert path.read_bytes() == whole.path.read_bytes()


def test_a_faiss_that_writes_in_another_way_is_refused(images, build, tmp_path, monkeypatch):
    parts = build(images, "IVF8,SQ8", cuts=(70,)).paths
    write = faiss.write_index

    def write_more(index: faiss.Index, writer: faiss.IOWriter) -> None:
        write(index, writer)
        writer(faiss.swig_ptr(np.zeros(4, np.uint8)), 1, 4)

    monkeypatch.setattr(faiss, "write_index", write_more)
    with pytest.raises(
        ConfigError, match=r"faiss 1\.\S+ writes inverted lists in another way than faiss 1\.15"
    ):
        merge_segments(parts, tmp_path / "merged", dead_image_ids=NONE)
    assert sorted(path.name for path in tmp_path.glob("merged*")) == []
