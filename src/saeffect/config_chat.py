"""Chats in study and recipe files: messages, and the keys that say how a conversation becomes text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from saeffect.config_keys import StrictModel
from saeffect.errors import ConfigError, unknown_name

__all__ = [
    "ChatKeys",
    "Message",
    "PARTS",
    "Part",
    "Prompt",
    "ROLES",
    "ReadKeys",
    "as_chat",
    "plain_messages",
    "prompt_name",
    "prompt_text",
    "with_field",
]

Part = Literal["all", "system", "user", "assistant", "first_assistant", "template", "special"]
PARTS: tuple[Part, ...] = ("all", "system", "user", "assistant", "first_assistant", "template", "special")
"""Parts of a chat's tokens: see docs/chat.md."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages; `_ROLE_ALIASES` gives further names for them."""
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant"}
_ROLE_ALIASES |= {"ipython": "tool", "function": "tool", "observation": "tool"}


class Message(StrictModel):
    """One turn of a conversation."""

    role: str = Field(description="system, developer, user, assistant or tool.")
    content: str = Field(description="What is said.")


Prompt = str | tuple[Message, ...]
"""The beginning of a text, or a conversation, that the model continues."""


def plain_messages(value: Any, *, at: str = "messages") -> list[dict[str, Any]]:
    """A conversation as chat templates take it: a list of objects with role, content and any further keys.

    Also accepts `from` and `value` for `role` and `content` (ShareGPT), and `content` as a list of texts. ConfigError:
    not a list of messages, an empty one, a message without role or text, or no text at all; UnknownName: another role.
    """
    if isinstance(value, Message) or not isinstance(value, list | tuple):
        raise ConfigError(
            f"this is no list of messages, but {type(value).__name__}.",
            at=at,
            fix="a conversation is a list of mappings, each with a role and a content.",
        )
    if not value:
        raise ConfigError("this conversation has no messages.", at=at, fix="leave it out, or write a message.")
    messages = [_message(message, f"{at}.{number}") for number, message in enumerate(value)]
    if not any(message["content"].strip() for message in messages):
        raise ConfigError("no message of this conversation says anything.", at=at, fix="leave it out.")
    return messages


def _message(message: Any, at: str) -> dict[str, Any]:
    if isinstance(message, Message):
        message = message.model_dump()
    if not isinstance(message, Mapping):
        raise ConfigError(f"a message is a mapping with role and content; this one is {type(message).__name__}.", at=at)
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise ConfigError("this message has no role.", at=at, fix=f"say who speaks: {', '.join(ROLES)}.")
    if role not in ROLES and role.lower() not in (*ROLES, *_ROLE_ALIASES):
        raise unknown_name("role", role, ROLES, at=at)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(map(str, parts)) if all(isinstance(text, str) for text in parts) else None
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ConfigError(
            "the content of this message is no text.", at=at, fix="leave out conversations with pictures or sounds."
        )
    other_keys = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLE_ALIASES.get(role.lower(), role.lower()), "content": content} | other_keys


def as_chat(prompt: Any, system: str | None, *, at: str) -> tuple[Message, ...]:
    """A prompt as a conversation: plain text becomes a user message; `system` is added if there is no system message.

    Example:
        >>> [message.role for message in as_chat("How are you?", "Be brief.", at="prompts")]
        ['system', 'user']
    """
    value = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    plain = plain_messages(value, at=at)
    if system is not None and plain[0]["role"] not in ("system", "developer"):
        plain.insert(0, {"role": "system", "content": system})
    return tuple(Message.read(message, at=at) for message in plain)


def prompt_name(prompt: Prompt) -> str:
    """The prompt's unique name: its text, or its messages as JSON. Sampling noise depends on it."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([message.model_dump() for message in prompt], ensure_ascii=False)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as readable text.

    Example:
        >>> prompt_text(as_chat("How are you?", "Be brief.", at="prompts"))
        'system: Be brief. | user: How are you?'
        >>> prompt_text(as_chat("How are you?", None, at="prompts"))
        'How are you?'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return " | ".join(f"{message.role}: {message.content}" for message in prompt)


class ChatKeys(StrictModel):
    """How documents become tokens: keys shared by texts of studies and by recipes."""

    keys_last: ClassVar[tuple[str, ...]] = ("format", "chat_template", "system", "positions")

    format: Literal["text", "chat"] = Field(
        "text",
        description="chat: a document is a conversation, a list of messages with role and content (or from and value),"
        " in the field `messages` unless `field` names another; the chat template writes it. See [chat.md](chat.md).",
    )
    chat_template: str | None = Field(
        None, description="Jinja: a file, or the template itself. By default the tokenizer's."
    )
    system: str | None = Field(None, description="System message of conversations that have none.")

    @model_validator(mode="after")
    def _check_system(self) -> Self:
        if self.format == "text" and self.system is not None:
            raise ValueError("system goes with format: chat")
        return self


class ReadKeys(ChatKeys):
    """`ChatKeys`, and which tokens count."""

    positions: tuple[Part, ...] = Field(
        ("all",),
        min_length=1,
        description="Of chats, the tokens on which activations count; all others are read, but enter no statistic of"
        " features. assistant: what the assistant writes, to the end of its turn; first_assistant: the first token of"
        " each turn; template: tokens outside the messages; special: the special tokens among these.",
    )

    @field_validator("positions", mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.format == "text" and self.positions != ("all",):
            raise ValueError(f"positions: {self.positions[0]} goes with format: chat")
        return self


def with_field(sources: Any, format: Any) -> Any:
    """The raw `sources` of a file; for chats, a source without a field gets the default, `messages`."""
    if format != "chat" or not isinstance(sources, Sequence):
        return sources
    return [{"field": "messages"} | source if isinstance(source, dict) else source for source in sources]
