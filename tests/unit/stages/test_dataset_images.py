"""Of a folder, the images that a data set names are listed; what it names in vain is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.errors import DataError
from for_ray.stages.dataset_images import list_dataset
from for_ray.storage import stat


def dataset_of(folder: Path, names: list[str]) -> LabelledImages:
    return LabelledImages(
        name="coco few",
        uris=pa.chunked_array([[str(folder / name) for name in names]], pa.string()),
        categories=("dog",),
        is_novel=np.zeros(1, bool),
        labels=Ragged.of([[0]] * len(names)),
        images_uri=str(folder),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0 to 5, two of them deeper, and a text."""
    place = tmp_path / "images"
    (place / "deep").mkdir(parents=True)
    for number in range(6):
        (place / ("deep" if number > 3 else ".") / f"{number}.jpg").write_bytes(b"x" * number)
    (place / "readme.txt").write_bytes(b"hello")
    return place


def test_what_the_data_set_names_is_listed_with_etag_and_size(folder: Path, tmp_path: Path) -> None:
    found = list_dataset(dataset_of(folder, ["1.jpg", "deep/4.jpg"]), tmp_path / "work", most_missing=0)
    rows = pa.concat_tables(found.rows.part(number) for number in range(found.rows.num_parts)).to_pylist()
    expected = [stat(str(folder / name)) for name in ("1.jpg", "deep/4.jpg")]
    assert sorted((row["uri"], row["etag"], row["size_bytes"]) for row in rows) == sorted(
        map(tuple, expected)
    )
    assert found.num_missing == 0


def test_missing_images_are_counted_up_to_a_share(folder: Path, tmp_path: Path) -> None:
    dataset = dataset_of(folder, ["1.jpg", "2.jpg", "lost.jpg", "3.jpg"])
    assert list_dataset(dataset, tmp_path / "work", most_missing=0.25).num_missing == 1
    with pytest.raises(DataError) as caught:
        list_dataset(dataset, tmp_path / "again", most_missing=0.2)
    assert "1 of the 4 images of coco few are missing, such as" in str(caught.value)
    assert f"{folder}/lost.jpg: more than max_bad_fraction 0.2" in str(caught.value)


def test_a_folder_of_other_images_is_refused_whatever_the_share(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of the 2 images .* are missing, such as .*/a\.jpg"):
        list_dataset(dataset_of(folder, ["a.jpg", "b.jpg"]), tmp_path / "work", most_missing=1)


def test_only_one_that_is_missing_is_the_one_that_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = dataset_of(folder, ["0.jpg", "1.jpg", "deep/9.jpg", "2.jpg"])
    with pytest.raises(DataError, match=r"such as .*/deep/9\.jpg"):
        list_dataset(dataset, tmp_path / "work", most_missing=0)
