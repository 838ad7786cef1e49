"""Which images pass: prefixes, patterns, SQL over the table's columns, ids."""

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import ConfigError
from for_ray.retrieval import Filters, Question
from for_ray.retrieval.filters import filtered_ids, is_steady, pattern_of

WHOLE = ["(Int32)", "write whole numbers, without exponent or point; columns: uri"]
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
        (Filters(image_ids=[7, 3]), [3, 7]),
        (Filters(image_ids=(10**30, 2, -(10**30), 1 << 62)), [2]),
        (Filters(where="uri = ')' OR camera = 2 -- )"), [1, 3, 6]),
        (Filters(where="(camera) = (2) /* ) */ AND \"split\" = 'it''s)' OR (camera = 1)"), [0, 2, 5, 7]),
        (Filters(glob="/a/[!]]?]*"), [6]),
        (Filters(glob="/a/*/[]1].jpg"), [0]),
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
        (Filters(where="camera > 1e12"), ["camera > 1e12", "1000000000000 is compared", *WHOLE]),
        (Filters(where="split = 'val' AND camera < 2.5"), ["2.5 is compared", *WHOLE]),
        (
            Filters(where="camera = 99999999999", under="/a"),
            ["camera = 99999999999", "99999999999 is", *WHOLE],
        ),
        (Filters(where="camera ="), ["camera =", "Expected"]),
        (Filters(where="camera"), ["does not return a boolean"]),
        (Filters(where="camera = 1) OR (camera = 2"), ["camera = 1) OR", "closed that was never opened"]),
        (Filters(where="camera = 1) OR (true", under="/a/b"), ["closed that was never opened"]),
        (Filters(where="camera = 1) -- (\n /* ( */"), ["closed that was never opened"]),
        (Filters(where="camera = 1 split = 'val'"), ["camera = 1 split", "found: split"]),
        (Filters(where="camera = 1; drop table images"), ["camera = 1; drop", "found: ;"]),
        (Filters(where="-- nothing"), ["-- nothing", "Expected: an expression"]),
        (Filters(where="8 / (camera - 1) > 1"), ["8 / (camera - 1) > 1", "Divide by zero"]),
        (Filters(where="cast(split as int) = 1"), ["Cannot cast string 'val'"]),
        (Filters(where="count(*) > 1"), ["count(*) > 1", "AggregateFunction", "…; columns: uri"]),
        (Filters(where="uri IN (SELECT uri FROM images)"), ["not supported SQL"]),
        (
            Filters(where="kamera IN (" + "1, " * 3000 + "1)"),
            ["kamera IN (1, 1", "1,…", "No field named kamera"],
        ),
        (Filters(where=" "), ["1 to 10,000", "none but spaces"]),
        (Filters(glob=""), ["1 to 10,000", "none but spaces"]),
        (Filters(glob="a[z-a]"), ["the pattern 'a[z-a]'", "the start must be <= the end"]),
        (Filters(glob="[!]"), ["'[!]'", "letter 1", "never closed"]),
        (Filters(glob="[a" * 5000), ["'[a[a", "a…'", "letter 1", "never closed"]),
        (Filters(glob="x" * 10_001), ["1 to 10,000", "10,001"]),
        (Filters(glob="a[b"), ["'a[b'", "letter 2", "never closed"]),
        (Filters(under="ftp://x"), ["ftp://x"]),
    ],
    ids=str,
)
def test_wrong_filters_get_one_line(images: Any, filters: Filters, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        filtered_ids(images, filters)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_patterns() -> None:
    assert pattern_of("a.*[!x^]?") == r"^(?s:a\..*[^x\^].)$"


def test_what_a_filter_says_of_itself_is_one_short_line() -> None:
    filters = Filters(under="/a\nb", where="camera = 1 OR " * 100)
    assert str(filters).startswith("under /a b, where camera = 1 OR camera = 1")
    assert str(filters).endswith("…")
    assert len(str(filters)) < 130


@pytest.mark.parametrize(
    "where",
    [
        "now() > TIMESTAMP '2020-01-01 00:00:00'", "CURRENT_TIMESTAMP IS NOT NULL",
        "current_date() IS NOT NULL", "current_time IS NOT NULL", "today() IS NOT NULL",
        "camera = 1 AND `random`() >= 0", "rand () >= 0", "Uuid() <> split",
    ],
)  # fmt: skip
def test_conditions_that_may_hold_for_others_later(images: Any, where: str) -> None:
    assert filtered_ids(images, Filters(where=where)) is not None  # Lance knows them
    assert not is_steady(Filters(where=where))


def test_conditions_that_hold_for_the_same_images() -> None:
    assert is_steady(Filters(under="/now()", glob="random()", image_ids=(1,)))
    assert is_steady(Filters(where="camera = 2 AND snow = 'brand' AND randomly > 1 AND known IN (3)"))


def test_ids_in_a_list_are_those_in_a_tuple() -> None:
    listed = [Filters(image_ids=[3, 17]), Filters(image_ids=np.array([3, 17]))]  # type: ignore[arg-type]
    assert {Question("a", filters=each).key for each in listed} == {
        Question("a", filters=Filters(image_ids=(3, 17))).key
    }
    assert set(listed) == {Filters(image_ids=(3, 17))}
