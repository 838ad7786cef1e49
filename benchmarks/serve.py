"""What the search service takes beside the bare call, and how many questions it answers.

    python benchmarks/serve.py --work DIR [--images 10000] [--questions 300] [--requests 1500]
                               [--clients 1,8,32] [--k 60] [--shards 0] [--json]

An index of picture-book images is made under --work, once. `jobs/serve.py --local` serves it in a process of
its own (with --shards in Ray Serve, one replica, the segments in so many actors); this process opens it too.

First one client: each question is asked of the opened index and over HTTP, one after the other, in an order
that changes; over HTTP until the last byte of the JSON is there. Once with names whose vectors the text tower
has at hand, once with new names. Both sides have one thread (OMP_NUM_THREADS) a question. `over` is the
median of the differences, pair by pair. What a question took inside, over HTTP: encode (the text tower),
faiss (the segments), rank (with the stored vectors, and their reading), http (all else up to the client).
Then so many clients at once, a thread and a connection each.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of both sides, as Ray gives its workers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

import numpy as np

from for_ray.datasets.glyphs import family_glyphs
from for_ray.retrieval import OpenIndex, Question, open_index

ROOT = Path(__file__).resolve().parents[1]
SECONDS_TO_START = 300
STAGES = ("encode", "faiss", "rank")


class Timed(NamedTuple):
    """One question: seconds at the client, and what the answer says of them."""

    seconds: float
    inside: dict[str, float]


class Connection:
    """One client's connection to the service."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS_TO_START)

    def ask(self, text: str, k: int) -> Timed:
        """Ask, and read the whole answer."""
        body = json.dumps({"text": text, "k": k})
        began = time.perf_counter()
        self._http.request("POST", "/search", body, {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        content = answer.read()
        took = time.perf_counter() - began
        if answer.status != http.client.OK:
            raise SystemExit(f"{answer.status} {content.decode()}")
        return Timed(took, json.loads(content)["seconds"])


def make_index(work: Path, num_images: int) -> Path:
    """Draw the images and index them, unless that is done."""
    index, images = work / f"index-{num_images}", work / f"picturebook-{num_images}"
    if not (index / "snapshots.lance").is_dir():
        draw = ["-m", "for_ray.datasets.picturebook", "--out", str(images), "--images", str(num_images)]
        _run([*draw, "--split", "val"])
        _run(["jobs/index.py", "--images", str(images / "images"), "--index", str(index)])
    return index


def _run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


@contextmanager
def served(index: Path, num_shards: int, *flags: str) -> Iterator[tuple[int, int]]:
    """The service in a process of its own, on a free port; its port and the process's id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    how = ["--shards", str(num_shards)] if num_shards else ["--local"]
    command = ["jobs/serve.py", "--index", str(index), "--port", str(port), *how, *flags]
    process = subprocess.Popen(
        [sys.executable, *command, "--requests-per-second", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    try:
        said = process.stderr.readline() if process.stderr else ""
        if not re.match("serving http", said):
            raise SystemExit(said + (process.stderr.read() if process.stderr else ""))
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(SECONDS_TO_START)


def names() -> list[str]:
    """What pictures show."""
    return [f"a {name}" for name in sorted(family_glyphs("material"))]


def new_names(known: list[str]) -> Iterator[str]:
    """Names that nobody has asked for."""
    for number in itertools.count():
        yield f"{known[number % len(known)]} of kind {number}"


def take_turns(index: OpenIndex, client: Connection, texts: Iterator[str], count: int, k: int) -> Any:
    """Seconds of the bare call and over HTTP, of the same questions or of questions of the same kind."""
    bare, over_http = [], []
    for number in range(count):
        for is_http in (number % 2 == 0, number % 2 != 0):
            text = next(texts)
            if is_http:
                over_http.append(client.ask(text, k))
                continue
            began = time.perf_counter()
            inside = index.ask(Question(text, k=k)).seconds
            bare.append(Timed(time.perf_counter() - began, dict(inside)))
    return bare, over_http


def twice(texts: list[str]) -> Iterator[str]:
    """Each text for both ways."""
    for text in itertools.cycle(texts):
        yield text
        yield text


def overhead(index: OpenIndex, port: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for known names and one for new ones."""
    known, client = names()[:64], Connection(port)
    ways = {"known": twice(known), "new": new_names(known)}
    for kind, texts in ways.items():
        take_turns(index, client, texts, len(known), options.k)  # warm
        bare, over_http = take_turns(index, client, texts, options.questions, options.k)
        differences = [there.seconds - here.seconds for here, there in zip(bare, over_http, strict=True)]
        yield {
            "names": kind,
            **{f"bare_{name}": value for name, value in percentiles(bare).items()},
            **{f"http_{name}": value for name, value in percentiles(over_http).items()},
            "over_p50_ms": ms(statistics.median(differences)),
            **shares(over_http),
        }


def load(port: int, num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """So many clients at once, that ask for known names until all requests are answered."""
    known, together = names()[:64], threading.Barrier(num_clients + 1)
    each = max(1, options.requests // num_clients)

    def ask(client: int) -> list[Timed]:
        connection = Connection(port)
        connection.ask(known[client % len(known)], options.k)
        together.wait()
        return [connection.ask(known[(client + step) % len(known)], options.k) for step in range(each)]

    with ThreadPoolExecutor(num_clients) as pool:
        asked = [pool.submit(ask, client) for client in range(num_clients)]
        together.wait()
        began = time.perf_counter()
        timed = [one for thread in asked for one in thread.result()]
        took = time.perf_counter() - began
    return {
        "clients": num_clients,
        "per_second": round(len(timed) / took, 1),
        **percentiles(timed),
        **shares(timed),
    }


def ms(seconds: float) -> float:
    """In milliseconds, as they are printed."""
    return round(1e3 * seconds, 2)


def percentiles(timed: list[Timed]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds."""
    seconds = [each.seconds for each in timed]
    return {f"p{share}_ms": ms(float(np.percentile(seconds, share))) for share in (50, 95, 99)}


def shares(timed: list[Timed]) -> dict[str, float]:
    """The part of the clients' time that each stage has; http is what is left, waiting among it."""
    whole = sum(each.seconds for each in timed)
    parts = {stage: sum(each.inside[stage] for each in timed) / whole for stage in STAGES}
    found = {f"{stage}_share": round(part, 3) for stage, part in parts.items()}
    return {**found, "http_share": round(1 - sum(parts.values()), 3)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the index, serve it, measure."""
    path = make_index(options.work, options.images)
    index = open_index(str(path))
    index.warm()
    with served(path, options.shards) as (port, _):
        lines = list(overhead(index, port, options))
        loads = [load(port, int(count), options) for count in options.clients.split(",")]
    counts = {"images": index.snapshot.indexed, "vectors": index.snapshot.num_vectors}
    return {**counts, "k": options.k, "shards": options.shards, "overhead": lines, "load": loads}


def table(lines: list[dict[str, Any]]) -> str:
    """As Markdown."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the index is made, or was")
    parser.add_argument("--images", type=int, default=10_000, help="(default 10000)")
    parser.add_argument(
        "--questions", type=int, default=300, help="of the one client, each way (default 300)"
    )
    parser.add_argument("--requests", type=int, default=1500, help="of all clients together (default 1500)")
    parser.add_argument("--clients", default="1,8,32", help="at once (default 1,8,32)")
    parser.add_argument("--k", type=int, default=60, help="images an answer (default 60: the page's)")
    parser.add_argument(
        "--shards", type=int, default=0, help="on Ray Serve, with so many (default 0: --local)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the tables")
    options = parser.parse_args()
    found = run(options)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['images']:,} images, {found['vectors']:,} vectors, k {found['k']}\n")
    print(f"{table(found['overhead'])}\n\n{table(found['load'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
