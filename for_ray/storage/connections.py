"""How pyarrow and Lance reach the same store as boto3: same endpoint, region and credentials."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from for_ray.storage.refusals import s3_refusal
from for_ray.storage.uris import is_s3, local_path, split_s3

_LASTING = ("env", "shared-credentials-file", "config-file", "explicit")
"""boto3's names for credentials that nobody renews: they may be handed over."""

_LANCE_NAMES = {
    "access_key": "aws_access_key_id",
    "secret_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
}


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of a uri, and the path in it.

    pyarrow knows neither the profile's endpoint nor the bucket's region, so it is told both. Keys from the
    environment or a file are handed over; roles are left to its own chain, which renews them.
    """
    from pyarrow import fs

    if not is_s3(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    bucket, key = split_s3(uri)
    settings: dict[str, Any] = {"region": _region(bucket), **_lasting_keys()}
    if endpoint := _own_endpoint():
        settings["scheme"], settings["endpoint_override"] = endpoint.split("://", 1)

    from for_ray.storage.arrow_s3 import PatientS3

    return PatientS3(**settings), f"{bucket}/{key}".rstrip("/")


def lance_options(uri: str) -> dict[str, str] | None:
    """Lance's `storage_options` for a uri; nothing on disk.

    Keys from the environment or a file are handed over; roles are left to Lance's own chain, which renews
    them. Keys are secrets: neither print nor store what this returns.
    """
    if not is_s3(uri):
        return None
    from for_ray.storage.patience import LANCE_OPTIONS

    options = LANCE_OPTIONS | {"aws_region": _region(split_s3(uri)[0])}
    if endpoint := _own_endpoint():
        options["aws_endpoint"] = endpoint
        options["allow_http"] = str(endpoint.startswith("http://")).lower()
    return options | {_LANCE_NAMES[name]: secret for name, secret in _lasting_keys().items()}


def _own_endpoint() -> str | None:
    """The endpoint from AWS_ENDPOINT_URL or the profile; nothing where it is AWS's own."""
    from for_ray.storage import s3

    endpoint = str(s3.connection().client.meta.endpoint_url)
    host = endpoint.split("://", 1)[-1].split("/", 1)[0]
    is_amazon = host.startswith("s3") and host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return None if is_amazon else endpoint


def _lasting_keys() -> dict[str, str]:
    """access_key, secret_key and, if there is one, session_token; empty where a role renews them."""
    from botocore.exceptions import BotoCoreError

    from for_ray.storage import s3

    session, client = s3.connection()
    try:
        found = session.get_credentials()
        if found is None or found.method not in _LASTING:
            return {}
        frozen = found.get_frozen_credentials()
    except BotoCoreError as error:
        raise s3_refusal(error, "reach", "S3", client.meta.endpoint_url) from error
    keys = {"access_key": str(frozen.access_key), "secret_key": str(frozen.secret_key)}
    return keys | ({"session_token": str(frozen.token)} if frozen.token else {})


def _region(bucket: str) -> str:
    """Where the bucket lies: the store's own word on AWS, the settings elsewhere."""
    from for_ray.storage import s3

    region = str(s3.connection().client.meta.region_name or "us-east-1")
    return region if _own_endpoint() else _bucket_region(bucket) or region


@lru_cache(maxsize=64)
def _bucket_region(bucket: str) -> str | None:
    from botocore.exceptions import BotoCoreError, ClientError

    from for_ray.storage import s3

    try:
        found: str | None = s3.connection().client.head_bucket(Bucket=bucket).get("BucketRegion")
    except (ClientError, BotoCoreError):  # no right to ask: the settings must do
        return None
    return found
