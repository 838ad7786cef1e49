"""The application: the HTTP API and the page, for whichever server runs it.

Questions and pictures are worked on in threads, so many of each at once: a slow store holds up no questions.
What waits beyond a bound is refused as busy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

import for_ray
from for_ray.errors import ForRayError
from for_ray.retrieval import Answer, OpenIndex, Question, check_question, snapshot_of_page
from for_ray.serving import exports, guards, messages, pictures
from for_ray.serving.metrics import CONTENT_TYPE, Metrics
from for_ray.serving.refusals import Refusal, refusal_of
from for_ray.serving.service import Service

MAX_SNAPSHOTS = 100
"""That are listed."""

THUMBNAIL_SECONDS = 86_400
"""For which a browser shows a thumbnail without asking."""

_PAGE = Path(__file__).with_name("page")
_PAGE_FILE = re.compile(r"[a-z0-9][a-z0-9_-]*\.(?:html|css|js|svg|png|woff2)")
_PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "woff2": "font/woff2",
}

Done = TypeVar("Done")

_DIGITS = re.compile(r"[0-9]{1,17}")


def _digits(text: object) -> object:
    if not isinstance(text, str) or not _DIGITS.fullmatch(text):
        raise ValueError("expected a number of at most 17 digits")
    return text


Number = Annotated[int, BeforeValidator(_digits)]
"""In a path; Python's own `int` takes digits of all scripts, and fails where there are thousands."""


class _Room:
    """Threads for one kind of work, and a queue before them that has an end."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._limiter = CapacityLimiter(at_once)
        self._waiting = waiting

    @property
    def num_waiting(self) -> int:
        """For a thread."""
        return self._limiter.statistics().tasks_waiting

    async def run(self, work: Callable[[], Done]) -> Done:
        """What the work gives.

        Raises:
            Refusal: Too many wait.
        """
        if self.num_waiting >= self._waiting:
            raise Refusal(503, "busy", "too many requests wait: ask again in a moment", retry_after=1)
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)


class _Routes:
    """What the routes do; each method answers one."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        self._service = service
        self._current = service.current
        self._questions = _Room(limits.questions_at_once, limits.questions_waiting)
        self._uploads = _Room(limits.uploads_at_once, limits.uploads_waiting)
        self._pictures = _Room(limits.pictures_at_once, limits.pictures_waiting)
        self._thumbnails = pictures.Thumbnails(limits.thumbnail_bytes)
        self.metrics = Metrics(service.current, self._num_waiting)

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

    async def image(self, image_id: Number, redirect: bool = False) -> Response:
        """The file of an image; with `redirect`, the way to it in the store."""
        return await self._pictures.run(lambda: self._image(image_id, redirect=redirect))

    async def objects(self, image_id: Number) -> Response:
        """What the index holds of an image."""
        return await self._pictures.run(lambda: self._objects(image_id))

    async def thumbnail(
        self, request: Request, image_id: Number, side: Annotated[int, Query(ge=64, le=1024)] = 256
    ) -> Response:
        """A small copy of an image, a JPEG file."""
        known = request.headers.get("if-none-match", "")
        return await self._pictures.run(lambda: self._thumbnail(image_id, side, known))

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
        """Whether questions are answered."""
        current, stale = self._current, self._current.stale
        if stale is not None and not request.scope[guards.KNOWN]:
            stale = "the last refresh failed: the log says why"  # the reason names places
        return JSONResponse({"status": "ok", "snapshot_id": current.snapshot_id, "stale": stale})

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
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    async def sign_out(self) -> Response:
        """Give the cookie back."""
        answer = Response(status_code=204)
        answer.delete_cookie(guards.COOKIE, httponly=True, samesite="strict")
        return answer

    async def page(self) -> Response:
        """The search page."""
        return _page_file("index.html")

    async def page_file(self, name: str) -> Response:
        """One of the page's files."""
        return _page_file(name)

    def _room(self, body: messages.QuestionBody) -> _Room:
        return self._questions if body.image is None else self._uploads

    def _num_waiting(self) -> int:
        return self._questions.num_waiting + self._uploads.num_waiting

    def _search(self, body: messages.QuestionBody) -> Response:
        answer = self._ask(body.question())
        hits = [exports.hit_json(hit) for hit in answer.hits]
        return JSONResponse({**answer.to_json(), "hits": hits})

    def _ask(self, question: Question) -> Answer:
        check_question(question)
        if question.image is not None:
            pictures.check_upload(question.image)
        with self._current.lease() as index:
            _check_snapshot(question, index)
            answer = index.ask(question)
        self.metrics.count_seconds(answer.seconds)
        return answer

    def _export(self, body: messages.ExportBody) -> Response:
        file = exports.export(self._ask(body.chosen()), body.format)
        named = {"Content-Disposition": f'attachment; filename="hits.{file.suffix}"'}
        return Response(file.content, media_type=file.media_type, headers=named)

    def _image(self, image_id: int, *, redirect: bool) -> Response:
        with self._current.lease() as index:
            image = pictures.held_image(index, image_id)
        if redirect:
            return RedirectResponse(pictures.presigned_url(image), 307)
        content = pictures.read_image(image)
        kind = pictures.content_type(content)
        shown = "attachment" if kind == pictures.OTHER_TYPE else "inline"
        headers = {"Content-Disposition": shown, "Cache-Control": "private, no-cache"}
        return Response(content, media_type=kind, headers=headers)

    def _objects(self, image_id: int) -> Response:
        with self._current.lease() as index:
            held = index.objects(image_id)
            if held is None:
                raise pictures.not_held(index, image_id)
            snapshot_id = index.snapshot.snapshot_id
        return JSONResponse(exports.objects_json(held, snapshot_id))

    def _thumbnail(self, image_id: int, side: int, known: str) -> Response:
        with self._current.lease() as index:
            image = pictures.held_image(index, image_id)
        key = pictures.thumbnail_key(image, side)
        headers = {"Cache-Control": f"private, max-age={THUMBNAIL_SECONDS}", "ETag": f'"{key}"'}
        if key in known:
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


