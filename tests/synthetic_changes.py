"""Tables of what changed against null fine-tunes, with contents known by hand."""

from __future__ import annotations

import pandas as pd

NOTHING = float("nan")


def synthetic_changes(
    *, claimed: bool = True, n_nulls: int = 20, hostile: str = "</script>"
) -> dict[str, pd.DataFrame]:
    """Two groups beyond the nulls (none if not `claimed`), one within; the domain changed by 2.5."""
    names = [["symptom", "disease", hostile], ["treatment", "dose", "pills"], ["however", "but", "yet"]]
    scores, p = ([9.0, -7.5, 3.0], [0.0004, 0.002, 0.4]) if claimed else ([4.1, -3.0, 2.0], [0.2, 0.4, 0.9])
    return {
        "change_groups": pd.DataFrame(
            {
                "group": [1, 2, 3],
                "name": [", ".join(tokens) for tokens in names],
                "tokens": names,
                "features": [[0, 1, 2], [3], [4, 5]],
                "n_features": [3, 1, 2],
                "direction": ["more" if score > 0 else "less" for score in scores],
                "score": scores,
                "p": p,
                "q": p,
                "share": [0.1, 0.05, 0.02],
                "claimed": [claimed, claimed, False],
                "reason": "",
            }
        ),
        "declared_changes": pd.DataFrame(
            {
                "name": "medical",
                "basis": ["combined", "read"],
                "n_features": 12,
                "z": [2.5 if claimed else 0.1, 1.0],
                "null_low": -0.4,
                "null_high": 0.5,
                "p": [0.0002 if claimed else 0.8, 0.1],
                "reason": "",
            }
        ),
        "null_groups": pd.DataFrame(
            {
                "null": [f"null-{i}" for i in range(1, n_nulls + 1)],
                "highest": [4.0 + 0.05 * i for i in range(n_nulls)],
                "kl": 0.1,
            }
        ),
        "change_numbers": pd.DataFrame(
            {
                "name": ["kl", "perplexity general", "perplexity domain"],
                "base": [NOTHING, 20.0, 14.0],
                "tuned": [NOTHING, 19.8, 7.4],
                "change": [-1.0, -0.01, -0.64],
                "null_low": [-3.0, -0.05, -0.05],
                "null_high": [-2.0, 0.02, 0.02],
                "p": [0.001, 0.9, 0.0001],
                "reason": "",
            }
        ),
    }
