"""Encoders on disk: what opens, what is refused and in which words, what a fingerprint means."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from for_ray.errors import ConfigError, DataError
from for_ray.model import catalog, towers
from for_ray.model.bundle import check_indexable, open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.encoder_config import EncoderConfig, dump_toml
from tests.unit.model.conftest import CONFIGS, make_clip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model config and weights that fit it."""
    model_path, weights_path = tmp_path / "tiny.json", tmp_path / "tiny.safetensors"
    model_path.write_text(json.dumps(CONFIGS["resnet"]))
    save_file(make_clip(CONFIGS["resnet"]).state_dict(), weights_path)
    return model_path, weights_path


def folder(path: Path, **values: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "model.json").write_text(json.dumps(CONFIGS["resnet"]))
    lines = {"name": "tiny", "model": "model.json"} | values
    (path / "encoder.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in lines.items()))
    return str(path)


def test_settings_come_from_the_file_and_may_be_changed(tmp_path: Path) -> None:
    uri = folder(tmp_path / "b", head="dense", num_slots=7)
    bundle = open_bundle(uri)
    assert (bundle.config.head, bundle.num_slots, bundle.dim, bundle.image_size) == ("dense", 9, 24, 96)
    bundle = open_bundle(
        uri, head="cluster", num_slots=5, image_size=64, keep_threshold=0.5, resize_mode="longest"
    )
    assert (bundle.num_slots, bundle.image_size, bundle.resize_mode) == (4, 64, "longest")  # 2 × 2 cells
    assert bundle.config.keep_threshold == 0.5
    assert open_bundle(uri, head="clip").num_slots == 1


def test_the_prompts_are_the_papers_seven(tmp_path: Path) -> None:
    prompts = open_bundle(folder(tmp_path / "b")).config.prompts
    assert len(prompts) == 7
    assert prompts[0] == "itap of a {}."


def test_a_bundle_survives_saving(files: tuple[Path, Path], tmp_path: Path) -> None:
    model_path, weights_path = files
    first = open_bundle(f"open_clip:{model_path}@{weights_path}", num_slots=3, keep_threshold=0.9)
    first.save(str(tmp_path / "saved"))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "encoder.toml",
        "model.json",
        "weights.safetensors",
    ]
    model_path.unlink()
    weights_path.unlink()
    second = open_bundle(str(tmp_path / "saved"))
    assert second.fingerprint == first.fingerprint
    assert second.config.keep_threshold == 0.9
    pixels = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    assert load_encoder(second).encode(pixels).vectors.shape == (2, 3, 24)
    second.save(str(tmp_path / "again"))
    assert open_bundle(str(tmp_path / "again")).fingerprint == first.fingerprint


def test_saving_twice_leaves_files_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = open_bundle(f"open_clip:{files[0]}@{files[1]}")
    bundle.save(str(tmp_path / "saved"))
    before = (tmp_path / "saved" / "weights.safetensors").stat().st_mtime_ns
    bundle.save(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "clip"},
        {"num_slots": 5},
        {"image_size": 64},
        {"resize_mode": "shortest"},
        {"keep_threshold": 0.5},
        {"dense_positions": True},
        {"quick_gelu": True},
        {"seed": 1},
        {"mean": [0.5, 0.5, 0.5]},
        {"interpolation": "bilinear"},
    ],
)
def test_what_changes_vectors_changes_the_fingerprint(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = open_bundle(folder(tmp_path / "a", num_slots=4)).fingerprint
    assert open_bundle(folder(tmp_path / "b", **({"num_slots": 4} | changes))).fingerprint != base


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"prompts": ["{}"]},
        {"decoder_layers": 1},
        {"mean_token": True},
        {"keep_rule": "apart"},  # of head sum alone
    ],
)
def test_what_does_not_leaves_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = open_bundle(folder(tmp_path / "a", num_slots=4)).fingerprint
    assert open_bundle(folder(tmp_path / "b", **({"num_slots": 4} | changes))).fingerprint == base
    assert len(base) == 16
    assert int(base, 16) >= 0


def test_a_head_that_ignores_the_number_of_slots_ignores_it_in_the_fingerprint(tmp_path: Path) -> None:
    uri = folder(tmp_path / "a", head="dense")
    assert open_bundle(uri, num_slots=3).fingerprint == open_bundle(uri, num_slots=8).fingerprint


