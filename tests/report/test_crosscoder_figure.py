from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import Undefined
from saeffect.report.figures.learned import latent_scaling


def _table(seed: int, n_changed: int = 0) -> pd.DataFrame:
    lean = np.random.default_rng(seed).normal(0, 0.05, 400)
    lean[:n_changed] = 0.9
    return pd.DataFrame({"lean": lean, "chance": 0.05})


def test_the_title_counts_what_is_outside() -> None:
    figure = latent_scaling(_table(0, 30), [_table(1), _table(2)])
    axes = figure.axes[0]
    n_outside = int(axes.get_title().split()[0])
    assert 30 <= n_outside < 70
    assert axes.get_title().endswith("of 400 features outside, 20 expected by chance")
    assert len(axes.lines) == 2


def test_without_nulls_nothing_is_called() -> None:
    axes = latent_scaling(_table(0), []).axes[0]
    assert not axes.lines and not axes.get_title()


def test_nothing_to_draw(complains: Callable[..., Any]) -> None:
    with complains(Undefined, "no feature of the crosscoder fires"):
        latent_scaling(_table(0).assign(lean=np.nan), [])
