"""The registry of outcomes, and measures of generated texts, some by text vectors (of words, or the paper's
encoder).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.config_chat import Prompt, prompt_text
from saeffect.errors import BadFile, NotFound, UnknownName, unknown_name
from saeffect.features.embeddings import load_embeddings
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import normalise_token
from saeffect.paths import user_path
from saeffect.steering.prompt_pass import continuation_logits

__all__ = [
    "OUTCOMES",
    "MeanPooledEncoder",
    "Outcome",
    "RememberedVectors",
    "TextVectors",
    "distinct_2",
    "join_tokens",
    "keyword_score",
    "load_text_vectors",
    "measure_texts",
    "off_list_score",
    "outcome_named",
    "perplexity",
    "score_texts",
    "shuffled_references",
    "similarity",
    "text_words",
]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


Vector = npt.NDArray[np.floating]


class TextVectors(Protocol):
    """Anything that turns a text into one vector."""

    def mean_vector(self, text: str) -> Vector | None:
        """The vector of a text, `[dim]`; None if nothing in the text is known."""
        ...


class RememberedVectors:
    """Caches text vectors; vectors that already have a cache are used directly."""

    def __init__(self, vectors: TextVectors) -> None:
        self._vectors = vectors
        self._cache: dict[str, Vector | None] = vectors._cache if isinstance(vectors, RememberedVectors) else {}

    def mean_vector(self, text: str) -> Vector | None:
        if text not in self._cache:
            self._cache[text] = self._vectors.mean_vector(text)
        return self._cache[text]


class MeanPooledEncoder:
    """Last hidden states of an encoder, averaged over a text's tokens, special ones included (Gupta & Sica 2024).

    `name` is a hub id or folder of a model that transformers' AutoModel opens; sentence encoders that pool by the mean
    give their own vectors up to length. `NotFound`: neither a folder nor a model that can be downloaded; `BadFile`: no
    encoder with a tokenizer in the folder.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            missing = not Path(name).exists()
            kind = NotFound if missing else BadFile
            raise kind(
                f"no text encoder can be loaded from {name!r}: {str(error).splitlines()[0]}",
                at="embeddings",
                fix="give a hub id that can be reached, or a folder with model and tokenizer."
                if missing
                else "the folder needs config.json, a tokenizer, and safetensors weights (pickles are never loaded).",
            ) from error

    @torch.inference_mode()
    def mean_vector(self, text: str) -> Vector | None:
        """Float32 `[hidden_size]`; None for a text without tokens. Texts beyond the model's maximum length are cut."""
        longest = getattr(self._model.config, "max_position_embeddings", None)
        encoded = self._tokenizer(
            text, return_tensors="pt", truncation=longest is not None, max_length=longest, add_special_tokens=True
        )
        n_text_tokens = len(encoded["input_ids"][0]) - self._tokenizer.num_special_tokens_to_add()
        if not text.strip() or n_text_tokens < 1:
            return None
        hidden = self._model(**encoded).last_hidden_state[0].float()
        pooled: Vector = hidden.mean(dim=0).numpy()
        return pooled


def load_text_vectors(name: str) -> TextVectors:
    """Word vectors averaged, or else a mean-pooled encoder: `name` is "glove-wiki-gigaword-100", a vectors file, a
    folder of a transformers model, or a hub id. Errors as `load_embeddings` and `MeanPooledEncoder`.
    """
    if user_path(name, at="embeddings").is_dir():
        return MeanPooledEncoder(name)
    try:
        return load_embeddings(name)
    except (UnknownName, NotFound) as unknown:
        if Path(name).suffix in {".txt", ".vec", ".gz", ".bin", ".zip", ".npz", ".safetensors"}:
            raise
        try:
            return MeanPooledEncoder(name)
        except NotFound as error:
            raise type(unknown)(
                f"{unknown.message} Nor can a text encoder of that name be loaded: {error.message}",
                at="embeddings",
                fix="use a bundled name, a vectors file, or a model folder.",
            ) from error


def join_tokens(tokens: Sequence[str]) -> str:
    """Top tokens as one text: `["Ġtreatment", " drug", "▁dose"]` is "treatment drug dose"."""
    return " ".join(token.lstrip("Ġ▁ \t\n").rstrip() for token in tokens).strip()


def similarity(text: str, reference: str, vectors: TextVectors) -> float:
    """Cosine of a text and top tokens (see `join_tokens`), the paper's outcome; NaN where either has no direction."""
    units = []
    for words in (reference, text):
        vector = vectors.mean_vector(words)
        length = math.nan if vector is None else float(np.linalg.norm(vector))
        if vector is None or not (math.isfinite(length) and length > 0):
            return math.nan
        units.append(np.asarray(vector, dtype=np.float64) / length)
    return float(units[0] @ units[1])


