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

__all__ = [
    "LanguageModel",
    "MergedAdapter",
    "causal_attention",
    "fused",
    "input_device",
    "probe_logits",
    "replaced_forwards",
    "undefined_numbers",
]


@dataclass(frozen=True)
class MergedAdapter:
    """Effect of an adapter on the logits of a few fixed tokens; for a merged adapter, in float32.

    Attributes:
        effect: Largest change of a logit by the adapter.
        error: Largest difference between the merged and the unmerged model's logits (rounding); 0 if kept unmerged.
        other_base: A one-line warning if the adapter names another base model.
    """

    effect: float
    error: float
    other_base: str | None = None


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    Attributes:
        model: In evaluation mode; its parameters take no gradients.
        name: The user's name for it; an adapter is appended with a plus sign.
        identity: SHA-256 of the files it came from, for fingerprints.
        adapter: Effect of its adapter; None without one.
        shared: Token ids that mean the same in all models compared; None if there is only this one.
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
        """The device for token ids; a model that is spread over devices moves tensors between them itself."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; quantised weights are packed in another dtype."""
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
        limit = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def refuse_rows(self, ids: NDArray[np.int32]) -> None:
        """ConfigError if rows `[n_rows, context_size]` are too long or hold an id without an embedding."""
        context, limit = ids.shape[1], self.n_positions
        if limit is not None and context > limit:
            raise ConfigError(
                f"rows have {context:,} tokens; {self.name} takes {limit:,}.",
                at="context_size",
                fix=f"set context_size to {limit} or less.",
            )
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        n_embedded = min(self.d_vocab, int(self.model.get_input_embeddings().weight.shape[0]))
        if low < 0 or high >= n_embedded:
            text = known_tokens(self.tokenizer).get(high) if high >= n_embedded else None
            token = "" if text is None else f" ({text})"
            raise ConfigError(
                f"the text has token ids from {low} to {high}{token}, but {self.name} knows 0 to {n_embedded - 1}.",
                fix="make the rows with the tokenizer that was saved with this model, or resize the model's embedding.",
            )

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The first token of every row and prompt, or None (see `find_bos_id`); not measured, not intervened on."""
        return find_bos_id(self.tokenizer, self.prepend_bos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a text to continue, after the BOS token if there is one; or of a chat, up to the reply
        (ConfigError if the chat template refuses it).
        """
        if isinstance(prompt, str):
            return with_bos(self.encode(prompt), self.bos_id)
        return self.encode_chat(plain_messages(prompt), reply=True).ids

    def prompt_parts(self, prompt: Prompt) -> Parts | None:
        """The part (see `Parts`) of each token of `encode_prompt` of a chat, int8; None for plain text."""
        return None if isinstance(prompt, str) else self.encode_chat(plain_messages(prompt), reply=True).parts

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How conversations are written; ConfigError without a chat template."""
        return self.chat or ChatFormat.of(self.tokenizer)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, begins: bool = True
    ) -> Encoded:
        """A conversation's token ids and their parts (see `ChatFormat.encode`), with one BOS in front if rows have one;
        `begins` is False for a conversation within a row, which gets no BOS.
        """
        ids, parts = self.chat_format.encode(messages, reply=reply)
        written = self.chat_format.writes_bos
        if written and not (begins and self.prepend_bos is not False):
            ids, parts = ids[1:], parts[1:]
        if begins and self.prepend_bos is not None and len(with_bos_ids := with_bos(ids, self.bos_id)) > len(ids):
            ids, parts = with_bos_ids, np.concatenate([self.chat_format.special_part, parts])
        return Encoded(ids, parts)

    def n_bos(self, ids: Sequence[int] | NDArray[np.int32]) -> int:
        """How many tokens at the beginning of a row or a prompt are BOS: 0 or 1."""
        return int(len(ids) > 0 and self.bos_id is not None and int(ids[0]) == self.bos_id)

    def pack(self, texts: Iterable[str], context_size: int) -> Iterator[NDArray[np.int32]]:
        """Join documents with a separator and cut them into rows without padding, int32 `[context_size]`, each
        beginning with BOS, if there is one; a short last row is dropped. ConfigError without a separator,
        EmptySelection without a row.
        """
        separator, bos = separator_id(self.tokenizer), self.bos_id
        pending: list[int] = []
        rows = 0
        for text in texts:
            pending.extend(self.encode(text))
            pending.append(separator)
            while len(row := with_bos(pending[:context_size], bos)[:context_size]) == context_size:
                yield np.asarray(row, dtype=np.int32)
                rows += 1
                del pending[: context_size - (row[0] != pending[0])]  # a BOS put in front is none of the text
        if not rows:
            raise EmptySelection(
                f"the text has {len(pending)} tokens, fewer than one context of {context_size}.",
                fix="give more text, or a smaller context_size.",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as a continuation: leading spaces kept, special tokens left out."""
        return self._decoder(ids, skip_special_tokens=True)

    @functools.cached_property
    def _decoder(self) -> ContinuationDecoder:
        return ContinuationDecoder(self.tokenizer)

    def token_strings(self) -> list[str]:
        """The decoded text of each id, `d_vocab` strings; a leading space stays, partial characters are U+FFFD."""
        return list(self._token_strings)

    @functools.cached_property
    def _token_strings(self) -> tuple[str, ...]:
        return tuple(token_texts(self.tokenizer, range(self.d_vocab)))

    def plain_tokens(self) -> torch.Tensor:
        """Ids that may be top tokens or be generated, bool `[d_vocab]`: known to the tokenizer, shared, not special."""
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
    """The device of a transformers model's input: if accelerate spread the model, the first device that computes."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return next(model.parameters()).device  # type: ignore[no-any-return]
    computing = [device for device in device_map.values() if device not in ("cpu", "disk", "meta")]
    return torch.device(computing[0] if computing else "cpu")


def undefined_numbers(lm: LanguageModel, problem: str, *, at: str) -> ConfigError:
    """The error for a model that computes NaN or infinity; `problem` says where, without a full stop."""
    overflows = lm.dtype == torch.float16
    return ConfigError(
        f"{problem} in {str(lm.dtype).removeprefix('torch.')}.",
        at=at,
        fix="set the model's dtype to bfloat16 or float32, which hold larger numbers."
        if overflows
        else "check the model: its own computation gives no numbers.",
    )


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
# Queries a matrix product: enough for full speed, few enough that little masked work is done.
_BLOCK = 128
_PIECE = 512  # outputs of a product: their weights fit into a core's cache
# Arguments of attention functions that have no effect on a packed pass without a cache.
_HARMLESS = ("dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions")


@contextlib.contextmanager
def fused(lm: LanguageModel, *, gradients: bool = False) -> Iterator[None]:
    """While the block runs, the model uses faster equivalents of some parts; for much text on a CPU.

    `gelu_new` is one operation instead of seven, attention skips masked blocks, and a float32 unembedding is multiplied
    in pieces. Results differ by rounding: one part in 10^6 in float32; in bfloat16 attention scores are rounded to
    bfloat16, as in transformers' `eager` attention. Where `gradients` are needed, only attention is replaced: the
    others overwrite their input, or write into a part of their output.
    """
    modules = [] if gradients else [m for m in lm.model.modules() if "forward" not in vars(m)]
    forwards = {m: _IN_PLACE[type(m).__name__] for m in modules if type(m).__name__ in _IN_PLACE}
    head = lm.model.get_output_embeddings()
    if type(head) is nn.Linear and head in modules and head.weight.dtype == torch.float32 and lm.device.type == "cpu":
        forwards[head] = functools.partial(_linear_in_pieces, head)
    with replaced_forwards(forwards), _fast_attention(lm):
        yield


def _linear_in_pieces(linear: nn.Linear, x: Tensor) -> Tensor:
    """The output of a linear module with very many outputs, such as an unembedding: in one product, BLAS is up to twice
    as slow for the few rows of a decoding step (on two cores without AVX-512).
    """
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(linear.weight))
    for start in range(0, len(linear.weight), _PIECE):
        torch.mm(rows, linear.weight[start : start + _PIECE].T, out=out[:, start : start + _PIECE])
    if linear.bias is not None:
        out += linear.bias
    return out.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, each module runs its function in place of its own `forward`."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextlib.contextmanager
def _fast_attention(lm: LanguageModel) -> Iterator[None]:
    """Replace transformers' `sdpa` by `causal_attention` where it is faster: in bfloat16 on a CPU."""
    implementation = getattr(lm.model.config, "_attn_implementation", None)
    if implementation != "sdpa" or lm.dtype != torch.bfloat16 or lm.device.type != "cpu":
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

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
        result: tuple[Tensor, Tensor | None] = original(module, query, key, value, attention_mask, **options)
        return result

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None = None) -> Tensor:
    """Causal attention, `[batch, heads, sequence, d_head]` to `[batch, sequence, heads, d_head]` of the same dtype,
    computed by blocks of queries without the keys after each block. With fewer key heads (grouped-query attention),
    each serves `heads / key heads` consecutive query heads. `scaling` of the scores is 1/sqrt(d_head) if None; scores
    are rounded to the dtype of `query`.
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
