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
    """Token ids, int32 `[context_size]`, and of a chat who says each, int8 `[context_size]`."""

    ids: NDArray[np.int32]
    parts: Parts | None = None


def cut_rows(lm: LanguageModel, documents: Iterable[str], context_size: int, how: ChatKeys) -> Iterator[Row]:
    """Rows without padding, each with a BOS token in front, if there is one; the last, if short, is dropped.

    A row of chats begins where a conversation does; others follow after a separator, and what goes beyond the row's end
    is left out. EmptySelection: shorter than a row. SaeffectError: no conversation, or the chat template refuses it.
    """
    if how.format == "text":
        yield from (Row(ids) for ids in lm.pack(documents, context_size))
        return
    separator, rows = separator_id(lm.tokenizer), 0
    ids: list[int] = []
    parts: list[Parts] = []
    for document in documents:
        found = lm.encode_chat(with_system(messages_of(document), how.system), begins=not ids)
        if ids:
            ids.append(separator)
            parts.append(lm.chat_format.mark)
        ids += found.ids
        parts.append(found.parts)
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
    """The tokens of rows on which activations count, bool `[n_rows, context_size]`; None for all; EmptySelection for
    none.
    """
    if "all" in positions:
        return None
    found = np.stack([has_part(row.parts, positions) for row in rows if row.parts is not None])
    if not found[:, 1:].any():  # a row's first token never counts
        raise EmptySelection(
            f"no token of the text is of {' or '.join(positions)}.",
            at="positions",
            fix="choose others, longer rows (context_size), or other conversations.",
        )
    return found


def chat_prepends(said: bool | None, chat: ChatFormat | None) -> bool | None:
    """Whether rows and prompts begin with BOS: as said; else as the chat template (if any) writes conversations."""
    return chat.writes_bos if said is None and chat is not None else said


def lm_for_chats(lm: LanguageModel, how: ChatKeys, *, at: str = "chat_template") -> LanguageModel:
    """The model with the chat template and BOS that `how` asks for; unchanged for plain text."""
    if how.format == "text":
        return lm
    chat = ChatFormat.of(lm.tokenizer, how.chat_template, at=at)
    return dataclasses.replace(lm, chat=chat, prepend_bos=chat_prepends(lm.prepend_bos, chat))
