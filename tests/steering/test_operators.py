from __future__ import annotations

import dataclasses

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.lm.hooks import edited
from saeffect.steering import AddVectors, Intervention
from saeffect.steering.direct_effect import next_log_probabilities
from saeffect.steering.operators import span
from saeffect.steering.prompt_pass import read_prompt
from steering.tiny_model import D_MODEL, HOOK, n_hooks, tiny_model


def changed_positions(positions: str, start: int, length: int, prompt_length: int) -> list[int]:
    """Absolute positions at which adding ones changes zeros."""
    edit = Intervention(AddVectors(torch.ones(1, 2)), positions).edit(prompt_length)
    edit.start = start
    out = edit(torch.zeros(1, length, 2))
    return (start + out[0, :, 0].nonzero()[:, 0]).tolist()


@pytest.mark.parametrize(
    ("positions", "prefill", "decode"),
    [("all", [0, 1, 2, 3], [4]), ("prompt", [0, 1, 2], []), ("generated", [3], [4])],
)
def test_positions_of_a_four_token_prompt(positions, prefill, decode):
    assert changed_positions(positions, 0, 4, 4) == prefill
    assert changed_positions(positions, 4, 1, 4) == decode


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("length", [1, 2, 7])
def test_prompt_and_generated_are_complements_also_when_the_prompt_comes_in_pieces(start, length):
    prompt, rest = span("prompt", start, length, 4), span("generated", start, length, 4)
    assert prompt.start == 0
    assert prompt.stop == rest.start
    assert rest.stop == length
    assert prompt.stop == len([p for p in range(start, start + length) if p < 3])


def test_each_row_gets_its_own_vector_and_the_input_stays():
    x = torch.zeros(2, 3, 2)
    out = AddVectors(torch.tensor([[1.0, 0.0], [0.0, -2.0]])).apply(x)
    assert out.tolist() == [[[1.0, 0.0]] * 3, [[0.0, -2.0]] * 3]
    assert not x.any()


def test_an_edit_of_some_positions_leaves_its_input_alone():
    x = torch.zeros(1, 4, 2)
    Intervention(AddVectors(torch.ones(1, 2)), "prompt").edit(4)(x)
    assert not x.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_stays_and_zeros_change_no_bit(dtype):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = AddVectors(torch.zeros(2, 4)).apply(x)
    assert out.dtype == dtype
    assert torch.equal(out, x)


def test_half_precision_is_summed_wide_and_rounded_once():
    # bfloat16 has steps of 1/128 above 1 and of 2 above 256: 256 + (1 + 1/256) is above half a step and goes
    # up, but 1 + 1/256 rounded to bfloat16 first is 1, and 256 + 1 is a tie that goes down to the even 256.
    x = torch.tensor([[[256.0]]], dtype=torch.bfloat16)
    assert AddVectors(torch.tensor([[1.0 + 1 / 256]])).apply(x).item() == 258.0


def test_take_keeps_the_rows_and_the_positions():
    taken = Intervention(AddVectors(torch.arange(6.0).reshape(3, 2)), "prompt").take(1, 3)
    assert taken.operator.vectors.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert taken.positions == "prompt"


def test_bad_input():
    with pytest.raises(UnknownName, match="did you mean 'generated'"):
        Intervention(AddVectors(torch.ones(1, 2)), "generate")
    with pytest.raises(ConfigError, match="NaN"):
        AddVectors(torch.tensor([[float("nan")]]))
    with pytest.raises(ShapeMismatch, match="rows, d_model"):
        AddVectors(torch.ones(3))
    with pytest.raises(ShapeMismatch, match="as many rows"):
        AddVectors(torch.ones(2, 4)).apply(torch.zeros(1, 3, 4))
    with pytest.raises(ConfigError, match="last token"):
        Intervention(AddVectors(torch.ones(1, 2)), "prompt").edit(1)


def test_hook_is_gone_after_an_exception(lm):
    edit = Intervention(AddVectors(torch.ones(5, D_MODEL))).edit(2)  # five rows meet a batch of one
    ids = torch.tensor([[3, 4]])
    before = lm.model(input_ids=ids).logits
    with pytest.raises(ShapeMismatch), edited(lm, HOOK, edit):
        lm.model(input_ids=ids)
    assert n_hooks(lm) == 0
    assert torch.equal(lm.model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("positions", "expected"), [("all", [1, 2, 3]), ("prompt", [1, 2]), ("generated", [3])])
def test_bos_is_never_steered(positions, expected):
    """Neither at its place, nor in what the model computes from there on, prompt read at once or in pieces."""
    lm = tiny_model(torch.float64)
    tokenizer = type("Tokenizer", (type(lm.tokenizer),), {"bos_token_id": 1})()
    lm = dataclasses.replace(lm, tokenizer=tokenizer, prepend_bos=True)
    prompt, vectors = [1, 9, 40, 12], torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))

    def by_hand(x):
        out = x.clone()
        out[:, expected] += vectors.double()
        return out

    with torch.no_grad(), edited(lm, HOOK, by_hand):
        wanted = lm.model(input_ids=torch.tensor([prompt])).logits[:, -1].float()
    intervention = Intervention(AddVectors(vectors), positions)
    found = next_log_probabilities(lm, HOOK, prompt, intervention)
    torch.testing.assert_close(found, wanted.log_softmax(-1))
    edit = intervention.edit(4, lm.n_bos(prompt))
    torch.testing.assert_close(read_prompt(lm, HOOK, prompt, 1, edit, room=1)[0], wanted)
    edit.start = 4
    assert bool(edit(torch.zeros(1, 1, D_MODEL)).any()) == (positions != "prompt"), "what is generated"
    with pytest.raises(ConfigError, match="leaves out BOS"):
        intervention.edit(1, 1)
