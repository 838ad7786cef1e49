"""A bad network between each of the clients and a real S3 server."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from for_ray.command import run_command
from for_ray.errors import StorageError
from for_ray.index import table
from for_ray.storage import (
    Lease,
    arrow_filesystem,
    download,
    list_objects,
    patience,
    read_bytes,
    s3,
    upload,
    write_bytes,
)
from tests.proxy import KINDS, Proxy, at_random, bad_network
from tests.seaweed import S3Server, environment

pytestmark = pytest.mark.s3

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema([("uri", pa.string())])
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with bad_network(s3_server) as found:
        found.hold_seconds = 0.2
        yield found


def once(kind: str, method: str, part: str) -> Callable[[str, str], str | None]:
    """Break the first request of this method whose target has this part."""
    waiting = [kind]
    return lambda asked, target: waiting.pop() if waiting and asked == method and part in target else None


def rows(uris: list[str]) -> pa.Table:
    return pa.table({"uri": uris}, schema=SCHEMA)


def uris_of(table_uri: str) -> list[str]:
    found: list[str] = table.require_table(table_uri).to_table()["uri"].to_pylist()
    return sorted(found)


def test_every_client_gets_through_a_bad_network(proxy, bucket_uri, tmp_path):
    proxy.plan = at_random(0.2, seed=1)
    names = [f"{bucket_uri}/images/{number}" for number in range(12)]
    etags = {name: write_bytes(name, CONTENT + name.encode()) for name in names}
    (tmp_path / "large").write_bytes(CONTENT * 1000)
    upload(tmp_path / "large", f"{bucket_uri}/large")
    download(f"{bucket_uri}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == CONTENT * 1000
    for name, etag in etags.items():
        assert read_bytes(name, etag=etag) == CONTENT + name.encode()
    listed = [entry.uri for page in list_objects(f"{bucket_uri}/images") for entry in page]
    assert sorted(listed) == sorted(names)
    with Lease.acquire(f"{bucket_uri}/lease.json", "somebody") as held:
        for _ in range(5):
            assert held._renew() or held._renew()
    table_uri = f"{bucket_uri}/t.lance"
    images = table.create_table(table_uri, SCHEMA)
    for name in names:
        images = table.append(images, table.write_fragments(rows([name]), table_uri))
    table.delete_rows(images, f"uri = '{names[0]}'")
    assert uris_of(table_uri) == sorted(names[1:])
    filesystem, path = arrow_filesystem(f"{bucket_uri}/images/7")
    for _ in range(10):
        with filesystem.open_input_file(path) as file:
            assert file.read() == CONTENT + names[7].encode()
    assert set(proxy.injected) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("503 SlowDown", "_versions"),
        ("reset", "_versions"),
        ("lost", "_versions"),
        ("late", "_versions"),
        ("lost", "_transactions"),
    ],
)
def test_a_commit_is_made_once(proxy, bucket_uri, kind, part):
    table_uri = f"{bucket_uri}/t.lance"
    images = table.append(
        table.create_table(table_uri, SCHEMA), table.write_fragments(rows(["a"]), table_uri)
    )
    fragments = table.write_fragments(rows(["b", "c"]), table_uri)
    proxy.plan = once(kind, "PUT", part)
    images = table.append(images, fragments)
    assert proxy.injected == {kind: 1}
    proxy.plan = once(kind, "PUT", part)
    table.delete_rows(images, "uri = 'a'")
    assert proxy.injected == {kind: 2}
    assert uris_of(table_uri) == ["b", "c"]


def test_a_commit_that_lands_between_two_tries_is_found(proxy, bucket_uri, monkeypatch):
    """It is not in yet when the client looks, and is when the client commits again."""
    table_uri = f"{bucket_uri}/t.lance"
    images = table.create_table(table_uri, SCHEMA)
    fragments = table.write_fragments(rows(["a"]), table_uri)
    may_land, lost = threading.Event(), once("late", "PUT", "_versions")
    waits = iter([False])

    def plan(method: str, target: str) -> str | None:
        if method == "PUT" and "_versions" in target and proxy.injected and next(waits, True) is False:
            may_land.set()  # the second try: the first one overtakes it
            while not proxy.num_landed:
                time.sleep(0.01)
        return lost(method, target)

    proxy.plan, proxy.before_landing = plan, may_land.wait
    images = table.append(images, fragments)
    assert proxy.num_landed == 1
    assert uris_of(table_uri) == ["a"]
    assert images.count_rows() == 1


def test_a_commit_that_is_refused_is_not_tried_again(proxy, bucket_uri):
    table_uri = f"{bucket_uri}/t.lance"
    images = table.create_table(table_uri, SCHEMA)
    fragments = table.write_fragments(rows(["a"]), table_uri)
    proxy.plan = lambda method, target: (
        "403 AccessDenied" if (method, "_versions" in target) == ("PUT", True) else None
    )
    with pytest.raises(StorageError, match="403"):
        table.append(images, fragments)
    assert proxy.injected == {"403 AccessDenied": 1}


def act_boto3(uri: str) -> None:
    assert read_bytes(uri) == CONTENT


def act_arrow(uri: str) -> None:
    filesystem, path = pickle.loads(pickle.dumps(arrow_filesystem(uri)))  # as Ray sends it
    with filesystem.open_input_file(path) as file:
        assert file.read() == CONTENT


def act_commit(uri: str) -> None:
    table_uri = f"{uri}.lance"
    table.append(table.require_table(table_uri), table.write_fragments(rows(["a"]), table_uri))
    assert uris_of(table_uri) == ["a"]


@pytest.mark.slow
def test_an_outage_of_twenty_seconds_is_ridden_out(proxy, bucket_uri):
    uri = f"{bucket_uri}/x"
    write_bytes(uri, CONTENT)
    table.create_table(f"{uri}.lance", SCHEMA)
    failures: list[Exception] = []

    def run(act: Callable[[str], None]) -> None:
        try:
            act(uri)
        except Exception as error:  # noqa: BLE001 - told in the thread that waits
            failures.append(error)

    # Many threads share boto3's client, as where images are read.
    acts = [act_boto3] * 32 + [act_arrow, act_commit]
    with proxy.away():
        threads = [threading.Thread(target=run, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        time.sleep(20)
    for thread in threads:
        thread.join()
    assert failures == []


def test_patience_is_longer_than_a_minute(monkeypatch):
    for bound in (0, 1):
        monkeypatch.setattr(patience.random, "uniform", lambda low, high, bound=bound: (low, high)[bound])
        waited = sum(patience.delay(attempt) for attempt in range(1, patience.NUM_ATTEMPTS))
        assert 60 < waited < 100
    assert int(patience.LANCE_OPTIONS["client_retry_timeout"]) >= 60
    assert 60 < 0.025 * (2**patience.ARROW_RETRIES - 1) < 120


def run_job(server: S3Server, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), *words]
    with environment(server):
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


REFUSED = {
    "a wrong secret": ("bucket", {"secret_key": "wrong"}, None, "the secret key does not belong"),
    "an unknown key": ("bucket", {"access_key": "wrong"}, None, "the store does not know the access key"),
    "no such bucket": ("no-such-bucket", {}, None, "the bucket does not exist"),
    "a wrong clock": ("bucket", {}, "403 RequestTimeTooSkewed", "clock and the store's differ by too much"),
    "another region": ("bucket", {}, "400 AuthorizationHeaderMalformed", "the bucket lies in another region"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_pass_ends_at_once_with_one_line(proxy, s3_server, bucket_uri, case):
    bucket, wrong, answer, reason = REFUSED[case]
    proxy.plan = lambda method, target: answer
    images = f"{bucket_uri}/images" if bucket == "bucket" else f"s3://{bucket}/images"
    server = dataclasses.replace(s3_server, endpoint=proxy.endpoint, **wrong)
    done = run_job(server, "--images", images, "--index", f"{images}.index")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert reason in done.stderr
    assert len(proxy.requests) <= 4


def test_a_command_asks_an_address_that_never_answers_but_twice(proxy, monkeypatch, capsys):
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(s3, "_connections", {})
    proxy.plan, proxy.hold_seconds = lambda method, target: "hold", 60
    assert run_command(lambda: print(list(list_objects("s3://bucket/x")))) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert f"error: cannot reach S3: the store cannot be reached at {proxy.endpoint}" in told.err
    assert len(proxy.requests) == 2


@pytest.mark.slow
def test_an_address_that_never_answers_is_told_soon(proxy, s3_server, bucket_uri):
    proxy.plan, proxy.hold_seconds = lambda method, target: "hold", 60
    server = dataclasses.replace(s3_server, endpoint=proxy.endpoint)
    started = time.monotonic()
    done = run_job(server, "--images", f"{bucket_uri}/images", "--index", f"{bucket_uri}/index")
    assert time.monotonic() - started < 15 + 10  # of which up to 10 s are Python's start on a busy machine
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"the store cannot be reached at {proxy.endpoint} (AWS_ENDPOINT_URL" in done.stderr
    assert len(proxy.requests) == 2
