"""A language model as the rest of the package uses it: weights, tokenizer, sizes, and a faster forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saeffect.config_chat import Prompt, plain_messages
from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.chat import ChatFormat, Encoded, Parts
from saeffect.lm.tokens import (
    ContinuationDecoder,
    find_bos_id,
    known_tokens,
    separator_id,
    special_tokens,
    token_texts,
    with_bos,
)

__all__ = ["LanguageModel", "MergedAdapter", "causal_attention", "fused", "input_device", "probe_logits"]


@dataclass(frozen=True)
class MergedAdapter:
    """Effect of an adapter on a few fixed tokens; of a merged one in float32.

    Attributes:
        effect: Largest change of a logit by the adapter.
        error: Largest difference between the merged and the unmerged model's logits: rounding; 0 if kept unmerged.
        other_base: One line if the adapter names another base model.
    """

    effect: float
    error: float
    other_base: str | None = None


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    Attributes:
        model: In evaluation mode; its parameters take no gradients.
        name: What the user called it; adapters are appended with a plus sign.
        identity: SHA-256 of the files it came from, for fingerprints.
        adapter: Effect of merging its adapter; None without one.
        shared: Ids that mean the same in every model that this one is compared with; None if it is alone.
        prepend_bos: Whether rows of text and prompts begin with the tokenizer's BOS token; None: as the tokenizer does,
            and conversations as the chat template writes them.
        chat: How conversations are written; None: by the tokenizer's own chat template.
    """

    model: Any
    tokenizer: Any
    name: str
    identity: str = ""
    adapter: MergedAdapter | None = None
    shared: frozenset[int] | None = None
    prepend_bos: bool | None = None
    chat: ChatFormat | None = None

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<LanguageModel {self.name}: {type(self.model).__name__}, {size:,} parameters in {dtype}>"

    @property
    def device(self) -> torch.device:
        """Where token ids go; a model that is spread over devices moves what it needs itself."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; quantised weights are packed in another."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def d_model(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def n_layers(self) -> int:
        config = self.model.config
        return int(getattr(config, "num_hidden_layers", None) or config.get_text_config().num_hidden_layers)

    @property
    def d_vocab(self) -> int:
        """Number of token ids that the model scores (rows of its unembedding, padding rows included)."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def n_positions(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None if its configuration names none."""
        config = self.model.config
        found = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
        return None if found is None else int(found)

    def refuse_rows(self, ids: NDArray[np.int32]) -> None:
        """ConfigError if rows `[n_rows, context_size]` are too long or hold an id without an embedding."""
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
        """The first token of every row and prompt, or None (see `find_bos_id`); neither measured nor intervened on."""
        return find_bos_id(self.tokenizer, self.prepend_bos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a text to continue, after the BOS token if there is one; of a chat, up to the reply
        (ConfigError if the chat template refuses it).
        """
        if isinstance(prompt, str):
            return with_bos(self.encode(prompt), self.bos_id)
        return self.encode_chat(plain_messages(prompt), reply=True).ids

    def prompt_parts(self, prompt: Prompt) -> Parts | None:
        """Who says each token of a chat prompt, int8, one a token of `encode_prompt`; None for plain text."""
        return None if isinstance(prompt, str) else self.encode_chat(plain_messages(prompt), reply=True).parts

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How conversations are written; ConfigError without a chat template."""
        return self.chat or ChatFormat.of(self.tokenizer)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, begins: bool = True
    ) -> Encoded:
        """A conversation's token ids, one BOS in front if there is to be one, and who says each; see `ChatFormat`.
        Within a row, where it does not begin (`begins`), there is no BOS.
        """
        ids, parts = self.chat_format.encode(messages, reply=reply)
        written = self.chat_format.writes_bos
        if written and not (begins and self.prepend_bos is not False):
            ids, parts = ids[1:], parts[1:]
        if begins and self.prepend_bos is not None and len(begun := with_bos(ids, self.bos_id)) > len(ids):
            ids, parts = begun, np.concatenate([self.chat_format.mark, parts])
        return Encoded(ids, parts)

    def n_bos(self, ids: Sequence[int] | NDArray[np.int32]) -> int:
        """How many tokens at the beginning of a row or a prompt are BOS: 0 or 1."""
        return int(len(ids) > 0 and self.bos_id is not None and int(ids[0]) == self.bos_id)

    def pack(self, texts: Iterable[str], context_size: int) -> Iterator[NDArray[np.int32]]:
        """Join documents with a separator and cut them into rows without padding, int32 `[context_size]`, each with
        BOS in front, if there is one; the last, short piece is dropped. ConfigError without a separator,
        EmptySelection without a row.
        """
        separator, bos = separator_id(self.tokenizer), self.bos_id
        held: list[int] = []
        rows = 0
        for text in texts:
            held.extend(self.encode(text))
            held.append(separator)
            while len(row := with_bos(held[:context_size], bos)[:context_size]) == context_size:
                yield np.asarray(row, dtype=np.int32)
                rows += 1
                del held[: context_size - (row[0] != held[0])]  # a BOS put in front is none of the text
        if not rows:
            raise EmptySelection(
                f"the text has {len(held)} tokens, fewer than one context of {context_size}.",
                fix="give more text, or a smaller context_size.",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as a continuation: spaces as they are, special tokens left out."""
        return self._decoder(ids, skip_special_tokens=True)

    @functools.cached_property
    def _decoder(self) -> ContinuationDecoder:
        return ContinuationDecoder(self.tokenizer)

    def token_strings(self) -> list[str]:
        """One decoded string per id, `d_vocab` of them: a leading space stays; half a character is U+FFFD."""
        return list(self._token_strings)

    @functools.cached_property
    def _token_strings(self) -> tuple[str, ...]:
        return tuple(token_texts(self.tokenizer, range(self.d_vocab)))

    def plain_tokens(self) -> torch.Tensor:
        """Ids that may be top tokens or be written, bool `[d_vocab]`: known to the tokenizer, shared, not special."""
        return self._plain_tokens.clone()

    @functools.cached_property
    def _plain_tokens(self) -> torch.Tensor:
        # Cached: reading a vocabulary takes most of a second, and every batch of texts needs it.
        known = known_tokens(self.tokenizer).keys() - special_tokens(self.tokenizer)
        if self.shared is not None:
            known &= self.shared
        plain = torch.zeros(self.d_vocab, dtype=torch.bool)
        plain[[i for i in known if i < len(plain)]] = True
        return plain


def input_device(model: Any) -> torch.device:
    """Where a transformers model wants its input: its first device that computes, where accelerate spread it."""
    places = getattr(model, "hf_device_map", None)
    if not places:
        return next(model.parameters()).device  # type: ignore[no-any-return]
    computing = [place for place in places.values() if place not in ("cpu", "disk", "meta")]
    return torch.device(computing[0] if computing else "cpu")


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """A model's logits on 16 fixed tokens, spread over its vocabulary: float32 `[16, d_vocab]`, on the CPU."""
    n = len(model.get_input_embeddings().weight)
    ids = (torch.arange(1, 17) * max(1, n // 18)) % n
    return model(input_ids=ids[None].to(input_device(model)), use_cache=False).logits[0].float().cpu()


def _gelu_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


_silu_ = functools.partial(nn.functional.silu, inplace=True)
# By transformers' names; the first two are tanh(sqrt(2/pi) (x + 0.044715 x^3)).
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": _gelu_,
    "FastGELUActivation": _gelu_,
    "SiLU": _silu_,
    "SiLUActivation": _silu_,
}
# Queries a product: enough rows for the product to run at full speed, few enough that little is hidden.
_BLOCK = 128
# Arguments of attention functions without effect on one packed pass without a cache.
_HARMLESS = ("dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions")


@contextlib.contextmanager
def fused(lm: LanguageModel, *, gradients: bool = False) -> Iterator[None]:
    """While the block runs, the model uses faster equivalents of some parts; for much text on a CPU.

    `gelu_new` is one operation instead of seven, and attention skips what the causal mask hides. Results differ by
    rounding: one part in 10^6 in float32; in bfloat16 attention scores are rounded to bfloat16, as in transformers'
    `eager` attention. Activation functions overwrite their input, but not where `gradients` are wanted.
    """
    replaced: list[nn.Module] = []
    try:
        for module in () if gradients else lm.model.modules():
            function = _IN_PLACE.get(type(module).__name__)
            if function is not None and "forward" not in vars(module):
                module.forward = function
                replaced.append(module)
        with _attention(lm):
            yield
    finally:
        for module in replaced:
            del module.forward


@contextlib.contextmanager
def _attention(lm: LanguageModel) -> Iterator[None]:
    """Replace transformers' `sdpa` by `causal_attention` where that is faster: bfloat16 on a CPU."""
    chosen = getattr(lm.model.config, "_attn_implementation", None)
    if chosen != "sdpa" or lm.dtype != torch.bfloat16 or lm.device.type != "cpu":
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        # transformers passes a mask, a soft cap, sinks or a position bias by name.
        special = [n for n, v in options.items() if n not in _HARMLESS and n != "sliding_window" and v is not None]
        causal = options.get("is_causal")
        plain = (
            attention_mask is None
            and not special
            and (getattr(module, "is_causal", True) if causal is None else causal)
            and not options.get("dropout")
            and query.dtype == torch.bfloat16
            and 1 < query.shape[2] == key.shape[2]
            and key.shape[1:] == value.shape[1:]
        )
        if plain:
            return causal_attention(query, key, value, scaling=options.get("scaling")), None
        found: tuple[Tensor, Tensor | None] = usual(module, query, key, value, attention_mask, **options)
        return found

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None = None) -> Tensor:
    """Causal attention, `[batch, heads, sequence, d_head]` to `[batch, sequence, heads, d_head]` of the same dtype,
    without what lies beyond a block of queries. Of fewer heads, each key and value serves `heads / key heads`
    queries in a row. `scaling` of the scores is 1/sqrt(d_head) if None; scores are rounded to the dtype of `query`.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    group = heads // shared
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch * shared, group, length, width)
    key = key.reshape(batch * shared, length, width).transpose(1, 2)
    value = value.reshape(batch * shared, length, width)
    hidden = query.new_full((_BLOCK, _BLOCK), float("-inf")).triu_(1)
    out = query.new_empty(batch, length, shared, group, width)
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        rows = stop - start
        block = query[:, :, start:stop].reshape(batch * shared, group * rows, width)
        scores = torch.bmm(block, key[:, :, :stop])
        scores.view(-1, group, rows, stop)[..., start:].add_(hidden[:rows, :rows])
        mixed = torch.bmm(scores.softmax(-1), value[:, :stop])
        out[:, start:stop] = mixed.view(batch, shared, group, rows, width).permute(0, 3, 1, 2, 4)
    return out.view(batch, length, heads, width)
