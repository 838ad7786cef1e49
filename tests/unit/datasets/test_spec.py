"""Data sets by one word: what a spec may look like, what a split may say, and what each format gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from for_ray.datasets import coco, nuimages
from for_ray.datasets.labelled import LabelledImages
from for_ray.datasets.picturebook import write_picturebook
from for_ray.datasets.spec import _two_places, open_dataset
from for_ray.errors import ConfigError, DataError, ForRayError
from tests.formats import (
    NUIMAGES_CATEGORIES,
    coco_content,
    lvis_content,
    nuimages_tables,
    token,
    write_tables,
)

COCO = {
    139: ["cat", "person", "cat", "dog*"],
    7: [],
    285: ["wine glass"],
    632: ["bus", "wine glass", "person"],
}
LVIS = {9: ["trash_can", "applesauce"], 4: ["alarm_clock"], 25: []}


def labels_of(images: LabelledImages) -> dict[str, list[str]]:
    """Names by the last part of the uri, in the data set's order."""
    return {
        uri.rsplit("/", 1)[-1]: [images.categories[label] for label in images.labels.row(row)]
        for row, uri in enumerate(images.uris.to_pylist())
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def open_coco(tmp_path: Path) -> Callable[..., LabelledImages]:
    def open_it(content: Any, *, kind: str = "coco", split: Any = None) -> LabelledImages:
        annotations = write(tmp_path / "instances.json", content)
        split_path = str(write(tmp_path / "split.json", split)) if split is not None else None
        return open_dataset(f"{kind}:{annotations}:{tmp_path}/images", split=split_path)

    return open_it


# COCO


def test_coco_2017(open_coco, tmp_path) -> None:
    images = open_coco(coco_content(COCO))
    assert images.uris.to_pylist() == [
        f"{tmp_path}/images/{number:012d}.jpg" for number in (7, 139, 285, 632)
    ]
    assert images.images_uri == f"{tmp_path}/images"
    assert images.name == "coco instances"
    # Base ones first, in the file's order; COCO-OVD leaves the wine glass out. A crowd is there, too.
    assert images.categories == ("person", "bicycle", "car", "airplane", "bus", "cat", "dog")
    assert images.is_novel.tolist() == [False] * 3 + [True] * 4
    assert [images.labels.row(row).tolist() for row in range(4)] == [[], [0, 5, 6], [], [0, 4]]
    assert images.negatives is None
    assert images.not_exhaustive is None
    assert images.describe() == (
        "coco instances: 4 images (2 without a label), 3 base and 4 novel categories (3 without an image)"
    )
    [share] = [share for share in images.shares() if share.name == "person"]
    assert share == ("person", "base", 2, 0.5)
    assert images.relevant().tolist()[0] == [False, True, False, True]
    assert images.relevant().sum() == 5


def test_coco_2014(open_coco) -> None:
    images = open_coco(coco_content({9: ["cat"]}, year=2014))
    assert labels_of(images) == {"COCO_val2014_000000000009.jpg": ["cat"]}


def test_coco_does_not_depend_on_the_order_in_the_file(open_coco) -> None:
    content = coco_content(COCO)
    expected = open_coco(content)
    turned = {key: content[key][::-1] if key == "images" else content[key] for key in reversed(content)}
    images = open_coco(turned)
    assert labels_of(images) == labels_of(expected)
    assert images.categories == expected.categories
    assert labels_of(open_coco("\ufeff\n" + json.dumps(content))) == labels_of(expected)


def test_the_benchmark_of_coco_is_whole() -> None:
    assert (len(coco.BASE), len(coco.NOVEL), len(coco.UNUSED)) == (48, 17, 15)
    assert len({*coco.BASE, *coco.NOVEL, *coco.UNUSED}) == 80


def test_a_split_decides(open_coco) -> None:
    images = open_coco(coco_content(COCO), split={"base": ["wine glass"], "novel": ["person"]})
    assert images.categories == ("wine glass", "person")
    assert images.is_novel.tolist() == [False, True]
    assert list(labels_of(images).values()) == [[], ["person"], ["wine glass"], ["wine glass", "person"]]


def test_many_images_are_streamed_in_chunks(open_coco, monkeypatch) -> None:
    monkeypatch.setattr("for_ray.datasets.streams.CHUNK_BYTES", 1000)
    monkeypatch.setattr("for_ray.datasets.streams.ROWS_A_CHUNK", 16)
    names = ["person", "bicycle", "car", "airplane", "bus", "cat", "dog"]
    labels = {3 * number + 1: names[: number % 8] for number in range(300)}
    images = open_coco(coco_content(labels))
    assert list(labels_of(images).values()) == [labels[key] for key in sorted(labels)]


WRONG_COCO: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda content: content["annotations"], "holds a list, expected an object"),
    (lambda _: "", "not whole JSON"),
    (lambda content: json.dumps(content)[:-200], "not whole JSON"),
    (lambda _: "not json at all", "something that starts with 'n', expected an object"),
    (lambda content: {**content, "images": []}, "has no images"),
    (lambda content: {key: content[key] for key in ("images", "categories")}, "has no annotations"),
    (lambda content: {**content, "categories": {"1": "person"}}, "has no categories"),
    (
        lambda content: {**content, "images": content["images"] + content["images"][:1]},
        "image records of id 139",
    ),
    (lambda content: {**content, "images": [{"id": 1}]}, "needs a text as 'file_name', got {'id': 1}"),
    (lambda content: {**content, "images": [{"file_name": "a"}]}, "needs a whole number as 'id'"),
    (lambda content: {**content, "images": ["a.jpg"]}, "needs a whole number as 'id', got a.jpg"),
    (
        lambda content: {**content, "images": content["images"][1:]},
        "4 entries are of a missing image .id 139",
    ),
    (
        lambda content: {**content, "categories": content["categories"][1:]},
        "2 entries are of a missing category .id 1",
    ),
    (
        lambda content: {**content, "categories": [*content["categories"], {"id": 99, "name": " cat"}]},
        "several categories of one name: 'cat'",
    ),
    (
        lambda content: {**content, "categories": [*content["categories"], {"id": 1, "name": "x"}]},
        "several category records of id 1",
    ),
    (
        lambda content: {**content, "images": [{**each, "file_name": "a.jpg"} for each in content["images"]]},
        "several images of one file: a.jpg",
    ),
    (
        lambda content: {**content, "images": [{**each, "file_name": "../a"} for each in content["images"]]},
        "names the image ../a, which is not below",
    ),
    (
        lambda content: {**content, "images": [{**each, "file_name": "/a"} for each in content["images"]]},
        "names the image /a, which is not below",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_COCO)
