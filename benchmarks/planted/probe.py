"""The same text read by base and fine-tune, and what the SAE sees in each: the tool is not told what was planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fine_tunes import Planted, adapter_of, sample_texts
from numpy.typing import NDArray
from plan import BASE, NEUTRAL_STEMS, SAE, Plan

from saeffect.config import ModelConfig, TextConfig
from saeffect.diffing.cross_activity import CrossActivity
from saeffect.features.projection import project
from saeffect.io import atomic_path
from saeffect.lm.architectures import unembedding
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import bundled_path, load_language_model
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.study.texts import study_rows

__all__ = ["Instrument", "compare"]

IntArray = NDArray[np.int64]
_BATCH = 16  # rows at once


@dataclass(frozen=True, eq=False)
class Instrument:
    """Base model, SAE, plan, and the folders of fine-tunes and of comparisons; loads each once, when first needed."""

    plan: Plan
    models: Path
    compared: Path
    log: Log

    @cached_property
    def base(self) -> LanguageModel:
        return load_language_model(ModelConfig(path=BASE), log=self.log)

    @cached_property
    def sae(self) -> SparseAutoencoder:
        return load_sae(bundled_path("saes", SAE))

    @property
    def hook(self) -> str:
        return str(self.sae.cfg.hook_name)

    @cached_property
    def top_tokens(self) -> list[list[str]]:
        """`top_k` tokens a feature, cosine scale."""
        found = project(
            self.sae.W_dec.detach(), unembedding(self.base), self.plan.top_k, valid=self.base.plain_tokens()
        )
        strings = self.base.token_strings()
        return [[strings[i] for i in row] for row in found.indices.tolist()]

    @cached_property
    def base_samples(self) -> IntArray:
        """What the base model makes of the neutral stems, [n, probe_tokens]; the same in every comparison."""
        return self._kept("base-samples", lambda: self._sampled(self.base))

    @cached_property
    def general(self) -> IntArray:
        """Bundled text on general stems, [general_rows, probe_tokens]."""
        rows = study_rows(TextConfig(bundled="smollm2-sampled", tokens=10**9), lambda: self.base)
        own = rows.ids[rows.sources == rows.names.index("general")].astype(np.int64)
        return own[: self.plan.general_rows, : self.plan.probe_tokens]

    def fine_tune(self, planted: Planted) -> LanguageModel:
        return load_language_model(adapter_of(planted))

    def probe(self, planted: Planted, tuned: LanguageModel) -> IntArray:
        """Rows that both models read: general text, and as many texts by the one as by the other."""
        own = self._kept(f"{planted.name}/samples", lambda: self._sampled(tuned))
        return np.concatenate([self.general, self.base_samples, own])

    @torch.inference_mode()
    def acts(self, lm: LanguageModel, rows: IntArray) -> torch.Tensor:
        """`feature_acts` [rows, tokens, d_sae], the first token left out: it attends to nothing but itself."""
        return self.sae.encode(capture(lm, self.hook, torch.from_numpy(rows)).float())[:, 1:]

    def _sampled(self, lm: LanguageModel) -> IntArray:
        # Another seed than the sampled nulls' training text.
        rows = sample_texts(lm, NEUTRAL_STEMS, self.plan.samples, self.plan.probe_tokens, self.plan.seed + 100)
        return np.asarray(rows, dtype=np.int64)

    def _kept(self, name: str, make: Callable[[], IntArray]) -> IntArray:
        path = self.models / f"{name}.npy"
        if not path.is_file():
            made = make()
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, made)
        return np.asarray(np.load(path, allow_pickle=False))


def compare(planted: Planted, instrument: Instrument) -> pd.DataFrame:
    """The control SAE on both models, over the same text.

    Returns:
        As `CrossActivity.result` gives it, one row a feature, the fine-tune being the treatment.
    """
    path = instrument.compared / f"{planted.name}.parquet"
    if path.is_file():
        return pd.read_parquet(path)
    tuned = instrument.fine_tune(planted)
    rows = instrument.probe(planted, tuned)
    cross = CrossActivity(instrument.sae.cfg.d_sae)
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        cross.update(instrument.acts(instrument.base, some), instrument.acts(tuned, some))
    table = cross.result(seed=instrument.plan.seed, n_permutations=2000)
    with atomic_path(path) as temporary:
        table.to_parquet(temporary)
    return table
