"""SIGTERM to `jobs/index.py` in a process of its own, while it lists the images: no Ray is there yet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from for_ray.config import IndexSettings
from for_ray.pipeline import index
from for_ray.stages.progress import Progress
from tests.planted import Planted, PlantedIndex

JOB = Path(__file__).parents[2] / "jobs" / "index.py"


class Asked(ThreadingHTTPServer):
    """A store that takes a request and never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        self.is_asked, self.is_over = threading.Event(), threading.Event()
        asked = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.is_asked.set()
                asked.is_over.wait()

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def store() -> Iterator[Asked]:
    with Asked() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.is_over.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("told", "code", "how"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_while_it_lists(
    store: Asked, planted_index: PlantedIndex, tmp_path: Path, told: signal.Signals, code: int, how: str
) -> None:
    planted_index.add([Planted("s3://bucket/0.jpg", np.eye(planted_index.bundle.dim)[:1])])
    planted_index.publish()
    (tmp_path / "scratch").mkdir()
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TMPDIR": str(tmp_path / "scratch"),
    }
    with subprocess.Popen(
        [sys.executable, str(JOB), "--images", "s3://bucket/images", "--index", planted_index.uri],
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert store.is_asked.wait(60)
            assert list((tmp_path / "scratch").iterdir()) != []
            process.send_signal(told)
            assert process.wait(30) == code
        finally:
            process.kill()
        report, line = process.stderr.read().splitlines()
    assert line == f"error: {how}; run again to go on: what was committed stays"
    (path,) = Path(planted_index.layout.report_uri("")).glob("*.json")
    assert report == f"report: {path.with_suffix('.html')}"
    told_of = json.loads(path.read_text())
    assert (told_of["outcome"], told_of["message"]) == ("failed", how)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_run_that_ends_where_no_index_is_yet_makes_none(
    planted_index: PlantedIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "write_listing", be_stopped)
    encoder = planted_index.layout.bundle_uri(planted_index.bundle.fingerprint)
    settings = IndexSettings(images=str(tmp_path), index=str(tmp_path / "mistyped"), encoder=encoder)
    with pytest.raises(KeyboardInterrupt):
        index.run_index(settings, progress=Progress(is_quiet=True))
    assert not (tmp_path / "mistyped").exists()
