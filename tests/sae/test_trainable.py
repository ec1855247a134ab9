"""What the trainer may rely on, for every architecture that can be trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SaeConfig
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.crosscoder import CrosscoderSae, JumpReluCrosscoderSae, L1CrosscoderSae
from saeffect.sae.encoder import Encoder
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.matryoshka import MatryoshkaSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.log import loss_parts

from .dense_losses import LOSSES, Answer, Dense

KINDS: dict[str, type[TrainableSae]] = {
    kind.architecture: kind
    for kind in (
        *(StandardSae, TopKSae, JumpReluSae, BatchTopKSae, GatedSae, MatryoshkaSae),
        *(JumpReluCrosscoderSae, CrosscoderSae, L1CrosscoderSae),
    )
}
D_IN, D_SAE, N, K = 12, 53, 29, 4  # nothing divides by 8, nor by the chunk
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9)) + 0.4
NONE = torch.zeros(0, dtype=torch.int64)
FEW, MANY = torch.tensor([5, 30]), torch.arange(2, 52, 3)
COEFFICIENT = 0.3
OVER_THE_BATCH = ("batchtopk", "matryoshka", "crosscoder")  # what they keep of a token depends on the others

of_all = pytest.mark.parametrize("architecture", KINDS)


def _config(architecture: str, **options: Any) -> SaeTrainingConfig:
    settings: dict[str, Any] = {"topk": {"k": K, "auxiliary_k": 6, "auxiliary_weight": 0.7}}
    settings["batchtopk"] = settings["matryoshka"] = settings["crosscoder"] = settings["topk"]
    settings["jumprelu"] = settings["crosscoder_jumprelu"] = {
        "bandwidth": 0.4,
        "threshold_at_start": 0.2,
        "pre_act_coefficient": 0.6,
    }
    return SaeTrainingConfig(architecture=architecture, d_sae=D_SAE, **settings.get(architecture, {}) | options)  # type: ignore[arg-type]


def _sae(config: SaeTrainingConfig, *, filled: bool = True) -> TrainableSae:
    """Random weights, decoder rows of different lengths."""
    sae = KINDS[config.architecture](
        SaeConfig(
            config.architecture,
            D_IN,
            D_SAE,
            k=config.k if config.has_k else None,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm,
        )
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if filled:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))
            if filled and name == "threshold":
                p.abs_()
    return sae


def _inputs(
    config: SaeTrainingConfig, *, dead: Tensor = NONE, n_tokens: int = N, dense_above: float = 1.0
) -> StepInputs:
    encoder = Encoder(getattr(torch, config.encoder_dtype), chunk=8, dense_above=dense_above)
    return StepInputs(config, encoder, n_tokens, coefficient=COEFFICIENT, dead=dead)


def _dense(sae: TrainableSae, config: SaeTrainingConfig, x: Tensor, dead: Tensor) -> tuple[Answer, dict[str, Tensor]]:
    """The plain loss and autograd's gradients, in float64."""
    p = {name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()}
    answer = LOSSES[config.architecture](Dense(p, x.double(), config, COEFFICIENT, dead))
    grads = torch.autograd.grad(torch.stack(list(answer.losses.values())).sum(), list(p.values()))
    return answer, dict(zip(p, grads, strict=True))


def _gradients(sae: TrainableSae) -> dict[str, Tensor]:
    return {name: sae.gradient(name).clone() for name in sae.leaves()}


