"""Operators change activations `[rows, positions, d_model]` row by row; interventions say at which positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.config_steering import Positions
from saeffect.errors import ConfigError, ShapeMismatch, unknown_name
from saeffect.lm.chat import Parts, has_part
from saeffect.sae.base import SparseAutoencoder

__all__ = [
    "NO_FEATURE",
    "POSITIONS",
    "AddVectors",
    "Intervention",
    "Operator",
    "PositionedEdit",
    "SetFeatures",
    "span",
    "steered_tokens",
]

POSITIONS: tuple[Positions, ...] = get_args(Positions)
_PLAIN_POSITIONS = ("all", "generated", "prompt")  # of any prompt; the others are of chats


class Operator(Protocol):
    """Changes activations row by row. Implementations are immutable and do not change their input. `take` gives the
    operator of some of the rows; `apply` new activations for `x`, `[n_rows, positions, d_model]`,
    like it in shape, dtype and device.
    """

    @property
    def n_rows(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Operator: ...

    def apply(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class AddVectors:
    """Adds vectors, float32 `[n_rows, d_model]`, in the activation's units; zeros leave every bit unchanged."""

    vectors: Tensor

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.vectors).all()):
            raise ConfigError("a steering vector holds NaN or infinity.", fix="look at the SAE's decoder and the dose.")

    @property
    def n_rows(self) -> int:
        return len(self.vectors)

    def take(self, rows: Sequence[int]) -> AddVectors:
        return AddVectors(self.vectors[list(rows)])

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.n_rows or x.shape[-1] != self.vectors.shape[1]:
            problem = f"activations of shape {tuple(x.shape)} met steering vectors of shape {tuple(self.vectors.shape)}"
            raise ShapeMismatch(f"{problem}; expected as many rows and the same width.")
        # float64 models stay float64; half-precision ones are summed in float32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = self.vectors.to(device=x.device, dtype=dtype)
        return (x.to(dtype) + vectors[:, None, :]).to(x.dtype)


