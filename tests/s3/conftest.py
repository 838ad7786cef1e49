"""The S3 server of this folder's tests: real, started once, reached through the AWS environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.seaweed import S3Server, environment, seaweed


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with seaweed() as server:
        yield server


@pytest.fixture(autouse=True)
def _s3_environment(s3_server: S3Server) -> Iterator[None]:
    with environment(s3_server):
        yield


@pytest.fixture
def bucket_uri(s3_server: S3Server) -> str:
    """`s3://bucket` of an empty bucket."""
    return f"s3://{s3_server.make_bucket()}"
