"""Steering at the positions of one side of a chat, against passes over the whole text with positions counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chat_templates import chat_tokenizer
from saeffect.config_chat import as_chat
from saeffect.errors import ConfigError
from saeffect.lm.chat import has_part
from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel
from saeffect.steering import Intervention, NoiseCell, Sampling, generate
from saeffect.steering.baselines import naming_prompt
from saeffect.steering.operators import AddVectors, steered_tokens
from saeffect.steering.sampling import next_tokens, penalise
from saeffect.steering.trials import next_log_probabilities

HOOK = "blocks.1.hook_resid_pre"
TURNS = [("system", "Be brief."), ("user", "A fever"), ("assistant", "A dose"), ("user", "Be kind")]
CHAT = as_chat([{"role": role, "content": text} for role, text in TURNS], None, at="")
BEGUN = as_chat([{"role": "user", "content": "A fever"}, {"role": "assistant", "content": "A do"}], None, at="")
SAMPLING = Sampling(max_new_tokens=4, top_p=0.9, temperature=1.3)
CELLS = [NoiseCell(0, "p", i) for i in range(3)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer("llama3")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.float64).eval()
    return LanguageModel(model, tokenizer, "chat", prepend_bos=True)


def _by_hand(lm: LanguageModel, prompt: list[int], vector: torch.Tensor, where: list[int], after: bool) -> list[int]:
    """One row, every pass over the whole text again; `where` in the prompt, and `after` it or not."""
    ids = list(prompt)
    forbidden = ~lm.plain_tokens()
    for step in range(SAMPLING.max_new_tokens):
        places = where + (list(range(len(prompt), len(ids))) if after else [])

        def edit(x: torch.Tensor, places: list[int] = places) -> torch.Tensor:
            out = x.clone()
            out[:, places] += vector.to(x.dtype)
            return out

        with torch.no_grad(), edited(lm, HOOK, edit):
            logits = lm.model(input_ids=torch.tensor([ids])).logits[:, -1].float()
        penalise(logits, torch.tensor([ids[len(prompt) :]], dtype=torch.int64), SAMPLING.frequency_penalty)
        logits[:, forbidden] = -torch.inf
        ids.append(int(next_tokens(logits, [CELLS[0]], step, SAMPLING)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [CHAT, BEGUN], ids=["asked", "begun"])
@pytest.mark.parametrize("positions", ["system", "user", "assistant", "first_assistant", "template", "special"])
def test_generation_at_the_positions_of_a_side(lm: LanguageModel, positions: str, prompt: tuple) -> None:
    ids, parts = lm.encode_prompt(prompt), lm.prompt_parts(prompt)
    assert parts is not None and ids[0] == lm.bos_id
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) * 4
    intervention = Intervention(AddVectors(vectors), positions, parts)
    if positions == "system" and prompt is BEGUN:
        with pytest.raises(ConfigError, match="no token at positions 'system'"):
            generate(lm, HOOK, ids, CELLS, SAMPLING, intervention=intervention)
        return
    # An assistant's token is steered where it is predicted.
    shifted = positions in ("assistant", "first_assistant")
    own = np.flatnonzero(has_part(parts, (positions,))) - shifted
    if positions == "assistant" or (positions == "first_assistant" and prompt is CHAT):
        own = np.append(own, len(ids) - 1)
    where = sorted({int(i) for i in own if i >= 1})
    assert 0 < len(where) < len(ids) - 1
    got = generate(lm, HOOK, ids, CELLS, SAMPLING, intervention=intervention)
    assert got[0] == _by_hand(lm, ids, vectors[0], where, after=positions == "assistant")
    if len(where) > 1:
        assert got != generate(lm, HOOK, ids, CELLS, SAMPLING)
    log_p = next_log_probabilities(lm, HOOK, ids, intervention)
    assert log_p.shape == (3, lm.d_vocab)


def test_positions_of_chats_need_a_chat(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="plain text"):
        Intervention(AddVectors(torch.ones(1, 32)), "user").edit(5)
    parts = lm.prompt_parts(CHAT)
    assert parts is not None and not steered_tokens("template", parts, 1)[0]


def test_the_concept_is_named_where_the_user_last_speaks() -> None:
    named = naming_prompt([" drug"], CHAT)
    assert not isinstance(named, str)
    assert [message.content for message in named] == ["Be brief.", "A fever", "A dose", "Talk about drug. Be kind"]
    assert naming_prompt(["!"], CHAT) == ""
