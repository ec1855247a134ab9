"""Where a model's weights are and in how many bits: on one device, spread over several, quantised."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saeffect.config import ModelConfig
from saeffect.errors import ConfigError

__all__ = ["Placement", "refuse_unreadable_disk", "aligned", "plain_copy"]


@dataclass(frozen=True)
class Placement:
    """How to place a model: `options` of `from_pretrained`; whether the weights are quantised or spread and so cannot
    be moved or converted (`fixed`); and whether an adapter is merged into them (`merge`).
    """

    options: dict[str, Any]
    fixed: bool
    merge: bool

    @classmethod
    def from_config(
        cls, config: ModelConfig, saved: Any, device: torch.device, dtype: torch.dtype, *, at: str | None
    ) -> Placement:
        """The placement of a model whose configuration is `saved`; a checkpoint that is quantised stays so.
        ConfigError: quantising it a second time, a missing package for quantising, or an adapter to be merged into
        weights that cannot take it.
        """
        stored = getattr(saved, "quantization_config", None)
        quantised = stored is not None or config.quantize is not None
        fixed = quantised or config.device_map is not None
        if fixed and config.adapter is not None and config.merge_adapter:
            why = "quantised" if quantised else "spread over devices"
            raise ConfigError(
                f"an adapter cannot be merged into weights that are {why}.",
                at=f"{at}.merge_adapter" if at else "merge_adapter",
                fix="leave merge_adapter out: the adapter then stays beside the weights.",
            )
        options: dict[str, Any] = {}
        if config.quantize is not None:
            options["quantization_config"] = _bitsandbytes(config.quantize, stored, dtype, at)
        if fixed:
            options["device_map"] = config.device_map or {"": str(device)}
        if config.max_memory is not None:
            options["max_memory"] = config.max_memory
        merge = not fixed if config.merge_adapter is None else config.merge_adapter
        return cls(options, fixed, merge)


def _bitsandbytes(bits: str, stored: Any, dtype: torch.dtype, at: str | None) -> Any:
    where = f"{at}.quantize" if at else "quantize"
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
        raise ConfigError(f"the checkpoint is quantised already ({method}).", at=where, fix="leave quantize out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantising needs the package bitsandbytes, which is not installed.",
            at=where,
            fix="pip install bitsandbytes, or leave quantize out.",
        )
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def refuse_unreadable_disk(model: nn.Module, at: str | None) -> None:
    """ConfigError if all weights are on disk and nothing reads them from there: transformers before 5.13."""
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ConfigError(
            "none of the model's weights fit into memory, and this release of transformers cannot run a model that"
            " is on disk as a whole.",
            at=f"{at}.max_memory" if at else "max_memory",
            fix="give more memory, or install transformers 5.13 or newer.",
        )


@contextlib.contextmanager
def aligned(module: nn.Module) -> Iterator[None]:
    """While the block runs, the weights of a module that accelerate offloaded to memory or disk are loaded."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def plain_copy(module: nn.Module) -> nn.Module:
    """A float32 copy of a small module on the CPU, with its own weights also if accelerate offloaded the module's."""
    from accelerate.hooks import remove_hook_from_module

    with aligned(module):
        parameters = {name: parameter.detach().float().cpu().clone() for name, parameter in module.named_parameters()}
    copied = remove_hook_from_module(copy.deepcopy(module), recurse=True)
    for name, parameter in parameters.items():
        parent, _, last = name.rpartition(".")
        setattr(copied.get_submodule(parent), last, nn.Parameter(parameter, requires_grad=False))
    return copied.float().cpu()
