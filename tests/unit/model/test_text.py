"""Prompts, and the mean over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from for_ray.errors import ConfigError
from for_ray.model.text import SEVEN_PROMPTS, embed_names, fill, is_cut, make_tokenizer

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


def test_a_text_is_cut_where_the_last_of_its_tokens_has_no_place() -> None:
    cutting = make_tokenizer({"context_length": 8}, "tiny")
    assert not is_cut(["dog", " ".join(6 * ["dog"]), ""], cutting, context_length=8)
    for count in (7, 14, 15, 400):
        assert is_cut(["dog", " ".join(count * ["dog"])], cutting, context_length=8)


def test_a_text_is_cut_too_where_padding_and_the_end_are_one_token() -> None:
    def pad_with_ends(texts: list[str], context_length: int) -> Tensor:
        counts = [min(len(text.split()), context_length - 1) for text in texts]
        return torch.tensor([[2] * count + [1] * (context_length - count) for count in counts])

    assert not is_cut(["dog dog dog"], pad_with_ends, context_length=4)
    assert is_cut(["dog dog dog dog dog"], pad_with_ends, context_length=4)
    assert is_cut([50 * "dog "], pad_with_ends, context_length=4)


def test_a_tokenizer_on_the_hub_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", unreachable)
    with pytest.raises(ConfigError, match=r"tokenizer timm/X of siglip .*Name or service not known"):
        make_tokenizer({"hf_tokenizer_name": "timm/X"}, "siglip")
