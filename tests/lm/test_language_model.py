from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from saeffect.lm.language_model import LanguageModel


def test_sizes(tiny_llama: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    for lm in (tiny_llama, tiny_gpt2):
        assert (lm.d_model, lm.n_layers, lm.d_vocab) == (32, 3, 320)
        assert (lm.device.type, lm.dtype) == ("cpu", torch.float32)


def test_text_to_ids_and_back(tiny_llama: LanguageModel) -> None:
    for text in ("The patient had a fever.", " two  spaces , kept", "Müller 🩺 \u200b"):
        assert tiny_llama.decode(tiny_llama.encode(text)) == text


def test_no_special_tokens_are_added_and_none_are_shown(tiny_llama: LanguageModel) -> None:
    ids = tiny_llama.encode("The patient")
    assert 0 not in ids
    assert tiny_llama.decode([0, *ids, 0]) == "The patient"


def test_token_strings_keep_spaces_and_mark_half_characters(tiny_llama: LanguageModel) -> None:
    strings = tiny_llama.token_strings()
    assert len(strings) == tiny_llama.d_vocab
    assert " patient" in strings
    assert strings[0] == "<|endoftext|>"
    assert "\ufffd" in strings  # a byte that is no character by itself


def test_rows_beyond_the_tokenizer_are_unused_and_not_plain(tiny_llama: LanguageModel) -> None:
    padded = SimpleNamespace(
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.zeros(len(tiny_llama.tokenizer) + 2, 4))
    )
    lm = LanguageModel(padded, tiny_llama.tokenizer, "padded")
    assert lm.token_strings()[-2:] == [f"<unused {i}>" for i in range(lm.d_vocab - 2, lm.d_vocab)]
    plain = lm.plain_tokens()
    assert plain.dtype == torch.bool
    assert not plain[-2:].any()
    assert not plain[0]  # <|endoftext|>
    assert plain[1:-2].all()


def test_rows_and_prompts_begin_with_bos_once(tiny_llama: LanguageModel) -> None:
    assert tiny_llama.bos_id is None, "its tokenizer has the name and does not use it"
    lm = dataclasses.replace(tiny_llama, prepend_bos=True)
    plain = lm.encode("The patient")
    assert lm.encode_prompt("The patient") == [0, *plain]
    assert lm.encode_prompt("<|endoftext|>The patient") == [0, *plain]
    assert tiny_llama.encode_prompt("The patient") == plain
    assert [lm.n_bos(ids) for ids in ([0, 5], [5, 0], [])] == [1, 0, 0]
    assert tiny_llama.n_bos([0, 5]) == 0
    rows = list(lm.pack(["The patient had a fever."] * 4, 8))
    assert all(row[0] == 0 and len(row) == 8 for row in rows)