def distinct_2(token_ids: Sequence[int]) -> float:
    """Share of distinct pairs among neighbouring tokens (Li et al. 2016); NaN for fewer than two tokens."""
    pairs = list(itertools.pairwise(token_ids))
    return len(set(pairs)) / len(pairs) if pairs else math.nan


@torch.inference_mode()
def perplexity(
    lm: LanguageModel, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]], *, batch_size: int = 16
) -> npt.NDArray[np.float64]:
    """exp of the mean negative log-probability (nats) of continuations of one prompt under the unsteered model:
    float64 `[n]`, at least 1; NaN for an empty continuation.
    """
    result = np.full(len(continuations), math.nan)
    # Equal lengths together: padding at the end is harmless under causal attention, but costs time.
    order = [i for i in np.argsort([len(c) for c in continuations], kind="stable") if len(continuations[i])]
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = max(len(continuations[i]) for i in batch)
        padded = [[*continuations[i], *[0] * (longest - len(continuations[i]))] for i in batch]
        logits = continuation_logits(lm, prompt_ids, torch.tensor(padded, device=lm.device))
        for row, i in enumerate(batch):
            targets = torch.tensor(list(continuations[i]), device=lm.device)
            loss = torch.nn.functional.cross_entropy(logits[row, : len(targets)], targets)
            result[i] = np.exp(loss.item())
    return result


def measure_texts(
    lm: LanguageModel,
    prompt: Prompt,
    outputs: Sequence[Sequence[int]],
    references: Sequence[str],
    vectors: TextVectors,
    *,
    with_prompt: bool = False,
) -> list[dict[str, Any]]:
    """Text, similarity to its reference, distinct2 and perplexity of each continuation (token ids) of a prompt.
    `with_prompt`: the similarity is that of prompt and text together, as in the paper.
    """
    # Features share the unsteered texts: each unique text is scored once.
    unique = list(dict.fromkeys(tuple(ids) for ids in outputs))
    perplexities = dict(zip(unique, perplexity(lm, lm.encode_prompt(prompt), unique).tolist(), strict=True))
    records: list[dict[str, Any]] = []
    for ids, reference in zip(outputs, references, strict=True):
        text = lm.decode(list(ids))
        scored = prompt_text(prompt) + text if with_prompt else text
        record = {"text": text, "similarity": similarity(scored, reference, vectors), "distinct2": distinct_2(ids)}
        records.append(record | {"perplexity": perplexities[tuple(ids)]})
    return records


def text_words(text: str) -> list[str]:
    """The words of a text, lower case; hyphens and apostrophes within a word stay."""
    return [word.replace("’", "'") for word in _WORD.findall(text.casefold())]


def keyword_score(text: str, top_tokens: Sequence[str]) -> float:
    """Share of a text's words that are one of the feature's top tokens; NaN if either has no words.

    Example:
        >>> keyword_score("Drug trials test a drug", [" drug", "Ġdose"])
        0.4
    """
    words, top_words = text_words(text), _token_words(top_tokens)
    return sum(word in top_words for word in words) / len(words) if words and top_words else math.nan


def off_list_score(text: str, top_tokens: Sequence[str], vocabulary: Collection[str]) -> float:
    """Share of a text's words that are in the domain's vocabulary but not among the feature's top tokens.

    Steering promotes the top tokens themselves, so only other domain words show a wider effect. Words that begin with a
    top token of three letters or more do not count either (" cardi" excludes "cardiac"). NaN without words or
    vocabulary.

    Example:
        >>> off_list_score("A drug for cancer patients", [" drug"], {"drug", "cancer"})
        0.2
    """
    words = text_words(text)
    if not words or not vocabulary:
        return math.nan
    top_words = _token_words(top_tokens)
    stems = tuple(token for token in top_words if len(token) >= 3)
    domain_words = (word for word in words if word in vocabulary)
    return sum(word not in top_words and not word.startswith(stems) for word in domain_words) / len(words)


def _token_words(top_tokens: Sequence[str]) -> set[str]:
    return {word for token in top_tokens if (word := normalise_token(token)) and any(map(str.isalnum, word))}


@dataclass(frozen=True)
class Outcome:
    """One outcome.

    Attributes:
        measures: Completes "the effect of steering on the ...".
        unit: Of effects. Shares ("share of ...") are percentages in reports.
        alternative: "greater" (one-sided), "less" (see `under`), or "two-sided" for side effects.
        score: Of (text, the feature's top tokens, the domain's words in lower case); None for `measure_texts`,
            `direct_effects`.
        column: Of the table; `name` if empty.
        direct: Whether the column is of `direct_effects` (one number a prompt), not of trials.
        logarithm: Whether effects are of the natural logarithm (perplexities, where the worst texts would dominate).
    """

    name: str
    label: str
    measures: str
    unit: str
    alternative: Literal["greater", "less", "two-sided"]
    score: Callable[[str, Sequence[str], Collection[str]], float] | None = None
    column: str = ""
    direct: bool = False
    logarithm: bool = False
    operator: str = "add"

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)

    def under(self, operator: str) -> Outcome:
        """The same outcome under an operator: with "ablate", outcomes that should rise should fall.

        Example:
            >>> outcome_named("similarity").under("ablate").alternative
            'less'
        """
        falls = operator == "ablate" and self.alternative == "greater"
        return replace(self, alternative="less" if falls else self.alternative, operator=operator)

    @property
    def is_share(self) -> bool:
        """Whether reports write it as a percentage, and its effects in percentage points."""
        return self.unit.startswith("share")

    @property
    def effect_unit(self) -> str:
        """The unit of effects in reports, such as "percentage points of words"."""
        if self.is_share:
            return self.unit.replace("share", "percentage points", 1)
        return f"{self.unit}: a difference of logarithms" if self.logarithm else self.unit


