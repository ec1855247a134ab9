from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import SENTENCES
from saeffect.config import ModelConfig
from saeffect.errors import ConfigError, NotFound
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_tokenizer
from saeffect.lm.tokens import (
    find_bos_id,
    known_tokens,
    normalise_token,
    printable_token,
    resolve_prepend_bos,
    token_texts,
    tokenizer_identity,
    tokenizer_trouble,
    tokens_added_before,
)


@pytest.mark.parametrize(
    "token", ["cancer", "ĠCancer", "▁cancer", " CANCER", "\n\tcancer \r\n", "ĠĠ▁ cancer", "\u00a0cancer"]
)
def test_notations_of_one_word_agree(token: str) -> None:
    assert normalise_token(token) == "cancer"


@pytest.mark.parametrize(
    ("token", "word"), [("", ""), ("Ġ", ""), ("   ", ""), ("aĠb", "aĠb".lower()), ("Ġ<SCRIPT>", "<script>")]
)
def test_only_the_ends_are_stripped(token: str, word: str) -> None:
    assert normalise_token(token) == word


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("Ġtumor", " tumor"),
        ("▁tumor", " tumor"),
        (" tumor", " tumor"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x00", "U+0000"),
        ("\x1b[31m", "U+001B[31m"),
        ("\u202eevil\u2066", "U+202EevilU+2066"),
        ("\u200b\u200d\ufeff\u00ad", "U+200BU+200DU+FEFFU+00AD"),
        ("\u00a0\u2003\u3000", "U+00A0U+2003U+3000"),
        ("\u2028", "U+2028"),
        ("\ud800", "U+D800"),
        ("\U000e0041", "U+E0041"),
        ("\ufe0f\u3164\u2800", "U+FE0FU+3164U+2800"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("=SUM(A1)", "=SUM(A1)"),
        ("\ufffd", "\ufffd"),
        ("café 癌", "café 癌"),
    ],
)
def test_what_cannot_be_seen_is_named(token: str, shown: str) -> None:
    assert printable_token(token) == shown


@given(st.text(max_size=20))
def test_shown_text_never_hides_or_acts(token: str) -> None:
    shown = printable_token(token)
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not [c for c in shown if unicodedata.category(c) in hidden]
    assert printable_token(shown.lstrip(" Ġ▁")) == shown.lstrip(" Ġ▁")


