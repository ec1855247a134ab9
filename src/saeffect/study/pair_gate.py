"""Does an SAE fit a model, and its fine-tune? `gate_pair` opens models, SAE and text; `judge_pair` measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saeffect.config import BosRule, GateConfig, ModelConfig
from saeffect.errors import ConfigError, SaeffectError, Undefined
from saeffect.lm.activations import NormLimit, TokenRows, first_limit
from saeffect.lm.architectures import hook_width
from saeffect.lm.hooks import parse_hook, require_module_output
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_tokenizer, locate_model
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.fit import Fit, measure_fit
from saeffect.sae.formats import load_sae
from saeffect.sae.metrics import spliced_losses
from saeffect.sae.mismatch import Change, Mismatch, Reading, find_mismatch, scan_hooks
from saeffect.study.diff import DiffRequest, diff_study
from saeffect.study.finished import html_of
from saeffect.study.stages.gate import complaint_about_model, model_on_text, text_losses
from saeffect.study.study import Study, require_width
from saeffect.study.texts import study_rows

__all__ = ["GateRequest", "PairGate", "gate_pair", "judge_pair"]

_CONTEXT = 256
_MAX_SCORE_LOSS = 0.02  # of the CE loss score, that a change which mends may cost
_MAX_DRIFT = 1.5  # ratio of unexplained variance on the fine-tuned model to that on the base model
_MAX_MEDIAN = 0.9  # of a recorded norm limit; with a larger median norm the limit belongs to something else
_MIN_GAIN = 0.5  # nats a token, by which another tokenizer or BOS must be better
_ROWS_CHECKED = 8
WARM_START = Change(
    "drift",
    "the SAE is good on the base model, and no longer on the fine-tuned one",
    "train it on from where it is (sae.init_from, see docs/gate.md), or compare what both models have in common.",
)


@dataclass(frozen=True)
class GateRequest:
    """Arguments of `saeffect gate`; models and texts as in `DiffRequest`.

    Attributes:
        hook: Where the SAE reads; None: where its cfg.json says, else where it fits best.
        tokens: Number of tokens to measure on.
    """

    model: str
    sae: str
    tuned: str | None = None
    texts: tuple[str, ...] = ()
    field: str | None = None
    chat: bool = False
    positions: tuple[str, ...] = ("all",)
    hook: str | None = None
    bos: BosRule = "auto"
    tokens: int = 4_096


@dataclass(frozen=True, eq=False)
class PairGate:
    """Result of the gate.

    Attributes:
        hook: Where the SAE was read.
        fits, on_text: By model, "base" and perhaps "tuned": the fit, and what `model_on_text` measures.
        trained: Values recorded in the SAE's card, by their names in `Fit.values`.
        changes: What is wrong and how to fix it, likeliest first; empty if nothing is.
        mismatch: What was tried, and what mends; None if the text itself does not fit the model.
        score_after: CE loss score with the change that mends; NaN without one.
    """

    sae: SparseAutoencoder
    hook: str
    limits: GateConfig
    rows: TokenRows
    fits: Mapping[str, Fit]
    on_text: Mapping[str, Mapping[str, Any]]
    trained: Mapping[str, float]
    changes: tuple[Change, ...]
    mismatch: Mismatch | None
    score_after: float

    def failed(self, model: str) -> bool:
        """Whether the SAE is below the limits on a model."""
        values = self.fits[model].values()
        return not (
            values["explained_variance"] >= self.limits.min_explained_variance
            and values["ce_loss_score"] >= self.limits.min_ce_loss_score
        )

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.changes and not any(self.failed(model) for model in self.fits)

    def table(self) -> pd.DataFrame:
        """Numbers by name (rows) and model (columns: base, tuned, trained); NaN where there is none."""
        columns = {name: fit.values() for name, fit in self.fits.items()}
        return pd.DataFrame({**columns, "trained": pd.Series(self.trained, dtype=float)}, index=[*columns["base"]])

    def _repr_html_(self) -> str:
        lines = [f"{change.found}: {change.fix}" for change in self.changes]
        if not lines:
            lines = ["The SAE fits." if self.ok else "The SAE does not fit, and no change that was tried mends it."]
        return html_of(lines, self.table().dropna(axis=1, how="all"), self.by_position())

    def by_position(self) -> pd.DataFrame:
        """`PositionSums.table` of each model, with the column model in front."""
        parts = [fit.positions.table().assign(model=name) for name, fit in self.fits.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["model", *(column for column in table if column != "model")]]

    def as_dict(self) -> dict[str, Any]:
        """All results as JSON-able values."""
        return {
            "ok": self.ok,
            "hook": self.hook,
            "failed": [name for name in self.fits if self.failed(name)],
            "limits": self.limits.model_dump(include={"min_explained_variance", "min_ce_loss_score"}),
            "values": {name: fit.values() for name, fit in self.fits.items()},
            "trained": dict(self.trained),
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "explained_variance_after": None if self.mismatch is None else self.mismatch.after,
            "positions": self.by_position().to_dict("records"),
        }


def gate_pair(request: GateRequest, limits: GateConfig | None = None, log: Log = SILENT) -> PairGate:
    """Open models, SAE and text, and judge them.

    Raises `SaeffectError` for missing files, an SAE of another width, or models with different tokenizers.
    """
    texts = {key: getattr(request, key) for key in ("texts", "field", "chat", "positions")}
    diff_request = DiffRequest(request.model, request.tuned or request.model, request.sae, name="gate", **texts)
    study = diff_study(diff_request, Path("the command"), log)
    control, treatment = study.pair
    folder = study.sae_folder(control)
    sae = load_sae(folder, at="SAE")
    context = min(int(sae.cfg.metadata.get("context_size") or _CONTEXT), _CONTEXT)
    tokens = max(request.tokens, 2 * context)
    text = study.config.text.model_copy(update={"bos": request.bos, "tokens": tokens, "context_size": context})
    study = Study(study.config.model_copy(update={"text": text}), study.source)
    models = {"base": study.open_model(control, log)}
    lm = models["base"]
    if lm.n_positions is not None and lm.n_positions < context:
        text = text.model_copy(update={"context_size": lm.n_positions})
    hook_words = request.hook or sae.cfg.hook_name or "the residual stream"
    require_width(sae.cfg, hook_width(lm, hook_words), hook_words, lm.name, at="SAE")
    if request.tuned is not None:
        models["tuned"] = study.open_model(treatment, log)

    def rows(model: LanguageModel) -> TokenRows:
        return study_rows(text, lambda: model, prepend_bos=study.prepend_bos)

    hook = request.hook or sae.cfg.hook_name
    if hook is not None:
        parse_hook(hook, lm.n_layers, at="--hook" if request.hook else "SAE")
        if request.hook is None and sae.cfg.module_path is not None:
            require_module_output(lm, sae.cfg.module_path, at="SAE")
    tokenizers = {} if text.bundled else _other_tokenizers(sae, lm)
    return judge_pair(models, sae, hook, rows, limits=limits, tokenizers=tokenizers, log=log)


def judge_pair(
    models: Mapping[str, LanguageModel],
    sae: SparseAutoencoder,
    hook: str | None,
    rows_of: Callable[[LanguageModel], TokenRows],
    *,
    limits: GateConfig | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    log: Log = SILENT,
) -> PairGate:
    """Measure an SAE on a base model (and perhaps its fine-tune "tuned"), and look for what is wrong.

    `hook` None takes the one where the SAE explains most; `rows_of` gives rows of text in a model's tokens;
    `tokenizers` are others to try, by name. Errors as `capture`; ConfigError without a hook if the SAE fits none.
    """
    limits, base = limits or GateConfig(), models["base"]
    rows = rows_of(base)
    base.refuse_rows(rows.ids)
    hook = hook or _best_hook(base, sae, rows, log)
    log(f"measuring on {rows.ids.size:,} tokens at {hook}")
    fits, on_text = {}, {}
    for name, lm in models.items():
        fits[name] = measure_fit(lm, sae, hook, rows.ids, _limit(lm, sae, hook, rows), counts=rows.counts)
        on_text[name] = model_on_text(lm, rows, fits[name].losses.by_row["clean"], rows)
        log(f"  {name}: explained variance {fits[name].explained_variance:.3f}")
    changes, mismatch, score = _text_changes(base, rows_of, on_text["base"], tokenizers or {}), None, float("nan")
    if not changes:
        log("trying other ways to read it")
        mismatch = find_mismatch(base, sae, hook, rows.ids, log, counts=rows.counts)
        score = _score(base, mismatch, rows) if mismatch else score
        if not score < fits["base"].values()["ce_loss_score"] - _MAX_SCORE_LOSS:
            changes = mismatch.changes
    result = PairGate(
        sae, hook, limits, rows, fits, on_text, _card_values(sae), tuple(changes), mismatch if changes else None, score
    )
    if not changes and "tuned" in models and not result.failed("base") and _drifted(result):
        result = dataclasses.replace(result, changes=(WARM_START,))
    return result


def _limit(lm: LanguageModel, sae: SparseAutoencoder, hook: str, rows: TokenRows) -> NormLimit:
    """The SAE's recorded limit, unless it would exclude ordinary positions of this model."""
    measured = first_limit(lm, hook, rows.ids[:_ROWS_CHECKED])
    meta = sae.cfg.metadata
    if not (meta.get("norm_limit") and meta.get("mean_norm")):
        return measured
    recorded = NormLimit(float(meta["mean_norm"]), float(meta["norm_limit"]))
    return recorded if measured.median_norm <= _MAX_MEDIAN * recorded.limit else measured


