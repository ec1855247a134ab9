"""What rows share is computed once, and every architecture gives what it gives row by row."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.architectures import blocks
from saeffect.lm.hooks import HOOK_KINDS, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.steering import Intervention, NoiseCell, Sampling, generate
from saeffect.steering.generate import continue_prompts
from saeffect.steering.operators import AddVectors
from saeffect.steering.prompt_pass import (
    _is_shape_error,
    continuation_logits,
    is_plain_cache,
    last_logits,
    read_prompts,
)
from steering.tiny_model import D_MODEL, D_VOCAB, HOOK, WordTokenizer, tiny_model

PROMPT = [5, 9, 40, 12, 33]
WIDTH = 32
COMMON = {"vocab_size": D_VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=D_VOCAB, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48, initializer_range=0.2),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "mistral, a short window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, sliding_window=4),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=D_VOCAB, hidden_size=WIDTH, n_layer=3, n_head=4, initializer_range=0.2
    ),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=D_VOCAB, n_embd=WIDTH, n_layer=3, n_head=4, rotary_dim=4, n_positions=64, initializer_range=0.2
    ),
    "falcon": lambda: transformers.FalconConfig(**COMMON, initializer_range=0.2),
    "falcon, alibi": lambda: transformers.FalconConfig(**COMMON, alibi=True, initializer_range=0.2),
    "phi": lambda: transformers.PhiConfig(**COMMON, intermediate_size=48, initializer_range=0.2),
    "olmo2": lambda: transformers.Olmo2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=0.2),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def any_lm(request, random_model):
    config = CONFIGS[request.param]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    return LanguageModel(random_model(config).double(), WordTokenizer(), request.param)


def hooks_of(lm):
    for kind in HOOK_KINDS:
        try:
            with edited(lm, f"blocks.1.{kind}", lambda x: x):
                pass
        except ConfigError:  # some blocks have no such place
            continue
        yield f"blocks.1.{kind}"


def intervention(n, positions):
    vectors = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    return Intervention(AddVectors(vectors), positions)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_equals_a_pass_over_every_row(any_lm, positions):
    for hook in hooks_of(any_lm):
        edit = intervention(3, positions).edit(len(PROMPT))
        rows = torch.tensor([PROMPT]).expand(3, -1).contiguous()
        following = torch.tensor([[7], [8], [9]])
        with torch.inference_mode(), edited(any_lm, hook, edit):
            edit.start = 0
            expected = any_lm.model(input_ids=torch.cat([rows, following], dim=1), use_cache=False).logits[:, -2:]
        edit = intervention(3, positions).edit(len(PROMPT))
        with torch.inference_mode():
            first, cache = read_prompts(any_lm, hook, [PROMPT] * 3, edit, room=1)
            edit.start = len(PROMPT)
            with edited(any_lm, hook, edit):
                second, _ = last_logits(any_lm, following, cache)
        found = torch.stack([first, second], dim=1)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_without_intervention_all_rows_are_one(any_lm):
    with torch.inference_mode():
        logits, _ = read_prompts(any_lm, "blocks.1.hook_resid_pre", [PROMPT] * 4, None, room=2)
        alone, _ = last_logits(any_lm, torch.tensor([PROMPT]))
    assert torch.equal(logits, alone.expand(4, -1))


def test_a_row_of_many_is_that_row_alone(any_lm):
    cells = [NoiseCell(0, "p", i) for i in range(4)]
    sampling = Sampling(max_new_tokens=10, top_p=0.9)
    steer = intervention(4, "all")
    together = generate(any_lm, "blocks.1.hook_resid_post", PROMPT, cells, sampling, intervention=steer)
    alone = generate(any_lm, "blocks.1.hook_resid_post", PROMPT, cells, sampling, intervention=steer, batch_size=1)
    assert together == alone


def test_prompts_of_different_lengths_in_one_batch(any_lm):
    prompts = [PROMPT, [7], [8, 9, 10, 11, 12, 13, 14], [33, 5]]
    cells = [NoiseCell(0, "p", i) for i in range(4)]
    sampling = Sampling(max_new_tokens=10, top_p=0.9)
    hook = "blocks.1.hook_resid_post"
    alone = [generate(any_lm, hook, ids, [cell], sampling)[0] for ids, cell in zip(prompts, cells, strict=True)]
    assert continue_prompts(any_lm, prompts, cells, sampling) == alone


def test_steered_prompts_of_different_lengths_in_one_batch(any_lm):
    prompts = [PROMPT, [7], PROMPT, [8, 9, 10, 11, 12, 13, 14], [33, 5], [33, 5]]
    cells = [NoiseCell(0, "p", i) for i in range(6)]
    sampling, steer = Sampling(max_new_tokens=8, top_p=0.9), intervention(6, "all")
    for hook in hooks_of(any_lm):
        if hook.endswith("hook_z"):  # another width
            continue
        alone = [
            generate(any_lm, hook, ids, [cell], sampling, intervention=steer.take([row]))[0]
            for row, (ids, cell) in enumerate(zip(prompts, cells, strict=True))
        ]
        assert continue_prompts(any_lm, prompts, cells, sampling, hook=hook, intervention=steer) == alone
        assert alone != continue_prompts(any_lm, prompts, cells, sampling)


@pytest.mark.parametrize(
    ("positions", "below", "above"),
    [("all", [(1, 5)], [(3, 5)]), ("prompt", [(1, 5)], [(3, 5)]), ("generated", [(1, 4), (1, 1)], [(1, 4), (3, 1)])],
)
@pytest.mark.parametrize("any_lm", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"], indirect=True)
def test_rows_and_positions_of_each_pass(any_lm, positions, below, above):
    seen = {0: [], 2: []}

    def listen(layer):
        def hook(_, args, kwargs):
            seen[layer].append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

        return hook

    handles = [blocks(any_lm.model)[i].register_forward_pre_hook(listen(i), with_kwargs=True) for i in seen]
    try:
        with torch.inference_mode():
            edit = intervention(3, positions).edit(len(PROMPT))
            read_prompts(any_lm, "blocks.1.hook_resid_pre", [PROMPT] * 3, edit, room=1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: below, 2: above}


# A window shorter than the prompts needs a mask, and is read in every row.
@pytest.mark.parametrize("any_lm", ["llama", "gpt2", "gpt_neox", "opt"], indirect=True)
def test_different_prompts_are_read_in_one_pass_each_once_below_the_hook(any_lm):
    prompts = [PROMPT, PROMPT[::-1], PROMPT, PROMPT]
    seen = []

    def listen(_, args, kwargs):
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    handles = [blocks(any_lm.model)[i].register_forward_pre_hook(listen, with_kwargs=True) for i in (0, 2)]
    try:
        with torch.inference_mode():
            steer = intervention(4, "all")
            together, _ = read_prompts(any_lm, "blocks.1.hook_resid_pre", prompts, steer.edit(len(PROMPT)), room=1)
            assert seen == [2, 4]
            alone = [
                read_prompts(any_lm, "blocks.1.hook_resid_pre", [ids], steer.take([row]).edit(len(PROMPT)), room=1)[0]
                for row, ids in enumerate(prompts)
            ]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 6])
def test_logits_of_continuations_equal_a_whole_reading(any_lm, length, monkeypatch):
    texts = torch.arange(3 * length).reshape(3, length) + 7
    with torch.no_grad():
        whole = any_lm.model(torch.cat([torch.tensor([PROMPT] * 3), texts], dim=1)).logits
    expected = whole[:, len(PROMPT) - 1 : -1].float()
    torch.testing.assert_close(continuation_logits(any_lm, PROMPT, texts), expected)
    monkeypatch.setattr("saeffect.steering.prompt_pass.is_plain_cache", lambda cache: False)
    torch.testing.assert_close(continuation_logits(any_lm, PROMPT, texts), expected)


def test_memory_is_set_aside_once(any_lm):
    with torch.inference_mode():
        edit = intervention(3, "all").edit(len(PROMPT))
        _, cache = read_prompts(any_lm, "blocks.1.hook_resid_pre", [PROMPT] * 3, edit, room=4)
        plain = [layer for layer in cache.layers if not layer.is_sliding]
        before = [layer.keys.data_ptr() for layer in plain]
        for _ in range(4):
            _, cache = last_logits(any_lm, torch.full((3, 1), 7), cache)
        assert [layer.keys.data_ptr() for layer in plain] == before
        assert {layer.get_seq_length() for layer in plain} <= {len(PROMPT) + 4}


def test_other_caches_are_left_alone():
    assert not is_plain_cache(None)
    assert not is_plain_cache(transformers.StaticCache(config=CONFIGS["llama"](), max_cache_len=8))
    assert not is_plain_cache(transformers.DynamicCache())


def test_wrong_width_raises_and_removes_hooks(any_lm):
    edit = Intervention(AddVectors(torch.ones(3, WIDTH + 1))).edit(len(PROMPT))
    with pytest.raises(ShapeMismatch), torch.inference_mode():
        read_prompts(any_lm, "blocks.1.hook_resid_pre", [PROMPT] * 3, edit, room=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_lm.model.modules())


def test_other_runtime_errors_are_raised(monkeypatch):
    """Bloom's bias does not fit, which is said with sizes; a full memory is another matter and must be heard of."""
    lm = tiny_model()
    edit = Intervention(AddVectors(torch.ones(3, D_MODEL))).edit(2)
    for error in (torch.OutOfMemoryError("CUDA out of memory: max_split_size_mb"), RuntimeError("can't allocate")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(importlib.import_module("saeffect.steering.prompt_pass"), "_read_once", fail)
        with pytest.raises(type(error), match=str(error)):
            read_prompts(lm, HOOK, [[3, 5]] * 3, edit, room=1)
    misfit = RuntimeError("The size of tensor a (3) must match the size of tensor b (1) at non-singleton dimension 0")
    assert _is_shape_error(misfit)
