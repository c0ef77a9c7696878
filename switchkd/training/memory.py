"""How a CPU run keeps its memory."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Lets this process keep freed tensor memory for the next tensor; True where that was possible.

    glibc hands every freed block of some megabytes back to the system, which clears it page by page when the next
    tensor asks for it: a small model on the CPU spends a third of its time there. Costs the process the memory of its
    peak for its lifetime. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: (2 << 30) - 1, TOP_PAD: 256 << 20}
    return all(libc.mallopt(option, value) == 1 for option, value in settings.items())
