"""Measure a fine-tune and judge it by a budget: models, SAE, text and nulls in; verdicts out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeffect.config import ModelConfig, TextConfig
from saeffect.config_file import read_config_file
from saeffect.diffing.budget import Budget, GroupRule
from saeffect.diffing.guard import Group, Rows, Verdict, judge, refuse_other_nulls, refuse_other_texts
from saeffect.diffing.trace import Trace, Tracer
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound, placed
from saeffect.features.projection import project
from saeffect.features.vocabulary import Vocabulary, count_matches, load_vocabulary
from saeffect.lm.activations import TokenRows, first_limit
from saeffect.lm.adapters import ADAPTER_CONFIG
from saeffect.lm.architectures import unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import BUNDLED, bundled_path, load_language_model, model_identity
from saeffect.lm.tokens import resolve_prepend_bos
from saeffect.paths import user_path
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.stats.arguments import IntArray
from saeffect.study.study import Arm, require_width
from saeffect.study.texts import study_rows

__all__ = ["guard", "load_nulls", "read_budget", "resolve_groups", "tuned_config"]

_ROWS, _TOKENS = 192, 64  # of text, as traces have
_CONTEXT = 128  # tokens of the pieces of a file that rows are the beginnings of
_ENOUGH = 65_536  # tokens of a bundled text
_BUNDLED_TEXT = "bundled:smollm2-sampled"
_TOP = 10  # top tokens a feature


def guard(
    base: str,
    tuned: str,
    budget: Budget,
    *,
    nulls: Path | str | None = None,
    sae: str | None = None,
    text: Sequence[str] = (),
    log: Log = SILENT,
) -> list[Verdict]:
    """Judge a fine-tune of a base model by a budget; writes nothing.

    Args:
        base: A model, named as in a study file: folder, hub id, GGUF file or bundled name.
        tuned: A model, or an adapter of the base model.
        nulls: Folder with `null-*.safetensors`, traces of fine-tunes that taught nothing.
        sae: Of the base model: a folder, or bundled:<name>. None: groups are judged by the expected words alone.
        text: A bundled text, or files, each as a path or as <source>=<path>; none for the bundled model: its text.

    Raises:
        ConfigError: Base and fine-tune are the same model or give the same predictions; a text of one row; a group of
            features without an SAE.
        EmptySelection: A group without a feature or a word of the tokenizer.
        SaeffectError: A model, SAE, text or null that cannot be read, or belongs to something else.
    """
    traces = load_nulls(nulls) if nulls is not None else []
    configs = ModelConfig(path=base), tuned_config(base, tuned)
    if model_identity(configs[0], at="BASE") == model_identity(configs[1], at="TUNED"):
        raise ConfigError("base and tuned are the same model.", at="TUNED", fix="give the fine-tune second.")
    opened = _open_sae(sae) if sae is not None else None
    words: Mapping[str, Any] = {} if opened is None else {"base": opened.cfg.metadata.get("prepend_bos")}
    lm = load_language_model(configs[0], at="BASE", log=log)
    lm = dataclasses.replace(lm, prepend_bos=resolve_prepend_bos("auto", words))
    text = text or ((_BUNDLED_TEXT,) if base.startswith(BUNDLED) else ())
    rows = _text_rows(text, lm)
    tracer = _tracer(lm, opened, rows, log)
    refuse_other_texts(budget, rows.names)
    refuse_other_nulls(traces, tracer.made_by)
    groups, top_tokens = resolve_groups(budget, lm, opened)
    other = load_language_model(configs[1], at="TUNED", log=log)
    if other.d_vocab == lm.d_vocab:  # else the tracer says so
        other = dataclasses.replace(other, tokenizer=lm.tokenizer, prepend_bos=lm.prepend_bos)
    trace = tracer.trace(other, other.name)
    if not np.nanmax(np.abs(trace.kl)) > 0:
        raise ConfigError(
            "both models predict the same everywhere, so nothing was fine-tuned.",
            at="TUNED",
            fix="check that this is the trained model, and that its adapter was trained and saved.",
        )
    return judge(budget, groups, trace, traces, Rows(rows.sources, rows.names), top_tokens)


def _tracer(lm: LanguageModel, sae: SparseAutoencoder | None, rows: TokenRows, log: Log) -> Tracer:
    """As a study measures its nulls: on the beginnings of rows, with its limit of the residual's norm."""
    if sae is None:
        hook = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
        limit = first_limit(lm, hook, rows.ids[:8])
    else:
        hook = str(sae.cfg.hook_name)
        require_width(sae.cfg, lm.d_model, hook, lm.name, at="--sae")
        limit = Arm("base", "control", lm, sae, hook).norm_limit(rows)
    return Tracer(lm, sae, hook, TokenRows(rows.ids[:, :_TOKENS], rows.sources, rows.names), limit, log=log)


def read_budget(path: Path | str) -> Budget:
    """Read a budget file; errors name the file and the key."""
    values = read_config_file(path, "budget")
    if not isinstance(values, dict):
        raise BadFile("a budget file is a mapping of keys to values.", at=str(path), fix="see saeffect guard --keys.")
    return Budget.read(values, at=str(path))


