"""Each arm's features read on the text in both models: where they fire, how strongly, and what they suppress.

A finished run has measured its features only in the model that their SAE belongs to. This reads the study's text with
the other model, too, and stores in `cache/` of the run directory what the pages of single features show. No number of
the study depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError, NotFound
from saeffect.features.activity import ExampleCollector
from saeffect.features.projection import project
from saeffect.io import fingerprint, sole_writer
from saeffect.lm.activations import kept_positions
from saeffect.lm.gguf import cache_folder
from saeffect.lm.hooks import parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import locate_model, model_shape
from saeffect.lm.tokens import special_tokens
from saeffect.progress import SILENT, Log
from saeffect.study.run_folder import RunFolder, read_manifest
from saeffect.study.stages.features import ranked_tokens, shared_unembedding
from saeffect.study.study import Arm, Study

__all__ = [
    "N_BINS",
    "ActivationHistograms",
    "both_models_files",
    "features_fingerprint",
    "other_arm",
    "read_both_models",
    "refuse_changed",
    "refuse_remote_code",
    "size_obstacle",
    "special_mask",
]

VERSION = 1
N_BINS = 40
"""Bars of a histogram, from 0 to `top`."""


def other_arm(study: Study, arm: str) -> str:
    """The arm whose model an arm's features are also read in: the treatment, and for the treatment the control."""
    control, treatment = study.pair
    return control if arm == treatment else treatment


def both_models_files(folder: Path, arm: str, other: str) -> tuple[Path, Path]:
    """Paths of the tables about an arm's features and their contexts, whether written or not; the file names hold a
    hash of what is read.

    In the run directory, or in the user's cache if that cannot be written. NotFound if the arm has no features yet.
    """
    try:
        manifest = read_manifest(folder)
        model, text = manifest["arms"][other]["model"], manifest["text_sha256"]
        digest = fingerprint([VERSION, features_fingerprint(manifest, folder, arm), model, text])
    except (NotFound, KeyError) as error:
        raise _features_missing(folder, arm) from error
    name = f"both-{arm}-{digest[:16]}"
    names = (f"{name}.parquet", f"{name}-contexts.parquet")
    inside, outside = folder / "cache", cache_folder() / "both-models"
    for parent in (inside, outside):
        if all((parent / name).is_file() for name in names):
            return parent / names[0], parent / names[1]
    parent = inside if os.access(inside if inside.is_dir() else folder, os.W_OK) else outside
    return parent / names[0], parent / names[1]


def features_fingerprint(manifest: dict[str, Any], folder: Path, arm: str) -> str:
    """Fingerprint of the inputs of an arm's features; NotFound if the run has none yet."""
    if (stage := manifest["stages"].get(f"features {arm}")) is None:
        raise _features_missing(folder, arm)
    return str(stage["fingerprint"])


def _features_missing(folder: Path, arm: str) -> NotFound:
    fix = "let the study run on to this stage."
    return NotFound(f"the features of {arm} are not there yet.", at=str(folder), fix=fix)


@torch.inference_mode()
def read_both_models(folder: Path | str, log: Log = SILENT) -> list[Path]:
    """Write the missing tables of a run's arms; existing ones are not computed again.

    Of features: bottom_tokens, bottom_weights (least first, on the scale of the top tokens); for this model and, as
    `_beside`, the other: density, mean and maximum of activations; `top` and counts [N_BINS] of a histogram of
    activations above 0, whose last bar ends at `top` in both. Of contexts: as `examples.parquet`, but for those that
    peak at special tokens; chosen by either model (`chosen_in`), with activations in both. Where the SAE cannot read
    the other model, there are no such columns, and `reason` says why.

    NotFound: the run has no features yet. ConfigError: a model or SAE is not the one that the run read. InUse: another
    process is writing these files.
    """
    run_folder = Path(folder)
    study = Study.open(run_folder / "study.yaml")
    manifest = read_manifest(run_folder)
    written: list[Path] = []
    for name in study.ordered_arms():
        if f"features {name}" not in manifest["stages"]:
            continue
        other = other_arm(study, name)
        files = both_models_files(run_folder, name, other)
        if all(file.is_file() for file in files):
            continue
        refuse_remote_code(study, name, other)
        for arm in (name, other):
            refuse_changed(study, arm, manifest)
        with sole_writer(files[0].parent):
            for file, table in zip(files, _read_arm(study, name, other, log), strict=True):
                written.append(RunFolder.write_table(file, table))
    return written


