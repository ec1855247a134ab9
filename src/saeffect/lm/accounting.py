"""What loading a model must answer for: nothing missing, nothing left over, nothing undefined, and plain errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError, first_line
from saeffect.io import Log, read_json

__all__ = ["BOTH", "account_for", "loading_errors", "refuse_nan"]

# A folder with a model and an adapter: what is wrong, and what to do.
BOTH = (
    "this is both a model and an adapter, and nothing says which of them is meant.",
    "move the adapter into a folder of its own, and write model: {path: <base model>, adapter: <that folder>}.",
)
# Buffers that older versions of a model saved, which are computed anew.
_HARMLESS = re.compile(r"rotary_emb\.|inv_freq$|masked_bias$|\.attn\.bias$|\.attention\.bias$|position_ids$")


def account_for(model: Any, info: Mapping[str, Any], at: str, log: Log) -> None:
    """Every tensor that the model needs came from the file, and every tensor of the file went into the model.

    transformers draws what is missing at random, and passes over what it has no place for.

    Args:
        model: What `from_pretrained` returned.
        info: What it returned beside, with `output_loading_info=True`.
        at: Place for error messages.
        log: Receives a line about parts that are left out: an image encoder, a value head.

    Raises:
        BadFile: A tensor is missing, or has no place in the language model.
        ConfigError: transformers found an adapter beside the model, and put it in unmerged.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(BOTH[0], at=at, fix=BOTH[1])
    missing = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    spare = sorted(name for name in info["unexpected_keys"] if not _HARMLESS.search(name))
    needed = len(model.state_dict())
    if missing:
        has = f"; it has {len(spare)} that the model does not know, such as {spare[0]}" if spare else ""
        raise BadFile(
            f"the file lacks {len(missing)} of the {needed} tensors that the model needs, such as {missing[0]}{has}.",
            at=at,
            fix="save the model itself with save_pretrained, unwrapped and any adapter merged, or download it again.",
        )
    modules = {name for name, _ in model.named_modules()}
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    own = [name for name in spare if name.rpartition(".")[0] in modules or name.startswith(lists)]
    if own:
        raise BadFile(
            f"the file holds {len(own)} tensors that the model has no place for, such as {own[0]}: config.json"
            " describes another model.",
            at=at,
            fix="restore the config.json that was saved with these weights, or merge an adapter before saving.",
        )
    if spare:
        log(f"not part of the language model, left out: {len(spare)} tensors, such as {spare[0]}")


@contextlib.contextmanager
def loading_errors(config: ModelConfig, at: str | None, base: Path | str) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into our errors."""
    try:
        yield
    except SaeffectError:
        raise
    except Exception as error:
        text = first_line(error)
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
        if "ignore_mismatched_sizes" in text:
            raise BadFile(
                f"the tensors of {config.path!r} have other shapes than its config.json asks for.",
                at=where,
                fix="restore the config.json that was saved with these weights.",
            ) from error
        own_code = not config.trust_remote_code and (_asks_for_code(base) or "trust_remote_code" in str(error))
        raise BadFile(
            f"transformers cannot load {config.path!r}: {text}",
            at=where,
            fix="this model brings code of its own; set trust_remote_code if you trust it."
            if own_code
            else "check that the folder is whole, and that your version of transformers knows this kind of model.",
        ) from error


def _asks_for_code(base: Path | str) -> bool:
    """Whether a local model's config.json names code of its own."""
    with contextlib.suppress(SaeffectError):
        return isinstance(base, Path) and base.is_dir() and "auto_map" in read_json(base / "config.json")
    return False


def refuse_nan(model: Any, at: str) -> None:
    """Refuse weights that are not numbers, or too large for their format.

    Raises:
        BadFile: There are such.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BadFile(
                f"the weights hold NaN or infinite values (first in {name}).",
                at=at,
                fix="load in float32 or bfloat16 if they were saved so; otherwise the checkpoint is broken.",
            )
