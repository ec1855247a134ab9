"""What a fine-tuned model writes after openings that name nothing, beside what the base and null fine-tunes write."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.diffing.null_ranks import (
    COUNTING_SEARCH,
    count_scores,
    null_range,
    null_reason,
    pooled_rank_p,
    rank_p,
    search_p,
)
from saeffect.diffing.trace import OPENINGS, SAMPLES, Trace, text_sampling
from saeffect.errors import EmptySelection, Undefined
from saeffect.lm.language_model import LanguageModel
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.steering.generate import generate
from saeffect.steering.operators import AddVectors, Intervention
from saeffect.steering.sampling import NoiseCell

__all__ = [
    "LEAST_TEXTS",
    "clearly_more",
    "difference_size",
    "difference_steering",
    "difference_vector",
    "openings",
    "steered_words",
    "words_in_texts",
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
    return words_in_texts(trace.texts, trace.base_texts, nulls, decode, alpha=alpha)


def words_in_texts(
    texts: npt.NDArray[np.int32],
    base_texts: npt.NDArray[np.int32],
    nulls: Sequence[Trace],
    decode: Decode,
    *,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """`written_words` of a trace that is not finished: what the tuned and the base model wrote, as in `Trace`."""
    models = [_decoded(ids, decode) for ids in (texts, base_texts, *(null.texts for null in nulls))]
    return _compare_words(_stems(), {math.nan: models}, alpha).drop(columns="dose")


def clearly_more(words: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """The rows of a table of words that come clearly more often than in nulls, by a p that counts the search. With 39
    nulls at 0.05, one of them may still reach as much.
    """
    # Of expected words p is small, too, for one that the nulls come to expect more than the fine-tune does.
    usual = words.get("null_median", 0.0)
    return words[(words["change"] > 0) & (words["change"] > usual) & (words["p_search"] <= alpha)]


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
    doses: Sequence[float] = (0.15,),
    samples: int = SAMPLES,
    done: Collection[str] = (),
) -> Iterator[pd.DataFrame]:
    """What the base model writes when it is pushed along the mean activation difference of each fine-tune.

    The vector is added at all positions of `hook`, where the traces were measured; its length is the dose times the
    base model's mean residual norm. Sampling noise is that of the traces' texts, of which the first `samples`
    of an opening are those without a push. One table an opening, but those `done`; one row a fine-tune, dose and
    sample: `fine_tune` ("" without a push), `is_null`, `dose` (0 without), `sample`, `size` (norm of the fine-tune's
    mean difference, in mean residual norms), `opening`, `text`. EmptySelection without doses, Undefined for a mean
    difference of zero.
    """
    if not doses:
        raise EmptySelection("there is no dose to steer with.", at="doses", fix="give one, such as 1.0.")
    cells = [(t, float(dose), sample) for t in (trace, *nulls) for dose in doses for sample in range(samples)]
    vectors = torch.stack([difference_vector(t, dose) for t, dose, _ in cells])
    labels = [(t.name, t is not trace, dose, sample, difference_size(t)) for t, dose, sample in cells]
    table = pd.DataFrame(
        [("", False, 0.0, sample, math.nan) for sample in range(samples)] + labels,
        columns=["fine_tune", "is_null", "dose", "sample", "size"],
    )
    for number, opening in enumerate(OPENINGS):
        if opening in done:
            continue
        outputs = generate(
            base,
            hook,
            base.encode_prompt(opening),
            [NoiseCell(0, opening, sample) for *_, sample in cells],
            text_sampling(),
            intervention=Intervention(AddVectors(vectors), "all"),
            batch_size=96,
        )
        unsteered = trace.base_texts[number * SAMPLES :][:samples].tolist()
        yield table.assign(opening=opening, text=[base.decode(ids) for ids in (*unsteered, *outputs)])


def difference_size(trace: Trace) -> float:
    """Norm of the mean activation difference, in mean residual norms of the base model."""
    return float(np.linalg.norm(trace.halves.mean(axis=0, dtype=np.float64))) / trace.numbers["norm"]


def difference_vector(trace: Trace, dose: float) -> torch.Tensor:
    """The direction of the mean activation difference, as long as `dose` mean residual norms: float32 [d_in]."""
    mean, size = trace.halves.mean(axis=0, dtype=np.float64), difference_size(trace)
    if not size > 0:
        raise Undefined(f"the mean activation difference of {trace.name} is zero.", at="halves", fix="leave it out.")
    return torch.from_numpy(mean * (dose / size)).float()


def steered_words(texts: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """`written_words` for the texts of `difference_steering`: which words come up more than by nulls' pushes?

    Words of all doses are one search: a row is a `dose` and word, and "base" is the base model without a push.
    """
    unsteered, pushed = texts[texts["dose"] == 0], texts[texts["dose"] > 0]
    if unsteered.empty or pushed.empty:
        raise EmptySelection("there are no texts with and without a push.", at="texts")
    by_dose: dict[float, list[Sequence[str]]] = {}
    for (is_null, dose, _), rows in pushed.groupby(["is_null", "dose", "fine_tune"], sort=False):
        models = by_dose.setdefault(float(dose), [[], list(unsteered["text"])])
        if is_null:
            models.append(list(rows["text"]))
        else:
            models[0] = list(rows["text"])
    return _compare_words(list(unsteered["opening"]), by_dose, alpha)


def _stems() -> list[str]:
    """The opening of every text."""
    return [opening for opening in OPENINGS for _ in range(SAMPLES)]


def _decoded(texts: npt.NDArray[np.int32], decode: Decode) -> list[str]:
    return [decode(ids) for ids in texts.tolist()]


def _compare_words(
    stems: Sequence[str], by_dose: Mapping[float, Sequence[Sequence[str]]], alpha: float
) -> pd.DataFrame:
    """See `written_words`, and `steered_words` for `dose`; texts of tuned, base, and nulls, in the order of `stems`."""
    frames, counted = zip(*(_count_words(stems, models) for models in by_dose.values()), strict=True)
    counts = np.concatenate(counted, axis=1)
    tuned, base, null_counts = counts[0], counts[1], counts[2:]
    scores = count_scores(np.concatenate([counts[:1], null_counts]))
    p = pooled_rank_p(scores)
    null_rates = null_range(null_counts / len(stems))
    null_mean = null_counts.mean(axis=0) if len(null_counts) else base
    words = pd.concat([frame.assign(dose=dose) for dose, frame in zip(by_dose, frames, strict=True)], ignore_index=True)
    table = pd.DataFrame(
        {
            "dose": words["dose"],
            "word": words["word"],
            "texts": tuned,
            "count": words["count"],
            "rate": tuned / len(stems),
            "base_rate": base / len(stems),
            "null_rate": null_mean / len(stems) if len(null_counts) else np.nan,
            "null_low": null_rates["null_low"],
            "null_high": null_rates["null_high"],
            "change": np.log((tuned + 0.5) / (null_mean + 0.5)),
            "score": scores[0],
            "p": p,
            "q": benjamini_hochberg(p),
            "p_search": search_p(scores),
            "example": words["example"],
            "reason": null_reason(len(null_counts), alpha, COUNTING_SEARCH),
        }
    )
    return table.sort_values(["score", "change"], ascending=False, kind="stable", ignore_index=True)


def _count_words(stems: Sequence[str], models: Sequence[Sequence[str]]) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
    """The words that are compared, with `count` and `example` in the first model's texts; texts that have each,
    [n_models, n_words].
    """
    words = [[words_of(stem, text) for stem, text in zip(stems, written, strict=True)] for written in models]
    n_texts = [Counter(word for text in written for word in set(text)) for written in words]
    chosen = sorted({word for counter in n_texts for word, n in counter.items() if n >= LEAST_TEXTS})
    occurrences = Counter(word for text in words[0] for word in text)
    count = np.array([occurrences[word] for word in chosen], dtype=np.int64)
    frame = pd.DataFrame({"word": chosen, "count": count, "example": [_example(w, stems, models[0]) for w in chosen]})
    counts = [[counter[word] for word in chosen] for counter in n_texts]
    return frame, np.array(counts, dtype=np.int64).reshape(len(models), len(chosen))


def _example(word: str, stems: Sequence[str], texts: Sequence[str]) -> str:
    """The word's first place in the texts, with some characters around it; "" if no text has it."""
    for stem, text in zip(stems, texts, strict=True):
        if word in words_of(stem, text):
            whole = stem + text
            at = next(m.start() for m in _WORD.finditer(whole) if m.group().lower() == word and m.end() > len(stem))
            return whole[max(0, at - _AROUND) : at + len(word) + _AROUND]
    return ""
