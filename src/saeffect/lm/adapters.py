"""PEFT adapters: read, checked against the base model before anything large is loaded, and merged into its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.checksums import open_tensors
from saeffect.errors import BadFile, ConfigError, IncompatibleModels, NotFound, first_line, unknown_name
from saeffect.io import read_json
from saeffect.lm.accounting import tensor_shapes
from saeffect.lm.language_model import MergedAdapter, probe_logits

__all__ = ["ADAPTER_CONFIG", "AdapterFile", "keep_adapter", "merge_adapter", "read_adapter", "require_fit"]

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
# Kinds that act on activations or input while the model runs, so they cannot be merged into weights (nor can prompts).
_NEVER_MERGED = {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}
# Differences of logits after merging, relative to the largest logit: always accepted below the first, never above the
# second. Float32 rounds to some 1e-6.
_ROUNDING, _MAX_ROUNDING = 1e-4, 1e-3
_COPY_AGAIN = "copy or download it again."
_MERGE_IT = "merge it where it was trained, save the whole model, and give that as path."
_FROM_PEFT = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError, re.error)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's folder on this machine, its adapter_config.json, and the shapes of its tensors by name."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    def other_base(self, model: str, own_name: object = None) -> str | None:
        """One line if the adapter names another base model than `model` (or `own_name`, of its config.json), else
        None. Only the last parts of names are compared: folders of a model differ between machines.

        Example:
            >>> AdapterFile(Path(), {"base_model_name_or_path": "org/other"}, {}).other_base("org/mine")
            "the adapter names 'org/other' as its base model, not 'org/mine': on another model it means nothing"
        """
        named = self.config.get("base_model_name_or_path")
        own_names = {_last_part(name) for name in (model, own_name) if isinstance(name, str) and name}
        if not isinstance(named, str) or not named or _last_part(named) in own_names:
            return None
        return f"the adapter names {named!r} as its base model, not {model!r}: on another model it means nothing"


def read_adapter(adapter: Path | str, where: str) -> AdapterFile:
    """The configuration and the weights' header of an adapter, a folder or hub id; nothing large is kept.

    NotFound: it cannot be fetched. BadFile: no safetensors, truncated or infinite weights, an invalid configuration.
    ConfigError: a kind of adapter that cannot be merged, or sizes that its weights do not have.
    """
    folder = _fetch(adapter, where)
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadFile(f"{ADAPTER_CONFIG} names no peft_type, so it is no adapter's.", at=where)
    _refuse_unmergeable(config, where)
    adapter_file = AdapterFile(folder, config, _read_shapes(folder / _WEIGHTS, where))
    _refuse_bad_sizes(adapter_file, where)
    return adapter_file


def _fetch(adapter: Path | str, where: str) -> Path:
    if isinstance(adapter, Path):
        return adapter
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=[ADAPTER_CONFIG, _WEIGHTS]))
    except Exception as error:
        raise NotFound(
            f"cannot fetch the adapter {adapter!r}: {first_line(error)}",
            at=where,
            fix="check the name and your connection, or give the path of a local folder.",
        ) from error


def _refuse_unmergeable(config: Mapping[str, Any], where: str) -> None:
    """Refuse kinds of adapter that cannot be expressed as a change of the weights."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs = {str(kind.value): options for kind, options in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = config["peft_type"]
    if kind not in configs:
        raise unknown_name("kind of adapter (peft_type)", kind, configs, at=where)
    unsupported = kind in _NEVER_MERGED or issubclass(configs[kind], PromptLearningConfig)
    if config.get("alora_invocation_tokens"):  # it acts after these tokens alone
        unsupported, kind = True, "aLoRA"
    if unsupported:
        raise ConfigError(
            f"adapters of the kind {kind} cannot be merged into the weights, and are not supported.",
            at=where,
            fix="use an adapter that changes weights, such as LoRA.",
        )
    if config.get("layer_replication"):
        raise ConfigError(
            "the adapter repeats layers of its base model (layer_replication), which is not supported.",
            at=where,
            fix=_MERGE_IT,
        )


def _read_shapes(file: Path, where: str) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise BadFile(
            f"the adapter has no {_WEIGHTS}; pickled adapters (.bin) are never loaded.",
            at=where,
            fix="save it again with safe_serialization=True.",
        )
    with open_tensors(file, _WEIGHTS, at=where, fix=_COPY_AGAIN) as tensors:
        shapes = tensor_shapes(tensors)
        broken = next((name for name in shapes if not tensors.get_tensor(name).float().isfinite().all()), None)
    if broken is not None:
        raise BadFile(
            f"the adapter holds NaN or infinite values (first in {broken}).",
            at=where,
            fix="its training diverged, or it is damaged: take an earlier checkpoint, or copy it again.",
        )
    if not shapes:
        raise BadFile(f"{_WEIGHTS} holds no tensors.", at=where, fix="save the adapter again.")
    return shapes


def _all_values(config: Mapping[str, Any], key: str, pattern: str) -> list[Any]:
    """A key's value for all layers, and the values of its pattern for some layers."""
    of_some = config.get(pattern) or {}
    return [config.get(key), *(of_some.values() if isinstance(of_some, dict) else [of_some])]


