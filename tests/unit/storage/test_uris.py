from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from for_ray.errors import ConfigError
from for_ray.storage import canonical_uri, is_s3, join_uri, local_path, shown, split_s3


def test_s3_uris_are_split_without_unescaping():
    assert split_s3("s3://b/a b/%20#?.jpg") == ("b", "a b/%20#?.jpg")
    assert split_s3("s3://b") == ("b", "")
    assert split_s3("s3://b//x") == ("b", "/x")
    assert is_s3("s3://b")
    assert not is_s3("/s3://b")


def test_local_uris_become_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert local_path("a/../b#%20") == tmp_path / "b#%20"
    assert local_path("file:///a%20b/c%23") == Path("/a b/c#")
    assert local_path("file://localhost/a") == Path("/a")


def test_links_stay_as_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert canonical_uri(str(tmp_path / "link") + "/") == str(tmp_path / "link")


def test_canonical_uris_have_no_slash_at_the_end():
    assert canonical_uri("s3://b/p//") == "s3://b/p"
    assert canonical_uri("s3://b") == canonical_uri("s3://b/") == "s3://b"
    assert canonical_uri("/a//b/") == "/a/b"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3:///key", "names no bucket"),
        ("gs://b/k", "is of a kind that is not known"),
        ("S3://b/k", "is of a kind that is not known"),
        ("https://x/y.jpg", "is of a kind that is not known"),
        ("file://host/x", "names the host host"),
        ("", "is no path"),
        ("a\0b", "is no path"),
    ],
)
def test_other_uris_are_refused(uri, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        canonical_uri(uri)
    assert str(caught.value).isprintable()


def test_parts_are_joined_as_they_are():
    assert join_uri("s3://b", "x", "y #%.jpg") == "s3://b/x/y #%.jpg"
    assert join_uri("s3://b/p/", "/x/") == "s3://b/p/x"
    assert join_uri("file:///a%20b", "c d") == "/a b/c d"
    assert join_uri("/", "x") == "/x"


@given(some.text(min_size=1).filter(lambda text: text.strip("/") == text))
def test_keys_come_back_whatever_they_hold(key):
    assert split_s3(join_uri("s3://bucket/prefix", key)) == ("bucket", f"prefix/{key}")


@given(some.text())
def test_messages_show_a_uri_in_one_line(uri):
    assert "\n" not in shown(uri)
    assert shown(uri).isprintable()


def test_file_names_of_any_bytes_can_be_shown():
    assert shown(os.fsdecode(b"/a\xff.jpg")) == "/a\\udcff.jpg"
