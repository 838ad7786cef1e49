"""Names and questions as vectors of the joint space, through an ensemble of prompts.

Source: FOR, appendix (the seven best CLIP prompts, as OWL-ViT uses them); CLIP's prompt-engineering notebook.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from for_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SEVEN_PROMPTS = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def fill(prompts: Sequence[str], name: str) -> list[str]:
    """The prompts with a name in place of `{}`.

    A leading article and a full stop at the end go first, since the prompts bring their own: "a red car"
    becomes "itap of a red car.", not "itap of a a red car.". That holds for whole sentences too.

    Raises:
        ConfigError: Nothing is left of the name.
    """
    bare = " ".join(name.split())
    bare = _ARTICLE.sub("", bare).rstrip(" .")
    if not bare:
        raise ConfigError(f"the query {name!r} is empty: say what to look for, such as 'a red car'")
    return [prompt.replace("{}", bare) for prompt in prompts]


def embed_names(
    names: Sequence[str],
    *,
    prompts: Sequence[str],
    tokenize: Callable[[list[str]], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    texts_per_batch: int = 512,
) -> Tensor:
    """Embed names by the mean over the prompts: each normalised, averaged, normalised again.

    Args:
        names: Q names; may be empty.
        prompts: Each with `{}` once.
        tokenize: Texts to token ids [n, L]; what is too long is cut off.
        encode_text: Token ids to vectors [n, D], not normalised.
        texts_per_batch: How many texts (names × prompts) go through the tower together.

    Returns:
        [Q, D], float32, unit length, on the tower's device.

    Raises:
        ConfigError: A name is empty.
    """
    import torch
    from torch.nn import functional

    if not names:
        return functional.normalize(encode_text(tokenize(["nothing"])).float()[:0], dim=-1)
    num_names = max(1, texts_per_batch // len(prompts))
    means = []
    for start in range(0, len(names), num_names):
        part = names[start : start + num_names]
        texts = [text for name in part for text in fill(prompts, name)]
        vectors = functional.normalize(encode_text(tokenize(texts)).float(), dim=-1)
        means.append(vectors.view(len(part), len(prompts), -1).mean(dim=1))  # [n·P, D] -> [n, D]
    return functional.normalize(torch.cat(means), dim=-1)


def context_length_of(text_config: dict[str, object]) -> int:
    """Tokens that a text tower reads, by `text_cfg` of the model config."""
    return int(str(text_config.get("context_length", 77)))


def is_cut(texts: Sequence[str], tokenize: Callable[..., Tensor], *, context_length: int) -> bool:
    """Whether a tokenizer cuts one of the texts off, so that nobody reads its end.

    Args:
        texts: As the tower is given them.
        tokenize: From `make_tokenizer`.
        context_length: Tokens that the tower reads.
    """
    tokens = tokenize([*texts, ""], context_length=2 * context_length)  # [n + 1, 2·L]
    first_unread = tokens[:, context_length]
    return bool((first_unread[:-1] != first_unread[-1]).any())  # of the empty text it is padding


def make_tokenizer(text_config: dict[str, object], model_name: str) -> Callable[..., Tensor]:
    """The tokenizer that belongs to a text tower: texts [n] to token ids [n, L], or `context_length` others.

    Args:
        text_config: `text_cfg` of the model config.
        model_name: open_clip's name, for those whose tokenizer is known by name alone; else anything.

    Raises:
        ConfigError: It comes from a model hub that can't be reached, or its library is not installed.
    """
    from open_clip import SimpleTokenizer
    from open_clip.tokenizer import HFTokenizer

    context_length = context_length_of(text_config)
    hub_name = text_config.get("hf_tokenizer_name")
    options = dict(text_config.get("tokenizer_kwargs") or {})  # type: ignore[call-overload]
    if not hub_name:
        return SimpleTokenizer(context_length=context_length, **options)  # type: ignore[no-any-return]
    try:
        return HFTokenizer(  # type: ignore[no-any-return]
            hub_name,
            context_length=context_length,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            **options,
        )
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no tokenizer
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigError(
            f"the tokenizer {hub_name} of {model_name} is not on this disk and can't be fetched ({reason}): "
            f"let this machine reach the model hub once, or copy its cache here"
        ) from error
