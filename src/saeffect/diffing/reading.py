"""What base and tuned model do on the same text, summed batch by batch: the part of a `Trace` that reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saeffect.errors import ConfigError
from saeffect.lm.activations import kept_positions
from saeffect.lm.architectures import hook_width
from saeffect.lm.hooks import recorded
from saeffect.lm.language_model import LanguageModel, fused, undefined_numbers

if TYPE_CHECKING:
    from saeffect.diffing.trace import Tracer

__all__ = ["EARLY", "Pass", "ReadingSums", "run_model"]

EARLY = 8
"""Positions after a row's first whose change has halves of its own."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One model's pass over a batch, in its dtype: `x` [B, S, d_in] at the hook and `stream` [n_layers, B, S, d] after
    the blocks, both on the CPU; and `logits`.
    """

    x: Tensor
    stream: Tensor
    logits: Tensor


@torch.inference_mode()
def run_model(lm: LanguageModel, hook: str, ids: Tensor) -> Pass:
    """A pass over token ids, int64 [B, S]."""
    names = [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    with fused(lm), recorded(lm, hook, *names) as activations:
        logits = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
    return Pass(activations[hook].cpu(), torch.stack([activations[name] for name in names]).cpu(), logits)


class ReadingSums:
    """Running sums over batches of text that both models read."""

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
        self._undefined = [0, 0]  # predictions that are not numbers, of the base and the tuned model
        self._loss = np.zeros((2, len(rows.names)))
        self._predicted = np.zeros(len(rows.names))

    def add(self, start: int, ids: Tensor, base: Pass, tuned: Pass) -> None:
        """Add both models' passes over rows `start` and following, ids int64 [B, S]."""
        tracer, x = self._tracer, (base.x.float(), tuned.x.float())
        counts = tracer.rows.counts_of(start, len(ids))
        in_base = kept_positions(x[0], tracer.limit, counts)
        mask = in_base & kept_positions(x[1], tracer.limit)
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
            stream = base.stream[:, row, mask[row]].float()
            for total, states in enumerate((tuned.stream[:, row, mask[row]].float() - stream, stream)):
                self._moved[total] += states.square_().sum(dim=(1, 2)).double().cpu()
            # A place where only the fine-tune's residual is an outlier is one that it changed much: predictions count.
            if in_base[row].any():
                self._add_predictions(start + row, ids[row], in_base[row], (base.logits[row], tuned.logits[row]))

    def _add_predictions(self, number: int, ids: Tensor, mask: Tensor, logits: tuple[Tensor, Tensor]) -> None:
        logs = [x.to(torch.float32, copy=True) for x in logits]  # the base model's may be kept
        for model, log in enumerate(logs):
            totals = log.logsumexp(dim=1, keepdim=True)
            self._undefined[model] += int((~totals.isfinite()).sum())
            log.sub_(totals)
        # A row's first token is read, not predicted, and the second is predicted from nothing else.
        losses = torch.stack([-log[1:-1].gather(1, ids[2:, None].to(log.device)).sum() for log in logs])
        source = int(self._tracer.rows.sources[number])
        self._loss[:, source] += losses.double().cpu().numpy()
        self._predicted[source] += len(ids) - 2
        base, tuned = (log[mask] for log in logs)
        expected = [base.exp(), tuned.exp()]
        self._expected += torch.stack([p.sum(dim=0) for p in expected]).double().cpu()
        # Tokens that neither model can predict, such as padding with a logit of -inf, are NaN here and change nothing.
        self._kl[number, mask] = expected[1].mul_(tuned.sub_(base)).nansum(dim=1).cpu()

    def refuse_undefined(self, base: LanguageModel, tuned: LanguageModel) -> None:
        """ConfigError if a model's predictions so far are not all numbers: what follows from the rest would mislead."""
        for lm, n in zip((base, tuned), self._undefined, strict=True):
            if n:
                raise undefined_numbers(
                    lm, f"the predictions of {lm.name} are not numbers after {n:,} tokens", at="text"
                )

    def result(self) -> dict[str, Any]:
        """The fields of a `Trace` that come from reading. ConfigError if no token counts."""
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
            "expected": (self._expected / int((~self._kl.isnan()).sum())).float().numpy(),
            "positions": (self._shift.sum(dim=0) / counted.sum(dim=0)[:, None].clamp(min=1)).float().numpy(),
            "halves": (self._shift.sum(dim=1) / counted.sum(dim=1)[:, None].clamp(min=1)).float().numpy(),
            "early": (self._shift[:, early] / counted[:, early, None].clamp(min=1)).float().numpy(),
            "kl": self._kl.numpy(),
            "layers": (self._moved[0] / self._moved[1]).sqrt().float().numpy(),
            "numbers": {name: float(value) for name, value in numbers.items() if math.isfinite(value)},
        }