def test_what_is_no_coco(open_coco, spoil, message) -> None:
    with pytest.raises(DataError, match=message) as raised:
        open_coco(spoil(coco_content(COCO)), split={"base": ["car"], "novel": ["cat"]})
    assert "instances.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_categories_that_are_not_coco_s_need_a_split(open_coco) -> None:
    content = coco_content({1: ["unicorn", "cat"]}, categories={"unicorn": 1, "cat": 2})
    with pytest.raises(ConfigError, match=r"categories that COCO has not \('unicorn'\).*--split FILE"):
        open_coco(content)
    images = open_coco(content, split={"base": ["unicorn"], "novel": []})
    assert (images.categories, images.is_novel.tolist()) == (("unicorn",), [False])


# Splits

WRONG_SPLITS: list[tuple[Any, str]] = [
    ({"base": ["person", "unicorn"], "novel": ["cat"]}, "names 'unicorn', which .*instances.json has not"),
    ({"base": ["person", "cat"], "novel": ["cat"]}, "has 'cat' as base and as novel"),
    ({"base": ["person", "person"], "novel": []}, "names 'person' more than once"),
    ({"base": [], "novel": []}, "names no category"),
    ({"base": ["person"]}, "must be"),
    ({"base": ["person"], "novel": [], "unused": []}, "must be"),
    ({"base": ["person"], "novel": [3]}, r"lists of names, got '\[3\]'"),
    ({"base": "person", "novel": []}, "lists of names"),
    (["person"], "must be"),
    ("{", "is not JSON"),
]


@pytest.mark.parametrize(("split", "message"), WRONG_SPLITS)
def test_what_is_no_split(open_coco, split, message) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        open_coco(coco_content(COCO), split=split)
    assert "split" in str(raised.value)


def test_a_split_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"split cannot be read: .*none\.json is not there"):
        open_dataset(f"picturebook:{tmp_path}", split=str(tmp_path / "none.json"))


# LVIS


