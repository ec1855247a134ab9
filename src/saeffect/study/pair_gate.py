"""Is an SAE good on a model, and still on its fine-tune? `gate_pair` opens what was typed, `judge_pair` measures."""

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

from saeffect.config import BosRule, GateConfig, ModelConfig, TextConfig
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
_WORSE = 0.02  # of the CE loss score: a change that mends may cost so much of it
_DRIFT = 1.5  # times as much unexplained on the fine-tuned model as on the base model
_KEPT = 0.9  # share of positions that a recorded norm limit keeps, unless it is of something else
_BETTER = 0.5  # nats a token, by which other tokens or another beginning must be better
_ROWS_CHECKED = 8
WARM_START = Change(
    "drift",
    "the SAE is good on the base model, and no longer on the fine-tuned one",
    "train it on from where it is (sae.init_from, see docs/gate.md), or compare what both models have in common.",
)


@dataclass(frozen=True)
class GateRequest:
    """What was typed: models and texts as for `saeffect diff`.

    Attributes:
        hook: Where the SAE reads; None: where its cfg.json says, else where it fits best.
        field: Of the texts: a field or a template; None: the usual one.
        chat: Whether the texts are conversations, which the chat template writes.
        positions: Of chats, the tokens that count, see docs/chat.md.
        tokens: To measure on.
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
    """What the gate found.

    Attributes:
        hook: Where the SAE was read.
        fits, on_text: By model, "base" and perhaps "tuned": the fit, and what `model_on_text` measures.
        trained: Values that the SAE's own card has, by their names in `Fit.values`.
        changes: What is wrong and what to do about it, likeliest first; empty if nothing is.
        mismatch: What was tried, and what mends; None if the text itself is not the model's.
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
        said = [f"{change.found}: {change.fix}" for change in self.changes]
        if not said:
            said = ["The SAE fits." if self.ok else "The SAE does not fit, and no change that was tried mends it."]
        return html_of(said, self.table().dropna(axis=1, how="all"), self.by_position())

    def by_position(self) -> pd.DataFrame:
        """`PositionSums.table` of each model, with the column model in front."""
        parts = [fit.positions.table().assign(model=name) for name, fit in self.fits.items()]
        found = pd.concat(parts, ignore_index=True)
        return found[["model", *(column for column in found if column != "model")]]

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for a JSON file."""
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

    Raises `SaeffectError` for what is not there, an SAE of another width, or models with different tokenizers.
    """
    typed = DiffRequest(request.model, request.tuned or request.model, request.sae, request.texts, name="gate")
    study = diff_study(typed, Path("the command"), log)
    control, treatment = study.pair
    folder = study.sae_folder(control)
    sae = load_sae(folder, at="SAE")
    context = min(int(sae.cfg.metadata.get("context_size") or _CONTEXT), _CONTEXT)
    text = _text(request, study.config.text, context)
    study = Study(study.config.model_copy(update={"text": text}), study.source)
    models = {"base": study.open_model(control, log)}
    lm = models["base"]
    if lm.n_positions is not None and lm.n_positions < context:
        text = text.model_copy(update={"context_size": lm.n_positions})
    reads = request.hook or sae.cfg.hook_name or "the residual stream"
    require_width(sae.cfg, hook_width(lm, reads), reads, lm.name, at="SAE")
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


def _text(request: GateRequest, text: TextConfig, context: int) -> TextConfig:
    """The text as it was asked for. ConfigError: positions of what is no chat, or chats of bundled text."""
    sources = [source.model_dump(exclude_unset=True) for source in text.sources]
    named = {} if request.field is None else {"field": request.field}
    values: dict[str, Any] = (
        {"sources": [source | named for source in sources]} if sources else {"bundled": text.bundled}
    )
    values |= {"format": "chat" if request.chat else "text", "positions": request.positions, "bos": request.bos}
    return TextConfig.read(values | {"tokens": max(request.tokens, 2 * context), "context_size": context}, at="--text")


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

    `hook` None is the one where it explains most; `rows_of` gives rows of text in a model's tokens; `tokenizers` are
    further ones to try, by name. Errors as `capture`; ConfigError without a hook if the SAE fits none.
    """
    limits, base = limits or GateConfig(), models["base"]
    rows = rows_of(base)
    base.refuse_rows(rows.ids)
    hook = hook or _likeliest_hook(base, sae, rows, log)
    log(f"measuring on {rows.ids.size:,} tokens at {hook}")
    fits, on_text = {}, {}
    for name, lm in models.items():
        fits[name] = measure_fit(lm, sae, hook, rows.ids, _limit(lm, sae, hook, rows), counts=rows.counts)
        on_text[name] = model_on_text(lm, rows, fits[name].losses.by_row["clean"], rows)
        log(f"  {name}: explained variance {fits[name].explained_variance:.3f}")
    changes, mismatch, score = _of_text(base, rows_of, on_text["base"], tokenizers or {}), None, float("nan")
    if not changes:
        log("trying other ways to read it")
        mismatch = find_mismatch(base, sae, hook, rows.ids, log, counts=rows.counts)
        score = _score(base, mismatch, rows) if mismatch else score
        if not score < fits["base"].values()["ce_loss_score"] - _WORSE:
            changes = mismatch.changes
    found = PairGate(
        sae, hook, limits, rows, fits, on_text, _trained(sae), tuple(changes), mismatch if changes else None, score
    )
    if not changes and "tuned" in models and not found.failed("base") and _drifted(found):
        found = dataclasses.replace(found, changes=(WARM_START,))
    return found


def _limit(lm: LanguageModel, sae: SparseAutoencoder, hook: str, rows: TokenRows) -> NormLimit:
    """The SAE's recorded limit, unless it would leave out what is no outlier here."""
    own = first_limit(lm, hook, rows.ids[:_ROWS_CHECKED])
    meta = sae.cfg.metadata
    if not (meta.get("norm_limit") and meta.get("mean_norm")):
        return own
    recorded = NormLimit(float(meta["mean_norm"]), float(meta["norm_limit"]))
    return recorded if own.median_norm <= _KEPT * recorded.limit else own


