"""Tuning towers: what is trained, one step, two workers as one, and the bundle that comes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from for_ray.errors import ConfigError
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.margin_loss import arc_margin, info_nce, mc_arc_margin
from for_ray.model.tower_tuning import (
    AdamWSettings,
    ClassObjective,
    ImageBatch,
    PairBatch,
    PairObjective,
    TowerTrainer,
    TuneSettings,
    checkpoint_activations,
    embed,
    image_parameters,
    load_clip,
    save_tuned,
)
from for_ray.model.trainer import HaltedError
from tests.unit.model.conftest import CONFIGS, make_clip

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = AdamWSettings(lr=1e-4, lr_end=1e-5, num_steps=3)
NUM_CLASSES, SIZE = 3, 64


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("picturebook", head="clip", image_size=SIZE)


def images(count: int = 4) -> ImageBatch:
    """Of one image the pixels were unreadable, and of one there is no caption."""
    rng = torch.Generator().manual_seed(1)
    is_own = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)[:count]
    return ImageBatch(
        torch.randn(count, 3, SIZE, SIZE, generator=rng),
        torch.tensor([0, 1, 2, 0])[:count],
        torch.tensor([True, True, True, False])[:count],
        torch.nn.functional.normalize(torch.randn(3, 128, generator=rng), dim=1),
        is_own,
    )


def texts(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = load_encoder(bundle, "cpu").tokenize(["a red car", "two dogs", "an anchor", "a bell"])
    vectors = torch.randn(4, bundle.dim, generator=torch.Generator().manual_seed(2))
    return tokens, torch.nn.functional.normalize(vectors, dim=1)


def test_the_first_step_minimises_the_weighted_losses(bundle):
    settings = TuneSettings("mcip", scale=10.0, margin=0.2, gamma_classes=0.25, gamma_captions=2.0, seed=4)
    batch, clip = images(), load_clip(bundle)
    vectors = clip.encode_image(batch.pixels)
    objective = ClassObjective(clip, NUM_CLASSES, bundle.dim, settings)
    classes = arc_margin(vectors, objective.arc.proxies, batch.labels, scale=10, margin=0.2)[:3].mean()
    found = mc_arc_margin(vectors, batch.captions, batch.is_own, scale=10, margin=0.2)
    captions = found.values[:2].mean()  # the third has no caption, the fourth no pixels
    before = objective.arc.proxies.detach().clone()
    trainer = TowerTrainer(objective, settings, ADAM)
    means = trainer.step(batch, step=0)
    assert means["classes"].mean == pytest.approx(classes.item(), rel=1e-5)
    assert means["captions"].mean == pytest.approx(captions.item(), rel=1e-5)
    assert (means["classes"].weight, means["captions"].weight) == (3, 2)
    moved = (objective.arc.proxies - before).abs()
    assert moved.max().item() == pytest.approx(0.01, rel=0.05)  # Adam's first step: lr · 100
    assert trainer.step(batch, step=1)["classes"].mean < means["classes"].mean


def test_the_gradient_is_shortened(bundle):
    settings, clip = TuneSettings("gpr"), load_clip(bundle)
    trainer = TowerTrainer(ClassObjective(clip, NUM_CLASSES, bundle.dim, settings), settings, ADAM)
    trainer.step(images(), step=0)
    norms = torch.stack([value.grad.norm() for value in trainer.trained.values()])
    assert norms.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_falls_along_half_a_cosine():
    adam = AdamWSettings(lr=1.0, lr_end=0.1, num_steps=5)
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert [adam.lr_at(step) for step in range(5)] == pytest.approx(expected)
    assert (adam.lr_at(0), adam.lr_at(4), adam.lr_at(9)) == (1.0, pytest.approx(0.1), pytest.approx(0.1))


def test_blocks_and_projection_are_chosen(bundle):
    clip = load_clip(bundle)
    names = {id(value): name for name, value in clip.visual.named_parameters()}

    def trained(**settings):
        return {names[id(value)] for value in image_parameters(clip, TuneSettings("gpr", **settings))}

    assert trained() == set(names.values())
    last = trained(num_blocks=1)
    assert {name.split(".")[0] for name in last} == {"layer4", "attnpool"}
    without = trained(num_blocks=1, with_projection=False)
    assert last - without == {"attnpool.c_proj.weight", "attnpool.c_proj.bias"}
    assert not any(name.startswith(("conv", "bn")) for name in trained(num_blocks=4))
    with pytest.raises(ConfigError, match="the image tower has 4 blocks"):
        trained(num_blocks=5)


def test_a_vision_transformer_has_blocks_too():
    bundle = open_bundle("open_clip:ViT-B-32@random", head="clip", allow_untrained=True)
    with torch.device("meta"):
        from for_ray.model.towers import _build

        clip = _build(bundle)
    names = {id(value): name for name, value in clip.visual.named_parameters()}
    chosen = image_parameters(clip, TuneSettings("gpr", num_blocks=2, with_projection=False))
    found = {names[id(value)] for value in chosen}
    blocks = {name.split(".")[2] for name in found if name.startswith("transformer.")}
    assert blocks == {"10", "11"}
    assert {name.split(".")[0] for name in found} == {"transformer", "ln_post"}


def stepped(kind: str, settings: TuneSettings, *, is_checkpointed: bool) -> tuple[TowerTrainer, int]:
    """A tiny tower after two steps, and the bytes that the second kept for its gradients."""
    clip, rng = make_clip(CONFIGS[kind]), torch.Generator().manual_seed(5)
    if is_checkpointed:
        checkpoint_activations(clip, settings.recipe)
    vectors = torch.nn.functional.normalize(torch.randn(6, 24, generator=rng), dim=1)
    if settings.recipe == "realign":
        batch = PairBatch(torch.randint(1, 1000, (6, 77), generator=rng), vectors, 0)
        trainer = TowerTrainer(PairObjective(clip), settings, ADAM)
    else:
        is_own = torch.eye(6, dtype=torch.bool)
        pixels = torch.randn(6, 3, SIZE, SIZE, generator=rng)
        batch = ImageBatch(pixels, torch.arange(6) % 3, torch.ones(6, dtype=torch.bool), vectors, is_own)
        trainer = TowerTrainer(ClassObjective(clip, NUM_CLASSES, 24, settings), settings, ADAM)
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    trainer.step(batch, step=0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(batch, step=1)
    own = {value.data_ptr() for value in clip.parameters()}
    return trainer, sum(num_bytes for place, (_, num_bytes) in kept.items() if place not in own)


@pytest.mark.parametrize("kind", ["class_token", "map"])
@pytest.mark.parametrize(
    "settings", [TuneSettings("mcip"), TuneSettings("gpr", num_blocks=1), TuneSettings("realign")]
)
def test_checkpointed_activations_change_no_weight_and_are_fewer(kind, settings):
    (with_it, few), (without, many) = (stepped(kind, settings, is_checkpointed=yes) for yes in (True, False))
    assert set(with_it.trained) == set(without.trained)
    for name, value in without.trained.items():
        torch.testing.assert_close(with_it.trained[name].grad, value.grad)
        torch.testing.assert_close(with_it.trained[name], value)
    assert few < 0.8 * many


def test_a_resnet_cannot_checkpoint_its_activations_and_its_text_tower_can(bundle):
    clip = load_clip(bundle)
    with pytest.raises(ConfigError, match=r"^--grad-checkpointing: the image tower has none in open_clip"):
        checkpoint_activations(clip, "gpr")
    checkpoint_activations(clip, "realign")
    assert clip.transformer.grad_checkpointing


def test_realign_trains_the_text_tower_alone(bundle):
    clip, (tokens, vectors) = load_clip(bundle), texts(bundle)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    expected = info_nce(vectors, clip.encode_text(tokens), scale=float(clip.logit_scale.exp())).mean()
    trainer = TowerTrainer(PairObjective(clip), TuneSettings("realign"), ADAM)
    found = trainer.step(PairBatch(tokens, vectors, 0), step=0)["pairs"]
    assert (found.mean, found.weight) == (pytest.approx(expected.item(), rel=1e-5), 4)
    changed = {name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(("visual.", "logit_scale")) for name in changed)
    assert "text_projection" in changed


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(bundle):
    settings, clip = TuneSettings("gpr"), load_clip(bundle)
    objective = ClassObjective(clip, NUM_CLASSES, bundle.dim, settings)
    before = objective.arc.proxies.detach().clone()
    batch = images()._replace(pixels=torch.full((4, 3, SIZE, SIZE), torch.nan))
    with pytest.raises(HaltedError, match="the loss is not finite"):
        TowerTrainer(objective, settings, ADAM).step(batch, step=0)
    assert torch.equal(objective.arc.proxies, before)


def test_the_bundle_encodes_as_what_was_trained(bundle, tmp_path):
    settings, clip = TuneSettings("gpr"), load_clip(bundle)
    TowerTrainer(ClassObjective(clip, NUM_CLASSES, bundle.dim, settings), settings, ADAM).step(
        images(), step=0
    )
    saved = save_tuned(bundle, clip, str(tmp_path / "gpr"), recipe="gpr", name="tuned")
    assert (saved.config.head, saved.num_slots, saved.name, saved.image_size) == ("mcip", 1, "tuned", SIZE)
    assert saved.fingerprint != bundle.fingerprint
    encoder = load_encoder(saved, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)
    normalised = (torch.from_numpy(pixels).float() - encoder.mean) / encoder.std
    found = encoder.encode(pixels).vectors[:, 0]
    torch.testing.assert_close(found, embed(clip, [normalised], dim=bundle.dim).float(), atol=5e-4, rtol=0)
    assert (found - load_encoder(bundle, "cpu").encode(pixels).vectors[:, 0]).abs().max() > 1e-4
    again = save_tuned(
        open_bundle(str(tmp_path / "gpr"), head="clip"), clip, str(tmp_path / "both"), recipe="realign"
    )
    assert again.config.recipes == "gpr,realign"
    assert again.fingerprint == saved.fingerprint  # the same weights


def test_head_mcip_needs_tuned_towers():
    with pytest.raises(ConfigError, match="no tuned image tower: tune it"):
        open_bundle("picturebook", head="mcip")


def test_a_checkpoint_goes_on_where_it_was(bundle):
    def trainer():
        settings = TuneSettings("gpr")
        objective = ClassObjective(load_clip(bundle), NUM_CLASSES, bundle.dim, settings)
        return TowerTrainer(objective, settings, ADAM)

    whole, first, second = trainer(), trainer(), trainer()
    for step in range(2):
        whole.step(images(), step=step)
    first.step(images(), step=0)
    second.restore(first.state())
    second.step(images(), step=1)
    for name, value in whole.trained.items():
        assert torch.equal(value, second.trained[name])
    with pytest.raises(ValueError, match="other trained weights"):
        TowerTrainer(PairObjective(load_clip(bundle)), TuneSettings("realign"), ADAM).restore(first.state())


def _work(rank: int, world: int, folder: str) -> None:
    """One worker's step of each recipe, and what gradients and losses it came to."""
    torch.set_num_threads(1)
    if world > 1:
        meet = f"file://{folder}/meet"
        distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    bundle = open_bundle("picturebook", head="clip", image_size=SIZE)
    # Parts of a batch may differ: the last worker has one image, the one that cannot be read.
    mine = slice(0, 4) if world == 1 else (slice(0, 3) if rank == 0 else slice(3, 4))
    settings, (tokens, vectors) = TuneSettings("mcip"), texts(bundle)
    objective = ClassObjective(load_clip(bundle), NUM_CLASSES, bundle.dim, settings)
    tuned = TowerTrainer(objective, settings, ADAM)
    batch = images()
    part = ImageBatch(*(each[mine] for each in batch[:3]), batch.captions, batch.is_own[mine])
    found = tuned.step(part, step=0)
    aligned = TowerTrainer(PairObjective(load_clip(bundle)), TuneSettings("realign"), ADAM)
    found |= aligned.step(PairBatch(tokens[mine], vectors, mine.start), step=0)
    gradients = {
        f"{number} {name}": value.grad
        for number, trainer in enumerate((tuned, aligned))
        for name, value in trainer.trained.items()
    }
    means = {name: (each.mean, each.weight) for name, each in found.items()}
    torch.save({"gradients": gradients, "means": means}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


def test_two_workers_have_the_losses_and_gradients_of_one(tmp_path):
    _work(0, 1, str(tmp_path))
    multiprocessing.spawn(_work, args=(2, str(tmp_path)), nprocs=2)
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    assert set(one["means"]) == {"classes", "captions", "pairs"}
    for rank in range(2):
        found = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        for name, expected in one["means"].items():
            assert found["means"][name] == pytest.approx(expected, rel=1e-5)
        for name, expected in one["gradients"].items():
            largest = expected.abs().max().item()
            torch.testing.assert_close(
                found["gradients"][name], expected, rtol=1e-3, atol=1e-3 * largest + 1e-8
            )
