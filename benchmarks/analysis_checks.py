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

Found = dict[str, dict[str, Tensor]]

_CHECKED = 256  # rows whose whole product is computed in float64
_LOOPED = 1_000  # features that the loop over pairs scores
_COHERENCE_ROUNDS = 5


def _some_rows(W_dec: Tensor) -> Tensor:
    return torch.linspace(0, len(W_dec) - 1, min(_CHECKED, len(W_dec))).long()


def check_top_tokens(W_dec: Tensor, W_U: Tensor, found: Found) -> dict[str, Any]:
    """Against every product of some rows in float64, rounded to float32 and sorted whole; and sides with each other.

    `exact_rows` counts rows in which ids and weights of both scales are right for every side. `torch_topk_rows` counts,
    for comparison, rows in which `torch.topk` of the float32 product names the same tokens in the same order.
    """
    checked = _some_rows(W_dec)
    lengths = W_U.double().norm(dim=0)
    right = torch.ones(len(checked), dtype=torch.bool)
    plain = torch.ones(len(checked), dtype=torch.bool)
    k = next(iter(found.values()))["dot_indices"].shape[1]
    for part in torch.arange(len(checked)).split(32):
        exact = W_dec[checked[part]].double() @ W_U.double()
        product = W_dec[checked[part]] @ W_U
        for name, values in (("dot", exact), ("cosine", exact / lengths)):
            weights, order = values.float().sort(dim=1, descending=True, stable=True)
            for side in found.values():
                right[part] &= (side[f"{name}_indices"][checked[part]] == order[:, :k]).all(1)
                right[part] &= (side[f"{name}_weights"][checked[part]] == weights[:, :k]).all(1)
            usual = product if name == "dot" else product / lengths.float()
            plain[part] &= (usual.topk(k, dim=1).indices == order[:, :k]).all(1)
    first, *others = found.values()
    fields = [f"{name}_{field}" for name in ("dot", "cosine") for field in ("indices", "weights")]
    return {
        "checked_rows": len(checked),
        "exact_rows": int(right.sum()),
        "torch_topk_rows": int(plain.sum()),
        "dtypes_agree": all(torch.equal(first[field], other[field]) for other in others for field in fields),
    }


def check_moments(W_dec: Tensor, W_U: Tensor, found: Found) -> dict[str, dict[str, float]]:
    """Largest error over some rows, against float64: relative for std and kurtosis, absolute for skewness, and for the
    mean in units of the standard deviation."""
    checked = _some_rows(W_dec)
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
    for side, ours in found.items():
        off = {field: ours[f"dot_{field}"][checked] for field in ("mean", "std", "skewness", "kurtosis")}
        errors[side] = {
            "mean": float(((off["mean"] - mean) / std).abs().max()),
            "std": float((off["std"] / std - 1).abs().max()),
            "skewness": float((off["skewness"] - skewness).abs().max()),
            "kurtosis": float((off["kurtosis"] / kurtosis - 1).abs().max()),
            "kurtosis_median": float((off["kurtosis"] / kurtosis - 1).abs().median()),
        }
    return errors


def coherence_times(found: dict[str, Tensor], d_vocab: int) -> dict[str, Any]:
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
    indices = found["cosine_indices"].tolist()
    features = pd.DataFrame(
        {
            "feature": np.arange(len(indices)),
            "top_tokens": [[strings[token] for token in row] for row in indices],
            "top_weights": found["cosine_weights"].tolist(),
        }
    )
    seconds = []
    for _ in range(_COHERENCE_ROUNDS):
        started = time.perf_counter()
        table = coherence(features, embeddings=vectors)
        seconds.append(time.perf_counter() - started)
    units = {
        word: vector / np.linalg.norm(vector) for word in vectors.words if (vector := _wide(vectors.get(word))).any()
    }
    some = features.head(_LOOPED)
    started = time.perf_counter()
    looped = [
        _by_pairs([(units.get(normalise_token(token)), w) for token, w in zip(tokens, weights, strict=True)])
        for tokens, weights in zip(some["top_tokens"], some["top_weights"], strict=True)
    ]
    loop = (time.perf_counter() - started) * len(features) / len(some)
    difference = np.abs(table["coherence"].head(_LOOPED).to_numpy() - np.array(looped))
    return {
        "n_features": len(features),
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "loop_over_pairs_seconds": loop,
        "loading_seconds": loading,
        "defined": int(table["coherence"].notna().sum()),
        "largest_difference_from_loop": float(np.nanmax(difference)),
    }


def _wide(vector: Any) -> np.ndarray:
    return np.asarray(vector, dtype=np.float64)


def _token_strings(words: list[str], d_vocab: int) -> list[str]:
    spellings = ("Ġ{}", "{}", "Ġ{}", "{}")
    strings = []
    for i in range(d_vocab):
        word = words[(i * 7) % len(words)]
        word = word.capitalize() if i % 5 == 0 else word
        strings.append(f"{word}~piece" if i % 4 == 3 else spellings[i % 4].format(word))
    return strings


def _by_pairs(items: list[tuple[np.ndarray | None, float]]) -> float:
    """Equation 1 as one would write it first."""
    known = [(unit, weight) for unit, weight in items if unit is not None]
    above = below = 0.0
    for i, (unit, weight) in enumerate(known):
        for other, other_weight in known[i + 1 :]:
            above += weight * other_weight * float(unit @ other)
            below += weight * other_weight
    return above / (below + 1e-8) if len(known) >= 2 else math.nan