def refuse_changed(study: Study, arm: str, manifest: dict[str, Any]) -> None:
    """ConfigError if a model or SAE is not the one that the run read."""
    recorded, current = manifest.get("arms", {}).get(arm, {}), study.identities[arm]
    for part in ("model", "sae"):
        if recorded.get(part) != current[part]:
            raise ConfigError(
                f"the {part} of {arm} is not the one that the run read.",
                at=study.at("arms", arm, part),
                fix="put it back, or run the study again.",
            )


def refuse_remote_code(study: Study, *arms: str) -> None:
    """ConfigError if a model of these arms would run its repository's Python code, since a finished run may come from
    somebody else. SAEFFECT_TRUST_REMOTE_CODE=1 allows it.
    """
    for name in arms:
        if study.arm(name).model.trust_remote_code and os.environ.get("SAEFFECT_TRUST_REMOTE_CODE") != "1":
            raise ConfigError(
                "this run's study lets its model run code of its own, and a run may come from somebody else.",
                at=study.at("arms", name, "model", "trust_remote_code"),
                fix="look at that code; if you trust it, set SAEFFECT_TRUST_REMOTE_CODE=1 and start again.",
            )


def _read_arm(study: Study, name: str, other: str, log: Log) -> tuple[pd.DataFrame, pd.DataFrame]:
    arm = study.open_arm(name, log)
    bottom = _bottom_tokens(study, arm)
    reason = _obstacle(study, arm, other)
    config, rows = study.config.features, study.rows()
    collectors = {
        read_by: ExampleCollector(len(arm.W_dec), config.examples, config.window, beside=not reason)
        for read_by in ((name,) if reason else (name, other))
    }
    histograms = ActivationHistograms(len(arm.W_dec), 1 if reason else 2)
    special = special_mask(arm.lm)
    for batch in _batches(study, arm, None if reason else other, log):
        sources = [rows.names[i] for i in rows.sources[batch.start : batch.start + len(batch.ids)]]
        for (read_by, collector), acts, kept in zip(collectors.items(), batch.acts, batch.kept, strict=True):
            beside = None if reason else batch.acts[read_by == name]  # of the other model
            # Contexts that peak at a special token, such as the end of a text, say nothing.
            collector.update(acts, batch.ids, kept & ~special[batch.ids], sources=sources, beside=beside)
        histograms.update([acts[kept] for acts, kept in zip(batch.acts, batch.kept, strict=True)])
    contexts = []
    for read_by, collector in collectors.items():
        table = collector.result(arm.lm.token_strings()).assign(chosen_in=read_by)
        if read_by != name:
            table = table.rename(columns={"activations": "activations_beside", "activations_beside": "activations"})
        contexts.append(table)
    features = pd.concat([bottom, histograms.result()], axis=1).assign(reason=reason)
    return features, pd.concat(contexts, ignore_index=True)


def special_mask(lm: LanguageModel) -> Tensor:
    """Bool [d_vocab]: the special tokens of a model's tokenizer."""
    special = torch.zeros(lm.d_vocab, dtype=torch.bool)
    special[[token for token in special_tokens(lm.tokenizer) if token < lm.d_vocab]] = True
    return special


def _bottom_tokens(study: Study, arm: Arm) -> pd.DataFrame:
    """The tokens that each decoder row suppresses most, on the scale of the top tokens."""
    config = study.config.features
    valid = ranked_tokens(study, arm.lm)
    lowest = project(-arm.W_dec, shared_unembedding(arm.lm), config.top_k, config.projection, valid=valid)
    strings = arm.lm.token_strings()
    return pd.DataFrame(
        {
            "feature": np.arange(len(arm.W_dec), dtype=np.int64),
            "bottom_tokens": [[strings[token] for token in row] for row in lowest.indices.tolist()],
            "bottom_weights": (-lowest.weights).tolist(),
        }
    )


def _obstacle(study: Study, arm: Arm, other: str) -> str:
    """Why an arm's SAE cannot read the other's model; "" if it can."""
    if other in study.differences or arm.name in study.differences:
        return "the models' tokenizers differ"
    return size_obstacle(study, arm.name, other)


