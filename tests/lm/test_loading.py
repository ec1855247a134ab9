from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, IncompatibleModels, NotFound, UnknownName
from saeffect.lm.accounting import refuse_nan
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import (
    bundled_path,
    load_language_model,
    load_tokenizer,
    locate_adapter,
    locate_model,
    model_identity,
    model_shape,
    resolve_dtype,
)
from saeffect.progress import Log

IDS = torch.arange(1, 9)[None]
PLACE = "arms.a.model"


def _load(path: Path | str, **more: Any) -> LanguageModel:
    return load_language_model(ModelConfig(path=str(path), dtype="float32", device="cpu", **more), at=PLACE)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may break."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


class Marker:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _adapter(model: Any, out: Path, rank: int = 2) -> Any:
    """A LoRA adapter with random weights for `model`, saved to `out`; returns the PeftModel."""
    import copy

    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(out)
    return adapted


def test_a_folder(tiny_llama: LanguageModel, tiny_llama_folder: Path) -> None:
    lm = _load(tiny_llama_folder)
    assert torch.equal(_logits(lm.model), _logits(tiny_llama.model))
    assert lm.encode("The patient") == tiny_llama.encode("The patient")
    assert lm.name == str(tiny_llama_folder)
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_dtypes(tiny_llama_folder: Path) -> None:
    assert load_language_model(ModelConfig(path=str(tiny_llama_folder), dtype="bfloat16")).dtype == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_half_precision_is_transformers_own(tiny_llama_folder: Path) -> None:
    """What transformers keeps in float32, such as the rotary frequencies, stays in float32."""
    from transformers import AutoModelForCausalLM

    lm = load_language_model(ModelConfig(path=str(tiny_llama_folder), dtype="bfloat16"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.bfloat16).eval()
    ours = {name: buffer.dtype for name, buffer in lm.model.named_buffers()}
    assert ours == {name: buffer.dtype for name, buffer in plain.named_buffers()}
    assert torch.equal(_logits(lm.model), _logits(plain))


@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [
        ("no-such-org/no-such-model", NotFound, "cannot load 'no-such-org/no-such-model'"),
        ("./none", NotFound, "there is no model at './none'"),
        ("/none/at/all", NotFound, "there is no model at"),
        ("none.gguf", NotFound, "there is no model at"),
        ("two words", ConfigError, "neither a path nor a hub id"),
        ("bundled:smollm3", UnknownName, "bundled:smollm2-135m-instruct"),
    ],
)
def test_nothing_there(complains: Callable[..., Any], path: str, kind: Any, part: str) -> None:
    with complains(kind, part, at=PLACE):
        _load(path)


def test_a_folder_that_is_no_model(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with complains(NotFound, "holds no config.json", at=PLACE):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("content", "part", "place"),
    [
        ("{", "not JSON", "config.json"),
        ("[]", "holds no keys", "config.json"),
        ('{"model_type": "no-such-type"}', "no-such-type", PLACE),
        ("{}", "model_type", PLACE),
    ],
)
def test_a_bad_config(folder: Path, complains: Callable[..., Any], content: str, part: str, place: str) -> None:
    (folder / "config.json").write_text(content)
    with complains(BadFile, part, at=place):
        _load(folder)


def test_a_pipe_in_place_of_weights(folder: Path, complains: Callable[..., Any]) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with complains(BadFile, "a pipe or a device", at="model.safetensors"):
        _load(folder)


