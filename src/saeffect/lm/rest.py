"""What a model makes of an activation at a hook, without running the blocks before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saeffect.errors import ShapeMismatch
from saeffect.lm.architectures import blocks
from saeffect.lm.heads import hook_width
from saeffect.lm.hooks import capture, edited, parse_hook
from saeffect.lm.language_model import LanguageModel

__all__ = ["Rest"]


class Rest:
    """The part of a model behind a hook of the residual stream; behind another hook, the model with that value
    there.

    That skipping the `n_skipped` blocks before gives the same is measured on a few tokens (some architectures pass more
    from block to block than the stream). Where it does not, every block runs. ConfigError: no such hook.
    """

    def __init__(self, lm: LanguageModel, hook: str) -> None:
        point = parse_hook(hook, lm.n_layers)
        self._lm, self._hook = lm, hook
        self.n_skipped = {"hook_resid_pre": point.layer, "hook_resid_post": point.layer + 1}.get(point.kind, 0)
        self._pass_on: Callable[..., Any] = _tensor
        if self.n_skipped and not self._gives_the_same():
            self.n_skipped = 0

    @torch.inference_mode()
    def logits(self, ids: Tensor, x: Tensor) -> Tensor:
        """Logits `[batch, sequence, d_vocab]`, of the model's dtype, with `x` `[batch, sequence, d_model]` at the
        hook.

        `ids`, int64 `[batch, sequence]`, give the positions (and what ran before, if not all of it is skipped).
        ShapeMismatch if the two do not fit.
        """
        width = hook_width(self._lm, self._hook)
        if ids.ndim != 2 or x.shape != (*ids.shape, width):
            raise ShapeMismatch(f"x has shape {list(x.shape)}; expected {[*ids.shape, width]} for these ids.", at="x")
        lm = self._lm
        x = x.to(lm.device, lm.dtype)
        with self._skipping(), edited(lm, self._hook, lambda _: x):
            found: Tensor = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        return found

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """While the block runs, the first blocks pass on what they get."""
        with contextlib.ExitStack() as stack:
            for block in blocks(self._lm.model)[: self.n_skipped]:
                stack.callback(_restore, block, vars(block).get("forward"))
                block.forward = self._pass_on
            yield

    @torch.inference_mode()
    def _gives_the_same(self) -> bool:
        lm = self._lm
        ids = (torch.arange(1, 17) * max(1, lm.d_vocab // 18) % lm.d_vocab)[None]
        kinds: list[type] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            kinds.append(type(output))

        listening = blocks(lm.model)[0].register_forward_hook(note)
        try:
            whole = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        finally:
            listening.remove()
        self._pass_on = _in_tuple if issubclass(kinds[0], tuple) else _tensor
        x = capture(lm, self._hook, ids)
        # Other text last, so that nothing which a block left behind helps.
        lm.model(input_ids=ids.flip(1).to(lm.device), use_cache=False)
        try:
            found = self.logits(ids, x)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):  # a skipped block's part is missed
            return False
        return torch.allclose(found, whole, rtol=1e-3, atol=1e-3)


def _tensor(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward
