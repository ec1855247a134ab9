"""A random Llama of three blocks with a tokenizer of made-up words: deterministic, and quick to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from saeffect.lm.language_model import LanguageModel
from saeffect.steering import Site, SteeringPlan

D_MODEL = 32
D_VOCAB = 97
END = 2
HOOK = "blocks.1.hook_resid_pre"


class WordTokenizer:
    """Ids 0 to 2 are special, 3 and up are words: id 17 is the word "w17"."""

    eos_token_id = END
    all_special_ids = (0, 1, END)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(D_VOCAB - 2)}  # the last two rows of the unembedding are padding

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + (sum(word.encode()) % (D_VOCAB - 5)) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids if i > END)


class OneHotWords:
    """A text's vector counts its words "w3", "w4", ...; other words are unknown."""

    def mean_vector(self, text: str) -> np.ndarray | None:
        counts = np.zeros(D_VOCAB)
        for word in text.split():
            if word[1:].isdigit():
                counts[int(word[1:])] += 1
        return counts / counts.sum() if counts.sum() else None


def tiny_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return LanguageModel(model.to(dtype).eval().requires_grad_(False), WordTokenizer(), "tiny")


def site(lm: LanguageModel, W_dec: torch.Tensor) -> Site:
    return Site(lm, HOOK, W_dec, 4.0)


def changed(plan: SteeringPlan, **change: Any) -> SteeringPlan:
    return SteeringPlan(**plan.model_dump() | change)


def n_hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


__all__ = ["D_MODEL", "D_VOCAB", "END", "HOOK", "OneHotWords", "changed", "n_hooks", "site", "tiny_model"]
