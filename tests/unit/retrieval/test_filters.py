"""Which images pass: prefixes, patterns, SQL over the table's columns, ids."""

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import ConfigError
from for_ray.retrieval import Filters
from for_ray.retrieval.filters import filtered_ids, pattern_of

URIS = [
    "/a/b/1.jpg", "/a/b/2.png", "/a/bc/3.jpg", "/a/b%c/4.jpg", "s3://x/it's.jpg", "/a/line\nbreak.jpg",
    "/a/[x].jpg", "/a/B/ü.jpg",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = pa.table(
        {
            "uri": URIS,
            "camera": pa.array([1, 2, 1, 2, None, 1, 2, 1], pa.int32()),
            "split": ["val", "train"] * 4,
            "error": pa.nulls(8, pa.string()),
        }
    )
    path = str(tmp_path_factory.mktemp("table") / "images.lance")
    return lance.write_dataset(rows, path, enable_stable_row_ids=True)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(under="/a/b"), [0, 1, 2, 3]),
        (Filters(under="/a/b/"), [0, 1]),
        (Filters(under="/a/b%"), [3]),
        (Filters(under="file:///a/b/"), [0, 1]),
        (Filters(under="s3://x/it's"), [4]),
        (Filters(under="s3://X"), []),
        (Filters(glob="*.jpg"), [0, 2, 3, 4, 5, 6, 7]),
        (Filters(glob="/a/*/?.jpg"), [0, 2, 3, 7]),
        (Filters(glob="/a/*/[!1-3].jpg"), [3, 7]),
        (Filters(glob="/a/[[]x].jpg"), [6]),
        (Filters(glob="/a/b.1*"), []),
        (Filters(where="camera = 1"), [0, 2, 5, 7]),
        (Filters(where="split = 'val' AND camera = 2"), [6]),
        (Filters(where="camera = 1 OR camera = 2 -- all"), [0, 1, 2, 3, 5, 6, 7]),
        (Filters(where="camera = 1 OR camera = 2", under="/a/b/"), [0, 1]),
        (Filters(where="camera IS NULL"), [4]),
        (Filters(image_ids=(7, 3, 3, 99, -1)), [3, 7, 99]),
        (Filters(image_ids=(7, 3, 0), where="camera = 1"), [0, 7]),
        (Filters(image_ids=()), []),
    ],
    ids=str,
)
def test_what_passes(images: Any, filters: Filters, expected: list[int]) -> None:
    ids = filtered_ids(images, filters)
    assert ids is not None
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


def test_no_filter_and_a_relative_folder(
    images: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert filtered_ids(images, Filters()) is None
    monkeypatch.chdir("/")
    ids = filtered_ids(images, Filters(under="a/b/"))
    assert ids is not None
    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (Filters(where="kamera = 1"), ["kamera = 1", "No field named kamera", "columns: uri, camera, split"]),
        (Filters(where="camera = 'x'"), ["camera = 'x'", "Utf8", "columns: uri, camera, split"]),
        (Filters(where="camera ="), ["camera =", "Expected"]),
        (Filters(where="camera"), ["does not return a boolean"]),
        (Filters(where="camera = 1) OR (camera = 2"), []),
        (Filters(where=" "), ["1 to 10,000"]),
        (Filters(glob="x" * 10_001), ["1 to 10,000", "10,001"]),
        (Filters(glob="a[b"), ["'a[b'", "letter 2", "never closed"]),
        (Filters(under="ftp://x"), ["ftp://x"]),
    ],
    ids=str,
)
def test_wrong_filters_get_one_line(images: Any, filters: Filters, words: list[str]) -> None:
    if not words:  # what Lance reads up to its first whole condition, it takes for that
        assert filtered_ids(images, filters) is not None
        return
    with pytest.raises(ConfigError) as refused:
        filtered_ids(images, filters)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_patterns() -> None:
    assert pattern_of("a.*[!x^]?") == r"^(?s:a\..*[^x\^].)$"
