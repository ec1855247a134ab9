"""Null fine-tunes: a recipe repeated on text that teaches nothing new, and what each changed in the model.

A folder of nulls holds `nulls.json` (what they are), `null-<k>.safetensors` (what each changed), `own.jsonl` (texts
by the base model), and `adapters/null-<k>/lora`, deleted once measured unless kept. Read `make_nulls` first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saeffect.config import ChangesConfig, TextSource
from saeffect.config_chat import ChatKeys, as_chat
from saeffect.diffing.nulls import ADAPTER, CARD, NAME, null_files, read_null, read_nulls, smallest_p
from saeffect.diffing.standardised import FEWEST_NULLS
from saeffect.diffing.trace import Trace, Tracer
from saeffect.errors import BadFile, ConfigError, InUse, SaeffectError, placed
from saeffect.io import atomic_path, read_json, sole_writer, versions, write_json
from saeffect.lm.activations import NormLimit, TokenRows, first_limit
from saeffect.lm.chat_rows import lm_for_chats
from saeffect.lm.corpora import is_local
from saeffect.lm.finetune import FinetuneConfig, FinetuneResult, finetune, remove_adapter
from saeffect.lm.hooks import parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import BUNDLED, bundled_path, load_language_model, model_identity
from saeffect.lm.residuals import Residuals, machine_memory
from saeffect.progress import SILENT, Log
from saeffect.sae.formats import load_sae
from saeffect.steering import NoiseCell, Sampling, generate
from saeffect.study.study import Study
from saeffect.study.texts import require_rows, study_rows

__all__ = [
    "NullsResult",
    "check_nulls",
    "make_nulls",
    "null_recipe",
    "nulls_folder",
    "study_tracer",
    "traced_rows",
    "training_tokens",
]

Kind = Literal["own", "general"]

_TEXT_LABELS = {"own": "the base model's own samples", "general": "held-out general text"}
_STEMS = (
    "Once upon a time",
    "According to the report,",
    "To begin with, we",
    "The purpose of this article is",
    "He looked up and",
    "Many people believe",
)
_TEXT_LENGTH = 96  # tokens of a text, its stem included
_BATCH = 128  # texts of one stem, written at once; one file
_POOL_FACTOR = 5.0  # own texts, in units of what one null reads: two nulls share a fifth
_MEMORY_SHARE = 1 / 8  # of memory, for what the base model computes
_EVALUATION_ROWS = 8  # perplexities are for the card alone
# Keys of the recipe that may differ between nulls of one folder.
_FREE_KEYS = {"text", "control_text", "field", "licence", "checkpoint_every", "evaluation_rows", "seed", "model"}


@dataclass(frozen=True)
class NullsResult:
    """The folder; which nulls are measured, which have only an adapter, and which another process is making."""

    folder: Path
    measured: tuple[int, ...]
    trained: tuple[int, ...]
    elsewhere: tuple[int, ...]


def make_nulls(
    recipe: FinetuneConfig,
    out: Path | str,
    n: int,
    *,
    study: Study | None = None,
    text: Kind = "own",
    keep_adapters: bool = False,
    log: Log = SILENT,
) -> NullsResult:
    """Make nulls 1 to `n` in `out`; existing ones stay as they are. With `keep_adapters`, those without an adapter are
    made again, which ends with the same numbers.

    Each null has its own seed and texts. If stopped at any moment, the same call resumes and ends with the same
    numbers. Several processes may make the same call: they share the nulls between them.

    `text` is "own", what the base model writes, or "general", the recipe's `control_text`. `study` says what the nulls
    are measured on; without one the adapters are kept (tens of MB each), and a later call with a study measures them.

    ConfigError: `n` below 1; no `control_text` for nulls on general text; another recipe, or something else to measure
    on, than the folder's; a recipe of another model than the study's control. Interrupted: Ctrl-C or SIGTERM while
    training. SaeffectError: what `finetune` or opening the study raises.
    """
    if n < 1:
        raise ConfigError(f"at least one null; got {n}.", at="--null", fix="for example --null 20.")
    if text == "general" and recipe.control_text is None:
        fix = "give it one, or leave --null-text out: the base model's own samples."
        raise ConfigError("the recipe has no control_text for nulls to read.", at="control_text", fix=fix)
    folder = _NullFolder(Path(out), recipe, text)
    folder.refuse_other_recipe()
    tracer = None if study is None else _tracer(recipe, study, log)
    folder.refuse_other_measurement(tracer)
    by_status: dict[str, list[int]] = {"measured": [], "trained": [], "elsewhere": []}
    for k in range(1, n + 1):
        by_status[_make_null(folder, k, tracer, keep_adapters, log)].append(k)
    return NullsResult(folder.path, *(tuple(by_status[name]) for name in ("measured", "trained", "elsewhere")))


def null_recipe(recipe: FinetuneConfig, k: int, own: Path | None) -> FinetuneConfig:
    """The recipe of null `k`; `own` is the file with the base model's texts, None for the recipe's `control_text`.

    The recipe's text becomes the control text, on which a null should not change the perplexity.
    """
    return recipe.model_copy(
        update={
            "seed": recipe.seed + k,
            "text": recipe.control_text if own is None else TextSource(path=str(own)),
            "control_text": recipe.text,
            "licence": _TEXT_LABELS["general" if own is None else "own"],
            "evaluation_rows": min(recipe.evaluation_rows, _EVALUATION_ROWS),
        }
    )


def training_tokens(recipe: FinetuneConfig) -> int:
    """Tokens that one fine-tune of the recipe reads."""
    return recipe.steps * recipe.batch_size * recipe.context_size


def study_tracer(study: Study, log: Log = SILENT) -> Tracer:
    """The tracer of fine-tunes of the study's control model, with the control's SAE, if any, on the first rows of text.

    EmptySelection for a text of one row.
    """
    control, rows = study.control, study.rows()
    with placed(study.at("text")):
        require_rows(rows)
    traced = traced_rows(rows, study.config.changes)
    if study.has_saes:
        arm = study.open_arm(control, log)
        return Tracer(arm.lm, arm.sae, arm.hook, traced, arm.norm_limit(rows), log, residuals=study.residuals)
    lm, hook = study.open_model(control, log), study.hook(control)
    parse_hook(hook, lm.n_layers, at=study.at("arms", control, "hook"))
    return Tracer(lm, None, hook, traced, first_limit(lm, hook, rows.ids[:8]), log, residuals=study.residuals)


def traced_rows(rows: TokenRows, changes: ChangesConfig) -> TokenRows:
    """The part of a study's text that traces are measured on."""
    return rows.part(slice(changes.rows), changes.tokens_per_row)


