"""The trace of one fine-tune: the same measurements of a real fine-tune and of each null, in one small file.

Both models read the same rows of text, through one SAE at one hook: which features fire more (`read`), which words are
expected more (`expected`), how far the residual stream moved, at each layer and position. Then both write a few texts
after openings that name nothing, and the base model reads these texts: which features fire there (`written`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saeffect.checksums import read_tensors, save_tensors
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.reading import EARLY, Pass, ReadingSums, run_model
from saeffect.errors import BadFile, ConfigError
from saeffect.io import fingerprint
from saeffect.lm.activations import NormLimit, TokenRows, kept_positions
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.lm.residuals import READ_ROWS, Residuals
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.generate import continue_prompts
from saeffect.steering.prompt_pass import last_logits
from saeffect.steering.sampling import NoiseCell, Sampling
from saeffect.steering.trials import kl_divergence

__all__ = ["EARLY", "ENCODER", "NEW_TOKENS", "OPENINGS", "SAMPLES", "TokenIds", "Trace", "Tracer", "text_sampling"]


OPENINGS = (
    *("\n", ".", "-", '"', "1.", "The", "A", "I", "It", "We", "There", "This", "In", "What", "Today", "First,"),
    *("Here is", "Question:", "People often say that", "The most interesting part was", "Let me tell you about"),
    *("One thing that everybody should know is", "This is an introduction to", "A short story:"),
)
"""Prompts without a topic: what a model writes after them shows what it tends to write about."""
SAMPLES = 4
"""Texts per opening."""
NEW_TOKENS = 40
"""Tokens per text."""

TokenIds = npt.NDArray[np.int32]

ENCODER = "SAE's encoder"
"""In `Tracer.measured_on`, whatever decides an SAE's activations."""

_FIX = "measure it again, or take the file from where it came."


