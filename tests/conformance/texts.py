"""Encoders of text and pictures, tiny, for pipelines that cannot do without or are to be called with a prompt."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from commands import TINY_PIPELINE
from conformance.parts import drawn
from torch import nn

PROMPTS = ("a photo of a red fox in the snow", "two cats and a dog on a green sofa by the window")


@functools.cache
def _tokenizer(number: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY_PIPELINE / f"tokenizer{number}")


def clip_tokenizer() -> Any:
    """A CLIP tokenizer with a vocabulary of its own, of at most 32 tokens."""
    return _tokenizer("")


def t5_tokenizer() -> Any:
    """The tokenizer that stands for T5's."""
    return _tokenizer("_3")


def clip_text(width: int = 28, projected: bool = False) -> nn.Module:
    """A text encoder whose states have ``width`` channels; with a projection where asked."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=22,
        eos_token_id=clip_tokenizer().eos_token_id,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return drawn(cls(config))


def t5(width: int = 28) -> nn.Module:
    """A T5 encoder whose states have ``width`` channels."""
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
    )  # fmt: skip
    return drawn(transformers.T5EncoderModel(config))


def clip_vision(width: int = 28, size: int = 32, patch: int = 8) -> nn.Module:
    """A picture encoder whose projection has ``width`` channels."""
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, projection_dim=width, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=patch,
    )  # fmt: skip
    return drawn(transformers.CLIPVisionModelWithProjection(config))


def clip_pictures(size: int = 32) -> Any:
    """What prepares pictures for `clip_vision`."""
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
