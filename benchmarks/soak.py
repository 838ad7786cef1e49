"""Kill parts of index runs at random moments, again and again, and count what that broke.

    python benchmarks/soak.py                              # 30 kills over runs on 5,000 images
    python benchmarks/soak.py --images 1000 --kills 5 --seed 7

Images of the picture book lie in a bucket of a real S3 server (SeaweedFS); a Ray cluster of a head and two
nodes with a GPU each in their books runs on this machine. An undisturbed run makes the index that others are
held against. Then index after index is made of the same images while SIGKILL hits, at moments and in an order
that the seed decides: the driver, an encoding actor, a reading task's process, a whole node (another joins
afterwards), the S3 server (20 s later it is back). A run that ended without having published is started
again, as a scheduler would. What was committed before a kill must be in the published table as it was.

Prints a line for each kill and run on stderr, and one JSON object at the end: kills by kind, runs, images
lost, duplicated and encoded again, and images and answers that differ. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("driver", "actor", "reader", "node", "store")
OUTAGE_SECONDS = 20.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 15.0
"""Between two kills; a run needs some seconds before it encodes, and should come to commit now and then."""

MOST_RUNS = 30
"""Of one index: where it takes more, something is wrong."""


def main() -> int:
    """Soak; the exit code says whether all indexes are what they should be."""
    sys.path.insert(0, str(ROOT))
    from tests.nodes import ray_nodes
    from tests.seaweed import environment, seaweed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="for_ray-soak-")))
        server = stack.enter_context(seaweed())
        stack.enter_context(environment(server))
        bucket = f"s3://{server.make_bucket()}"
        _draw(folder, bucket, given.images)
        nodes = stack.enter_context(ray_nodes(2))
        soak = Soak(bucket, server, nodes, random.Random(given.seed), num_kills=given.kills, cache=folder)
        report = soak.run()
    report = {**vars(given), **report, "seconds": round(time.monotonic() - started)}
    print(json.dumps(report, indent=2))
    return int(report["encoded_again"] > 0 or any(report["differences"].values()))


def _draw(folder: Path, bucket: str, count: int) -> None:
    from for_ray.storage import upload

    words = ["--out", folder / "book", "--images", count, "--split", "val"]
    command = [sys.executable, "-m", "for_ray.datasets.picturebook", *map(str, words)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, env=os.environ)
    paths = sorted((folder / "book" / "images").iterdir())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: upload(path, f"{bucket}/images/{path.name}"), paths))


class Soak:
    """The kills, and what came of them.

    Args:
        bucket: Images lie below `images/`; indexes come beside them.
        server: The S3 server.
        nodes: The cluster.
        chance: Decides when what is killed.
        num_kills: In all.
        cache: A folder for segments that are searched.
    """

    def __init__(
        self, bucket: str, server: Any, nodes: Any, chance: random.Random, *, num_kills: int, cache: Path
    ) -> None:
        self._bucket, self._server, self._nodes, self._chance = bucket, server, nodes, chance
        self._num_kills, self._cache = num_kills, cache
        self._order = [KINDS[number % len(KINDS)] for number in range(num_kills)]
        chance.shuffle(self._order)
        self._kills: Counter[str] = Counter()
        self._failures: list[str] = []
        self._differences: Counter[str] = Counter()
        self._num_runs = self._num_committed = self._num_again = 0

    def run(self) -> dict[str, Any]:
        """Make one index in peace, and others under fire until all kills are spent."""
        from tests.index_runs import differences

        peaceful = f"{self._bucket}/undisturbed"
        with self._start(peaceful) as run:
            if run.end() != 0:
                raise RuntimeError(f"the undisturbed run failed:\n{run.output}")
        for number in itertools.count(1):
            index = f"{self._bucket}/index-{number}"
            self._make(index)
            found = differences(index, peaceful, cache_path=self._cache / "segments")
            self._differences.update(found)
            _say(f"index {number}: {found}")
            if self._kills.total() >= self._num_kills:
                break
        return {
            "kills": dict(self._kills),
            "indexes": number,
            "runs": self._num_runs,
            "failed_runs": self._failures,
            "committed_before_kills": self._num_committed,
            "encoded_again": self._num_again,
            "differences": dict(self._differences),
        }

    def _start(self, index: str) -> Any:
        from tests.index_runs import index_run

        given = ["--images", f"{self._bucket}/images", "--batch-size", 16, "--commit-seconds", 1]
        return index_run(index, self._nodes.address, *given)

    def _make(self, index: str) -> None:
        """Start runs, and kill, until one run has published."""
        from tests.index_runs import encoded_again

        committed: dict[str, Any] = {}
        for _ in range(MOST_RUNS):
            self._num_runs += 1
            with self._start(index) as run:
                while run.is_running and self._kills.total() < self._num_kills:
                    committed = {**self._strike(run), **committed}
                code = run.end(seconds=1800)
            if code == 0:
                break
            if code > 0:
                self._failures.append((run.output.strip().splitlines() or [""])[-1])
                _say(f"run ended with {code}: {self._failures[-1]}")
        else:
            raise RuntimeError(f"{index} was not made in {MOST_RUNS} runs")
        again = encoded_again(committed, index)
        self._num_committed += len(committed)
        self._num_again += len(again)

    def _strike(self, run: Any) -> dict[str, Any]:
        """Wait for a random moment, and kill something; what was committed before."""
        from tests.index_runs import committed_rows

        kind = self._order[self._kills.total()]
        end = time.monotonic() + self._chance.uniform(LEAST_SECONDS, MOST_SECONDS)
        while time.monotonic() < end and run.is_running:
            time.sleep(0.05)
        held = committed_rows(run.index_uri)
        strikes: dict[str, Callable[[Any], bool]] = {
            "driver": self._kill_driver,
            "actor": lambda _: self._kill_worker("MapWorker"),
            "reader": lambda _: self._kill_worker("measured_read"),
            "node": self._kill_node,
            "store": self._stop_store,
        }
        if run.is_running and strikes[kind](run):
            self._kills[kind] += 1
            _say(f"kill {self._kills.total()}: {kind}, {len(held)} images were committed")
        return held

    def _kill_driver(self, run: Any) -> bool:
        run.kill()
        return True

    def _kill_worker(self, title: str) -> bool:
        """A task lives for a moment only: wait a little for one."""
        end = time.monotonic() + 3
        while time.monotonic() < end:
            if self._nodes.kill(title, chance=self._chance):
                return True
        return False

    def _kill_node(self, _: Any) -> bool:
        self._nodes.remove_node()
        self._nodes.add_node()
        return True

    def _stop_store(self, _: Any) -> bool:
        self._server.kill()
        time.sleep(OUTAGE_SECONDS)
        self._server.start()
        return True


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
