from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.lm.hooks import edited
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.steering import Intervention
from saeffect.steering.operators import AddVectors, SetFeatures, span
from saeffect.steering.prompt_pass import read_prompts
from saeffect.steering.trials import next_log_probabilities
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
def test_prompt_and_generated_positions_are_complements(start, length):
    prompt, rest = span("prompt", start, length, 4), span("generated", start, length, 4)
    assert prompt.start == 0
    assert prompt.stop == rest.start
    assert rest.stop == length
    assert prompt.stop == len([p for p in range(start, start + length) if p < 3])


def test_each_row_gets_its_own_vector():
    x = torch.zeros(2, 3, 2)
    out = AddVectors(torch.tensor([[1.0, 0.0], [0.0, -2.0]])).apply(x)
    assert out.tolist() == [[[1.0, 0.0]] * 3, [[0.0, -2.0]] * 3]
    assert not x.any()


def test_edit_keeps_its_input():
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
    taken = Intervention(AddVectors(torch.arange(6.0).reshape(3, 2)), "prompt").take([1, 2])
    assert taken.operator.vectors.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert taken.positions == "prompt"


def test_bad_input():
    with pytest.raises(UnknownName, match="did you mean 'generated'"):
        Intervention(AddVectors(torch.ones(1, 2)), "generate")
    with pytest.raises(ConfigError, match="NaN"):
        AddVectors(torch.tensor([[float("nan")]]))
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
    torch.testing.assert_close(read_prompts(lm, HOOK, [prompt], edit, room=1)[0], wanted)
    edit.start = 4
    assert bool(edit(torch.zeros(1, 1, D_MODEL)).any()) == (positions != "prompt"), "what is generated"
    with pytest.raises(ConfigError, match="leaves out BOS"):
        intervention.edit(1, 1)


D_SAE = 24
KINDS = {
    "standard": (StandardSae, {}),
    "topk": (TopKSae, {"k": 5}),
    "topk, ranked by decoder norm": (TopKSae, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (JumpReluSae, {}),
    "gated": (GatedSae, {}),
    "layer_norm": (StandardSae, {"normalize_activations": "layer_norm"}),
    "centred": (TopKSae, {"k": 5, "centre_input": True}),
}


@pytest.fixture(params=KINDS)
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    cls, options = KINDS[request.param]
    made = cls(SaeConfig(cls.architecture, D_MODEL, D_SAE, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if name.startswith("b_") else 1))
    if isinstance(made, JumpReluSae):
        made.threshold.data.abs_()
    return made.requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, D_MODEL, generator=torch.Generator().manual_seed(2)) * 2


def ablate(sae, *features, norm_limit=math.inf):
    return SetFeatures(sae, torch.tensor(features)[:, None], torch.zeros(len(features), 1), norm_limit=norm_limit)


def spliced(sae: SparseAutoencoder, x: torch.Tensor, set_to: dict[int, float]) -> torch.Tensor:
    """The definition: decode changed activations, and put the SAE's error back."""
    normalised, mean, scale = sae._normalise(x)
    acts = sae.activation(sae.hidden_pre(normalised))
    changed = acts.clone()
    for feature, value in set_to.items():
        changed[..., feature] = value
    error = x - (sae.decode(acts) * scale + mean)
    return sae.decode(changed) * scale + mean + error


def test_setting_features_keeps_the_saes_error(sae, x):
    rows = [[3], [7, 0], [1, 2, 5]]
    targets = torch.tensor([[2.0, 0, 0], [0.0, 1.5, 0], [3.0, 0.0, 0.25]])
    features = torch.tensor([[3, -1, -1], [7, 0, -1], [1, 2, 5]])
    out = SetFeatures(sae, features, targets).apply(x)
    for row, some in enumerate(rows):
        expected = spliced(sae, x[row], {f: float(targets[row, i]) for i, f in enumerate(some)})
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-4)


def test_ablating_an_inactive_feature_changes_nothing(sae, x):
    acts = sae.encode(x)
    out = ablate(sae, 3, 3, 3).apply(x.bfloat16())
    off = sae.encode(x.bfloat16())[..., 3] == 0
    assert torch.equal(out[off], x.bfloat16()[off])
    assert bool((acts[..., 3] > 0).any()), "the feature is on somewhere, else this says nothing"
    on = ablate(sae, 3, 3, 3).apply(x)[acts[..., 3] > 0]
    assert not torch.equal(on, x[acts[..., 3] > 0])


def test_longer_activations_than_the_limit_keep_every_bit(sae, x):
    """Also beside others in the row; at the limit itself the features are set."""
    lengths = x.norm(dim=-1)
    limit = float(lengths.flatten().sort().values[5])
    features, targets = torch.tensor([[3, -1], [7, 0], [1, -1]]), torch.tensor([[2.0, 0], [1.0, 1.0], [3.0, 0]])
    out = SetFeatures(sae, features, targets, norm_limit=limit).apply(x)
    whole = SetFeatures(sae, features, targets).apply(x)
    longer = lengths > limit
    assert 0 < int(longer.sum()) < longer.numel()
    assert torch.equal(out[longer], x[longer])
    assert torch.equal(out[~longer], whole[~longer])
    assert not torch.equal(whole[longer], x[longer])
    assert ablate(sae, 1, 1, 1, norm_limit=limit).take([0, 1]).norm_limit == limit


def test_a_slice_of_rows(sae, x):
    whole = SetFeatures(sae, torch.tensor([[1, -1], [2, 3], [4, -1]]), torch.zeros(3, 2))
    torch.testing.assert_close(whole.take([1, 2]).apply(x[1:]), whole.apply(x)[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_setting_features_keeps_the_dtype_and_the_input(dtype, x):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    given = x.to(dtype)
    before = given.clone()
    out = SetFeatures(sae, torch.tensor([[0]] * 3), torch.ones(3, 1)).apply(given)
    assert out.dtype == dtype
    assert torch.equal(given, before)


def test_hooks_are_removed_after_an_error(lm):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    before = n_hooks(lm)
    edit = Intervention(ablate(sae, 0)).edit(3)
    with pytest.raises(ShapeMismatch), edited(lm, HOOK, edit):
        lm.model(input_ids=torch.ones(2, 3, dtype=torch.int64))  # two rows meet an operator of one
    assert n_hooks(lm) == before
