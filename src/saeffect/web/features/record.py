"""Everything that a run holds about one feature, as plain values, for its page and its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saeffect.errors import NotFound, SaeffectError
from saeffect.features.embeddings import WordVectors, load_embeddings
from saeffect.lm.tokens import normalise_token
from saeffect.study.both_models import both_models_files, other_arm
from saeffect.study.study import Study
from saeffect.web.features.index import FeatureIndex
from saeffect.web.features.query import CHOICES, MEASURES
from saeffect.web.features.tables import ArmRoles, RunTables

__all__ = ["Record", "feature_record", "plain", "token_pairs"]

Record = dict[str, Any]


def feature_record(
    index: FeatureIndex, tables: RunTables, arms: ArmRoles, study: Study, arm: str, number: int
) -> Record:
    """All data of a feature; NaN where undefined. Missing parts are None or empty, with the reason in `lacks`.

    Raises NotFound (no such feature, or its arm has none yet) or UnknownName (no such arm).
    """
    position = index.position(arm, number)
    row = _first(tables.rows(f"arms/{arm}/features.parquet", number))
    selection = _first(tables.rows(f"arms/{arm}/selection.parquet", number))
    lacks: dict[str, str] = {}
    record: Record = {
        "study": study.config.name,
        "arm": arm,
        "role": arms.roles[arm],
        "feature": number,
        "label": index.verdicts.labels[position],
        "domain": {"name": study.config.selection.subject, "is_domain": index.code("domain", position) == "yes"},
        "projection": study.config.features.projection,
        "top_tokens": _token_weights(row.get("top_tokens"), row.get("top_weights")),
        "matched": list(selection.get("matched") or ()),
        "numbers": {name: value for name, value in row.items() if isinstance(value, int | float) and name != "feature"},
        "verdicts": {name: int(getattr(index.verdicts, name)[position]) for name in ("n_yes", "n_no", "n_unsure")},
    }
    record |= _both_models(tables, study, arm, number, lacks)
    record["coherence"] = _coherence(tables, study, record, lacks)
    record["changes"] = _changes(tables, arms, arm, number, lacks)
    record["matches"] = _matches(index, tables, arms, arm, number, lacks)
    record["steering"] = _steering(tables, study, arm, number, lacks)
    return record | {"lacks": lacks}


def _first(rows: Sequence[Record]) -> Record:
    return rows[0] if rows else {}


def _token_weights(tokens: Sequence[str] | None, weights: Sequence[float] | None) -> list[Record]:
    pairs = zip(tokens or (), weights or (), strict=True)
    return [{"token": token, "weight": weight} for token, weight in pairs]


def _both_models(tables: RunTables, study: Study, arm: str, number: int, lacks: dict[str, str]) -> Record:
    """Bottom tokens, histogram and contexts of both models if both were read, else the run's own contexts."""
    other = other_arm(study, arm)
    own_contexts = [{**row, "chosen_in": arm} for row in tables.rows(f"arms/{arm}/examples.parquet", number)]
    parts: Record = {
        "models": {"own": arm, "beside": other},
        "bottom_tokens": None,
        "histogram": None,
        "contexts": own_contexts,
    }
    try:
        features, contexts = both_models_files(tables.folder, arm, other)
    except (NotFound, SaeffectError) as error:
        lacks["both_models"] = error.message
        return parts
    row = _first(tables.rows(str(features), number))
    if not row:
        lacks["both_models"] = "the text has not been read with both models yet"
        return parts
    if row["reason"]:
        lacks["beside"] = row["reason"]
    parts["bottom_tokens"] = _token_weights(row["bottom_tokens"], row["bottom_weights"])
    parts["histogram"] = {
        name: row.get(name) for name in ("top", *(f"{part}{side}" for side in ("", "_beside") for part in _HISTOGRAM))
    }
    parts["contexts"] = tables.rows(str(contexts), number) or own_contexts
    return parts


_HISTOGRAM = ("counts", "n_tokens", "density", "mean_activation", "max_activation")


def token_pairs(tokens: Sequence[str], weights: Sequence[float], vectors: WordVectors) -> list[Record]:
    """The pairs of top tokens that coherence averages: tokens a, b, their cosine, and the pair's share of the weight.

    Shares add up to 1; tokens without a vector make no pair.

    Example:
        >>> toy = WordVectors.from_rows(["cat", "dog"], [[1, 0], [3, 4]], name="toy")
        >>> pair = token_pairs([" cat", "x", "Dog"], [2, 1, 1], toy)[0]
        >>> pair["a"], pair["b"], round(pair["cosine"], 2), pair["share"]
        (0, 2, 0.6, 1.0)
    """
    rows = [vectors.row(normalise_token(token)) for token in tokens]
    with_vector = [i for i, row in enumerate(rows) if row >= 0]
    directions = {i: vectors.vectors[rows[i]].astype(np.float64) for i in with_vector}
    directions = {i: vector / np.linalg.norm(vector) for i, vector in directions.items()}
    pairs = [(i, j, weights[i] * weights[j]) for n, i in enumerate(with_vector) for j in with_vector[n + 1 :]]
    total = sum(weight for _, _, weight in pairs)
    return [
        {"a": i, "b": j, "cosine": float(directions[i] @ directions[j]), "share": weight / total if total else math.nan}
        for i, j, weight in pairs
    ]


