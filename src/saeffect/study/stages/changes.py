"""What changed between the models, read on the control's SAE and judged against null fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.diffing.naming import FurtherSae, further_evidence, name_changes
from saeffect.diffing.nulls import null_card, pooled_p, smallest_p
from saeffect.diffing.standardised import BASES, FEWEST_NULLS, Basis, among_nulls, raw_changes
from saeffect.diffing.trace import Trace, Tracer
from saeffect.diffing.where import where_changed
from saeffect.io import fingerprint
from saeffect.progress import Log
from saeffect.sae.formats import load_sae
from saeffect.stats.arguments import BoolArray
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.study.nulls import nulls_folder, study_tracer
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.features import open_seeds, seed_identities, shared_unembedding
from saeffect.study.stages.trace import (
    as_fine_tune,
    missing_nulls,
    nulls_identity,
    read_trace,
    study_nulls,
    trace_inputs,
    trace_path,
    training_note,
)

__all__ = ["CHANGE_TABLES", "changes_inputs", "run_changes"]

VERSION = 9
_NAMING_TABLES = ("changes", "change_groups", "declared_changes", "evidence", "null_groups", "change_numbers")
_WHERE_TABLES = (
    *("change_overall", "change_by_layer", "change_by_word", "change_in_text", "activation_difference"),
    *("written_words", "openings"),
)
CHANGE_TABLES = (*_NAMING_TABLES, "null_recipe", *_WHERE_TABLES)
"""The tables of this stage; the report reads these, and those of `put_back` and `cross`."""
# Settings of a recipe that decide how far a fine-tune moves a model, whatever it reads.
_RECIPE = ("steps", "batch_size", "context_size", "learning_rate", "warmup_steps", "rank", "alpha", "modules")


def changes_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    return trace_inputs(run) | {
        "version": VERSION,
        "tables": run.digest(
            trace_path(run),
            run.arm(study.control, "features.parquet"),
            *(run.arm(name, file) for name in study.config.arms for file in ("selection.parquet", "seeds.parquet")),
        ),
        "saes": [dict(study.identities), seed_identities(study) if study.has_saes else None],
        "domain": study.config.selection.subject,
        "nulls": nulls_identity(study),
        "recipe": fingerprint(training_note(study)),
        "alpha": study.config.comparison.alpha,
    }


def run_changes(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `CHANGE_TABLES`; without nulls p is NaN, with a reason. Writes nothing without a trace."""
    study = run.study
    control, treatment = study.pair
    if not trace_path(run).is_file():
        return []
    trace, tracer = read_trace(run), study_tracer(study, log)
    nulls, tuned = study_nulls(study, tracer), as_fine_tune(study.open_model(treatment, log), tracer.base)
    tables = _judge_features(run, control, tracer, trace, nulls) if tracer.sae is not None else {}
    tables |= where_changed(trace, nulls, tracer.rows, tuned, tracer.hook, alpha=study.config.comparison.alpha)
    if (folder := nulls_folder(study)) is None:
        reason = missing_nulls(study)
        for name, table in tables.items():
            if len(table) and "reason" in table:
                tables[name] = table.assign(reason=reason)
    else:
        tables["null_recipe"] = _recipe_table(training_note(study), folder)
    return [run.write_table(run.path("comparison", f"{name}.parquet"), table) for name, table in tables.items()]


