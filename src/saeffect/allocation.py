"""Memory settings of long runs, at the price of staying at peak memory use: keeping freed memory makes harvesting
about a fifth faster, 2 MB pages make training some 5 % faster.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "use_large_pages"]

# The numbers of mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest int, and the largest value that older releases of glibc take.
_SIZES = (2**31 - 1, 2**25)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory (mallopt(3)); returns False with other C libraries. For programs, not on import."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # musl
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _SIZES) and bool(mallopt(_TRIM_THRESHOLD, _SIZES[0]))


def use_large_pages() -> None:
    """Have torch ask for large pages, unless the user chose otherwise. For programs, before their first tensor.
    Source: THP_MEM_ALLOC_ENABLE in PyTorch (c10/core/impl/alloc_cpu.cpp); madvise(2), MADV_HUGEPAGE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
