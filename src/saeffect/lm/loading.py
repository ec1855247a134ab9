"""Loading a language model from a hub id, folder, GGUF file, adapter, or bundled name."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError, unknown_name
from saeffect.io import fingerprint, hash_file, read_json
from saeffect.lm.accounting import (
    MODEL_AND_ADAPTER,
    account_for,
    check_folder_sizes,
    loading_errors,
    quiet_transformers,
    refuse_nan,
)
from saeffect.lm.adapters import ADAPTER_CONFIG, keep_adapter, merge_adapter, read_adapter, require_fit
from saeffect.lm.gguf import EMBEDDED_NAME, choose_gguf, converted_folder, described_folder, embedded_model, gguf_header
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.placement import Placement, refuse_unreadable_disk
from saeffect.lm.tokens import tokenizer_trouble
from saeffect.paths import BUNDLED, BUNDLED_FOLDER, user_path
from saeffect.progress import SILENT, Log

__all__ = [
    "BUNDLED",
    "ModelShape",
    "bundled_path",
    "check_weights",
    "load_config",
    "load_language_model",
    "load_tokenizer",
    "locate_adapter",
    "locate_model",
    "model_identity",
    "model_shape",
    "resolve_device",
    "usable_device",
    "resolve_dtype",
]

# transformers changes global state while it loads, so that models loaded in two threads would be corrupted.
_LOADING_LOCK = threading.RLock()
_SINGULAR = {"studies": "study", "vocabularies": "vocabulary"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files that decide a model: weights, configuration, tokenizer, its own code.
_MODEL_SUFFIXES = {".safetensors", ".json", ".gguf", ".txt", ".model", ".py", ".jinja"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_device(name: str, *, at: str | None = None) -> torch.device:
    """The device to run on; `auto` is the first GPU if there is one. ConfigError for an invalid name, or a kind of
    device without float64, in which sums are kept.
    """
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}.", at=at, fix="write auto, cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"models are run on cpu and cuda alone, not on {device.type}.",
            at=at,
            fix="leave device out, or write cpu: sums are kept in float64, which not every device has.",
        )
    return device


def usable_device(config: ModelConfig, *, at: str | None = None) -> torch.device:
    """The device of a model; ConfigError if this machine does not have it."""
    device = resolve_device(config.device, at=at)
    n = torch.cuda.device_count() if device.type == "cuda" else 1 + (device.index or 0)
    if (device.index or 0) < n:
        return device
    built = "" if torch.backends.cuda.is_built() else ", and this torch is built without CUDA"
    raise ConfigError(
        f"there is no device {config.device} here: torch finds {n or 'no'} GPU{'' if n == 1 else 's'}{built}.",
        at=at,
        fix="leave device out: a GPU is taken where there is one.",
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to run in; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if probe is not None and probe() else torch.float32


def bundled_path(kind: str, name: str, *, at: str | None = None) -> Path:
    """Folder or file of a bundled artifact, `bundled/<kind>/<name>`; UnknownName if there is none."""
    root = BUNDLED_FOLDER / kind
    path = root / name
    if name in ("", ".", "..") or "/" in name or not path.exists():
        names = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
        singular = _SINGULAR.get(kind, kind.removesuffix("s"))
        raise unknown_name(f"bundled {singular}", name, [BUNDLED + v for v in names], at=at)
    return path


def locate_model(config: ModelConfig, *, log: Log = SILENT, at: str | None = None) -> Path | str:
    """The base weights' local path, or the hub id for transformers.

    NotFound: no such path, or a folder without config.json. UnknownName: a `bundled:` name other than the embedded
    model's. ConfigError: neither a path nor a hub id; a folder that is an adapter, or both an adapter and a model.
    """
    where = f"{at}.path" if at else None
    if config.path.startswith(BUNDLED):
        if config.path != BUNDLED + EMBEDDED_NAME:
            raise unknown_name("bundled model", config.path, [BUNDLED + EMBEDDED_NAME], at=where)
        return embedded_model(log)
    path = user_path(config.path, at=where)
    if path.is_dir():
        _require_model(path, config.path, where)
        return path
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1 or path.suffix == ".gguf":
        raise NotFound(f"there is no model at {config.path!r}.", at=where, fix="check the path, or give a hub id.")
    if not _HUB_ID.fullmatch(config.path):
        raise ConfigError(f"{config.path!r} is neither a path nor a hub id.", at=where, fix="for example org/name.")
    return config.path


def _require_model(folder: Path, name: str, where: str | None) -> None:
    model, adapter = (folder / "config.json").is_file(), (folder / ADAPTER_CONFIG).is_file()
    if model and adapter:
        raise ConfigError(MODEL_AND_ADAPTER[0], at=where, fix=MODEL_AND_ADAPTER[1])
    if model or list(folder.glob("*.gguf")):
        return
    if adapter:
        config = read_json(folder / ADAPTER_CONFIG)
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        raise ConfigError(
            f"the folder {name!r} is an adapter, which needs its base model.",
            at=where,
            fix=f"write model: {{path: {base or '<base model>'}, adapter: {name}}}.",
        )
    raise NotFound(
        f"the folder {name!r} holds no config.json, so it is no transformers model.",
        at=where,
        fix="point to the folder that save_pretrained wrote.",
    )


def locate_adapter(config: ModelConfig, *, at: str | None = None) -> Path | str | None:
    """The PEFT adapter's folder or hub id, None without one. NotFound if a folder is missing or has no
    adapter_config.json; UnknownName for a `bundled:` name that does not exist.
    """
    where = f"{at}.adapter" if at else None
    if config.adapter is None:
        return None
    if config.adapter.startswith(BUNDLED):
        return bundled_path("adapters", config.adapter.removeprefix(BUNDLED), at=where)
    path = user_path(config.adapter, at=where)
    if path.is_dir():
        if not (path / ADAPTER_CONFIG).is_file():
            whole = (path / "config.json").is_file()
            raise NotFound(
                f"the folder {config.adapter!r} holds no {ADAPTER_CONFIG}.",
                at=where,
                fix="this is a whole model: give it as path." if whole else "point to what save_pretrained wrote.",
            )
        return path
    if path.is_absolute() or config.adapter.startswith((".", "~")) or config.adapter.count("/") != 1:
        raise NotFound(f"there is no adapter at {config.adapter!r}.", at=where, fix="check the path, or give a hub id.")
    return config.adapter


def load_language_model(config: ModelConfig | str, *, at: str | None = None, log: Log = SILENT) -> LanguageModel:
    """Load weights, tokenizer and adapter; the adapter is merged, unless the weights are quantised or spread.

    `config` may be just a path or id; `at` is its key in the study file, for errors. NotFound: no such path or hub id,
    or no safetensors there. BadFile: weights that are truncated, hold NaN or are not the model's; sizes in config.json
    that the weights do not have; a pickled adapter. IncompatibleModels: the adapter does not fit. ConfigError: the
    adapter cannot be merged, or a folder has both a model and an adapter.
    """
    config = ModelConfig(path=config) if isinstance(config, str) else config
    base = locate_model(config, log=log, at=at)
    adapter_source = locate_adapter(config, at=at)
    adapter_at = f"{at}.adapter" if at else str(adapter_source)
    adapter = None if adapter_source is None else read_adapter(adapter_source, adapter_at)
    device = usable_device(config, at=at)
    dtype = resolve_dtype(config.dtype, device)
    merged_adapter = None
    with _LOADING_LOCK, quiet_transformers(), loading_errors(config, at, base):
        gguf = _find_gguf(base, at)
        folder = base if gguf is None else converted_folder(gguf, dtype, at=at, log=log)
        saved = load_config(folder, config, at)
        placement = Placement.from_config(config, saved, device, dtype, at=at)
        if adapter is not None and not config.trust_remote_code:
            require_fit(adapter, saved, adapter_at)
        model, info = _read_base(folder, config, {"dtype": dtype, **placement.options})
        refuse_unreadable_disk(model, at)
        account_for(model, info, at or config.path, log)
        tokenizer = load_tokenizer(folder, config, at=at)
        refuse_nan(model, at or config.path)
        if adapter is not None:
            saved_name = getattr(model.config, "_name_or_path", None) if isinstance(base, str) else None
            attach = merge_adapter if placement.merge else keep_adapter
            model, merged_adapter = attach(model, adapter, adapter_at)
            merged_adapter = dataclasses.replace(merged_adapter, other_base=adapter.other_base(config.path, saved_name))
    if not placement.fixed:
        # Parameters only: rotary frequencies are buffers, and bfloat16 ones would rotate far positions wrongly.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    refuse_nan(model, at or config.path)
    name = config.path if config.adapter is None else f"{config.path} + {config.adapter}"
    return LanguageModel(model, tokenizer, name, model_identity(config, at=at), merged_adapter)


def _read_base(folder: Path | str, config: ModelConfig, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, **options}
    # Safetensors only, since loading a pickle could run code.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **options
    )
    return loaded  # type: ignore[no-any-return]


def check_weights(base: Path | str, config: ModelConfig, at: str | None = None) -> None:
    """Check a located folder's tensors by their headers, without reading weights. Errors as `load_language_model`.

    Hub ids, GGUF files and quantised weights are not checked: only loading can tell.
    """
    if not isinstance(base, Path) or not (base / "config.json").is_file() or config.quantize is not None:
        return
    with _LOADING_LOCK, quiet_transformers(), loading_errors(config, at, base):
        saved = load_config(base, config, at)
        if getattr(saved, "quantization_config", None) is None:
            options = {"dtype": "auto", "device_map": "meta"}
            account_for(*_read_base(base, config, options), at or config.path, SILENT)


def load_config(base: Path | str, config: ModelConfig, at: str | None = None) -> Any:
    """A located model's transformers configuration; BadFile if it names sizes that the weights do not have."""
    from transformers import AutoConfig

    source, options = _source(base, config, at)
    return AutoConfig.from_pretrained(source, **options)


