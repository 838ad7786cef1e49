from __future__ import annotations

import hashlib
import os

import pytest

from for_ray.errors import DataError
from for_ray.storage import ObjectGone, cache, local_copy

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_local_file_is_used_where_it_lies(tmp_path):
    (tmp_path / "a.faiss").write_bytes(CONTENT)
    assert local_copy(str(tmp_path / "a.faiss"), sha256=SHA256) == tmp_path / "a.faiss"


def test_a_wrong_checksum_is_refused(tmp_path):
    (tmp_path / "a.faiss").write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"a\.faiss is damaged or was replaced: .* expected {SHA256[:16]}"):
        local_copy(str(tmp_path / "a.faiss"), sha256=SHA256)


def test_a_file_is_checked_once_until_it_changes(tmp_path, monkeypatch):
    num_checks = 0
    digest = hashlib.file_digest

    def counted(file, name):
        nonlocal num_checks
        num_checks += 1
        return digest(file, name)

    monkeypatch.setattr(cache.hashlib, "file_digest", counted)
    path = tmp_path / "a.faiss"
    path.write_bytes(CONTENT)
    for _ in range(3):
        local_copy(str(path), sha256=SHA256)
    assert num_checks == 1
    path.write_bytes(b"Weights")
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError):
        local_copy(str(path), sha256=SHA256)
    assert num_checks == 2


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ObjectGone, match="nowhere is not there"):
        local_copy(str(tmp_path / "nowhere"), sha256=SHA256)
