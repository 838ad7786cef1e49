"""Settings: who wins over whom, and what is refused in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from for_ray.config import IndexSettings, SearchSettings, read_settings
from for_ray.errors import ConfigError

NEEDED = ["--images", "pictures", "--index", "out"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("FOR_RAY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return tmp_path / "job.toml"


def test_flags_win_over_variables_over_the_file_over_defaults(monkeypatch, config_path):
    config_path.write_text('batch_size = 2\nread_threads = 2\nhead = "dense"\n')
    monkeypatch.setenv("FOR_RAY_BATCH_SIZE", "3")
    monkeypatch.setenv("FOR_RAY_READ_THREADS", "3")
    settings = read_settings(
        IndexSettings, [*NEEDED, "--config", str(config_path), "--batch-size", "4", "--json"]
    )
    assert (settings.batch_size, settings.read_threads, settings.head) == (4, 3, "dense")
    assert settings.json_
    assert not settings.dry_run
    assert settings.commit_seconds == 10.0


def test_the_file_may_hold_everything_and_be_named_by_a_variable(monkeypatch, config_path):
    config_path.write_text('images = "a"\nindex = "b"\ndry-run = true\nmax-actors = 3\njson = true\n')
    monkeypatch.setenv("FOR_RAY_CONFIG", str(config_path))
    settings = read_settings(IndexSettings, [])
    assert (settings.images, settings.index, settings.max_actors) == ("a", "b", 3)
    assert settings.dry_run
    assert settings.json_


def test_a_search_takes_its_words_without_a_flag():
    settings = read_settings(SearchSettings, ["--index", "out", "a red car", "--top", "7"])
    assert (settings.query, settings.top, settings.image) == ("a red car", 7, None)


@pytest.mark.parametrize("word", ["None", "null", "3", "{}", "true"])
def test_words_stay_words(word):
    assert read_settings(SearchSettings, ["--index", "out", word]).query == word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "x"], "no such flag: --image; did you mean --images or --image-size?"),
        ([*NEEDED, "--bach-size", "3"], "no such flag: --bach-size; did you mean --batch-size"),
        (["--images", "x"], "--index is missing"),
        (
            [*NEEDED, "--head", "max"],
            "--head (or FOR_RAY_HEAD): input should be 'sum', 'cluster', 'dense', 'clip' or 'mcip'",
        ),
        (
            [*NEEDED, "--batch-size", "0"],
            "--batch-size (or FOR_RAY_BATCH_SIZE): input should be greater than or",
        ),
        (
            [*NEEDED, "--num-slots", "257"],
            "--num-slots (or FOR_RAY_NUM_SLOTS): input should be less than or equal",
        ),
        ([*NEEDED, "--max-bad-fraction", "1.5"], "--max-bad-fraction"),
        ([*NEEDED, "--min-actors", "3", "--max-actors", "2"], "max_actors (2) is below min_actors (3)"),
        ([*NEEDED, "more"], "unrecognized arguments: more"),
        (["--images"], "argument --images: expected one argument"),
        (
            ["--images", "", "--index", "x"],
            "--images (or FOR_RAY_IMAGES): string should have at least 1 character",
        ),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        read_settings(IndexSettings, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["--index", "x"], ["--index", "x", "words", "--image", "y"]])
def test_a_search_asks_one_thing(arguments):
    with pytest.raises(ConfigError, match="give either words to look for or --image FILE"):
        read_settings(SearchSettings, arguments)


def test_an_unknown_variable_is_refused_with_its_likes(monkeypatch):
    monkeypatch.setenv("FOR_RAY_BATCHSIZE", "3")
    with pytest.raises(ConfigError, match="variable FOR_RAY_BATCHSIZE; did you mean FOR_RAY_BATCH_SIZE"):
        read_settings(IndexSettings, NEEDED)


def test_the_variables_of_another_job_are_none_of_ours(monkeypatch):
    monkeypatch.setenv("FOR_RAY_TOP", "3")
    assert read_settings(IndexSettings, NEEDED).images == "pictures"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise = 3\n", "no such setting: batch_sise; did you mean batch_size?"),
        ("batch_size = \n", "is not TOML"),
        ("top = 3\n", "no such setting: top"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_named(config_path, content, message):
    if content is not None:
        config_path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(IndexSettings, [*NEEDED, "--config", str(config_path)])
    assert str(config_path) in str(caught.value)
    assert message in str(caught.value)


def test_settings_are_frozen_and_closed():
    settings = IndexSettings(images="a", index="b")
    with pytest.raises(ValueError, match="frozen"):
        settings.images = "c"
    with pytest.raises(ValueError, match="Extra inputs"):
        IndexSettings(images="a", index="b", colour="red")


@pytest.mark.parametrize("model", [IndexSettings, SearchSettings])
def test_every_setting_says_what_it_is(model, capsys):
    assert all(field.description for field in model.model_fields.values())
    with pytest.raises(SystemExit) as ended:
        read_settings(model, ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "default: None" not in " ".join(shown.split())
    for name, field in model.model_fields.items():
        assert (field.alias or name).replace("_", "-") in shown.lower()
    assert "Exit code" in shown


def test_help_needs_neither_torch_nor_ray():
    """What is slow to import would make every wrong flag slow to be told."""
    code = (
        "import sys, for_ray.config as c\n"
        "try: c.read_settings(c.IndexSettings, ['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'faiss', 'lance', 'boto3', 'pyarrow'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", ["1e9", "1000000000", "1_000_000_000"])
def test_a_plan_takes_a_number_as_people_write_it_and_neither_images_nor_index(words):
    settings = read_settings(IndexSettings, ["--plan-vectors", words])
    assert settings.plan_vectors == 1e9
    assert (settings.plan_nodes, settings.plan_node_memory, settings.plan_node_cpus) == (None, 64, 16)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--plan-vectors", "0"], "--plan-vectors .*greater than or equal to 1, got '0'"),
        (["--plan-vectors", "-5"], "--plan-vectors .*greater than or equal to 1, got '-5'"),
        (["--plan-vectors", "1e30"], "--plan-vectors .*less than or equal to 1000000000000000, got '1e30'"),
        (["--plan-vectors", "nan"], "--plan-vectors .*finite number"),
        (["--plan-vectors", "many"], "--plan-vectors .*valid number"),
        (["--plan-vectors", "1e9", "--plan-nodes", "0"], "--plan-nodes .*greater than or equal to 1"),
        (
            ["--plan-vectors", "1e9", "--plan-node-memory", "1"],
            "--plan-node-memory .*greater than or equal to 4",
        ),
        (["--plan-vectors", "1e9", "--index", "i", "--verify"], "--plan-vectors goes alone"),
        (["--images", "a"], "--index is missing"),
        ([*NEEDED, "--min-recall", "0.97"], r"min_recall \(0.97\) is above target_recall \(0.95\)"),
    ],
)
def test_plans_and_floors_that_cannot_be_met_are_refused(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_settings(IndexSettings, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        ([], 0.85),
        (["--target-recall", "0.05"], 0.0),
        (["--min-recall", "0.3"], 0.3),
        (["--min-recall", "0"], 0.0),
    ],
)
def test_the_floor_of_recall_follows_the_target_unless_it_is_given(arguments, least):
    assert read_settings(IndexSettings, [*NEEDED, *arguments]).least_recall == pytest.approx(least)