# fmt: off
_BUILT_IN = (
    Outcome("similarity", "similarity", "similarity of the text to its top tokens", "cosine", "greater"),
    Outcome("keyword_score", "keyword score", "share of its top tokens among the text's words", "share of words",
            "greater", score=lambda text, top_tokens, _: keyword_score(text, top_tokens)),
    Outcome("off_list", "off-list words", "share of off-list domain words in the text", "share of words", "greater",
            score=off_list_score),
    Outcome("direct_effect", "direct effect", "log-probability of its top tokens", "nats", "greater",
            column="delta_logprob", direct=True),
    Outcome("kl", "KL", "distance that the next token's distribution moved", "nats", "two-sided", direct=True),
    Outcome("perplexity", "perplexity", "logarithm of the text's perplexity", "nats a token", "two-sided",
            logarithm=True),
    Outcome("distinct2", "distinct-2", "share of different pairs of tokens in the text", "share of pairs", "two-sided"),
)
# fmt: on
OUTCOMES = {outcome.name: outcome for outcome in _BUILT_IN}
"""Every outcome by name, the usual primary one first; study files, tests and reports use new entries too."""


def outcome_named(name: str) -> Outcome:
    """The outcome of a name; `UnknownName` if there is none."""
    if name not in OUTCOMES:
        raise unknown_name("outcome", name, OUTCOMES, at="outcomes")
    return OUTCOMES[name]


def score_texts(
    trials: pd.DataFrame, features: pd.DataFrame, *, vectors: TextVectors, vocabulary: Collection[str], seed: int
) -> pd.DataFrame:
    """Add the outcomes that need no model to a table of trials (columns feature and text; a missing text has no
    score).

    `features` has columns feature and top_tokens, of all tested features; with a
    column members, sets that share a feature are not compared with each other. `vocabulary` holds the domain's words,
    lower case. Gives the trials with a column for each outcome that has a `score`, similarity_shuffled (to another
    feature's top tokens, see `shuffled_references`; NaN where undefined), and shuffled_feature (that feature, -1 for
    none).
    """
    top = {int(f): list(tokens) for f, tokens in zip(features["feature"], features["top_tokens"], strict=True)}
    cached = RememberedVectors(vectors)
    other_of = shuffled_references(list(top), seed)
    if "members" in features:
        members = {int(f): set(ids) for f, ids in zip(features["feature"], features["members"], strict=True)}
        other_of = {f: None if o is None or members[f] & members[o] else o for f, o in other_of.items()}
    reference = {f: None if o is None else join_tokens(top[o]) for f, o in other_of.items()}
    texts = list(zip(trials["feature"].tolist(), trials["text"].tolist(), strict=True))
    scores = {
        outcome.column: [
            outcome.score(text, top[f], vocabulary) if isinstance(text, str) else math.nan for f, text in texts
        ]
        for outcome in OUTCOMES.values()
        if outcome.score is not None
    }
    scores["similarity_shuffled"] = [
        similarity(text, words, cached) if isinstance(text, str) and (words := reference[f]) is not None else math.nan
        for f, text in texts
    ]
    scored = pd.DataFrame(scores, index=trials.index, dtype=np.float64)
    compared = trials["feature"].map({f: -1 if o is None else o for f, o in other_of.items()})
    return pd.concat([trials, scored], axis=1).assign(shuffled_feature=compared.astype(np.int64))


def shuffled_references(features: Sequence[int], seed: int) -> dict[int, int | None]:
    """For each feature another one at random, none twice; None if there is no other. Where texts are as similar to
    the top tokens of another domain feature, steering evokes at most the domain.

    Example:
        >>> shuffled_references([4, 9], seed=0), shuffled_references([4], seed=0)
        ({4: 9, 9: 4}, {4: None})
    """
    ordered = sorted(int(f) for f in features)
    if len(ordered) < 2:
        return dict.fromkeys(ordered, None)
    # The next one in a random cycle, so that no feature gets itself.
    cycle = np.random.default_rng([seed, 17]).permutation(ordered).tolist()
    return dict(sorted(zip(cycle, [*cycle[1:], cycle[0]], strict=True)))