def test_lvis(open_coco, tmp_path) -> None:
    content = lvis_content(
        LVIS,
        negatives={9: ["alarm_clock", "triangle"], 25: ["aerosol_can"]},
        not_exhaustive={4: ["trash_can"]},
        train=[4],
    )
    images = open_coco(content, kind="lvis")
    assert images.uris.to_pylist() == [
        f"{tmp_path}/images/train2017/000000000004.jpg",
        f"{tmp_path}/images/val2017/000000000009.jpg",
        f"{tmp_path}/images/val2017/000000000025.jpg",
    ]
    assert images.categories == ("aerosol can", "alarm clock", "trash can", "applesauce", "triangle")
    assert images.is_novel.tolist() == [False, False, False, True, True]
    assert list(labels_of(images).values()) == [["alarm clock"], ["trash can", "applesauce"], []]
    assert images.negatives is not None
    assert [images.negatives.row(row).tolist() for row in range(3)] == [[], [1, 4], [0]]
    assert images.not_exhaustive is not None
    assert [images.not_exhaustive.row(row).tolist() for row in range(3)] == [[2], [], []]


@pytest.mark.parametrize("name", ["trash_can", "trash can"])
def test_a_split_of_lvis_may_say_either_name(open_coco, name) -> None:
    content = lvis_content(LVIS, negatives={25: ["trash_can", "triangle"]})
    images = open_coco(content, kind="lvis", split={"base": ["applesauce"], "novel": [name]})
    assert images.categories == ("applesauce", "trash can")
    assert list(labels_of(images).values()) == [[], ["applesauce", "trash can"], []]
    assert images.negatives is not None
    assert [images.negatives.row(row).tolist() for row in range(3)] == [[], [], [1]]


WRONG_LVIS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda _: coco_content(COCO), "'neg_category_ids', got None; is it COCO's"),
    (
        lambda content: {**content, "categories": [{"id": 1, "name": "a", "frequency": "x"}]},
        "'frequency' of r, c or f",
    ),
    (
        lambda content: {
            **content,
            "images": [{**each, "neg_category_ids": [77]} for each in content["images"]],
        },
        r"3 entries are of a missing category \(id 77\)",
    ),
    (
        lambda content: {
            **content,
            "categories": [*content["categories"], {"id": 99, "name": "trash can", "frequency": "r"}],
        },
        "several categories of one name: 'trash can'",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_LVIS)
def test_what_is_no_lvis(open_coco, spoil, message) -> None:
    with pytest.raises(DataError, match=message):
        open_coco(spoil(lvis_content(LVIS)), kind="lvis")


# nuImages

FRAMES = {
    "one": ["vehicle.bus.bendy", "vehicle.bus.rigid", "human.pedestrian.child", "animal"],
    "two": ["vehicle.emergency.police", "vehicle.ego", "flat.driveable_surface"],
    "three": [],
    "four": ["human.pedestrian.personal_mobility", "movable_object.trafficcone"],
}


def test_nuimages(tmp_path) -> None:
    write_tables(tmp_path / "v1.0-val", nuimages_tables(FRAMES))
    images = open_dataset(f"nuimages:{tmp_path}:v1.0-val")
    order = sorted(FRAMES, key=token)
    assert images.uris.to_pylist() == [f"{tmp_path}/samples/CAM_FRONT/n013-{frame}.jpg" for frame in order]
    assert images.images_uri == f"{tmp_path}/samples"
    assert images.name == "nuimages v1.0-val"
    assert images.categories == (*nuimages.BASE, *nuimages.NOVEL)
    assert images.is_novel.tolist() == [False] * 10 + [True] * 8
    expected = {
        "one": ["bus", "pedestrian", "animal"],
        "two": ["emergency vehicle"],
        "three": [],
        "four": ["traffic cone", "personal mobility"],
    }
    assert list(labels_of(images).values()) == [expected[frame] for frame in order]
    assert {share.name: share.share for share in images.shares()}["bus"] == 0.25


def test_every_object_category_of_nuimages_has_a_group() -> None:
    grouped = [name for names in (*nuimages.BASE.values(), *nuimages.NOVEL.values()) for name in names]
    surfaces = {"flat.driveable_surface", "vehicle.ego"}
    assert sorted(grouped) == sorted(set(NUIMAGES_CATEGORIES) - surfaces)


