"""Does the model know the study's text at all? Its perplexity, against two numbers that no sound model exceeds.

One is the perplexity of the text's own token frequencies: who predicts worse than these has learnt nothing of such
text, or reads other tokens than it was trained on. The other is its own perplexity on the same tokens where rows begin
the other way, with the tokenizer's BOS token or without: Gemma 3 270M without has six times the perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeffect.errors import ConfigError
from saeffect.lm.activations import TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import find_bos_id
from saeffect.sae.splice import row_losses

__all__ = ["complaint_about_model", "model_on_text", "words_of_perplexity"]

# Nats a token by which the other beginning may be better. Gemma 3 270M loses 1.8 without its BOS.
_MARGIN = 0.5
_BATCH = 4


def model_on_text(lm: LanguageModel, head: TokenRows, losses: NDArray[np.float64], text: TokenRows) -> dict[str, Any]:
    """What the gate records of the model alone.

    Args:
        lm: The model.
        head: The rows that it was measured on.
        losses: Its mean cross-entropy on each of them, float64 `[n_rows]`, in nats.
        text: All of the study's text, whose token frequencies are counted.

    Returns:
        perplexity and unigram_perplexity (of the source's token frequencies) by source; prepend_bos, whether rows begin
        with BOS; ce_with_bos and ce_without_bos, in nats a token on equal tokens of some of the rows, NaN for a
        tokenizer without BOS.
    """
    measured: dict[str, Any] = {"perplexity": {}, "unigram_perplexity": {}}
    for index, name in enumerate(text.names):
        mine = losses[head.sources == index]
        if len(mine):
            measured["perplexity"][name] = math.exp(mine.mean())
            n_bos = lm.n_bos(text.ids[0])
            measured["unigram_perplexity"][name] = math.exp(_entropy(text.ids[text.sources == index, n_bos:]))
    with_bos, without = _both_beginnings(lm, head.head(max(len(text.names), len(head) // 4)))
    return measured | {
        "prepend_bos": lm.bos_id is not None,
        "ce_with_bos": with_bos,
        "ce_without_bos": without,
    }


def complaint_about_model(measured: Mapping[str, Any]) -> str:
    """What is absurd about the model's own predictions, "" if nothing is."""
    parts = []
    for name, found in measured["perplexity"].items():
        most = measured["unigram_perplexity"][name]
        if not found < most:
            parts.append(
                f"its perplexity on {name} is {found:,.4g}, and the text's token frequencies alone give {most:,.4g}"
                " (a wrong tokenizer, a missing BOS token or broken weights do that)"
            )
    with_bos, without = measured["ce_with_bos"], measured["ce_without_bos"]
    has = measured["prepend_bos"]
    here, other = (with_bos, without) if has else (without, with_bos)
    if here - other > _MARGIN:
        parts.append(
            f"its perplexity is {math.exp(here):,.4g} {'with' if has else 'without'} the BOS token in front of rows,"
            f" and {math.exp(other):,.4g} {'without' if has else 'with'} it on the same tokens; text.bos:"
            f" {'never' if has else 'always'} reads them so, and SAEs must be trained on text read alike"
        )
    return "; ".join(parts)


def words_of_perplexity(measured: Mapping[str, Any]) -> str:
    """The model's perplexity on each source, for people."""
    return "perplexity " + ", ".join(f"{value:,.4g} on {name}" for name, value in measured["perplexity"].items())


def _entropy(ids: NDArray[np.int32]) -> float:
    """Entropy of the frequencies of tokens, in nats."""
    share = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(share * np.log(share)).sum())


def _both_beginnings(lm: LanguageModel, rows: TokenRows) -> tuple[float, float]:
    """Mean cross-entropy on the same tokens in rows with BOS in front, and in rows without; NaN if there is no BOS.

    The first token of text is predicted with BOS alone, so it does not count.
    """
    n_bos = lm.n_bos(rows.ids[0])
    try:
        bos = lm.bos_id if n_bos else find_bos_id(lm.tokenizer, prepend=True)
    except ConfigError:
        bos = None
    if bos is None or bos >= lm.d_vocab:
        return math.nan, math.nan
    plain = torch.from_numpy(rows.ids[:, n_bos:][:, : rows.context_size - 1].astype(np.int64))
    begun = torch.cat([torch.full_like(plain[:, :1], bos), plain], dim=1)
    return _mean_loss(lm, begun, skip=1), _mean_loss(lm, plain)


def _mean_loss(lm: LanguageModel, ids: torch.Tensor, skip: int = 0) -> float:
    found = []
    for some in ids.to(lm.device).split(_BATCH):
        logits = lm.model(input_ids=some, use_cache=False).logits[:, skip:-1].float()
        found.append(row_losses(logits, some[:, skip:]))
    return float(np.concatenate(found).mean())
