"""Prompts, and the mean over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from for_ray.errors import ConfigError
from for_ray.model.text import SEVEN_PROMPTS, embed_names, fill, make_tokenizer

TABLE = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[sum(text.encode()) % 1000] for text in texts])


def encode_text(tokens: Tensor) -> Tensor:
    return TABLE[tokens[:, 0]]


@pytest.mark.parametrize("name", ["red car", "a red car", "The  red car ", "an red car.", "A red car"])
def test_an_article_and_a_full_stop_are_dropped(name: str) -> None:
    assert fill(SEVEN_PROMPTS, name)[:2] == ["itap of a red car.", "a bad photo of the red car."]


@pytest.mark.parametrize("name", ["anchor", "theatre", "A4 paper", "a", "banana"])
def test_only_articles_are_dropped(name: str) -> None:
    assert fill(["{}"], name) == [name]


@pytest.mark.parametrize("name", ["", "  ", ".", "a ."])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="say what to look for"):
        embed_names(["dog", name], prompts=["{}"], tokenize=tokenize, encode_text=encode_text)


def test_braces_in_a_name_are_letters() -> None:
    assert fill(["a {}."], "{0} {x}") == ["a {0} {x}."]


@pytest.mark.parametrize("texts_per_batch", [1, 7, 15, 1000])
def test_each_prompt_is_normalised_then_averaged_then_normalised(texts_per_batch: int) -> None:
    names = ["dog", "a red car", "tree", "house", "cup"]
    vectors = embed_names(
        names,
        prompts=SEVEN_PROMPTS,
        tokenize=tokenize,
        encode_text=encode_text,
        texts_per_batch=texts_per_batch,
    )
    for name, vector in zip(names, vectors, strict=True):
        each = [normalize(encode_text(tokenize([text])), dim=-1)[0] for text in fill(SEVEN_PROMPTS, name)]
        torch.testing.assert_close(vector, normalize(torch.stack(each).mean(dim=0), dim=-1))


def test_no_names_give_no_vectors() -> None:
    assert embed_names([], prompts=["{}"], tokenize=tokenize, encode_text=encode_text).shape == (0, 6)


def test_the_standard_tokenizer_has_the_towers_length_and_cuts_what_is_longer() -> None:
    tokens = make_tokenizer({"context_length": 24}, "tiny")(["dog " * 100, "dog"])
    assert tokens.shape == (2, 24)
    assert tokens[0, -1] == tokens[1].max()  # the end mark stays


def test_a_tokenizer_on_the_hub_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", unreachable)
    with pytest.raises(ConfigError, match=r"tokenizer timm/X of siglip .*Name or service not known"):
        make_tokenizer({"hf_tokenizer_name": "timm/X"}, "siglip")
