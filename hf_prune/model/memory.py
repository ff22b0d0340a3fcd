"""Memory that is free, but not given back: the C library keeps what tensors leave, and in pieces."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD: blocks from this size on are given back when they are freed
AT_ONCE, USUAL = 2**17, 2**25  # while models are cut; what glibc comes to by itself where large blocks are freed


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Within, large tensors that are freed go back to the system, and at the end all that is free (with glibc)."""
    _function("mallopt")(MMAP_THRESHOLD, AT_ONCE)
    try:
        yield
    finally:
        _function("mallopt")(MMAP_THRESHOLD, USUAL)
        _function("malloc_trim")(0)  # the small ones


@functools.cache
def _function(name: str) -> Callable[..., object]:
    try:
        found: Callable[..., object] = getattr(ctypes.CDLL(None), name)
        return found
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return lambda *values: None
