"""Steps of BatchTopK's kind beside SAELens': the same weights, the same batch, the same dead features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeffect.sae.base import SaeConfig
from saeffect.sae.encoder import Encoder
from saeffect.sae.trainable import StepInputs, TrainableSae
from saeffect.sae.training.config import SaeTrainingConfig

D_IN, D_SAE, K, N = 8, 48, 3, 20
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
X = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9)) + 0.5
DEAD = torch.tensor([1, 4, 5, 17, 30, 31, 40])


def random_sae(kind: type[TrainableSae], **options: Any) -> Any:
    """All weights random, decoder rows of different lengths."""
    sae = kind(SaeConfig(kind.architecture, D_IN, D_SAE, k=K, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return sae


def step_inputs(sae: TrainableSae, *, dead: Tensor = DEAD[:0], dense: bool = False, **options: Any) -> StepInputs:
    """Chunks smaller than the batch, and SAELens' number of features for the auxiliary loss."""
    config = SaeTrainingConfig(
        architecture=sae.architecture,
        d_sae=D_SAE,
        k=K,
        auxiliary_k=D_IN // 2,
        auxiliary_weight=0.3,
        rescale_acts_by_decoder_norm=sae.cfg.rescale_acts_by_decoder_norm,
        **options,
    )
    encoder = Encoder(getattr(torch, config.encoder_dtype), chunk=8, dense_above=0.0 if dense else 1.0)
    return StepInputs(config, encoder, N, dead=dead)


def their_training_sae(name: str, sae: TrainableSae, **options: Any) -> Any:
    """SAELens' training SAE with the weights of ours."""
    import sae_lens

    cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        aux_loss_coefficient=0.3,
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=sae.cfg.rescale_acts_by_decoder_norm,
        **options,
    )
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(cfg)
    theirs.load_state_dict({key: p.detach().clone() for key, p in sae.named_parameters()}, strict=False)
    return theirs


def their_step(theirs: Any, dead: Tensor) -> Any:
    """One forward and backward pass of SAELens."""
    from sae_lens.saes.sae import TrainStepInput

    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[dead] = True
    output = theirs.training_forward_pass(TrainStepInput(X, {}, mask, 0, is_logging_step=False))
    theirs.zero_grad()
    output.loss.backward()
    return output


def assert_same_gradients(sae: TrainableSae, theirs: Any) -> None:
    """To 1e-5 of the largest entry of each."""
    for name in WEIGHTS:
        expected = getattr(theirs, name).grad
        found = sae.gradient(name).T if name == "W_enc" else sae.gradient(name)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


OPTIONS = [
    {},
    {"apply_b_dec_to_input": False},
    {"rescale_acts_by_decoder_norm": True},
]
