"""The store's and the disk's refusals, told in one line: what was tried, on what, why, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from for_ray.errors import DataError, StorageError
from for_ray.storage.uris import shown


class ObjectGone(DataError):  # noqa: N818
    """The object that a listing named is not there any more."""


class ObjectChanged(DataError):  # noqa: N818
    """The object is not the one that was listed: its etag is another."""


class ObjectDenied(StorageError):  # noqa: N818
    """This object may not be read, or the disk fails to; others may well be."""


class NotAnObject(StorageError):  # noqa: N818
    """No object can be at this uri, whoever asks: too long a name, a folder, a bucket that does not exist."""


class NoBucket(NotAnObject):
    """The bucket does not exist: the uri is wrong, or the store is another one than it means."""


class ConditionFailed(StorageError):  # noqa: N818
    """A conditional write lost: the object exists already, or has another etag than the caller knew."""


_RIGHTS = "check which credentials are used (AWS_PROFILE, AWS_ACCESS_KEY_ID) and what they may do there"
_RENEW = "log in again or renew AWS_SESSION_TOKEN"
_SLOW = "run again later, or with fewer readers"
_REGION = "set AWS_REGION to the bucket's region"

_S3_REASONS = {
    "NoSuchBucket": (
        "the bucket does not exist",
        "check its name, and AWS_ENDPOINT_URL for a store that is not AWS",
    ),
    "InvalidBucketName": ("this is no valid bucket name", "check its name: 3 to 63 of a-z, 0-9, - and ."),
    "AccessDenied": ("access is denied", _RIGHTS),
    "AccountProblem": ("the account is locked", _RIGHTS),
    "AllAccessDisabled": ("access is denied", _RIGHTS),
    "403": ("access is denied", _RIGHTS),
    "401": ("access is denied", _RIGHTS),
    "InvalidAccessKeyId": (
        "the store does not know the access key",
        "check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    ),
    "SignatureDoesNotMatch": (
        "the secret key does not belong to the access key",
        "check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    ),
    "ExpiredToken": ("the credentials have expired", _RENEW),
    "InvalidToken": ("the session token is not valid", _RENEW),
    "TokenRefreshRequired": ("the credentials have expired", _RENEW),
    "RequestTimeTooSkewed": (
        "this machine's clock and the store's differ by too much",
        "set the clock (NTP)",
    ),
    "PermanentRedirect": ("the bucket lies in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket lies in another region", _REGION),
    "IllegalLocationConstraintException": ("the bucket lies in another region", _REGION),
    "KeyTooLongError": ("the key is longer than the store allows", "choose a shorter one"),
    "InvalidURI": ("the store cannot make out the key", "check the uri"),
    "SlowDown": ("the store still asks to slow down after several tries", _SLOW),
    "Throttling": ("the store still asks to slow down after several tries", _SLOW),
    "RequestTimeout": ("the store still times out after several tries", _SLOW),
    "503": ("the store is still not available after several tries", _SLOW),
    "ServiceUnavailable": ("the store is still not available after several tries", _SLOW),
    "InternalError": ("the store still fails inside after several tries", _SLOW),
    "500": ("the store still fails inside after several tries", _SLOW),
    "QuotaExceeded": ("the store's quota is used up", "free space or raise the quota"),
    "InsufficientStorage": ("the store is full", "free space there"),
    "NoSuchKey": ("there is no such object", "check the uri"),
    "404": ("there is no such object or bucket", "check the uri"),
}


def s3_refusal(error: BaseException, action: str, uri: str, endpoint: str) -> StorageError:
    """What botocore raised, as a `StorageError` of one line.

    Args:
        error: A `ClientError` (the store answered) or another `BotoCoreError` (it did not, or was not asked).
        action: A verb: list, read, write.
        uri: What it was tried on.
        endpoint: Where the store answers; named when it does not.
    """
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        answer = error.response.get("Error", {})
        code, text = answer.get("Code", "?"), " ".join(str(answer.get("Message", "")).split())
        reason, remedy = _S3_REASONS.get(
            code, (f"the store at {endpoint} answered {code}: {text}", "see its documentation")
        )
    else:
        reason, remedy = _unanswered(error, endpoint)
    return StorageError(f"cannot {action} {shown(uri)}: {reason}; {remedy}")


def _unanswered(error: BaseException, endpoint: str) -> tuple[str, str]:
    from botocore import exceptions as boto

    text = " ".join(str(error).split())
    where = f"{endpoint} (AWS_ENDPOINT_URL, or the profile's endpoint_url)"
    if isinstance(error, boto.NoCredentialsError):
        return (
            "there are no AWS credentials",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if isinstance(error, boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"the AWS credentials are incomplete ({text})", "set them in full, or AWS_PROFILE"
    if isinstance(error, boto.ProfileNotFound):
        return text, "check AWS_PROFILE, AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE"
    if isinstance(error, boto.ConfigParseError):
        return f"the AWS configuration cannot be read ({text})", "mend the file"
    if isinstance(error, boto.SSLError):
        return (
            f"no secure connection to {endpoint} ({text})",
            "check AWS_ENDPOINT_URL (http or https?) and AWS_CA_BUNDLE",
        )
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError):
        return (
            f"the store cannot be reached at {where}, after several tries",
            "check the address and the network",
        )
    if isinstance(error, boto.ParamValidationError):
        return f"the name is not valid ({text})", "check the uri"
    if isinstance(error, ValueError):
        return (
            f"the endpoint is not valid ({text})",
            "check AWS_ENDPOINT_URL: it starts with http:// or https://",
        )
    return text, "check the AWS settings"


_OS_REASONS = {
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.ENOTDIR: ("a file stands where a folder is expected", "check the path"),
    errno.EISDIR: ("it is a folder, expected a file", "check the path"),
    errno.EACCES: ("permission is denied", "change the permissions or the user"),
    errno.EPERM: ("permission is denied", "change the permissions or the user"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOSPC: ("no space is left on the disk", "free space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free space or choose another folder"),
    errno.ENAMETOOLONG: ("the name is longer than the file system allows", "choose a shorter one"),
    errno.EMFILE: ("too many files are open", "raise the limit: ulimit -n 65536"),
    errno.ELOOP: ("the links go round in a circle", "remove the link"),
    errno.ENXIO: ("it is a socket or a device, expected a file", "check the path"),
    errno.EEXIST: ("a file stands where a folder is expected", "check the path"),
}


def disk_refusal(error: OSError, action: str, uri: str) -> StorageError:
    """What the operating system raised, as a `StorageError` of one line."""
    number = error.errno or 0
    reason, remedy = _OS_REASONS.get(
        number, (" ".join((error.strerror or str(error)).split()), "check the disk")
    )
    return StorageError(f"cannot {action} {shown(uri)}: {reason}; {remedy}")


@contextmanager
def disk_refusals(action: str, uri: str | os.PathLike[str]) -> Iterator[None]:
    """Turn each `OSError` of the block into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise disk_refusal(error, action, os.fspath(uri)) from error


def full_disk(write: Callable[[], object], place: str) -> str | None:
    """Write; where a disk is full, which it still is when a worker is started again, say so in one line.

    Args:
        write: What is called; what else it raises goes through.
        place: What cannot be written, where the error does not name it.
    """
    try:
        write()
    except Exception as error:
        cause = _full_disk_behind(error)
        if cause is None:
            raise
        return str(error if isinstance(error, StorageError) else disk_refusal(cause, "write", place))
    return None


def _full_disk_behind(error: BaseException | None) -> OSError | None:
    """What the disk said: torch and we chain it, safetensors has it in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if f"(os error {errno.ENOSPC})" in str(error):
            return OSError(errno.ENOSPC, str(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def lance_refusals(
    table_uri: str, *, remedy: str = "check the uri, the credentials and the endpoint"
) -> Iterator[None]:
    """Turn what Lance raises into a `StorageError`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # Lance ends its messages with the place in its own source.
        reason = " ".join(str(error).split(", /")[0].split())
        raise StorageError(
            f"{table_uri} cannot be read or written as a Lance table: {reason}; {remedy}"
        ) from error
