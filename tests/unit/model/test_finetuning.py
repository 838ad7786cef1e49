"""One step of fine-tuning: the loss that it minimises, what it changes, and when it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from for_ray.model.backbone import Features
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.finetuning import AdamSettings, Finetuner, max_cosines, set_dropout
from for_ray.model.objectives import LossLabels, LossSettings, Objective, RankObjective
from for_ray.model.set_loss import SetLoss
from for_ray.model.slot_model import SlotModel
from for_ray.model.trained_bundle import HeadSettings, untrained_bundle
from for_ray.model.trainer import HaltedError

HEAD = HeadSettings(num_slots=4, num_layers=1, feedforward_width=32, seed=1)
NUM_BASE, NUM_NAMES, SCALE = 5, 9, 20.0


@pytest.fixture
def encoder() -> Encoder:
    return load_encoder(untrained_bundle("picturebook", HEAD), "cpu")


@pytest.fixture
def features(encoder: Encoder) -> Features:
    """Of images of coloured fields."""
    side = encoder.image_size // 4
    fields = torch.randint(
        0, 255, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return encoder.features(fields.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3))


@pytest.fixture
def texts(encoder: Encoder) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {"sup": (NUM_BASE, encoder.dim), "pse": (NUM_NAMES, encoder.dim)}
    return {
        name: nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
        for name, shape in drawn.items()
    }


@pytest.fixture
def labels() -> dict[str, LossLabels]:
    return {
        "sup": LossLabels(
            torch.tensor([[0, 3], [1, -1], [2, -1], [4, -1], [-1, -1], [3, -1]]),
            torch.tensor([True, True, False, False, True, True]),
        ),
        "pse": LossLabels(
            torch.tensor([[8, 1, 2, 3, 4], *[[7, 6, -1, -1, -1]] * 5]), torch.ones(6, dtype=bool)
        ),
    }


def make_finetuner(encoder: Encoder, texts: dict[str, Tensor], settings: LossSettings, **adam) -> Finetuner:
    set_dropout(encoder.head, 0.0)
    slots = SlotModel(
        encoder.head, encoder.pooling, freeze="none" if settings.objective == "rank" else "qkvo"
    )
    kind = RankObjective if settings.objective == "rank" else Objective
    objective = kind(slots, texts, settings, logit_scale=SCALE)
    return Finetuner(objective, settings, AdamSettings(**adam))


def part(features: Features, rows: slice) -> Features:
    return Features(features.cells[rows], features.prefix[rows], features.height, features.width)


def test_a_step_follows_the_gradient_of_the_weighted_losses(encoder, features, texts, labels):
    """The weights after a step are those of a plain Adam step on γ_sup·L_sup + γ_pse·L_pse, written out."""
    settings = LossSettings(gamma_sup=0.5, gamma_pse=3.0, null_weight=0.2)
    finetuner = make_finetuner(encoder, texts, settings, lr=1e-3, weight_decay=0.1)
    slots = finetuner.objective.slots
    losses = [
        SetLoss(texts[name], logit_scale=SCALE, null_weight=0.2, is_ranked=name == "pse")
        for name in ("sup", "pse")
    ]
    known = labels["sup"].is_known
    vectors = slots(features)
    sums = [losses[0](vectors[known], labels["sup"].labels[known]), losses[1](vectors, labels["pse"].labels)]
    means = [each.loss / each.weight for each in sums]
    (0.5 * means[0] + 3.0 * means[1]).backward()
    expected = {}
    for name, value in slots.named_parameters():
        if value.requires_grad:
            gradient = value.grad + 0.1 * value.detach()
            expected[name] = value.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
    slots.zero_grad()
    found = finetuner.step(features, labels, epoch=0, step=0)
    assert found["sup"].mean == pytest.approx(means[0].item(), rel=1e-5)
    assert found["pse"].mean == pytest.approx(means[1].item(), rel=1e-5)
    assert (found["sup"].num_matched, found["sup"].num_dropped) == (4, 0)
    assert (found["pse"].num_matched, found["pse"].num_dropped) == (14, 1)
    for name, value in slots.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_only_what_is_trained_changes(encoder, features, texts, labels):
    finetuner = make_finetuner(encoder, texts, LossSettings(), lr=1e-2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for step in range(3):
        finetuner.step(features, labels, epoch=0, step=step)
    after = encoder.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"head.{name}" for name, _ in encoder.head.named_parameters()}
    assert finetuner.objective.losses["sup"].null_logit != 0


def test_an_image_that_is_not_labelled_has_no_part_in_the_loss_on_labels(encoder, features, texts, labels):
    """Whatever its labels are; nor does an image of which nothing is known change anything at all."""
    settings = LossSettings(("sup",))
    means = []
    for other in (2, 4):
        changed = labels["sup"].labels.clone()
        changed[2:4] = other
        sup = labels["sup"]._replace(labels=changed)
        sums = make_finetuner(encoder, texts, settings).objective(features, {"sup": sup}).sums["sup"]
        means.append(sums.loss / sums.weight)
    assert means[0] == means[1]
    nothing = labels["sup"]._replace(is_known=torch.zeros(6, dtype=bool))
    finetuner = make_finetuner(encoder, texts, settings, lr=1e-2)
    before = {name: value.clone() for name, value in encoder.head.named_parameters()}
    assert finetuner.step(features, {"sup": nothing}, epoch=0, step=0)["sup"].mean == 0.0
    for name, value in encoder.head.named_parameters():
        assert torch.equal(value, before[name])


def test_candidates_bound_the_softmax(encoder, features, texts, labels):
    """With no other candidate than its one label and no ∅, an image's loss is 0."""
    one = LossLabels(torch.arange(5)[:, None], torch.ones(5, dtype=bool), candidates=torch.eye(5, dtype=bool))
    finetuner = make_finetuner(encoder, texts, LossSettings(("sup",), null_weight=0.0))
    found = finetuner.step(part(features, slice(5)), {"sup": one}, epoch=0, step=0)
    assert found["sup"].mean == pytest.approx(0.0, abs=1e-6)
    everything = one._replace(candidates=None)
    assert finetuner.step(part(features, slice(5)), {"sup": everything}, epoch=0, step=1)["sup"].mean > 0.1