def _assert_close(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """To 1e-5 of the largest entry."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max()
    assert error <= share * expected.abs().max(), f"off by {error:.2e}, largest {expected.abs().max():.2e}"


def _assert_is(result: StepResult, sae: TrainableSae, expected: tuple[Answer, dict[str, Tensor]]) -> None:
    answer, grads = expected
    assert {name: float(v) for name, v in result.losses.items()} == pytest.approx(
        {name: v.item() for name, v in answer.losses.items()}, rel=1e-5
    )
    _assert_close(result.sae_out, answer.sae_out.detach())
    assert result.fired.dtype == torch.int64
    assert torch.equal(result.fired, (answer.acts > 0).sum(0))
    for name, grad in grads.items():
        _assert_close(sae.gradient(name), grad.T if name == "W_enc" else grad)


CASES = [(architecture, {}) for architecture in KINDS] + [
    *((architecture, {"apply_b_dec_to_input": False}) for architecture in KINDS),
    *((architecture, {"rescale_acts_by_decoder_norm": True}) for architecture in ("topk", "batchtopk", "matryoshka")),
    ("jumprelu", {"l0_kind": "tanh"}),
    ("crosscoder_jumprelu", {"l0_kind": "tanh"}),
    ("jumprelu", {"bandwidth": 5.0}),  # all thresholds' kernels reach below zero
    ("matryoshka", {"matryoshka_widths": (1, 30, 31, D_SAE)}),
]


def test_every_architecture_is_here() -> None:
    assert {name: kind for name, kind in ARCHITECTURES.items() if kind.trainable} == {
        n: k for n, k in KINDS.items() if k.trainable
    }
    assert set(KINDS) == set(LOSSES)


@pytest.mark.parametrize("dead", [NONE, FEW, MANY], ids=["none dead", "few dead", "many dead"])
@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "options"), CASES, ids=str)
def test_losses_and_gradients_are_autograds(
    architecture: str, options: dict[str, Any], dtype: str, dense_above: float, dead: Tensor
) -> None:
    config = _config(architecture, encoder_dtype=dtype, **options)
    sae = _sae(config)
    expected = _dense(sae, config, X, dead)
    result = sae.accumulate_gradients(X, _inputs(config, dead=dead, dense_above=dense_above))
    _assert_is(result, sae, expected)
    assert 0 < int(result.fired.sum()) < N * D_SAE
    # What is shown of the loss is all of it, under names that nothing else of a row has.
    assert set(loss_parts(result.losses)) == set(result.losses)
    assert not set(result.losses) & {"loss", "l0", "explained_variance", "dead", "gradient_norm", "learning_rate"}
    assert ("auxiliary" in result.losses) == (config.has_k and len(dead) > 0)
    assert ("pre_act" in result.losses) == (architecture.endswith("jumprelu") and len(dead) > 0)


@of_all
def test_one_token(architecture: str) -> None:
    config = _config(architecture)
    sae = _sae(config)
    expected = _dense(sae, config, X[:1], FEW)
    _assert_is(sae.accumulate_gradients(X[:1], _inputs(config, dead=FEW, n_tokens=1)), sae, expected)


@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@of_all
def test_gradients_are_made_anew(architecture: str, dense_above: float) -> None:
    config = _config(architecture)
    sae, step = _sae(config), _inputs(config, dead=FEW, dense_above=dense_above)
    sae.accumulate_gradients(X, step)
    first = _gradients(sae)
    sae.accumulate_gradients(3 * X[:11], step)
    again = sae.accumulate_gradients(X, step)
    for name, grad in _gradients(sae).items():
        assert torch.equal(grad, first[name])
    assert again.sae_out.shape == X.shape


@pytest.mark.parametrize("architecture", [name for name in KINDS if name not in OVER_THE_BATCH])
def test_halves_of_a_batch_add_up(architecture: str) -> None:
    """What several processes do."""
    config = _config(architecture)
    sae = _sae(config)
    whole, expected = sae.accumulate_gradients(X, _inputs(config, dead=FEW)), _gradients(sae)
    first, grads = sae.accumulate_gradients(X[:10], _inputs(config, dead=FEW)), _gradients(sae)
    second = sae.accumulate_gradients(X[10:], _inputs(config, dead=FEW))
    for name, grad in _gradients(sae).items():
        _assert_close(grads[name] + grad, expected[name])
    for name, loss in whole.losses.items():
        assert float(first.losses[name] + second.losses[name]) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(first.fired + second.fired, whole.fired)
    _assert_close(torch.cat([first.sae_out, second.sae_out]), whole.sae_out)


@pytest.mark.parametrize("rescaled", [False, True])
@of_all
def test_the_inference_form_does_what_the_training_did(architecture: str, rescaled: bool) -> None:
    options: dict[str, Any] = {"threshold_rate": 1.0} if architecture in OVER_THE_BATCH else {}
    config = _config(architecture, **options)
    if rescaled and config.has_k:
        config = config.model_copy(update={"rescale_acts_by_decoder_norm": True})
    sae = _sae(config)
    result = sae.accumulate_gradients(X, _inputs(config))
    for threshold in sae.running_state().values():
        threshold.mul_(1 - 1e-6)  # the smallest activation kept is at the threshold, and must be above it
    inference = sae.for_inference()
    _assert_close(inference(X), result.sae_out)
    assert torch.equal((inference.encode(X) > 0).sum(0), result.fired)
    assert inference.cfg.architecture == inference.architecture


@of_all
def test_the_scale_is_folded(architecture: str) -> None:
    config = _config(architecture)
    sae = _sae(config)
    for threshold in sae.running_state().values():
        threshold.fill_(0.6)
    scale = 3.7
    scaled = sae.for_inference()(X * scale).detach() / scale
    assert (sae.for_inference()(X) - scaled).abs().max() > 0.1
    acts = sae.for_inference().encode(X * scale).detach() / scale
    sae.fold_scale(scale)
    _assert_close(sae.for_inference()(X), scaled)
    _assert_close(sae.for_inference().encode(X), acts)


@of_all
def test_the_start(architecture: str) -> None:
    config = _config(architecture, seed=3)
    a, b, c = (_sae(config) for _ in range(3))
    torch.manual_seed(7)
    a.initialise(X, config)
    torch.manual_seed(8)
    b.initialise(X, config)
    c.initialise(X, _config(architecture, seed=4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.T)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.full((D_SAE,), 1.0 if config.has_k else 0.1))
    torch.testing.assert_close(a.b_dec.data, X.mean(0) if config.has_k else torch.zeros(D_IN))
    for name in a.vectors:
        expected = config.threshold_at_start if name == "threshold" else 0.0
        assert torch.equal(getattr(a, name), torch.full((D_SAE,), expected)), name
    a.initialise(X, _config(architecture, b_dec_init="mean", decoder_init_norm=0.5))
    torch.testing.assert_close(a.b_dec.data, X.mean(0))
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.full((D_SAE,), 0.5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dead", [NONE, MANY], ids=["none dead", "many dead"])
@of_all
def test_a_batch_on_which_nothing_fires(architecture: str, dead: Tensor, dtype: str) -> None:
    config = _config(architecture, encoder_dtype=dtype)
    sae = _sae(config)
    getattr(sae, sae.vectors[0]).data.fill_(-50.0)
    expected = _dense(sae, config, X, dead)
    result = sae.accumulate_gradients(X, _inputs(config, dead=dead))
    assert int(result.fired.sum()) == 0
    torch.testing.assert_close(result.sae_out, sae.b_dec.data.expand_as(X))
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            sae.gradient(name).double(), grad.T if name == "W_enc" else grad, rtol=1e-5, atol=1e-5
        )
    for name, loss in expected[0].losses.items():
        assert float(result.losses[name]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec", "b_dec"])
@of_all
def test_nan_reaches_the_losses(architecture: str, where: str, dense_above: float, dtype: str) -> None:
    config = _config(architecture, encoder_dtype=dtype)
    sae, x = _sae(config), X.clone()
    fired = int(sae.accumulate_gradients(X, _inputs(config)).fired.argmax())
    data, row = {
        "x": (x, 3),
        "W_enc": (sae.W_rows, fired),
        "W_dec": (sae.W_dec.data, fired),
        "b_dec": (sae.b_dec.data[:, None], 2),
    }[where]
    data[row, -1] = torch.nan
    result = sae.accumulate_gradients(x, _inputs(config, dense_above=dense_above))
    assert not torch.stack(list(result.losses.values())).isfinite().all()


@of_all
def test_leaves_are_the_parameters(architecture: str) -> None:
    config = _config(architecture)
    sae = _sae(config)
    names = ["W_enc", *sae.vectors, "W_dec", "b_dec"]
    leaves = sae.leaves()
    assert list(leaves) == names == [name for name, _ in sae.named_parameters()]
    for name, leaf in leaves.items():
        assert leaf.is_contiguous()
        assert leaf.data_ptr() == getattr(sae, name).data_ptr()
        assert sae.leaves()[name] is leaf
    assert leaves["W_enc"].shape == (D_SAE, D_IN)
    assert set(sae.state_dict()) == {*names, *sae.running_state()}
    for name, value in sae.running_state().items():
        sae.accumulate_gradients(X, _inputs(config))
        assert sae.running_state()[name] is value, "a checkpoint's tensor is changed in place"


@of_all
def test_constraints_hold_after_every_step(architecture: str) -> None:
    config = _config(architecture, decoder_rows="unit")
    sae, step = _sae(config), _inputs(config)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    sae.accumulate_gradients(X, step)
    sae.before_step(step)
    along = (sae.gradient("W_dec") * sae.W_dec.data).sum(1)
    assert along.abs().max() < 1e-5 < 1e-3 < sae.gradient("W_dec").abs().max()
    with torch.no_grad():
        for leaf in sae.leaves().values():
            leaf.sub_(0.5)
    sae.after_step(step)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    if isinstance(sae, JumpReluSae):
        assert (sae.threshold >= 0).all()
        assert (sae.threshold == 0).any()


@of_all
def test_free_decoders_are_left_alone(architecture: str) -> None:
    config = _config(architecture, decoder_rows="free")
    sae, step = _sae(config), _inputs(config)
    sae.accumulate_gradients(X, step)
    grads, W_dec = _gradients(sae), sae.W_dec.detach().clone()
    sae.before_step(step)
    sae.after_step(step)
    assert torch.equal(sae.gradient("W_dec"), grads["W_dec"])
    assert torch.equal(sae.W_dec, W_dec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@of_all
def test_it_learns(architecture: str, dtype: str) -> None:
    """Forty steps on one batch take off at least a third of the loss."""
    config = _config(architecture, encoder_dtype=dtype)
    sae = _sae(config, filled=False)
    sae.initialise(X, config)
    step = dataclasses.replace(_inputs(config, dense_above=0.2), coefficient=0.05)
    optimizer = torch.optim.Adam(sae.leaves().values(), lr=0.02, fused=True)
    losses = []
    for _ in range(40):
        result = sae.accumulate_gradients(X, step)
        losses.append(float(sum(result.losses.values())))
        sae.before_step(step)
        optimizer.step()
        sae.after_step(step)
    assert losses[-1] < 0.67 * losses[0]