def load_tokenizer(base: Path | str, config: ModelConfig, *, at: str | None = None) -> Any:
    """A located model's tokenizer, loaded with the model's options; NotFound if it cannot be loaded. Errors of
    `load_config`, since transformers reads the configuration first.
    """
    from transformers import AutoTokenizer

    source: Path | str = base
    try:
        with quiet_transformers():
            source, options = _source(base, config, at)
            return AutoTokenizer.from_pretrained(source, **options)
    except SaeffectError:
        raise
    except Exception as error:  # of many kinds
        if isinstance(source, Path) and (source / "config.json").is_file():
            with quiet_transformers(), loading_errors(config, at, base):
                load_config(base, config, at)
        why, fix = tokenizer_trouble(source, str(error))
        raise NotFound(
            f"the tokenizer of {config.path!r} cannot be loaded: {why}", at=at or config.path, fix=fix
        ) from error


def _source(base: Path | str, config: ModelConfig, at: str | None) -> tuple[Path | str, dict[str, Any]]:
    """Folder or hub id of configuration and tokenizer, and the options to load them; errors of check_folder_sizes."""
    gguf = _find_gguf(base, None)
    source = base if gguf is None else described_folder(gguf)
    if isinstance(source, Path):
        check_folder_sizes(source, at)
    return source, {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _find_gguf(base: Path | str, at: str | None) -> Path | None:
    if not isinstance(base, Path) or (base / "config.json").is_file():
        return None
    return choose_gguf(base, at=at)


@dataclass(frozen=True)
class ModelShape:
    """Width of the residual stream, number of blocks, positions and tokens (None if config.json names none)."""

    d_model: int
    n_layers: int
    n_positions: int | None = None
    d_vocab: int | None = None


def model_shape(source: Path | str) -> ModelShape | None:
    """Shape by a located model's config.json or GGUF header; None if only loading can tell; BadFile if damaged."""
    if not isinstance(source, Path):
        return None
    if (gguf := _find_gguf(source, None)) is not None:
        header = gguf_header(gguf)
        keys = ("embedding_length", "block_count", "context_length")
        width, layers, positions = (header.get(f"{header['general.architecture']}.{key}") for key in keys)
        d_vocab = None
    else:
        config = read_json(source / "config.json")
        config = config.get("text_config") or config if isinstance(config, dict) else {}
        width = config.get("hidden_size") or config.get("n_embd")
        layers = config.get("num_hidden_layers") or config.get("n_layer")
        positions = config.get("max_position_embeddings") or config.get("n_positions")
        d_vocab = config.get("vocab_size")
    for size in (width, layers, positions, d_vocab):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise BadFile(
                f"a size of the model is {str(size)[:40]!r}; expected a positive whole number.",
                at=str(source / "config.json"),
                fix="restore the config.json that was saved with the model.",
            )
    return ModelShape(width, layers, positions, d_vocab) if width and layers else None


def model_identity(config: ModelConfig, *, at: str | None = None) -> str:
    """SHA-256 over the model's and adapter's weight files (hub ids: the id and revision)."""
    parts: list[Any] = [config.revision]
    for source in (locate_model(config, at=at), locate_adapter(config, at=at)):
        if isinstance(source, Path):
            files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
            # Contents are hashed, since sizes and names would miss edits.
            parts.append([(p.name, hash_file(p)) for p in files if p.suffix in _MODEL_SUFFIXES])
        else:
            parts.append(source)
    return fingerprint(parts)
