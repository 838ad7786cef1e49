from __future__ import annotations

import errno

import pytest
from botocore import exceptions as boto

from for_ray.errors import StorageError
from for_ray.storage import connections, s3
from for_ray.storage.patience import LANCE_OPTIONS
from for_ray.storage.refusals import disk_refusal, s3_refusal

ENDPOINT = "https://s3.eu-west-3.amazonaws.com"


def answer(code: str, message: str = "") -> boto.ClientError:
    return boto.ClientError({"Error": {"Code": code, "Message": message}}, "GetObject")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            answer("PermanentRedirect"),
            "the bucket lies in another region; set AWS_REGION to the bucket's region",
        ),
        (answer("NoSuchBucket"), "the bucket does not exist; check its name"),
        (answer("ExpiredToken"), "the credentials have expired; log in again"),
        (
            answer("Odd", "two\nlines"),
            f"the store at {ENDPOINT} answered Odd: two lines; see its documentation",
        ),
        (boto.NoCredentialsError(), "there are no AWS credentials; set AWS_ACCESS_KEY_ID"),
        (boto.EndpointConnectionError(endpoint_url="x"), f"the store cannot be reached at {ENDPOINT}"),
        (boto.ConnectTimeoutError(endpoint_url="x"), f"the store cannot be reached at {ENDPOINT}"),
        (boto.ReadTimeoutError(endpoint_url="x"), f"the store cannot be reached at {ENDPOINT}"),
        (
            boto.ParamValidationError(report="bad\nname"),
            "the name is not valid (Parameter validation failed: bad name)",
        ),
        (boto.SSLError(endpoint_url="x", error="bad"), f"no secure connection to {ENDPOINT}"),
        (boto.CredentialRetrievalError(provider="p", error_msg="m"), "the AWS credentials are incomplete"),
        (boto.TokenRetrievalError(provider="sso", error_msg="m"), "m; check the AWS settings"),
    ],
)
def test_what_boto3_raises_becomes_one_line(error, reason):
    told = s3_refusal(error, "read", "s3://b/new\nline", ENDPOINT)
    assert type(told) is StorageError
    assert str(told).startswith(r"cannot read s3://b/new\nline: ")
    assert reason in str(told)
    assert str(told).isprintable()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "permission is denied; change the permissions or the user"),
        (errno.EROFS, "the file system is read-only; choose another folder"),
        (errno.EMFILE, "too many files are open; raise the limit"),
        (errno.ENAMETOOLONG, "the name is longer than the file system allows"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
def test_what_the_system_raises_becomes_one_line(number, reason):
    import os

    told = disk_refusal(OSError(number, os.strerror(number)), "write", "/a\nb")
    assert str(told).startswith(rf"cannot write /a\nb: {reason}")
    assert str(told).isprintable()


@pytest.fixture
def on_amazon(monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    connections._bucket_region.cache_clear()
    yield
    connections._bucket_region.cache_clear()


def test_on_amazon_the_bucket_says_where_it_lies(on_amazon, monkeypatch):
    client = s3.connection().client
    assert client.meta.endpoint_url == "https://s3.us-west-2.amazonaws.com"
    asked: list[str] = []

    def head_bucket(*, Bucket: str) -> dict[str, str]:
        asked.append(Bucket)
        return {"BucketRegion": "eu-west-3"}

    monkeypatch.setattr(client, "head_bucket", head_bucket)
    for _ in range(2):
        assert connections.lance_options("s3://bucket/x") == LANCE_OPTIONS | {
            "aws_region": "eu-west-3",
            "aws_access_key_id": "k",
            "aws_secret_access_key": "s",
        }
    filesystem, path = connections.arrow_filesystem("s3://bucket/x/y")
    assert (filesystem.region, path) == ("eu-west-3", "bucket/x/y")
    assert asked == ["bucket"]


def test_without_the_right_to_ask_the_settings_must_do(on_amazon, monkeypatch):
    def head_bucket(*, Bucket: str) -> dict[str, str]:
        raise answer("403")

    monkeypatch.setattr(s3.connection().client, "head_bucket", head_bucket)
    assert (connections.lance_options("s3://bucket/x") or {})["aws_region"] == "us-west-2"


def test_aws_region_comes_before_the_default(on_amazon, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert s3.connection().client.meta.region_name == "ap-south-1"
    assert s3.connection().client is s3.connection().client
