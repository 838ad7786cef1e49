"""What the service refuses, and how it says so: a status, a word for programs, and one line for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from for_ray.errors import ConfigError, ForRayError
from for_ray.retrieval import PictureError, QuestionError


class Refusal(HTTPException):
    """What is answered instead; of Starlette's kind, so that FastAPI lets it through while it reads a body.

    Args:
        status: Of HTTP.
        code: For programs.
        reason: One line.
        position: The letter of the question that it is about, from 0.
        retry_after: Seconds until it is worth another try.
        headers: Others of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        reason: str,
        position: int | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, reason, headers)
        self.status, self.code, self.reason = status, code, reason
        self.position, self.retry_after = position, retry_after

    def response(self) -> JSONResponse:
        """As it is sent."""
        headers = dict(self.headers or {})
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        body: dict[str, Any] = {"error": one_line(self.reason), "code": self.code, "position": self.position}
        return JSONResponse(body, self.status, headers)


def refusal_of(error: ForRayError) -> Refusal:
    """What is answered where the index refuses a question, or can't answer."""
    if isinstance(error, QuestionError):
        return Refusal(400, "question", error.reason, error.position)
    if isinstance(error, ConfigError | PictureError):
        return Refusal(400, "request", str(error))
    return Refusal(503, "index", str(error), retry_after=10)


def one_line(text: str) -> str:
    """The text without line breaks and other letters that have no shape, and not longer than people read."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "�" for letter in line)
    return line if len(line) <= 1000 else f"{line[:1000]}…"
