"""Features of a finished run as files for other programs: steering vectors, a Neuronpedia-style list, CSV."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, SaeffectError, unknown_name
from saeffect.io import FORMULA_STARTS, atomic_path, read_json, versions, write_json
from saeffect.lm.hooks import parse_hook
from saeffect.lm.loading import load_config, locate_model
from saeffect.sae.formats import load_sae
from saeffect.steering.vectors import SteeringVector, joint_vector, write_gguf_vector, write_safetensors_vector
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import chosen_dose

__all__ = ["FORMATS", "ExportFormat", "export_features", "feature_list", "group_of", "neuronpedia_list", "vector_of"]

_FALLBACK_DOSE = 0.4
_LIST_COLUMNS = ("top_tokens", "top_token_ids", "top_weights", "matched")
# Model types of transformers that have another name in GGUF.
_GGUF_ARCHITECTURES = {"mistral": "llama", "gpt_neox": "gptneox", "gemma3_text": "gemma3", "qwen2_moe": "qwen2moe"}


def group_of(run: RunFolder, arm: str, group: str) -> list[int]:
    """Numbers of an arm's features in a group: "domain", "steered", or "changed:N" (group N of what changed).

    ConfigError: no such kind of group, or changed groups of another arm than the control. EmptySelection: the group has
    no features. NotFound: the stage that makes the group has not run. BadFile: a file of that stage was changed.
    """
    run.refuse_changed(*_stage_keys(arm))
    kind, _, number = group.partition(":")
    if kind == "domain":
        table = run.read_table(run.arm(arm, "selection.parquet"))
        features = table.loc[table["is_domain"], "feature"].tolist()
    elif kind == "steered":
        features = run.read_table(run.arm(arm, "effects.parquet"))["feature"].tolist()
    elif kind == "changed":
        if arm != (control := run.study.control):
            raise ConfigError("changed groups are features of the control's SAE.", at="group", fix=f"say {control}.")
        groups = run.read_table(run.path("comparison", "change_groups.parquet")).set_index("group")["features"]
        if number not in map(str, groups.index):
            raise unknown_name("group", group, [f"changed:{n}" for n in groups.index][:40], at="group")
        features = list(groups[int(number)])
    else:
        raise unknown_name("group", group, ["domain", "steered", "changed:1"], at="group")
    if not features:
        raise EmptySelection(f"the group {group!r} of arm {arm} has no features.", at="group", fix="name features.")
    return [int(feature) for feature in features]


def _stage_keys(arm: str) -> tuple[str, ...]:
    """Keys of the stages whose files this module reads."""
    arm_stages = tuple(f"{stage} {arm}" for stage in ("gate", "features", "coherence", "steer"))
    return (*arm_stages, "select", "changes", "dose search")


def feature_list(run: RunFolder, arm: str, features: Sequence[int]) -> pd.DataFrame:
    """One row a feature, in the given order: the columns of `features.parquet`, then coherence, the selection, and
    effects (NaN for features that were not steered). UnknownName for an unknown arm, ConfigError for an unknown
    feature, EmptySelection without features.
    """
    run.study.arm(arm)
    table = run.read_table(run.arm(arm, "features.parquet")).set_index("feature")
    if not len(features):
        raise EmptySelection("no feature was chosen.", at="features", fix="name at least one feature or a group.")
    unknown = [f for f in features if f not in table.index]
    if unknown:
        raise ConfigError(
            f"arm {arm} has no feature {unknown[0]}; they run from {table.index.min()} to {table.index.max()}.",
            at="features",
        )
    chosen = list(dict.fromkeys(int(f) for f in features))
    rows = table.loc[chosen].drop(columns=["top_tokens_dot", "top_tokens_cosine"], errors="ignore")
    for file, columns in _FURTHER_COLUMNS.items():
        further = run.table_or_none(run.arm(arm, file))
        if further is not None:
            present = [name for name in columns if name in further]
            rows = rows.join(further.set_index("feature")[present])
    return rows.reset_index()


_FURTHER_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "coherence.parquet": ("coherence",),
    "selection.parquet": ("matches", "matched", "is_domain", "n_yes", "n_no", "n_unsure", "label"),
    "effects.parquet": ("effect", "effect_low", "effect_high", "p", "q", "passed"),
}


def vector_of(run: RunFolder, arm: str, features: Sequence[int], dose: float | None = None) -> SteeringVector:
    """The joint steering vector of some features of an arm, as the operator "add" adds it. No model is loaded.

    `dose` is in units of the hook's mean residual norm; None takes the dose of the run's test (0.4 if it has none).
    ConfigError if the dose is 0 or not finite; other errors as `feature_list` and `joint_vector`.
    """
    table = feature_list(run, arm, features)
    study, gate = run.study, read_json(run.arm(arm, "gate.json"))
    dose = _default_dose(run) if dose is None else dose
    if dose == 0 or not math.isfinite(dose):
        raise ConfigError(f"the dose must be a number other than 0. Got {dose:g}.", at="dose")
    chosen = table["feature"].tolist()
    rows = load_sae(study.sae_folder(arm), at=study.at("arms", arm, "sae")).W_dec.detach()[chosen].float()
    config = study.arm(arm)
    metadata = {
        "arm": arm,
        "role": config.role,
        "model": config.model.path,
        "adapter": config.model.adapter or "",
        "sae": str(config.sae),
        "study": study.config.name,
        "top_tokens": json.dumps([list(tokens) for tokens in table["top_tokens"]], ensure_ascii=False),
        "saeffect": versions().get("saeffect", ""),
    }
    norm = float(gate["mean_norm"])
    return SteeringVector(joint_vector(rows, dose * norm), rows, tuple(chosen), study.hook(arm), dose, norm, metadata)


def _default_dose(run: RunFolder) -> float:
    steering = run.study.config.steering
    if steering is not None and steering.operator == "add" and steering.unit == "residual_norm":
        with contextlib.suppress(SaeffectError):
            return chosen_dose(run)[0] or _FALLBACK_DOSE
    return _FALLBACK_DOSE


def neuronpedia_list(run: RunFolder, arm: str, features: Sequence[int]) -> dict[str, Any]:
    """Features with the keys of Neuronpedia's JSON. modelId and layer come from the SAE's `neuronpedia_id` (Neuronpedia
    then opens the list, cut to modelId, layer and index), otherwise from the model's name and the hook.
    """
    table = feature_list(run, arm, features)
    examples = run.table_or_none(run.arm(arm, "examples.parquet"))
    model, layer, is_public = _source_of(run, arm)
    rows = []
    for row in table.to_dict("records"):
        feature, label = int(row["feature"]), str(row.get("label") or "")
        rows.append(
            {
                "modelId": model,
                "layer": layer,
                "index": str(feature),
                "description": label or ", ".join(str(token).strip() for token in row["top_tokens"][:3]),
                "explanations": [{"description": label, "typeName": "human"}] if label else [],
                "pos_str": list(row["top_tokens"]),
                "pos_values": [float(weight) for weight in row["top_weights"]],
                "frac_nonzero": float(row["density"]),
                "maxActApprox": float(row["max_activation"]),
                "activations": [] if examples is None else _activations(examples[examples["feature"] == feature]),
            }
        )
    name = f"{run.study.config.name}, {arm}"
    return {"name": name, "isPublicSource": is_public, "hook": run.study.hook(arm), "features": rows}


def _source_of(run: RunFolder, arm: str) -> tuple[str, str, bool]:
    """Neuronpedia's modelId and layer, and whether the SAE itself names them."""
    neuronpedia_id = run.study.sae_config(arm).metadata.get("neuronpedia_id")
    if isinstance(neuronpedia_id, str) and neuronpedia_id.count("/") == 1:
        return (*neuronpedia_id.split("/"), True)  # type: ignore[return-value]
    point = parse_hook(run.study.hook(arm))
    model = re.split(r"[/:]", run.study.arm(arm).model.path)[-1].lower()
    return model, f"{point.layer}-{point.kind.removeprefix('hook_').replace('_', '-')}-{arm}", False