def test_other_weights_are_another_encoder(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(make_clip(CONFIGS["resnet"], seed=1).state_dict(), other)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[1].read_bytes())
    prints = [open_bundle(f"open_clip:{files[0]}@{path}").fingerprint for path in (files[1], other, copy)]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("picturbook", "unknown encoder 'picturbook'; did you mean picturebook"),
        ("rn50x64", "did you mean open_clip:RN50x64@"),
        ("/nowhere/at/all", "no encoder at /nowhere/at/all: expected a folder with encoder.toml"),
        ("open_clip:RN50x65@openai", "open_clip has no model 'RN50x65'; did you mean RN50x64"),
        ("open_clip:RN50@opnai", "open_clip knows no weights 'opnai' of RN50; did you mean openai"),
        ("open_clip:RN50", "open_clip:RN50 names no weights.*such as open_clip:RN50@openai"),
        ("open_clip:RN50@/no/w.safetensors", "no weights at /no/w.safetensors"),
        ("open_clip:/no/m.json@/no/w.safetensors", "no model config at /no/m.json"),
        ("open_clip:RN50@random", "random weights, which find nothing"),
        ("open_clip:@", "names no weights"),
    ],
)
def test_unknown_encoders_are_refused_in_one_line(encoder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_bundle(encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ({"slots": 3}, {}, "slots: Extra inputs"),
        ({"num_slots": 0}, {}, "num_slots: .*greater than or equal to 1, got 0"),
        ({"head": "best"}, {}, "head: .*'sum', 'cluster', 'dense', 'clip' or 'mcip', got 'best'"),
        ({}, {"keep_threshold": 1.5}, "keep_threshold: .*got 1.5"),
        ({}, {"image_size": 100}, "image_size 100 must be a multiple of 32"),
        ({"prompts": ["a photo"]}, {}, "'a photo' must contain {} once"),
        ({}, {"head": "sum"}, "no trained sum head"),
        ({"pretrained": "../w.pt"}, {}, "must be the name of a file inside"),
        ({"pretrained": "w.pt"}, {}, "no weights at .*w.pt"),
        ({"model": "none.json"}, {}, "no model config at .*none.json"),
    ],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_bundle(folder(tmp_path / "b", **values), **changes)
    assert "\n" not in str(caught.value)


def test_more_vectors_than_an_index_can_number_are_refused_there_alone(tmp_path: Path) -> None:
    bundle = open_bundle(folder(tmp_path / "b"), image_size=544, head="dense")
    assert bundle.num_slots == 289
    with pytest.raises(ConfigError, match="gives 289 vectors an image, at most 256 can be indexed"):
        check_indexable(bundle)
    check_indexable(open_bundle(folder(tmp_path / "c"), image_size=512, head="dense"))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    uri = folder(tmp_path / "b")
    (tmp_path / "b" / "model.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="is no model config of open_clip: it has no embed_dim"):
        open_bundle(uri)
    (tmp_path / "b" / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        open_bundle(uri)
    (tmp_path / "b" / "encoder.toml").write_text("name = ")
    with pytest.raises(DataError, match="not readable TOML"):
        open_bundle(uri)


def test_weights_of_another_shape_are_refused_with_the_first_key(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    wider = json.loads(files[0].read_text())
    wider["embed_dim"] = 32
    other = tmp_path / "wider.json"
    other.write_text(json.dumps(wider))
    bundle = open_bundle(f"open_clip:{other}@{files[1]}")
    for load in (load_encoder, towers.check_weights):
        with pytest.raises(
            ConfigError, match=r"don't fit .*size mismatch for .*\[.*24.*\].*and \d+ more"
        ) as caught:
            load(bundle)
        assert "\n" not in str(caught.value)


def test_check_weights_accepts_what_fits(files: tuple[Path, Path]) -> None:
    towers.check_weights(open_bundle(f"open_clip:{files[0]}@{files[1]}", image_size=64))


def test_weights_that_are_no_weights_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(b"rubbish" * 100)
        bundle = open_bundle(f"open_clip:{files[0]}@{tmp_path / name}")
        with pytest.raises(ConfigError, match=f"the weights {name} don't fit") as caught:
            load_encoder(bundle)
        assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "attacked",))

    torch.save({"state_dict": Attack()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="don't fit"):
        load_encoder(open_bundle(f"open_clip:{files[0]}@{tmp_path / 'w.pt'}"))
    assert not (tmp_path / "attacked").exists()


def test_weights_with_another_checksum_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    open_bundle(f"open_clip:{files[0]}@{files[1]}").save(str(tmp_path / "saved"))
    save_file(make_clip(CONFIGS["resnet"], seed=1).state_dict(), tmp_path / "saved" / "weights.safetensors")
    with pytest.raises(DataError, match="SHA-256"):
        load_encoder(open_bundle(str(tmp_path / "saved")))


def test_pt_files_load(files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save({"state_dict": make_clip(CONFIGS["resnet"]).state_dict()}, tmp_path / "w.pt")
    pixels = torch.randint(256, (1, 3, 96, 96), dtype=torch.uint8)
    vectors = [
        load_encoder(open_bundle(f"open_clip:{files[0]}@{path}")).encode(pixels).vectors
        for path in (files[1], tmp_path / "w.pt")
    ]
    assert torch.equal(*vectors)


def test_openai_tags_bring_the_quick_gelu_and_siglip_its_pixels() -> None:
    openai = open_bundle("open_clip:RN50x64@openai")
    assert openai.quick_gelu
    assert (openai.image_size, openai.dim, openai.num_slots) == (448, 1024, 50)
    assert open_bundle("open_clip:RN50x64/openai").fingerprint == openai.fingerprint
    assert not open_bundle("open_clip:ViT-B-32@laion2b_s34b_b79k").quick_gelu
    assert open_bundle("open_clip:ViT-B-16-SigLIP@webli").config.mean == (0.5, 0.5, 0.5)


def test_a_file_of_weights_is_taken_for_what_all_weights_of_its_model_are() -> None:
    assert catalog.usual_pretraining("RN50x64")["quick_gelu"] is True
    assert catalog.usual_pretraining("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert "quick_gelu" not in catalog.usual_pretraining("ViT-B-32")  # OpenAI's have it, others don't
    assert catalog.named_model("RN50x64-quickgelu")["quick_gelu"] is True


def test_quick_gelu_reaches_both_towers(files: tuple[Path, Path], tmp_path: Path) -> None:
    from open_clip.transformer import QuickGELU

    (tmp_path / "b").mkdir()
    for quick in (True, False):
        bundle = open_bundle(folder(tmp_path / "b", quick_gelu=quick))
        clip = towers.build_clip(bundle)
        assert any(isinstance(module, QuickGELU) for module in clip.transformer.modules()) is quick


def test_missing_weights_of_a_tag_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(towers, "_require_hub", unreachable)
    monkeypatch.setattr(towers, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(
        ConfigError, match=r"weights openai of RN50 are not on this disk.*RN50-quickgelu@PATH"
    ):
        load_encoder(open_bundle("open_clip:RN50@openai"))


def test_config_errors_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from for_ray.model.bundle import check_indexable, open_bundle\n"
        f"print(open_bundle({folder(tmp_path / 'b')!r}).fingerprint)\n"
        "try: open_bundle('picturbook')\n"
        "except Exception as error: print(error)\n"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_toml_is_read_back_as_it_was_written() -> None:
    import tomllib

    config = EncoderConfig(
        name='a "strange"\nname \\ ü', model="RN50", image_size=224, prompts=("{}", "a 'q' {}")
    )
    assert EncoderConfig.model_validate(tomllib.loads(dump_toml(config))) == config


def test_heads_share_the_fingerprint_of_their_backbone(tmp_path: Path) -> None:
    uri = folder(tmp_path / "a", num_slots=4)
    base = open_bundle(uri)
    heads = [{"head": "dense"}, {"head": "clip"}, {"num_slots": 3}, {"keep_threshold": 0.5}]
    opened = [open_bundle(uri, **changes) for changes in heads]
    assert {bundle.backbone_fingerprint for bundle in opened} == {base.backbone_fingerprint}
    assert base.backbone_fingerprint != base.fingerprint
    for changes in ({"image_size": 128}, {"resize_mode": "longest"}):
        assert open_bundle(uri, **changes).backbone_fingerprint != base.backbone_fingerprint


def test_names_share_the_fingerprint_of_their_tower_and_prompts(tmp_path: Path) -> None:
    base = open_bundle(folder(tmp_path / "a", num_slots=4))
    same = open_bundle(folder(tmp_path / "a", num_slots=4), head="dense", image_size=128)
    assert same.text_fingerprint == base.text_fingerprint
    other = dataclasses.replace(base, config=base.config.model_copy(update={"prompts": ("my {}",)}))
    assert other.text_fingerprint != base.text_fingerprint
    assert other.fingerprint == base.fingerprint
