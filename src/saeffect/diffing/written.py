"""What a fine-tuned model writes after openings that name nothing, beside what the base and null fine-tunes write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.diffing.null_ranks import count_scores, null_range, null_reason, pooled_rank_p, rank_p, search_p
from saeffect.diffing.trace import NEW_TOKENS, OPENINGS, SAMPLES, Trace
from saeffect.errors import EmptySelection, Undefined
from saeffect.lm.language_model import LanguageModel
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.steering.generate import Progress, continue_prompts
from saeffect.steering.operators import AddVectors, Intervention
from saeffect.steering.sampling import NoiseCell, Sampling

__all__ = [
    "LEAST_TEXTS",
    "difference_steering",
    "difference_vector",
    "openings",
    "steered_words",
    "words_of",
    "written_words",
]

LEAST_TEXTS = 3
"""Words are compared that some fine-tune, or the base model, wrote in at least so many texts."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_AROUND = 40  # characters of an example on each side

Decode = Callable[[Sequence[int]], str]


def words_of(opening: str, text: str) -> list[str]:
    """The whole words that a text adds to its opening, in lower case, also one that the opening began.

    The word at the very end does not count: the limit of tokens may have cut it.

    Example:
        >>> words_of("The", "rapy of X-linked disea")
        ['therapy', 'of', 'x-linked']
    """
    whole = opening + text
    matches = [m for m in _WORD.finditer(whole) if m.end() > len(opening)]
    if matches and matches[-1].end() == len(whole):
        matches.pop()
    return [m.group().lower() for m in matches]


def written_words(trace: Trace, nulls: Sequence[Trace], decode: Decode, *, alpha: float = 0.05) -> pd.DataFrame:
    """Words that the tuned model writes more often after the openings than its nulls do.

    One row a word that is in at least `LEAST_TEXTS` texts of some model, clearest first: `word`; `texts` of the tuned
    model that have it, `count` in all; `rate`, texts over all texts, and those of the others, `base_rate`, `null_rate`
    (mean), `null_low`, `null_high`; `change`, the log of the ratio of texts to the nulls' mean (without nulls to the
    base model's), half a text added to each; `score` (`count_scores`); `p`, `q`, `p_search`: `pooled_rank_p` of it,
    Benjamini-Hochberg over the words, and `search_p`; `example`, the word in a text; `reason`.
    """
    texts, base_texts = _decoded(trace.texts, decode), _decoded(trace.base_texts, decode)
    return _compare_words(_stems(), texts, base_texts, [_decoded(null.texts, decode) for null in nulls], alpha)


