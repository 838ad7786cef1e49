"""The evaluation's settings: several encoders however they are given, and what does not go together."""

from __future__ import annotations

import os

import pytest

from for_ray.config import EvaluateSettings, read_settings
from for_ray.errors import ConfigError

DATASET = ["--dataset", "picturebook:book"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("FOR_RAY_"):
            monkeypatch.delenv(name)


def read(*arguments: str) -> EvaluateSettings:
    return read_settings(EvaluateSettings, [*DATASET, *arguments])


def test_encoders_by_flags_with_commas_by_a_variable_and_by_a_file(monkeypatch, tmp_path):
    assert read("--encoder", "a", "--encoder", "s3://b/c#clip").encoder == ("a", "s3://b/c#clip")
    assert read("--encoder", "a, b", "--encoder", "c").encoder == ("a", "b", "c")
    path = tmp_path / "job.toml"
    path.write_text('encoder = ["a", "b"]\n')
    assert read("--config", str(path)).encoder == ("a", "b")
    path.write_text('encoder = "a"\n')
    assert read("--config", str(path)).encoder == ("a",)
    monkeypatch.setenv("FOR_RAY_ENCODER", "picturebook")  # one environment serves all jobs
    assert read().encoder == ("picturebook",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --encoder"),
        (["--encoder", " , "], "give either --encoder"),
        (["--encoder", "a", "--index", "b"], "give either --encoder"),
        (["--encoder", "a", "--encoder", "a"], "given twice"),
        (["--encoder", "a", "--snapshot", "3"], "--snapshot goes with --index"),
        (["--index", "a", "--head", "clip"], "--head goes with --encoder"),
        (["--index", "a", "--num-slots", "3"], "--num-slots goes with --encoder"),
        (["--index", "a", "--task", "multilabel"], "needs --encoder"),
        (["--encoder", "a", "--task", "sorting"], "--task .*'retrieval', 'multilabel', .*, got 'sorting'"),
        (["--encoder", "a", "--max-bad-fraction", "1.5"], "--max-bad-fraction .*got '1.5'"),
        (["--encoder", "a", "--min-actors", "3", "--max-actors", "2"], "below min_actors"),
        (["--encoders", "a"], "no such flag: --encoders; did you mean --encoder"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read(*arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "zero-shot", "--neighbours", "3"], "go with --task knn"),
        (["--task", "image-to-image", "--gallery", "folder:a"], "go with --task knn"),
        (["--task", "text-to-image", "--split", "s.json"], "--task text-to-image has captions"),
    ],
)
def test_settings_of_another_task_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read("--encoder", "a", *arguments)
    settings = read("--encoder", "a", "--task", "knn", "--neighbours", "3", "--gallery", "folder:a")
    assert (settings.neighbours, settings.gallery) == (3, "folder:a")
