"""The study that `saeffect diff` runs: the arguments become a study file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saeffect.checksums import has_own_hash, with_hash
from saeffect.config import ModelConfig, StudyConfig
from saeffect.errors import BadFile, ConfigError, NotFound, Unreachable, placed
from saeffect.io import atomic_path, read_json
from saeffect.lm.adapters import ADAPTER_CONFIG
from saeffect.lm.corpora import read_corpus
from saeffect.lm.loading import (
    BUNDLED,
    bundled_path,
    locate_model,
    model_identity,
    model_shape,
    resolve_device,
    resolve_dtype,
)
from saeffect.paths import user_path
from saeffect.progress import SILENT, Log
from saeffect.sae.hub import HF, is_sae_name, locate_sae
from saeffect.study.study import Study

__all__ = ["DiffRequest", "diff_study", "same_model", "write_study"]

_BUNDLED_TEXT = "smollm2-sampled"
_ROWS, _CONTEXT = 240, 64  # of text: those of the trace, and further rows to put features back on
_CHAT_CONTEXT = 256  # conversations begin with system messages and questions, and rows are read whole
_BUNDLED_PAIR = ("bundled:smollm2-135m-instruct", "bundled:medical-lora", "bundled:smollm2-control")
_BUNDLED_NULLS = "bundled:smollm2-medical"
_HEAD = "# Written by `saeffect diff`; it goes on from here as yours. SHA-256 of the lines below: "


@dataclass(frozen=True)
class DiffRequest:
    """Arguments of `saeffect diff`.

    Attributes:
        base: The base model: hub id, folder, GGUF file, bundled:<name>, or an adapter (applied to the base it names).
        tuned: The fine-tuned model, of the same kinds; an adapter is applied to `base`.
        sae: An SAE of the base model: folder, bundled:<name>, or on the hub (`saeffect.sae.hub`; org/name/folder too).
        texts: Files, folders or dataset ids, each plain or as name=path; none: the bundled text, for the bundled model.
        nulls: Folder of null fine-tunes' traces, or bundled:<name>; None: the bundled nulls, for the bundled pair.
        field: Field or template of the texts; None: the default one.
        chat: Whether the texts are conversations, which the chat template writes.
        positions: Which tokens of chats count, see docs/chat.md.
        push: Whether the base model also writes while pushed along the mean activation difference.
    """

    base: str
    tuned: str
    sae: str | None = None
    texts: tuple[str, ...] = ()
    vocabulary: str | None = None
    nulls: str | None = None
    name: str = "diff"
    field: str | None = None
    chat: bool = False
    positions: tuple[str, ...] = ("all",)
    push: bool = False


def diff_study(request: DiffRequest, source: Path, log: Log = SILENT) -> Study:
    """A study of two arms with the same SAE, or none, and no steering. `source` is the path of its future file.

    Raises `SaeffectError` for a missing model, SAE or text, or if no text is given for a model that is not bundled.
    """
    base = _model_keys(request.base, None, "BASE")
    tuned = _model_keys(request.tuned, base, "TUNED")
    sae = None if request.sae is None else _sae(request.sae)
    shape = model_shape(locate_model(ModelConfig(**base), log=log, at="BASE"))
    # Without an SAE, the residual stream halfway through the model.
    hook = f"blocks.{(shape.n_layers if shape else 2) // 2}.hook_resid_pre" if sae is None else None
    context = _CONTEXT if not request.chat else min(_CHAT_CONTEXT, (shape and shape.n_positions) or _CHAT_CONTEXT)
    arms = {
        role: {"role": role, "model": model, "sae": sae, "hook": hook}
        for role, model in (("control", base), ("treatment", tuned))
    }
    values: dict[str, Any] = {
        "name": request.name,
        "title": f"What fine-tuning changed: {request.name}",
        "arms": {role: {key: value for key, value in arm.items() if value is not None} for role, arm in arms.items()},
        "text": _text_keys(request, base, context),
        "gate": {"tokens": 1_024},
        "selection": {"vocabulary": _path(request.vocabulary)},
        "steering": None,
    }
    # Those of the bundled pair were measured on the bundled text.
    is_bundled = not request.texts and (request.base, request.tuned, request.sae) == _BUNDLED_PAIR
    nulls = request.nulls or (_BUNDLED_NULLS if is_bundled else None)
    if nulls is not None:
        values["nulls"] = _path(nulls)
    if request.push:
        values["push"] = {}
    if request.chat:
        values |= {"changes": {"tokens_per_row": context}, "put_back": {"tokens_per_row": context}}
    config = StudyConfig.read(values, at="the command")
    for text in config.text.sources:  # before models are loaded, which may take minutes
        with placed("--text"):
            next(read_corpus(text, chat=request.chat))
    return Study(config, source)


def same_model(study: Study) -> bool:
    """Whether both models are the same files in the same number format."""
    arms = [study.config.arms[name].model for name in study.pair]
    dtypes = {resolve_dtype(model.dtype, resolve_device(model.device)) for model in arms}
    return len(dtypes) == 1 and len({model_identity(model) for model in arms}) == 1


def write_study(study: Study) -> None:
    """Write the study's file; ConfigError, and nothing written, if an edited file of this name exists."""
    path = study.source
    values = study.config.model_dump(mode="json", exclude_unset=True)
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    content = with_hash(_HEAD, body)
    if path.exists() and path.read_bytes() != content.encode() and not has_own_hash(path, _HEAD):
        raise ConfigError(
            "there is a study file of this name, which is not as `saeffect diff` wrote it.",
            at=str(path),
            fix=f"run it: saeffect run {path}; or choose another --out.",
        )
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _model_keys(text: str, base: Mapping[str, Any] | None, at: str) -> dict[str, Any]:
    """Keys of a `ModelConfig`: a whole model, or an adapter on `base` (None: on the base model that it names).
    BadFile for an adapter that names none.
    """
    if not _is_adapter(text):
        locate_model(ModelConfig(path=text), at=at)
        return {"path": _path(text)}
    if base is not None:
        return {"path": base["path"], "adapter": _path(text)}
    folder = (
        bundled_path("adapters", text.removeprefix(BUNDLED), at=at) if text.startswith(BUNDLED) else user_path(text)
    )
    adapter_config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    base_name = adapter_config.get("base_model_name_or_path") if isinstance(adapter_config, dict) else None
    if not base_name:
        raise BadFile("this adapter names no base model.", at=at, fix="give the base model first, then the adapter.")
    return {"path": _path(str(base_name)), "adapter": _path(text)}