def _activations(examples: pd.DataFrame) -> list[dict[str, Any]]:
    contexts = []
    for row in examples.sort_values("rank").to_dict("records"):
        values = [float(value) for value in row["activations"]]
        peak = max(range(len(values)), key=values.__getitem__, default=0)
        top = values[peak] if values else 0.0
        contexts.append({"tokens": list(row["tokens"]), "values": values, "maxValue": top, "maxValueTokenIndex": peak})
    return contexts


@dataclass(frozen=True)
class ExportFormat:
    """A file format: name, suffix, description, writer, and whether it takes a dose."""

    name: str
    suffix: str
    label: str
    write: Callable[[RunFolder, str, Sequence[int], float | None, Path], None]
    has_dose: bool = False


def export_features(
    run: RunFolder, arm: str, features: Sequence[int], path: Path, *, kind: str, dose: float | None = None
) -> Path:
    """Write features of an arm as one file, atomically; returns its path. `kind` is a name in `FORMATS`, else
    `UnknownName`; `ConfigError` for a dose in a format without one; other errors as `feature_list` and `vector_of`.
    """
    if kind not in FORMATS:
        raise unknown_name("format", kind, FORMATS, at="format")
    file_format = FORMATS[kind]
    if dose is not None and not file_format.has_dose:
        raise ConfigError(f"a file of format {kind} has no dose.", at="dose", fix="leave it out.")
    run.refuse_changed(*_stage_keys(arm))
    file_format.write(run, arm, features, dose, path)
    return path


