"""The trace of one fine-tune: the same measurements of a real fine-tune and of each null, in one small file.

Both models read the same rows of text, through one SAE at one hook: which features fire more (`read`), which words are
expected more (`expected`), how far the residual stream moved, at each layer and position. Then both write a few texts
after openings that name nothing, and the base model reads these texts: which features fire there (`written`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saeffect.checksums import read_tensors, save_tensors
from saeffect.diffing.coactivity import FiringLog
from saeffect.errors import BadFile, ConfigError
from saeffect.io import fingerprint
from saeffect.lm.activations import NormLimit, TokenRows, kept_positions
from saeffect.lm.architectures import hook_width
from saeffect.lm.hooks import capture, recorded
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.lm.residuals import READ_ROWS, Residuals
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.generate import continue_prompts
from saeffect.steering.prompt_pass import last_logits
from saeffect.steering.sampling import NoiseCell, Sampling
from saeffect.steering.trials import kl_divergence

__all__ = ["EARLY", "NEW_TOKENS", "OPENINGS", "SAMPLES", "TokenIds", "Trace", "Tracer", "text_sampling"]


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
EARLY = 8
"""Positions after a row's first whose change has halves of its own."""

TokenIds = npt.NDArray[np.int32]

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
            return cls(note["name"], note["made_by"], numbers=note["numbers"], **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile("this is no trace of a fine-tune.", at=str(path), fix=_FIX) from error


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
        return fingerprint([3, self.measured_on, OPENINGS, SAMPLES, NEW_TOKENS])

    @cached_property
    def measured_on(self) -> dict[str, str]:
        """What `made_by` tells apart: hashes by name."""
        weights = b"" if self.sae is None else self.sae.W_dec.detach().float().cpu().numpy().tobytes()
        return {
            "base model": self.base.identity,
            "SAE": hashlib.sha256(weights).hexdigest(),
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
        sums = _Sums(self)
        for start in range(0, len(self.rows), READ_ROWS):
            ids = torch.from_numpy(self.rows.ids[start : start + READ_ROWS].astype(np.int64))
            passes = self._base_pass(start, ids), _run(tuned, self.hook, ids)
            for lm, run in zip((self.base, tuned), passes, strict=True):
                self.residuals.keep(lm, self.hook, ids, run.x)
            sums.add(start, ids, *passes)
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
    def _base_passes(self) -> dict[int, _Pass]:
        return {}

    def _base_pass(self, start: int, ids: Tensor) -> _Pass:
        if start in self._base_passes:
            return self._base_passes[start]
        run = _run(self.base, self.hook, ids)
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


@dataclass(frozen=True, eq=False)
class _Pass:
    """One model's pass over a batch, in its dtype: `x` [B, S, d_in] at the hook and `stream` [n_layers, B, S, d] after
    the blocks, both on the CPU; and `logits`.
    """

    x: Tensor
    stream: Tensor
    logits: Tensor


@torch.inference_mode()
def _run(lm: LanguageModel, hook: str, ids: Tensor) -> _Pass:
    names = [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    with fused(lm), recorded(lm, hook, *names) as activations:
        logits = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
    return _Pass(activations[hook].cpu(), torch.stack([activations[name] for name in names]).cpu(), logits)


class _Sums:
    """Running sums over batches of text."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer, sae, rows = tracer, tracer.sae, tracer.rows
        d_sae, d_in = (sae.cfg.d_sae, sae.cfg.d_in) if sae else (0, hook_width(tracer.base, tracer.hook))
        self._features = torch.zeros(4, d_sae, dtype=torch.float64)
        self._expected = torch.zeros(2, tracer.base.d_vocab, dtype=torch.float64)
        self._shift = torch.zeros(2, rows.context_size, d_in, dtype=torch.float64)
        self._counted = torch.zeros(2, rows.context_size)
        self._norm = 0.0
        self._moved = torch.zeros(2, tracer.base.n_layers, dtype=torch.float64)
        self._kl = torch.full(rows.ids.shape, math.nan)
        self._loss = np.zeros((2, len(rows.names)))
        self._predicted = np.zeros(len(rows.names))

    def add(self, start: int, ids: Tensor, base: _Pass, tuned: _Pass) -> None:
        tracer, x = self._tracer, (base.x.float(), tuned.x.float())
        counts = tracer.rows.counts_of(start, len(ids))
        mask = kept_positions(x[0], tracer.limit, counts) & kept_positions(x[1], tracer.limit)
        self._norm += float(x[0][mask].norm(dim=1).double().sum())
        if tracer.sae is not None:
            sae = tracer.sae.on(tracer.base.device)
            acts = [sae.encode(residual).clamp(min=0)[mask] for residual in x]
            self._features += torch.stack([a.sum(dim=0) for a in acts] + [(a > 0).sum(dim=0) for a in acts]).double()
        difference = (x[1] - x[0]) * mask[..., None]
        for half in (0, 1):
            rows = slice((start + half) % 2, None, 2)
            self._shift[half] += difference[rows].sum(dim=0)
            self._counted[half] += mask[rows].sum(dim=0)
        for row in range(len(ids)):  # row by row: what stays in the processor's cache is read much faster
            if mask[row].any():
                self._add_row(start + row, ids[row], mask[row], (base, tuned), row)

    def _add_row(self, number: int, ids: Tensor, mask: Tensor, passes: tuple[_Pass, _Pass], row: int) -> None:
        stream = passes[0].stream[:, row, mask].float()
        for total, x in enumerate((passes[1].stream[:, row, mask].float() - stream, stream)):
            self._moved[total] += x.square_().sum(dim=(1, 2)).double().cpu()
        logs = [run.logits[row].to(torch.float32, copy=True) for run in passes]  # the base model's may be kept
        for log in logs:
            log.sub_(log.logsumexp(dim=1, keepdim=True))
        # A row's first token is read, not predicted, and the second is predicted from nothing else.
        losses = torch.stack([-log[1:-1].gather(1, ids[2:, None].to(log.device)).sum() for log in logs])
        source = int(self._tracer.rows.sources[number])
        self._loss[:, source] += losses.double().cpu().numpy()
        self._predicted[source] += len(ids) - 2
        base, tuned = (log[mask] for log in logs)
        expected = [base.exp(), tuned.exp()]
        self._expected += torch.stack([p.sum(dim=0) for p in expected]).double().cpu()
        self._kl[number, mask] = expected[1].mul_(tuned.sub_(base)).sum(dim=1).cpu()

    def result(self) -> dict[str, Any]:
        n = float(self._counted.sum())
        if n == 0:
            raise ConfigError(
                "no token of the text counts: none is at the chosen positions, or every residual is an outlier.",
                at="text",
                fix="read longer rows: changes.tokens_per_row.",
            )
        with np.errstate(invalid="ignore"):
            by_source = self._loss / self._predicted
        total = self._loss.sum(axis=1) / self._predicted.sum()
        numbers = {"kl": float(self._kl.nanmean()), "n_tokens": n, "norm": self._norm / n}
        numbers |= {"loss_base": total[0], "loss_tuned": total[1]}
        for name, (base, tuned) in zip(self._tracer.rows.names, by_source.T, strict=True):
            numbers |= {f"loss_base_{name}": base, f"loss_tuned_{name}": tuned}
        counted = self._counted.double()
        early = slice(1, 1 + EARLY)
        return {
            "read": (self._features / n).float().numpy(),
            "expected": (self._expected / n).float().numpy(),
            "positions": (self._shift.sum(dim=0) / counted.sum(dim=0)[:, None].clamp(min=1)).float().numpy(),
            "halves": (self._shift.sum(dim=1) / counted.sum(dim=1)[:, None].clamp(min=1)).float().numpy(),
            "early": (self._shift[:, early] / counted[:, early, None].clamp(min=1)).float().numpy(),
            "kl": self._kl.numpy(),
            "layers": (self._moved[0] / self._moved[1]).sqrt().float().numpy(),
            "numbers": {name: float(value) for name, value in numbers.items() if math.isfinite(value)},
        }


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
