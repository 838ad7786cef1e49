"""The settings of the job that labels images: what can be said on the command line and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.config import LabelSettings, read_settings
from for_ray.errors import ConfigError

GIVEN = ["--dataset", "picturebook:book", "--output", "labels"]


def test_the_defaults_are_the_papers() -> None:
    settings = read_settings(LabelSettings, GIVEN)
    assert (settings.vocabulary, settings.threshold, settings.num_labels, settings.head) == (
        *("imagenet21k", 5e-4, 50, "cluster"),
    )
    assert (settings.features, settings.exclude_novel) == (True, False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--features"], True), (["--no-features"], False), ([], True)],
)
def test_features_can_be_said_either_way(words: list[str], expected: bool) -> None:
    assert read_settings(LabelSettings, [*GIVEN, *words]).features is expected


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.toml"
    path.write_text("features = false\nthreshold = 0.25\nnum-labels = 7\n")
    words = [*GIVEN, "--config", str(path)]
    read = read_settings(LabelSettings, words)
    assert (read.features, read.threshold, read.num_labels) == (False, 0.25, 7)
    monkeypatch.setenv("FOR_RAY_THRESHOLD", "0.125")
    monkeypatch.setenv("FOR_RAY_FEATURES", "true")
    read = read_settings(LabelSettings, words)
    assert (read.features, read.threshold) == (True, 0.125)
    read = read_settings(LabelSettings, [*words, "--no-features", "--threshold", "0.5"])
    assert (read.features, read.threshold) == (False, 0.5)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--threshold", "1"], "--threshold"),
        (["--threshold=-0.1"], "--threshold"),
        (["--num-labels", "0"], "--num-labels"),
        (["--head", "mean"], "--head"),
        (["--min-actors", "3", "--max-actors", "2"], r"max_actors \(2\) is below min_actors \(3\)"),
        (["--no-featurs"], "did you mean --features"),
        (["--no-threshold"], "no-threshold"),
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_settings(LabelSettings, [*GIVEN, *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["dataset", "output"])
def test_what_is_missing_is_named(missing: str) -> None:
    place = GIVEN.index(f"--{missing}")
    with pytest.raises(ConfigError, match=f"--{missing} is missing"):
        read_settings(LabelSettings, GIVEN[:place] + GIVEN[place + 2 :])
