"""Are the top tokens exact, are the moments right, and how long do coherence scores take?"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = ["check_moments", "check_top_tokens", "coherence_times"]

BySide = dict[str, dict[str, Tensor]]

_CHECKED = 256  # rows whose whole product is computed in float64
_LOOPED = 1_000  # features that the loop over pairs scores
_COHERENCE_ROUNDS = 5


def _checked_rows(W_dec: Tensor) -> Tensor:
    return torch.linspace(0, len(W_dec) - 1, min(_CHECKED, len(W_dec))).long()


def check_top_tokens(W_dec: Tensor, W_U: Tensor, by_side: BySide) -> dict[str, Any]:
    """Against every product of some rows in float64, rounded to float32 and sorted whole; and sides with each other.

    `exact_rows` counts rows in which ids and weights of both scales are right for every side. `torch_topk_rows` counts,
    for comparison, rows in which `torch.topk` of the float32 product names the same tokens in the same order.
    """
    checked = _checked_rows(W_dec)
    lengths = W_U.double().norm(dim=0)
    exact_rows = torch.ones(len(checked), dtype=torch.bool)
    topk_rows = torch.ones(len(checked), dtype=torch.bool)
    k = next(iter(by_side.values()))["dot_indices"].shape[1]
    for part in torch.arange(len(checked)).split(32):
        exact = W_dec[checked[part]].double() @ W_U.double()
        product = W_dec[checked[part]] @ W_U
        for name, values in (("dot", exact), ("cosine", exact / lengths)):
            weights, order = values.float().sort(dim=1, descending=True, stable=True)
            for side in by_side.values():
                exact_rows[part] &= (side[f"{name}_indices"][checked[part]] == order[:, :k]).all(1)
                exact_rows[part] &= (side[f"{name}_weights"][checked[part]] == weights[:, :k]).all(1)
            scores = product if name == "dot" else product / lengths.float()
            topk_rows[part] &= (scores.topk(k, dim=1).indices == order[:, :k]).all(1)
    first, *others = by_side.values()
    fields = [f"{name}_{field}" for name in ("dot", "cosine") for field in ("indices", "weights")]
    return {
        "checked_rows": len(checked),
        "exact_rows": int(exact_rows.sum()),
        "torch_topk_rows": int(topk_rows.sum()),
        "dtypes_agree": all(torch.equal(first[field], other[field]) for other in others for field in fields),
    }


def check_moments(W_dec: Tensor, W_U: Tensor, by_side: BySide) -> dict[str, dict[str, float]]:
    """Largest error over some rows, against float64: relative for std and kurtosis, absolute for skewness, and for the
    mean in units of the standard deviation."""
    checked = _checked_rows(W_dec)
    parts = []
    for rows in checked.split(32):
        exact = W_dec[rows].double() @ W_U.double()
        mean = exact.mean(1, keepdim=True)
        deviation = exact - mean
        std = deviation.square().mean(1, keepdim=True).sqrt()
        standard = deviation / std
        parts.append(torch.stack([mean[:, 0], std[:, 0], standard.pow(3).mean(1), standard.pow(4).mean(1)]))
    mean, std, skewness, kurtosis = torch.cat(parts, dim=1)
    errors = {}
    for side, tensors in by_side.items():
        moments = {field: tensors[f"dot_{field}"][checked] for field in ("mean", "std", "skewness", "kurtosis")}
        errors[side] = {
            "mean": float(((moments["mean"] - mean) / std).abs().max()),
            "std": float((moments["std"] / std - 1).abs().max()),
            "skewness": float((moments["skewness"] - skewness).abs().max()),
            "kurtosis": float((moments["kurtosis"] / kurtosis - 1).abs().max()),
            "kurtosis_median": float((moments["kurtosis"] / kurtosis - 1).abs().median()),
        }
    return errors


def coherence_times(tensors: dict[str, Tensor], d_vocab: int) -> dict[str, Any]:
    """Seconds for the coherence of every feature, and of a loop over pairs scaled up from some of them.

    Token strings are words of the bundled GloVe in the spellings that tokenizers have, and one in four a piece of a
    word, which GloVe does not know.
    """
    from saeffect.features.coherence import coherence
    from saeffect.features.embeddings import load_embeddings
    from saeffect.lm.tokens import normalise_token

    started = time.perf_counter()
    vectors = load_embeddings()
    loading = time.perf_counter() - started
    strings = _token_strings(list(vectors.words), d_vocab)
    indices = tensors["cosine_indices"].tolist()
    features = pd.DataFrame(
        {
            "feature": np.arange(len(indices)),
            "top_tokens": [[strings[token] for token in row] for row in indices],
            "top_weights": tensors["cosine_weights"].tolist(),
        }
    )
    seconds = []
    for _ in range(_COHERENCE_ROUNDS):
        started = time.perf_counter()
        table = coherence(features, embeddings=vectors)
        seconds.append(time.perf_counter() - started)
    float64 = {word: np.asarray(vectors.get(word), dtype=np.float64) for word in vectors.words}
    units = {word: vector / np.linalg.norm(vector) for word, vector in float64.items() if vector.any()}
    sample = features.head(_LOOPED)
    started = time.perf_counter()
    loop_scores = [
        _by_pairs([(units.get(normalise_token(token)), w) for token, w in zip(tokens, weights, strict=True)])
        for tokens, weights in zip(sample["top_tokens"], sample["top_weights"], strict=True)
    ]
    loop = (time.perf_counter() - started) * len(features) / len(sample)
    difference = np.abs(table["coherence"].head(_LOOPED).to_numpy() - np.array(loop_scores))
    return {
        "n_features": len(features),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "loop_over_pairs_seconds": loop,
        "loading_seconds": loading,
        "defined": int(table["coherence"].notna().sum()),
        "largest_difference_from_loop": float(np.nanmax(difference)),
    }


def _token_strings(words: list[str], d_vocab: int) -> list[str]:
    spellings = ("Ġ{}", "{}", "Ġ{}", "{}")
    strings = []
    for i in range(d_vocab):
        word = words[(i * 7) % len(words)]
        word = word.capitalize() if i % 5 == 0 else word
        strings.append(f"{word}~piece" if i % 4 == 3 else spellings[i % 4].format(word))
    return strings


def _by_pairs(items: list[tuple[np.ndarray | None, float]]) -> float:
    """Equation 1 as a plain loop over pairs."""
    pairs = [(unit, weight) for unit, weight in items if unit is not None]
    numerator = denominator = 0.0
    for i, (unit, weight) in enumerate(pairs):
        for other, other_weight in pairs[i + 1 :]:
            numerator += weight * other_weight * float(unit @ other)
            denominator += weight * other_weight
    return numerator / (denominator + 1e-8) if len(pairs) >= 2 else math.nan
