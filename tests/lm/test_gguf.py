"""A GGUF file that this test writes loads as the model that it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError
from saeffect.io import Log
from saeffect.lm.gguf import choose_gguf, gguf_header
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import ModelShape, load_language_model, model_shape

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each rotary pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write(lm: LanguageModel, path: Path) -> None:
    import gguf

    config = lm.model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    weights = {name: tensor.numpy() for name, tensor in lm.model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                weight = _interleaved(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = _interleaved(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFFECT_CACHE", str(tmp_path_factory.mktemp("cache")))


def _bare(path: Path, kind: str) -> None:
    """A GGUF file without tensors that says what it is."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("whole_folder", [False, True], ids=["file", "folder"])
def test_gguf(tiny_llama: LanguageModel, tmp_path: Path, whole_folder: bool) -> None:
    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    config = ModelConfig(path=str(tmp_path if whole_folder else path), dtype="float32")
    lm = load_language_model(config)
    text = "The patient had a fever."
    ids = torch.tensor([tiny_llama.encode(text)])
    assert lm.encode(text) == tiny_llama.encode(text)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(input_ids=ids).logits, tiny_llama.model(input_ids=ids).logits)


def test_truncated_gguf(tiny_llama: LanguageModel, tmp_path: Path, complains: Callable[..., Any]) -> None:
    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SaeffectError) as caught:
        load_language_model(ModelConfig(path=str(path), dtype="float32"), at="model")
    assert caught.value.at == "model"


def test_converted_once(tiny_llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    lines: list[str] = []
    first, again = (
        load_language_model(ModelConfig(path=str(path), dtype="float32"), log=Log(lines.append)) for _ in "12"
    )
    assert len(lines) == 1
    assert lines[0].startswith("converting tiny.gguf to float32 (once, kept in ")
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert first.encode("The patient had") == again.encode("The patient had")
    load_language_model(ModelConfig(path=str(path), dtype="bfloat16"), log=Log(lines.append))
    assert len(lines) == 2
    with path.open("ab") as file:  # other bytes are another model
        file.write(b"\0")
    load_language_model(ModelConfig(path=str(path), dtype="float32"), log=Log(lines.append))
    assert len(lines) == 3
    assert capsys.readouterr().err == ""


def test_the_model_among_several_files(
    tiny_llama: LanguageModel, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    _bare(tmp_path / "a-lora.gguf", "adapter")
    with complains(NotFound, "a-lora.gguf (adapter)", at="here"):
        choose_gguf(tmp_path, at="here")
    _write(tiny_llama, tmp_path / "model.gguf")
    assert choose_gguf(tmp_path) == tmp_path / "model.gguf"
    assert model_shape(tmp_path) == ModelShape(32, 3, 128)
    _bare(tmp_path / "other.gguf", "model")
    with complains(ConfigError, "holds 2 models: model.gguf, other.gguf", at="model"):
        load_language_model(ModelConfig(path=str(tmp_path)), at="model")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4" * 9, b"GGUF\3\0\0\0" + b"\xff" * 40])
def test_headers_that_are_none(tmp_path: Path, complains: Callable[..., Any], content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with complains(BadFile, "a.gguf is no GGUF file that can be read", at="here"):
        gguf_header(tmp_path / "a.gguf", at="here")
