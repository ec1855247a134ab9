from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import SENTENCES
from saeffect.config import ModelConfig
from saeffect.errors import ConfigError, NotFound
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_tokenizer
from saeffect.lm.tokens import known_tokens, token_texts, tokenizer_identity, tokenizer_trouble


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


def test_a_decoder_that_strips_spaces_keeps_them_in_token_texts() -> None:
    tokenizer = as_sentencepiece()
    texts = token_texts(tokenizer, len(tokenizer))
    ids = tokenizer.encode("The patient had pain", add_special_tokens=False)
    assert "".join(texts[i] for i in ids) == " The patient had pain"
    tokens = known_tokens(tokenizer)
    assert {texts[i] for i, token in tokens.items() if token == "▁patient"} == {" patient"}
    assert {texts[i] for i, token in tokens.items() if token in ("<0x0A>", "<0x41>")} == {"\n", "A"}
    assert {texts[i] for i, token in tokens.items() if token == "<0xC3>"} == {"\ufffd"}


def test_generated_text_begins_with_the_space_that_it_has() -> None:
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


def test_an_id_behind_a_hole_is_known_and_the_hole_is_not(tiny_tokenizer: Any) -> None:
    was = tiny_tokenizer.get_vocab()["Ġpatient"]
    tokenizer = with_holes(tiny_tokenizer, {"Ġpatient": 330})
    texts = token_texts(tokenizer, 332)
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


def test_identity_tells_other_rules_and_other_ids_apart(tiny_tokenizer: Any) -> None:
    spaced = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    spaced["pre_tokenizer"]["add_prefix_space"] = True
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spaced)))
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


def test_sentencepiece_alone_is_read_as_sentencepiece_reads_it(tmp_path: Path) -> None:
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with complains(NotFound, "sentencepiece", "pip install 'saeffect[sentencepiece]'", at="arms.control.model"):
        load_tokenizer(tmp_path, ModelConfig(path=str(tmp_path)), at="arms.control.model")


def test_remote_code_is_advised_only_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said = "Couldn't instantiate the backend tokenizer"
    assert tokenizer_trouble(tmp_path, said) == (said, tokenizer_trouble(tmp_path, "x")[1])
    assert "save_pretrained" in tokenizer_trouble(tmp_path, said)[1]
    assert "connection" in tokenizer_trouble("org/name", "not a local folder")[1]
    asked = "contains custom code which must be executed. Please pass the argument `trust_remote_code=True`"
    assert "trust_remote_code: true" in tokenizer_trouble(tmp_path, asked)[1]
