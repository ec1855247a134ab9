"""Where fine-tuning changed a model: at which layers and positions, on which words of a text, and how it now writes.

In: the trace of a fine-tune and those of null fine-tunes of the same recipe. Out: tables whose p rank the fine-tune
among its nulls (`null_ranks`). Without nulls, p is NaN with the reason; the other numbers are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from saeffect.diffing.matched_null import strata
from saeffect.diffing.null_ranks import (
    COUNTING_SEARCH,
    null_range,
    null_reason,
    pooled_rank_p,
    rank_p,
    rise_scores,
    search_p,
)
from saeffect.diffing.trace import Trace
from saeffect.diffing.written import difference_size, openings, written_words
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.activations import TokenRows
from saeffect.lm.architectures import heads_to_residual, unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.stats.arguments import FloatArray
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = [
    "LEAST_SEEN",
    "activation_difference",
    "change_by_layer",
    "change_by_word",
    "change_in_text",
    "change_overall",
    "where_changed",
]

LEAST_SEEN = 5
"""A word is tested if it is in the text this often, or if the mean of its expected number is at least 1."""

_ALL = "all"
_TOP = 10  # tokens of a direction
_STRATUM = 100  # fewest words of like frequency whose deviations are averaged
_LEAST_KL = 1e-4  # nats; smaller divergences count as this
_N_PASSAGES, _CONTEXT = 20, 12  # passages of the text, and tokens shown on each side


def where_changed(
    trace: Trace, nulls: Sequence[Trace], rows: TokenRows, tuned: LanguageModel, hook: str, *, alpha: float = 0.05
) -> dict[str, pd.DataFrame]:
    """All tables, by name: see the function of the same name for the columns.

    `rows` is the text that the traces (and those of null fine-tunes, perhaps none) read; `tuned` the fine-tuned model:
    its norm, head and tokenizer; `hook` where the traces were taken. `alpha` only decides what the reasons say.
    ShapeMismatch for traces of other rows.
    """
    if trace.kl.shape != rows.ids.shape:
        raise ShapeMismatch(
            f"the traces read rows of shape {list(trace.kl.shape)}. Got {list(rows.ids.shape)}.", at="rows"
        )
    tokens, plain = np.array(tuned.token_strings(), dtype=object), tuned.plain_tokens().numpy()
    try:
        top_of, no_tokens_reason = _top_tokens(unembedding(tuned), tokens, plain), ""

        def top_tokens(vector: FloatArray, /) -> list[str]:
            row = torch.from_numpy(vector.astype(np.float32))[None]
            return top_of(heads_to_residual(tuned, hook, row)[0].cpu().numpy())

    except ConfigError as error:  # the final norm or head is no matrix
        top_tokens, no_tokens_reason = _no_tokens, f"no top tokens: {error.message}"
    difference = activation_difference(trace, nulls, _source_of_halves(rows), top_tokens=top_tokens, alpha=alpha)
    if no_tokens_reason:
        difference["reason"] = no_tokens_reason
    return {
        "change_overall": change_overall(trace, nulls, alpha=alpha),
        "change_by_layer": change_by_layer(trace, nulls, alpha=alpha),
        "activation_difference": difference,
        "change_by_word": change_by_word(trace, nulls, rows.ids, tokens, plain, alpha=alpha),
        "change_in_text": change_in_text(trace, nulls, rows.ids, tuned.decode, alpha=alpha),
        "written_words": written_words(trace, nulls, tuned.decode, alpha=alpha),
        "openings": openings(trace, nulls, tuned.decode, alpha=alpha),
    }


def change_overall(trace: Trace, nulls: Sequence[Trace], *, alpha: float = 0.05) -> pd.DataFrame:
    """How much changed overall, beside what a fine-tune of this recipe always changes.

    One row a `quantity`: mean KL after a token of the text, and at the first token after the openings (nats); mean over
    layers of the relative change; norm of the mean change at the hook, over the mean residual norm. `change`, its
    nulls' `null_median`, `null_low`, `null_high`, `p` (rank among the nulls), `reason`.
    """
    quantities: dict[str, Callable[[Trace], float]] = {
        "divergence on text": lambda t: t.numbers["kl"],
        "divergence after openings": lambda t: float(t.openings.mean()),
        "residual stream": lambda t: float(t.layers.mean()),
        "mean difference": difference_size,
    }
    values = np.array([[measure(t) for measure in quantities.values()] for t in (trace, *nulls)])
    table = pd.DataFrame({"quantity": list(quantities), "change": values[0], **null_range(values[1:])})
    return table.assign(p=rank_p(values), reason=null_reason(len(nulls), alpha))


def change_by_layer(trace: Trace, nulls: Sequence[Trace], *, alpha: float = 0.05) -> pd.DataFrame:
    """How much each layer's residual stream changed.

    One row a block: `layer` (from 0); `change`, the root mean square change of the stream after it, relative to the
    base model's; the nulls' `null_median`, `null_low`, `null_high`; `ratio` to the nulls' median; `p` (rank among the
    nulls) and `q` (Benjamini-Hochberg over layers); `reason`.
    """
    values = np.array([t.layers for t in (trace, *nulls)], dtype=np.float64)
    table = pd.DataFrame({"layer": np.arange(values.shape[1]), "change": values[0], **null_range(values[1:])})
    table["ratio"] = table["change"] / table["null_median"].where(table["null_median"] > 0)
    p = rank_p(values)
    return table.assign(p=p, q=benjamini_hochberg(p), reason=null_reason(len(nulls), alpha))


TopTokens = Callable[[FloatArray], list[str]]
"""Maps a direction `[d_in]` to the tokens that it promotes most through the tuned model's final norm and head."""


