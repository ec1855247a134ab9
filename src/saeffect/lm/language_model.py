"""A language model as the rest of the package sees it: weights, tokenizer, and a few sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeffect.errors import ConfigError
from saeffect.lm.bos import begun, bos_of
from saeffect.lm.packing import pack, separator_id
from saeffect.lm.tokenizers import (
    continued,
    known_tokens,
    ordinary_token,
    special_tokens,
    token_texts,
    tokenizer_identity,
)

if TYPE_CHECKING:
    from saeffect.lm.adapters import MergedAdapter

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
        shared: Ids that mean the same in every model that this one is compared with; None if it is alone.
        prepend_bos: Whether rows of text and prompts begin with the tokenizer's BOS token; None: as the tokenizer does.
    """

    model: Any
    tokenizer: Any
    name: str
    identity: str = ""
    adapter: MergedAdapter | None = None
    shared: frozenset[int] | None = None
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

    @property
    def n_positions(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None where its configuration names none."""
        config = self.model.config
        found = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
        return None if found is None else int(found)

    def refuse_rows(self, ids: NDArray[np.int32]) -> None:
        """Refuse rows of tokens `[n_rows, context_size]` that the model cannot read.

        Raises:
            ConfigError: They are longer than its positions, or hold an id without an embedding.
        """
        context, most = ids.shape[1], self.n_positions
        if most is not None and context > most:
            raise ConfigError(
                f"rows have {context:,} tokens; {self.name} takes {most:,}.",
                at="context_size",
                fix=f"set context_size to {most} or less.",
            )
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        n_embedded = min(self.d_vocab, int(self.model.get_input_embeddings().weight.shape[0]))
        if low < 0 or high >= n_embedded:
            named = known_tokens(self.tokenizer).get(high) if high >= n_embedded else None
            token = "" if named is None else f" ({named})"
            raise ConfigError(
                f"the text has token ids from {low} to {high}{token}, but {self.name} knows 0 to {n_embedded - 1}.",
                fix="make the rows with the tokenizer that was saved with this model, or resize the model's embedding.",
            )

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
        """Documents as rows of equal length for this model, see `saeffect.lm.packing.pack`.

        Raises:
            ConfigError: The tokenizer has no token to put between documents.
            EmptySelection: The whole text is shorter than one row.
        """
        separator = separator_id(self.tokenizer)
        return pack(texts, self.encode, context_size=context_size, separator=separator, bos=self.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        """What token ids add to the text before them, special tokens left out, spaces as they are."""
        return continued(self.tokenizer, [ids], self._before, skip_special_tokens=True)[0]

    @functools.cached_property
    def _before(self) -> int | None:
        return ordinary_token(self.tokenizer)

    @functools.cached_property
    def _token_strings(self) -> tuple[str, ...]:
        return tuple(token_texts(self.tokenizer, self.d_vocab))

    def token_strings(self) -> list[str]:
        """One decoded string per id, `d_vocab` of them: a leading space stays; half a character is U+FFFD."""
        return list(self._token_strings)

    def plain_tokens(self) -> torch.Tensor:
        """Which ids may be top tokens or be written, bool `[d_vocab]`: known to the tokenizer, shared, not special."""
        return self._plain_tokens.clone()

    @functools.cached_property
    def _plain_tokens(self) -> torch.Tensor:
        # Kept: reading a vocabulary takes most of a second, and every batch of texts asks.
        known = known_tokens(self.tokenizer).keys() - special_tokens(self.tokenizer)
        if self.shared is not None:
            known &= self.shared
        plain = torch.zeros(self.d_vocab, dtype=torch.bool)
        plain[[i for i in known if i < self.d_vocab]] = True
        return plain

    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the tokens, their ids and the rules: equal when two models cut every text alike."""
        return tokenizer_identity(self.tokenizer)


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """A model's logits on 16 fixed tokens, spread over its vocabulary: what it does, for comparisons.

    Returns:
        float32 `[16, d_vocab]`, on the CPU.
    """
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(1, 17) * max(1, len(weight) // 18)) % len(weight)
    return model(input_ids=ids[None].to(weight.device), use_cache=False).logits[0].float().cpu()
