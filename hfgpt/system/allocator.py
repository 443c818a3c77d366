"""How the memory of a command is handed out: `keep` keeps what was freed, in large pages, for what comes next.

A step on a CPU makes and drops hundreds of megabytes. By default glibc gives them back, and the system then clears
every page of 4 KB again when the next step first touches it.
Only commands call this, for a process that is theirs: a library that is imported leaves such settings alone.
"""

import ctypes
import os
import sys

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "keep": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "MALLOC_TOP_PAD_": "268435456",
        "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for pages of 2 MB, where the system has them
    },
}
"""Name -> environment of a process that begins with it."""

MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_MAX_": -4}
"""glibc's variables, which it reads when a process begins -> the same in malloc.h, for a process that runs."""


def use_allocator(name: str) -> None:
    """Let this process hand memory out so, from now on; to be called before torch is imported, which looks once.

    Does nothing where the C library is not glibc.

    Args:
        name: a key of `ALLOCATORS`. No memory grows without bound by it: what was freed is used again, so the process
            stays at the most that it ever needed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for variable, value in ALLOCATORS[name].items():
        if variable in MALLOPT:
            mallopt(MALLOPT[variable], int(value))
        else:
            os.environ.setdefault(variable, value)
