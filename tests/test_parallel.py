"""How processes wait for each other, with two real ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from processes import Forked, ranks, script
from saeffect.errors import ConfigError, Interrupted
from saeffect.parallel import _translate_peer_loss, barrier, from_first, rank_and_world

# PyTorch's own group gives up after two seconds. The first process takes four.
SCRIPT = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from saeffect.parallel import barrier, from_first, is_first, leave
dist.init_process_group("gloo", timeout=timedelta(seconds=2))
barrier()
if is_first():
    time.sleep(4)
    if sys.argv[1] == "gone":
        sys.exit(7)
print(from_first("steer é\\n1" if is_first() else "no"))
barrier()
print(repr(from_first("")))
leave()
"""


def start(how: str) -> list[Forked]:
    return [Forked(script, [SCRIPT, how], variables) for variables in ranks(2)]


def test_processes_outwait_pytorch_timeout() -> None:
    for process in start("well"):
        code, heard, said = process.end()
        assert code == 0, said
        assert heard == "steer é\n1\n''\n"


def test_waiting_for_dead_process_is_an_error() -> None:
    first, second = start("gone")
    code, _, said = second.end()
    assert code != 0
    assert "this process stops because another one of the same run did" in said
    assert first.end()[0] == 7


def test_single_process_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    barrier()
    assert from_first("steer") == "steer"
    assert from_first() == ""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="do not fit"):
        rank_and_world()


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:61234",
        "Application timeout caused pair closure: Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error in: ../ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL 2.21.5",
    ],
)
def test_lost_connection_means_peer_stopped(said):
    with pytest.raises(Interrupted, match="another one of the same run"), _translate_peer_loss():
        raise RuntimeError(said)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
    ],
)
def test_own_errors_are_not_translated(error):
    with pytest.raises(type(error), match=r"enforce fail|out of memory") as caught, _translate_peer_loss():
        raise error
    assert caught.value is error


CHILD = """
import sys, time
from saeffect.parallel import end_with_launcher
end_with_launcher()
print("started", flush=True)
time.sleep(1 if "TORCHELASTIC_RUN_ID" not in __import__("os").environ else 60)
print("still there", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize(("by_torchrun", "said"), [(True, ""), (False, "still there\n")])
def test_processes_end_with_a_killed_torchrun(by_torchrun: bool, said: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    env |= {"TORCHELASTIC_RUN_ID": "x"} if by_torchrun else {}
    command = [sys.executable, "-c", LAUNCHER, CHILD]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "started\n"
        launcher.kill()
        assert launcher.stdout.read() == said  # comes when the child has ended
