"""The steering benchmark runs, compares equal things, and ends with its line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "steering.py"


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens")
    source = str(SCRIPT.parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--quick", "--threads", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": source},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["features_vs_paper_loop"] > 1
    assert found["features_vs_paper_loop_default"] > 1
    assert found["same_greedy_tokens"] == 1
    assert found["log_probability_error"] < 1e-5
    assert {p.name for p in tmp_path.iterdir()} == {"steering.json", "steering.png", "steering.svg"}