def _no_tokens(vector: FloatArray) -> list[str]:
    del vector
    return []


def activation_difference(
    trace: Trace,
    nulls: Sequence[Trace],
    source_of_halves: Sequence[str] = (),
    *,
    top_tokens: TopTokens = _no_tokens,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """The mean of tuned minus base activations at the hook, over the text: what shows there although the text has
    nothing to do with the fine-tuning, if it has not (Minder et al. 2025).

    One row a position, first "all" of them, and where sources of text alternate, so that each half is one of them
    (`source_of_halves`), a row for each, over all positions: `position`; `text`, the source, "" for all; `size`, the
    norm of the mean difference over the base model's mean residual norm; `reliability`, the cosine of the means over
    two halves of the text (NaN for a half); `likeness`, the cosine with the mean of the nulls' differences: near 1, it
    is what the recipe always does. Of each the nulls' median, `null_<name>`, and `p_<name>`, the rank among the nulls
    (low likenesses are extreme). `top_tokens`; `beyond_nulls`, the same after the direction of the nulls' mean is
    projected out; `reason`.
    """
    traces = (trace, *nulls)
    parts: list[tuple[str, str, list[npt.NDArray[np.float32]]]] = [(_ALL, "", [t.halves for t in traces])]
    parts += [(str(i + 1), "", [t.early[:, i] for t in traces]) for i in range(trace.early.shape[1])]
    parts += [(_ALL, name, [t.halves[[half]] for t in traces]) for half, name in enumerate(source_of_halves)]
    records = []
    for position, text, arrays in parts:
        halves = np.array(arrays, dtype=np.float64)
        vectors = halves.mean(axis=1)
        sizes = np.linalg.norm(vectors, axis=1) / [t.numbers["norm"] for t in traces]
        reliabilities = np.array([math.nan if text else _cosine(*pair) for pair in halves])
        others_mean = (vectors.sum(axis=0) - vectors) / max(len(nulls), 1)  # mean of the other fine-tunes
        likenesses = np.array([_cosine(*pair) for pair in zip(vectors, others_mean, strict=True)])
        common = vectors[1:].mean(axis=0) if nulls else np.zeros_like(vectors[0])
        record: dict[str, Any] = {"position": position, "text": text}
        for name, values in (("size", sizes), ("reliability", reliabilities), ("likeness", likenesses)):
            record |= {name: values[0], f"null_{name}": float(np.median(values[1:])) if nulls else np.nan}
            record[f"p_{name}"] = float(rank_p(-values if name == "likeness" else values))
        changed = sizes[0] > 0
        beyond = vectors[0] - common * (common @ vectors[0]) / max(float(common @ common), 1e-30)
        record["top_tokens"] = top_tokens(vectors[0]) if changed else []
        record["beyond_nulls"] = top_tokens(beyond) if changed and nulls else []
        record["reason"] = null_reason(len(nulls), alpha) if changed else "nothing changed here"
        records.append(record)
    return pd.DataFrame(records)


def _source_of_halves(rows: TokenRows) -> tuple[str, ...]:
    """The sources of the even and of the odd rows, if each of these halves is of one, and they differ; else ()."""
    halves = [np.unique(rows.sources[half::2]) for half in (0, 1)]
    if any(len(half) != 1 for half in halves) or halves[0] == halves[1]:
        return ()
    return tuple(rows.names[int(half[0])] for half in halves)


def change_by_word(
    trace: Trace,
    nulls: Sequence[Trace],
    ids: npt.NDArray[np.int32],
    tokens: npt.NDArray[Any],
    plain: npt.NDArray[np.bool_],
    *,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """On which words predictions changed, and which words are expected more or less often. `ids` [n_rows, context_size]
    are the text, `tokens` [d_vocab] the token strings, `plain` bool [d_vocab] those that text may have.

    One row a role and token, clearest first in each role: role: "read": what follows this token; it is in the text at
    least `LEAST_SEEN` times. "expected": how probable this token is as the next one; in some fine-tune it is expected
    at least once in the text. token_id, token, n, base, tuned: `n`, how often the text has it, or the base model
    expects it; mean probabilities. change, unit: For "read", mean KL after it, nats. For "expected", log of the ratio
    of expected numbers, half a token added to each. null_median, null_low, null_high: the nulls' own. score: Above the
    other fine-tunes' mean, over the mean deviation of words of like frequency; unsigned if "expected". p, q, p_search:
    `pooled_rank_p` of the score, Benjamini-Hochberg over the role's words, and `search_p`. focus, p_focus, reason: For
    "read", the KL over the mean KL of all words, its `search_p`; why nothing can be found.
    """
    traces = (trace, *nulls)
    read = _kl_by_token(traces, ids)
    expected = _expected_by_token(traces, plain)
    frames = []
    for role, unit, words in (("read", "nats", read), ("expected", "log ratio", expected)):
        values, n = words["values"], words["n"]
        stratum = strata(words["by"][:, None], _STRATUM) if len(n) else np.zeros(0, dtype=np.int64)
        scores = rise_scores(values, stratum)
        if role == "expected":
            scores = np.abs(scores)
        shown = np.exp(values) if role == "read" else values
        p = pooled_rank_p(scores)
        frame = pd.DataFrame(
            {
                "role": role,
                "token_id": words["ids"],
                "token": tokens[words["ids"]],
                "n": n,
                "base": words.get("base", np.nan),
                "tuned": words.get("tuned", np.nan),
                "change": shown[0],
                "unit": unit,
                **null_range(shown[1:]),
                "score": scores[0],
                "p": p,
                "q": benjamini_hochberg(p),
                "p_search": search_p(scores),
                "focus": np.nan,
                "p_focus": np.nan,
            }
        )
        if role == "read":
            overall = np.array([np.log(max(t.numbers["kl"], _LEAST_KL)) for t in traces])
            focus = values - overall[:, None]
            frame["focus"] = np.exp(focus[0])
            frame["p_focus"] = search_p(rise_scores(focus, stratum))
        by = "score" if nulls else "change"
        frames.append(frame.sort_values(by, ascending=False, key=np.abs, kind="stable"))
    return pd.concat(frames, ignore_index=True).assign(reason=null_reason(len(nulls), alpha, COUNTING_SEARCH))


def _kl_by_token(traces: Sequence[Trace], ids: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Log of the mean KL after each token that the text has often enough, [n_traces, n_words]."""
    counted = ~np.isnan([t.kl for t in traces]).any(axis=0)
    token_ids, code, n = np.unique(ids[counted], return_inverse=True, return_counts=True)
    often = n >= LEAST_SEEN
    sums = np.array([np.bincount(code, weights=t.kl[counted], minlength=len(token_ids)) for t in traces])
    means = sums[:, often] / n[often]
    return {"ids": token_ids[often], "n": n[often], "by": n[often], "values": np.log(np.maximum(means, _LEAST_KL))}


def _expected_by_token(traces: Sequence[Trace], plain: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Log ratio of the expected numbers of each token, [n_traces, n_words], half a token added to each number."""
    numbers = np.array([t.expected * t.numbers["n_tokens"] for t in traces], dtype=np.float64)  # [n_traces, 2, d_vocab]
    ids = np.flatnonzero((numbers.max(axis=(0, 1)) >= 1) & plain)
    numbers = numbers[:, :, ids]
    base, tuned = traces[0].expected[:, ids].astype(np.float64)
    values = np.log((numbers[:, 1] + 0.5) / (numbers[:, 0] + 0.5))
    return {
        "ids": ids,
        "n": numbers[0, 0],
        "by": numbers.mean(axis=(0, 1)),
        "values": values,
        "base": base,
        "tuned": tuned,
    }


def change_in_text(
    trace: Trace,
    nulls: Sequence[Trace],
    ids: npt.NDArray[np.int32],
    decode: Callable[[Sequence[int]], str],
    *,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """The tokens of the text after which the models' predictions differ most, beyond their difference in the nulls.

    At most 20 rows, no two within a few tokens of each other: `row`, `position`; `before`, `token`, `after`, the text
    around; `change`, the KL after the token in nats; the nulls' `null_median`, `null_low`, `null_high` at this place;
    `p_search` of the change beyond the mean of the other fine-tunes; `reason`.
    """
    values = np.array([t.kl for t in (trace, *nulls)], dtype=np.float64)
    n_columns = values.shape[2]
    values = values.reshape(len(values), -1)
    scores = rise_scores(values, np.zeros(values.shape[1], dtype=np.int64))
    p = search_p(scores)
    missing = np.isnan(values).any(axis=0)
    ranking = np.where(missing, -np.inf, scores[0] if nulls else values[0])
    ordered = np.argsort(-ranking, kind="stable")[: int((~missing).sum())]
    ranges = null_range(values[1:])
    chosen: list[int] = []
    for cell in ordered:
        if all(cell // n_columns != t // n_columns or abs(cell - t) > _CONTEXT for t in chosen):
            chosen.append(int(cell))
        if len(chosen) == _N_PASSAGES:
            break
    records = []
    for cell in chosen:
        row, position = divmod(cell, n_columns)
        text = [int(i) for i in ids[row]]
        records.append(
            {
                "row": row,
                "position": position,
                "before": decode(text[max(0, position - _CONTEXT) : position]),
                "token": decode(text[position : position + 1]),
                "after": decode(text[position + 1 : position + 1 + _CONTEXT // 2]),
                "change": values[0, cell],
                **{name: column[cell] for name, column in ranges.items()},
                "p_search": p[cell],
                "reason": null_reason(len(nulls), alpha),
            }
        )
    columns = ["row", "position", "before", "token", "after", "change", *ranges, "p_search", "reason"]
    return pd.DataFrame(records, columns=columns)


def _cosine(a: FloatArray, b: FloatArray) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else np.nan


def _top_tokens(W_U: Tensor, tokens: npt.NDArray[Any], plain: npt.NDArray[np.bool_]) -> TopTokens:
    """Ranks by the cosine with each token's unembedding; by the product, rare tokens of large norm lead every list."""
    table = W_U.numpy()
    norms = np.maximum(np.linalg.norm(table, axis=0), 1e-12)

    def top(vector: FloatArray) -> list[str]:
        scores = np.where(plain, (vector.astype(np.float32) @ table) / norms, -np.inf)
        return [str(token) for token in tokens[np.argsort(-scores, kind="stable")[:_TOP]]]

    return top
