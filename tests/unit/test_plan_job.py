"""`jobs/index.py --plan-vectors`: a plan by the encoder, without Ray, images or an index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.index import main

JOB = Path(__file__).parents[2] / "jobs" / "index.py"


def test_a_billion_vectors_of_the_encoder_without_ray():
    code = (
        "import sys; from jobs.index import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 10 * ('ray' in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "--plan-vectors", "1e9", "--plan-nodes", "4", "--json"],
        capture_output=True,
        text=True,
        cwd=JOB.parents[1],
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["plan"]["num_vectors"], found["plan"]["dim"], found["num_images"]) == (
        10**9,
        128,
        125 * 10**6,
    )
    assert (found["nodes"], found["replicas"]) == (4, 2)


def test_codec_and_target_choose_the_code(capsys):
    for arguments, code in (
        (["--target-recall", "0.9"], "RaBitQ3"),
        (["--codec", "IVF,SQ8"], "SQ8"),
        (["--codec", "auto"], "RaBitQ4"),
        (["--num-slots", "4"], "RaBitQ4"),
    ):
        assert main(["--plan-vectors", "1e6", "--json", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["plan"]["factory"].rsplit(",", 1)[1] == code
    assert found["num_images"] == 250_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--codec", "Flat"], "no FAISS inverted file"),
        (["--task-memory", "0.1"], "--task-memory (or FOR_RAY_TASK_MEMORY): input should be greater"),
        (["--plan-node-memory", "4"], "a task's memory of 4.29 GB is more than one may reserve on"),
        (["--encoder", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, complaint, capsys):
    assert main(["--plan-vectors", "1e9", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert complaint in said.err
    assert said.err.count("\n") == 1