def _likeliest_hook(lm: LanguageModel, sae: SparseAutoencoder, rows: TokenRows, log: Log) -> str:
    log("the SAE names no hook; looking where it fits")
    found = scan_hooks(lm, Reading(sae), rows.head(_ROWS_CHECKED), log=log)
    place = max(found, key=lambda hook: found[hook])
    if not found[place] > 0:
        raise ConfigError(
            f"the SAE names no hook, and explains nothing at any of {len(found)} hooks of {lm.name}.",
            at="--hook",
            fix="name the one that it was trained at, such as --hook blocks.8.hook_resid_pre.",
        )
    return place


def _of_text(
    lm: LanguageModel,
    rows_of: Callable[[LanguageModel], TokenRows],
    measured: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
) -> tuple[Change, ...]:
    """What is wrong between the model and the text, before any SAE: the tokenizer, or how texts begin."""
    complaint = complaint_about_model(measured)
    if not complaint:
        return ()
    has = measured["prepend_bos"]
    here, other = (measured[f"ce_{word}_bos"] for word in (("with", "without") if has else ("without", "with")))
    if here - other > _BETTER and math.exp(other) < max(measured["unigram_perplexity"].values()):
        fix = f"say bos: {'never' if has else 'always'} (--bos), and take SAEs trained on text read alike."
        return (Change("bos", f"BOS: {complaint}", fix),)
    found = f"other tokenizer: {complaint}"
    for name, tokenizer in tokenizers.items():
        with_it = dataclasses.replace(lm, tokenizer=tokenizer)
        rows = rows_of(with_it)
        if int(rows.ids.max(initial=0)) >= lm.d_vocab:
            continue
        losses = text_losses(with_it, torch.from_numpy(rows.ids.astype(np.int64)))
        theirs = model_on_text(with_it, rows, losses, rows)["perplexity"]
        if all(math.log(measured["perplexity"][source]) - math.log(theirs[source]) > _BETTER for source in theirs):
            said = ", ".join(f"{value:,.4g} on {source}" for source, value in theirs.items())
            return (Change("tokenizer", f"{found}; with the tokenizer of {name} it is {said}", f"use that of {name}."),)
    fix = "put the tokenizer that the model was trained with into its folder; or look at its weights."
    return (Change("tokenizer", found, fix),)


def _other_tokenizers(sae: SparseAutoencoder, lm: LanguageModel) -> dict[str, Any]:
    """The tokenizer of the model that the SAE names, if it lies on this machine and is another one."""
    name = sae.cfg.metadata.get("model_name")
    if not name or str(name) == lm.name:
        return {}
    config = ModelConfig(path=str(name))
    try:
        place = locate_model(config)
        return {str(name): load_tokenizer(place, config)} if isinstance(place, Path) else {}
    except SaeffectError:
        return {}


def _score(lm: LanguageModel, mismatch: Mismatch, rows: TokenRows) -> float:
    """CE loss score with the changes that mend; NaN where it is undefined, or the text itself is to change."""
    if mismatch.prepend_bos is not None:
        return float("nan")
    head = rows.head(_ROWS_CHECKED)
    where = mismatch.hook, head.ids, first_limit(lm, mismatch.hook, head.ids)
    losses = spliced_losses(lm, lambda _, x: mismatch.reading(x.float()), *where, counts=head.counts)
    try:
        return losses.ce_loss_score
    except Undefined:
        return float("nan")


def _drifted(found: PairGate) -> bool:
    base, tuned = (found.fits[name].explained_variance for name in ("base", "tuned"))
    return found.failed("tuned") or (1 - tuned) > _DRIFT * (1 - base)


def _trained(sae: SparseAutoencoder) -> dict[str, float]:
    """What the SAE's card says of its own training, under our names."""
    meta = sae.cfg.metadata
    held_out = meta.get("held_out")
    found = dict(held_out) if isinstance(held_out, dict) else {}
    found |= {"mean_norm": meta["mean_norm"]} if meta.get("mean_norm") else {}
    names = ("explained_variance", "ce_loss_score", "ce_clean", "ce_sae", "ce_zero", "l0", "l2_ratio", "mean_norm")
    numbers = {name: found[name] for name in names if name in found}
    return {k: float(v) for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
