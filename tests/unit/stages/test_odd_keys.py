"""Odd names on disk, and on moto within this process those that the S3 server of tests/s3 does not take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from for_ray.storage import list_objects, read_bytes, write_bytes
from tests.odd_keys import LONG_KEY, LONG_NAME, ODD_KEYS, check_round

KEYS = (
    *ODD_KEYS,
    LONG_NAME,
    "no slash/" * 112 + "é" * 4 + ".jpg",  # 1,020 bytes of the 1,024 that a key may have
    "two//slashes.jpg",
    "/begins with one.jpg",
)


@pytest.fixture
def bucket_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no profile, and a client that no other test has made
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="images")
        yield "s3://images"


def test_odd_names_on_disk_come_through_all_stages(tmp_path):
    root = tmp_path / "odd images%20#1"
    check_round(str(root), ODD_KEYS, str(tmp_path / "images.lance"), tmp_path)


def test_keys_of_900_characters_and_with_backslashes_come_through_all_stages(bucket_uri, tmp_path):
    assert len(LONG_KEY) == len(LONG_NAME) == 900
    check_round(f"{bucket_uri}/x", KEYS, str(tmp_path / "images.lance"), tmp_path)


def test_twins_of_unicode_stay_two(bucket_uri):
    """The composed and the decomposed é; a store or a step that normalises would merge them."""
    twins = ["caf\u00e9.jpg", "cafe\u0301.jpg"]
    for content, name in enumerate(twins):
        write_bytes(f"{bucket_uri}/{name}", bytes([content]))
    found = [entry.uri for page in list_objects(bucket_uri) for entry in page]
    assert sorted(found) == sorted(f"{bucket_uri}/{name}" for name in twins)
    assert [read_bytes(f"{bucket_uri}/{name}") for name in twins] == [b"\0", b"\1"]