def make_app(service: Service) -> FastAPI:
    """The application of a service; its snapshot is refreshed by who runs it (`Current.start`)."""
    app = FastAPI(title="for_ray", version=for_ray.__version__, docs_url=None, redoc_url=None)
    routes = _Routes(service)
    app.include_router(_router(routes))
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(ForRayError, _refuse_question)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(HTTPException, _refuse_route)
    # The one that is added last is the outermost.
    app.add_middleware(guards.Bodies, max_bytes=service.limits.max_body_bytes)
    app.add_middleware(guards.Tokens, token=service.token)
    app.add_middleware(guards.Rates, per_second=service.limits.requests_per_second)
    app.add_middleware(guards.Hosts, hosts=service.hosts)
    app.add_middleware(guards.Headers, count=routes.metrics.count_request)
    return app


def _router(routes: _Routes) -> APIRouter:
    router = APIRouter(responses={"default": {"model": messages.ErrorBody}})
    route: Callable[..., Any]
    for method, path, route, model in (
        ("POST", "/search", routes.search, messages.AnswerBody),
        ("GET", "/similar/{image_id}/{slot}", routes.similar, messages.AnswerBody),
        ("GET", "/images/{image_id}/objects", routes.objects, messages.ObjectsBody),
        ("GET", "/snapshots", routes.snapshots, messages.SnapshotsBody),
        ("GET", "/about", routes.about, messages.AboutBody),
        ("GET", "/healthz", routes.healthz, messages.HealthBody),
    ):
        router.add_api_route(path, route, methods=[method], responses={200: {"model": model}})
    for method, path, route, kind in (
        ("GET", "/images/{image_id}", routes.image, "image/*"),
        ("GET", "/thumbnails/{image_id}", routes.thumbnail, "image/jpeg"),
        ("POST", "/export", routes.export, "*/*"),
        ("GET", "/metrics", routes.prometheus, "text/plain"),
    ):
        answers: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {}}}}
        router.add_api_route(path, route, methods=[method], responses=answers, response_class=Response)
    router.add_api_route("/session", routes.sign_in, methods=["POST"], status_code=204)
    router.add_api_route("/session", routes.sign_out, methods=["DELETE"], status_code=204)
    router.add_api_route("/", routes.page, include_in_schema=False)
    router.add_api_route("/page/{name}", routes.page_file, include_in_schema=False)
    return router


def _check_snapshot(question: Question, index: OpenIndex) -> None:
    if question.page is None:
        return
    wanted, current = snapshot_of_page(question.page), index.snapshot.snapshot_id
    if wanted != current:
        found = f"the page is of snapshot {wanted}, and snapshot {current} is served now"
        raise Refusal(409, "snapshot_changed", f"{found}: begin with the first page")


def _page_file(name: str) -> Response:
    path = _PAGE / name
    if not _PAGE_FILE.fullmatch(name) or not path.is_file():
        raise HTTPException(404)
    kind = _PAGE_TYPES[name.rsplit(".", 1)[-1]]
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


def _refuse(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, Refusal):
        raise error
    return error.response()


def _refuse_question(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, ForRayError):
        raise error
    return refusal_of(error).response()


def _refuse_request(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        said = f"{first['ctx']['error']}, at letter {first['loc'][-1] + 1}"
        return Refusal(400, "request", f"the body is no JSON: {said}").response()
    where = ".".join(str(part) for part in first["loc"][1:])
    what = first["msg"].removeprefix("Value error, ")
    return Refusal(400, "request", f"{where or 'the body'}: {what}").response()


def _refuse_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        return Refusal(404, "not_found", "there is nothing here: /openapi.json says what there is").response()
    if error.status_code == 405:
        return Refusal(405, "request", f"{request.method} is not what this is for").response()
    return Refusal(error.status_code, "request", str(error.detail)).response()
