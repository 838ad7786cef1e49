"""Towers that are tuned on the GPU learn what the CPU's learn, as far as the precision goes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from for_ray.config import FinetuneSettings
from for_ray.datasets.instances import write_instances
from for_ray.model.tower_tuning import (
    AdamWSettings,
    ClassObjective,
    ImageBatch,
    PairBatch,
    PairObjective,
    Recipe,
    TowerTrainer,
    TuneSettings,
    checkpoint_activations,
)
from for_ray.pipeline.tower_tuning import make_tower_job
from for_ray.stages.shared_towers import SharedTowers
from for_ray.stages.tower_run import TowerRun, tune_here

CASES: list[tuple[str, Recipe]] = [("resnet", "gpr"), ("transformer", "mcip"), ("transformer", "realign")]
SIZE, LENGTH, VOCABULARY = 32, 12, 500
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "transformer": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
}
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
DIM, NUM_CLASSES, B = 32, 3, 8
SCALE = 2.0**8
ADAM = AdamWSettings(lr=1e-4, lr_end=1e-5, num_steps=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stepped(NamedTuple):
    """What a step came to, on the CPU: the losses, and the gradient of each weight, float32."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def make_trainer(
    kind: str, recipe: Recipe, device: str, dtype: torch.dtype, *, is_checkpointed: bool = False
) -> TowerTrainer:
    """Of towers with random weights, the same each time, laid out as `SharedTowers` lays them out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(embed_dim=DIM, vision_cfg=copy.deepcopy(TOWERS[kind]), text_cfg=dict(TEXT))
    clip = clip.eval().to(device)
    if device == "cuda":
        clip = clip.to(memory_format=torch.channels_last)
    settings = TuneSettings(recipe, scale=10.0)
    if is_checkpointed:
        checkpoint_activations(clip, recipe)
    objective: ClassObjective | PairObjective = (
        PairObjective(clip) if recipe == "realign" else ClassObjective(clip, NUM_CLASSES, DIM, settings)
    )
    trainer = TowerTrainer(objective.to(device), settings, ADAM, dtype=dtype)
    if (
        dtype == torch.float16
    ):  # as training finds it after some steps: the first scale is too large for these
        state = trainer.state()
        trainer.restore(state | {"scaler": state["scaler"] | {"scale": SCALE}})
    return trainer


def make_batch(recipe: Recipe, device: str) -> ImageBatch | PairBatch:
    """Of one image the pixels were unreadable, and of one there is no caption."""
    rng = torch.Generator().manual_seed(1)
    vectors = normalize(torch.randn(B, DIM, generator=rng), dim=1)
    if recipe == "realign":
        tokens = torch.randint(1, VOCABULARY - 1, (B, LENGTH), generator=rng)
        tokens[:, -1] = VOCABULARY - 1  # the end of a text, where its vector is taken
        return PairBatch(tokens.to(device), vectors.to(device), 0)
    pixels = torch.randn(B, 3, SIZE, SIZE, generator=rng).to(device)
    if device == "cuda":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    is_own = torch.eye(B, dtype=torch.bool)
    is_own[2] = False
    parts = (torch.arange(B) % NUM_CLASSES, torch.arange(B) != 3, vectors, is_own)
    return ImageBatch(pixels, *(part.to(device) for part in parts))


def step(trainer: TowerTrainer, recipe: Recipe, number: int = 0) -> Stepped:
    means = trainer.step(make_batch(recipe, trainer.device.type), step=number)
    gradients = {name: value.grad.float().cpu() for name, value in trainer.trained.items()}
    return Stepped({name: each.mean for name, each in means.items()}, gradients)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


# The share by which gradients may be off: a bfloat16 has 8 bits of a number, a float16 11, and so has what a
# GPU convolves float32 with (TF32); some ReLUs of a ResNet turn over.
PRECISIONS = [(torch.float32, 0.1), (torch.bfloat16, 0.2), (torch.float16, 0.1)]


@pytest.mark.parametrize(("dtype", "most"), PRECISIONS)
@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_a_step_is_that_of_the_cpu(device, kind, recipe, dtype, most):
    here, there = make_trainer(kind, recipe, device, dtype), make_trainer(kind, recipe, "cpu", torch.float32)
    before = {name: value.detach().clone() for name, value in here.trained.items()}
    found, right = step(here, recipe), step(there, recipe)
    assert here.device.type == device
    assert found.losses == pytest.approx(right.losses, rel=most)
    assert found.gradients.keys() == right.gradients.keys()
    off = (flat(found.gradients) - flat(right.gradients)).norm() / flat(right.gradients).norm()
    assert off < most
    assert all(value.dtype == torch.float32 for value in here.trained.values())
    assert any((value != before[name]).any() for name, value in here.trained.items())


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_scaled_gradients_of_float16_are_unscaled_and_an_overflow_takes_no_step(device, kind, recipe):
    trainer = make_trainer(kind, recipe, device, torch.float16)
    assert trainer.state()["scaler"]["scale"] == SCALE
    found = step(trainer, recipe)
    assert flat(found.gradients).norm().item() <= ADAM.max_norm * 1.01  # of what is left of the scaling
    state = trainer.state()
    state["scaler"]["scale"] = 2.0**60  # no float16 holds these
    trainer.restore(state)
    before = {name: value.detach().clone() for name, value in trainer.trained.items()}
    trainer.step(make_batch(recipe, trainer.device.type), step=1)
    for name, value in trainer.trained.items():
        assert torch.equal(value, before[name])
    assert trainer.state()["scaler"]["scale"] == 2.0**59


@pytest.mark.parametrize("recipe", ["mcip", "realign"])
def test_checkpointed_activations_give_the_same_gradients(device, recipe):
    dtype = torch.bfloat16
    kept = step(make_trainer("transformer", recipe, device, dtype), recipe)
    again = step(make_trainer("transformer", recipe, device, dtype, is_checkpointed=True), recipe)
    assert again.losses == pytest.approx(kept.losses, rel=1e-3)
    off = (flat(again.gradients) - flat(kept.gradients)).norm() / flat(kept.gradients).norm()
    assert off < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_a_checkpoint_goes_on_where_it_was(device, kind, recipe, dtype, tmp_path):
    """Through a file that is read on the CPU, as a worker reads it."""
    whole, first, second = (make_trainer(kind, recipe, device, dtype) for _ in range(3))
    for number in range(2):
        step(whole, recipe, number)
    step(first, recipe)
    torch.save(first.state(), tmp_path / "state.pt")
    second.restore(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    step(second, recipe, 1)
    assert second.state()["scaler"] == whole.state()["scaler"]
    for name, value in whole.trained.items():
        # Some kernels of a GPU add in any order; Adam takes small gradients for large ones.
        torch.testing.assert_close(second.trained[name], value, atol=3 * ADAM.lr, rtol=0)
        assert value.device.type == second.trained[name].device.type == device


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Four things in three views, and the packaged encoder, which is a ResNet."""
    folder = tmp_path_factory.mktemp("towers")
    write_instances(folder / "set", instances=4, views=3, split="train", processes=1)
    return {"folder": folder, "image_size": 64, "epochs": 2, "batch_size": 5, "lr": 1e-4, "read_threads": 2}


