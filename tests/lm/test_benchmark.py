"""The harvest benchmark runs, compares equal things, and ends with its line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saeffect.lm.language_model import LanguageModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "harvest.py"), "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["harvest_vs_sae_lens_float32"] > 0
    assert found["harvest_vs_sae_lens_defaults"] > 0
    assert 0 < found["equal_to_sae_lens_rel"] < 1e-5
    assert {p.name for p in tmp_path.iterdir()} == {"harvest.json", "harvest.png", "harvest.svg"}


@pytest.mark.slow
@pytest.mark.real
def test_bfloat16_hardly_changes_explained_variance(real_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bfloat16_bound import bfloat16_bound

    found = bfloat16_bound(n_rows=2, rows_a_pass=1)
    assert 0.5 < found["explained_variance"]["float32"] < 1
    assert 0 < abs(found["change"]) < 0.002
    assert 0 < found["error_share_of_variance"] < 0.002
