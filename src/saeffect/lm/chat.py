"""Conversations as tokens: written by the chat template, with the speaker of each token."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from saeffect.config_chat import PARTS, plain_messages
from saeffect.errors import BadFile, ConfigError, SaeffectError, first_line, unknown_name
from saeffect.io import fingerprint
from saeffect.lm.tokens import special_tokens
from saeffect.paths import decode_utf8, read_bytes

__all__ = ["ChatFormat", "Encoded", "Segment", "Parts", "has_part", "messages_of", "own_template", "segments"]

Parts = NDArray[np.int8]
"""The speaker of each token (the bits of `_WHO`), and further bits for its role in the conversation."""

_TEMPLATE, _SYSTEM, _USER, _ASSISTANT, _TOOL = range(5)
_WHO, _END, _FIRST, _SPECIAL = 7, 8, 16, 32  # ends the assistant's turn; the first of it; a special token
_CODES = {"system": _SYSTEM, "developer": _SYSTEM, "user": _USER, "assistant": _ASSISTANT, "tool": _TOOL}
_NAMES = {_TEMPLATE: "template", _SYSTEM: "system", _USER: "user", _ASSISTANT: "assistant", _TOOL: "tool"}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters: a number between them stands for a content
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class Encoded(NamedTuple):
    """A conversation's token ids, and the part of each, int8 of the same length (see `Parts`)."""

    ids: list[int]
    parts: Parts


class Segment(NamedTuple):
    """`n` consecutive tokens of one speaker, decoded."""

    who: str
    text: str
    n: int


def has_part(parts: Parts, positions: Sequence[str]) -> NDArray[np.bool_]:
    """Which tokens belong to one of the named `PARTS`, bool, of the shape of `parts`; UnknownName for another name."""
    who = parts & _WHO
    masks = {
        "all": np.ones(parts.shape, dtype=bool),
        "system": who == _SYSTEM,
        "user": who == _USER,
        "assistant": (who == _ASSISTANT) | (parts & _END > 0),
        "first_assistant": parts & _FIRST > 0,
        "template": who == _TEMPLATE,
        "special": parts & _SPECIAL > 0,
    }
    for name in set(positions) - masks.keys():
        raise unknown_name("part of a chat", name, PARTS, at="positions")
    mask: NDArray[np.bool_] = np.any([masks[name] for name in positions], axis=0)
    return mask


