"""Many continuations of one prompt at once, each row with its own intervention and its own noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.steering.operators import Intervention, PositionedEdit
from saeffect.steering.prompt_pass import last_logits, read_prompt
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens, penalise_

__all__ = ["Progress", "end_tokens", "forbidden_tokens", "generate", "until_end"]

Progress = Callable[[int, int], None]
"""Called with (how much is done, how much there is in all), in rows if nothing else is said."""


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
        prompt_ids: Token ids of the prompt, at least one, see `LanguageModel.encode_prompt`.
        cells: One a row: the noise that the row is sampled with.
        sampling: How tokens are chosen, and how many.
        intervention: With one operator row per cell; None leaves the model as it is.
        batch_size: Rows at once. 64 rows of a 135M model take about 0.2 GB beside the weights.
        progress: Called after every token, with tokens done and in all, over all rows; what an ended row leaves out
            is done.

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
    forbidden = forbidden_tokens(lm, sampling.allow_end)
    outputs: list[list[int]] = []
    with fused(lm):
        for first in range(0, len(cells), batch_size):
            some = cells[first : first + batch_size]
            edit = None
            if intervention is not None:
                edit = intervention.take(first, first + len(some)).edit(len(prompt_ids), lm.n_bos(prompt_ids))
            done = _Tokens(progress, len(cells), sampling.max_new_tokens, first)
            outputs += _continue(lm, hook, prompt_ids, some, sampling, edit=edit, forbidden=forbidden, done=done)
    return outputs


@dataclass(frozen=True)
class _Tokens:
    """Tells how far a batch is, counting the rows before it.

    Attributes:
        progress: Called with tokens done and in all; None for nobody.
        n_rows: Of all batches.
        each: Tokens a row.
        before: Rows of earlier batches.
    """

    progress: Progress | None
    n_rows: int
    each: int
    before: int

    def __call__(self, rows: int, tokens: int) -> None:
        """`rows` rows of this batch have `tokens` tokens each."""
        if self.progress is not None:
            self.progress(self.before * self.each + rows * tokens, self.n_rows * self.each)


def end_tokens(lm: LanguageModel) -> list[int]:
    """Ids that end a text, by the tokenizer and by the model's generation settings."""
    settings = getattr(lm.model, "generation_config", None)
    found: set[int] = set()
    for value in (getattr(lm.tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(i for i in found if 0 <= i < lm.d_vocab)


def _continue(
    lm: LanguageModel,
    hook: str,
    prompt_ids: Sequence[int],
    cells: Sequence[NoiseCell],
    sampling: Sampling,
    *,
    edit: PositionedEdit | None,
    forbidden: Tensor,
    done: _Tokens,
) -> list[list[int]]:
    """One batch: the prompt once, then a token of every row a pass."""
    n_rows, n_steps = len(cells), sampling.max_new_tokens
    ends = torch.tensor(end_tokens(lm), dtype=torch.int64, device=lm.device)
    generated = torch.empty((n_rows, n_steps), dtype=torch.int64, device=lm.device)
    ended = torch.zeros(n_rows, dtype=torch.bool, device=lm.device)
    logits, cache = read_prompt(lm, hook, prompt_ids, n_rows, edit, room=n_steps - 1)
    with _editing(lm, hook, edit):
        for step in range(n_steps):
            if step:
                if edit is not None:
                    edit.start = len(prompt_ids) + step - 1
                logits, cache = last_logits(lm, generated[:, step - 1 : step], cache)
            penalise_(logits, generated[:, :step], sampling.frequency_penalty)
            logits.index_fill_(1, forbidden, -math.inf)
            generated[:, step] = next_tokens(logits, cells, step, sampling)
            if sampling.allow_end:
                ended |= torch.isin(generated[:, step], ends)
                if bool(ended.all()):
                    generated = generated[:, : step + 1]
                    done(n_rows, n_steps)
                    break
            done(n_rows, step + 1)
    final = set(ends.tolist())
    return [until_end(row, final) for row in generated.tolist()]


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first one that ends a text."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def forbidden_tokens(lm: LanguageModel, allow_end: bool) -> Tensor:
    """Ids never generated, int64: those unknown to the tokenizer, and special ones."""
    forbidden: Tensor = ~lm.plain_tokens()
    # Some tokenizers end a text with a token that they do not count as special.
    forbidden[end_tokens(lm)] = not allow_end
    return forbidden.nonzero()[:, 0].to(lm.device)


def _editing(lm: LanguageModel, hook: str, edit: PositionedEdit | None) -> AbstractContextManager[None]:
    # A prompt that was steered is in the keys and values; its generated tokens are left alone.
    return nullcontext() if edit is None or edit.positions == "prompt" else edited(lm, hook, edit)
