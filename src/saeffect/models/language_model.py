"""A language model as the rest of the package sees it: weights, tokenizer, and a few sizes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeffect.text.bos import begun, bos_of
from saeffect.text.packing import pack, separator_id

if TYPE_CHECKING:
    from saeffect.models.adapters import MergedAdapter

__all__ = ["LanguageModel", "probe_logits"]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    Attributes:
        model: The transformers model, in evaluation mode; its parameters take no gradients.
        tokenizer: The transformers tokenizer.
        name: What the user called it; adapters are appended with a plus sign.
        identity: SHA-256 of the files it came from, for fingerprints.
        adapter: What merging its adapter was seen to do; None without one.
        prepend_bos: Whether rows of text and prompts begin with the tokenizer's BOS token; None: as the tokenizer does.
    """

    model: Any
    tokenizer: Any
    name: str
    identity: str = ""
    adapter: MergedAdapter | None = None
    prepend_bos: bool | None = None

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<LanguageModel {self.name}: {type(self.model).__name__}, {size:,} parameters in {dtype}>"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def n_layers(self) -> int:
        config = self.model.config
        return int(getattr(config, "num_hidden_layers", None) or config.get_text_config().num_hidden_layers)

    @property
    def d_vocab(self) -> int:
        """How many token ids the model scores (rows of its unembedding, padding rows included)."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The token that every row of text and every prompt begins with; None for none.

        Nothing is measured at it and no intervention touches it; what comes after is predicted from it.

        Raises:
            ConfigError: There is to be one and the tokenizer has none, or it puts several before a text.
        """
        return bos_of(self.tokenizer, self.prepend_bos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that the model is to go on from: as `encode`, after the BOS token if there is one."""
        return begun(self.encode(text), self.bos_id)

    def n_bos(self, ids: Sequence[int] | NDArray[np.int32]) -> int:
        """How many tokens at the beginning of a row or a prompt are BOS, 0 or 1: they are no text."""
        return int(len(ids) > 0 and self.bos_id is not None and int(ids[0]) == self.bos_id)

    def pack(self, texts: Iterable[str], context_size: int) -> Iterator[NDArray[np.int32]]:
        """Documents as rows of equal length for this model, see `saeffect.text.packing.pack`.

        Raises:
            ConfigError: The tokenizer has no token to put between documents.
            EmptySelection: The whole text is shorter than one row.
        """
        separator = separator_id(self.tokenizer)
        return pack(texts, self.encode, context_size=context_size, separator=separator, bos=self.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @functools.cached_property
    def _token_strings(self) -> tuple[str, ...]:
        known = len(self.tokenizer)
        decode = self.tokenizer.decode
        strings = [decode([i], clean_up_tokenization_spaces=False) for i in range(min(known, self.d_vocab))]
        return tuple(strings + [f"<unused {i}>" for i in range(len(strings), self.d_vocab)])

    def token_strings(self) -> list[str]:
        """One decoded string per id, `d_vocab` of them: a leading space stays; half a character is U+FFFD."""
        return list(self._token_strings)

    def plain_tokens(self) -> torch.Tensor:
        """Which ids may appear among top tokens, bool `[d_vocab]`: known to the tokenizer and not special."""
        plain = torch.zeros(self.d_vocab, dtype=torch.bool)
        plain[: min(len(self.tokenizer), self.d_vocab)] = True
        special = [i for i in self.tokenizer.all_special_ids if i < self.d_vocab]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special += [i for i, token in added.items() if token.special and i < self.d_vocab]
        plain[special] = False
        return plain

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary (token to id): equal when two models speak the same tokens."""
        digest = hashlib.sha256()
        for token, index in sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{index}\0{token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """A model's logits on 16 fixed tokens, spread over its vocabulary: what it does, for comparisons.

    Returns:
        float32 `[16, d_vocab]`, on the CPU.
    """
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(1, 17) * max(1, len(weight) // 18)) % len(weight)
    return model(input_ids=ids[None].to(weight.device), use_cache=False).logits[0].float().cpu()
