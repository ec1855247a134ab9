"""The embedded model, converted from its GGUF file: what transformers makes of the same folder, and sense."""

from __future__ import annotations

import pytest
import torch

from saeffect.lm.gguf import embedded_model
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel

pytestmark = pytest.mark.real


def test_captures_and_logits_are_those_of_transformers(real_model: LanguageModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=real_model.dtype).eval()
    text = "The patient was given insulin because"
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    assert real_model.encode(text) == ids[0].tolist()
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True)
        logits = real_model.model(input_ids=ids).logits
    assert torch.equal(logits, plain.logits)
    # hidden_states[i] is what enters block i.
    for layer in (0, 8, 26):
        x = capture(real_model, f"blocks.{layer}.hook_resid_pre", ids)
        assert torch.equal(x, plain.hidden_states[layer])
    assert (real_model.n_layers, real_model.d_model, real_model.d_vocab) == (30, 576, 49152)


def test_it_speaks(real_model: LanguageModel) -> None:
    ids = torch.tensor([real_model.encode("The capital of France is")])
    with torch.no_grad():
        top = real_model.model(input_ids=ids).logits[0, -1].topk(5).indices
    assert " Paris" in [real_model.token_strings()[i] for i in top.tolist()]
