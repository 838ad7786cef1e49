"""The application: the HTTP API and the page, for whichever server runs it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

import for_ray
from for_ray.errors import ForRayError
from for_ray.serving import bounds, guards, messages
from for_ray.serving.current import SnapshotClosedError
from for_ray.serving.metrics import Meters
from for_ray.serving.refusals import Refusal, refusal_of
from for_ray.serving.routes import Routes
from for_ray.serving.service import Service

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


def make_app(service: Service, meters: Meters | None = None) -> FastAPI:
    """The application of a service; its snapshot is refreshed by who runs it (`Current.start`).

    Args:
        service: What is served.
        meters: Are told what is done, besides `/metrics`.
    """
    app = FastAPI(title="for_ray", version=for_ray.__version__, docs_url=None, redoc_url=None)
    routes = Routes(service, meters)
    app.include_router(_router(routes))
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(SnapshotClosedError, _refuse_snapshot)
    app.add_exception_handler(ForRayError, _refuse_question)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(HTTPException, _refuse_route)
    # The one that is added last is the outermost.
    app.add_middleware(bounds.Bodies, max_bytes=service.limits.max_body_bytes)
    app.add_middleware(guards.Tokens, token=service.token)
    app.add_middleware(bounds.Rates, per_second=service.limits.requests_per_second)
    app.add_middleware(guards.Hosts, hosts=service.hosts)
    app.add_middleware(guards.Headers, count=routes.metrics.count_request)
    return app


def _router(routes: Routes) -> APIRouter:
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
    router.add_api_route("/", _page, include_in_schema=False)
    router.add_api_route("/page/{name}", _page_file, include_in_schema=False)
    return router


async def _page() -> Response:
    return await _page_file("index.html")


async def _page_file(name: str) -> Response:
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


def _refuse_snapshot(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, SnapshotClosedError):
        raise error
    if error.is_coming:
        soon = f"{error}: it may be open soon, ask again in a moment"
        return Refusal(503, "busy", soon, retry_after=2).response()
    return Refusal(409, "snapshot_changed", f"{error}: begin with the first page").response()


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
