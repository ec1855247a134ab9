"""Histograms of activations that widen as they go, whose counts stay exact."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from saeffect.study.both_models import N_BINS, ActivationHistograms


def test_histograms_do_not_depend_on_how_tokens_come() -> None:
    generator = torch.Generator().manual_seed(0)
    acts = [torch.rand(400, 5, generator=generator) ** 3 * 10 - 1 for _ in range(2)]
    for one in acts:
        one[0, 0], one[0, 4] = 50.0, -1.0
        one[:, 4] = one[:, 4].clamp(max=0)
    whole = ActivationHistograms(5, 2)
    whole.update([one.relu() for one in acts])
    parts = ActivationHistograms(5, 2)
    for start in range(0, 400, 7):
        parts.update([one[start : start + 7].relu() for one in acts])
    a, b = whole.result(), parts.result()
    assert a["density"].tolist() == b["density"].tolist()
    for suffix, one in zip(("", "_beside"), acts, strict=True):
        for feature in range(5):
            values, top = one[:, feature].relu().double().numpy(), b["top"][feature]
            assert b[f"max_activation{suffix}"][feature] <= top or top == 0
            edges = np.arange(N_BINS + 1) * top / N_BINS
            bars = [int(((values > low) & (values <= high)).sum()) for low, high in itertools.pairwise(edges)]
            assert abs(np.array(bars) - np.array(b[f"counts{suffix}"][feature])).sum() <= 2  # rounding at an edge
            assert sum(b[f"counts{suffix}"][feature]) == int((values > 0).sum())
    assert np.isnan(b["mean_activation"][4]) and b["top"][4] == 0