@pytest.mark.parametrize("objective", ["set", "rank"])
def test_steps_make_the_loss_smaller(encoder, features, texts, labels, objective):
    finetuner = make_finetuner(encoder, texts, LossSettings(objective=objective), lr=3e-3)
    losses = [finetuner.step(features, labels, epoch=0, step=step) for step in range(30)]
    for name in ("sup", "pse"):
        assert losses[-1][name].mean < 0.97 * losses[0][name].mean


def test_it_goes_on_from_a_state_as_if_nothing_had_happened(encoder, features, texts, labels, tmp_path):
    finetuner = make_finetuner(encoder, texts, LossSettings(), lr=1e-3)
    for step in range(2):
        finetuner.step(features, labels, epoch=0, step=step)
    torch.save(finetuner.state(), tmp_path / "state.pt")
    finetuner.step(features, labels, epoch=0, step=2)
    again = make_finetuner(
        load_encoder(untrained_bundle("picturebook", HEAD), "cpu"), texts, LossSettings(), lr=1e-3
    )
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    again.step(features, labels, epoch=0, step=2)
    for name, value in finetuner.trained.items():
        assert torch.equal(value, again.trained[name]), name


def test_a_state_of_another_model_is_refused(encoder, features, texts):
    with_null = make_finetuner(encoder, texts, LossSettings())
    without = make_finetuner(encoder, texts, LossSettings(null_weight=0.0))
    with pytest.raises(ValueError, match="other trained weights"):
        without.restore(with_null.state())


def test_vectors_that_are_not_finite_stop_it_before_anything_changes(encoder, features, texts, labels):
    finetuner = make_finetuner(encoder, texts, LossSettings(), lr=1e-2)
    before = {name: value.detach().clone() for name, value in finetuner.trained.items()}
    cells = features.cells.clone()
    cells[2:4] = torch.nan
    broken = Features(cells, features.prefix, features.height, features.width)
    with pytest.raises(HaltedError, match="epoch 3, step 7: the vectors of 2 images are not finite; take"):
        finetuner.step(broken, labels, epoch=2, step=7)
    for name, value in finetuner.trained.items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        next(iter(finetuner.trained.values())).fill_(torch.inf)
    with pytest.raises(HaltedError, match=r"epoch 3: slots.head.slots is not finite"):
        finetuner.check(2)


