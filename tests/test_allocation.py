from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import Forked, script

FAULTS = """
import resource, sys, torch
from saeffect.parallel import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(10_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(told, faults())
"""


def _run(how: str) -> tuple[bool, int]:
    code, out, err = Forked(script, [FAULTS, how], {}).end()
    assert code == 0, err
    told, faults = out.split()
    return told == "True", int(faults)


def test_freed_memory_is_used_again() -> None:
    told, kept = _run("keep")
    if not told:
        pytest.skip("this C library cannot be told")
    # 40 MB are 9,766 pages of 4 kB, five times over; huge pages make it fewer.
    assert kept < 100 < _run("usual")[1]


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from saeffect import parallel

    monkeypatch.setattr(sys, "platform", "darwin")
    assert parallel.keep_freed_memory() is False


def test_limit_spinning_keeps_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from saeffect.parallel import limit_spinning

    for chosen, spins in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        monkeypatch.setattr(os, "environ", dict(chosen))
        limit_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == spins


LARGE = """
import torch
from saeffect.parallel import use_large_pages
use_large_pages()
x = torch.ones(20_000_000)
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def test_large_tensors_lie_on_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text(encoding="utf-8"):
        pytest.skip("this system has no large pages to give")
    source = str(Path(__file__).parents[1] / "src")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": source},
    )
    assert int(done.stdout) > 40_000, "kB of 80,000"
