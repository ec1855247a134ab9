"""Stage 7, the comparison: control against treatment, with control against placebo as reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.comparison import ArmFacts, ArmTables, Comparison, compare
from saeffect.config import ComparisonConfig
from saeffect.features.coherence import unique_coverage
from saeffect.features.embeddings import load_embeddings
from saeffect.io import read_json, write_json
from saeffect.progress import SILENT, Log
from saeffect.report import with_answer
from saeffect.report.words.learned import learned
from saeffect.sae.formats import saved_dtype
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import chosen_dose
from saeffect.study.stages.features import embeddings_identity
from saeffect.study.stages.match import matched_tables, read_matches
from saeffect.study.stages.select import stored_verdicts
from saeffect.study.study import Study

__all__ = ["ARM_FILES", "arm_facts", "arm_tables", "compare_arms", "compare_inputs", "read_comparison", "run_compare"]

VERSION = 9
_TABLES = Comparison.table_names()
ARM_FILES = (
    *("features.parquet", "coherence.parquet", "selection.parquet", "interventions.parquet", "direct_effects.parquet"),
    *("effects.parquet", "outcome_effects.parquet", "baselines.parquet", "baseline_effects.parquet"),
    *("together_effects.parquet", "seeds.parquet", "gate.json"),
)


def compare_inputs(run: RunFolder) -> dict[str, Any]:
    config = run.study.config
    return {
        "version": VERSION,
        "arms": {name: arm.model_dump(mode="json") for name, arm in config.arms.items()},
        "identities": dict(run.study.identities),
        "tables": run.digest(
            *(run.arm(name, file) for name in config.arms for file in ARM_FILES), run.path("steering", "dose.json")
        ),
        "matches": run.digest(*(run.path("comparison", f"{name}.parquet") for name in matched_tables())),
        "verdicts": _uses_verdicts(run),
        "steered": config.steering is not None,
        "embeddings": embeddings_identity(run.study),
        "min_matches": config.selection.min_matches,
        "comparison": config.comparison.model_dump(exclude={"crossed"}),
        "seed": config.seed,
    }


def run_compare(run: RunFolder, _: Log = SILENT) -> Iterable[Path]:
    """Write `comparison/*.parquet` and `comparison/answer.json`."""
    comparison = compare_arms(run, run.study.config.comparison, seed=run.study.config.seed)
    answer = run.path("comparison", "answer.json")
    write_json(answer, dict(comparison.answer))
    tables = [run.write_table(run.path("comparison", f"{name}.parquet"), getattr(comparison, name)) for name in _TABLES]
    return [*tables, answer]


def compare_arms(run: RunFolder, settings: ComparisonConfig, *, seed: int) -> Comparison:
    """The comparison of a run's arms, with the answer in words; writes nothing."""
    arms, min_matches = arm_tables(run), run.study.config.selection.min_matches
    comparison = compare(
        arms,
        min_matches=min_matches,
        alpha=settings.alpha,
        seed=seed,
        n_boot=settings.n_boot,
        n_permutations=settings.n_permutations,
        tests=settings.tests,
        matches=read_matches(run),
    )
    comparison = with_answer(comparison, arms, tests=settings.tests, min_matches=min_matches, alpha=settings.alpha)
    words = learned(comparison.matches.further, run.study.config.selection.subject, alpha=settings.alpha)
    return replace(comparison, answer={**comparison.answer, "learned": words.headline})


def read_comparison(run: RunFolder) -> Comparison:
    """Read a finished comparison."""
    tables: dict[str, pd.DataFrame] = {
        name: run.read_table(run.path("comparison", f"{name}.parquet")) for name in _TABLES
    }
    return Comparison(**tables, matches=read_matches(run), answer=read_json(run.path("comparison", "answer.json")))