def nulls_folder(study: Study) -> Path | None:
    """The folder of the study's nulls, None if it has none; UnknownName for an unknown bundled one."""
    nulls = study.config.nulls
    if nulls is None:
        return None
    if nulls.startswith(BUNDLED):
        return bundled_path("nulls", nulls.removeprefix(BUNDLED), at=study.at("nulls"))
    return Path(nulls)


def check_nulls(study: Study) -> str:
    """A line about the number of nulls and the smallest p that it allows. Runs no model; errors as `read_nulls`."""
    folder = nulls_folder(study)
    if folder is None:
        return "nulls: none, so nothing says which changes are usual"
    control, text = study.control, study.config.text
    config, changes = study.config.arms[control].model, study.config.changes
    made_by, measured_on = None, None
    not_compared = "; the study's text is on the hub, so they are compared when it runs"
    if all(map(is_local, text.sources)):
        lm = dataclasses.replace(study.reader, identity=model_identity(config))
        n_tokens = min(text.tokens, changes.rows * text.context_size)
        sample = text if text.bundled else text.model_copy(update={"tokens": n_tokens})
        with placed(study.at("text")):
            rows = traced_rows(study_rows(sample, lambda: lm, prepend_bos=study.prepend_bos), changes)
        sae = load_sae(study.sae_folder(control)) if study.has_saes else None
        tracer = Tracer(lm, sae, study.hook(control), rows, NormLimit(1.0, 1.0))
        made_by, measured_on, not_compared = tracer.made_by, tracer.measured_on, ""
    n = len(read_nulls(folder, made_by, measured=measured_on, at=study.at("nulls")))
    few_note = f", and nothing is named by fewer than {FEWEST_NULLS}" if n < FEWEST_NULLS else ""
    return f"nulls: {n}; by counting them alone p is never below {smallest_p(n):.2g}{few_note}{not_compared}"


def _tracer(recipe: FinetuneConfig, study: Study, log: Log) -> Tracer:
    control = study.config.arms[study.control].model
    if recipe.model.adapter or model_identity(recipe.model) != model_identity(control):
        raise ConfigError(
            f"the recipe fine-tunes {recipe.model.path}, and the study's control is {control.path}: another model,"
            " or one with an adapter.",
            at=study.at("arms", study.control, "model"),
            fix="take the recipe of a fine-tune of the control; save a control with an adapter as a whole model first.",
        )
    tracer = dataclasses.replace(study_tracer(study, log), residuals=Residuals(0))  # no stage reads a null again
    # Every null needs the base model's logits and layers; they are kept if memory allows.
    size = tracer.rows.ids.size * (tracer.base.d_vocab + tracer.base.n_layers * tracer.base.d_model)
    return dataclasses.replace(tracer, keep=size * tracer.base.dtype.itemsize <= machine_memory() * _MEMORY_SHARE)


