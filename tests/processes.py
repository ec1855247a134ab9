"""Processes of their own for commands and scripts, forked from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

__all__ = ["Forked", "command", "free_port", "ranks", "script", "server"]

_TESTS = Path(__file__).parent
_MODULES = [
    "training_process",
    "processes",
    "saeffect.cli.app",
    "saeffect.study.run",
    "safetensors.torch",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "matplotlib.font_manager",
    "wandb",
]


def server() -> ForkServerContext:
    """What starts processes. The server finds modules by PYTHONPATH alone."""
    forkserver.set_forkserver_preload(_MODULES)
    with_paths = os.pathsep.join(str(folder) for folder in (_TESTS, _TESTS / "sae", _TESTS.parent / "src"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = with_paths
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ranks(n_processes: int) -> list[dict[str, str]]:
    """The variables that torchrun would set, for each of its processes."""
    place = {"WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **place} for rank in range(n_processes)]


class Forked:
    """A process that does this work with these arguments and environment variables."""

    def __init__(
        self, work: Callable[[list[str]], int], arguments: Sequence[str | Path], variables: Mapping[str, str]
    ) -> None:
        self._said = [Path(tempfile.mkdtemp()) / name for name in ("out", "err")]
        for path in self._said:
            path.touch()
        given = (work, [str(argument) for argument in arguments], dict(variables), self._said)
        self.process = server().Process(target=_work, args=given)
        self.process.start()

    def wait_until(self, true: Callable[[], bool]) -> None:
        while not true():
            assert self.process.is_alive(), "it ended before it could be stopped"
            self.process.join(0.005)

    def end(self) -> tuple[int | None, str, str]:
        """Wait for the end; the exit code, standard output and standard error."""
        self.process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self._said)
        for path in self._said:
            shutil.rmtree(path.parent)
        return self.process.exitcode, out, err


def command(arguments: list[str]) -> int:
    """`saeffect` with these arguments."""
    from command_line import call

    return call(arguments)


def script(arguments: list[str]) -> int:
    """Python code, given as the first argument, with the others in `sys.argv`."""
    code, *sys.argv[1:] = arguments
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    return 0


def _work(
    work: Callable[[list[str]], int], arguments: list[str], variables: Mapping[str, str], said: Sequence[Path]
) -> None:
    import torch

    from tiny_study import write_little

    torch.set_num_threads(1)
    write_little()
    os.environ.update(variables)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.exit(work(arguments))