def _refuse_bad_sizes(adapter: AdapterFile, where: str) -> None:
    """Refuse a rank larger than any tensor of the file, which PEFT would allocate, and a scale that is no number."""
    for alpha in _all_values(adapter.config, "lora_alpha", "alpha_pattern"):
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if alpha is not None and not number:
            raise BadFile(
                f"{ADAPTER_CONFIG} says lora_alpha: {str(alpha)[:40]}; expected a number.", at=where, fix=_COPY_AGAIN
            )
    ranks = _all_values(adapter.config, "r", "rank_pattern")
    wrong = [r for r in ranks if r is not None and (not isinstance(r, int | list) or isinstance(r, bool))]
    widest = max((size for shape in adapter.shapes.values() for size in shape), default=0)
    # In LoKr a large rank is at most a full matrix.
    if adapter.kind != "LOKR":
        wrong += [r for r in ranks if isinstance(r, int) and r > max(widest, 4096)]
    if wrong:
        raise BadFile(
            f"{ADAPTER_CONFIG} says r: {str(wrong[0])[:40]}, but no tensor of the file is wider than {widest}.",
            at=where,
            fix="restore both files; they belong to different adapters.",
        )


def require_fit(adapter: AdapterFile, base_config: Any, where: str) -> None:
    """IncompatibleModels if a tensor of the adapter has no place, or another shape, in the model. Needs no memory."""
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in adapter.shapes.items()}
    try:
        adapted = PeftModel(model, _peft_config(adapter, where), low_cpu_mem_usage=True)
        expected = _adapter_tensors(adapted)
        _refuse_shapes(adapter, {name: tuple(tensor.shape) for name, tensor in expected.items()}, where)
        result: Any = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    except NotImplementedError:  # a kind that computes on the weights when attached: only loading can tell
        return
    except _FROM_PEFT as error:
        raise _misfit_error(_reason(error), where) from error
    # Loading may merge tensors (mixtures of experts): the model then has fewer than the file.
    missing = set(expected) - set(tensors) if len(tensors) < len(expected) else set()
    _refuse_unloaded(adapter, set(result.unexpected_keys) - set(expected), missing, where)


def merge_adapter(model: Any, adapter: AdapterFile, where: str) -> tuple[Any, MergedAdapter]:
    """Load an adapter into the model and merge it there, in float32: bfloat16 would round small updates away.

    PEFT ignores tensors that have no place in the model, leaves missing ones at random values, and merges even where
    that changes the model (tied embeddings). So every tensor is compared, and the logits before and after merging:
    IncompatibleModels if a tensor is not as in the file, ConfigError if merging fails or changes the model.
    """
    model = model.float().eval()
    plain = probe_logits(model)
    adapted = _attach(model, adapter, where, torch_device="cpu")
    unmerged = probe_logits(adapted)
    _refuse_overflow(unmerged, where)
    _untie(adapted)
    try:
        merged = adapted.merge_and_unload()
    except _FROM_PEFT as error:
        raise ConfigError(
            f"the adapter ({adapter.kind}) cannot be merged into the weights: {_reason(error)}.",
            at=where,
            fix="use an adapter that changes weights, such as LoRA.",
        ) from error
    effect = MergedAdapter(_max_abs(unmerged - plain), _max_abs(probe_logits(merged) - unmerged))
    scale = _max_abs(plain - plain.mean())
    if not effect.error <= max(_ROUNDING * scale, min(_MAX_ROUNDING * scale, 0.1 * effect.effect)):
        raise ConfigError(
            f"merged into the weights, the adapter ({adapter.kind}) gives another model: logits differ by up to"
            f" {effect.error:.3g} from the unmerged one's, where the adapter changes them by up to"
            f" {effect.effect:.3g}.",
            at=where,
            fix="use an adapter without options that act only while the model runs.",
        )
    return merged, effect


def keep_adapter(model: Any, adapter: AdapterFile, where: str) -> tuple[Any, MergedAdapter]:
    """Load an adapter beside the model's weights, which stay unchanged: quantised, or spread over devices.

    IncompatibleModels as `merge_adapter`. ConfigError: it changes the embedding or unembedding, which are read as
    matrices; or part of the model is on disk.
    """
    _refuse_adapted_embeddings(model, adapter, where)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            "part of the model is on disk, where no adapter can be kept beside it.",
            at=where,
            fix="give more memory, quantise the model, or merge the adapter into it with PEFT and save it whole.",
        )
    adapted = _attach(model, adapter, where)
    base = adapted.get_base_model()
    # After attaching: bitsandbytes packs its weights for the CPU in the first pass, and PEFT cannot wrap packed ones.
    with adapted.disable_adapter():
        plain = probe_logits(base)
    adapted_logits = probe_logits(base)
    _refuse_overflow(adapted_logits, where)
    return base, MergedAdapter(_max_abs(adapted_logits - plain), 0.0)


