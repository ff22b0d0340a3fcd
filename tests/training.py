"""A tiny training run with pruning, for tests that run it in this process, kill it, or run it in two.

As a script: `python training.py OUT BATCH` (under torchrun, say) trains and writes OUT/result-RANK.json;
`python training.py OUT fsdp` asks for FSDP as well;
`python training.py OUT kill SECONDS...` forks, kills each attempt after so many seconds, resumes, and lets the last
one finish.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import tiny, tiny_batch
from transformers import TrainingArguments, set_seed

from hf_prune import PruningConfig, PruningTrainer

ROWS = 32


def rows(model: Any, count: int = ROWS) -> Dataset:
    """A fixed data set that fits the model."""
    return Dataset.from_dict({key: value.tolist() for key, value in tiny_batch(model, count, padded=False).items()})


def arguments(out: Any, **changes: Any) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 4,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **changes,
    }  # fmt: skip
    return TrainingArguments(str(out), **given)


def config(**changes: Any) -> PruningConfig:
    given = {"keep": 0.6, "shapes": "uniform", "align": 4, "calibration_samples": 32, "sequence_length": 12, **changes}
    return PruningConfig(**given)


def trainer(
    out: Any, class_name: str = "BertForSequenceClassification", cls: Any = PruningTrainer, **changes: Any
) -> Any:
    """A trainer of a tiny model; `args` and `pruning` may be dicts of changes."""
    set_seed(0)
    model = changes.pop("model", None) or tiny(class_name)
    args = changes.pop("args", {})
    args = arguments(out, **args) if isinstance(args, dict) else args
    pruning = changes.pop("pruning", {})
    pruning = config(**pruning) if isinstance(pruning, dict) else pruning
    return cls(**{"model": model, "args": args, "train_dataset": rows(model), "pruning": pruning, **changes})


def result(run: Any, output: Any) -> dict[str, Any]:
    plans = [found.plan.hash for found in run.results]
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    record = run.model._hf_prune.plan.hash
    return {
        "plan": record, "plans": plans, "loss": output.training_loss, "steps": output.global_step, "losses": history,
        "world": run.args.world_size,
    }  # fmt: skip


KILLED = {"args": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}, "pruning": {"rounds": 3}}


def attempt(out: Path) -> None:
    torch.set_num_threads(1)
    run = trainer(out / "run", **KILLED)
    found = result(run, run.train(resume_from_checkpoint=True))
    torch.save(run.model.state_dict(), out / "weights.pt")
    (out / "result.json").write_text(json.dumps(found))


def killed(out: Path, delays: list[float]) -> None:
    """Every attempt but the last is killed; none of this process's own threads is in the way of a fork."""
    for delay in [*delays, None]:
        child = os.fork()
        if child == 0:
            attempt(out)
            os._exit(0)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if delay is None and status:
            raise SystemExit(f"the last attempt ended with {status}")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if sys.argv[2:3] == ["kill"]:
        killed(where, [float(seconds) for seconds in sys.argv[3:]])
    else:
        sharded = sys.argv[2] == "fsdp"
        args = {"fsdp": True} if sharded else {"per_device_train_batch_size": int(sys.argv[2])}
        run = trainer(where / "run", "LlamaForCausalLM", args=args, pruning={"rounds": 2, "shapes": "per_layer"})
        found = result(run, run.train())
        (where / f"result-{run.args.process_index}.json").write_text(json.dumps(found))
