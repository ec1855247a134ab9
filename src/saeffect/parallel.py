"""This process and those beside it under `torchrun`: rank, exchange, interruption, memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from saeffect.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Interruption",
    "add_up",
    "barrier",
    "device_of_process",
    "end_with_launcher",
    "from_all",
    "from_first",
    "gathered",
    "is_first",
    "join",
    "keep_freed_memory",
    "leave",
    "rank_and_world",
    "stopping",
    "use_large_pages",
    "limit_spinning",
]

# Others wait while one process works alone; defaults are 30 minutes (gloo) and 10 (NCCL). A process that ends is
# noticed at once by its closed connection.
_LONG_TIMEOUT = timedelta(days=365)

# Both report it by message only: gloo's "Connection closed by peer", "Connection reset by peer", "Read error", "Timed
# out waiting"; NCCL's "remote process exited or there was a network error", "ncclRemoteError".
_PEER_LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused|aborted)|broken pipe|(read|write|socket) (error|closed|timeout)"
    r"|timed? ?out|remote ?(process|error)|network error|no route to host",
    re.IGNORECASE,
)

# The numbers of mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest int, and the largest value that older releases of glibc take.
_LIMITS = (2**31 - 1, 2**25)


def rank_and_world() -> tuple[int, int]:
    """This process' number, from 0, and the number of processes: (0, 1) without `torchrun`. ConfigError if RANK and
    WORLD_SIZE contradict each other.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ConfigError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} do not fit: expected 0 <= RANK < WORLD_SIZE.",
            at="environment",
            fix="start the processes with torchrun, or unset both.",
        )
    return int(rank), int(world)


def is_first() -> bool:
    """Whether this process does the writing. True for a single process."""
    return rank_and_world()[0] == 0


def device_of_process() -> str:
    """Device of tensors that processes exchange: this process' own GPU, or "cpu"."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def join() -> int:
    """Join the other processes, by NCCL on GPUs and gloo on CPUs, and return their number. Does nothing for a single
    process, or if PyTorch's process group exists.
    """
    import torch
    import torch.distributed as dist

    _, world = rank_and_world()
    if world > 1:
        end_with_launcher()
    if world > 1 and not dist.is_initialized():
        device = device_of_process()
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    if world > 1:
        _long_timeout_group(dist.group.WORLD)  # created here, since all processes must create it together
    return world


@functools.cache
def end_with_launcher() -> None:
    """Make this process end when the `torchrun` that started it dies; it would otherwise run on and hold its folder."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # the parent is not torchrun, and may end before the work
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()


def leave() -> None:
    """Leave the process group, if in one; else PyTorch warns at exit."""
    import torch.distributed as dist

    _long_timeout_group.cache_clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes, for days if needed. Interrupted if one is gone, here and in every exchange."""
    if join() > 1:
        import torch.distributed as dist

        with _translate_peer_loss():
            dist.barrier(group=_long_timeout_group(dist.group.WORLD))


def from_first(message: str = "") -> str:
    """The first process' message, in every process; they wait for it, for days if needed."""
    messages: list[Any] = [message]
    if join() > 1:
        import torch.distributed as dist

        with _translate_peer_loss():
            dist.broadcast_object_list(messages, src=0, group=_long_timeout_group(dist.group.WORLD))
    return str(messages[0])


def from_all(value: Any) -> list[Any]:
    """Every process' value (which can be pickled), in order of rank; they wait for each other, for days if needed."""
    if (world := join()) == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world
    with _translate_peer_loss():
        dist.all_gather_object(values, value, group=_long_timeout_group(dist.group.WORLD))
    return values


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over processes, in place."""
    if join() > 1:
        import torch.distributed as dist

        with _translate_peer_loss():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def gathered(values: Tensor) -> Tensor:
    """The tensors of all processes, concatenated in order of rank; lengths of axis 0 may differ."""
    world = join()
    if world == 1:
        return values
    import torch
    import torch.distributed as dist

    with _translate_peer_loss():
        lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world)]
        dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
        longest = max(int(n) for n in lengths)
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


@functools.cache
def _long_timeout_group(world_group: Any) -> Any:
    """The group of all processes with a timeout of days. On CPUs, as waiting keeps a GPU busy."""
    del world_group  # the key of the cache
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)


@contextlib.contextmanager
def _translate_peer_loss() -> Iterator[None]:
    """Raise `Interrupted` for the errors of gloo and NCCL when another process is gone; others pass."""
    try:
        yield
    except RuntimeError as error:
        if not _PEER_LOST.search(str(error)):
            raise
        raise Interrupted(
            f"this process stops because another one of the same run did ({str(error).splitlines()[0]}).",
            fix="see the error of the other one; the same command goes on from the last checkpoint.",
            by_another=True,
        ) from error


@contextlib.contextmanager
def stopping(kept: str) -> Iterator[None]:
    """Turn Ctrl-C during the block into Interrupted, which says what is `kept` and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        fix = "run the same command again to go on from there."
        raise Interrupted(f"stopped at once; {kept}.", fix=fix) from None


class Interruption:
    """During the block, Ctrl-C or SIGTERM sets `requested`, to stop at the end of a step; a second one interrupts at
    once.

    Signals that the process ignores (nohup, background jobs) stay ignored; outside the main thread none is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                # None: the handler is not Python's, and could not be put back.
                if handler is not None and handler != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory (mallopt(3)); returns False with other C libraries. For programs, not on import."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # musl
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _LIMITS) and bool(mallopt(_TRIM_THRESHOLD, _LIMITS[0]))


def use_large_pages() -> None:
    """Make torch ask for large pages, unless the user chose otherwise. For programs, before their first tensor.
    Source: THP_MEM_ALLOC_ENABLE in PyTorch (c10/core/impl/alloc_cpu.cpp); madvise(2), MADV_HUGEPAGE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def limit_spinning() -> None:
    """Make waiting threads of libgomp sleep early, unless the user chose otherwise.

    By default they spin for about 10 ms, which slows every matrix product down when other programs use the same
    processors. For programs, before torch is imported. Source: GOMP_SPINCOUNT in the manual of GNU libgomp.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
