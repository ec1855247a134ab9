"""How a long run gets its memory: freed memory is kept, and large tensors lie on large pages.

A forward pass makes and drops hundreds of tensors of some megabytes. The C library gives each back to the system
at once and asks for fresh pages for the next, and the processor is stopped at every page. Kept memory makes
harvesting the embedded model about a fifth faster; what a process holds grows to its largest moment and stays there.

Sparse products read rows in no order. On pages of 4 KB nearly every row must be looked up first; on pages of
2 MB, which Linux gives to those who ask, a training step is some 5 % faster.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "use_large_pages"]

# The numbers of mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# mallopt takes an int. Where that is too much for it, the most that older releases take.
_SIZES = (2**31 - 1, 2**25)


def keep_freed_memory() -> bool:
    """Tell the C library of this process to keep freed memory. For programs, not for importing.

    Returns:
        Whether the C library takes it: only glibc does.

    Source:
        mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # musl
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _SIZES) and bool(mallopt(_TRIM_THRESHOLD, _SIZES[0]))


def use_large_pages() -> None:
    """Have torch ask for large pages. For programs, before they make their first tensor; the user's choice stands.

    Source:
        THP_MEM_ALLOC_ENABLE in PyTorch's CPU allocator (c10/core/impl/alloc_cpu.cpp); madvise(2), MADV_HUGEPAGE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
