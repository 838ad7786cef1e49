"""Annotations, tables and splits that lie in a bucket."""

from __future__ import annotations

import json

import pytest

from for_ray import storage
from for_ray.datasets.spec import open_dataset
from for_ray.errors import ConfigError, StorageError
from tests.formats import coco_content, nuimages_tables

pytestmark = pytest.mark.s3


def test_coco_with_its_split_in_a_bucket(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("for_ray.datasets.streams.CHUNK_BYTES", 3000)  # several requests, one etag
    labels = {number: ["person", "cat"][: number % 3] for number in range(1, 200)}
    annotations = f"{bucket_uri}/a folder/instances_val2017.json"
    storage.write_bytes(annotations, json.dumps(coco_content(labels)).encode())
    split = f"{bucket_uri}/split.json"
    storage.write_bytes(split, json.dumps({"base": ["cat"], "novel": ["person"]}).encode())
    images = open_dataset(f"coco:{annotations}:{bucket_uri}/val2017/", split=split)
    assert images.images_uri == f"{bucket_uri}/val2017"
    assert images.uris[0].as_py() == f"{bucket_uri}/val2017/000000000001.jpg"
    assert images.categories == ("cat", "person")
    expected = [[], [1], [0, 1]]
    assert [images.labels.row(row).tolist() for row in range(199)] == [
        expected[number % 3] for number in range(1, 200)
    ]


def test_nuimages_in_a_bucket(bucket_uri: str) -> None:
    for name, rows in nuimages_tables({"one": ["vehicle.car"], "two": ["animal"]}).items():
        storage.write_bytes(f"{bucket_uri}/nu/v1.0-mini/{name}.json", json.dumps(rows).encode())
    images = open_dataset(f"nuimages:{bucket_uri}/nu:v1.0-mini")
    assert images.images_uri == f"{bucket_uri}/nu/samples"
    assert sorted(images.uris.to_pylist()) == [
        f"{bucket_uri}/nu/samples/CAM_FRONT/n013-{frame}.jpg" for frame in ("one", "two")
    ]
    assert images.image_counts().sum() == 2


def test_no_such_bucket(bucket_uri: str) -> None:
    with pytest.raises(StorageError, match="bucket does not exist"):
        open_dataset(f"coco:s3://no-such-bucket-here/a.json:{bucket_uri}")
    with pytest.raises(ConfigError, match="the split cannot be read"):
        open_dataset(f"coco:{bucket_uri}/a.json:{bucket_uri}", split=f"{bucket_uri}/none.json")
