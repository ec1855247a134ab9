"""A model from a hook on: the same as the whole model, without its first blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.architectures import blocks
from saeffect.lm.hooks import Rest, capture, edited
from saeffect.lm.language_model import LanguageModel

IDS = torch.tensor([[5, 9, 200, 31, 7], [1, 2, 3, 4, 310]])


def _logits(lm: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(input_ids=IDS, use_cache=False).logits


@contextmanager
def _counted(lm: LanguageModel) -> Iterator[list[int]]:
    """How often each block's attention runs."""
    runs = [0] * lm.n_layers
    handles = []
    for i, block in enumerate(blocks(lm.model)):
        part = getattr(block, "self_attn", None) or block.attn

        def count(*_: Any, i: int = i) -> None:
            runs[i] += 1

        handles.append(part.register_forward_hook(count))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("hook", "skipped"),
    [
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.2.hook_resid_pre", 2),
        ("blocks.1.hook_resid_post", 2),
        ("blocks.2.hook_resid_post", 3),
        ("blocks.1.hook_mlp_out", 0),
        ("blocks.1.hook_resid_mid", 0),
    ],
)
def test_logits_are_those_of_the_whole_model(
    name: str, hook: str, skipped: int, request: pytest.FixtureRequest
) -> None:
    lm: LanguageModel = request.getfixturevalue(name)
    rest = Rest(lm, hook)
    assert rest.n_skipped == skipped
    x = capture(lm, hook, IDS)
    with _counted(lm) as runs:
        found = rest.logits(IDS, x)
    assert runs == [0] * skipped + [1] * (lm.n_layers - skipped)
    assert torch.allclose(found, _logits(lm), atol=1e-5)
    with edited(lm, hook, lambda value: value * 1.5):
        expected = _logits(lm)
    assert torch.allclose(rest.logits(IDS, x * 1.5), expected, atol=1e-5)


def test_blocks_that_give_tuples(tiny_llama: LanguageModel) -> None:
    before = _logits(tiny_llama)
    layers = blocks(tiny_llama.model)
    handles = [block.register_forward_hook(lambda *call: (call[2], None)) for block in layers]
    # What takes a tuple where the model expects a tensor: the next block, and the final norm.
    takes = [*layers[1:], tiny_llama.model.model.norm]
    handles += [
        part.register_forward_pre_hook(lambda _, args: (args[0][0], *args[1:]) if isinstance(args[0], tuple) else args)
        for part in takes
    ]
    try:
        rest = Rest(tiny_llama, "blocks.2.hook_resid_pre")
        assert rest.n_skipped == 2
        assert torch.allclose(rest.logits(IDS, capture(tiny_llama, "blocks.2.hook_resid_pre", IDS)), before, atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()


def test_all_blocks_run_if_skipping_is_inexact(tiny_llama: LanguageModel) -> None:
    layers = blocks(tiny_llama.model)
    noted: dict[str, torch.Tensor] = {}

    def store(_: Any, __: Any, output: torch.Tensor) -> None:
        noted["first"] = output

    handles = [
        layers[0].self_attn.register_forward_hook(lambda _, __, out: store(_, __, out[0])),
        layers[2].register_forward_hook(lambda _, __, out: out + noted["first"]),
    ]
    hook = "blocks.1.hook_resid_post"
    try:
        rest = Rest(tiny_llama, hook)
        assert rest.n_skipped == 0
        assert torch.allclose(rest.logits(IDS, capture(tiny_llama, hook, IDS)), _logits(tiny_llama), atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_memory_is_heard_of(
    error: RuntimeError, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Rest, "logits", full)
    with pytest.raises(type(error), match="memory"):
        Rest(tiny_llama, "blocks.1.hook_resid_post")


def test_the_model_is_as_before_after_an_error(tiny_gpt2: LanguageModel) -> None:
    before = _logits(tiny_gpt2)
    rest = Rest(tiny_gpt2, "blocks.2.hook_resid_pre")
    with pytest.raises(ShapeMismatch, match=r"expected \[2, 5, 32\]"):
        rest.logits(IDS, torch.zeros(2, 5, 31))
    breaks = blocks(tiny_gpt2.model)[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rest.logits(IDS, torch.zeros(2, 5, 32))
    breaks.remove()
    assert torch.equal(_logits(tiny_gpt2), before)
    assert all("forward" not in vars(block) for block in blocks(tiny_gpt2.model))
    with pytest.raises(ConfigError, match="has 3"):
        Rest(tiny_gpt2, "blocks.3.hook_resid_pre")