@dataclass(frozen=True, eq=False)
class Trace:
    """What one fine-tune changed.

    Attributes:
        made_by: SHA-256 of base model, SAE, hook and text. Only traces with an equal one may be compared.
        read: float32 [4, d_sae], the SAE on the same text in both models: mean activation a token in the base and in
            the tuned model, density in the base and in the tuned model. [4, 0] if there was no SAE.
        written: float32 [4, d_sae], as `read`, the base model reading texts that the base, and the tuned, model wrote.
        expected: float32 [2, d_vocab], mean probability of each token as the next one, in the base and tuned model.
        positions: float32 [context_size, d_in], mean of tuned minus base at the hook, by position in the row.
        halves: float32 [2, d_in], the same over even and over odd rows, all positions.
        early: float32 [2, EARLY, d_in], the same at each of the positions 1 to `EARLY` (fewer in shorter rows).
        kl: float32 [n_rows, context_size], KL of the tuned from the base model's next-token distribution after each
            token of the text, in nats; NaN at positions that do not count.
        layers: float32 [n_layers], root of the mean square change of the residual stream after each block, relative to
            that of the base model's stream.
        texts, base_texts: int32 [n_texts, NEW_TOKENS], what each model wrote, by opening (`OPENINGS`), then sample.
        openings: float32 [n_openings], as `kl`, of the first token after each opening.
        numbers: `kl` (mean of the above), `n_tokens`, and `norm`, the base model's mean residual norm at the hook;
            `loss_base`, `loss_tuned` and by source of text `loss_base_<name>`, `loss_tuned_<name>` (nats a token).
    """

    name: str
    made_by: str
    read: npt.NDArray[np.float32]
    written: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float32]
    positions: npt.NDArray[np.float32]
    halves: npt.NDArray[np.float32]
    kl: npt.NDArray[np.float32]
    layers: npt.NDArray[np.float32]
    texts: npt.NDArray[np.int32]
    base_texts: npt.NDArray[np.int32]
    early: npt.NDArray[np.float32]
    openings: npt.NDArray[np.float32]
    numbers: dict[str, float]

    _ARRAYS = (
        *("read", "written", "expected", "positions", "halves", "kl", "layers", "texts", "base_texts", "early"),
        "openings",
    )
    # The range of half precision is too small for probabilities.
    _HALF = ("positions", "halves", "early", "kl")

    def save(self, path: Path) -> None:
        """Write one safetensors file of some 900 KB, atomically, with a checksum."""
        arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in self._ARRAYS}
        arrays |= {name: arrays[name].half() for name in self._HALF}
        arrays |= {name: arrays[name].bfloat16() for name in ("expected",)}
        note = {"name": self.name, "made_by": self.made_by, "numbers": self.numbers}
        save_tensors(path, arrays, {"trace": json.dumps(note)})

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read `save`'s file; BadFile if it is none, or damaged."""
        tensors, metadata = read_tensors(path, "this trace of a fine-tune", fix=_FIX)
        try:
            note = json.loads(metadata["trace"])
            arrays = {
                name: tensors[name].float().numpy() if tensors[name].is_floating_point() else tensors[name].numpy()
                for name in cls._ARRAYS
            }
            trace = cls(note["name"], note["made_by"], numbers=note["numbers"], **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile("this is no trace of a fine-tune.", at=str(path), fix=_FIX) from error
        damaged = [name for name in ("read", "written", "expected", "halves") if not np.isfinite(arrays[name]).all()]
        if damaged:
            raise BadFile(f"this trace holds NaN or infinity in {', '.join(damaged)}.", at=str(path), fix=_FIX)
        return trace


@dataclass(frozen=True, eq=False)
class Tracer:
    """Measures traces of fine-tunes of one base model.

    Attributes:
        sae: The basis that base and tuned model share: an SAE of the base model, float32. None: no features.
        hook: Where it reads, a TransformerLens name.
        limit: Which positions count; the first of a row never does.
        keep: Keep what the base model computes for the next trace: its logits, some 1.2 GB for 12,288 tokens of 49,152.
        residuals: Keeps the activations at the hook for stages that read the same text.
        earlier: A trace with an equal `made_by`: what the base model wrote, and how it read that, are taken from it.
    """

    base: LanguageModel
    sae: SparseAutoencoder | None
    hook: str
    rows: TokenRows
    limit: NormLimit
    log: Log = SILENT
    keep: bool = False
    residuals: Residuals = field(default_factory=lambda: Residuals(0))
    earlier: Trace | None = None

    @cached_property
    def made_by(self) -> str:
        """See `Trace.made_by`."""
        decided = {name: value for name, value in self.measured_on.items() if name != ENCODER}
        return fingerprint([3, decided, OPENINGS, SAMPLES, NEW_TOKENS])

    @cached_property
    def measured_on(self) -> dict[str, str]:
        """What a trace depends on: hashes by name, all in `made_by` but `ENCODER`, which older cards of nulls lack."""
        decoder, encoder = hashlib.sha256(), hashlib.sha256()
        if self.sae is not None:
            decoder.update(_bytes(self.sae.W_dec))
            encoder.update(repr(replace(self.sae.cfg, metadata={})).encode())
            for name, weights in sorted(self.sae.named_parameters()):
                if name != "W_dec":
                    encoder.update(name.encode() + _bytes(weights))
        return {
            "base model": self.base.identity,
            "SAE": decoder.hexdigest(),
            ENCODER: encoder.hexdigest(),
            "hook": self.hook,
            "text": self.rows.identity(),
        }

    def beside(self, nulls: Sequence[Trace]) -> Tracer:
        """The same for a fine-tune that is judged against `nulls`: all are compared with one set of base texts."""
        return replace(self, earlier=nulls[0]) if nulls else self

    @torch.inference_mode()
    def trace(
        self, tuned: LanguageModel, name: str, on_texts: Callable[[TokenIds, TokenIds], None] | None = None
    ) -> Trace:
        """Write and read with the tuned model. `on_texts` is called with what it and the base model wrote, before they
        read, which takes longer. ConfigError if its width, depth or number of tokens is not the base model's.
        """
        for what in ("d_model", "d_vocab", "n_layers"):
            if getattr(tuned, what) != getattr(self.base, what):
                raise ConfigError(
                    f"{what} of {tuned.name} is {getattr(tuned, what)}, of {self.base.name} {getattr(self.base, what)}:"
                    " it is no fine-tune of that model.",
                    fix="compare a model with its own fine-tune.",
                )
        texts = _write(tuned, f"writing with {name}", self.log)
        base_texts, base_written = self._base_writes
        if on_texts is not None:
            on_texts(texts, base_texts)
        sums = ReadingSums(self)
        for start in range(0, len(self.rows), READ_ROWS):
            ids = torch.from_numpy(self.rows.ids[start : start + READ_ROWS].astype(np.int64))
            passes = self._base_pass(start, ids), run_model(tuned, self.hook, ids)
            for lm, run in zip((self.base, tuned), passes, strict=True):
                self.residuals.keep(lm, self.hook, ids, run.x)
            sums.add(start, ids, *passes)
            sums.refuse_undefined(self.base, tuned)
            self.log.progress(f"reading with base and {name}", start + len(ids), len(self.rows), "rows")
        return Trace(
            name,
            self.made_by,
            written=np.concatenate([base_written, self._read_texts(texts)])[[0, 2, 1, 3]],
            texts=texts,
            base_texts=base_texts,
            openings=kl_divergence(_first_words(tuned), self._base_first_words).numpy(),
            **sums.result(),
        )

    @torch.inference_mode()
    def firing(self) -> FiringLog:
        """Activations of the features in the base model on each token of the text. Empty without an SAE."""
        if self.sae is None:
            return FiringLog(0)
        firing = FiringLog(self.sae.cfg.d_sae)
        for start, ids, x in self.residuals.batches(self.base, self.hook, self.rows):
            mask = kept_positions(x, self.limit, self.rows.counts_of(start, len(ids)))
            firing.update(self.sae.on(self.base.device).encode(x.float())[mask])
        return firing

    @cached_property
    def _base_passes(self) -> dict[int, Pass]:
        return {}

    def _base_pass(self, start: int, ids: Tensor) -> Pass:
        if start in self._base_passes:
            return self._base_passes[start]
        run = run_model(self.base, self.hook, ids)
        if self.keep:
            self._base_passes[start] = run
        return run

    @cached_property
    def _base_writes(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        if self.earlier is not None:
            return self.earlier.base_texts, self.earlier.written[[0, 2]]  # mean activation, density
        texts = _write(self.base, "writing with base", self.log)
        return texts, self._read_texts(texts)

    @cached_property
    def _base_first_words(self) -> Tensor:
        return _first_words(self.base)

    def _read_texts(self, texts: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Mean activation and density [2, d_sae] of the base model reading texts, each after its opening."""
        if self.sae is None:
            return np.empty((2, 0), dtype=np.float32)
        total, fired, n = torch.zeros(self.sae.cfg.d_sae), torch.zeros(self.sae.cfg.d_sae), 0
        for number, opening in enumerate(OPENINGS):
            prompt = self.base.encode_prompt(opening)
            new = torch.from_numpy(texts[number * SAMPLES : (number + 1) * SAMPLES].astype(np.int64))
            ids = torch.cat([torch.tensor([prompt] * len(new)), new], dim=1)
            with fused(self.base):
                x = capture(self.base, self.hook, ids).float().cpu()
            mask = kept_positions(x, self.limit)
            mask[:, : len(prompt)] = False
            acts = self.sae.on(self.base.device).encode(x)[mask].clamp(min=0)
            total, fired, n = total + acts.sum(dim=0), fired + (acts > 0).sum(dim=0), n + len(acts)
        return torch.stack([total / n, fired / n]).numpy().astype(np.float32)


def _bytes(weights: Tensor) -> bytes:
    return weights.detach().float().cpu().numpy().tobytes()


def text_sampling() -> Sampling:
    """How texts are sampled after the openings."""
    return Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=1.0, frequency_penalty=0.0)


def _write(lm: LanguageModel, what: str, log: Log) -> npt.NDArray[np.int32]:
    """Continuations of the openings, int32 [len(OPENINGS) · SAMPLES, NEW_TOKENS]."""
    cells = [NoiseCell(0, opening, sample) for opening in OPENINGS for sample in range(SAMPLES)]
    prompts = [lm.encode_prompt(cell.prompt) for cell in cells]
    log(f"  {what}")
    rows = continue_prompts(lm, prompts, cells, text_sampling(), batch_size=len(cells))
    return np.asarray(rows, dtype=np.int32)


def _first_words(lm: LanguageModel) -> Tensor:
    """Log probabilities of the first token after each opening, float32 [n_openings, d_vocab]."""
    prompts = [lm.encode_prompt(opening) for opening in OPENINGS]
    logits = torch.empty(len(prompts), lm.d_vocab)
    for length in sorted({len(ids) for ids in prompts}):
        rows = [row for row, ids in enumerate(prompts) if len(ids) == length]
        logits[rows] = last_logits(lm, torch.tensor([prompts[row] for row in rows], device=lm.device))[0].cpu()
    return torch.log_softmax(logits, dim=1)
