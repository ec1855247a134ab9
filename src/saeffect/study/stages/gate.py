"""Stage 1, the compatibility gate: does this SAE reconstruct this model at this hook?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.config import GateConfig
from saeffect.errors import ConfigError, IncompatibleSae
from saeffect.io import read_json, write_json
from saeffect.lm.activations import TokenRows
from saeffect.lm.language_model import LanguageModel, probe_logits
from saeffect.lm.tokens import find_bos_id
from saeffect.progress import Log
from saeffect.sae.metrics import ReconstructionSums, row_losses, spliced_losses
from saeffect.sae.mismatch import Mismatch, find_mismatch
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Study
from saeffect.study.texts import beginning, shortage

__all__ = [
    "complaint_about_model",
    "gate_inputs",
    "measure_gate",
    "model_on_text",
    "run_gate",
    "text_losses",
    "words_of_perplexity",
]

VERSION = 4


def gate_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    study = run.study
    control = study.control
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "control": study.identities[control]["model"] if study.config.arms[arm].role == "treatment" else None,
        "text": study.text_identity,
        "gate": study.config.gate.model_dump(),
    }


def run_gate(run: RunFolder, arm: str, log: Log) -> Iterable[Path]:
    """Measure, refuse or warn, and write `gate.json`."""
    opened = run.study.open_arm(arm, log)
    rows = run.study.rows()
    short = shortage(run.study.config.text, rows)
    if short and arm == run.study.ordered_arms()[0]:
        log(f"  warning: the text has only {short}")
    measured = measure_gate(opened, rows, run.study.config.gate) | _of_model(run, opened)
    begins, others = beginning(run.study.prepend_bos, run.study.bos_words, opened.lm.tokenizer, run.study.chat)
    log(f"  arm {arm}: {words_of_perplexity(measured)}; {begins}" + (f"; otherwise: {others}" if others else ""))
    for line in _remarks(measured):
        log(f"  arm {arm}: {line}")
    of_model, of_sae = complaint_about_model(measured), _complaint(measured, run.study.config.gate)
    if run.study.config.gate.on_failure == "stop":
        mismatch = None
        if of_sae and not of_model:
            mismatch = find_mismatch(opened.lm, opened.sae, opened.hook, rows.ids, log, counts=rows.counts)
        _refuse(run.study, arm, of_model, of_sae, mismatch)
    complaint = "; ".join(filter(None, (of_model, of_sae)))
    if complaint:
        log(f"  warning: arm {arm}: {complaint}")
    path = run.arm(arm, "gate.json")
    write_json(path, measured | {"warning": complaint, "text_shortage": short})
    return [path]


def _refuse(study: Study, arm: str, of_model: str, of_sae: str, mismatch: Mismatch | None) -> None:
    if of_model:
        raise ConfigError(
            f"the model does not know this text: {of_model}.",
            at=study.at("arms", arm, "model"),
            fix="look at text.bos, the tokenizer and the weights, or go on with gate.on_failure: warn.",
        )
    if of_sae:
        remedy, fix = "", "use an SAE trained on this very model and hook,"
        if mismatch:
            causes = "; ".join(change.found for change in mismatch.changes)
            remedy = f" What mends it (explained variance {mismatch.after:.2f}): {causes}."
            fix = " ".join(change.fix for change in mismatch.changes).rstrip(".") + " (see saeffect gate MODEL SAE);"
        raise IncompatibleSae(
            f"the SAE does not fit the model: {of_sae}.{remedy}",
            at=study.at("arms", arm, "sae"),
            fix=f"{fix} or go on all the same with gate.on_failure: warn.",
        )


def _of_model(run: RunFolder, arm: Arm) -> dict[str, Any]:
    """Outputs on fixed tokens, effect of merging the adapter, and whether the model equals the control's."""
    logprobs = probe_logits(arm.lm.model).log_softmax(-1).max(-1).values
    control = run.arm(run.study.control, "gate.json")
    same = None
    if arm.role == "treatment" and control.is_file():
        other = torch.tensor(read_json(control).get("probe_logprobs") or [])
        same = other.shape == logprobs.shape and bool(torch.allclose(other, logprobs, rtol=0, atol=2e-5))
    adapter = None if arm.lm.adapter is None else dataclasses.asdict(arm.lm.adapter)
    rounded = [round(value, 5) for value in logprobs.tolist()]
    return {"probe_logprobs": rounded, "same_as_control": same, "adapter": adapter}


def _remarks(measured: dict[str, Any]) -> list[str]:
    lines, adapter = [], measured["adapter"]
    if adapter is not None:
        lines.append(f"its adapter changes logits by up to {adapter['effect']:.3g}, merging by {adapter['error']:.1e}")
        lines += [f"warning: {adapter['other_base']}"] if adapter["other_base"] else []
        lines += ["warning: the adapter changes nothing"] if adapter["effect"] == 0 else []
    if measured["same_as_control"]:
        lines.append("warning: it gives the control's probabilities, so nothing can come from fine-tuning")
    return lines


