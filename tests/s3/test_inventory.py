"""An S3 Inventory becomes a manifest whose rows are those of a listing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.stages.listing import IMAGE_SUFFIXES, write_listing
from for_ray.storage import list_objects, split_s3, write_bytes

SCRIPT = Path(__file__).parents[2] / "deploy" / "inventory_to_manifest.py"
NAMES = [
    *(f"x{suffix}" for suffix in sorted(IMAGE_SUFFIXES)),
    *("a.JPG", "b b#1.PNG", "ü/c?.jpeg", "d%2F.webp", "k.jpg/b.jpg", "e..jpg"),
    *(
        "notes.txt",
        "jpg",
        "a.jpg.bak",
        "a.jpgx",
        ".hidden.jpg",
        ".trash/f.jpg",
        "g/._h.jpg",
        "i/.trash/j/k.jpg",
    ),
]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inventory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_inventory_becomes_a_manifest(bucket_uri: str, tmp_path: Path, script: ModuleType) -> None:
    for name in NAMES:
        write_bytes(f"{bucket_uri}/frames/{name}", name.encode())
    bucket, _ = split_s3(bucket_uri)
    entries = [entry for page in list_objects(f"{bucket_uri}/frames") for entry in page]
    rows = {
        "bucket": [bucket] * len(entries),
        "key": [split_s3(entry.uri)[1] for entry in entries],
        "size": [entry.size_bytes for entry in entries],
        "e_tag": [entry.etag for entry in entries],
    }
    inventory = {"destinationBucket": f"arn:aws:s3:::{bucket}", "files": [{"key": "inventory/1.parquet"}]}
    pq.write_table(pa.table(rows), tmp_path / "1.parquet")
    write_bytes(f"{bucket_uri}/inventory/1.parquet", (tmp_path / "1.parquet").read_bytes())
    write_bytes(f"{bucket_uri}/inventory/manifest.json", json.dumps(inventory).encode())
    target = tmp_path / "frames.parquet"
    script.main(f"{bucket_uri}/inventory/manifest.json", str(target))

    listed = write_listing(f"{bucket_uri}/frames", tmp_path / "listed").rows.part(0)
    found = write_listing(str(target), tmp_path / "found").rows.part(0)
    assert found.num_rows == len(IMAGE_SUFFIXES) + 6
    assert found.sort_by("uri").to_pylist() == listed.sort_by("uri").to_pylist()


def test_what_is_hidden_is_what_the_listing_hides(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "is_hidden", lambda name: name == "a/b.jpg")
    rows = {"bucket": ["x", "x"], "key": ["a/b.jpg", "a/.c.jpg"], "size": [1, 2], "e_tag": ["1", "2"]}
    pq.write_table(pa.table(rows), tmp_path / "1.parquet")
    inventory = {"destinationBucket": f"arn:aws:s3:::{tmp_path}", "files": [{"key": "1.parquet"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(inventory))
    script.main(str(tmp_path / "manifest.json"), str(tmp_path / "frames.parquet"))
    found = pq.read_table(tmp_path / "frames.parquet")
    assert found.to_pylist() == [{"uri": "s3://x/a/.c.jpg", "etag": "2", "size_bytes": 2}]
