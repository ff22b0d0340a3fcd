"""How long a saved model takes to open, and the memory that it then holds, measured in a process of its own.

`python -m hf_prune.report.resident DIRECTORY` prints one JSON line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

LOADS = 3
LENGTH = 128  # tokens of the batch that is run, at most


def footprint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """load_seconds (median of three, without imports and the first read from disk) and resident_bytes.

    resident_bytes is what the process holds above its imports once the model has run one example of 128 tokens: of host
    memory, or of the GPU's where there is one.

    Raises:
        RuntimeError: the directory does not open; with the message of the process that tried.
    """
    command = [sys.executable, "-m", "hf_prune.report.resident", os.fspath(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{directory} does not open: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(directory: str) -> dict[str, Any]:
    import psutil
    import torch
    from transformers import AutoConfig

    from ..data.opening import load_model, model_class
    from ..model.probe import positions, random_inputs

    model_class(AutoConfig.from_pretrained(directory))  # imports its modelling code
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    before = psutil.Process().memory_info().rss
    model: Any = load_model(directory).to(device)
    with torch.inference_mode():
        model(**random_inputs(model, 1, min(LENGTH, positions(model) or LENGTH)))
    _give_back()
    held = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss - before
    seconds = []
    for _ in range(LOADS):
        started = time.perf_counter()
        load_model(directory)
        seconds.append(time.perf_counter() - started)
    return {"load_seconds": statistics.median(seconds), "resident_bytes": held}


def _give_back() -> None:
    """Return freed memory to the system, where the C library can: how much of it loading leaves behind is chance."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measured(sys.argv[1])) + "\n")
