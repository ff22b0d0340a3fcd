"""Kill save_pretrained at random times, and count what is broken afterwards. One line of JSON.

    python tests/kills_saving.py --kills 70 [--seed 0]

Each attempt is a forked child that saves a pruned model, in every other case over an earlier save of another one; it is
killed after a random part of the time that a save takes. Then what is under the name is opened, compared and verified,
and the next save beside it must leave nothing hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from children import forked, signal_of
from tiny import cut_tiny, distance, outputs, tiny_batch

from hf_prune import save_pretrained, verify

CLASS = transformers.BertForSequenceClassification


def hidden(home: Path) -> list[str]:
    return [path.name for path in home.iterdir() if path.name.startswith(".")]


def timed(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def found(target: Path, models: dict[str, Any]) -> str:
    """Which model a directory holds, or what is wrong with it."""
    if not target.exists():
        return "nothing"
    try:
        opened = CLASS.from_pretrained(target).eval()
    except Exception:
        return "unloadable"
    try:
        verify(target)
    except ValueError:
        return "stale proof"
    batch = tiny_batch(opened)
    near = [n for n, m in models.items() if distance(outputs(opened, batch), outputs(m, batch)) <= 1e-5]
    return near[0] if near else "other outputs"


def kills(count: int, seed: int, home: Path) -> dict[str, Any]:
    """Figures over `count` kills of children that were still at work."""
    rng = random.Random(seed)
    models = {"old": cut_tiny(CLASS.__name__, "uniform"), "new": cut_tiny(CLASS.__name__, "per_layer")}
    target, total = home / "out", dict.fromkeys(("old", "new", "nothing"), 0)
    save = lambda: save_pretrained(models["new"], target, overwrite=True)  # noqa: E731
    duration = statistics.median(timed(lambda: signal_of(forked(save))) for _ in range(5))
    attempts = in_time = missing = most_hidden = left = 0
    while in_time < count:
        attempts += 1
        shutil.rmtree(target, ignore_errors=True)
        if attempts % 2:
            save_pretrained(models["old"], target)
        delay = rng.uniform(0, 1.2 * duration)
        child = forked(save)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        if not signal_of(child):  # had ended before
            continue
        in_time += 1
        most_hidden = max(most_hidden, len(hidden(home)))
        state = found(target, models)
        missing += state == "nothing" and attempts % 2
        total[state] = total.get(state, 0) + 1
        save_pretrained(models["old"], home / "next", overwrite=True)
        left += len(hidden(home))
    return {
        "kills": in_time, "attempts": attempts, "seconds of a save": round(duration, 3), "found": total,
        "missing though it was there": missing, "most hidden after a kill": most_hidden,
        "hidden after the next save": left,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(kills(options.kills, options.seed, Path(directory))))
