"""A made-up trace of a fine-tune, as small as can be."""

from __future__ import annotations

from typing import Any

import numpy as np

from saeffect.diffing.trace import OPENINGS, Trace

__all__ = ["made"]


def made(**changes: Any) -> Trace:
    """A trace of two rows of five tokens, four tokens, two layers, two dimensions."""
    kl = np.full((2, 5), 0.1, dtype=np.float32)
    kl[:, 0] = np.nan
    zeros = np.zeros((4, 0), dtype=np.float32)
    given: dict[str, Any] = {
        "name": "made",
        "made_by": "x",
        "read": zeros,
        "written": zeros,
        "expected": np.array([[0.25, 0.25, 0.25, 0.25]] * 2, dtype=np.float32),
        "positions": np.zeros((5, 2), dtype=np.float32),
        "halves": np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32),
        "early": np.array([[[3.0, 4.0]], [[3.0, 4.0]]], dtype=np.float32),
        "kl": kl,
        "layers": np.array([0.1, 0.2], dtype=np.float32),
        "texts": np.zeros((96, 2), dtype=np.int32),
        "base_texts": np.zeros((96, 2), dtype=np.int32),
        "openings": np.full(len(OPENINGS), 0.5, dtype=np.float32),
        "numbers": {"kl": 0.1, "n_tokens": 100.0, "norm": 10.0},
    }
    return Trace(**given | changes)
