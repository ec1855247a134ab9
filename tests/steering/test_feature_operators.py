from __future__ import annotations

import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.steering import AddVectors, Intervention, SetFeatures, ablate, add_features, clamp
from steering.tiny_model import D_MODEL, HOOK, n_hooks

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


def spliced(sae: SparseAutoencoder, x: torch.Tensor, set_to: dict[int, float]) -> torch.Tensor:
    """The definition: decode changed activations, and put the SAE's error back."""
    normalised, mean, scale = sae._normalised(x)
    acts = sae.activation(sae.hidden_pre(normalised))
    changed = acts.clone()
    for feature, value in set_to.items():
        changed[..., feature] = value
    error = x - (sae.decode(acts) * scale + mean)
    return sae.decode(changed) * scale + mean + error


def test_setting_features_is_decoding_changed_activations_with_the_error_kept(sae, x):
    rows = [[3], [7, 0], [1, 2, 5]]
    targets = torch.tensor([[2.0, 0, 0], [0.0, 1.5, 0], [3.0, 0.0, 0.25]])
    features = torch.tensor([[3, -1, -1], [7, 0, -1], [1, 2, 5]])
    out = SetFeatures(sae, features, targets).apply(x)
    for row, some in enumerate(rows):
        expected = spliced(sae, x[row], {f: float(targets[row, i]) for i, f in enumerate(some)})
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-4)


def test_ablating_a_feature_that_is_off_changes_no_bit(sae, x):
    acts = sae.encode(x)
    out = ablate(sae, [[3], [3], [3]]).apply(x.bfloat16())
    off = sae.encode(x.bfloat16())[..., 3] == 0
    assert torch.equal(out[off], x.bfloat16()[off])
    assert bool((acts[..., 3] > 0).any()), "the feature is on somewhere, else this says nothing"
    on = ablate(sae, [[3], [3], [3]]).apply(x)[acts[..., 3] > 0]
    assert not torch.equal(on, x[acts[..., 3] > 0])


def test_longer_activations_than_the_limit_keep_every_bit(sae, x):
    """Also beside others in the row; at the limit itself the features are set."""
    lengths = x.norm(dim=-1)
    limit = float(lengths.flatten().sort().values[5])
    out = clamp(sae, [[3], [7, 0], [1]], [2.0, 1.0, 3.0], torch.ones(D_SAE), norm_limit=limit).apply(x)
    whole = clamp(sae, [[3], [7, 0], [1]], [2.0, 1.0, 3.0], torch.ones(D_SAE)).apply(x)
    longer = lengths > limit
    assert 0 < int(longer.sum()) < longer.numel()
    assert torch.equal(out[longer], x[longer])
    assert torch.equal(out[~longer], whole[~longer])
    assert not torch.equal(whole[longer], x[longer])
    assert ablate(sae, [[1]] * 3, norm_limit=limit).take(0, 2).norm_limit == limit


def test_clamp_takes_multiples_of_the_maximum(sae):
    maxima = torch.arange(1.0, D_SAE + 1)
    made = clamp(sae, [[2], [4, 9]], [5.0, 0.5], maxima)
    assert made.targets.tolist() == [[15.0, 0.0], [2.5, 5.0]]
    assert made.features.tolist() == [[2, -1], [4, 9]]


def test_several_features_are_added_at_once(sae):
    made = add_features(sae, [[2], [4, 9]], [[3.0], [1.0, -2.0]])
    assert isinstance(made, AddVectors)
    directions = sae.directions(torch.arange(D_SAE))
    torch.testing.assert_close(made.vectors[0], 3 * directions[2])
    torch.testing.assert_close(made.vectors[1], directions[4] - 2 * directions[9])


def test_a_slice_of_rows(sae, x):
    whole = ablate(sae, [[1], [2, 3], [4]])
    torch.testing.assert_close(whole.take(1, 3).apply(x[1:]), whole.apply(x)[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_stays_and_the_input_is_not_changed(dtype, x):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    given = x.to(dtype)
    before = given.clone()
    out = SetFeatures(sae, torch.tensor([[0]] * 3), torch.ones(3, 1)).apply(given)
    assert out.dtype == dtype
    assert torch.equal(given, before)


def test_in_a_model_hooks_are_undone_also_after_an_error(lm):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    before = n_hooks(lm)
    edit = Intervention(ablate(sae, [[0]])).edit(3)
    with pytest.raises(ShapeMismatch), edited(lm, HOOK, edit):
        lm.model(input_ids=torch.ones(2, 3, dtype=torch.int64))  # two rows meet an operator of one
    assert n_hooks(lm) == before


@pytest.mark.parametrize(
    ("features", "targets", "error", "words"),
    [
        ([[0, 0]], [[1.0, 1.0]], ConfigError, "same feature twice"),
        ([[0]], [[-1.0]], ConfigError, "negative"),
        ([[0]], [[float("nan")]], ConfigError, "NaN"),
        ([[D_SAE]], [[1.0]], ShapeMismatch, "the SAE has"),
        ([[-2]], [[1.0]], ShapeMismatch, "run from -2"),
        ([[0]], [[1.0, 2.0]], ShapeMismatch, "expected both"),
    ],
)
def test_bad_requests(features, targets, error, words):
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    with pytest.raises(error, match=words):
        SetFeatures(sae, torch.tensor(features), torch.tensor(targets))


def test_a_feature_that_never_fired_cannot_be_clamped():
    sae = StandardSae(SaeConfig("standard", D_MODEL, D_SAE))
    with pytest.raises(ConfigError, match="feature 3 never fired"):
        clamp(sae, [[2], [3]], [1.0, 1.0], torch.tensor([1.0, 1, 1, 0] + [1.0] * 20))
    with pytest.raises(ConfigError, match="at least one feature"):
        ablate(sae, [[1], []])
    with pytest.raises(ShapeMismatch, match="as many coefficients"):
        add_features(sae, [[1]], [[1.0, 2.0]])
