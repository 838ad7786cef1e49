"""pyarrow's S3 file system, patient also where it has been sent to. Imported late, as pyarrow is."""

from __future__ import annotations

from typing import Any

from pyarrow import fs

from for_ray.storage.patience import ARROW_RETRIES, CONNECT_SECONDS, READ_SECONDS


class PatientS3(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """An `S3FileSystem` that tries again for long; pyarrow's own forgets how often when it is pickled.

    Args:
        settings: `S3FileSystem`'s, but for retries and timeouts.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=ARROW_RETRIES),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=READ_SECONDS,
            **settings,
        )
        self._settings = settings

    def __reduce__(self) -> tuple[Any, ...]:
        return _patient_s3, (self._settings,)


def _patient_s3(settings: dict[str, Any]) -> PatientS3:
    return PatientS3(**settings)
