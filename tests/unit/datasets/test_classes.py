"""Images with classes: from folders, from tables, and the picture book's instances; bad tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from for_ray.datasets.captions import open_captioned
from for_ray.datasets.classes import classes_of
from for_ray.datasets.instances import draw_view, instances_of, main, write_instances
from for_ray.datasets.pages import CATEGORIES
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, DataError


def labels_of(spec: str, **more: str) -> dict[str, list[str]]:
    images = open_dataset(spec, **more)
    return {
        uri: [images.categories[label] for label in images.labels.row(row)]
        for row, uri in enumerate(images.uris.to_pylist())
    }


def write_table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"labels:{path}"


def test_the_first_folder_is_the_class(tmp_path):
    for name in ("hot_dog/b.JPG", "hot_dog/deep/er/a.png", "cat/c.jpeg", "cat/notes.txt", "stray.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = {"hot_dog/b.JPG": ["hot dog"], "hot_dog/deep/er/a.png": ["hot dog"], "cat/c.jpeg": ["cat"]}
    assert labels_of(f"folder:{tmp_path}") == {
        f"{tmp_path}/{name}": label for name, label in expected.items()
    }
    images = open_dataset(f"folder:{tmp_path}")
    assert (images.categories, images.is_novel.tolist()) == (("cat", "hot dog"), [False, False])
    assert classes_of(images, why="a test").tolist() == [0, 1, 1]


def test_two_folders_of_one_name_are_not_joined_in_silence(tmp_path):
    for name in ("hot dog/a.png", "hot_dog/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="'hot dog' and 'hot_dog' are both called like the class 'hot dog'"):
        open_dataset(f"folder:{tmp_path}")


def test_a_folder_without_folders_of_images_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match="no images in folders of classes"):
        open_dataset(f"folder:{tmp_path}")


def test_a_table_gives_relative_absolute_and_bucket_uris(tmp_path):
    spec = write_table(
        tmp_path / "set.csv", "label,uri,more\ncat,a/1.jpg,x\n dog ,/abs/2.jpg,\ncat,s3://b/3.jpg,y\n"
    )
    expected = {f"{tmp_path}/a/1.jpg": ["cat"], "/abs/2.jpg": ["dog"], "s3://b/3.jpg": ["cat"]}
    assert labels_of(spec) == expected
    pq.write_table(
        pa.table({"uri": list(expected), "label": ["cat", "dog", "cat"]}), tmp_path / "set.parquet"
    )
    assert labels_of(f"labels:{tmp_path}/set.parquet") == expected


def test_numbers_with_gaps_are_names(tmp_path):
    pq.write_table(pa.table({"uri": ["/1", "/2", "/3"], "label": [7, 1, 30]}), tmp_path / "set.parquet")
    images = open_dataset(f"labels:{tmp_path}/set.parquet")
    assert images.categories == ("1", "30", "7")
    assert classes_of(images, why="a test").tolist() == [2, 0, 1]


def test_a_label_that_is_not_there_is_no_name(tmp_path):
    for kind in (pa.float64(), pa.float16()):
        values = pa.array(np.array([7, np.nan, 30]), kind)
        pq.write_table(pa.table({"uri": ["/1", "/2", "/3"], "label": values}), tmp_path / "set.parquet")
        with pytest.raises(DataError, match="row 2 has no label: fill it in, or leave the row out"):
            open_dataset(f"labels:{tmp_path}/set.parquet")


def test_a_split_leaves_classes_out(tmp_path):
    spec = write_table(tmp_path / "set.csv", "uri,label\n/1,cat\n/2,dog\n/3,cow\n")
    split = tmp_path / "split.json"
    split.write_text('{"base": ["dog"], "novel": ["cat"]}')
    images = open_dataset(spec, split=str(split))
    assert (images.categories, images.is_novel.tolist()) == (("dog", "cat"), [False, True])
    assert classes_of(images, why="a test").tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,class\n/1,cat\n", "has no column label; it has uri, class"),
        ("uri,label\n/1,cat\n/2,\n", "row 2 has no label"),
        ("uri,label\n,cat\n", "row 1 has no uri"),
        ("uri,label\n", "has no rows"),
        ("", "has no column uri, label; it has none"),
        ("uri,label\n/1,cat\n/2,dog,cow\n", "line 3 has 3 fields, its header 2"),
    ],
)
def test_a_bad_table_is_refused_in_a_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_dataset(write_table(tmp_path / "set.csv", text))


def test_other_files_and_encodings_are_refused(tmp_path):
    (tmp_path / "set.csv").write_bytes("uri,label\n/1,cat\n/2,fianc\xe9e\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(line 3, byte 0xe9\): convert it"):
        open_dataset(f"labels:{tmp_path}/set.csv")
    with pytest.raises(DataError, match=r"must end with \.csv"):
        open_dataset(f"labels:{tmp_path}/set.xls")
    (tmp_path / "set.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="no readable Parquet"):
        open_dataset(f"labels:{tmp_path}/set.parquet")


def test_one_class_or_several_an_image_are_refused(tmp_path):
    with pytest.raises(DataError, match="needs two classes at least: labels set has 1"):
        classes_of(open_dataset(write_table(tmp_path / "set.csv", "uri,label\n/1,a\n/2,a\n")), why="k-NN")
    images = open_dataset(write_table(tmp_path / "set.csv", "uri,label\n/1,a\n/2,a\n/1,b\n"))
    with pytest.raises(DataError, match="1 of the 2 images of labels set have several, such as /1"):
        classes_of(images, why="k-NN")


def test_instances_are_drawn_the_same_by_any_number_of_processes(tmp_path):
    paths = [
        write_instances(tmp_path / name, instances=3, views=2, split="val", processes=number)
        for name, number in (("one", 1), ("two", 2))
    ]
    images = open_dataset(f"labels:{paths[0]}")
    assert (len(images), len(images.categories)) == (6, 3)
    for name in [path.name for path in (tmp_path / "one" / "images").iterdir()]:
        first, second = ((tmp_path / each / "images" / name).read_bytes() for each in ("one", "two"))
        assert first == second
    assert paths[0].read_text() == paths[1].read_text()
    pairs = open_captioned(f"pairs:{tmp_path}/one/captions.csv")
    assert sorted(pairs.uris.to_pylist()) == images.uris.to_pylist()
    assert np.diff(pairs.of_image.offsets).tolist() == [2] * 6


def test_a_whole_set_stays_and_another_is_refused(tmp_path):
    path = write_instances(tmp_path / "set", instances=1, views=1, split="train", processes=1)
    before = path.stat().st_mtime_ns
    assert main(["--out", str(path.parent), "--instances", "1", "--views", "1", "--split", "train"]) == 0
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds something else"):
        write_instances(tmp_path / "set", instances=2, views=1, split="train")
    with pytest.raises(ConfigError, match="--instances must be 1 to"):
        write_instances(tmp_path / "new", instances=0, views=1, split="train")


def test_views_of_an_instance_differ_and_splits_share_no_name():
    (instance,) = instances_of("val", 1, seed=5)
    views = [draw_view(instance, number) for number in (0, 1, 0)]
    assert views[0][0].tobytes() == views[2][0].tobytes()
    assert views[0][0].tobytes() != views[1][0].tobytes()
    assert isinstance(views[0][0], Image.Image)
    assert all(instance.noun in text for text in views[0][1])
    names = {split: {each.glyph.name for each in instances_of(split, 60)} for split in ("train", "val")}
    assert names["val"] <= set(CATEGORIES)
    assert not names["train"] & set(CATEGORIES)