NO_FEATURE = -1
"""Padding of rows that set fewer features than others."""


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """Sets features to given activations, keeping the SAE's error: x becomes x + (target - activation) * decoder row.

    This equals decoding the changed activations and adding the error back (Templeton et al. 2024, "Golden Gate
    Claude"). At attention sinks (mostly a text's first token) the residual is tens of times longer and the SAE's
    activations are meaningless, so activations longer than `norm_limit` (see `NormLimit`) are left unchanged.

    Attributes:
        sae: In the units of the model's activations.
        features: Int64 `[n_rows, n_features]`, no feature twice in a row; -1 for none.
        targets: Feature activations, float32 `[n_rows, n_features]`, at least 0.
        along: For placebos: directions to push along in place of the decoder rows, by the same amounts, float32
            `[n_rows, n_features, d_in]`.
    """

    sae: SparseAutoencoder
    features: Tensor
    targets: Tensor
    along: Tensor | None = None
    norm_limit: float = math.inf

    @property
    def n_rows(self) -> int:
        return len(self.features)

    def take(self, rows: Sequence[int]) -> SetFeatures:
        index = list(rows)
        along = None if self.along is None else self.along[index]
        return SetFeatures(self.sae, self.features[index], self.targets[index], along, self.norm_limit)

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.n_rows:
            raise ShapeMismatch(f"activations of {x.shape[0]} rows met {self.n_rows} rows of features to set.")
        dtype = torch.promote_types(x.dtype, torch.float32)
        sae, features, targets = self.sae.on(x.device), self.features.to(x.device), self.targets.to(x.device)
        ids = features.clamp_min(0)
        # One position of all rows at a time: the activations of all features on a long prompt do not fit in memory.
        change = torch.empty(*x.shape[:2], features.shape[1], device=x.device)
        for position in range(x.shape[1]):
            acts = sae.encode(x[:, position]).gather(1, ids)
            change[:, position] = targets - acts
        change *= (features != NO_FEATURE)[:, None, :]
        change *= (x.to(dtype).norm(dim=-1) <= self.norm_limit)[:, :, None]
        along = sae.directions(ids) if self.along is None else self.along.to(x.device)
        moved = torch.einsum("rpf,rfd->rpd", change, along) * sae.output_scale(x)
        return (x.to(dtype) + moved.to(dtype)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Intervention:
    """An operator and the positions at which it acts; never a BOS token in front of a prompt.

    `positions` is "all"; "prompt": the prompt's positions but the last (as in the paper's code); "generated": the rest,
    that is those that predict a generated token; or, for a chat with `parts` (see `Encoded`), one part of it. Parts
    that are read ("system", "user", "template", "special") are their own positions; those that the assistant writes are
    the positions that predict them: "assistant" is "generated" and the assistant's earlier turns, "first_assistant" the
    position before the first token of each turn.
    """

    operator: Operator
    positions: Positions = "all"
    parts: Parts | None = None

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise unknown_name("choice of positions", self.positions, POSITIONS, at="positions")

    def take(self, rows: Sequence[int]) -> Intervention:
        return Intervention(self.operator.take(rows), self.positions, self.parts)

    def edit(self, prompt_length: int, n_bos: int = 0) -> PositionedEdit:
        """The callable for `saeffect.lm.edited`; rows share a prompt of that length (at "all" positions: have
        prompts of that length or more), its first `n_bos` tokens BOS.
        `ConfigError` if there is no position to act at: BOS alone, one token with `positions` "prompt", or no token of
        the part.
        """
        n_own = prompt_length - n_bos
        if n_own < 1 or (self.positions == "prompt" and n_own < 2):
            left_out = "BOS" if n_own < 1 else "the prompt's last token"
            raise ConfigError(
                f"positions {self.positions!r} leaves out {left_out}, and the prompt has {n_own}"
                + (" beside BOS." if n_bos else "."),
                at="positions",
                fix="use a longer prompt, or positions 'all' or 'generated'.",
            )
        mask = None
        if self.positions not in _PLAIN_POSITIONS:
            mask = steered_tokens(self.positions, self.parts, n_bos)
            if not mask.any():
                raise ConfigError(
                    f"the prompt has no token at positions {self.positions!r}.",
                    at="positions",
                    fix="use prompts that have such a turn, or other positions.",
                )
        return PositionedEdit(self.operator, self.positions, prompt_length, n_bos, mask)


def steered_tokens(positions: str, parts: Parts | None, n_bos: int = 0) -> NDArray[np.bool_]:
    """Which tokens of a chat prompt are steered, bool; ConfigError without `parts`, that is for plain text."""
    if parts is None:
        raise ConfigError(
            f"positions {positions!r} are those of a chat, and this prompt is plain text.",
            at="positions",
            fix="set steering.format: chat, or choose all, generated or prompt.",
        )
    steered = has_part(parts, (positions,))
    if positions in ("assistant", "first_assistant"):  # positions that predict them
        mid_turn = has_part(parts[-1:], ("assistant",)).any()
        steered = np.append(steered[1:], positions == "assistant" or not mid_turn)
    steered[:n_bos] = False
    return steered


class PositionedEdit:
    """Applies an operator in each forward pass; set `start`, the pass' first absolute position, before each.

    `mask` says which tokens of the prompt are steered, bool, for `positions` of a chat.
    """

    def __init__(
        self,
        operator: Operator,
        positions: Positions,
        prompt_length: int,
        n_bos: int = 0,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        self.operator = operator
        self.positions: Positions = positions
        self.prompt_length = prompt_length
        self.n_bos = n_bos
        self.start = 0
        self._mask = mask

    @property
    def of_prompt_alone(self) -> bool:
        """Whether it acts at no generated position."""
        return self.positions not in ("all", "generated", "assistant")

    def first(self, length: int) -> int:
        """The first of the next `length` positions that is steered; `length` if none is."""
        if self._mask is None:
            return self.where(length).start
        return next(iter(self._masked_positions(length)), length)

    def __call__(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        steered = self.where(length) if self._mask is None else self._masked_positions(length)
        n_steered = len(range(length)[steered]) if isinstance(steered, slice) else len(steered)
        if n_steered == 0:
            return x
        if n_steered == length:
            return self.operator.apply(x)
        changed = x.clone()
        changed[:, steered] = self.operator.apply(x[:, steered])
        return changed

    def _masked_positions(self, length: int) -> list[int]:
        """The next `length` positions that are steered, by the mask."""
        assert self._mask is not None
        from_prompt = self._mask[self.start : self.start + length]
        generated = np.full(length - len(from_prompt), not self.of_prompt_alone)
        positions: list[int] = np.flatnonzero(np.append(from_prompt, generated)).tolist()
        return positions

    def where(self, length: int) -> slice:
        """Which of the next `length` positions are steered."""
        steered = span(self.positions, self.start, length, self.prompt_length)
        return slice(max(steered.start, min(self.n_bos - self.start, length)), steered.stop)


def span(positions: Positions, start: int, length: int, prompt_length: int) -> slice:
    """Which of `length` positions from absolute position `start` on are steered, BOS aside.

    Example:
        >>> span("prompt", 0, 5, 5), span("generated", 0, 5, 5)  # a prompt of five tokens
        (slice(0, 4, None), slice(4, 5, None))
        >>> span("prompt", 5, 1, 5), span("generated", 5, 1, 5)  # the first generated token
        (slice(0, 0, None), slice(0, 1, None))
    """
    boundary = min(max(prompt_length - 1 - start, 0), length)
    if positions == "prompt":
        return slice(0, boundary)
    if positions == "generated":
        return slice(boundary, length)
    return slice(0, length)
