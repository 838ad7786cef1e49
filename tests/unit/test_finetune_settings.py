"""The settings of a fine-tuning: presets, who wins over whom, and what does not go together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from for_ray.config import FinetuneSettings, LabelSettings, read_settings
from for_ray.errors import ConfigError

NEEDED = ["--dataset", "picturebook:d", "--output", "o", "--labels", "l"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("FOR_RAY_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("preset", "gamma_pse", "null_weight", "image_size"),
    [("coco", 1, 0.1, None), ("lvis", 1, 0, None), ("nuimages", 10, 0, 768), ("paper", 1, 0.1, None)],
)
def test_presets_are_table_8(preset, gamma_pse, null_weight, image_size):
    settings = read_settings(FinetuneSettings, [*NEEDED, "--preset", preset])
    assert (settings.gamma_sup, settings.gamma_pse, settings.null_weight) == (1, gamma_pse, null_weight)
    assert (settings.slots, settings.layers, settings.dropout, settings.batch_size) == (50, 2, 0.1, 64)
    assert (settings.lr, settings.lr_drop_epoch, settings.epochs, settings.weight_decay) == (
        1e-5,
        15,
        25,
        1e-4,
    )
    assert settings.image_size == image_size
    assert (settings.head, settings.losses, settings.freeze) == ("sum", "sup,pse", None)
    assert (settings.select, settings.held_out, settings.objective) == ("last", 0, "set")


@pytest.mark.parametrize("preset", ["coco", "lvis", "nuimages", "paper"])
def test_a_preset_labels_and_trains_at_one_image_size(preset):
    """Features of one size cannot be trained on at another."""
    needed = ["--dataset", "picturebook:d", "--output", "o", "--preset", preset]
    labels = read_settings(LabelSettings, needed)
    assert (labels.head, labels.num_slots, labels.threshold, labels.num_labels) == ("cluster", 50, 5e-4, 50)
    assert labels.image_size == read_settings(FinetuneSettings, [*NEEDED, "--preset", preset]).image_size


def test_flags_and_file_win_over_the_preset(monkeypatch, tmp_path: Path):
    path = tmp_path / "job.toml"
    path.write_text('preset = "nuimages"\nlr = 1e-3\nepochs = 5\n')
    monkeypatch.setenv("FOR_RAY_EPOCHS", "6")
    settings = read_settings(FinetuneSettings, [*NEEDED, "--config", str(path), "--gamma-pse", "3"])
    assert (settings.lr, settings.epochs, settings.gamma_pse, settings.image_size) == (1e-3, 6, 3, 768)
    settings = read_settings(FinetuneSettings, [*NEEDED, "--config", str(path), "--preset", "coco"])
    assert (settings.gamma_pse, settings.image_size) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nuimage"], "no such preset: nuimage; did you mean nuimages?; expected coco, lvis"),
        (
            ["--losses", "pse,sup,sup"],
            "--losses (or FOR_RAY_LOSSES): input should be 'sup,pse', 'sup' or 'pse'",
        ),
        (["--head", "clip", "--freeze", "qkvo"], "freeze qkvo leaves head clip nothing to train"),
        (["--select", "best", "--held-out", "0"], "select best needs --held-out above 0"),
        (["--val-labels", "v"], "--val-labels and --val-split go with --val"),
        (["--workers", "8", "--batch-size", "4"], "a batch of 4 does not go round 8 workers"),
        (["--lr", "0"], "--lr (or FOR_RAY_LR): input should be greater than 0"),
        (["--labelled-fraction", "0"], "--labelled-fraction"),
        (["--name", "a/b"], "--name"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as caught:
        read_settings(FinetuneSettings, [*NEEDED, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pseudo_labels_are_needed_for_their_loss_alone():
    with pytest.raises(ConfigError, match="losses sup,pse needs --labels"):
        read_settings(FinetuneSettings, NEEDED[:4])
    assert read_settings(FinetuneSettings, [*NEEDED[:4], "--losses", "sup"]).has_sup


def test_every_setting_says_what_it_is(capsys):
    assert all(field.description for field in FinetuneSettings.model_fields.values())
    with pytest.raises(SystemExit) as ended:
        read_settings(FinetuneSettings, ["--help"])
    assert ended.value.code == 0
    assert "--labelled-fraction" in capsys.readouterr().out