@torch.inference_mode()
def measure_gate(arm: Arm, rows: TokenRows, config: GateConfig) -> dict[str, Any]:
    """Explained variance, CE loss score, l0, l2 ratio, mean norm at the hook (unit of doses), and outlier norm limit.

    Measured on `config.tokens` tokens of the study's text. Also returns the values of `model_on_text`.
    """
    head = rows.head(max(1, config.tokens // rows.ids.shape[1]))
    arm.lm.refuse_rows(rows.ids)
    limit = arm.norm_limit(rows)
    sums = ReconstructionSums(arm.sae.cfg.d_in)
    fired = torch.zeros(arm.sae.cfg.d_sae, dtype=torch.bool)
    norms: list[float] = []

    def add(x: Tensor) -> None:
        x, sae = x.float(), arm.sae.on(x.device)
        feature_acts = sae.encode(x)
        sums.add(x, sae(x), feature_acts)
        fired.logical_or_((feature_acts > 0).any(0).cpu())
        norms.append(float(x.norm(dim=1).sum()))

    losses = spliced_losses(arm.lm, arm.sae, arm.hook, head.ids, limit, seen=add, counts=head.counts)
    return {
        "explained_variance": sums.explained_variance(),
        "ce_loss_score": losses.ce_loss_score,
        "ce_clean": losses.clean,
        "ce_sae": losses.sae,
        "ce_zero": losses.zero,
        "l0": sums.l0(),
        "l2_ratio": sums.l2_ratio(),
        "features_fired": int(fired.sum()),
        "tokens": sums.n_tokens,
        "mean_norm": sum(norms) / sums.n_tokens,
        "norm_limit": limit.limit,
        "dtype": str(arm.lm.dtype).removeprefix("torch."),
        **model_on_text(arm.lm, head, losses.by_row["clean"], rows),
    }


def _complaint(measured: dict[str, Any], config: GateConfig) -> str:
    parts = []
    for name, least in (
        ("explained_variance", config.min_explained_variance),
        ("ce_loss_score", config.min_ce_loss_score),
    ):
        if not measured[name] >= least:
            parts.append(f"{name} is {measured[name]:.3f}, below {least:g}")
    return "; ".join(parts)


# Nats per token by which the other beginning may be better. Gemma 3 270M loses 1.8 without its BOS.
_MARGIN = 0.5
_BATCH = 4


def model_on_text(lm: LanguageModel, head: TokenRows, losses: NDArray[np.float64], text: TokenRows) -> dict[str, Any]:
    """Measurements of the model without its SAE, from its mean cross-entropy of each row of `head`, float64 `[n_rows]`,
    in nats.

    perplexity and unigram_perplexity (of the token frequencies of `text`) by source; prepend_bos, whether rows begin
    with BOS; ce_with_bos and ce_without_bos, nats per token on equal tokens of some rows, NaN for a tokenizer without
    BOS.
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
    """Implausible values in the model's own predictions, in words; "" if none."""
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
    """The model's perplexity on each source, in words."""
    return "perplexity " + ", ".join(f"{value:,.4g} on {name}" for name, value in measured["perplexity"].items())


def _entropy(ids: NDArray[np.int32]) -> float:
    """Entropy of the token frequencies, in nats."""
    share = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(share * np.log(share)).sum())


def _both_beginnings(lm: LanguageModel, rows: TokenRows) -> tuple[float, float]:
    """Mean cross-entropy of the same tokens with and without BOS in front, first token left out; NaN without a BOS."""
    n_bos = lm.n_bos(rows.ids[0])
    try:
        bos = lm.bos_id if n_bos else find_bos_id(lm.tokenizer, prepend=True)
    except ConfigError:
        bos = None
    if bos is None or bos >= lm.d_vocab:
        return math.nan, math.nan
    plain = torch.from_numpy(rows.ids[:, n_bos:][:, : rows.context_size - 1].astype(np.int64))
    begun = torch.cat([torch.full_like(plain[:, :1], bos), plain], dim=1)
    return float(text_losses(lm, begun, skip=1).mean()), float(text_losses(lm, plain).mean())


@torch.inference_mode()
def text_losses(lm: LanguageModel, ids: torch.Tensor, skip: int = 0) -> NDArray[np.float64]:
    """The model's mean loss on each row `[n_rows]`, in nats, of ids int64 `[n_rows, n]` after the first `skip`."""
    losses = []
    for batch in ids.to(lm.device).split(_BATCH):
        logits = lm.model(input_ids=batch, use_cache=False).logits[:, skip:-1].float()
        losses.append(row_losses(logits, batch[:, skip:]))
    return np.concatenate(losses)
