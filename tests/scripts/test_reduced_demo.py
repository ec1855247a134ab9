"""The demo study, every stage of it on the real models, with less of everything."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from saeffect.io import read_json
from saeffect.study.run import stage_keys
from saeffect.study.study import Study


@pytest.mark.real
def test_every_stage_of_the_demo_runs(real_run: Path) -> None:
    done = read_json(real_run / "manifest.json")["stages"]
    assert set(done) == set(stage_keys(Study.open(real_run / "study.yaml")))
    assert (real_run / "report.html").stat().st_size > 100_000
    effects = pd.read_parquet(real_run / "arms" / "treatment" / "effects.parquet")
    assert len(effects) == 4
    assert pd.read_parquet(real_run / "comparison" / "contrasts.parquet")["estimate"].notna().any()
