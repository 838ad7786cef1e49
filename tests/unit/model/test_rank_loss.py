"""The ranking loss against closed forms and a plain loop, its teacher against windows cut by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from for_ray.model.backbone import Features
from for_ray.model.encoder import load_encoder
from for_ray.model.objectives import LossLabels, LossSettings, RankObjective
from for_ray.model.rank_loss import Rows, WindowTeacher, rank_loss
from for_ray.model.slot_model import SlotModel
from for_ray.model.trained_bundle import HeadSettings, untrained_bundle


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(scores: Tensor, teacher: Tensor | None = None, *, num_labels: int = 0, **given: Tensor) -> Rows:
    """Without labels, and with all images, unless given."""
    nothing = torch.zeros((len(scores), num_labels), dtype=torch.bool)
    values = {"is_positive": nothing, "is_negative": nothing, "is_known": torch.ones(len(scores)).bool()}
    return Rows(scores, torch.zeros_like(scores) if teacher is None else teacher, **(values | given))


def divergence(target: list[float], scores: Tensor) -> float:
    """KL(target ‖ softmax of the scores), written out."""
    total = sum(math.exp(score) for score in scores.tolist())
    return sum(
        p * math.log(p / (math.exp(score) / total))
        for p, score in zip(target, scores.tolist(), strict=True)
        if p
    )


def test_without_labels_it_is_the_divergence_from_the_teacher_of_each_name() -> None:
    scores, teacher = draw(5, 3), draw(5, 3, seed=1)
    found = rank_loss(rows(scores, teacher), has_teacher=True)
    target = teacher.softmax(dim=0)
    expected = sum(divergence(target[:, name].tolist(), scores[:, name]) for name in range(3))
    assert float(found.others) == pytest.approx(expected)
    assert (int(found.num_others), int(found.num_labelled)) == (3, 0)
    assert float(rank_loss(rows(teacher, teacher), has_teacher=True).others) == pytest.approx(0, abs=1e-12)


def test_labels_correct_the_teacher() -> None:
    """Of four images the first is labelled with the name, the second without; the others keep theirs."""
    scores, teacher = draw(4, 2), torch.tensor([[0.0, 1.0], [9.0, 0.5], [1.0, 0.0], [2.0, 2.0]]).double()
    labels = {
        "is_positive": torch.tensor([[True], [False], [False], [False]]),
        "is_negative": torch.tensor([[False], [True], [False], [False]]),
    }
    found = rank_loss(rows(scores, teacher, **labels), has_teacher=True)
    weights = [math.exp(9), 0.0, math.exp(1), math.exp(2)]
    target = [weight / sum(weights) for weight in weights]
    assert float(found.labelled) == pytest.approx(divergence(target, scores[:, 0]))
    assert float(found.others) == pytest.approx(
        divergence(teacher[:, 1].softmax(dim=0).tolist(), scores[:, 1])
    )
    assert (int(found.num_others), int(found.num_labelled)) == (1, 1)


def test_a_name_that_no_labelled_image_shows_stays_with_the_teacher() -> None:
    scores, teacher = draw(3, 1), draw(3, 1, seed=1)
    absent = torch.ones((3, 1), dtype=torch.bool)
    found = rank_loss(rows(scores, teacher, num_labels=1, is_negative=absent), has_teacher=True)
    assert float(found.others) == pytest.approx(
        float(rank_loss(rows(scores, teacher), has_teacher=True).others)
    )


def test_without_a_teacher_labelled_images_share_the_target_and_the_others_take_no_part() -> None:
    scores = draw(4, 2)
    positive = torch.tensor([[True, False], [True, False], [False, False], [False, False]])
    negative = torch.tensor([[False, True], [False, True], [True, True], [False, False]])
    found = rank_loss(rows(scores, is_positive=positive, is_negative=negative), has_teacher=False)
    assert float(found.labelled) == pytest.approx(divergence([0.5, 0.5, 0.0], scores[:3, 0]))
    assert (int(found.num_labelled), int(found.num_others), float(found.others)) == (1, 0, 0.0)


def test_an_image_that_takes_no_part_changes_nothing() -> None:
    scores, teacher = draw(4, 3), draw(4, 3, seed=1)
    known = torch.tensor([True, True, False, True])
    positive = torch.tensor([[True], [False], [True], [False]])
    all_of = rows(scores, teacher, is_positive=positive, is_negative=~positive, is_known=known)
    kept = Rows(*(part[known] for part in all_of))
    for found, expected in zip(
        rank_loss(all_of, has_teacher=True), rank_loss(kept, has_teacher=True), strict=True
    ):
        torch.testing.assert_close(found, expected)
    nothing = rank_loss(all_of._replace(is_known=torch.zeros(4).bool()), has_teacher=True)
    assert [float(each) for each in nothing] == [0, 0, 0, 0]


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_gradient_is_that_of_finite_differences(has_teacher: bool) -> None:
    scores = draw(5, 4).requires_grad_()
    positive = torch.rand((5, 4 if not has_teacher else 2), generator=torch.Generator().manual_seed(2)) < 0.4
    known = torch.tensor([True, True, True, True, False])
    teacher = draw(5, 4, seed=1) if has_teacher else None

    def loss(scores: Tensor) -> Tensor:
        given = rows(scores, teacher, is_positive=positive, is_negative=~positive, is_known=known)
        found = rank_loss(given, has_teacher=has_teacher)
        return found.labelled + 2 * found.others

    assert torch.autograd.gradcheck(loss, scores)


@pytest.fixture(scope="module")
def encoder():
    head = HeadSettings(num_slots=4, num_layers=1, feedforward_width=32, seed=1)
    return load_encoder(untrained_bundle("picturebook", head), "cpu")


@pytest.fixture(scope="module")
def features(encoder) -> Features:
    cells = draw(3, 36, encoder.pooling.width, dtype=torch.float32)
    return Features(cells, cells.mean(dim=1, keepdim=True), 6, 6)


def test_the_teacher_is_the_mean_of_the_best_window_of_each_size(encoder, features) -> None:
    text = functional.normalize(draw(5, encoder.dim, seed=3, dtype=torch.float32), dim=1)
    found = WindowTeacher(encoder.pooling)(features, text)
    cells = encoder.pooling.project_cells(features).detach().reshape(3, 6, 6, -1)
    for image in range(3):
        for name in range(5):
            best = []
            for side in (1, 2, 3):
                windows = [
                    cells[image, y : y + side, x : x + side].reshape(side * side, -1).mean(dim=0)
                    for y in range(7 - side)
                    for x in range(7 - side)
                ]
                best.append(max(float(functional.normalize(each, dim=0) @ text[name]) for each in windows))
            assert float(found[image, name]) == pytest.approx(sum(best) / 3, abs=1e-5)


def test_the_teacher_stays_what_it_was_while_the_pooling_is_tuned(encoder, features) -> None:
    head = load_encoder(encoder.bundle, "cpu")
    text = functional.normalize(draw(5, head.dim, seed=3, dtype=torch.float32), dim=1)
    teacher = WindowTeacher(head.pooling)
    before = teacher(features, text)
    with torch.no_grad():
        head.pooling.pool.v_proj.weight.mul_(2).add_(0.1)
    torch.testing.assert_close(teacher(features, text), before)
    assert not any(each.requires_grad for each in teacher.parameters())


def test_a_name_of_both_lists_is_learnt_once_and_drawn_names_alone(encoder, features) -> None:
    text = functional.normalize(draw(6, encoder.dim, seed=3, dtype=torch.float32), dim=1)
    slots = SlotModel(encoder.head, encoder.pooling, freeze="none")
    objective = RankObjective(
        slots, {"sup": text[:2], "pse": text[1:]}, LossSettings(objective="rank"), logit_scale=10.0
    )
    assert len(objective.others) == 4
    known = torch.ones(3, dtype=torch.bool)
    labels = {
        "sup": LossLabels(torch.tensor([[0], [-1], [-1]]), known),
        "pse": LossLabels(torch.full((3, 1), -1), known),
    }
    sums = objective(features, labels).sums
    assert (float(sums["sup"].weight), float(sums["pse"].weight)) == (1, 5)  # 2 + 4 names
    labels["pse"] = labels["pse"]._replace(names=torch.tensor([3, 0]))
    assert float(objective(features, labels).sums["pse"].weight) == 3
    assert int(objective(features, labels).sums["sup"].num_matched) == 1


def test_absence_counts_only_where_it_is_annotated(encoder, features) -> None:
    """LVIS: of an image's categories that are neither labels nor annotated as absent nothing is known."""
    text = functional.normalize(draw(2, encoder.dim, seed=3, dtype=torch.float32), dim=1)
    slots = SlotModel(encoder.head, encoder.pooling, freeze="none")
    objective = RankObjective(
        slots, {"sup": text}, LossSettings(("sup",), objective="rank"), logit_scale=10.0
    ).eval()
    labels = LossLabels(torch.tensor([[0], [1], [-1]]), torch.ones(3, dtype=torch.bool))
    candidates = torch.tensor([[True, False], [True, True], [False, False]])
    found = objective(features, {"sup": labels._replace(candidates=candidates)}).sums["sup"]
    scores = 10.0 * (slots(features) @ text.T).amax(dim=1)
    expected = divergence([1.0, 0.0], scores[:2, 0]) + divergence([1.0], scores[1:2, 1])
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(found.weight) == 2
