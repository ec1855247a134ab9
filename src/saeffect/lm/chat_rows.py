"""Documents as rows of token ids: plain text as `LanguageModel.pack` cuts it, or conversations by the chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeffect.config_chat import ChatKeys
from saeffect.errors import EmptySelection
from saeffect.lm.chat import ChatFormat, Parts, has_part, messages_of
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import separator_id

__all__ = ["Row", "chat_prepends", "counted", "cut_rows", "lm_for_chats", "with_system"]


class Row(NamedTuple):
    """Token ids, int32 `[context_size]`, and for a chat the part of each, int8 `[context_size]`."""

    ids: NDArray[np.int32]
    parts: Parts | None = None


def cut_rows(lm: LanguageModel, documents: Iterable[str], context_size: int, how: ChatKeys) -> Iterator[Row]:
    """Rows without padding, each beginning with the BOS token, if there is one; a short last row is dropped.

    A row of chats begins with a conversation; others follow after a separator, and what exceeds the row is left out.
    EmptySelection: less text than a row. SaeffectError: no conversation, or the chat template refuses it.
    """
    if how.format == "text":
        yield from (Row(ids) for ids in lm.pack(documents, context_size))
        return
    separator, rows = separator_id(lm.tokenizer), 0
    ids: list[int] = []
    parts: list[Parts] = []
    for document in documents:
        encoded = lm.encode_chat(with_system(messages_of(document), how.system), begins=not ids)
        if ids:
            ids.append(separator)
            parts.append(lm.chat_format.special_part)
        ids += encoded.ids
        parts.append(encoded.parts)
        if len(ids) >= context_size:
            yield Row(np.asarray(ids[:context_size], dtype=np.int32), np.concatenate(parts)[:context_size])
            rows += 1
            ids, parts = [], []
    if not rows:
        raise EmptySelection(
            f"the conversations have {len(ids)} tokens, fewer than one context of {context_size}.",
            fix="give more conversations, or a smaller context_size.",
        )


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The conversation with a system message in front, where it has none and `system` is given."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def counted(rows: Sequence[Row], positions: Sequence[str]) -> NDArray[np.bool_] | None:
    """Which tokens of the rows are at `positions`, bool `[n_rows, context_size]`; None: all. EmptySelection: none."""
    if "all" in positions:
        return None
    mask = np.stack([has_part(row.parts, positions) for row in rows if row.parts is not None])
    if not mask[:, 1:].any():  # a row's first token never counts
        raise EmptySelection(
            f"no token of the text is of {' or '.join(positions)}.",
            at="positions",
            fix="choose others, longer rows (context_size), or other conversations.",
        )
    return mask


def chat_prepends(setting: bool | None, chat: ChatFormat | None) -> bool | None:
    """Whether rows and prompts begin with BOS: as set; if None, as the chat template (if any) writes conversations."""
    return chat.writes_bos if setting is None and chat is not None else setting


def lm_for_chats(lm: LanguageModel, how: ChatKeys) -> LanguageModel:
    """The model with the chat template and BOS that `how` asks for; unchanged for plain text."""
    if how.format == "text":
        return lm
    chat = ChatFormat.of(lm.tokenizer, how.chat_template)
    return dataclasses.replace(lm, chat=chat, prepend_bos=chat_prepends(lm.prepend_bos, chat))