def test_nan_weights(folder: Path, complains: Callable[..., Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with complains(BadFile, "NaN", "layers.1.mlp.up_proj.weight", at=PLACE):
        _load(folder)


def test_weights_whose_sum_overflows_and_8_bit_ones_are_no_nan() -> None:
    model = torch.nn.Module()
    model.large = torch.nn.Parameter(torch.full((4,), 3e38))
    model.small = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    refuse_nan(model, PLACE)


@pytest.mark.parametrize("keep", [0, 5, 3000, -100])
def test_truncated_weights(folder: Path, complains: Callable[..., Any], keep: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with complains(BadFile, "cannot be read", at=PLACE):
        _load(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, "lacks 30 of the 30 tensors"),
        (lambda t: {n: x for n, x in t.items() if "layers.2." not in n}, "lacks 9 of the 30 tensors"),
        (lambda t: t | {"model.layers.3.input_layernorm.weight": torch.ones(32)}, "holds 1 tensors that the model"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "self_attn.q_proj.bias"),
    ],
    ids=["wrapped", "a layer less", "a layer more", "a bias more"],
)
def test_every_tensor_is_accounted_for(
    folder: Path, complains: Callable[..., Any], change: Callable[[Any], Any], part: str
) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with complains(BadFile, part, at=PLACE):
        _load(folder)


def test_sizes_of_another_model(folder: Path, complains: Callable[..., Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with complains(BadFile, "other shapes than its config.json asks for", at=PLACE):
        _load(folder)


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("vocab_size", 10**9),
        ("num_hidden_layers", 10**6),
        ("hidden_size", 10**7),
        ("n_positions", 10**6),
        ("num_labels", 10**8),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in text_config"])
def test_sizes_beyond_the_weights_are_refused(
    folder: Path, complains: Callable[..., Any], key: str, size: int, nested: bool
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"text_config": {key: size}} if nested else {key: size})))
    for load in (_load, lambda folder: load_tokenizer(folder, ModelConfig(path=str(folder)))):
        with complains(BadFile, f"config.json says {key}: {size:,}, but the weights are 30 tensors", at="config.json"):
            load(folder)