def load_nulls(folder: Path | str) -> list[Trace]:
    """The traces `null-*.safetensors` of a folder, in the order of their numbers; NotFound if there is none."""
    place = user_path(folder, at="--nulls")
    files = sorted(place.glob("null-*.safetensors"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)])
    if not files:
        raise NotFound(
            f"the folder {str(folder)!r} holds no null-*.safetensors.",
            at="--nulls",
            fix="make some: saeffect finetune RECIPE --null 20, or leave --nulls out.",
        )
    return [Trace.load(path) for path in files]


def tuned_config(base: str, tuned: str) -> ModelConfig:
    """The model of TUNED: a whole one, or an adapter of the base model."""
    if tuned.startswith(BUNDLED):
        name = tuned.removeprefix(BUNDLED)
        bundled = [path.name for path in bundled_path("adapters", "medical-lora").parent.iterdir()]
        return ModelConfig(path=base, adapter=tuned) if name in bundled else ModelConfig(path=tuned)
    folder = user_path(tuned, at="TUNED")
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return ModelConfig(path=base, adapter=str(folder.absolute()))
    return ModelConfig(path=tuned)


def resolve_groups(
    budget: Budget, lm: LanguageModel, sae: SparseAutoencoder | None
) -> tuple[dict[str, Group], IntArray | None]:
    """The features and tokens behind each group of a budget, and the top tokens of all features, int64 [d_sae, k]."""
    top_tokens = _top_tokens(lm, sae) if sae is not None and budget.groups else None
    strings, plain = lm.token_strings(), lm.plain_tokens().numpy()
    tops = None if top_tokens is None else [[strings[i] for i in row] for row in top_tokens]
    none = np.empty(0, dtype=np.int64)
    found = {}
    for name, rule in budget.groups.items():
        with placed(f"groups.{name}"):
            if rule.vocabulary is None:
                found[name] = Group(_listed(rule, sae), none)
                continue
            words = load_vocabulary(rule.vocabulary)
            tokens = np.array([i for i, token in enumerate(strings) if plain[i] and token in words], dtype=np.int64)
            found[name] = Group(none if tops is None else _matching(rule, words, tops), tokens)
            if not len(tokens):
                raise EmptySelection(f"no word of {words.name!r} is a token of {lm.name}.", fix="add shorter words.")
    return found, top_tokens


def _listed(rule: GroupRule, sae: SparseAutoencoder | None) -> IntArray:
    if sae is None:
        raise ConfigError("features are an SAE's, and none was given.", fix="give --sae, or name a vocabulary.")
    wrong = [feature for feature in rule.features if not 0 <= feature < sae.cfg.d_sae]
    if wrong:
        raise ConfigError(f"the SAE has features 0 to {sae.cfg.d_sae - 1:,}, but {wrong[0]} is asked for.")
    return np.array(rule.features, dtype=np.int64)


def _matching(rule: GroupRule, words: Vocabulary, tops: Sequence[Sequence[str]]) -> IntArray:
    counts = count_matches(tops, words).counts
    chosen = np.flatnonzero(counts >= rule.min_matches)
    if not len(chosen):
        raise EmptySelection(
            f"no feature of the SAE has {rule.min_matches} of its {_TOP} top tokens in {words.name!r}; the most is"
            f" {counts.max()}.",
            fix="lower min_matches, add words, or list the features.",
        )
    return chosen


@torch.inference_mode()
def _top_tokens(lm: LanguageModel, sae: SparseAutoencoder) -> IntArray:
    found: IntArray = project(sae.W_dec.detach(), unembedding(lm), _TOP, valid=lm.plain_tokens()).indices.numpy()
    return found


def _open_sae(sae: str) -> SparseAutoencoder:
    folder = bundled_path("saes", sae.removeprefix(BUNDLED), at="--sae") if sae.startswith(BUNDLED) else user_path(sae)
    opened = load_sae(folder, at="--sae")
    if opened.cfg.hook_name is None:
        raise ConfigError("the SAE's cfg.json names no hook.", at="--sae", fix="add hook_name to it.")
    return opened


def _text_rows(text: Sequence[str], lm: LanguageModel) -> TokenRows:
    rows = study_rows(_text_config(text), lambda: lm, prepend_bos=lm.prepend_bos).head(_ROWS)
    if len(rows) < 2:
        raise EmptySelection(
            f"the text fills one row of {rows.context_size} tokens: what happens in one says nothing about others.",
            at="--text",
            fix=f"give more text; {_ROWS} rows are read of more.",
        )
    lm.refuse_rows(rows.ids)
    return rows


def _text_config(text: Sequence[str]) -> TextConfig:
    if not text:
        fix = "give one or more: --text general=web.jsonl --text domain=notes.txt."
        raise ConfigError("there is no text for the models to read.", at="--text", fix=fix)
    bundled = [name.removeprefix(BUNDLED) for name in text if name.startswith(BUNDLED)]
    if bundled and len(text) > 1:
        raise ConfigError("a bundled text goes with no other.", at="--text", fix="give one of the two.")
    if bundled:
        return TextConfig(bundled=bundled[0], tokens=_ENOUGH)
    sources = []
    for entry in text:
        name, equals, path = entry.partition("=")
        sources.append({"name": name, "path": path} if equals else {"name": Path(entry).stem, "path": entry})
    return TextConfig.read({"sources": sources, "tokens": _ROWS * _CONTEXT, "context_size": _CONTEXT}, at="--text")
