"""The server of this process, on a real socket."""

import threading
from contextlib import closing

import requests
from fastapi import FastAPI, Request

from for_ray.serving import local


def test_nobody_says_that_a_request_is_of_another_address() -> None:
    app = FastAPI()

    @app.get("/")
    def address(request: Request) -> str:
        return f"{request.url.scheme} {request.client.host if request.client else None}"

    is_up = threading.Event()
    server = local._server(app, is_up.set)
    with closing(local.bind("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert is_up.wait(20)
            told = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
            url = local.url_of("127.0.0.1", bound.getsockname()[1])
            assert requests.get(url, headers=told, timeout=20).json() == "http 127.0.0.1"
        finally:
            server.should_exit = True
            thread.join()
