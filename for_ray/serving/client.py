"""A client of the search service, with the verbs of its HTTP API.

client = Client("http://127.0.0.1:8000")
for hit in client.search("a dog AND a frisbee", k=20).hits:
    print(hit.score, hit.uri, hit.box)
more = client.similar(hit.image_id, hit.slot)
Path("boxes.json").write_bytes(client.export("coco", "a dog", k=500))
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import requests

from for_ray.errors import ForRayError
from for_ray.serving.received import (
    Answer,
    Box,
    Found,
    Hit,
    ImageObjects,
    PublishedSnapshot,
    Slot,
    read_answer,
    read_objects,
    read_snapshots,
)

__all__ = [
    "Answer",
    "Box",
    "Client",
    "ExportFormat",
    "Found",
    "Hit",
    "ImageObjects",
    "PublishedSnapshot",
    "ServiceError",
    "Slot",
    "question",
]

TIMEOUT_SECONDS = 60.0

MAX_SHOWN_LETTERS = 300
"""Of an answer that is none of the service's own."""

ExportFormat = Literal["csv", "jsonl", "coco"]
Read = TypeVar("Read")


class ServiceError(ForRayError):
    """The service refused, or cannot be reached.

    Args:
        url: What was asked.
        reason: In one line.
        status: Of HTTP; 0 where there was no answer.
        code: The kind of refusal: `question`, `request`, `token`, `not_found`, `gone`, `snapshot_changed`,
            `too_large`, `rate`, `busy`, `index`, …; `unreachable` where there was no answer.
        position: The letter of a question that does not parse, counted from 0.
        retry_after: Seconds after which it can be tried again, where the service says so.
    """

    def __init__(
        self,
        url: str,
        reason: str,
        status: int = 0,
        code: str = "unreachable",
        position: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(url, reason, status, code, position, retry_after)
        self.url, self.reason, self.status, self.code = url, reason, status, code
        self.position, self.retry_after = position, retry_after

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}"