def _refuse_overflow(logits: Tensor, where: str) -> None:
    if not logits.isfinite().all():
        message = f"with this adapter the model's logits are NaN or infinite; its {ADAPTER_CONFIG} may be another's."
        raise BadFile(message, at=where, fix=_COPY_AGAIN)


def _attach(model: Any, adapter: AdapterFile, where: str, **options: Any) -> Any:
    """The model with the adapter attached, every tensor as in the file."""
    from peft import PeftModel

    try:
        adapted = PeftModel(model, _peft_config(adapter, where))
        result = adapted.load_adapter(str(adapter.folder), "default", **options)
    except _FROM_PEFT as error:
        raise _misfit_error(_reason(error), where) from error
    adapted.eval()
    loaded = _adapter_tensors(adapted)
    # Older PEFT draws VeRA's projections again and calls the file's unexpected; their values are compared below.
    _refuse_unloaded(adapter, set(result.unexpected_keys) - set(loaded), result.missing_keys, where)
    _refuse_changed_values(_named_tensors(adapted) | loaded, adapter, where)
    return adapted


def _refuse_adapted_embeddings(model: Any, adapter: AdapterFile, where: str) -> None:
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in ends]
    touched = sorted(name for name in names if any(f".{name}." in tensor for tensor in adapter.shapes))
    if touched:
        raise ConfigError(
            f"the adapter changes {touched[0]}, so it cannot stay beside the weights.",
            at=where,
            fix="load the model whole, on one device, and leave merge_adapter out: then it is merged.",
        )


def _peft_config(adapter: AdapterFile, where: str) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
    except (TypeError, ValueError, KeyError) as error:
        raise BadFile(f"{ADAPTER_CONFIG} cannot be used: {_reason(error)}.", at=where) from error
    config.inference_mode = True
    return config


def _adapter_tensors(adapted: Any) -> dict[str, Tensor]:
    from peft.utils.save_and_load import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(adapted, state_dict=_named_tensors(adapted), save_embedding_layers=False))


def _named_tensors(model: Any) -> dict[str, Tensor]:
    """As `state_dict`, which weights that bitsandbytes packed for the CPU do not survive."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _refuse_shapes(adapter: AdapterFile, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, shape in adapter.shapes.items():
        model_shape = expected.get(name, shape)
        if shape == model_shape or adapter.kind == "ADALORA":  # which prunes ranks during training
            continue
        other_vocabulary = ("embed" in name or "lm_head" in name) and shape[1:] == model_shape[1:]
        why = (
            f"; it was trained with {shape[0]:,} tokens, the base has {model_shape[0]:,} rows of embeddings."
            if other_vocabulary
            else "."
        )
        raise IncompatibleModels(
            f"the adapter does not fit the base model: {name} has shape {list(shape)} in the adapter and"
            f" {list(model_shape)} in the model{why}",
            at=where,
            fix=_MERGE_IT if other_vocabulary else "use the base model named in its adapter_config.json.",
        )


def _refuse_unloaded(adapter: AdapterFile, unexpected: Iterable[str], missing: Iterable[str], where: str) -> None:
    if names := sorted(unexpected):
        raise _misfit_error(
            f"{len(names)} of its {len(adapter.shapes)} tensors find no place in the model, such as {names[0]}", where
        )
    if names := sorted(missing):
        raise _misfit_error(f"its file lacks {len(names)} tensors, such as {names[0]}", where)


def _refuse_changed_values(loaded: Mapping[str, Tensor], adapter: AdapterFile, where: str) -> None:
    """Refuse a model in which a tensor of the file differs."""
    with open_tensors(adapter.folder / _WEIGHTS, _WEIGHTS, at=where, fix=_COPY_AGAIN) as file:
        for name in adapter.shapes:
            tensor = loaded.get(name)
            if tensor is None or tensor.shape != adapter.shapes[name]:  # converted while loading
                continue
            if not torch.equal(tensor, file.get_tensor(name).to(tensor.dtype)):
                raise _misfit_error(f"{name} has other values in the model than in the adapter's file", where)


def _untie(adapted: Any) -> None:
    """Give the unembedding its own weights if it shares them with the embedding and an adapter changes one of them."""
    model = adapted.get_base_model()
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    first, second = getattr(embedding, "base_layer", embedding), getattr(unembedding, "base_layer", unembedding)
    if (first is embedding and second is unembedding) or second is None or first.weight is not second.weight:
        return
    second.weight = torch.nn.Parameter(second.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _misfit_error(reason: str, where: str) -> IncompatibleModels:
    return IncompatibleModels(
        f"the adapter does not fit the base model: {reason}.",
        at=where,
        fix="use the base model named in its adapter_config.json, and save the adapter from an unwrapped model.",
    )


def _reason(error: Exception) -> str:
    """The informative line of an error: PyTorch's first line only counts the errors."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    line = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
    return (f"there is no {line}" if isinstance(error, KeyError) else line).rstrip(".")


def _max_abs(difference: Tensor) -> float:
    return float(difference.abs().max())


def _last_part(name: str) -> str:
    """Last part of a path, a hub id or a bundled name, in lower case."""
    if name.startswith((".", "~")):
        name = str(Path(name).expanduser().resolve())
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf").casefold()