def messages_of(document: str) -> list[dict[str, Any]]:
    """The messages of a document, which is their JSON; SaeffectError, quoting its beginning, if it is not."""
    try:
        return plain_messages(json.loads(document))
    except SaeffectError as error:
        raise error.placed(_quote(document)) from None
    except (ValueError, RecursionError) as error:
        raise BadFile(
            f"this is no list of messages: {document[:60]!r}.",
            fix='a conversation looks like [{"role": "user", "content": "..."}]; name its field with field.',
        ) from error


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template (of several the default one), None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template.strip() else None


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """A tokenizer and the chat template (Jinja, as transformers renders it) that writes conversations for it;
    `origin` describes where the template comes from.
    """

    tokenizer: Any
    template: str
    origin: str = "of the tokenizer"

    @classmethod
    def of(cls, tokenizer: Any, template: str | None = None, *, at: str = "chat_template") -> Self:
        """The format of a tokenizer; `template` is a file or the template itself, the tokenizer's own if None.
        ConfigError: no template, or no valid Jinja; NotFound: no such file.
        """
        if template is None:
            own = own_template(tokenizer)
            if own is None:
                raise ConfigError(
                    "the tokenizer has no chat template, so nothing says how a conversation is written.",
                    at=at,
                    fix="give one: chat_template: template.jinja, a file, as the fine-tune was trained with it.",
                )
            return cls._check(cls(tokenizer, own), at)
        if "{" in template or "\n" in template:
            return cls._check(cls(tokenizer, template, "in the file"), at)
        text = decode_utf8(read_bytes(template, "chat template"), at=template)
        return cls._check(cls(tokenizer, text, Path(template).name), template)

    @classmethod
    def _check(cls, chat: Self, at: str) -> Self:
        from jinja2 import TemplateSyntaxError

        if not chat.template.strip():
            raise ConfigError("the chat template is empty.", at=at)
        try:
            chat.render([{"role": "user", "content": "a"}])
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is no valid Jinja: {error.message} (line {error.lineno}).", at=at
            ) from error
        except SaeffectError:  # a template may require more than one turn
            pass
        return chat

    def identity(self) -> str:
        """SHA-256 of the template."""
        return fingerprint(self.template)

    def render(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False, **variables: Any) -> str:
        """A conversation as text; with `reply`, up to where the assistant continues. ConfigError if the template
        refuses it, for example a system message that it does not support.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        continues = reply and messages[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=reply and not continues,
                continue_final_message=continues,
                **variables,
            )
        except TemplateSyntaxError:
            raise
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:6]) + (", ..." if messages[6:] else "")
            raise ConfigError(
                f"the chat template refuses a conversation of {roles}: {first_line(error).rstrip('.')}.",
                at=_quote(messages),
                fix="many templates take no system message, or want user and assistant in turn: change such"
                " conversations or leave them out, or give another chat_template.",
            ) from error
        return str(text)

    @cached_property
    def writes_bos(self) -> bool:
        """Whether the template itself begins a conversation with the tokenizer's BOS token."""
        bos = getattr(self.tokenizer, "bos_token", None)
        if not bos:
            return False
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        text = self.render(turns)
        # SmolLM2's BOS is the mark before every turn, not the beginning of a text.
        return text.startswith(bos) and text.count(bos) == 1

    def encode(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = False) -> Encoded:
        """Token ids of a conversation, exactly those of transformers' `apply_chat_template`, and each token's part.

        A token belongs to the speaker of its last character. The assistant's text is what the template marks with
        `{% generation %}`; without such marks, the content and the special token that ends the turn. `messages` are as
        `plain_messages` gives them; with `reply`, up to where the assistant continues. ConfigError: the template
        refuses the conversation, or the tokenizer does not give character offsets.
        """
        text = self.render(messages, reply=reply)
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                "this tokenizer does not give the positions of its tokens in a text, so their speakers are unknown.",
                at="format",
                fix="save a fast tokenizer (tokenizer.json) beside the model.",
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        ends = np.array([stop if stop > start else 0 for start, stop in encoding["offset_mapping"]], dtype=np.int64) - 1
        parts = np.array([_SPECIAL if i in self._special else 0 for i in ids], dtype=np.int8)
        marked = None if reply else self._marked_spans(messages)
        in_marked = np.zeros(len(ids), dtype=bool)
        for start, stop in marked or ():
            in_marked |= (ends >= start) & (ends < stop)
        for number, start, stop in self._content_spans(messages, text):
            inside = (ends >= start) & (ends < stop)
            code = _CODES[messages[number]["role"]]
            if code == _ASSISTANT and marked is not None:
                inside &= in_marked
            parts[inside] |= code
            positions = np.flatnonzero(inside)
            if code == _ASSISTANT and len(positions):
                parts[positions[0]] |= _FIRST
                if marked is None:
                    _mark_end(parts, int(positions[-1]) + 1)
        parts[in_marked & (parts & _WHO == _TEMPLATE)] |= _END
        return Encoded(ids, parts)

    @property
    def special_part(self) -> Parts:
        """The part of one special token of the template, int8 `[1]`."""
        return np.array([_TEMPLATE | _SPECIAL], dtype=np.int8)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(special_tokens(self.tokenizer))

    def _marked_spans(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]] | None:
        """Characters that the template marks as the assistant's with `{% generation %}`; None if it marks none."""
        if not _MARKED.search(self.template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(int(start), int(stop)) for start, stop in rendered[1][0]]

    def _content_spans(self, messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[tuple[int, int, int]]:
        """(message index, start, stop) of each message's content in the text.

        The template is rendered with marks in place of contents. The text around the marks is the template's own, in
        the order in which it writes messages: some put a system message into the user's turn.
        """
        marked = [
            dict(message) | {"content": f"{_OPEN}{number}{_CLOSE}" if message["content"].strip() else ""}
            for number, message in enumerate(messages)
        ]
        pieces = _MARK.split(self.render(marked))  # template, number, template, number, ..., template
        at = 0
        for before, number, after in zip(pieces[0::2], pieces[1::2], pieces[2::2], strict=False):
            start_before = text.find(before, at)
            if start_before < 0:
                return
            start = start_before + len(before)
            content = str(messages[int(number)]["content"])
            # A template may strip the content, or drop more of it (the reasoning in earlier turns).
            exact = (start + len(c) for c in (content, content.strip()) if text.startswith(c + after, start))
            at = next(exact, text.find(after, start) if after else len(text))
            at = len(text) if at < 0 else at
            yield int(number), start, at


def _mark_end(parts: Parts, after: int) -> None:
    """Mark the special token that ends a turn: the first or second token after its content."""
    for position in range(after, min(after + 2, len(parts))):
        if parts[position] & _SPECIAL:
            parts[position] |= _END
            return


def segments(tokenizer: Any, encoded: Encoded) -> list[Segment]:
    """The decoded tokens, in pieces of one speaker each."""
    sides = [_NAMES[int(part) & _WHO] for part in encoded.parts]
    pieces = []
    for who, group in itertools.groupby(zip(sides, encoded.ids, strict=True), key=lambda pair: pair[0]):
        ids = [i for _, i in group]
        pieces.append(Segment(who, str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), len(ids)))
    return pieces


def _quote(conversation: Any) -> str:
    """A name for a conversation in messages: its beginning."""
    text = conversation if isinstance(conversation, str) else str(conversation[0].get("content", ""))
    return f"the conversation that begins {text[:50]!r}"
