"""Loading a language model from wherever it lives: hub id, folder, GGUF file, adapter, or bundled name."""

from __future__ import annotations

import contextlib
import importlib.resources
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, IncompatibleModels, NotFound, SaeffectError, unknown_name
from saeffect.models.embedded import EMBEDDED_NAME, embedded_model
from saeffect.models.language_model import LanguageModel
from saeffect.models.tokenizers import tokenizer_remedy
from saeffect.provenance import fingerprint, hash_file, read_json

__all__ = [
    "BUNDLED",
    "bundled_path",
    "locate_adapter",
    "locate_model",
    "load_language_model",
    "ModelShape",
    "model_identity",
    "model_shape",
    "quiet_transformers",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
]

BUNDLED = "bundled:"
_ONE_OF = {"studies": "study", "vocabularies": "vocabulary"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What decides a model: weights, configuration, tokenizer files, code of its own.
_COUNTED = {".safetensors", ".json", ".gguf", ".txt", ".model", ".py", ".jinja"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_device(name: str) -> torch.device:
    """The device to run on; `auto` is the first GPU if there is one."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to run in; `auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if probe is not None and probe() else torch.float32


def bundled_path(kind: str, name: str, *, at: str | None = None) -> Path:
    """Folder or file of a bundled artifact, `kind` being its folder under `bundled/`.

    Raises:
        UnknownName: There is none of that name; the message lists those that exist.
    """
    root = Path(str(importlib.resources.files("saeffect"))) / "bundled" / kind
    found = root / name
    if name in ("", ".", "..") or "/" in name or not found.exists():
        valid = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        one = _ONE_OF.get(kind, kind.removesuffix("s"))
        raise unknown_name(f"bundled {one}", name, [BUNDLED + v for v in valid], at=at)
    return found


def locate_model(config: ModelConfig, *, say: Callable[[str], None] | None = None, at: str | None = None) -> Path | str:
    """Where the base weights are: a local path, or the hub id to hand to transformers.

    Raises:
        NotFound: A path that does not exist, or a folder without a config.json.
        UnknownName: A `bundled:` name other than the embedded model.
        ConfigError: Neither a path nor a hub id.
    """
    where = f"{at}.path" if at else None
    if config.path.startswith(BUNDLED):
        name = config.path.removeprefix(BUNDLED)
        if name != EMBEDDED_NAME:
            raise unknown_name("bundled model", config.path, [BUNDLED + EMBEDDED_NAME], at=where)
        return embedded_model(say)
    path = Path(config.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
            raise NotFound(
                f"the folder {config.path!r} holds no config.json, so it is no transformers model.",
                at=where,
                fix="point to the folder that save_pretrained wrote.",
            )
        return path
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1 or path.suffix == ".gguf":
        raise NotFound(f"there is no model at {config.path!r}.", at=where, fix="check the path, or give a hub id.")
    if not _HUB_ID.fullmatch(config.path):
        raise ConfigError(f"{config.path!r} is neither a path nor a hub id.", at=where, fix="for example org/name.")
    return config.path


def locate_adapter(config: ModelConfig, *, at: str | None = None) -> Path | str | None:
    """Where the PEFT adapter is: None, a folder with adapter_config.json, or a hub id.

    Raises:
        NotFound: A folder that is not there or is no adapter.
        UnknownName: A `bundled:` name that does not exist.
    """
    where = f"{at}.adapter" if at else None
    if config.adapter is None:
        return None
    if config.adapter.startswith(BUNDLED):
        return bundled_path("adapters", config.adapter.removeprefix(BUNDLED), at=where)
    path = Path(config.adapter).expanduser()
    if path.is_dir():
        if not (path / _ADAPTER_CONFIG).is_file():
            raise NotFound(f"the folder {config.adapter!r} holds no adapter_config.json.", at=where)
        return path
    if path.is_absolute() or config.adapter.startswith((".", "~")) or config.adapter.count("/") != 1:
        raise NotFound(f"there is no adapter at {config.adapter!r}.", at=where, fix="check the path, or give a hub id.")
    return config.adapter


def load_language_model(
    config: ModelConfig, *, at: str | None = None, say: Callable[[str], None] | None = None
) -> LanguageModel:
    """Load weights, tokenizer and adapter; the adapter is merged into the weights.

    Args:
        config: Where, in which dtype, on which device.
        at: Key of the study file, for error messages.
        say: Receives one line before each slow step.

    Raises:
        NotFound: Unknown path or hub id, or no weights there in safetensors.
        BadFile: Weights that are truncated or hold NaN, or an adapter that is pickled.
        IncompatibleModels: An adapter that does not fit the base model.
    """
    base = locate_model(config, say=say, at=at)
    adapter = locate_adapter(config, at=at)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    with quiet_transformers(), _explained(config, at):
        model, tokenizer = _load_base(base, config, dtype, at)
    if adapter is not None:
        with quiet_transformers(), _explained(config, at):
            model = _merge(model, adapter, at=at)
    # Parameters alone: the rotary frequencies are buffers, and rounded to bfloat16 they turn far positions wrong.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval().requires_grad_(False)
    _refuse_nan(model, at or config.path)
    name = config.path if config.adapter is None else f"{config.path} + {config.adapter}"
    return LanguageModel(model, tokenizer, name, model_identity(config, at=at))


@dataclass(frozen=True)
class ModelShape:
    """Width of the residual stream, number of blocks, positions and tokens (None where config.json names none)."""

    d_model: int
    n_layers: int
    n_positions: int | None = None
    d_vocab: int | None = None


def model_shape(place: Path | str) -> ModelShape | None:
    """The shape that a located model's config.json names; None where only loading would tell.

    Raises:
        BadFile: config.json is not JSON.
    """
    if not isinstance(place, Path) or not (place / "config.json").is_file():
        return None
    raw = read_json(place / "config.json")
    raw = raw.get("text_config") or raw
    width = raw.get("hidden_size") or raw.get("n_embd")
    layers = raw.get("num_hidden_layers") or raw.get("n_layer")
    positions = raw.get("max_position_embeddings") or raw.get("n_positions")
    if not width or not layers:
        return None
    return ModelShape(int(width), int(layers), *(int(n) if n else None for n in (positions, raw.get("vocab_size"))))


def model_identity(config: ModelConfig, *, at: str | None = None) -> str:
    """SHA-256 over the model's and adapter's weight files (hub ids: the id and revision)."""
    parts: list[Any] = [config.revision]
    for place in (locate_model(config, at=at), locate_adapter(config, at=at)):
        if isinstance(place, Path):
            files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
            # Weights by size and name only when they are large would miss edits, so every byte is read.
            parts.append([(p.name, hash_file(p)) for p in files if p.suffix in _COUNTED])
        else:
            parts.append(place)
    return fingerprint(parts)


def _load_base(base: Path | str, config: ModelConfig, dtype: torch.dtype, at: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    folder, options = _source(base, config)
    # A pickle can run code while it is read.
    weights = {} if "gguf_file" in options else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **weights, **options)
    return model, load_tokenizer(base, config, at=at)


def load_tokenizer(base: Path | str, config: ModelConfig, *, at: str | None = None) -> Any:
    """The tokenizer of a located model, loaded with the model's own options.

    Raises:
        NotFound: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder, options = _source(base, config)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # of many kinds
        raise NotFound(
            f"the tokenizer of {config.path!r} cannot be loaded: {_first_line(error)}",
            at=at or config.path,
            fix=tokenizer_remedy(folder, str(error)),
        ) from error


def _source(base: Path | str, config: ModelConfig) -> tuple[Path | str, dict[str, Any]]:
    """What to hand to `from_pretrained`."""
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if isinstance(base, Path):
        ggufs = [base] if base.is_file() else sorted(base.glob("*.gguf"))
        if ggufs and (base.is_file() or not (base / "config.json").is_file()):
            return ggufs[0].parent, options | {"gguf_file": ggufs[0].name}
    return base, options


def _merge(model: Any, adapter: Path | str, *, at: str | None) -> Any:
    from peft import PeftModel

    where = f"{at}.adapter" if at else str(adapter)
    folder = _adapter_folder(adapter, where)
    wanted = _lora_tensors(folder, where)
    try:
        # Merged in float32: in bfloat16 the sum would round away small updates.
        adapted = PeftModel.from_pretrained(model.float(), str(folder))
        found = sum("lora_" in name for name, _ in adapted.named_parameters())
        if wanted != found:  # PEFT would pass over what has no counterpart
            raise ValueError(f"it has {wanted} LoRA tensors, of which the model has room for another number, {found}")
        return adapted.merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise IncompatibleModels(
            f"the adapter does not fit the base model: {str(error).strip().splitlines()[0].rstrip('.')}.",
            at=where,
            fix="use the base model named in its adapter_config.json.",
        ) from error


def _adapter_folder(adapter: Path | str, where: str) -> Path:
    """The adapter on this machine; of one on the hub only configuration and safetensors are fetched."""
    if isinstance(adapter, Path):
        return adapter
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=[_ADAPTER_CONFIG, _ADAPTER_WEIGHTS]))
    except Exception as error:
        raise NotFound(
            f"cannot fetch the adapter {adapter!r}: {_first_line(error)}",
            at=where,
            fix="check the name and your connection, or give the path of a local folder.",
        ) from error