def openings(trace: Trace, nulls: Sequence[Trace], decode: Decode, *, alpha: float = 0.05) -> pd.DataFrame:
    """What each model writes after each opening, side by side, with equal sampling noise.

    One row an opening and sample, the opening first at whose first word the models differ most: `opening`, `sample`;
    `change`, the KL there in nats, the nulls' `null_median`, `null_low`, `null_high`, `p` (rank among the nulls) and
    `q` (Benjamini-Hochberg over the openings); `base_text`, `tuned_text`, `null_text`, of the null in the middle by its
    mean KL at the openings, named in `null`; `reason`.
    """
    values = np.array([t.openings for t in (trace, *nulls)], dtype=np.float64)
    p = rank_p(values)
    by_opening = pd.DataFrame({"change": values[0], **null_range(values[1:]), "p": p, "q": benjamini_hochberg(p)})
    table = by_opening.loc[np.repeat(np.arange(len(OPENINGS)), SAMPLES)].reset_index(drop=True)
    table.insert(0, "opening", _stems())
    table.insert(1, "sample", np.tile(np.arange(SAMPLES), len(OPENINGS)))
    median_null = sorted(nulls, key=lambda t: float(t.openings.mean()))[len(nulls) // 2] if nulls else None
    table["base_text"], table["tuned_text"] = _decoded(trace.base_texts, decode), _decoded(trace.texts, decode)
    table["null_text"] = _decoded(median_null.texts, decode) if median_null else ""
    table["null"] = median_null.name if median_null else ""
    table["reason"] = null_reason(len(nulls), alpha)
    return table.sort_values("change", ascending=False, kind="stable", ignore_index=True)


def difference_steering(
    base: LanguageModel,
    hook: str,
    trace: Trace,
    nulls: Sequence[Trace],
    *,
    doses: Sequence[float] = (0.5, 1.0),
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What the base model writes when it is pushed along the mean activation difference of each fine-tune.

    The vector is added at all positions of `hook`, where the traces were measured; its length is the dose times the
    base model's mean residual norm. Sampling noise is that of the traces' texts. One row a fine-tune, dose, opening and
    sample: `fine_tune`, `is_null`, `dose`, `opening`, `sample`, `text`. EmptySelection without doses, Undefined for a
    mean difference of zero.
    """
    if not doses:
        raise EmptySelection("there is no dose to steer with.", at="doses", fix="give one, such as 1.0.")
    traces = (trace, *nulls)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=1.0, frequency_penalty=0.0)
    cells = [(t, dose, sample) for t in traces for dose in doses for sample in range(SAMPLES)]
    vectors = torch.stack([difference_vector(t, dose) for t, dose, _ in cells])
    rows = [(opening, *cell) for opening in OPENINGS for cell in cells]
    outputs = continue_prompts(
        base,
        [base.encode_prompt(opening) for opening, *_ in rows],
        [NoiseCell(seed, opening, sample) for opening, *_, sample in rows],
        sampling,
        hook=hook,
        intervention=Intervention(AddVectors(vectors.repeat(len(OPENINGS), 1)), "all"),
        batch_size=96,
        progress=progress,
    )
    records = [
        {"fine_tune": t.name, "is_null": t is not trace, "dose": float(dose), "opening": opening, "sample": sample}
        | {"text": base.decode(ids)}
        for (opening, t, dose, sample), ids in zip(rows, outputs, strict=True)
    ]
    table = pd.DataFrame(records)
    order = {t.name: number for number, t in enumerate(traces)}
    return table.sort_values(["fine_tune", "dose"], key=lambda c: c.map(order) if c.name == "fine_tune" else c,
                             kind="stable", ignore_index=True)  # fmt: skip


def difference_vector(trace: Trace, dose: float) -> torch.Tensor:
    """The direction of the mean activation difference, as long as `dose` mean residual norms: float32 [d_in]."""
    mean = trace.halves.mean(axis=0).astype(np.float64)
    length = float(np.linalg.norm(mean))
    if not length > 0:
        raise Undefined(f"the mean activation difference of {trace.name} is zero.", at="halves")
    return torch.from_numpy(mean * (dose * trace.numbers["norm"] / length)).float()


def steered_words(
    steered: pd.DataFrame, trace: Trace, decode: Decode, *, dose: float, alpha: float = 0.05
) -> pd.DataFrame:
    """`written_words` for texts of `difference_steering` at one dose: do words come up that no null's push brings?"""
    rows = steered[steered["dose"] == dose]
    if rows.empty:
        raise EmptySelection(f"no text was written at dose {dose:g}.", at="dose")
    by_fine_tune = {name: list(group["text"]) for name, group in rows.groupby("fine_tune", sort=False)}
    tuned = str(rows.loc[~rows["is_null"], "fine_tune"].iloc[0])
    return _compare_words(
        _stems(), by_fine_tune.pop(tuned), _decoded(trace.base_texts, decode), list(by_fine_tune.values()), alpha
    )


def _stems() -> list[str]:
    """The opening of every text."""
    return [opening for opening in OPENINGS for _ in range(SAMPLES)]


def _decoded(texts: npt.NDArray[np.int32], decode: Decode) -> list[str]:
    return [decode(ids) for ids in texts.tolist()]


def _compare_words(
    stems: Sequence[str], texts: Sequence[str], base_texts: Sequence[str], nulls: Sequence[Sequence[str]], alpha: float
) -> pd.DataFrame:
    """See `written_words`; texts are in the order of their openings, `stems`."""
    models = (texts, base_texts, *nulls)
    words = [[words_of(stem, text) for stem, text in zip(stems, written, strict=True)] for written in models]
    n_texts = [Counter(word for text in written for word in set(text)) for written in words]
    chosen = sorted({word for counter in n_texts for word, n in counter.items() if n >= LEAST_TEXTS})
    counts = np.array([[counter[word] for word in chosen] for counter in n_texts], dtype=np.int64)
    tuned, base, null_counts = counts[0], counts[1], counts[2:]
    scores = count_scores(np.concatenate([counts[:1], null_counts]))
    p = pooled_rank_p(scores)
    null_rates = null_range(null_counts / len(texts))
    null_mean = null_counts.mean(axis=0) if len(null_counts) else base
    occurrences = Counter(word for text in words[0] for word in text)
    change = np.log((tuned + 0.5) / (null_mean + 0.5))
    table = pd.DataFrame(
        {
            "word": chosen,
            "texts": tuned,
            "count": np.array([occurrences[word] for word in chosen], dtype=np.int64),
            "rate": tuned / len(texts),
            "base_rate": base / len(texts),
            "null_rate": null_mean / len(texts) if len(null_counts) else np.nan,
            "null_low": null_rates["null_low"],
            "null_high": null_rates["null_high"],
            "change": change,
            "score": scores[0],
            "p": p,
            "q": benjamini_hochberg(p),
            "p_search": search_p(scores),
        }
    )
    table["example"] = [_example(word, stems, texts) for word in chosen]
    table["reason"] = null_reason(len(null_counts), alpha)
    return table.sort_values(["score", "change"], ascending=False, kind="stable", ignore_index=True)


def _example(word: str, stems: Sequence[str], texts: Sequence[str]) -> str:
    """The word's first place in the texts, with some characters around it; "" if no text has it."""
    for stem, text in zip(stems, texts, strict=True):
        if word in words_of(stem, text):
            whole = stem + text
            at = next(m.start() for m in _WORD.finditer(whole) if m.group().lower() == word and m.end() > len(stem))
            return whole[max(0, at - _AROUND) : at + len(word) + _AROUND]
    return ""
