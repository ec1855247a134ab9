"""The traces of the fine-tunes, on general text and one SAE, as `saeffect.diffing.trace` makes them for a study."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from pairs import BASE, SAE, Pair
from training import adapter_of

from saeffect.config import ModelConfig, TextConfig
from saeffect.diffing.standardised import Basis
from saeffect.diffing.trace import Trace, Tracer
from saeffect.features.projection import project
from saeffect.lm.activations import TokenRows, first_limit
from saeffect.lm.architectures import unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import bundled_path, load_language_model
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.study.texts import study_rows

__all__ = ["Instrument"]

_ROWS, _TOKENS = 96, 64  # of general text


class Instrument:
    """Base model, SAE and text, each loaded once, when first needed; traces are kept in `folder`/traces."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder, self._log = folder, log

    @cached_property
    def base(self) -> LanguageModel:
        return load_language_model(ModelConfig(path=BASE), log=self._log)

    @cached_property
    def sae(self) -> SparseAutoencoder:
        return load_sae(bundled_path("saes", SAE))

    @cached_property
    def _tracer(self) -> Tracer:
        rows = study_rows(TextConfig(bundled="smollm2-sampled", tokens=10**9), lambda: self.base, prepend_bos=None)
        general = np.flatnonzero(rows.sources == rows.names.index("general"))[:_ROWS]
        text = TokenRows(rows.ids[general, :_TOKENS], np.zeros(len(general), dtype=np.int64), ("general",))
        hook = str(self.sae.cfg.hook_name)
        return Tracer(self.base, self.sae, hook, text, first_limit(self.base, hook, text.ids[:8]), self._log, keep=True)

    @cached_property
    def basis(self) -> Basis:
        """The SAE's features with their ten top tokens, cosine scale."""
        W_dec, W_U = self.sae.W_dec.detach(), unembedding(self.base)
        top = project(W_dec, W_U, 10, valid=self.base.plain_tokens()).indices
        return Basis(
            W_dec.float().numpy(), W_U.float().numpy(), top.numpy(), self.base.token_strings(), self._tracer.firing()
        )

    def trace(self, pair: Pair) -> Trace:
        """The pair's trace, measured unless its file exists."""
        path = self.folder / "traces" / f"{pair.name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._tracer.trace(load_language_model(adapter_of(pair, self.folder)), pair.name).save(path)
        return Trace.load(path)
