"""Times in answers of S3: parsed by something faster than botocore's parser, and the same."""

from __future__ import annotations

import pytest
from botocore.utils import parse_timestamp

from for_ray.storage import s3


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-01T00:00:00.000Z",
        "2026-11-25T13:00:01Z",
        "2026-11-25T13:00:01.1234567Z",
        "2026-11-25T13:00:01+02:00",
        "Wed, 25 Nov 2026 10:00:00 GMT",
        "1700000000",
        1700000000,
    ],
)
def test_a_time_is_what_botocore_makes_of_it(text):
    found = s3._timestamp(text)
    assert found == parse_timestamp(text)
    assert found.utcoffset() == parse_timestamp(text).utcoffset()


def test_the_client_uses_it(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    factory = s3.connection().session._session.get_component("response_parser_factory")
    assert factory.create_parser("rest-xml")._timestamp_parser is s3._timestamp