def arm_tables(run: RunFolder, facts_of: Callable[..., ArmFacts] | None = None) -> dict[str, ArmTables]:
    """Every arm's tables, by name; `facts_of` replaces `arm_facts`, for example where an SAE may be gone."""
    vectors = load_embeddings(run.study.config.coherence.embeddings)
    steered = run.study.config.steering is not None
    dose, note = chosen_dose(run) if steered else (None, "")
    tables = {}
    for name, arm in run.study.config.arms.items():
        features = run.read_table(run.arm(name, "features.parquet"))
        selection = run.read_table(run.arm(name, "selection.parquet"))
        domain = features[features["feature"].isin(selection.loc[selection["is_domain"], "feature"])]
        measured = read_json(run.arm(name, "gate.json")) | {"dead_share": float((features["n_active"] == 0).mean())}
        facts = (facts_of or arm_facts)(run.study, name, measured)
        tables[name] = ArmTables(
            name=name,
            role=arm.role,
            features=features,
            coherence=run.read_table(run.arm(name, "coherence.parquet")),
            selection=selection,
            interventions=run.table_or_none(run.arm(name, "interventions.parquet")) if steered else None,
            direct_effects=run.table_or_none(run.arm(name, "direct_effects.parquet")) if steered else None,
            effects=run.table_or_none(run.arm(name, "effects.parquet")) if steered else None,
            facts=facts,
            coverage_unique=unique_coverage(domain, embeddings=vectors),
            unsteered=note if dose is None else "",
            text_shortage=measured["text_shortage"],
            seeds=_seed_tables(run, name),
        )
    return tables


def _seed_tables(run: RunFolder, name: str) -> pd.DataFrame | None:
    """Further SAEs of an arm; None if their domain features are defined differently from the first SAE's."""
    if not run.study.config.arms[name].more_saes or _uses_verdicts(run):
        return None
    return run.read_table(run.arm(name, "seeds.parquet"))


def _uses_verdicts(run: RunFolder) -> bool:
    """Whether domain features depend on people's verdicts."""
    return run.study.config.selection.verdicts is not None or stored_verdicts(run) is not None


def _tokenizer_words(study: Study, name: str) -> str:
    """The arm's tokenizer in words: the control's, and how its own differs."""
    difference = study.differences.get(name)
    return "the control's" if difference is None else f"the control's; its own {difference.words()}"


def _template_words(study: Study, name: str) -> str | None:
    """The chat template of the arm's own tokenizer, compared with the study's; None without chats."""
    if study.chat is None:
        return None
    template = study.tokens.templates[name]
    if template is None:
        return "none of its own"
    same = template.strip() == study.chat.template.strip()
    return "the study's" if same else f"another one ({len(template):,} characters)"


def _bos_words(read: bool | None, trained: Any) -> str | None:
    """Whether the study's text and the SAE's training text begin with BOS, in words; None if not recorded."""
    if not isinstance(trained, bool):
        return None
    words = {True: "with BOS", False: "without BOS"}
    return words[trained] if read == trained else f"{words[bool(read)]}, SAE trained {words[trained]}"


def arm_facts(study: Study, name: str, gate: dict[str, Any] | None = None) -> ArmFacts:
    """Recorded facts about an arm, None where not recorded; `gate` has the gate's measurements, if any."""
    arm = study.config.arms[name]
    sae = study.sae_config(name)
    meta = sae.metadata
    # Before the gate has measured, the values recorded with the SAE.
    recorded = meta.get("held_out")
    quality = gate or (recorded if isinstance(recorded, dict) else {})

    def number(key: str) -> float | None:
        value = quality.get(key)
        return float(value) if isinstance(value, int | float) else None

    def integer(key: str) -> int | None:
        value = meta.get(key)
        return int(value) if isinstance(value, int | float) and abs(value) < 2**63 else None

    return ArmFacts(
        role=arm.role,
        model=arm.model.full_name,
        tokenizer=_tokenizer_words(study, name),
        chat_template=_template_words(study, name),
        hook=study.hook(name),
        architecture=sae.architecture,
        d_sae=sae.d_sae,
        k=sae.k,
        training_tokens=integer("training_tokens"),
        training_text=meta.get("training_text") or meta.get("dataset_path"),
        training_text_sha256=meta.get("training_text_sha256"),
        bos=_bos_words(study.prepend_bos, meta.get("prepend_bos")),
        seed=integer("seed"),
        normalisation=meta.get("training_normalisation") or sae.normalize_activations,
        dtype=saved_dtype(study.sae_folder(name)),
        explained_variance=number("explained_variance"),
        ce_loss_score=number("ce_loss_score"),
        l0=number("l0"),
        dead_share=number("dead_share"),
        same_as_control=quality.get("same_as_control"),
        same_sae=study.one_sae and arm.role == "treatment",
    )
