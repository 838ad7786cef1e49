"""How long an S3 store may be away: every client tries again for more than a minute, but only what may pass.

A command's first contact is the exception: an address that is wrong shall not take a minute to say so.
Refusals (credentials, rights, a missing bucket, a wrong clock or region) are never asked twice.
"""

from __future__ import annotations

import os
import random
from typing import Any

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NotConnected
from botocore.parsers import ResponseParserError

NUM_ATTEMPTS = 12
"""Tries of one request by boto3, unless AWS_MAX_ATTEMPTS says otherwise: 70 to 90 s of waiting."""

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""For the next bytes of an answer."""
FIRST_SECONDS = 5.0
"""To connect, and to answer, at a command's first contact; it is tried twice."""

_LONGEST_DELAY = 15.0
_PASSING_STATUS = (429, 500, 502, 503, 504)
_PASSING_CODES = (
    "BandwidthLimitExceeded",
    "InternalError",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
)


def delay(attempt: int) -> float:
    """Seconds to wait after try n, from 1: a quarter, doubled each time, at most 15, less at random."""
    longest = min(2.0 ** (attempt - 3), _LONGEST_DELAY)
    return longest * random.uniform(0.75, 1)  # noqa: S311


def num_attempts() -> int:
    """Tries of one request, the first included."""
    return int(os.environ.get("AWS_MAX_ATTEMPTS") or NUM_ATTEMPTS)


def greet(session: Any, client: Any) -> None:
    """See whether anybody answers at a boto3 client's endpoint, whatever the answer; 12 s at most.

    Raises:
        BotoCoreError: Nobody does.
    """
    config = Config(
        signature_version=UNSIGNED,  # an address that may be wrong is shown no key
        retries={"mode": "standard", "total_max_attempts": 2},
        connect_timeout=FIRST_SECONDS,
        read_timeout=FIRST_SECONDS,
    )
    endpoint, region = client.meta.endpoint_url, client.meta.region_name
    stranger = session.client("s3", config=config, endpoint_url=endpoint, region_name=region)
    try:
        stranger.list_buckets()
    except (ClientError, ResponseParserError):
        return


def be_patient(client: Any) -> None:
    """Let a boto3 client, made to try once, try again as long as this module says.

    botocore's own retries end early where many threads share a client: together they may retry 35 times, so
    a store must not be away for seconds.

    Args:
        client: Its `total_max_attempts` is 1.
    """
    most = num_attempts()

    def needs_retry(
        *,
        attempts: int,
        response: tuple[Any, dict[str, Any]] | None,
        caught_exception: BaseException | None,
        **_: object,
    ) -> float | None:
        return delay(attempts) if attempts < most and _may_pass(response, caught_exception) else None

    client.meta.events.register("needs-retry.s3", needs_retry)


def _may_pass(response: tuple[Any, dict[str, Any]] | None, error: BaseException | None) -> bool:
    if response is None:
        return isinstance(error, NotConnected | HTTPClientError)
    http, parsed = response
    return http.status_code in _PASSING_STATUS or parsed.get("Error", {}).get("Code") in _PASSING_CODES


LANCE_OPTIONS = {
    "client_max_retries": "100",  # the time is what counts
    "client_retry_timeout": "70",
    "lance_aimd_max_retries": "0",  # else it tries all of that four times over
}
"""Lance's patience with one request, in seconds; reads and lists are made again after that, up to 6 times."""

ARROW_RETRIES = 12
"""Of the AWS SDK's default strategy, which doubles a wait of 25 ms: 100 s in all."""