def _is_adapter(text: str) -> bool:
    """Whether this is an adapter without a model; a hub id is looked up if there is a connection."""
    if text.startswith(BUNDLED):
        with contextlib.suppress(ConfigError):
            bundled_path("adapters", text.removeprefix(BUNDLED))
            return True
        return False
    path = user_path(text)
    if path.exists() or text.count("/") != 1:
        return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
    from huggingface_hub import file_exists

    try:
        return file_exists(text, ADAPTER_CONFIG) and not file_exists(text, "config.json")
    except Exception:  # no connection or no such repository: loading reports it
        return False


def _sae(text: str) -> str:
    """The SAE as a bundled name, an absolute path, or a name on the hub; fetches the latter."""
    if text.startswith(BUNDLED):
        bundled_path("saes", text.removeprefix(BUNDLED), at="--sae")
        return text
    if is_sae_name(text):
        locate_sae(text, at="--sae")
        return text
    folder = user_path(text, at="--sae")
    if folder.exists():
        return str(folder.resolve())
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w./-]*", text):
        raise NotFound(f"there is no SAE folder {text!r}.", at="--sae", fix="check the path, or write org/name/folder.")
    try:
        locate_sae(HF + text, at="--sae")
    except (NotFound, Unreachable) as error:
        raise NotFound(
            f"there is no folder {text!r}, and no such SAE can be fetched from the hub: {error.message}",
            at="--sae",
            fix="check the path, or the name and your connection.",
        ) from error
    return HF + text


def _text_keys(request: DiffRequest, base: Mapping[str, Any], context: int) -> dict[str, Any]:
    size = {"tokens": _ROWS * _CONTEXT, "context_size": context}
    if request.texts:
        field = {} if request.field is None else {"field": request.field}
        sources = [source | field for source in _sources(request.texts)]
        chat = {"format": "chat", "positions": request.positions} if request.chat else {}
        return {"sources": sources, **size, **chat}
    if request.chat:
        raise ConfigError("there are no conversations.", at="--chat", fix="give them: --text chats.jsonl.")
    if base["path"].startswith(BUNDLED):
        return {"bundled": _BUNDLED_TEXT, **size}
    raise ConfigError(
        "there is no text for the models to read.",
        at="--text",
        fix="give one or more: --text general=web.jsonl --text domain=notes.txt (or a dataset id on the hub).",
    )


def _sources(texts: Sequence[str]) -> list[dict[str, str]]:
    sources = []
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator:
            name, path = Path(text).name.partition(".")[0] or "text", text
        sources.append({"name": name, "path": str(_path(path))})
    return sources


def _path(text: str | None) -> str | None:
    """An existing path made absolute, as the study file needs it; names stay names."""
    if text is None or text.startswith(BUNDLED):
        return text
    path = user_path(text)
    return str(path.resolve()) if path.exists() else text
