"""The command in one process: it says where it listens, answers, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from for_ray.retrieval import Question, open_index
from for_ray.serving.client import Client, ServiceError
from tests.planted import Planted, PlantedIndex, make_tiny_bundle

JOB = Path(__file__).resolve().parents[3] / "jobs" / "serve.py"
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PlantedIndex:
    folder = tmp_path_factory.mktemp("serve-job")
    planted = PlantedIndex.make(folder / "index", make_tiny_bundle(folder))
    vectors = np.random.default_rng(0).normal(size=(20, 2, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    planted.add([Planted(f"/{number}.jpg", each) for number, each in enumerate(vectors)])
    planted.publish(nprobe=2)
    return planted


@pytest.mark.parametrize("told", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_answers_until_a_signal_comes(index: PlantedIndex, told: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ["--index", index.uri, "--port", str(port), "--local", "--examples", "a dog; a cat"]
    process = subprocess.Popen(
        [sys.executable, str(JOB), *given],
        env={**os.environ, "FOR_RAY_TOKEN": TOKEN},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        assert process.stderr.readline() == f"serving {url}\n"
        with Client(url, token=TOKEN) as client:
            found = client.search(like="7:1", k=5)
            right = open_index(index.uri).ask(Question(like="7:1", k=5))
            assert [(hit.uri, hit.score, hit.slot) for hit in found.hits] == [
                (hit.uri, hit.score, hit.slot) for hit in right.hits
            ]
            about = client.about()
        assert (about["name"], about["examples"]) == ("index", ["a dog", "a cat"])
        with pytest.raises(ServiceError) as caught:
            Client(url, token="another-token-of-some-length").search(like="7:1")
        assert (caught.value.status, caught.value.code) == (401, "token")
        exported = Client(url, token=TOKEN).export("jsonl", like="7:1", k=3, only=[7])
        assert [json.loads(line)["image_id"] for line in exported.decode().splitlines()] == [7]
        process.send_signal(told)
        said, complained = process.communicate(timeout=120)
        assert (process.returncode, said, complained) == (0, "", "")
    finally:
        process.kill()
        process.wait()
