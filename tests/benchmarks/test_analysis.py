"""The analysis benchmark runs, finds every checked row exact, and ends with its line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "analysis.py"


@pytest.mark.slow
def test_the_benchmark_on_small_matrices(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--quick", "--threads", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["coherence_24576_s"] > 0 and found["projection_vs_matmul"] > 0 and found["projection_peak_gb"] > 0
    assert found["exact_rows"] == found["checked_rows"] == 256
    assert found["dtypes_agree"] is True
    assert found["kurtosis_error"]["float32"] < 1e-5
    results = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert results["coherence"]["largest_difference_from_loop"] < 1e-9
    assert {p.name for p in tmp_path.iterdir()} == {"analysis.json", "analysis.png", "analysis.svg"}
