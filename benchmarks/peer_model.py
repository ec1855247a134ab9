"""The weights of a transformers GPT-2 in transformer-lens' own model."""

from __future__ import annotations

from typing import Any

__all__ = ["hooked_gpt2"]


def hooked_gpt2(model: Any, *, processed: bool) -> Any:
    """A float32 HookedTransformer that computes what `model` computes.

    Args:
        model: A GPT2LMHeadModel; its weights are copied.
        processed: With norms folded into weights and weights centred, as transformer-lens' `from_pretrained` makes
            it by default. Its logits then lack their mean, which changes no probability.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = model.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd,
        n_ctx=c.n_positions,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type="LNPre" if processed else "LN",
        eps=c.layer_norm_epsilon,
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    weights = {name: tensor.detach().clone() for name, tensor in convert_gpt2_weights(model, cfg).items()}
    hooked.load_and_process_state_dict(
        weights,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return hooked.eval()