def settings_of(given: dict[str, object], recipe: Recipe, output: str) -> FinetuneSettings:
    folder = given["folder"]
    spec = f"pairs:{folder}/set/captions.csv" if recipe == "realign" else f"labels:{folder}/set/labels.csv"
    more = {name: value for name, value in given.items() if name != "folder"}
    return FinetuneSettings(recipe=recipe, dataset=spec, output=output, **more)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpr", "realign"])
def test_a_tuning_is_that_of_the_cpu_and_goes_on_from_a_checkpoint(device, recipe, given, tmp_path):
    """From images to losses, in the precision that the device gets by itself."""
    jobs = [make_tower_job(settings_of(given, recipe, f"{tmp_path}/{name}")) for name in "ab"]
    right = tune_here(jobs[0]).history
    first, second = TowerRun(jobs[1], device=device), TowerRun(jobs[1], device=device)
    first.run_epoch()
    torch.save(first.state(), tmp_path / "state.pt")
    second.restore(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    second.run_epoch()
    assert second.device.type == device
    for mine, its in zip(second.history, right, strict=True):
        assert mine.losses == pytest.approx(its.losses, rel=0.02)
        assert mine.num_unreadable == 0
    bundle = second.save_bundle(f"{tmp_path}/bundle")
    assert bundle.config.recipes == recipe


@pytest.mark.slow
def test_images_have_the_vectors_of_the_cpu_in_the_layout_of_the_device(device, given, tmp_path):
    job = make_tower_job(settings_of(given, "realign", str(tmp_path)))
    towers = SharedTowers(job, device=device)
    reader = towers.reader(job.images)
    pixels = towers.normalised(next(iter(reader.batches([torch.arange(4).numpy()]))))
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    assert pixels.is_contiguous(memory_format=layout)
    weights = [each.weight for each in towers.clip.modules() if isinstance(each, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=layout) for weight in weights)
    found = towers.embed_images(job.images)
    right = SharedTowers(job, device="cpu").embed_images(job.images)
    assert found.vectors.device.type == "cpu"
    assert found.is_readable.all()
    assert (found.vectors.float() * right.vectors.float()).sum(dim=1).min() > 0.99