def _lora_tensors(folder: Path, where: str) -> int:
    """How many LoRA tensors an adapter holds, from the header of its weights."""
    from safetensors import SafetensorError, safe_open

    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise BadFile(
            f"the adapter has no {_ADAPTER_WEIGHTS}; pickled adapters (.bin) are never loaded.",
            at=where,
            fix="save it again with safe_serialization=True.",
        )
    read_json(folder / _ADAPTER_CONFIG)
    try:
        with safe_open(folder / _ADAPTER_WEIGHTS, framework="pt") as file:
            return sum("lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise BadFile(
            f"{_ADAPTER_WEIGHTS} cannot be read: {_first_line(error)}.",
            at=where,
            fix="copy or download it again.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _explained(config: ModelConfig, at: str | None) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into our errors."""
    try:
        yield
    except SaeffectError:
        raise
    except Exception as error:
        text = _first_line(error)
        kind = type(error).__name__
        where = at or config.path
        if kind == "SafetensorError" or ("safetensors" in text.lower() and "no file named" not in text.lower()):
            raise BadFile(
                f"the weights of {config.path!r} cannot be read: {text}",
                at=where,
                fix="copy or download it again, or convert it to safetensors; pickles are never loaded.",
            ) from error
        if isinstance(error, OSError) or kind in {"RepositoryNotFoundError", "HFValidationError"}:
            raise NotFound(
                f"cannot load {config.path!r}: {text}",
                at=where,
                fix="check the name and your connection, or give a local folder with safetensors weights.",
            ) from error
        raise BadFile(
            f"transformers cannot load {config.path!r}: {text}",
            at=where,
            fix="check that the folder is whole, or set trust_remote_code if you trust its code.",
        ) from error


def _refuse_nan(model: Any, at: str) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BadFile(
                f"the weights hold NaN or infinite values (first in {name}).",
                at=at,
                fix="load in float32 or bfloat16 if they were saved so; otherwise the checkpoint is broken.",
            )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and notices for a while; ours say what matters."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Deprecations between transformers and peft are theirs to mend.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
