"""Conversations as tokens, against transformers' own templates and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import BOS, FAMILIES, MARKED, chat_tokenizer
from saeffect.config_chat import as_chat
from saeffect.errors import ConfigError, SaeffectError
from saeffect.lm.chat import ChatFormat, has_part, messages_of, own_template, segments
from saeffect.lm.language_model import LanguageModel

TALK = [
    {"role": "user", "content": "What is a fever? user"},
    {"role": "assistant", "content": "A <b>dose</b> of heat, é!"},
    {"role": "user", "content": "Be kind.\nAnd brief"},
    {"role": "assistant", "content": "OK"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
UNKNOWN = {"<|endoftext|>"}  # of the small vocabulary with marks for spaces
TOKENIZERS = {
    (family, metaspace): chat_tokenizer(family, metaspace=metaspace)
    for family in FAMILIES
    for metaspace in (False, True)
}


@pytest.fixture(params=TOKENIZERS, ids=lambda key: f"{key[0]}-{'metaspace' if key[1] else 'bytes'}")
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat.of(TOKENIZERS[request.param])


def _family(chat: ChatFormat) -> str:
    return next(name for name, template in FAMILIES.items() if template == chat.template)


def _talk(chat: ChatFormat) -> list[dict[str, Any]]:
    return TALK if _family(chat) == "gemma" else [SYSTEM, *TALK]


def test_ids_are_those_of_transformers(chat: ChatFormat) -> None:
    talk = _talk(chat)
    assert chat.encode(talk).ids == chat.tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    asked = chat.tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.encode(talk[:-1], reply=True).ids == asked
    begun = chat.tokenizer.apply_chat_template(talk, continue_final_message=True, return_dict=True)["input_ids"]
    assert chat.encode(talk, reply=True).ids == begun


@pytest.mark.parametrize("whose", [FAMILIES, MARKED], ids=["found", "marked"])
def test_the_assistants_tokens_are_those_that_a_template_marks(chat: ChatFormat, whose: dict[str, str]) -> None:
    talk, family = _talk(chat), _family(chat)
    mine = ChatFormat.of(chat.tokenizer, whose[family]).encode(talk)
    theirs = chat.tokenizer.apply_chat_template(
        talk, chat_template=MARKED[family], return_dict=True, return_assistant_tokens_mask=True
    )
    assert mine.ids == theirs["input_ids"]
    assert has_part(mine.parts, ("assistant",)).astype(int).tolist() == theirs["assistant_masks"]


def test_each_side_says_what_it_said(chat: ChatFormat) -> None:
    talk, tokenizer = _talk(chat), chat.tokenizer
    found = chat.encode(talk)
    for role in ("system", "user", "assistant"):
        said = [piece.text.strip() for piece in segments(tokenizer, found) if piece.who == role]
        wanted = [message["content"] for message in talk if message["role"] == role]
        if _family(chat) == "mistral" and role == "system":
            wanted = []  # it is written where a user speaks last
        if not UNKNOWN.isdisjoint(chat.tokenizer.tokenize("".join(wanted))):
            assert len(said) == len(wanted)
        else:
            assert said == wanted
    sides = [has_part(found.parts, (part,)) for part in ("system", "user", "assistant", "template")]
    first = has_part(found.parts, ("first_assistant",))
    assert first.sum() == 2 and not (first & ~sides[2]).any()
    both = sum(side.astype(int) for side in sides)
    special = has_part(found.parts, ("special",))
    assert both.max() == 2 and (both == 2).sum() == 2 and special[both == 2].all()  # ends of the assistant's turns
    assert has_part(found.parts, ("all",)).all()


def test_a_system_message_within_the_users_turn() -> None:
    chat = ChatFormat.of(TOKENIZERS["mistral", False])
    pieces = segments(chat.tokenizer, chat.encode([SYSTEM, *TALK[:3]], reply=True))
    assert [tuple(piece)[:2] for piece in pieces[-5:]] == [
        ("template", "</s>[INST] "),
        ("system", "Be brief."),
        ("template", "\n\n"),
        ("user", "Be kind.\nAnd brief"),
        ("template", "[/INST]"),
    ]


def test_a_content_that_looks_like_the_template() -> None:
    chat = ChatFormat.of(TOKENIZERS["chatml", False])
    talk = [{"role": "user", "content": "assistant\n"}, {"role": "assistant", "content": "user<|im_end|>\n"}]
    found = chat.encode(talk)
    assert [tuple(piece)[:2] for piece in segments(chat.tokenizer, found)] == [
        ("template", "<|im_start|>user\n"),
        ("user", "assistant\n"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "user<|im_end|>\n"),
        ("template", "<|im_end|>\n"),
    ]


def test_reasoning_that_a_template_drops() -> None:
    chat = ChatFormat.of(TOKENIZERS["thinking", False])
    said = "<think>a fever?</think>\nA dose."
    talk = [TALK[0], {"role": "assistant", "content": said}, TALK[2], {"role": "assistant", "content": said}]
    pieces = segments(chat.tokenizer, chat.encode(talk))
    assert [piece.text for piece in pieces if piece.who == "assistant"] == ["A dose.", said]
    assert pieces[0] == ("template", "<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\n", pieces[0].n)


def test_an_empty_message_has_no_tokens() -> None:
    chat = ChatFormat.of(TOKENIZERS["chatml", False])
    found = chat.encode([TALK[0], {"role": "assistant", "content": ""}, TALK[2]])
    assert not has_part(found.parts, ("assistant",)).any() and has_part(found.parts, ("user",)).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prepend", [None, True, False])
def test_one_bos_or_none(family: str, prepend: bool | None) -> None:
    tokenizer = TOKENIZERS[family, False]
    lm = LanguageModel(None, tokenizer, "chat", prepend_bos=prepend and BOS[family] is not None)
    assert lm.chat_format.writes_bos == (BOS[family] is not None)
    found = lm.encode_chat(TALK)
    n_bos = found.ids.count(tokenizer.bos_token_id)
    assert n_bos == (BOS[family] is not None and prepend is not False)
    assert len(found.ids) == len(found.parts)
    assert lm.encode_chat(TALK, begins=False).ids == found.ids[n_bos:]


def test_turn_mark_equal_to_bos_is_kept() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.bos_token = "<|im_start|>"
    for prepend in (None, True, False):
        lm = LanguageModel(None, tokenizer, "chat", prepend_bos=prepend)
        assert not lm.chat_format.writes_bos
        assert lm.encode_chat(TALK).ids == ChatFormat.of(tokenizer).encode(TALK).ids


def test_a_template_without_bos_gets_one_if_asked() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.bos_token = "<s>"
    found = LanguageModel(None, tokenizer, "chat", prepend_bos=True).encode_chat(TALK)
    assert found.ids[:2] == tokenizer.convert_tokens_to_ids(["<s>", "<|im_start|>"])
    assert has_part(found.parts, ("special",))[:2].all()


def test_prompts() -> None:
    lm = LanguageModel(None, TOKENIZERS["chatml", False], "chat")
    prompt = as_chat("Be kind.", "Be brief.", at="prompts")
    ids, parts = lm.encode_prompt(prompt), lm.prompt_parts(prompt)
    assert parts is not None and len(parts) == len(ids)
    assert lm.tokenizer.decode(ids).endswith("Be kind.<|im_end|>\n<|im_start|>assistant\n")
    assert lm.prompt_parts("Be kind.") is None


def test_template_from_file_text_or_tokenizer(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml", template=False)
    (tmp_path / "t.jinja").write_text(FAMILIES["llama3"], encoding="utf-8")
    formats = [
        ChatFormat.of(tokenizer, str(tmp_path / "t.jinja")),
        ChatFormat.of(tokenizer, FAMILIES["llama3"]),
        ChatFormat.of(chat_tokenizer("llama3")),
    ]
    assert len({made.identity() for made in formats}) == 1
    assert [made.origin for made in formats] == ["t.jinja", "in the file", "of the tokenizer"]
    tokenizer.chat_template = {"default": FAMILIES["gemma"], "tool_use": "x"}
    assert own_template(tokenizer) == FAMILIES["gemma"]


def _raised(call: Any) -> str:
    with pytest.raises(SaeffectError) as caught:
        call()
    return str(caught.value)


def test_what_cannot_be_a_template(tmp_path: Path) -> None:
    bare = chat_tokenizer("chatml", template=False)
    assert "has no chat template" in _raised(lambda: ChatFormat.of(bare))
    assert "no chat template file 'none.jinja'" in _raised(lambda: ChatFormat.of(bare, str(tmp_path / "none.jinja")))
    assert "no valid Jinja" in _raised(lambda: ChatFormat.of(bare, "{% for message in messages %}"))
    (tmp_path / "empty.jinja").write_text(" \n", encoding="utf-8")
    assert "is empty" in _raised(lambda: ChatFormat.of(bare, str(tmp_path / "empty.jinja")))


@pytest.mark.parametrize(
    ("family", "talk", "said"),
    [
        ("gemma", [SYSTEM, *TALK], "refuses a conversation of system, user, assistant, user, assistant: System role"),
        ("gemma", [TALK[0], TALK[2]], "must alternate"),
        ("mistral", [TALK[0], TALK[2]], "roles must alternate"),
    ],
)
def test_conversations_that_a_template_refuses(family: str, talk: list[dict[str, Any]], said: str) -> None:
    message = _raised(lambda: ChatFormat.of(TOKENIZERS[family, False]).encode(talk))
    assert said in message and "begins" in message and "fix:" in message


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("[]", "no messages"),
        ("{}", "no list of messages"),
        ("[not", "no list of messages"),
        ('["a"]', "a message is a mapping"),
        ('[{"content": "a"}]', "no role"),
        ('[{"role": "narrator", "content": "a"}]', "narrator"),
        ('[{"role": "user"}]', "no text"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "no text"),
        ('[{"role": "user", "content": " "}]', "says anything"),
    ],
)
def test_documents_that_are_no_conversation(document: str, said: str) -> None:
    assert said in _raised(lambda: messages_of(document))


def test_forms_of_messages() -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"role": "Tool", "content": "c", "id": 1}]
    talk.append({"role": "user", "content": [{"type": "text", "text": "d"}, "e"]})
    assert messages_of(json.dumps(talk)) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "c", "id": 1},
        {"role": "user", "content": "de"},
    ]


def test_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast, bos_token, chat_template, all_special_ids = False, None, FAMILIES["chatml"], ()

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "a"

    with pytest.raises(ConfigError, match="fast tokenizer"):
        ChatFormat.of(Slow()).encode(TALK)


def test_a_name_that_is_no_part() -> None:
    assert "narrator" in _raised(lambda: has_part(np.zeros(2, dtype=np.int8), ("narrator",)))
