"""What is measured on a generated text: what it is about, whether it repeats itself, whether it is fluent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from saeffect.errors import ShapeMismatch
from saeffect.lm.language_model import LanguageModel

__all__ = [
    "RememberedVectors",
    "Similarity",
    "TextVectors",
    "distinct_2",
    "join_tokens",
    "measure_texts",
    "perplexity",
    "similarity",
]

Vector = npt.NDArray[np.floating]


class TextVectors(Protocol):
    """Anything that turns a text into one vector: word vectors averaged, or a sentence encoder."""

    def mean_vector(self, text: str) -> Vector | None:
        """The vector of a text, `[dim]`; None when the text has nothing that it knows."""
        ...


class RememberedVectors:
    """Text vectors computed once per text: top tokens and unsteered texts come up again and again.

    Args:
        vectors: Where they come from.
    """

    def __init__(self, vectors: TextVectors) -> None:
        self._vectors = vectors
        self._known: dict[str, Vector | None] = {}

    @classmethod
    def of(cls, vectors: TextVectors) -> RememberedVectors:
        """`vectors` with a memory; the same object if it has one."""
        return vectors if isinstance(vectors, cls) else cls(vectors)

    def mean_vector(self, text: str) -> Vector | None:
        """As the vectors give it."""
        if text not in self._known:
            self._known[text] = self._vectors.mean_vector(text)
        return self._known[text]


@dataclass(frozen=True)
class Similarity:
    """Cosine of two texts' vectors.

    Attributes:
        value: From -1 to 1; NaN when undefined.
        reason: Why it is undefined, else "".
    """

    value: float
    reason: str = ""


def join_tokens(tokens: Sequence[str]) -> str:
    """Top tokens as one text, joined by spaces, without their leading-space marks.

    Example:
        >>> join_tokens(["Ġtreatment", " drug", "▁dose"])
        'treatment drug dose'
    """
    return " ".join(token.lstrip("Ġ▁ \t\n").rstrip() for token in tokens).strip()


def similarity(text: str, reference: str, vectors: TextVectors) -> Similarity:
    """How much a text is about what the reference is about: the paper's outcome.

    Args:
        text: A generated continuation.
        reference: A feature's top tokens, see `join_tokens`.
        vectors: Where the texts' vectors come from.

    Returns:
        Cosine similarity; NaN with a reason when either text has no vector.
    """
    units = []
    for words, what in ((reference, "top tokens"), (text, "generated text")):
        vector = vectors.mean_vector(words)
        if vector is None:
            return Similarity(math.nan, f"no word of the {what} is in the embedding")
        length = float(np.linalg.norm(vector))
        if not (math.isfinite(length) and length > 0):
            return Similarity(math.nan, f"the vector of the {what} has no direction")
        units.append(np.asarray(vector, dtype=np.float64) / length)
    return Similarity(float(units[0] @ units[1]))


def distinct_2(token_ids: Sequence[int]) -> float:
    """Share of different pairs among the pairs of neighbouring tokens: 1 is no repetition, near 0 a loop.

    Returns:
        Above 0, at most 1; NaN for fewer than two tokens.

    Source:
        Li et al. (2016), A Diversity-Promoting Objective Function for Neural Conversation Models.

    Example:
        >>> distinct_2([5, 7, 5, 7, 5])  # four pairs, two of them different
        0.5
    """
    pairs = list(itertools.pairwise(token_ids))
    return len(set(pairs)) / len(pairs) if pairs else math.nan


@torch.inference_mode()
def perplexity(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> npt.NDArray[np.float64]:
    """How surprised the unsteered model is by continuations of one prompt.

    Args:
        lm: The model, without intervention.
        prompt_ids: The prompt they continue, at least one token.
        continuations: Token ids, of any lengths.
        batch_size: Rows at once; the logits of `batch_size` continuations are held in memory.

    Returns:
        exp of the mean negative log-probability (nats) of a continuation's tokens, float64 `[n]`, at least 1
        (1: the model expected every token); NaN for an empty continuation.

    Raises:
        ShapeMismatch: The prompt has no tokens.
    """
    if len(prompt_ids) == 0:
        raise ShapeMismatch("the prompt has no tokens; expected at least one.")
    result = np.full(len(continuations), math.nan)
    # Equal lengths together: causal attention makes padding at the end harmless, but not free.
    order = [i for i in np.argsort([len(c) for c in continuations], kind="stable") if len(continuations[i])]
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        longest = max(len(continuations[i]) for i in some)
        rows = [[*prompt_ids, *continuations[i], *[0] * (longest - len(continuations[i]))] for i in some]
        input_ids = torch.tensor(rows, device=lm.device)
        logits = lm.model(input_ids=input_ids, use_cache=False).logits[:, len(prompt_ids) - 1 : -1]
        for row, i in enumerate(some):
            targets = torch.tensor(list(continuations[i]), device=lm.device)
            surprise = torch.nn.functional.cross_entropy(logits[row, : len(targets)].float(), targets)
            result[i] = np.exp(surprise.item())
    return result


def measure_texts(
    lm: LanguageModel,
    prompt: str,
    outputs: Sequence[Sequence[int]],
    references: Sequence[str],
    vectors: TextVectors,
    *,
    with_perplexity: bool,
) -> list[dict[str, Any]]:
    """What trials record of each text.

    Args:
        lm: The model, without intervention.
        prompt: What the texts continue.
        outputs: Token ids of the continuations.
        references: What each is compared with, see `join_tokens`.
        vectors: Where the texts' vectors come from.
        with_perplexity: Whether to measure it.

    Returns:
        For each text: text, similarity, distinct2, and perplexity if wanted.
    """
    records: list[dict[str, Any]] = []
    for ids, reference in zip(outputs, references, strict=True):
        text = lm.decode(list(ids))
        found = similarity(text, reference, vectors).value
        records.append({"text": text, "similarity": found, "distinct2": distinct_2(ids)})
    if with_perplexity:
        # Features share the unsteered texts: score each different text once.
        different = list(dict.fromkeys(tuple(ids) for ids in outputs))
        scores = dict(zip(different, perplexity(lm, lm.encode_prompt(prompt), different).tolist(), strict=True))
        for record, ids in zip(records, outputs, strict=True):
            record["perplexity"] = scores[tuple(ids)]
    return records
