"""Odd names in a bucket, and objects that go or change between the listing and the reading."""

from __future__ import annotations

import pyarrow.compute as pc
import pytest

from for_ray.stages.blocks import CHANGED, GONE, OK
from for_ray.stages.listing import write_listing
from for_ray.stages.reading import read_block
from for_ray.storage import delete, delete_tree, list_objects, write_bytes
from tests.odd_keys import ODD_KEYS, check_round, key_image, make_job, put_keys

pytestmark = pytest.mark.s3

# SeaweedFS makes a slash of a backslash; S3 keeps it, see tests/unit/stages/test_odd_keys.py.
KEYS = tuple(key for key in ODD_KEYS if "\\" not in key)


def test_odd_keys_come_through_all_stages(bucket_uri, tmp_path):
    check_round(f"{bucket_uri}/odd images%20#1", KEYS, f"{bucket_uri}/images.lance", tmp_path)


def test_odd_keys_are_deleted_as_a_tree(bucket_uri):
    put_keys(f"{bucket_uri}/x", KEYS)
    write_bytes(f"{bucket_uri}/x y.jpg", b"")
    delete_tree(f"{bucket_uri}/x")
    assert [entry.uri for page in list_objects(bucket_uri) for entry in page] == [f"{bucket_uri}/x y.jpg"]


def test_objects_that_go_or_change_after_the_listing_are_passed_over(bucket_uri, tmp_path):
    """Reading is bound to the listed etag: a replaced object is not taken for the one that was listed."""
    uris = put_keys(f"{bucket_uri}/x", KEYS[:6])
    listed = write_listing(f"{bucket_uri}/x", tmp_path / "rows").rows.part(0)
    write_bytes(uris[2], key_image(20))
    delete(uris[4])
    block = read_block(listed, job=make_job())
    expected = dict.fromkeys(uris, OK) | {uris[2]: CHANGED, uris[4]: GONE}
    assert dict(zip(block["uri"].to_pylist(), block["status"].to_pylist(), strict=True)) == expected
    passed_over = block.filter(pc.not_equal(block["status"], OK))
    assert passed_over["width"].null_count == passed_over["error"].null_count == 2