class Client:
    """The service at a URL. One thread each: connections are kept open. A context manager.

    Args:
        url: As `jobs/serve.py` says it: `http://127.0.0.1:8000`.
        token: The service's, where it has one.
        timeout: Seconds for a connection, and between two bytes of an answer.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout
        self._session = requests.Session()
        self._session.auth = _Bearer(token)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def search(
        self,
        text: str | None = None,
        *,
        image: bytes | Path | None = None,
        region: Box | None = None,
        like: str | None = None,
        **options: Any,
    ) -> Answer:
        """Ask for words, for a picture or a region of it, or for an object of the index.

        Args:
            text: Words, in the grammar of `retrieval.grammar`.
            image: An image file, or its bytes.
            region: With an image, or with `like` an image of the index, a box of it as fractions of width
                and height.
            like: `IMAGE_ID` or `IMAGE_ID:SLOT`.
            **options: `k`, `min_score`, `fold_at`, `unwanted_above`, `page`, as of `retrieval.Question`;
                `snapshot_id`, the snapshot that has to answer; and
                `under`, `glob`, `where`, `image_ids`, as of `retrieval.Filters`.

        Raises:
            ServiceError: It refused, or cannot be reached.
        """
        return _read(self._post("/search", question(text, image, region, like, **options)), read_answer)

    def similar(
        self, image_id: int, slot: int, *, k: int | None = None, min_score: float | None = None
    ) -> Answer:
        """More like an object of the index."""
        given = {"k": k, "min_score": min_score}
        return _read(self._get(f"/similar/{image_id:d}/{slot:d}", given), read_answer)

    def image(self, image_id: int) -> bytes:
        """The image's file."""
        return self._get(f"/images/{image_id:d}").content

    def thumbnail(self, image_id: int, *, side: int | None = None) -> bytes:
        """A JPEG with a longest side of so many pixels."""
        return self._get(f"/thumbnails/{image_id:d}", {"side": side}).content

    def objects(self, image_id: int) -> ImageObjects:
        """What the index holds of an image."""
        return _read(self._get(f"/images/{image_id:d}/objects"), read_objects)

    def export(
        self,
        file_format: ExportFormat,
        text: str | None = None,
        *,
        only: Sequence[int] | None = None,
        **asked: Any,
    ) -> bytes:
        """The hits of a question as a file: CSV, JSON lines, or COCO with the boxes as proposals.

        Args:
            file_format: Of the file.
            text: Words to ask for.
            only: The image ids of the hits to be exported; all hits where None.
            **asked: What else `search` takes.
        """
        chosen = None if only is None else list(only)
        body = {"format": file_format, "question": question(text, **asked), "image_ids": chosen}
        return self._post("/export", body).content

    def snapshots(self) -> tuple[PublishedSnapshot, ...]:
        """Those that are published, the newest first."""
        return _read(self._get("/snapshots"), read_snapshots)

    def about(self) -> dict[str, Any]:
        """What is served: the index's name, encoder, counts and columns, and the service's limits."""
        return _read(self._get("/about"), dict)

    def health(self) -> dict[str, Any]:
        """`status`, `snapshot_id`, its age, and why a newer one could not be opened; needs no token.

        Raises:
            ServiceError: The service is not well (`unwell`), or cannot be reached.
        """
        return _read(self._get("/healthz"), dict)

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> requests.Response:
        return self._send("GET", path, params=query)

    def _post(self, path: str, body: Mapping[str, Any]) -> requests.Response:
        return self._send("POST", path, json=body)

    def _send(self, verb: str, path: str, **what: Any) -> requests.Response:
        url = f"{self._url}{path}"
        try:
            answer = self._session.request(verb, url, timeout=self._timeout, allow_redirects=False, **what)
        except requests.Timeout:
            raise ServiceError(url, f"no answer within {self._timeout:g} s: is it overloaded?") from None
        except requests.ConnectionError:
            reason = "cannot be reached: is the service started, and the address right?"
            raise ServiceError(url, reason) from None
        except (requests.RequestException, ValueError) as error:
            raise ServiceError(url, _line(error)) from None
        if answer.status_code != requests.codes.ok:
            raise _refusal(url, answer)
        return answer


class _Bearer(requests.auth.AuthBase):
    """The token as a header; as `auth`, so that no .netrc of the user's home replaces it."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def question(
    text: str | None = None,
    image: bytes | Path | None = None,
    region: Box | None = None,
    like: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The body of POST /search; what is None is left out."""
    filters = {name: options.pop(name, None) for name in ("under", "glob", "where", "image_ids")}
    content = image.read_bytes() if isinstance(image, Path) else image
    asked = {
        "text": text,
        "image": None if content is None else base64.b64encode(content).decode(),
        "region": region,
        "like": like,
        **options,
        "filters": {name: each for name, each in filters.items() if each is not None} or None,
    }
    return {name: each for name, each in asked.items() if each is not None}


def _read(answer: requests.Response, make: Callable[[Any], Read]) -> Read:
    """What the JSON of an answer says."""
    try:
        return make(answer.json())
    except (ValueError, TypeError, KeyError, AttributeError):
        reason = f"is no search service's answer: {answer.text[:MAX_SHOWN_LETTERS]!r}; is the address right?"
        raise ServiceError(str(answer.url), _line(reason), answer.status_code, "http") from None


def _refusal(url: str, answer: requests.Response) -> ServiceError:
    try:
        said = dict(answer.json())
        reason, code = str(said["error"]), str(said.get("code", "http"))
    except (ValueError, TypeError, KeyError):
        said, code = {}, "http"
        reason = f"{answer.status_code} {answer.reason}: {answer.text[:MAX_SHOWN_LETTERS]}"
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isdigit() else None
    return ServiceError(url, _line(reason), answer.status_code, code, said.get("position"), seconds)


def _line(what: object) -> str:
    return " ".join(str(what).split())
