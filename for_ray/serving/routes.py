"""What the routes of the HTTP API do.

Questions and pictures are worked on in threads, so many of each at once: a slow store holds up no questions.
What waits beyond a bound is refused as busy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from anyio import CapacityLimiter
from fastapi import Query, Request
from pydantic import BeforeValidator
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response

from for_ray.errors import ConfigError
from for_ray.retrieval import Answer, OpenIndex, Question, check_question, snapshot_of_page
from for_ray.retrieval.queries import parsed_like
from for_ray.serving import exports, guards, messages, pictures
from for_ray.serving.health import Health
from for_ray.serving.metrics import CONTENT_TYPE, Meters, Metrics
from for_ray.serving.refusals import Refusal
from for_ray.serving.rooms import Room
from for_ray.serving.service import Service
from for_ray.serving.streams import image_response, is_known

MAX_SNAPSHOTS = 100
"""That are listed."""

THUMBNAIL_SECONDS = 86_400
"""For which a browser shows a thumbnail without asking."""

SNAPSHOT_HEADER = "For-Ray-Snapshot"
"""Of an exported file: which snapshot it comes from."""

_DIGITS = re.compile(r"[0-9]{1,17}")


def _digits(text: object) -> object:
    if not isinstance(text, str) or not _DIGITS.fullmatch(text):
        raise ValueError("expected a number of at most 17 digits")
    return text


Number = Annotated[int, BeforeValidator(_digits)]
"""In a path; Python's own `int` takes digits of all scripts, and fails where there are thousands."""


