"""Time and peak memory of one call, as `cut_cost.py` and the benchmark report them."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import psutil


def peak_rss(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, growth of the resident set at its peak in bytes) of one call; sampled every 5 ms."""
    process, peak, done = psutil.Process(), [0], threading.Event()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or it would hide what the work takes
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    try:
        work()
        seconds = time.perf_counter() - started
    finally:  # or an error in `work` would leave the sampler, and the process, running
        done.set()
        thread.join()
    return seconds, max(0, peak[0] - before)