def _judge_features(
    run: RunFolder, control: str, tracer: Tracer, trace: Trace, nulls: list[Trace]
) -> dict[str, pd.DataFrame]:
    """`_NAMING_TABLES`, with p and q of each feature's change."""
    config = run.study.config
    selection = run.read_table(run.arm(control, "selection.parquet")).sort_values("feature")
    chosen = selection["is_domain"].to_numpy(dtype=bool)
    declared: dict[str, BoolArray] = {config.selection.subject: chosen} if chosen.any() else {}
    basis = _basis(run, control, tracer)
    # Fewer nulls give no scale to standardise one of them by.
    measured = among_nulls([trace, *nulls], basis.top_tokens, basis.directions) if len(nulls) >= 3 else None
    tables = name_changes(trace, nulls, basis, declared=declared, alpha=config.comparison.alpha, measured=measured)
    tables["evidence"] = further_evidence(
        tables["evidence"], list(_further_saes(run, control, declared)), trace, nulls, config.comparison.alpha
    )
    table = tables["changes"].assign(p=math.nan, q=math.nan, n_nulls=len(nulls), smallest_p=math.nan)
    raw = [raw_changes(traced, basis.top_tokens, basis.directions) for traced in (trace, *nulls)]
    for name in (*BASES, "combined"):
        changes = [values[name] for values in (raw if name in BASES else measured or ())]
        if len(changes) > 1:
            observed, *null_changes = changes
            p, n_pooled = pooled_p(observed, np.array(null_changes), trace.read[2])
            rows = table["basis"] == name
            p = np.where(table.loc[rows, "z"].isna() & (len(nulls) >= FEWEST_NULLS), np.nan, p)
            table.loc[rows, "p"], table.loc[rows, "q"] = p, benjamini_hochberg(p)
            smallest = [smallest_p(len(nulls), int(n)) for n in n_pooled]
            table.loc[rows, "smallest_p"] = np.where(np.isnan(p), np.nan, smallest)
    tables["changes"] = table
    return tables


def _further_saes(run: RunFolder, control: str, declared: Iterable[str]) -> Iterator[FurtherSae]:
    """The SAEs of all arms but the control's own that read at its hook, and those from other seeds."""
    study = run.study
    width, hook = study.sae_config(control).d_in, study.hook(control)
    for arm in study.ordered_arms():
        base_alone = study.config.arms[arm].model == study.config.arms[control].model
        if study.sae_config(arm).d_in != width or study.hook(arm) != hook or (study.one_sae and arm != control):
            continue
        chosen = {arm: run.read_table(run.arm(arm, "selection.parquet")).sort_values("feature")}
        rows = {} if arm == control else {arm: load_sae(study.sae_folder(arm)).W_dec.detach()}
        if seeds := open_seeds(study, arm):
            table = run.read_table(run.arm(arm, "seeds.parquet"))
            chosen |= {seed.name: table[table["sae"] == seed.name].sort_values("feature") for seed in seeds}
            rows |= {seed.name: seed.W_dec for seed in seeds}
        for name, W_dec in rows.items():
            members = chosen[name]["is_domain"].to_numpy(dtype=bool)
            yield FurtherSae(name, W_dec.float().cpu().numpy(), dict.fromkeys(declared, members), base_alone)


def _basis(run: RunFolder, control: str, tracer: Tracer) -> Basis:
    features = run.read_table(run.arm(control, "features.parquet")).sort_values("feature")
    W_dec = run.study.open_arm(control).added().float().cpu().numpy()
    top = np.stack([np.asarray(ids, dtype=np.int64) for ids in features["top_token_ids"]])
    base, rows = tracer.base, tracer.sae.W_dec.detach().float().cpu().numpy() if tracer.sae else None
    return Basis(W_dec, shared_unembedding(base).numpy(), top, base.token_strings(), tracer.firing(), rows)


def _recipe_table(training: Mapping[str, Any], folder: Path) -> pd.DataFrame:
    """The fine-tune's recipe beside the nulls': setting, tuned, nulls ("" if not recorded), differs (then None)."""
    recipes = training.get("recipe"), null_card(folder).get("recipe")
    tuned, nulls = (recipe if isinstance(recipe, Mapping) else {} for recipe in recipes)
    rows = []
    for setting in _RECIPE:
        values = (tuned.get(setting), nulls.get(setting))
        comparable = [sorted(value) if isinstance(value, list) else value for value in values]
        is_recorded = None not in comparable
        texts = ("" if value is None else str(value) for value in comparable)
        rows.append((setting, *texts, comparable[0] != comparable[1] if is_recorded else None))
    return pd.DataFrame(rows, columns=["setting", "tuned", "nulls", "differs"]).astype({"differs": "boolean"})