def _coherence(tables: RunTables, study: Study, record: Record, lacks: dict[str, str]) -> Record:
    row = _first(tables.rows(f"arms/{record['arm']}/coherence.parquet", record["feature"]))
    if not row:
        lacks["coherence"] = tables.trouble(f"arms/{record['arm']}/coherence.parquet")
    parts = {name: row.get(name) for name in ("coherence", "n_known", "reason")}
    top = record["top_tokens"]
    try:
        vectors = load_embeddings(study.config.coherence.embeddings)
        pairs = token_pairs([token["token"] for token in top], [token["weight"] for token in top], vectors)
    except (SaeffectError, OSError) as error:
        lacks["pairs"] = error.message if isinstance(error, SaeffectError) else str(error)
        pairs = []
    return parts | {"embeddings": str(study.config.coherence.embeddings), "pairs": pairs}


def _changes(tables: RunTables, arms: ArmRoles, arm: str, number: int, lacks: dict[str, str]) -> Record:
    """Changes of this feature between the models: by basis against null fine-tunes, and the groups that contain it."""
    is_measured = arm == arms.control or (arms.one_sae and arm == arms.treatment)
    if not is_measured:
        lacks["changes"] = f"changes are measured on the SAE of {arms.control}; look at the match there"
        return {"bases": [], "groups": []}
    rows = tables.rows("comparison/changes.parquet", number)
    if not rows:
        lacks["changes"] = tables.trouble("comparison/changes.parquet") or "it was not measured for this feature"
    order = {basis: i for i, basis in enumerate(CHOICES["basis"])}
    bases = sorted(({**row} for row in rows), key=lambda row: order.get(row["basis"], len(order)))
    groups = tables.get("comparison/change_groups.parquet")
    groups_of_feature = [
        {name: row[name] for name in ("name", "direction", "score", "p", "q", "claimed", "reason")}
        for row in (groups.table.to_pylist() if groups is not None else ())
        if number in (row["features"] or ())
    ]
    return {"bases": bases, "groups": groups_of_feature}


def _matches(
    index: FeatureIndex, tables: RunTables, arms: ArmRoles, arm: str, number: int, lacks: dict[str, str]
) -> list[Record]:
    """By measure, the nearest feature of the other arm, and the fate."""
    side = {arms.control: "control", arms.treatment: "treatment"}.get(arm)
    if side is None:
        lacks["matches"] = f"only features of {arms.control} and {arms.treatment} are matched with each other"
        return []
    other = arms.treatment if side == "control" else arms.control
    rows = tables.rows(f"comparison/fates_{side}.parquet", number)
    if not rows:
        lacks["matches"] = tables.trouble(f"comparison/fates_{side}.parquet") or "it was not matched"
    matches = []
    for row in rows:
        match = -1 if row.get("match") is None else int(row["match"])
        known = match >= 0 and other in index.arms
        tokens: list[str] = []
        if known:
            try:
                tokens = index.top_tokens(index.position(other, match))
            except NotFound:  # the other arm's table was replaced
                known = False
        by = next((name for name, measure in MEASURES.items() if measure == row["measure"]), row["measure"])
        matches.append({**row, "by": by, "match": match if known else None, "match_arm": other, "match_tokens": tokens})
    return matches


def _steering(tables: RunTables, study: Study, arm: str, number: int, lacks: dict[str, str]) -> Record:
    """Effects, dose response and texts; empty for a feature that was not steered."""
    effects = tables.rows(f"arms/{arm}/effects.parquet", number)
    doses = [row for row in tables.rows("steering/dose_response.parquet", number) if row["arm"] == arm]
    steering = study.config.steering
    if not effects:
        trouble = tables.trouble(f"arms/{arm}/effects.parquet")
        lacks["steering"] = trouble or "the study steered other features"
        if steering is None:
            lacks["steering"] = "this study does not steer"
    return {
        "effects": effects,
        "outcomes": tables.rows(f"arms/{arm}/outcome_effects.parquet", number),
        "doses": sorted(doses, key=lambda row: (row["condition"], row["dose"])),
        "texts": tables.rows(f"arms/{arm}/interventions.parquet", number),
        "prompts": list(steering.prompts) if steering is not None else [],
        "placebos": tables.rows(f"arms/{arm}/matched_placebos.parquet", number)[:1],
    }


def plain(value: Any) -> Any:
    """A record as JSON values: numbers that are not finite become None.

    Example:
        >>> plain({"p": float("nan"), "tokens": (" a",)})
        {'p': None, 'tokens': [' a']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
