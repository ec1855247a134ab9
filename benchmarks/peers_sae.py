"""The peers' own training loops and steps, fed with our batches and started from our weights.

No part of a peer is rewritten or skipped: each function builds the peer's trainer as its documentation does and lets it
take batches from the feed. Settings common to all: learning rate without warm-up or decay, Adam
(0.9, 0.999), no auxiliary loss (no feature is dead yet), no logging, no checkpoints, float32 unless said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from feed import Feed, Weights
from torch import Tensor, nn

__all__ = ["FOREVER", "RUNNERS", "Spec"]

FOREVER = 10_000_000  # steps of the run: so many that schedules are constant over 300 of them


@dataclass(frozen=True)
class Spec:
    """What a contender is to train.

    Attributes:
        start: Weights by SAELens' names, float32.
        batch: Tokens a step.
        k: Active features a token of a TopK SAE, None for L1.
        lr: Adam's learning rate.
        l1: Weight of the L1 penalty.
        options: What distinguishes this contender from its siblings.
    """

    start: dict[str, Tensor]
    batch: int
    k: int | None
    lr: float
    l1: float
    options: dict[str, Any]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.start["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.start["W_enc"].shape[1]


def sae_lens(spec: Spec, feed: Feed) -> None:
    """`SAETrainer.fit()` on a `StandardTrainingSAE` or `TopKTrainingSAE`.

    Options:
        autocast: bfloat16 autocast of the whole forward pass, which SAELens offers for GPUs' sake.
        compile: `compile_sae`, as SAELens' runner applies it (inductor, default mode).
        sparse: `use_sparse_activations`, which on CPU asks for `rescale_acts_by_decoder_norm=False`.
    """
    from sae_lens import (
        SAETrainer,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    shape = {"d_in": spec.d_in, "d_sae": spec.d_sae, "dtype": "float32", "device": "cpu"}
    sparse = spec.options.get("sparse", False)
    rescale = spec.options.get("rescale", not sparse)
    sae: Any
    if spec.k is None:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=spec.l1))
    else:
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                **shape, k=spec.k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=rescale
            )
        )
    _load(sae, spec.start)
    if spec.options.get("compile"):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
    config = SAETrainerConfig(
        total_training_samples=FOREVER * spec.batch,
        train_batch_size_samples=spec.batch,
        lr=spec.lr,
        lr_end=spec.lr,
        autocast=spec.options.get("autocast", False),
        logger=LoggingConfig(log_to_wandb=False),
    )
    feed.ready(lambda: Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, rescale=spec.k is not None and rescale))
    SAETrainer(cfg=config, sae=sae, data_provider=iter(feed)).fit()


def dictionary_learning(spec: Spec, feed: Feed) -> None:
    """`trainer.update(step, activations)` as `trainSAE` calls it, of the trainers it documents.

    Options:
        april: `StandardTrainerAprilUpdate` (penalty scaled by decoder norm, the recipe that SAELens and saeffect
            follow) instead of `StandardTrainer` (decoder rows kept at unit length). L1 only.
    """
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    shape = {"activation_dim": spec.d_in, "dict_size": spec.d_sae, "layer": 0, "lm_name": "none", "device": "cpu"}
    schedule = {"steps": FOREVER, "lr": spec.lr, "warmup_steps": 0}
    trainer: Any
    if spec.k is not None:
        trainer = TopKTrainer(**shape, **schedule, k=spec.k)
    else:
        kind = StandardTrainerAprilUpdate if spec.options.get("april") else StandardTrainer
        trainer = kind(**shape, **schedule, l1_penalty=spec.l1, sparsity_warmup_steps=None)
    ae = trainer.ae
    bias = ae.bias if spec.k is None else ae.b_dec
    with torch.no_grad():
        # In place, into the memory order that each trainer chose for itself.
        ae.encoder.weight.copy_(spec.start["W_enc"].T)
        ae.encoder.bias.copy_(spec.start["b_enc"])
        ae.decoder.weight.copy_(spec.start["W_dec"].T)
        bias.copy_(spec.start["b_dec"])
    spec.start.clear()

    def weights() -> Weights:
        return Weights(ae.encoder.weight.T, ae.encoder.bias, ae.decoder.weight.T, bias)

    feed.ready(weights)
    # From step 1: at step 0 the TopK trainer would replace the shared start's b_dec by a median of the batch.
    for step, x in enumerate(feed, start=1):
        trainer.update(step, x)


def crosscoder(spec: Spec, feed: Feed) -> None:
    """`trainer.update(step, activations)` of BatchTopKCrossCoderTrainer, in a fork of dictionary-learning.

    Options:
        checkout: Folder of the fork.
    """
    sys.path.insert(0, spec.options["checkout"])
    from dictionary_learning.trainers.crosscoder import BatchTopKCrossCoderTrainer

    d_model = spec.d_in // 2
    trainer: Any = BatchTopKCrossCoderTrainer(
        steps=FOREVER,
        activation_dim=d_model,
        dict_size=spec.d_sae,
        k=spec.k,
        layer=0,
        lm_name="none",
        lr=spec.lr,
        warmup_steps=0,
        device="cpu",
    )
    ae = trainer.ae
    with torch.no_grad():
        ae.encoder.weight.copy_(spec.start["W_enc"].view(2, d_model, spec.d_sae))
        ae.encoder.bias.copy_(spec.start["b_enc"])
        ae.decoder.weight.copy_(spec.start["W_dec"].view(spec.d_sae, 2, d_model).transpose(0, 1))
        ae.decoder.bias.copy_(spec.start["b_dec"].view(2, d_model))
    spec.start.clear()

    def weights() -> Weights:
        W_dec = ae.decoder.weight.transpose(0, 1).reshape(spec.d_sae, -1)
        return Weights(ae.encoder.weight.reshape(-1, spec.d_sae), ae.encoder.bias, W_dec, ae.decoder.bias.flatten())

    feed.ready(weights)
    # From step 1: at step 0 the trainer would replace the shared start's bias by a median of the batch.
    for step, x in enumerate(feed, start=1):
        trainer.update(step, x.view(len(x), 2, d_model))


def sparsify(spec: Spec, feed: Feed) -> None:
    """`Trainer.fit()` on a model whose only layer returns the batch.

    Options:
        optimizer: "signum" (sparsify's default) or "adam".
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    config = TrainConfig(
        SparseCoderConfig(num_latents=spec.d_sae, k=spec.k),
        batch_size=1,  # one "sequence" of spec.batch tokens
        optimizer=spec.options["optimizer"],
        lr=spec.lr,
        lr_warmup_steps=0,
        hookpoints=["layer"],
        finetune="the shared start",  # else the first batch's mean replaces b_dec
        log_to_wandb=False,
        save_every=FOREVER,
    )
    trainer: Any = Trainer(config, _Rows(spec.batch), _Model(spec.d_in, feed))  # type: ignore[arg-type]
    coder = trainer.saes["layer"]
    with torch.no_grad():
        coder.encoder.weight.copy_(spec.start["W_enc"].T)
        coder.encoder.bias.copy_(spec.start["b_enc"])
        coder.W_dec.copy_(spec.start["W_dec"])
        coder.b_dec.copy_(spec.start["b_dec"])
    spec.start.clear()

    def weights() -> Weights:
        # The rows are brought back to unit length at the beginning of a step: that is what its loss sees.
        W_dec = coder.W_dec / (coder.W_dec.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps)
        return Weights(coder.encoder.weight.T, coder.encoder.bias, W_dec, coder.b_dec)

    feed.ready(weights)
    trainer.model.serving = True
    trainer.fit()


class _Rows:
    """An endless dataset of token ids, which are not used."""

    def __init__(self, n_tokens: int) -> None:
        self._row = {"input_ids": torch.zeros(n_tokens, dtype=torch.long)}

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._row


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _Model(nn.Module):
    """The part of a PreTrainedModel that sparsify's trainer uses."""

    def __init__(self, d_in: int, feed: Feed) -> None:
        super().__init__()
        self.layer = _Layer()
        self.serving = False
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self._d_in, self._feed = d_in, feed

    @property
    def base_model(self) -> _Model:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:  # noqa: ARG002 - the trainer's name for what it hands over
        x = self._feed.next_batch() if self.serving else torch.zeros(1, self._d_in)
        return self.layer(x[None])


@torch.no_grad()
def _load(sae: nn.Module, start: dict[str, Tensor]) -> None:
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(sae, name).copy_(start.pop(name))


RUNNERS: dict[str, Callable[[Spec, Feed], None]] = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "crosscoder": crosscoder,
}
