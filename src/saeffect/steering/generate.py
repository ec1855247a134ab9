"""Many continuations of one prompt at once, each row with its own intervention and its own noise."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.models.hooks import edited
from saeffect.models.language_model import LanguageModel
from saeffect.steering.operators import Intervention, PositionedEdit
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise

__all__ = ["Progress", "end_tokens", "generate", "last_logits"]

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    hook: str,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    intervention: Intervention | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continue one prompt once per row.

    All rows have the same prompt, so there is no padding. A row's output depends on its own vector and noise
    cell only; beside which rows it is computed does not matter, except that matrix products over another
    number of rows may round differently (in float64 and float32 that hardly ever changes a token, in bfloat16
    now and then it does). With the same batches the same machine gives the same tokens.

    Args:
        lm: The model.
        hook: Where to intervene, a TransformerLens name.
        prompt_ids: Token ids of the prompt, at least one.
        cells: One a row: the noise that the row is sampled with.
        sampling: How tokens are chosen, and how many.
        intervention: With one operator row per cell; None leaves the model as it is.
        batch_size: Rows at once. 64 rows of a 135M model take about 0.2 GB beside the weights.
        progress: Called after each batch.

    Returns:
        New token ids, one list a row, without the prompt. With `sampling.allow_end` a row stops before its
        end-of-text token and may be shorter, even empty.

    Raises:
        ConfigError: The prompt has no tokens, `batch_size` is below 1, or the hook is not in the model.
        ShapeMismatch: The intervention has not one row per cell.
    """
    if len(prompt_ids) == 0:
        raise ConfigError("the prompt has no tokens; expected at least one.", at="prompts")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1. Got {batch_size}.", at="batch_size")
    if intervention is not None and intervention.operator.n_rows != len(cells):
        raise ShapeMismatch(f"{intervention.operator.n_rows} rows to steer, but {len(cells)} noise cells.")
    forbidden = _forbidden(lm, sampling.allow_end)
    outputs: list[list[int]] = []
    for first in range(0, len(cells), batch_size):
        some = cells[first : first + batch_size]
        edit = None
        if intervention is not None:
            edit = intervention.take(first, first + len(some)).edit(len(prompt_ids))
        with _editing(lm, hook, edit):
            outputs += _continue(lm, prompt_ids, some, sampling, edit=edit, forbidden=forbidden)
        if progress is not None:
            progress(len(outputs), len(cells))
    return outputs


def end_tokens(lm: LanguageModel) -> list[int]:
    """Ids that end a text, by the tokenizer and by the model's generation settings."""
    settings = getattr(lm.model, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(lm.tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(i for i in found if 0 <= i < lm.d_vocab)


def last_logits(lm: LanguageModel, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits after the last token of each row, float32 `[rows, d_vocab]`, and the cache of keys and values.

    Only the last position meets the unembedding, where the architecture knows how: over a long prompt the
    logits of all positions would be the largest tensor by far.
    """
    extra = {"logits_to_keep": 1} if _keeps_logits(lm.model) else {}
    # The last position of many is a slice with gaps, for which the processor's bfloat16 product is hundreds
    # of times slower than for a dense copy of it.
    dense = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        result = lm.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **extra)
    finally:
        dense.remove()
    return result.logits[:, -1].float(), result.past_key_values


def _continue(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    edit: PositionedEdit | None,
    forbidden: Tensor,
) -> list[list[int]]:
    """One batch: the prompt in one pass, then a token a pass."""
    ends = torch.tensor(end_tokens(lm), dtype=torch.int64, device=lm.device)
    fed = torch.tensor([list(prompt_ids)], device=lm.device).expand(len(cells), -1).contiguous()
    generated = torch.empty((len(cells), 0), dtype=torch.int64, device=lm.device)
    ended = torch.zeros(len(cells), dtype=torch.bool, device=lm.device)
    cache = None
    n_cached = 0
    for step in range(sampling.max_new_tokens):
        if edit is not None:
            edit.start = n_cached
        logits, cache = last_logits(lm, fed, cache)
        n_cached += fed.shape[1]
        logits = penalise(logits, generated, sampling.frequency_penalty).masked_fill(forbidden, -math.inf)
        tokens = next_tokens(logits, cells, step, sampling)
        generated = torch.cat([generated, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens, ends)
        if bool(ended.all()):
            break
        fed = tokens[:, None]
    final = set(ends.tolist())
    return [_until(row, final) for row in generated.tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def _forbidden(lm: LanguageModel, allow_end: bool) -> Tensor:
    """Ids never generated, bool `[d_vocab]`: those unknown to the tokenizer, and special ones."""
    forbidden: Tensor = ~lm.plain_tokens()
    # Some tokenizers end a text with a token that they do not count as special.
    forbidden[end_tokens(lm)] = not allow_end
    return forbidden.to(lm.device)


def _editing(lm: LanguageModel, hook: str, edit: PositionedEdit | None) -> AbstractContextManager[None]:
    return nullcontext() if edit is None else edited(lm, hook, edit)


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
