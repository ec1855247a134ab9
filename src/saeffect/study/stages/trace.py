"""What fine-tuning changed, in raw numbers: both models read the same text, and write. Judged in `changes`."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeffect.diffing.nulls import CARD, null_files, read_nulls
from saeffect.diffing.trace import TokenIds, Trace, Tracer
from saeffect.diffing.written import clearly_more, words_in_texts
from saeffect.errors import NotFound
from saeffect.io import fingerprint, hash_file, read_json
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import BUNDLED, locate_adapter
from saeffect.progress import Log
from saeffect.study.nulls import nulls_folder, study_tracer
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

__all__ = [
    "as_fine_tune",
    "missing_nulls",
    "nulls_identity",
    "read_trace",
    "run_trace",
    "study_nulls",
    "trace_inputs",
    "trace_path",
    "training_note",
]

VERSION = 3
_WANTED = 20  # nulls, in what is said of their cost
_TRAINING = 3.0  # a training step costs so many readings: forwards, and twice that backwards
_FIRST_WORDS = 8  # in the first finding
_FORWARDS = 2  # models that read in a trace


def trace_path(run: RunFolder) -> Path:
    return run.path("comparison", "trace.safetensors")


def trace_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    control, treatment = (study.identities[arm] for arm in study.pair)
    return {
        "version": VERSION,
        "control": control,
        "treatment": {name: treatment[name] for name in ("model", "dtype", "device", "tokens") if name in treatment},
        "text": study.text_identity,
        "changes": study.config.changes.model_dump(),
    }


def run_trace(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `comparison/trace.safetensors`. What both models read stays in `Study.residuals` for the stages after.

    Nothing if the treatment's model is no fine-tune of the control's: another width, depth or number of tokens.
    """
    study, treatment = run.study, run.study.treatment
    tracer = study_tracer(study, log)
    nulls = study_nulls(study, tracer)  # refused before the long work, not after it
    tuned = study.open_model(treatment, log)
    if _size(tuned) != _size(tracer.base):
        log("  the arms' models differ in size, so neither is a fine-tune of the other")
        return []
    tuned = as_fine_tune(tuned, tracer.base)
    started_reading = time.monotonic()

    def on_texts(texts: TokenIds, base_texts: TokenIds) -> None:
        nonlocal started_reading
        started_reading = time.monotonic()
        if not nulls:
            return
        alpha = study.config.comparison.alpha
        words = words_in_texts(texts, base_texts, nulls, tuned.decode, alpha=alpha)
        words = clearly_more(words, alpha)["word"].head(_FIRST_WORDS)
        found = f"{', '.join(words)} (p at most {alpha:g})" if len(words) else "no word"
        log(f"  a first finding: given no subject, {treatment} writes clearly more often than nulls: {found}")

    trace = tracer.beside(nulls).trace(tuned, treatment, on_texts)
    if nulls_folder(study) is None:
        _log_null_cost(study, _FORWARDS * tracer.rows.ids.size / (time.monotonic() - started_reading), log)
    trace.save(trace_path(run))
    return [trace_path(run)]


def read_trace(run: RunFolder) -> Trace:
    """The trace that this stage wrote; NotFound if the models differ in size, or it has not run."""
    path = trace_path(run)
    if not path.is_file():
        fix = "compare a model with its own fine-tune: of equal width, depth and number of tokens."
        raise NotFound("there is no trace of the fine-tune.", at=str(path), fix=fix)
    return Trace.load(path)


def study_nulls(study: Study, tracer: Tracer) -> list[Trace]:
    """Traces of the study's null fine-tunes, none if it has no folder of them; errors as `read_nulls`."""
    folder = nulls_folder(study)
    if folder is None:
        return []
    return read_nulls(folder, tracer.made_by, measured=tracer.measured_on, at=study.at("nulls"))


def nulls_identity(study: Study) -> str | None:
    """Hashes of the study's null fine-tunes; None without any."""
    if (folder := nulls_folder(study)) is None:
        return None
    files = [*null_files(folder).values(), *(path for path in [folder / CARD] if path.is_file())]
    return fingerprint([(path.name, hash_file(path)) for path in files])


def as_fine_tune(tuned: LanguageModel, base: LanguageModel) -> LanguageModel:
    """The fine-tuned model with the base model's tokenizer, so that both read and write the same tokens."""
    return dataclasses.replace(tuned, tokenizer=base.tokenizer, shared=base.shared)


def _size(lm: LanguageModel) -> tuple[int, ...]:
    return lm.d_model, lm.d_vocab, lm.n_layers


def missing_nulls(study: Study) -> str:
    """What a study without nulls lacks, and the command that makes it; nothing that differs from run to run."""
    reference = study.reference if study.reference.startswith(BUNDLED) else study.source.name
    tokens = _recipe_tokens(study)
    cost = "" if tokens is None else f"; each reads {tokens:,} tokens, as the fine-tuning did"
    return (
        "no null fine-tunes, so nothing says what is usual; to make them, in the study's folder: saeffect finetune"
        f" RECIPE --null {_WANTED} --study {shlex.quote(reference)} --out nulls, then nulls: nulls in the study{cost}"
    )


def _log_null_cost(study: Study, rate: float, log: Log) -> None:
    """How long nulls would take on this machine, at `rate` tokens read a second by one model."""
    tokens = _recipe_tokens(study)
    if tokens is not None:
        minutes = math.ceil(_WANTED * tokens * _TRAINING / rate / 60)
        log(f"  no null fine-tunes to compare with; {_WANTED} would take about {minutes:,} minutes here")


def _recipe_tokens(study: Study) -> int | None:
    """Tokens that the treatment's fine-tuning read, where its adapter says so."""
    tokens = training_note(study).get("tokens")
    return tokens if isinstance(tokens, int) else None


def training_note(study: Study) -> dict[str, Any]:
    """What `training.json` beside the treatment's adapter says of its fine-tuning; {} without one."""
    folder = locate_adapter(study.config.arms[study.treatment].model)
    path = folder / "training.json" if isinstance(folder, Path) else None
    note = read_json(path) if path is not None and path.is_file() else {}
    return note if isinstance(note, dict) else {}