def size_obstacle(study: Study, arm: str, other: str) -> str:
    """Why an arm's SAE does not fit into another arm's model, which lacks its width or its block; "" if it fits."""
    widths = [study.sae_config(name).d_in for name in (arm, other)]
    if widths[0] != widths[1]:
        return f"the models differ in width ({widths[0]} and {widths[1]})"
    hook, config = study.hook(arm), study.arm(other).model
    shape = model_shape(locate_model(config, at=study.at("arms", other, "model")))  # most models need not be loaded
    n_layers = study.open_model(other).n_layers if shape is None else shape.n_layers
    if parse_hook(hook).layer < n_layers:
        return ""
    return f"the models differ in depth ({arm}'s SAE reads {hook}, and the model of {other} has {n_layers} blocks)"


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows from `start`, without BOS: ids [B, S], and by model acts [B, S, d_sae] and kept [B, S]."""

    start: int
    ids: Tensor
    acts: list[Tensor]
    kept: list[Tensor]


def _batches(study: Study, arm: Arm, other: str | None, log: Log) -> Iterator[_Batch]:
    rows = study.rows()
    limit = arm.norm_limit(rows)
    models = [arm.lm, *([study.open_model(other, log)] if other else ())]
    streams = [study.residuals.batches(lm, arm.hook, rows) for lm in models]
    for parts in zip(*streams, strict=True):
        start, ids, _ = parts[0]
        n_bos = arm.lm.n_bos(rows.ids[start])
        counts = rows.counts_of(start, len(ids))
        kept = [kept_positions(x, limit, counts)[:, n_bos:] for _, _, x in parts]
        yield _Batch(start, ids[:, n_bos:], [arm.sae.encode(x[:, n_bos:]) for _, _, x in parts], kept)
        log.progress(f"both models, {arm.name}", start + len(ids), len(rows), "rows")


class ActivationHistograms:
    """Streaming histograms of activations above 0 by feature and model; both models share a feature's scale.

    A feature's scale doubles when an activation exceeds it; bars are then merged in pairs, so counts stay exact.

    Example:
        >>> bars = ActivationHistograms(d_sae=1, n_models=2)
        >>> bars.update([torch.tensor([[0.0], [2.0], [8.0]]), torch.tensor([[1.0], [0.0], [0.0]])])
        >>> table = bars.result()
        >>> float(table["top"][0]), int(sum(table["counts"][0])), float(table["mean_activation_beside"][0])
        (8.0, 2, 1.0)
    """

    def __init__(self, d_sae: int, n_models: int) -> None:
        self._top = np.zeros(d_sae)
        self._counts = np.zeros((n_models, d_sae, N_BINS), dtype=np.int64)
        self._sum, self._max = np.zeros((2, n_models, d_sae))
        self._tokens = np.zeros(n_models, dtype=np.int64)

    def update(self, acts: list[Tensor]) -> None:
        """Add each model's activations, [n, d_sae], of the n tokens that count in it."""
        peaks = [model_acts.amax(dim=0).double().cpu().numpy() for model_acts in acts if len(model_acts)]
        self._widen(np.max(peaks or [self._top], axis=0))
        for model, model_acts in enumerate(acts):
            active = (model_acts > 0).nonzero(as_tuple=True)
            value, feature = model_acts[active].double().cpu().numpy(), active[1].cpu().numpy()
            # A bar includes its upper end: (low, high].
            bar = np.clip(np.ceil(value / self._top[feature] * N_BINS).astype(np.int64) - 1, 0, N_BINS - 1)
            np.add.at(self._counts[model], (feature, bar), 1)
            np.add.at(self._sum[model], feature, value)
            np.maximum.at(self._max[model], feature, value)
            self._tokens[model] += len(model_acts)

    def _widen(self, highest: np.ndarray) -> None:
        unset = (self._top == 0) & (highest > 0)
        self._top[unset] = highest[unset]
        while len(too_high := np.flatnonzero(highest > self._top)):
            pairs = self._counts[:, too_high].reshape(len(self._counts), len(too_high), N_BINS // 2, 2).sum(axis=3)
            self._counts[:, too_high, : N_BINS // 2], self._counts[:, too_high, N_BINS // 2 :] = pairs, 0
            self._top[too_high] *= 2

    def result(self) -> pd.DataFrame:
        """One row a feature: top, and for each model (the second `_beside`) density, mean, maximum, counts."""
        columns: dict[str, Any] = {"top": self._top}
        active = self._counts.sum(axis=2)
        for model, suffix in enumerate(("", "_beside")[: len(self._counts)]):
            with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that is wanted
                columns[f"density{suffix}"] = active[model] / np.float64(self._tokens[model])
                columns[f"mean_activation{suffix}"] = self._sum[model] / active[model]
            columns[f"max_activation{suffix}"] = self._max[model]
            columns[f"counts{suffix}"] = list(self._counts[model])
            columns[f"n_tokens{suffix}"] = np.full(len(self._top), self._tokens[model])
        return pd.DataFrame(columns)