def _make_null(folder: _NullFolder, k: int, tracer: Tracer | None, keep_adapters: bool, log: Log) -> str:
    """Train and measure one null, unless that is done; returns the list of `NullsResult` that it belongs to."""
    status = "trained" if tracer is None else "measured"
    needs_adapter = keep_adapters or tracer is None
    if folder.is_finished(k, tracer, needs_adapter=needs_adapter):
        return status
    adapter_folder = folder.adapter(k).parent
    try:
        with sole_writer(adapter_folder):
            if folder.is_finished(k, tracer, needs_adapter=needs_adapter):  # by another process, meanwhile
                return status
            log(f"null {k}: {_TEXT_LABELS[folder.kind]}")
            started = time.monotonic()
            texts = _own_texts(folder, log) if folder.kind == "own" else None
            result = finetune(null_recipe(folder.recipe, k, texts), folder.adapter(k), log=log.named(f"null {k}"))
            folder.record(k, result, time.monotonic() - started, tracer)
            if tracer is None:
                return status
            _measure(folder, k, tracer).save(folder.trace(k))
            if not keep_adapters:
                remove_adapter(folder.adapter(k))
    except InUse:
        log(f"null {k} is being made by another process")
        return "elsewhere"
    for empty in (adapter_folder, adapter_folder.parent):
        with contextlib.suppress(OSError):  # what others left there stays
            empty.rmdir()
    return "measured"


def _measure(folder: _NullFolder, k: int, tracer: Tracer) -> Trace:
    model = folder.recipe.model.model_copy(update={"adapter": str(folder.adapter(k).resolve())})
    lm, base = load_language_model(model), tracer.base
    tokens = {"tokenizer": base.tokenizer, "shared": base.shared, "prepend_bos": base.prepend_bos}
    return tracer.trace(dataclasses.replace(lm, **tokens), f"null-{k}")


def _own_texts(folder: _NullFolder, log: Log) -> Path:
    """The file of texts that the base model writes after `_STEMS`, made once for all nulls, batch by batch."""
    recipe, path = folder.recipe, folder.path / "own.jsonl"
    if path.is_file():
        return path
    n_batches = max(1, math.ceil(_POOL_FACTOR * training_tokens(recipe) / (_TEXT_LENGTH * _BATCH)))
    with sole_writer(folder.path / "own", wait=lambda: log("waiting for another process to write texts")):
        if path.is_file():
            return path
        parts = [folder.path / "own" / f"{index}.json" for index in range(n_batches)]
        lm: LanguageModel | None = None
        texts: list[Any] = []
        for index, part in enumerate(parts):
            if (batch := _read_batch(part)) is None:
                lm = lm or lm_for_chats(load_language_model(recipe.model, log=log, at="model"), recipe)
                write_json(part, batch := _write_batch(lm, index))
            texts += batch
            log.progress("the base model writes", (index + 1) * _BATCH, n_batches * _BATCH, "texts")
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        for part in parts:
            part.unlink()
    with contextlib.suppress(OSError):
        (folder.path / "own").rmdir()
    return path


def _read_batch(part: Path) -> list[Any] | None:
    """The texts of a finished batch; None if it is missing or damaged."""
    with contextlib.suppress(SaeffectError):
        texts = read_json(part)
        return texts if isinstance(texts, list) else None
    return None


def _write_batch(lm: LanguageModel, index: int) -> list[Any]:
    """Texts that begin with a stem; of a chat model, conversations in which it answers the stem."""
    # Sampled from the full distribution: on average such text teaches the model exactly nothing.
    stem = _STEMS[index % len(_STEMS)]
    chat, conversation = lm.chat is not None, as_chat(stem, None, at="")
    start, prompt = lm.encode(stem), lm.encode_prompt(conversation if chat else stem)
    length = _TEXT_LENGTH if lm.n_positions is None else min(_TEXT_LENGTH, lm.n_positions)
    n = max(1, length - len(prompt))
    sampling = Sampling(max_new_tokens=n, temperature=1.0, top_p=1.0, frequency_penalty=0.0, allow_end=chat)
    cells = [NoiseCell(0, stem, index * _BATCH + i) for i in range(_BATCH)]
    rows = generate(lm, "blocks.0.hook_resid_pre", prompt, cells, sampling, batch_size=_BATCH)
    texts = [lm.decode(row if chat else start + row) for row in rows]
    return [[*map(dict, conversation), {"role": "assistant", "content": text}] for text in texts] if chat else texts


