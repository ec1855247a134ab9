"""Models that are spread over devices, kept on disk or quantised give what the whole model gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from saeffect.config import ModelConfig
from saeffect.errors import ConfigError
from saeffect.lm import placement
from saeffect.lm.architectures import unembedding
from saeffect.lm.hooks import HOOK_KINDS, Rest, capture, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.steering import NoiseCell, Sampling, generate

IDS = torch.arange(1, 17).reshape(2, 8)
ON_DISK = {"device_map": "auto", "max_memory": {"cpu": "130KiB"}}


def _load(path: Path, **more: Any) -> LanguageModel:
    return load_language_model(ModelConfig(path=str(path), dtype="float32", **more), at="model")


def _adapter(model: Any, out: Path, *modules: str) -> Path:
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(out)
    return out


def _wider(folder: Path, out: Path) -> Path:
    """The same kind of model, with layers as wide as a block of 4-bit weights."""
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 64 // config.num_attention_heads})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def on_disk(tiny_llama_folder: Path) -> LanguageModel:
    lm = _load(tiny_llama_folder, **ON_DISK)
    assert {parameter.is_meta for parameter in lm.model.parameters()} == {True, False}
    return lm


def test_all_weights_on_disk(tiny_llama_folder: Path, tiny_llama: LanguageModel) -> None:
    try:
        lm = _load(tiny_llama_folder, device_map="auto", max_memory={"cpu": "1KiB"})
    except ConfigError as error:
        assert (error.at, error.fix) == ("model.max_memory", "give more memory, or install transformers 5.13 or newer.")
        assert Version(transformers.__version__) < Version("5.13")
    else:
        hook = "blocks.1.hook_resid_post"
        assert torch.equal(capture(lm, hook, IDS), capture(tiny_llama, hook, IDS))


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_weights_on_disk_give_the_same_at_every_hook(
    on_disk: LanguageModel, tiny_llama: LanguageModel, kind: str
) -> None:
    hook = f"blocks.1.{kind}"
    assert torch.equal(capture(on_disk, hook, IDS), capture(tiny_llama, hook, IDS))
    logits = []
    for lm in (on_disk, tiny_llama):
        with edited(lm, hook, lambda x: x + 0.1), torch.no_grad():
            logits.append(lm.model(input_ids=IDS).logits)
    assert torch.equal(*logits)


def test_weights_on_disk_give_the_same_matrices_and_texts(on_disk: LanguageModel, tiny_llama: LanguageModel) -> None:
    assert torch.equal(unembedding(on_disk), unembedding(tiny_llama))
    assert on_disk.dtype == torch.float32
    x = capture(tiny_llama, "blocks.1.hook_resid_pre", IDS)
    found = [Rest(lm, "blocks.1.hook_resid_pre").logits(IDS, x) for lm in (on_disk, tiny_llama)]
    assert torch.equal(*found)
    plan = Sampling(max_new_tokens=6)
    prompt, cells = tiny_llama.encode("The patient"), [NoiseCell(0, 0, sample) for sample in range(3)]
    texts = [generate(lm, "blocks.1.hook_resid_pre", prompt, cells, plan) for lm in (on_disk, tiny_llama)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("more", [{"merge_adapter": False}, {"device_map": "auto"}])
def test_adapter_beside_the_weights_is_as_good_as_merged(
    tiny_llama_folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    adapter = _adapter(_load(tiny_llama_folder).model, tmp_path, "q_proj", "down_proj")
    merged, apart = (
        _load(tiny_llama_folder, adapter=str(adapter)),
        _load(tiny_llama_folder, adapter=str(adapter), **more),
    )
    with torch.no_grad():
        logits = [lm.model(input_ids=IDS).logits for lm in (merged, apart)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert merged.adapter is not None
    assert apart.adapter is not None
    assert apart.adapter.effect == pytest.approx(merged.adapter.effect, rel=1e-3)
    assert not any(parameter.requires_grad for parameter in apart.model.parameters())
    hook = "blocks.0.hook_mlp_out"
    torch.testing.assert_close(capture(apart, hook, IDS), capture(merged, hook, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_model_with_adapter(tiny_llama_folder: Path, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama_folder = _wider(tiny_llama_folder, tmp_path / "wide")
    whole = _load(tiny_llama_folder)
    adapter = _adapter(_load(tiny_llama_folder).model, tmp_path / "adapter", "q_proj", "down_proj")
    lm = _load(tiny_llama_folder, quantize=bits)
    assert lm.dtype == torch.float32
    assert any(not parameter.is_floating_point() for parameter in lm.model.parameters())
    assert torch.equal(unembedding(lm), unembedding(whole))
    with torch.no_grad():
        near = torch.corrcoef(torch.stack([m.model(input_ids=IDS).logits.flatten() for m in (whole, lm)]))
    assert near[0, 1] > 0.9
    with_adapter = _load(tiny_llama_folder, quantize=bits, adapter=str(adapter))
    assert with_adapter.adapter is not None
    assert with_adapter.adapter.effect > 0.1


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"device_map": "auto", "merge_adapter": True}, "cannot be merged into weights that are spread"),
        (ON_DISK, "part of the model is on disk"),
    ],
)
def test_adapters_that_cannot_be_placed(
    tiny_llama_folder: Path, tmp_path: Path, complains: Callable[..., Any], more: dict[str, Any], part: str
) -> None:
    adapter = _adapter(_load(tiny_llama_folder).model, tmp_path, "q_proj")
    with complains(ConfigError, part):
        _load(tiny_llama_folder, adapter=str(adapter), **more)


def test_adapter_on_the_unembedding_is_not_kept_apart(
    tiny_llama_folder: Path, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    adapter = _adapter(_load(tiny_llama_folder).model, tmp_path, "lm_head")
    with complains(ConfigError, "lm_head"):
        _load(tiny_llama_folder, adapter=str(adapter), merge_adapter=False)


def test_quantising_without_the_package_is_refused(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        placement.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    with complains(ConfigError, "pip install bitsandbytes"):
        _load(tiny_llama_folder, quantize="4bit")


@pytest.mark.parametrize("more", [{"device": "cpu", "device_map": "auto"}, {"max_memory": {"cpu": "1GiB"}}])
def test_contradicting_places_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match="device_map"):
        ModelConfig(path="x", **more)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:99", "there is no device cuda:99 here: torch finds"),
        ("gpu", "there is no device 'gpu'"),
        ("mps", "models are run on cpu and cuda alone, not on mps"),
    ],
)
def test_a_device_that_is_not_here(
    device: str, said: str, tiny_llama_folder: Path, complains: Callable[..., Any]
) -> None:
    with complains(ConfigError, said, at="model"):
        _load(tiny_llama_folder, device=device)