def _best_hook(lm: LanguageModel, sae: SparseAutoencoder, rows: TokenRows, log: Log) -> str:
    log("the SAE names no hook; looking where it fits")
    scores = scan_hooks(lm, Reading(sae), rows.head(_ROWS_CHECKED), log=log)
    best = max(scores, key=lambda hook: scores[hook])
    if not scores[best] > 0:
        raise ConfigError(
            f"the SAE names no hook, and explains nothing at any of {len(scores)} hooks of {lm.name}.",
            at="--hook",
            fix="name the one that it was trained at, such as --hook blocks.8.hook_resid_pre.",
        )
    return best


def _text_changes(
    lm: LanguageModel,
    rows_of: Callable[[LanguageModel], TokenRows],
    measured: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
) -> tuple[Change, ...]:
    """What is wrong between model and text, whatever the SAE: the tokenizer, or BOS."""
    complaint = complaint_about_model(measured)
    if not complaint:
        return ()
    has_bos = measured["prepend_bos"]
    now, other = ("with", "without") if has_bos else ("without", "with")
    ce_now, ce_other = measured[f"ce_{now}_bos"], measured[f"ce_{other}_bos"]
    if ce_now - ce_other > _MIN_GAIN and math.exp(ce_other) < max(measured["unigram_perplexity"].values()):
        fix = f"say bos: {'never' if has_bos else 'always'} (--bos), and take SAEs trained on text read alike."
        return (Change("bos", f"BOS: {complaint}", fix),)
    problem = f"other tokenizer: {complaint}"
    for name, tokenizer in tokenizers.items():
        other_lm = dataclasses.replace(lm, tokenizer=tokenizer)
        rows = rows_of(other_lm)
        if int(rows.ids.max(initial=0)) >= lm.d_vocab:
            continue
        losses = text_losses(other_lm, torch.from_numpy(rows.ids.astype(np.int64)))
        perplexities = model_on_text(other_lm, rows, losses, rows)["perplexity"]
        gains = [math.log(measured["perplexity"][name]) - math.log(value) for name, value in perplexities.items()]
        if min(gains) > _MIN_GAIN:
            values = ", ".join(f"{value:,.4g} on {source}" for source, value in perplexities.items())
            problem += f"; with the tokenizer of {name} it is {values}"
            return (Change("tokenizer", problem, f"use that of {name}."),)
    fix = "put the tokenizer that the model was trained with into its folder; or look at its weights."
    return (Change("tokenizer", problem, fix),)