def test_the_learning_rate_rises_stays_and_drops(encoder, features, texts, labels):
    adam = AdamSettings(lr=1.0, lr_drop_epoch=15, warmup_steps=4)
    assert [adam.lr_at(0, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert (adam.lr_at(14, 10**6), adam.lr_at(15, 10**6), adam.lr_at(24, 10**6)) == (1.0, 0.1, 0.1)
    assert AdamSettings(lr=1.0, lr_drop_epoch=None).lr_at(99, 0) == 1.0
    finetuner = make_finetuner(encoder, texts, LossSettings(), lr=1.0, lr_drop_epoch=1, warmup_steps=2)
    finetuner.step(features, labels, epoch=0, step=0)
    assert finetuner.optimizer.param_groups[0]["lr"] == 0.5
    assert finetuner.optimizer.defaults["betas"] == (0.9, 0.999)


def test_dropout_is_given_to_all_parts_of_the_head(encoder, features, texts, labels):
    set_dropout(encoder.head, 0.5)
    assert {each.p for each in encoder.head.modules() if isinstance(each, nn.Dropout)} == {0.5}
    assert {each.dropout for each in encoder.head.modules() if isinstance(each, nn.MultiheadAttention)} == {
        0.5
    }


def test_an_images_score_is_its_best_kept_slot():
    vectors = nn.functional.normalize(
        torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    text = nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    scores = max_cosines(vectors, text)
    expected = [[max(float(slot @ name) for slot in image) for image in vectors] for name in text]
    torch.testing.assert_close(scores, torch.tensor(expected))
    only_first = max_cosines(vectors, text, keep_threshold=1e-6 - 1)  # every later slot is like the first
    torch.testing.assert_close(only_first, (vectors[:, 0] @ text.T).T)


def worker(rank: int, place: str, features: Features, texts, labels, settings: LossSettings, told) -> None:
    """Of two: one step on its half of the batch; rank 0 saves gradients and means."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    rows = slice(rank, None, 2)
    mine = {
        name: LossLabels(each.labels[rows], each.is_known[rows], most_rows=3) for name, each in labels.items()
    }
    encoder = load_encoder(untrained_bundle("picturebook", HEAD), "cpu")
    finetuner = make_finetuner(encoder, texts, settings, lr=1e-3)
    means = finetuner.step(part(features, rows), mine, epoch=0, step=0)
    told[rank] = [mean.mean for mean in means.values()]
    torch.save(
        {name: value.grad for name, value in finetuner.trained.items()}, f"{place}/gradients-{rank}.pt"
    )
    distributed.destroy_process_group()


@pytest.mark.parametrize("objective", ["set", "rank"])
@pytest.mark.parametrize("num_images", [6, 5])
def test_two_workers_have_the_gradient_of_one(
    encoder, features, texts, labels, tmp_path, objective, num_images
):
    """Though one has more labelled images, or images, and one of them more labels than slots."""
    settings = LossSettings(gamma_pse=2.0, objective=objective)
    features = part(features, slice(num_images))
    labels = {
        name: LossLabels(each.labels[:num_images], each.is_known[:num_images])
        for name, each in labels.items()
    }
    finetuner = make_finetuner(encoder, texts, settings, lr=1e-3)
    means = finetuner.step(features, labels, epoch=0, step=0)
    with multiprocessing.get_context("spawn").Manager() as manager:  # a fork may hang beside Ray
        told = manager.dict()
        arguments = (str(tmp_path), features, texts, labels, settings, told)
        multiprocessing.spawn(worker, arguments, nprocs=2)
        for rank in range(2):
            assert told[rank] == pytest.approx([mean.mean for mean in means.values()], rel=1e-5)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True)
        for name, value in finetuner.trained.items():
            scale = value.grad.abs().max().item()
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_the_learning_rate_rises_and_falls_along_half_a_cosine():
    adam = AdamSettings(lr=2.0, lr_drop_epoch=None, warmup_steps=2, num_steps=8)
    rates = [adam.lr_at(0, step) for step in (0, 1, 2, 4, 8)]
    assert rates == pytest.approx([1.0, 1 + math.cos(math.pi / 8), 1 + math.cos(math.pi / 4), 1.0, 0.0])
