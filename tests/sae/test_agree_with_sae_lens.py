"""Losses, gradients and reconstructions are SAELens', on the same weights and the same batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae.base import SaeConfig
from saeffect.sae.encoder import Encoder
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.sae.trainable import StepInputs, TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig

D_IN, D_SAE, N, K = 16, 52, 27, 5
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9)) + 0.4
MANY, FEW = list(range(3, 50, 4)), [7, 20]


@dataclass(frozen=True)
class Case:
    """One architecture with its settings: ours, SAELens', and which names mean the same loss."""

    kind: type[TrainableSae]
    theirs: str
    losses: dict[str, str]
    coefficient: str = ""
    our_options: dict[str, Any] = field(default_factory=dict)
    their_options: dict[str, Any] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)


def _topk(dead: list[int], **cfg: Any) -> Case:
    losses = {"mse": "mse_loss"} | ({"auxiliary": "auxiliary_reconstruction_loss"} if dead else {})
    rescaled = {"rescale_acts_by_decoder_norm": cfg.get("rescale_acts_by_decoder_norm", False)}
    ours = {"k": K, "auxiliary_k": D_IN // 2, "auxiliary_weight": 1.0, **rescaled}
    return Case(TopKSae, "TopK", losses, "", ours, {"k": K, **rescaled}, {"k": K, **cfg}, dead)


def _jumprelu(mode: str, pre_act: float | None, dead: list[int], **cfg: Any) -> Case:
    losses = {"mse": "mse_loss", "l0_penalty": "l0_loss"} | ({"pre_act": "pre_act_loss"} if dead and pre_act else {})
    ours = {"bandwidth": 0.3, "l0_kind": mode, "pre_act_coefficient": pre_act}
    theirs = {
        "jumprelu_bandwidth": 0.3,
        "jumprelu_sparsity_loss_mode": mode,
        "pre_act_loss_coefficient": pre_act,
    }
    return Case(JumpReluSae, "JumpReLU", losses, "l0", ours, theirs, cfg, dead)


def _gated(**cfg: Any) -> Case:
    losses = {"mse": "mse_loss", "l1": "l1_loss", "mse_by_gate": "auxiliary_reconstruction_loss"}
    return Case(GatedSae, "Gated", losses, "l1", cfg=cfg)


def _standard(**cfg: Any) -> Case:
    return Case(StandardSae, "Standard", {"mse": "mse_loss", "l1": "l1_loss"}, "l1", cfg=cfg)


RAW = {"apply_b_dec_to_input": False}
RESCALED = {"rescale_acts_by_decoder_norm": True}
CASES = {
    "standard": _standard(),
    "standard, raw input": _standard(**RAW),
    "topk": _topk([]),
    "topk, raw input": _topk(MANY, **RAW),
    "topk, few dead": _topk(FEW),
    "topk, many dead": _topk(MANY),
    "topk, rescaled": _topk([], **RESCALED),
    "topk, rescaled, many dead": _topk(MANY, **RESCALED),
    "jumprelu": _jumprelu("step", None, []),
    "jumprelu, raw input": _jumprelu("step", 0.2, FEW, **RAW),
    "jumprelu, dead": _jumprelu("step", 0.2, MANY),
    "jumprelu, dead but no penalty on them": _jumprelu("step", None, MANY),
    "jumprelu, tanh": _jumprelu("tanh", None, []),
    "jumprelu, tanh, dead": _jumprelu("tanh", 0.2, MANY),
    "gated": _gated(),
    "gated, raw input": _gated(**RAW),
}


def _ours(case: Case) -> TrainableSae:
    """All weights random, decoder rows of different lengths, some thresholds below zero."""
    sae = case.kind(SaeConfig(case.kind.architecture, D_IN, D_SAE, **case.cfg))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
            if name == "threshold":
                p.add_(0.3)
    return sae


def _theirs(case: Case, sae: TrainableSae) -> Any:
    import sae_lens

    cfg = getattr(sae_lens, f"{case.theirs}TrainingSAEConfig")(
        d_in=D_IN,
        d_sae=D_SAE,
        dtype="float64",
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        **case.their_options,
    )
    theirs = getattr(sae_lens, f"{case.theirs}TrainingSAE")(cfg)
    theirs.load_state_dict({name: p.detach().double() for name, p in sae.named_parameters()})
    theirs._parameters.update({name: torch.nn.Parameter(p.data.double()) for name, p in theirs.named_parameters()})
    return theirs


def _their_step(case: Case, theirs: Any, coefficient: float) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[case.dead] = True
    coefficients = {case.coefficient: coefficient} if case.coefficient else {}
    output = theirs.training_forward_pass(TrainStepInput(X.double(), coefficients, mask, 0, is_logging_step=False))
    output.loss.backward()
    return output


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest entry; SAELens computed in float64."""
    error = (found.double() - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max(), f"off by {error:.2e}, largest {expected.abs().max():.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_saelens(name: str, dense_above: float, dtype: torch.dtype) -> None:
    case, coefficient = CASES[name], 0.7
    sae = _ours(case)
    theirs = _theirs(case, sae)
    expected = _their_step(case, theirs, coefficient)
    config = SaeTrainingConfig(architecture=case.kind.architecture, d_sae=D_SAE, **case.our_options)  # type: ignore[arg-type]
    encoder = Encoder(dtype, chunk=10, dense_above=dense_above)
    step = StepInputs(config, encoder, N, coefficient=coefficient, dead=torch.tensor(case.dead, dtype=torch.int64))
    result = sae.accumulate_gradients(X, step)
    assert set(result.losses) == set(case.losses)
    for ours, their in case.losses.items():
        assert float(result.losses[ours]) == pytest.approx(expected.losses[their].item(), rel=1e-5), ours
        assert float(result.losses[ours]) > 0.01
    assert sum(map(float, result.losses.values())) == pytest.approx(expected.loss.item(), rel=1e-5)
    _assert_close(result.sae_out, expected.sae_out)
    assert torch.equal(result.fired, (expected.feature_acts > 0).sum(0))
    assert 0 < int(result.fired.sum()) < N * D_SAE
    assert {name for name, _ in theirs.named_parameters()} == set(sae.leaves())
    for parameter, leaf in sae.leaves().items():
        assert leaf.grad is not None
        _assert_close(leaf.grad.T if parameter == "W_enc" else leaf.grad, getattr(theirs, parameter).grad)


@pytest.mark.parametrize("name", ["jumprelu", "gated", "standard", "topk, rescaled"])
def test_inference_is_saelens(name: str) -> None:
    sae = _ours(CASES[name])
    theirs = _theirs(CASES[name], sae)
    if name == "jumprelu":
        theirs.threshold.data.clamp_(min=0.0)  # as its training step does
    expected = theirs.encode(X.double())
    _assert_close(sae.encode(X), expected)
    _assert_close(sae(X), theirs.decode(expected))


def test_cases_cover_the_kernels_edge() -> None:
    """The cases above mean something: entries on either side of the threshold, in and out of the kernel."""
    sae = _ours(CASES["jumprelu"])
    threshold = sae.threshold.clamp_min(0.0)  # type: ignore[operator]
    distance = (sae.hidden_pre(X) - threshold).detach()
    for lowest, highest in ((-9.0, -0.15), (-0.15, 0.0), (0.0, 0.15), (0.15, 9.0)):
        assert ((distance > lowest) & (distance < highest)).sum() > 30
    assert (threshold == 0).sum() > 3