def test_a_bad_config_is_not_the_tokenizers_fault(folder: Path, complains: Callable[..., Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with complains(BadFile, "transformers cannot load", at=PLACE):
        load_tokenizer(folder, ModelConfig(path=str(folder)), at=PLACE)


def test_parts_beside_the_language_model_are_named(folder: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.summary.weight": torch.ones(1, 32)}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    load_language_model(ModelConfig(path=str(folder), dtype="float32"), log=Log(lines.append))
    assert lines == ["not part of the language model, left out: 1 tensors, such as v_head.summary.weight"]


def test_model_and_adapter_in_one_folder(
    folder: Path, tiny_llama: LanguageModel, complains: Callable[..., Any]
) -> None:
    _adapter(tiny_llama.model, folder)
    with complains(ConfigError, "both a model and an adapter", at=PLACE):
        _load(folder)
    (folder / "config.json").unlink()
    with complains(ConfigError, "is an adapter, which needs its base model", "adapter: ", at=PLACE):
        _load(folder)


def test_code_is_not_advised_unless_asked_for(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(BadFile) as caught:
        _load(folder)
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize("size", ["large", -3, 1.5, [32], True])
def test_sizes_that_are_no_numbers(folder: Path, complains: Callable[..., Any], size: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    with complains(BadFile, "expected a positive whole number", at="config.json"):
        model_shape(folder)


def test_pickled_weights_are_never_read(
    folder: Path, tmp_path: Path, tiny_llama: LanguageModel, complains: Callable[..., Any]
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama.model.state_dict(), folder / "pytorch_model.bin")
    with complains(NotFound, "safetensors", at=PLACE):
        _load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with complains(NotFound, "safetensors", at=PLACE):
        _load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(BadFile) as caught:
        _load(folder)
    assert "trust_remote_code" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises((BadFile, NotFound)) as caught:
        _load(folder)
    assert caught.value.at == PLACE


def test_an_adapter_is_merged(tiny_llama: LanguageModel, tiny_llama_folder: Path, tmp_path: Path) -> None:
    adapted = _adapter(tiny_llama.model, tmp_path / "adapter")
    lm = _load(tiny_llama_folder, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(_logits(lm.model), _logits(adapted), rtol=1e-4, atol=1e-4)
    assert (_logits(lm.model) - _logits(tiny_llama.model)).abs().max() > 0.1
    assert lm.name == f"{tiny_llama_folder} + {tmp_path / 'adapter'}"
    assert not any("lora" in name for name, _ in lm.model.named_modules())


def test_no_adapter_there(tiny_llama_folder: Path, tmp_path: Path, complains: Callable[..., Any]) -> None:
    for adapter, kind, part in (
        ("./none", NotFound, "there is no adapter"),
        ("none", NotFound, "there is no adapter"),
        (str(tmp_path), NotFound, "holds no adapter_config.json"),
        (str(tiny_llama_folder), NotFound, "this is a whole model: give it as path"),
        ("bundled:none", UnknownName, "there is no bundled adapter"),
        ("no-such-org/no-such-adapter", NotFound, "cannot fetch the adapter"),
    ):
        with complains(kind, part, at=f"{PLACE}.adapter"):
            _load(tiny_llama_folder, adapter=adapter)


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 64}, {"num_hidden_layers": 5}, {"num_hidden_layers": 2}],
    ids=["wider", "deeper", "shallower"],
)
def test_an_adapter_of_another_model(
    tiny_llama: LanguageModel,
    tiny_llama_folder: Path,
    random_model: Callable[..., Any],
    tmp_path: Path,
    complains: Callable[..., Any],
    other: dict[str, int],
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**{**tiny_llama.model.config.to_dict(), "head_dim": None, **other})
    _adapter(random_model(config), tmp_path / "adapter")
    with complains(IncompatibleModels, "does not fit the base model", at=f"{PLACE}.adapter"):
        _load(tiny_llama_folder, adapter=str(tmp_path / "adapter"))


def test_an_adapter_for_other_modules(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    tiny_gpt2.model.save_pretrained(tmp_path / "gpt2")
    tiny_gpt2.tokenizer.save_pretrained(tmp_path / "gpt2")
    _adapter(tiny_llama.model, tmp_path / "adapter")
    with complains(IncompatibleModels, "does not fit the base model", at=f"{PLACE}.adapter"):
        _load(tmp_path / "gpt2", adapter=str(tmp_path / "adapter"))


def test_broken_adapters(
    tiny_llama: LanguageModel, tiny_llama_folder: Path, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    adapter = tmp_path / "adapter"
    _adapter(tiny_llama.model, adapter)
    weights = (adapter / "adapter_model.safetensors").read_bytes()

    def load() -> None:
        _load(tiny_llama_folder, adapter=str(adapter))

    (adapter / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with complains(BadFile, "adapter_model.safetensors cannot be read", at=f"{PLACE}.adapter"):
        load()
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with complains(BadFile, "pickled adapters (.bin) are never loaded", at=f"{PLACE}.adapter"):
        load()
    assert not (tmp_path / "ran").exists()
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    (adapter / "adapter_config.json").write_text("{")
    with complains(BadFile, "not JSON", at="adapter_config.json"):
        load()


def test_identity_follows_the_bytes(folder: Path, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    def identity(**more: Any) -> str:
        return model_identity(ModelConfig(path=str(folder), **more))

    first = identity()
    assert identity(dtype="bfloat16") == first
    (folder / "README.md").write_text("a card")
    assert identity() == first
    _adapter(tiny_llama.model, tmp_path / "adapter")
    assert identity(adapter=str(tmp_path / "adapter")) != first
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity() != first
    assert model_identity(ModelConfig(path="org/a")) != model_identity(ModelConfig(path="org/a", revision="b"))


def test_hub_ids_pass_through() -> None:
    assert locate_model(ModelConfig(path="gpt2")) == "gpt2"
    assert locate_model(ModelConfig(path="org/name-1.5")) == "org/name-1.5"
    assert locate_adapter(ModelConfig(path="gpt2", adapter="org/adapter")) == "org/adapter"
    assert locate_adapter(ModelConfig(path="gpt2")) is None


@pytest.mark.parametrize("name", ["", "..", "../errors.py", "none"])
def test_bundled_names_cannot_leave_their_folder(name: str, complains: Callable[..., Any]) -> None:
    with complains(UnknownName, "there is no bundled vocabulary", at="here"):
        bundled_path("vocabularies", name, at="here")


def test_transformers_is_as_talkative_as_before(tiny_llama_folder: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    _load(tiny_llama_folder)
    with pytest.raises(NotFound):
        _load("no-such-org/no-such-model")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