class Routes:
    """What the routes do; each method answers one.

    Args:
        service: What is served.
        meters: Are told what is done, besides `/metrics`.
    """

    def __init__(self, service: Service, meters: Meters | None = None) -> None:
        limits = service.limits
        self._service = service
        self._current = service.current
        self._questions = Room(limits.questions_at_once, limits.questions_waiting)
        self._uploads = Room(limits.uploads_at_once, limits.uploads_waiting)
        self._pictures = Room(limits.pictures_at_once, limits.pictures_waiting)
        self._sending = CapacityLimiter(limits.pictures_at_once)
        self._thumbnails = pictures.Thumbnails(limits.thumbnail_bytes)
        self._health = Health(service.current)
        self.metrics = Metrics(service.current, self._num_waiting, meters=meters)

    async def search(self, body: messages.QuestionBody) -> Response:
        """Find the images that show what is asked for."""
        return await self._room(body).run(lambda: self._search(body))

    async def similar(
        self,
        image_id: Number,
        slot: Number,
        k: Annotated[int, Query(ge=1, le=messages.MAX_K)] = 60,
        min_score: Annotated[float | None, Query(ge=-1, le=1, allow_inf_nan=False)] = None,
        fold_at: Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)] = None,
        page: Annotated[str | None, Query(max_length=1000)] = None,
    ) -> Response:
        """Find more like an object of the index."""
        like = f"{image_id}:{slot}"
        body = messages.QuestionBody(like=like, k=k, min_score=min_score, fold_at=fold_at, page=page)
        return await self._questions.run(lambda: self._search(body))

    async def image(self, request: Request, image_id: Number, redirect: bool = False) -> Response:
        """The file of an image; with `redirect`, the way to it in the store."""
        asked = request.headers
        return await self._pictures.run(lambda: self._image(image_id, asked, redirect=redirect))

    async def objects(self, image_id: Number) -> Response:
        """What the index holds of an image."""
        return await self._pictures.run(lambda: self._objects(image_id))

    async def thumbnail(
        self, request: Request, image_id: Number, side: Annotated[int, Query(ge=64, le=1024)] = 256
    ) -> Response:
        """A small copy of an image, a JPEG file."""
        asked = request.headers
        return await self._pictures.run(lambda: self._thumbnail(image_id, side, asked))

    async def export(self, body: messages.ExportBody) -> Response:
        """A question's hits as a file."""
        return await self._room(body.question).run(lambda: self._export(body))

    async def snapshots(self) -> Response:
        """The published states of the index."""
        return await self._pictures.run(self._snapshots)

    async def about(self) -> Response:
        """What is served."""
        with self._current.lease() as index:
            return JSONResponse(self._about(index))

    async def healthz(self, request: Request) -> Response:
        """Whether questions are answered; 503 where they are not, or where the index has long been stale."""
        return await self._health.response(is_known=request.scope[guards.KNOWN])

    async def prometheus(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def sign_in(self, request: Request, body: messages.SessionBody) -> Response:
        """Take a cookie for the token."""
        answer = Response(status_code=204)
        token = self._service.token
        if token is None:
            return answer
        if not guards.is_token(body.token, token):
            raise Refusal(401, "token", "the token is wrong")
        answer.set_cookie(
            guards.COOKIE,
            guards.session_of(token),
            max_age=guards.SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=_is_https(request),
        )
        return answer

    async def sign_out(self) -> Response:
        """Give the cookie back."""
        answer = Response(status_code=204)
        answer.delete_cookie(guards.COOKIE, httponly=True, samesite="strict")
        answer.headers["Clear-Site-Data"] = '"cache"'  # thumbnails are kept by browsers
        return answer

    def _room(self, body: messages.QuestionBody) -> Room:
        return self._questions if body.image is None else self._uploads

    def _num_waiting(self) -> int:
        return self._questions.num_waiting + self._uploads.num_waiting

    def _search(self, body: messages.QuestionBody) -> Response:
        answer = self._ask(body.question(), body.snapshot_id)
        hits = [exports.hit_json(hit) for hit in answer.hits]
        return JSONResponse({**answer.to_json(), "hits": hits})

    def _ask(self, question: Question, snapshot_id: int | None) -> Answer:
        check_question(question)
        if question.image is not None:
            pictures.check_upload(question.image)
        wanted = _wanted(question, snapshot_id)
        if wanted is None and question.like is not None:
            leased = self._current.lease_with(parsed_like(question.like)[0])
        else:
            leased = self._current.lease(wanted)
        with leased as index:
            answer = index.ask(question, max_looked_at=self._service.limits.max_looked_at)
        self.metrics.count_seconds(answer.seconds)
        return answer

    def _export(self, body: messages.ExportBody) -> Response:
        answer = self._ask(body.chosen(), body.question.snapshot_id)
        file = exports.export(answer, body.format)
        headers = {
            "Content-Disposition": f'attachment; filename="hits.{file.suffix}"',
            SNAPSHOT_HEADER: str(answer.snapshot_id),
        }
        return Response(file.content, media_type=file.media_type, headers=headers)

    def _image(self, image_id: int, asked: Headers, *, redirect: bool) -> Response:
        with self._current.lease_with(image_id) as index:
            image = pictures.held_image(index, image_id)
        if redirect:
            return RedirectResponse(pictures.presigned_url(image), 307)
        return image_response(image, asked, self._sending)

    def _objects(self, image_id: int) -> Response:
        with self._current.lease_with(image_id) as index:
            held = index.objects(image_id)
            if held is None:
                raise pictures.not_held(index, image_id)
            snapshot_id = index.snapshot.snapshot_id
        return JSONResponse(exports.objects_json(held, snapshot_id))

    def _thumbnail(self, image_id: int, side: int, asked: Headers) -> Response:
        with self._current.lease_with(image_id) as index:
            image = pictures.held_image(index, image_id)
        key = pictures.image_key(image, side)
        headers = {"Cache-Control": f"private, max-age={THUMBNAIL_SECONDS}", "ETag": f'"{key}"'}
        if is_known(headers["ETag"], asked):
            return Response(status_code=304, headers=headers)
        content = self._thumbnails.get(key)
        self.metrics.count_thumbnail(is_kept=content is not None)
        if content is None:
            content = pictures.make_thumbnail(image, side)
            self._thumbnails.put(key, content)
        return Response(content, media_type="image/jpeg", headers=headers)

    def _snapshots(self) -> Response:
        published: list[dict[str, Any]] = []
        for snapshot in self._service.list_snapshots():
            if len(published) == MAX_SNAPSHOTS:
                break
            published.append(
                {
                    "snapshot_id": snapshot.snapshot_id,
                    "created_at": snapshot.created_at.isoformat(),
                    "encoder": snapshot.fingerprint,
                    "indexed": snapshot.indexed,
                    "vectors": snapshot.num_vectors,
                    "recall": snapshot.recall_at_50,
                }
            )
        return JSONResponse({"current": self._current.snapshot_id, "snapshots": published})

    def _about(self, index: OpenIndex) -> dict[str, Any]:
        snapshot = index.snapshot
        return {
            "name": self._service.name,
            "snapshot_id": snapshot.snapshot_id,
            "created_at": snapshot.created_at.isoformat(),
            "num_images": snapshot.indexed,
            "num_vectors": snapshot.num_vectors,
            "encoder": index.bundle.name,
            "head": index.bundle.config.head,
            "columns": index.columns,
            "examples": list(self._service.examples),
            "limits": self._service.limits.to_json(),
        }


def _is_https(request: Request) -> bool:
    """Whether the client, or the proxy that it came through, says so; a false word only costs its cookie."""
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" in (request.url.scheme, forwarded)


def _wanted(question: Question, snapshot_id: int | None) -> int | None:
    """The snapshot that has to answer; None for the current one."""
    if question.page is None:
        return snapshot_id
    of_page = snapshot_of_page(question.page)
    if snapshot_id not in (None, of_page):
        found = f"the page is of snapshot {of_page}, and snapshot {snapshot_id} is asked for"
        raise ConfigError(f"{found}: leave snapshot_id out, or begin with the first page")
    return of_page