def _safetensors(run: RunFolder, arm: str, features: Sequence[int], dose: float | None, path: Path) -> None:
    write_safetensors_vector(vector_of(run, arm, features, dose), path)


def _gguf(run: RunFolder, arm: str, features: Sequence[int], dose: float | None, path: Path) -> None:
    write_gguf_vector(vector_of(run, arm, features, dose), path, architecture=_gguf_architecture(run, arm))


def _gguf_architecture(run: RunFolder, arm: str) -> str:
    """GGUF's name of the model's architecture; "unknown" if the model's configuration cannot be read."""
    model = run.study.arm(arm).model
    try:
        model_type = str(load_config(locate_model(model), model).model_type)
    except (SaeffectError, OSError, ValueError):
        return "unknown"
    return _GGUF_ARCHITECTURES.get(model_type, model_type)


def _neuronpedia(run: RunFolder, arm: str, features: Sequence[int], _: float | None, path: Path) -> None:
    write_json(path, neuronpedia_list(run, arm, features))


def _csv(run: RunFolder, arm: str, features: Sequence[int], _: float | None, path: Path) -> None:
    """Lists become JSON; a label that a spreadsheet would take for a formula gets an apostrophe in front."""
    table = feature_list(run, arm, features)
    for name in set(_LIST_COLUMNS) & set(table):
        table[name] = [
            json.dumps(pd.Series(values, dtype=object).tolist(), ensure_ascii=False) for values in table[name]
        ]
    if "label" in table:
        labels = table["label"].fillna("")
        table["label"] = labels.where(~labels.str.startswith(FORMULA_STARTS), "'" + labels)
    table.insert(0, "arm", arm)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


FORMATS: Mapping[str, ExportFormat] = {
    file_format.name: file_format
    for file_format in (
        ExportFormat("safetensors", ".safetensors", "steering vector", _safetensors, has_dose=True),
        ExportFormat("gguf", ".gguf", "control vector for llama.cpp", _gguf, has_dose=True),
        ExportFormat("neuronpedia", ".json", "Neuronpedia-style list", _neuronpedia),
        ExportFormat("csv", ".csv", "CSV", _csv),
    )
}
