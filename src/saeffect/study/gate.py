"""Stage 1, the compatibility gate: does this SAE reconstruct this model at this hook?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from saeffect.activations.harvest import TokenRows, kept_positions
from saeffect.config import GateConfig
from saeffect.errors import ConfigError, IncompatibleSae
from saeffect.models.hooks import capture
from saeffect.provenance import write_json
from saeffect.sae.metrics import ReconstructionSums
from saeffect.sae.splice import spliced_losses
from saeffect.study.model_on_text import complaint_about_model, model_on_text, words_of_perplexity
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Say, Study
from saeffect.study.texts import beginning

__all__ = ["gate_inputs", "measure_gate", "run_gate"]

VERSION = 3  # 2: rotary frequencies stay in float32; 3: the model's own perplexity, with and without BOS


def gate_inputs(study: Study, arm: str) -> dict[str, Any]:
    """What the gate's numbers depend on."""
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "text": study.text_identity,
        "gate": study.config.gate.model_dump(),
    }


def run_gate(run: RunFolder, arm: str, say: Say) -> Callable[[], Iterable[Path]]:
    """Measure, refuse or warn, and write `gate.json`."""

    def work() -> Iterable[Path]:
        opened = run.study.open_arm(arm, say)
        rows = run.study.rows()
        begins, others = beginning(run.study.prepend_bos, run.study.bos_words, opened.lm.tokenizer)
        measured = measure_gate(opened, rows, run.study.config.gate)
        say(f"  arm {arm}: {words_of_perplexity(measured)}; {begins}" + (f"; otherwise: {others}" if others else ""))
        of_model = complaint_about_model(measured)
        of_sae = _complaint(measured, run.study.config.gate)
        complaint = "; ".join(filter(None, (of_model, of_sae)))
        if of_model and run.study.config.gate.on_failure == "stop":
            raise ConfigError(
                f"the model does not know this text: {of_model}.",
                at=run.study.at("arms", arm, "model"),
                fix="look at text.bos, the tokenizer and the weights, or go on with gate.on_failure: warn.",
            )
        if of_sae and run.study.config.gate.on_failure == "stop":
            raise IncompatibleSae(
                f"the SAE does not fit the model: {of_sae}.",
                at=run.study.at("arms", arm, "sae"),
                fix="use an SAE trained on this very model and hook, or go on all the same with gate.on_failure: warn.",
            )
        if complaint:
            say(f"  warning: arm {arm}: {complaint}")
        path = run.arm(arm, "gate.json")
        write_json(path, measured | {"warning": complaint})
        return [path]

    return work


@torch.inference_mode()
def measure_gate(arm: Arm, rows: TokenRows, config: GateConfig) -> dict[str, Any]:
    """Explained variance, CE loss score, l0 and l2 ratio on the study's text.

    Args:
        arm: Model and SAE.
        rows: The study's text; as many rows as make `config.tokens` are used.
        config: How many tokens.

    Returns:
        The measures, the hook's mean residual norm (unit of doses), the norm limit for outliers, and what
        `model_on_text` gives.
    """
    head = rows.head(max(1, config.tokens // rows.ids.shape[1]))
    arm.lm.refuse_rows(rows.ids)
    limit = arm.norm_limit(rows)
    sums = ReconstructionSums(arm.sae.cfg.d_in)
    fired = torch.zeros(arm.sae.cfg.d_sae, dtype=torch.bool)
    norm = 0.0
    for ids in torch.from_numpy(head.ids.astype("int64")).split(8):
        x = capture(arm.lm, arm.hook, ids).cpu()
        x = x[kept_positions(x, limit)].float()
        feature_acts = arm.sae.encode(x)
        sums.add(x, arm.sae(x), feature_acts)
        fired |= (feature_acts > 0).any(0)
        norm += float(x.norm(dim=1).sum())
    losses = spliced_losses(arm.lm, arm.sae, arm.hook, head.ids, limit)
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
        "mean_norm": norm / sums.n_tokens,
        "norm_limit": limit.limit,
        "dtype": str(arm.lm.dtype).removeprefix("torch."),
        **model_on_text(arm.lm, head, losses.clean_by_row, rows),
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
