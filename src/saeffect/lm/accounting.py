"""Checks while a model loads: no tensor missing, left over or NaN, plausible sizes; loading errors as SaeffectError."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from saeffect.checksums import open_tensors
from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError, first_line
from saeffect.io import read_json
from saeffect.progress import Log

__all__ = [
    "MODEL_AND_ADAPTER",
    "account_for",
    "check_folder_sizes",
    "check_sizes",
    "loading_errors",
    "quiet_transformers",
    "refuse_nan",
    "tensor_shapes",
]

# Message and fix for a folder that holds a model and an adapter.
MODEL_AND_ADAPTER = (
    "this is both a model and an adapter, and it is unclear which of them is meant.",
    "move the adapter into a folder of its own, and write model: {path: <base model>, adapter: <that folder>}.",
)
_FETCH_AGAIN = "copy or download it again, or convert it to safetensors; pickles are never loaded."
# Buffers that older versions of a model saved; they are recomputed.
_HARMLESS = re.compile(r"rotary_emb\.|inv_freq$|masked_bias$|\.attn\.bias$|\.attention\.bias$|position_ids$")
# Sizes in config.json and in GGUF headers, and by what factor they may exceed the widest tensor. Mixtures of experts
# may give the width of dense layers that they do not have.
_WIDTHS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "n_embd": 1,
    "embedding_length": 1,
    "intermediate_size": 64,
    "n_inner": 64,
    "n_positions": 1,  # of models that learn positions; a mask of this size squared is made
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1),
    "num_labels": 1,  # each gets a name, in a language model too
}
# Numbers of layers: each has at least one tensor.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "block_count")


def tensor_shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an open safetensors file, from its header."""
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping


def check_folder_sizes(folder: Path, at: str | None = None) -> None:
    """BadFile if config.json is no JSON object, or names sizes that no tensor has; transformers would allocate them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with open_tensors(file, str(file), at=at, fix=_FETCH_AGAIN) as tensors:
            shapes |= tensor_shapes(tensors)
    if not (folder / "config.json").is_file():  # a tokenizer's folder
        return
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        fix = "restore the config.json that was saved with the model."
        raise BadFile("this is no model's configuration: it holds no keys.", at=str(folder / "config.json"), fix=fix)
    if shapes:
        inner = config.get("text_config")
        check_sizes(config | (inner if isinstance(inner, dict) else {}), shapes, folder / "config.json")


def check_sizes(sizes: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], at: Path) -> None:
    """BadFile for a width larger than the widest tensor, or more layers than tensors."""
    widest = max((int(size) for shape in shapes.values() for size in shape), default=0)
    for name, size in sizes.items():
        key = name.rpartition(".")[2]
        most = len(shapes) if key in _COUNTS else widest * _WIDTHS.get(key, 0)
        if most and isinstance(size, int) and size > most:
            raise BadFile(
                f"{at.name} says {name}: {size:,}, but the weights are {len(shapes):,} tensors of at most {widest:,}"
                " rows or columns.",
                at=str(at),
                fix="restore the file that was saved with these weights.",
            )


def account_for(model: Any, info: Mapping[str, Any], at: str, log: Log) -> None:
    """Check that the file has every tensor of the model, and the model a place for every tensor of the file.

    transformers draws missing tensors at random and ignores unknown ones. `info` is `from_pretrained`'s loading info;
    parts left out, such as an image encoder, are logged. BadFile for a tensor that is missing or has no place in the
    language model; ConfigError if transformers loaded an adapter beside the model, unmerged.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(MODEL_AND_ADAPTER[0], at=at, fix=MODEL_AND_ADAPTER[1])
    missing = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    unexpected = sorted(name for name in info["unexpected_keys"] if not _HARMLESS.search(name))
    if missing:
        example = (
            f"; it has {len(unexpected)} that the model does not know, such as {unexpected[0]}" if unexpected else ""
        )
        raise BadFile(
            f"the file lacks {len(missing)} of the {len(model.state_dict())} tensors that the model needs, such as"
            f" {missing[0]}{example}.",
            at=at,
            fix="save the model itself with save_pretrained, unwrapped and any adapter merged, or download it again.",
        )
    modules = {name for name, _ in model.named_modules()}
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    unplaced = [name for name in unexpected if name.rpartition(".")[0] in modules or name.startswith(lists)]
    if unplaced:
        raise BadFile(
            f"the file holds {len(unplaced)} tensors that the model has no place for, such as {unplaced[0]}:"
            " config.json describes another model.",
            at=at,
            fix="restore the config.json that was saved with these weights, or merge an adapter before saving.",
        )
    if unexpected:
        log(f"not part of the language model, left out: {len(unexpected)} tensors, such as {unexpected[0]}")


def refuse_nan(model: Any, at: str) -> None:
    """Raise BadFile for weights that are not numbers, or too large for their format."""
    for name, parameter in model.named_parameters():
        # Weights that accelerate left on disk are read when they are used; torch cannot check 8-bit ones.
        if parameter.is_meta or parameter.dtype.itemsize == 1:
            continue
        # A finite sum says that all are finite, in a fraction of the time; that of finite weights may overflow.
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            raise BadFile(
                f"the weights hold NaN or infinite values (first in {name}).",
                at=at,
                fix="load in float32 or bfloat16 if they were saved so; otherwise the checkpoint is broken.",
            )


@contextlib.contextmanager
def loading_errors(config: ModelConfig, at: str | None, base: Path | str) -> Iterator[None]:
    """Turn errors of transformers, safetensors and the hub into SaeffectErrors."""
    try:
        yield
    except SaeffectError:
        raise
    except Exception as error:
        text, name = first_line(error), type(error).__name__
        error_type: type[SaeffectError] = BadFile
        if name == "SafetensorError" or ("safetensors" in text.lower() and "no file named" not in text.lower()):
            message = f"the weights of {config.path!r} cannot be read: {text}"
            fix = _FETCH_AGAIN
        elif isinstance(error, OSError) or name in {"RepositoryNotFoundError", "HFValidationError"}:
            error_type, message = NotFound, f"cannot load {config.path!r}: {text}"
            fix = "check the name and your connection, or give a local folder with safetensors weights."
        elif "ignore_mismatched_sizes" in text or "size mismatch" in str(error):  # newer and older transformers
            message = f"the tensors of {config.path!r} have other shapes than its config.json asks for."
            fix = "restore the config.json that was saved with these weights."
        else:
            message = f"transformers cannot load {config.path!r}: {text}"
            fix = "check that the folder is whole, and that your version of transformers knows this kind of model."
            if not config.trust_remote_code and (_asks_for_code(base) or "trust_remote_code" in str(error)):
                fix = "this model brings code of its own; set trust_remote_code if you trust it."
        raise error_type(message, at=at or config.path, fix=fix) from error


def _asks_for_code(base: Path | str) -> bool:
    with contextlib.suppress(SaeffectError):
        return isinstance(base, Path) and base.is_dir() and "auto_map" in read_json(base / "config.json")
    return False


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notices while the block runs."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar = gguf_loader.tqdm  # which does not ask whether bars are wanted
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_loader.tqdm = lambda tensors, **_: tensors
    try:
        with warnings.catch_warnings():
            # Deprecation warnings between transformers and peft.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gguf_loader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
