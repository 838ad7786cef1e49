"""Captions of training scenes claim what is true of their scene, and say what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.datasets import captioned
from for_ray.datasets.backdrops import MOODS
from for_ray.datasets.captioned import Scene, SceneKind, claims_of, draw_scene, num_claims, write_caption
from for_ray.datasets.scenes import COLOURS, SceneStyle

KIND = SceneKind(64, (1, 4), SceneStyle((0.2, 0.6), 10, 0.1, 0.1, (-0.5, 1), 0.5))
PROMPTS = ("a photo of the {}.",)


def scene(*objects: tuple[str, str], mood: int = -1) -> Scene:
    names, colours = captioned.training_names(), list(COLOURS)
    held = tuple((names.index(name), colours.index(colour)) for name, colour in objects)
    return Scene(np.zeros((64, 64, 3), np.uint8), held, mood)


def test_no_training_family_is_the_data_sets() -> None:
    assert "material" not in captioned.TRAINING_FAMILIES
    drawn_by = {family for glyphs in captioned.training_glyphs().values() for family in glyphs}
    assert drawn_by == set(captioned.TRAINING_FAMILIES)
    assert len(captioned.training_names()) == 307


def test_every_caption_is_true_of_its_scene() -> None:
    rng = np.random.default_rng(0)
    backdrops = captioned.paint_backdrops(rng, 8)
    for _ in range(60):
        drawn = draw_scene(rng, KIND, backdrops)
        assert drawn.pixels.shape == (64, 64, 3)
        if not drawn.objects:
            continue
        claims = claims_of(drawn.objects, drawn.mood)
        assert max(claims) < num_claims()
        caption = write_caption(rng, drawn, PROMPTS)
        assert set(caption.claims) <= claims
        assert caption.text


def test_the_same_generator_draws_the_same_scene() -> None:
    def draw() -> Scene:
        rng = np.random.default_rng(5)
        return draw_scene(rng, KIND, captioned.paint_backdrops(rng, 2), only=3)

    first, second = draw(), draw()
    assert np.array_equal(first.pixels, second.pixels)
    assert first.objects == second.objects
    assert [name for name, _ in first.objects] == [3]


def test_claims_are_names_colours_and_the_mood() -> None:
    names, colours = len(captioned.training_names()), len(COLOURS)
    held = scene(("dog", "red"), ("dog", "blue"), mood=2)
    dog = held.objects[0][0]
    expected = {dog, names + dog * colours + 0, names + dog * colours + 4, names * (1 + colours) + 2}
    assert claims_of(held.objects, held.mood) == expected
    assert num_claims() == names * (1 + colours) + len(MOODS)


def test_bare_captions_are_names_alone() -> None:
    rng = np.random.default_rng(0)
    held = scene(("umbrella", "red"), mood=0)
    texts = {write_caption(rng, held, PROMPTS, bare=True).text for _ in range(80)}
    assert texts == {"umbrella", "an umbrella"}


def test_captions_count_and_colour_what_is_there() -> None:
    rng = np.random.default_rng(1)
    held = scene(("dog", "red"), ("dog", "red"), ("bus", "blue"), mood=0)
    texts = {write_caption(rng, held, PROMPTS).text for _ in range(600)}
    assert {"a dog", "two red dogs", "a blue bus", "a photo of the bus.", "a bus and two dogs"} <= texts
    assert "a dog at night" in texts
    assert not any("blue dog" in text or "red bus" in text or "a two" in text for text in texts)


@pytest.mark.parametrize(
    ("phrase", "whole"), [("anchor", "an anchor"), ("two cars", "two cars"), ("bus", "a bus")]
)
def test_articles(phrase: str, whole: str) -> None:
    assert captioned._with_article(phrase) == whole
