from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from saeffect.errors import ConfigError, IncompatibleSae, ShapeMismatch, UnknownName
from saeffect.lm.architectures import blocks
from saeffect.lm.hooks import _FACTORS, HOOK_KINDS, capture, edited, parse_hook, recorded, require_module_output
from saeffect.lm.language_model import LanguageModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, **GROUPED),
    "qwen3": transformers.Qwen3Config(**SIZES, **GROUPED),
    "gemma2": transformers.Gemma2Config(**SIZES, **GROUPED),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **GROUPED),
    "olmo2": transformers.Olmo2Config(**SIZES, num_key_value_heads=1, pad_token_id=0),
    "glm4": transformers.Glm4Config(**SIZES, **GROUPED),
    "granite": transformers.GraniteConfig(**SIZES, num_key_value_heads=1, residual_multiplier=0.22, pad_token_id=0),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "neox": transformers.GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}
PARALLEL = {
    "neox": transformers.GPTNeoXConfig(**SIZES),
    "gptj": transformers.GPTJConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4),
}


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def family(random_model: Callable[..., Any]) -> Callable[[Any], LanguageModel]:
    return lambda config: LanguageModel(random_model(config), None, type(config).__name__)


def _logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False).logits


def _hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


@pytest.fixture(autouse=True)
def _ids_of_small_vocabularies(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("tiny_gpt2", "tiny_llama"):  # no test leaves a hook behind
        if name in request.fixturenames:
            assert _hooks(request.getfixturevalue(name)) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_add_up_to_the_stream(family: Callable[[Any], LanguageModel], token_ids: Tensor, name: str) -> None:
    lm = family(FAMILIES[name])
    ids = token_ids % 64
    x = {kind: capture(lm, f"blocks.1.{kind}", ids) for kind in HOOK_KINDS}
    assert x["hook_resid_pre"].shape == (2, 9, 16)
    torch.testing.assert_close(x["hook_resid_pre"] + x["hook_attn_out"], x["hook_resid_mid"])
    torch.testing.assert_close(x["hook_resid_mid"] + x["hook_mlp_out"], x["hook_resid_post"])
    torch.testing.assert_close(capture(lm, "blocks.0.hook_resid_post", ids), x["hook_resid_pre"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_edit_changes_the_stream_after_it(
    family: Callable[[Any], LanguageModel], token_ids: Tensor, name: str, kind: str
) -> None:
    """What the block's second half adds to an edited stream is what it computes from the edited stream."""
    lm = family(FAMILIES[name])
    ids = token_ids % 64
    shift = torch.linspace(-1, 1, 16)
    clean = {k: capture(lm, f"blocks.1.{k}", ids) for k in HOOK_KINDS}
    with edited(lm, f"blocks.1.{kind}", lambda x: x + shift):
        x = {k: capture(lm, f"blocks.1.{k}", ids) for k in HOOK_KINDS}
    assert _hooks(lm) == 0
    if kind in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "attn.hook_z"):
        mid = x["hook_resid_pre"] + x["hook_attn_out"] + (shift if kind == "hook_resid_mid" else 0)
        torch.testing.assert_close(x["hook_resid_post"], mid + x["hook_mlp_out"])
        least = 1e-5 if kind == "attn.hook_z" else 1e-3  # output projections are small at the start
        assert (x["hook_mlp_out"] - clean["hook_mlp_out"]).abs().max() > least
    else:
        torch.testing.assert_close(x["hook_resid_post"], clean["hook_resid_post"] + shift)


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_have_no_resid_mid(
    family: Callable[[Any], LanguageModel], token_ids: Tensor, complains: Callable[..., Any], name: str
) -> None:
    lm = family(PARALLEL[name])
    ids = token_ids % 64
    x = {k: capture(lm, f"blocks.1.{k}", ids) for k in HOOK_KINDS if k != "hook_resid_mid"}
    total = x["hook_resid_pre"] + x["hook_attn_out"] + x["hook_mlp_out"]
    torch.testing.assert_close(total, x["hook_resid_post"])
    with complains(ConfigError, "has no hook_resid_mid", at="blocks.1.hook_resid_mid"):
        capture(lm, "blocks.1.hook_resid_mid", ids)


def test_bloom_halves_are_refused(
    family: Callable[[Any], LanguageModel], token_ids: Tensor, complains: Callable[..., Any]
) -> None:
    lm = family(transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    ids = token_ids % 64
    torch.testing.assert_close(
        capture(lm, "blocks.0.hook_resid_post", ids), capture(lm, "blocks.1.hook_resid_pre", ids)
    )
    for kind in ("hook_attn_out", "hook_mlp_out"):
        with complains(ConfigError, f"BloomBlock has no {kind}"):
            capture(lm, f"blocks.0.{kind}", ids)


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_unexplained_scale_of_a_half_is_refused(
    family: Callable[[Any], LanguageModel], token_ids: Tensor, complains: Callable[..., Any], factor: float
) -> None:
    """A block that scales what its MLP gives, by a number that its configuration does not name."""
    config = transformers.GraniteConfig(**SIZES, num_key_value_heads=1, residual_multiplier=factor, pad_token_id=0)
    lm = family(config)
    ids = token_ids % 64
    config.residual_multiplier = 1.0
    for kind in ("hook_attn_out", "hook_resid_mid", "hook_mlp_out"):
        with complains(ConfigError, f"GraniteDecoderLayer does not add up by its {kind}", at=f"blocks.1.{kind}"):
            capture(lm, f"blocks.1.{kind}", ids)
    assert capture(lm, "blocks.1.hook_resid_post", ids).shape == (2, 9, 16)
    assert _hooks(lm) == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_an_edit_while_blocks_are_measured_does_not_mislead(
    family: Callable[[Any], LanguageModel], token_ids: Tensor, name: str, kind: str
) -> None:
    lm = family(FAMILIES[name])
    ids = token_ids % 64
    with edited(lm, f"blocks.1.{kind}", lambda x: x + torch.linspace(-1, 1, 16)):
        _FACTORS.pop(lm.model, None)
        capture(lm, "blocks.0.hook_mlp_out", ids)
    multiplier = getattr(lm.model.config, "residual_multiplier", 1.0)
    expected = {"hook_attn_out": multiplier, "hook_resid_mid": 1.0, "hook_mlp_out": multiplier}
    assert _FACTORS[lm.model] == {0: expected, 1: expected}


def test_all_blocks_are_measured_in_one_pass(family: Callable[[Any], LanguageModel], token_ids: Tensor) -> None:
    lm = family(FAMILIES["llama"])
    passes: list[None] = []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(None))
    with recorded(lm, *(f"blocks.{i}.{kind}" for i in range(2) for kind in HOOK_KINDS)) as x:
        assert len(passes) == 1
        _logits(lm, token_ids % 64)
    assert len(x) == 2 * len(HOOK_KINDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_adds_up(family: Callable[[Any], LanguageModel], token_ids: Tensor, name: str) -> None:
    lm = family(FAMILIES[name])
    lm.model.to(torch.bfloat16)
    for kind in HOOK_KINDS:
        assert capture(lm, f"blocks.1.{kind}", token_ids % 64).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("model.layers.1", "blocks.1.hook_resid_post"),
        ("transformer.h.0.mlp", "blocks.0.hook_mlp_out"),
        ("layers.1.self_attn", "blocks.1.hook_attn_out"),
    ],
)
def test_modules_of_transformers_are_understood(lm: LanguageModel, token_ids: Tensor, path: str, hook: str) -> None:
    assert torch.equal(capture(lm, path, token_ids), capture(lm, hook, token_ids))


def test_sae_of_a_rescaled_module_is_refused(
    family: Callable[[Any], LanguageModel], complains: Callable[..., Any]
) -> None:
    for name in ("llama", "gpt2"):
        require_module_output(family(FAMILIES[name]), "layers.1.mlp", at="here")
    for name in ("gemma2", "gemma3", "olmo2", "granite"):
        lm = family(FAMILIES[name])
        require_module_output(lm, "layers.1", at="here")
        with complains(IncompatibleSae, "the SAE reads what layers.1.mlp gives", at="here"):
            require_module_output(lm, "layers.1.mlp", at="here")


def test_activations_that_overflow(family: Callable[[Any], LanguageModel], complains: Callable[..., Any]) -> None:
    lm = family(FAMILIES["llama"])
    lm.model.get_input_embeddings().weight.data *= 1e6
    ids = torch.arange(9)[None]
    assert capture(lm, "blocks.0.hook_resid_pre", ids).isfinite().all()
    lm.model.to(torch.float16)
    with complains(ConfigError, "not finite", "float16", "bfloat16 or float32"):
        capture(lm, "blocks.0.hook_resid_pre", ids)


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_identity_edit_changes_nothing(lm: LanguageModel, token_ids: Tensor, kind: str) -> None:
    clean = _logits(lm, token_ids)
    with edited(lm, f"blocks.1.{kind}", lambda x: x.clone()):
        assert torch.equal(_logits(lm, token_ids), clean)


@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_hooks_are_removed_after_an_exception(lm: LanguageModel, token_ids: Tensor, kind: str) -> None:
    clean = _logits(lm, token_ids)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("inside the edit")

    with pytest.raises(RuntimeError, match="inside the edit"), edited(lm, f"blocks.1.{kind}", fail):
        _logits(lm, token_ids)
    assert _hooks(lm) == 0
    assert torch.equal(_logits(lm, token_ids), clean)


def test_edits_apply_to_every_pass_and_nest(lm: LanguageModel, token_ids: Tensor) -> None:
    seen: list[float] = []

    def outer(x: Tensor) -> Tensor:
        seen.append(float(x.abs().max()))
        return x

    with (
        edited(lm, "blocks.0.hook_resid_pre", torch.zeros_like),
        edited(lm, "blocks.0.hook_resid_pre", outer),
    ):
        _logits(lm, token_ids)
        _logits(lm, token_ids)
    assert seen == [0.0, 0.0]


def test_capture_sees_edits_further_up(lm: LanguageModel, token_ids: Tensor) -> None:
    with edited(lm, "blocks.1.hook_resid_pre", torch.zeros_like):
        assert capture(lm, "blocks.1.hook_resid_pre", token_ids).abs().max() == 0


def test_capture_runs_no_further_than_the_hook(lm: LanguageModel, token_ids: Tensor) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks(lm.model))
    ]
    try:
        capture(lm, "blocks.1.hook_resid_mid", token_ids)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("blocks.3.hook_resid_pre", ConfigError, "needs block 3, but the model has 3 (0 to 2)"),
        ("blocks.1.hook_resid", UnknownName, "valid: attn.hook_z, hook_attn_out, hook_mlp_out"),
        ("blocks.-1.hook_resid_pre", ConfigError, "is not a hook name"),
        ("model.layers.1.mlp.up_proj", ConfigError, "is not a hook name"),
        ("blocks.1.attn.hook_q", ConfigError, "TransformerLens' hook 'blocks.1.attn.hook_q' is not supported"),
        ("blocks.1.ln1.hook_normalized", ConfigError, "is not supported"),
        ("hook_embed", ConfigError, "is not supported"),
        ("model.layers.3", ConfigError, "needs block 3"),
        ("", ConfigError, "is not a hook name"),
    ],
)
def test_bad_names(
    lm: LanguageModel, token_ids: Tensor, complains: Callable[..., Any], name: str, kind: Any, part: str
) -> None:
    with complains(kind, part):
        capture(lm, name, token_ids)
    with complains(kind, part), edited(lm, name, lambda x: x):
        pass
    with complains(kind, part, at="arms.a.hook"):
        parse_hook(name, lm.n_layers, at="arms.a.hook")


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)])
def test_bad_token_ids(lm: LanguageModel, ids: Tensor) -> None:
    with pytest.raises(ShapeMismatch):
        capture(lm, "blocks.0.hook_resid_pre", ids)


def test_a_model_without_blocks(complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "Linear keeps its blocks in none of the known places"):
        blocks(torch.nn.Linear(2, 2))