def as_sentencepiece() -> PreTrainedTokenizerFast:
    """Cuts and decodes as Llama 2 does: ▁ for a space, bytes for what it does not know, no space in front."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_token_texts_keep_stripped_spaces() -> None:
    tokenizer = as_sentencepiece()
    texts = token_texts(tokenizer, range(len(tokenizer)))
    ids = tokenizer.encode("The patient had pain", add_special_tokens=False)
    assert "".join(texts[i] for i in ids) == " The patient had pain"
    tokens = known_tokens(tokenizer)
    assert {texts[i] for i, token in tokens.items() if token == "▁patient"} == {" patient"}
    assert {texts[i] for i, token in tokens.items() if token in ("<0x0A>", "<0x41>")} == {"\n", "A"}
    assert {texts[i] for i, token in tokens.items() if token == "<0xC3>"} == {"\ufffd"}


def test_decoded_text_keeps_its_first_space() -> None:
    tokenizer = as_sentencepiece()
    lm = LanguageModel(None, tokenizer, "x")
    ids = lm.encode("had a fever")
    assert lm.decode(ids) == " had a fever"
    assert lm.decode([*ids, 2]) == " had a fever"
    assert lm.decode([]) == ""


def with_holes(tokenizer: Any, moved: dict[str, int]) -> PreTrainedTokenizerFast:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["vocab"].update(moved)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|endoftext|>")


def test_holes_in_the_vocabulary_are_unused(tiny_tokenizer: Any) -> None:
    was = tiny_tokenizer.get_vocab()["Ġpatient"]
    tokenizer = with_holes(tiny_tokenizer, {"Ġpatient": 330})
    texts = token_texts(tokenizer, range(332))
    assert texts[330] == " patient"
    assert (texts[was], texts[331]) == (f"<unused {was}>", "<unused 331>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=332, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    plain = LanguageModel(model, tokenizer, "x").plain_tokens()
    assert bool(plain[330])
    assert not bool(plain[[was, 331]].any())


def test_only_shared_tokens_are_plain(tiny_llama: LanguageModel) -> None:
    some = LanguageModel(tiny_llama.model, tiny_llama.tokenizer, "x", shared=frozenset(range(300)))
    assert int(some.plain_tokens().sum()) == 299  # id 0 is special


def test_identity_depends_on_rules_and_ids(tiny_tokenizer: Any) -> None:
    unsplit = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    unsplit["pre_tokenizer"]["use_regex"] = False
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(unsplit)))
    again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str()))
    assert tokenizer_identity(again) == tokenizer_identity(tiny_tokenizer)
    assert tokenizer_identity(other) != tokenizer_identity(tiny_tokenizer)
    assert tokenizer_identity(with_holes(tiny_tokenizer, {"Ġpatient": 330})) != tokenizer_identity(tiny_tokenizer)


def test_rows_that_a_model_cannot_read(tiny_gpt2: LanguageModel, complains: Any) -> None:
    with complains(ConfigError, "129 tokens", "takes 128", at="context_size"):
        tiny_gpt2.refuse_rows(np.ones((1, 129), dtype=np.int32))
    with complains(ConfigError, "to 320", "knows 0 to 319"):
        tiny_gpt2.refuse_rows(np.array([[1, 320]], dtype=np.int32))
    tiny_gpt2.refuse_rows(np.array([[1, 319]], dtype=np.int32))


def test_tokenizer_model_alone_is_read(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES] * 20), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=400, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.vocab").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    read = load_tokenizer(tmp_path, ModelConfig(path=str(tmp_path)))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("The patient had a fever.", "Snow, naïve 你"):
        assert read.encode(text, add_special_tokens=False) == own.EncodeAsIds(text)


def test_sentencepiece_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Any
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    with complains(NotFound, "sentencepiece", "pip install 'saeffect[sentencepiece]'", at="arms.control.model"):
        load_tokenizer(tmp_path, ModelConfig(path=str(tmp_path)), at="arms.control.model")


def test_remote_code_is_advised_where_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said = "Couldn't instantiate the backend tokenizer"
    assert tokenizer_trouble(tmp_path, said) == (said, tokenizer_trouble(tmp_path, "x")[1])
    assert "save_pretrained" in tokenizer_trouble(tmp_path, said)[1]
    assert "connection" in tokenizer_trouble("org/name", "not a local folder")[1]
    asked = "contains custom code which must be executed. Please pass the argument `trust_remote_code=True`"
    assert "trust_remote_code: true" in tokenizer_trouble(tmp_path, asked)[1]


WORDS = {"a": 5, "the": 6, "1": 7}


def tokenizer(before: tuple[int, ...] = (), behind: tuple[int, ...] = (), named: int | None = None) -> Any:
    """One that puts ids before and behind a text, and calls one of them its `bos_token`."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = [WORDS[word] for word in text.split()]
        return [*before, *ids, *behind] if add_special_tokens else ids

    return SimpleNamespace(encode=encode, bos_token_id=named, decode=lambda ids: f"<{ids}>")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (tokenizer((2,), named=2), 2),
        (tokenizer((2,), (1,), named=2), 2),  # an end of sequence behind is none of it
        (tokenizer((), (1,), named=2), None),
        (tokenizer(named=0), None),  # GPT-2 has the name and does not use it
        (tokenizer((9,)), 9),  # no such name, and a token in front all the same
        (None, None),
    ],
)
def test_tokens_before_a_text_are_measured(made: Any, expected: int | None) -> None:
    assert find_bos_id(made, None) == expected
    assert tokens_added_before(made) == ([] if expected is None else [expected])
    assert find_bos_id(made, False) is None


def test_unused_bos_can_be_asked_for() -> None:
    assert find_bos_id(tokenizer(named=0), True) == 0
    assert find_bos_id(tokenizer((9,)), True) == 9


def test_missing_or_several_bos_is_refused(complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "the tokenizer has none", "bos: never"):
        find_bos_id(tokenizer(), True)
    with complains(ConfigError, "puts 2 tokens before a text", "bos: always"):
        find_bos_id(tokenizer((3, 4)), None)


def test_study_then_saes_decide_about_bos(complains: Callable[..., Any]) -> None:
    words = {"control": True, "treatment": False, "placebo": None}
    assert resolve_prepend_bos("always", words) is True
    assert resolve_prepend_bos("never", words) is False
    assert resolve_prepend_bos("auto", {"control": False, "placebo": "true"}) is False
    assert resolve_prepend_bos("auto", {"control": None}) is None
    with complains(ConfigError, "in front: control; these on texts without: treatment", "bos: always or bos: never"):
        resolve_prepend_bos("auto", words)
