"""The settings of the service, and how wrong ones end: one clear line, and exit code 2."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from for_ray.config import ServeSettings, read_settings
from for_ray.errors import ConfigError
from for_ray.serving import local
from for_ray.serving.opening import Served
from tests.planted import Planted, PlantedIndex, at_cosines, make_tiny_bundle

JOB = Path(__file__).resolve().parents[3] / "jobs" / "serve.py"
TOKEN = "a-token-of-some-length"
HERE = ["--index", "x"]


class Finished(NamedTuple):
    code: int
    error: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """Run the job in this process."""
    spec = importlib.util.spec_from_file_location("serve_job", JOB)
    assert spec
    assert spec.loader
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, arguments)])
        return Finished(job.main(), capsys.readouterr().err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PlantedIndex:
    folder = tmp_path_factory.mktemp("serve-settings")
    planted = PlantedIndex.make(folder / "index", make_tiny_bundle(folder))
    vectors = at_cosines(np.eye(16, dtype=np.float32)[0], 0.9, 0.1)
    planted.add([Planted("/a.jpg", vectors), Planted("/b.jpg", vectors)])
    planted.publish()
    return planted


def test_the_defaults_are_of_a_laptop_that_nobody_else_reaches() -> None:
    settings = read_settings(ServeSettings, HERE)
    assert (settings.host, settings.port, settings.is_loopback) == ("127.0.0.1", 8000, True)
    assert (settings.token, settings.local, settings.shards) == (None, False, None)
    assert (settings.replicas, settings.most_replicas) == (1, 1)
    assert settings.proposed == settings.other_hosts == ()


def test_bounds_reach_the_service(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Served] = []
    monkeypatch.setattr(local, "run", lambda asked, **_: served.append(asked))
    given = ["--max-body-mb", "0.5", "--requests-per-second", "7", "--max-looked-at", "2500"]
    assert run(*HERE, "--local", *given) == (0, "")
    assert run(*HERE, "--local") == (0, "")
    limits = [each.limits for each in served]
    assert [(each.max_body_bytes, each.requests_per_second, each.max_looked_at) for each in limits] == [
        (500_000, 7, 2500),
        (16_000_000, 50, 100_000),
    ]


def test_lists_are_taken_apart() -> None:
    given = ["--examples", "a dog; a cat AND a ball ;", "--allow-host", "search.example, gpu-1"]
    settings = read_settings(ServeSettings, [*HERE, *given, "--replicas", "2", "--max-replicas", "5"])
    assert settings.proposed == ("a dog", "a cat AND a ball")
    assert settings.other_hosts == ("search.example", "gpu-1")
    assert settings.most_replicas == 5


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("localhost.example", False),
    ],
)
def test_a_host_that_others_reach_needs_a_token(host: str, is_loopback: bool) -> None:
    arguments = [*HERE, "--host", host]
    for guarded in (["--token", TOKEN], ["--no-token"]):
        assert read_settings(ServeSettings, [*arguments, *guarded]).is_loopback == is_loopback
    if not is_loopback:
        with pytest.raises(ConfigError, match="open to other machines: set FOR_RAY_TOKEN"):
            read_settings(ServeSettings, arguments)


def test_the_token_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOR_RAY_TOKEN", TOKEN)
    settings = read_settings(ServeSettings, [*HERE, "--host", "0.0.0.0"])
    assert settings.token is not None
    assert settings.token.get_secret_value() == TOKEN
    assert TOKEN not in repr(settings)
    for wrong in ("short-token", "with a space in it, which no header takes", "größer-als-ascii-erlaubt"):
        monkeypatch.setenv("FOR_RAY_TOKEN", wrong)
        with pytest.raises(ConfigError, match="--token") as caught:
            read_settings(ServeSettings, HERE)
        assert wrong not in str(caught.value)


WRONG = {
    "no index": ([], "--index is missing"),
    "no port": (["--port", "0"], r"--port .*greater than or equal to 1, got '0'"),
    "no such port": (["--port", "70000"], r"--port .*less than or equal to 65535, got '70000'"),
    "open to all": (["--host", "0.0.0.0"], "--no-token to let everybody ask"),
    "both": (["--token", TOKEN, "--no-token"], "either --token or --no-token"),
    "fewer at most": (["--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 is below --replicas 3"),
    "local replicas": (["--local", "--replicas", "2"], "--local is one process"),
    "local shards": (["--local", "--shards", "2"], "--local is one process"),
    "no time": (["--refresh-seconds", "0"], "--refresh-seconds .*greater than or equal to 0.1"),
    "nothing looked at": (["--max-looked-at", "0"], "--max-looked-at .*greater than or equal to 2000"),
    "no body": (["--max-body-mb", "0"], "--max-body-mb .*greater than 0"),
    "a rate below none": (["--requests-per-second", "-1"], "--requests-per-second"),
    "no such flag": (["--tokn", "x"], "no such flag: --tokn; did you mean --token"),
}


@pytest.mark.parametrize(("arguments", "complaint"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_one_line(arguments: list[str], complaint: str, run: Callable) -> None:
    code, error = run(*(HERE if arguments else []), *arguments)
    assert code == 2
    _assert_line(error, complaint)


@pytest.mark.parametrize("where", [["--local"], []], ids=["local", "ray"])
def test_what_is_wrong_is_said_before_anything_starts(
    where: list[str], run: Callable, index: PlantedIndex, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = run("--index", index.uri, "--port", port, *where)
    assert code == 2
    _assert_line(error, f"--port {port}: is in use on 127.0.0.1")
    unpublished = PlantedIndex.make(tmp_path / "unpublished", index.bundle)
    other = tmp_path / "other"
    other.mkdir()
    for arguments, complaint in (
        (["--index", tmp_path / "nothing"], "has no published snapshot; check the uri"),
        (["--index", unpublished.uri], "has no published snapshot; check the uri"),
        (["--index", index.uri, "--encoder", other], str(other)),
        (["--index", index.uri, "--encoder", "picturebook"], "was made with the encoder"),
        (["--index", index.uri, "--host", "203.0.113.7", "--no-token"], "is no address of this machine"),
        (["--index", index.uri, "--host", "no-such-host.invalid", "--no-token"], "is no address of this"),
    ):
        code, error = run(*arguments, "--port", port, *where)
        assert code == 2, error
        _assert_line(error, complaint)


def _assert_line(error: str, complaint: str) -> None:
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert re.search(complaint, error), error