def test_a_split_of_nuimages(tmp_path) -> None:
    write_tables(tmp_path / "v", nuimages_tables(FRAMES))
    split = write(tmp_path / "split.json", {"base": ["traffic_cone"], "novel": ["bus"]})
    images = open_dataset(f"nuimages:{tmp_path}:v", split=str(split))
    assert images.categories == ("traffic cone", "bus")
    assert images.image_counts().tolist() == [1, 1]


WRONG_NUIMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda tables: tables.pop("sample"), "sample.json is not there"),
    (lambda tables: tables["object_ann"].clear(), "object_ann.json has no rows"),
    (lambda tables: tables["sample"].append({"key_camera_token": "x"}), r"key frames of 1 samples .*\(x\)"),
    (lambda tables: tables["sample_data"].append(tables["sample_data"][1]), "several rows of token"),
    (lambda tables: tables["category"].append(tables["category"][1]), "several rows of token"),
    (
        lambda tables: tables["category"].append({"token": "x", "name": "animal"}),
        "several categories of one name: 'animal'",
    ),
    (
        lambda tables: tables["category"].append({"token": "x", "name": "cat"}),
        "not nuImages': it has no category 'cat'",
    ),
    (
        lambda tables: tables["object_ann"].append(
            {"sample_data_token": "x", "category_token": token("animal")}
        ),
        "names the frame x",
    ),
    (
        lambda tables: tables["object_ann"].append(
            {"sample_data_token": token("one"), "category_token": "y"}
        ),
        "names the category y",
    ),
    (lambda tables: tables["object_ann"].append({"token": "x"}), "needs a text as 'sample_data_token'"),
    (lambda tables: tables.update(sample={"images": []}), "holds an object, expected a list"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_NUIMAGES)
def test_what_is_no_nuimages(tmp_path, spoil, message) -> None:
    tables = nuimages_tables(FRAMES)
    spoil(tables)
    write_tables(tmp_path / "v1.0-mini", tables)
    with pytest.raises(DataError, match=message):
        open_dataset(f"nuimages:{tmp_path}:v1.0-mini")


# The picture book, and specs


def test_picturebook(tmp_path) -> None:
    annotations = write_picturebook(tmp_path / "book", images=12, split="val", processes=1)
    content = json.loads(annotations.read_text())
    names = {each["id"]: each["name"] for each in content["categories"]}
    files = {each["id"]: each["file_name"] for each in content["images"]}
    expected: dict[str, set[str]] = {name: set() for name in files.values()}
    for each in content["annotations"]:
        expected[files[each["image_id"]]].add(names[each["category_id"]])
    images = open_dataset(f"picturebook:{tmp_path}/book/")
    assert {name: set(labels) for name, labels in labels_of(images).items()} == expected
    assert (images.name, images.images_uri) == ("picturebook book", f"{tmp_path}/book/images")
    assert (int(images.is_novel.sum()), len(images.categories)) == (17, 65)
    for uri in images.uris.to_pylist():
        assert Path(uri).is_file()


def test_no_picturebook_there(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no picture book in .*for_ray\.datasets\.picturebook"):
        open_dataset(f"picturebook:{tmp_path}")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("a.json:b", ("a.json", "b")),
        ("s3://b/a.json:s3://c/images", ("s3://b/a.json", "s3://c/images")),
        ("/x/a.json:s3://c/images", ("/x/a.json", "s3://c/images")),
        ("s3://b/a:1.json:/y:z", ("s3://b/a:1.json", "/y:z")),
        ("file:///a:b", ("file:///a", "b")),
    ],
)
def test_both_places_of_a_spec(places: str, expected: tuple[str, str]) -> None:
    assert _two_places("coco", places) == expected


@pytest.mark.parametrize(
    "spec",
    ["", "coco", "coco:", "coco:a.json", "coco:a.json:", "coco::b", "coco:s3://b/a.json", "coco:a:b:c",
     "COCO:a.json:b", "imagenet:x", "nuimages:/data", "nuimages:s3://bucket/data", "picturebook:",
     "lvis:a.json"],
)  # fmt: skip
def test_what_is_no_spec(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        open_dataset(spec)


def test_annotations_that_are_not_there(tmp_path) -> None:
    with pytest.raises(ForRayError, match=r"none\.json is not there"):
        open_dataset(f"coco:{tmp_path}/none.json:{tmp_path}")
    with pytest.raises(DataError, match="is not a file"):
        open_dataset(f"coco:{tmp_path}:{tmp_path}")