def _other_tokenizers(sae: SparseAutoencoder, lm: LanguageModel) -> dict[str, Any]:
    """The tokenizer of the model that the SAE names, if that is another model and on this machine."""
    name = sae.cfg.metadata.get("model_name")
    if not name or str(name) == lm.name:
        return {}
    config = ModelConfig(path=str(name))
    try:
        source = locate_model(config)
        return {str(name): load_tokenizer(source, config)} if isinstance(source, Path) else {}
    except SaeffectError:
        return {}


def _score(lm: LanguageModel, mismatch: Mismatch, rows: TokenRows) -> float:
    """CE loss score with the changes that mend; NaN if it is undefined or the text itself must change."""
    if mismatch.prepend_bos is not None:
        return float("nan")
    head = rows.head(_ROWS_CHECKED)
    where = mismatch.hook, head.ids, first_limit(lm, mismatch.hook, head.ids)
    losses = spliced_losses(lm, lambda _, x: mismatch.reading(x.float()), *where, counts=head.counts)
    try:
        return losses.ce_loss_score
    except Undefined:
        return float("nan")


def _drifted(result: PairGate) -> bool:
    base, tuned = (result.fits[name].explained_variance for name in ("base", "tuned"))
    return result.failed("tuned") or (1 - tuned) > _MAX_DRIFT * (1 - base)


def _card_values(sae: SparseAutoencoder) -> dict[str, float]:
    """Values recorded in the SAE's card, by their names in `Fit.values`."""
    meta = sae.cfg.metadata
    held_out = meta.get("held_out")
    recorded = dict(held_out) if isinstance(held_out, dict) else {}
    recorded |= {"mean_norm": meta["mean_norm"]} if meta.get("mean_norm") else {}
    names = ("explained_variance", "ce_loss_score", "ce_clean", "ce_sae", "ce_zero", "l0", "l2_ratio", "mean_norm")
    numbers = {name: recorded[name] for name in names if name in recorded}
    return {k: float(v) for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