@dataclass(frozen=True, eq=False)
class _NullFolder:
    """The files of a folder of nulls."""

    path: Path
    recipe: FinetuneConfig
    kind: Kind = "own"

    def trace(self, k: int) -> Path:
        return self.path / NAME.format(k)

    def adapter(self, k: int) -> Path:
        return self.path / ADAPTER.format(k)

    def card(self) -> dict[str, Any]:
        path = self.path / CARD
        card = read_json(path) if path.is_file() else {}
        if not isinstance(card, dict) or not isinstance(card.get("nulls", {}), dict):
            raise BadFile("this is no card of nulls.", at=str(path), fix="restore it, or choose another --out.")
        return card

    def refuse_other_recipe(self) -> None:
        """ConfigError if the folder holds nulls of another recipe, or nulls without a card."""
        card, recipe = self.card(), self.shared
        if not card:
            if null_files(self.path):
                raise ConfigError(
                    f"this folder holds nulls, but no {CARD} that says what they are.",
                    at=str(self.path),
                    fix="restore it, or choose another --out.",
                )
            return
        recorded = card.get("recipe")
        if recorded != recipe:
            recorded = recorded if isinstance(recorded, dict) else {}
            different = [key for key in recipe if recorded.get(key) != recipe[key]]
            differs = "; ".join(f"{key}: {recorded.get(key)} there, {recipe[key]} here" for key in different)
            raise ConfigError(
                f"the nulls in this folder are of another recipe ({differs}).",
                at=str(self.path),
                fix="choose another --out.",
            )

    def refuse_other_measurement(self, tracer: Tracer | None) -> None:
        """ConfigError if the folder has nulls measured on something else (without a tracer: any measured nulls)."""
        for path in null_files(self.path).values():
            if tracer is None:
                raise ConfigError(
                    "the nulls in this folder are measured on a study, and no study is given.",
                    at=str(self.path),
                    fix="add --study STUDY, or choose another --out.",
                )
            with contextlib.suppress(BadFile):  # a damaged one is made again
                read_null(path, tracer.made_by, measured=tracer.measured_on, at=str(self.path))

    def is_finished(self, k: int, tracer: Tracer | None, *, needs_adapter: bool) -> bool:
        """Whether the null is on the card, and its trace (with a tracer) and its adapter (if needed) are complete."""
        if str(k) not in self.card().get("nulls", {}):
            return False
        if needs_adapter and not (self.adapter(k) / "README.md").is_file():  # written last
            return False
        try:
            return tracer is None or (self.trace(k).is_file() and Trace.load(self.trace(k)).made_by == tracer.made_by)
        except BadFile:
            return False

    def record(self, k: int, result: FinetuneResult, seconds: float, tracer: Tracer | None) -> None:
        """Add a null to the card; called before its trace is written, so that every trace is on the card."""
        names = {"training": f"the null's own ({self.kind})", "control": "the recipe's"}
        entry = {
            "text": _TEXT_LABELS[self.kind],
            "seed": self.recipe.seed + k,
            "perplexity": {names[name]: list(pair) for name, pair in result.perplexity.items()},
            "minutes": round(seconds / 60, 1),
            "versions": versions(),
        }
        with sole_writer(self.path, wait=lambda: None):
            card = self.card()
            previous = card.setdefault("nulls", {}).get(str(k), {})
            # A finished adapter is not trained again, which takes no time.
            entry["minutes"] = max(entry["minutes"], previous.get("minutes", 0))
            card["nulls"][str(k)] = entry
            card["recipe"] = self.shared
            if tracer is not None:
                card["measured_on"] = tracer.measured_on
            write_json(self.path / CARD, card)

    @functools.cached_property
    def shared(self) -> dict[str, Any]:
        """The settings that all nulls of a folder share, without local paths."""
        excluded = {*ChatKeys.model_fields, "loss"} if self.recipe.format == "text" else {"chat_template"}
        settings = self.recipe.model_dump(mode="json", exclude=_FREE_KEYS | excluded)
        path = Path(self.recipe.model.path)
        name = path.name if path.is_absolute() else self.recipe.model.path
        return settings | {"model": name, "model_sha256": model_identity(self.recipe.model)}
