"""TransformerLens models of the same weights, built by hand since its own loader asks the hub."""

from __future__ import annotations

from typing import Any

import pytest

from saeffect.lm.language_model import LanguageModel

_SIZES: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "n_ctx": 128,
    "d_vocab": 320,
    "device": "cpu",
}


def peer(lm: LanguageModel, *, processed: bool) -> Any:
    """A HookedTransformer of `lm`: raw, or folded and centred as `from_pretrained` does by default."""
    pytest.importorskip("transformer_lens")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    if lm.name == "tiny-gpt2":
        cfg = HookedTransformerConfig(**_SIZES, d_mlp=128, act_fn="gelu_new", normalization_type="LN", eps=1e-5)
        weights = convert_gpt2_weights(lm.model, cfg)
    else:
        cfg = HookedTransformerConfig(
            **_SIZES,
            d_mlp=48,
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            eps=lm.model.config.rms_norm_eps,
            positional_embedding_type="rotary",
            rotary_dim=8,
            rotary_adjacent_pairs=False,
            n_key_value_heads=2,
        )
        weights = convert_llama_weights(lm.model, cfg)
    model = HookedTransformer(cfg)
    centre = processed and lm.name == "tiny-gpt2"  # only LayerNorm lets the writing weights be centred
    model.load_and_process_state_dict(
        {name: tensor.detach().clone() for name, tensor in weights.items()},
        fold_ln=processed,
        center_writing_weights=centre,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model.eval()
