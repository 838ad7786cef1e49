"""One set of AWS settings serves boto3 (listing), pyarrow (reading) and Lance (the table) alike."""

from __future__ import annotations

from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.storage import (
    arrow_filesystem,
    lance_options,
    list_objects,
    manifest_schema,
    read_bytes,
    write_bytes,
)
from for_ray.storage.patience import LANCE_OPTIONS
from tests.seaweed import S3Server

pytestmark = pytest.mark.s3


def use_environment(server: S3Server, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Everything stands in the variables that the fixture has set."""


def use_profile(server: S3Server, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Keys, endpoint and region stand in the profile's files; the environment names only the profile."""
    for name in server.env():
        if name != "AWS_EC2_METADATA_DISABLED":
            patch.delenv(name)
    keys = f"aws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = x\naws_secret_access_key = x\n[ours]\n{keys}"
    )
    (folder / "config").write_text(f"[profile ours]\nregion = eu-west-3\nendpoint_url = {server.endpoint}\n")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    patch.setenv("AWS_PROFILE", "ours")


def use_credentials_file(server: S3Server, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Keys stand in the credentials file, the endpoint in the environment, the region nowhere."""
    use_profile(server, folder, patch)
    (folder / "config").unlink()
    patch.setenv("AWS_ENDPOINT_URL", server.endpoint)


@pytest.mark.parametrize("use", [use_environment, use_profile, use_credentials_file])
def test_boto3_pyarrow_and_lance_reach_the_same_bucket(s3_server, bucket_uri, tmp_path, monkeypatch, use):
    use(s3_server, tmp_path, monkeypatch)
    rows = pa.table({"uri": ["s3://b/x"], "etag": ["e"]})

    filesystem, path = arrow_filesystem(f"{bucket_uri}/m #1.parquet")
    pq.write_table(rows, path, filesystem=filesystem)
    assert manifest_schema([f"{bucket_uri}/m #1.parquet"]).names == ["uri", "etag", "size_bytes"]

    table_uri = f"{bucket_uri}/index/images.lance"
    lance.write_dataset(rows, table_uri, storage_options=lance_options(table_uri))
    assert lance.dataset(table_uri, storage_options=lance_options(table_uri)).to_table().equals(rows)

    uris = {entry.uri for page in list_objects(bucket_uri) for entry in page}
    assert f"{bucket_uri}/m #1.parquet" in uris
    assert any(uri.startswith(f"{table_uri}/data/") for uri in uris)
    etag = write_bytes(f"{bucket_uri}/x", b"content")
    assert read_bytes(f"{bucket_uri}/x", etag=etag) == b"content"


def test_lance_is_told_what_it_cannot_find_itself(s3_server, monkeypatch):
    assert lance_options("s3://b/x") == LANCE_OPTIONS | {
        "aws_region": "us-east-1",
        "aws_endpoint": s3_server.endpoint,
        "allow_http": "true",
        "aws_access_key_id": s3_server.access_key,
        "aws_secret_access_key": s3_server.secret_key,
    }
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    options = lance_options("s3://b/x") or {}
    assert (options["aws_session_token"], options["aws_region"]) == ("token", "eu-west-3")
    assert lance_options("/x") is None


def test_a_role_renews_its_keys_itself(s3_server, tmp_path, monkeypatch):
    use_profile(s3_server, tmp_path, monkeypatch)
    # What an instance role gives in production: keys that expire, here from a process.
    reply = '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s", "Expiration": "2099-01-01T00:00:00Z"}'
    (tmp_path / "config").write_text(f"[profile ours]\ncredential_process = echo '{reply}'\n")
    (tmp_path / "credentials").write_text("")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert lance_options("s3://b/x") == LANCE_OPTIONS | {
        "aws_region": "us-east-1",
        "aws_endpoint": s3_server.endpoint,
        "allow_http": "true",
    }
