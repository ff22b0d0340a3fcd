"""Training runs and saves that are killed: SIGKILL in the middle of a phase, or at a random time.

As a script:
`python kills_training.py phases OUT` kills a run once in each phase (or in those that are named), resumes it, and
writes what each came to;
`python kills_training.py windows OUT` kills a save at each of its calls of the file system;
`python kills_training.py saves OUT 70` kills saves at random times, `python kills_training.py training OUT 70` runs
with rounds and a save. After each kill they look at what lies on disk, and print a table.

Every attempt is a fork of a process that has imported everything: a kill costs no import.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tiny import tiny
from training import rows, trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback

import hf_prune
from hf_prune.train.resume import checkpoints, damage, known_by

NAME = "BertForSequenceClassification"
RUN: dict[str, Any] = {
    "args": {
        "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "save_total_limit": 3,
    },
    "pruning": {"rounds": 2},
}  # fmt: skip
PHASES = {  # where a run is killed: (object, function, at which call)
    "scoring": ("hf_prune.score.scoring", "statistics", 2),
    "cut": ("hf_prune.repair.walk", "cut_", 6),
    "after a cut": ("hf_prune.oneshot", "write_", 2),
    "boundary": ("hf_prune.train.rounds.Run", "save", 4),
    "boundary's exchange": ("hf_prune.checkpoint.directory", "_put", 2),
    "checkpoint": ("hf_prune.train.trainer.PruningTrainer", "_save_optimizer_and_scheduler", 3),
    "checkpoint's last file": ("transformers.TrainerState", "save_to_json", 5),
    "removing old checkpoints": ("transformers.trainer", "rotate_checkpoints", 4),
    "evaluation": ("hf_prune.train.trainer.PruningTrainer", "evaluation_loop", 3),
    "best model": ("hf_prune.train.trainer.PruningTrainer", "_load_best_model", 1),
    "proof": ("hf_prune.train.saver", "prove", 1),
    "save's exchange": ("hf_prune.checkpoint.directory", "_put", 3),
    **{f"step {step}": ("step", "", step) for step in (1, 2, 3, 4)},
}

EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlopen")


def forked(work: Any, *given: Any) -> int:
    """The process id of a child that does some work and no more."""
    child = os.fork()
    if child:
        return child
    try:
        work(*given)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """How a child ended: 0, 1, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(out: Path, phase: str | None = None) -> None:
    """Train, resumed if there is something to resume, save, and write down what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out.mkdir(parents=True, exist_ok=True)
    (out / "log").mkdir(exist_ok=True)
    with (out / "log" / "said").open("a") as said:
        os.dup2(said.fileno(), 1)
    given = {**RUN, "callbacks": [Step(PHASES[phase][2])]} if phase and PHASES[phase][0] == "step" else RUN
    run = trainer(out / "run", **given, eval_dataset=rows(tiny(NAME)))
    if phase and PHASES[phase][0] != "step":
        die_in(*PHASES[phase])
    run._saver.card.write = lambda *_: None  # which imports every model that there is
    run.train(resume_from_checkpoint=True)
    run.save_model(str(out / "small"))
    torch.save({"weights": run.model.state_dict(), "plan": run.model._hf_prune.plan.hash}, out / "result.pt")


class Step(TrainerCallback):
    """Kills the process after the forward and backward pass of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def die_in(where: str, name: str, call: int) -> None:
    """Let this process kill itself when a function is called for the n-th time."""
    module, _, cls = where.rpartition(".")
    owner = getattr(sys.modules[module], cls) if module in sys.modules and cls[0].isupper() else sys.modules[where]
    before, calls = getattr(owner, name), Counter[str]()

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        if calls[name] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(owner, name, dies)


def leftovers(home: Path) -> list[str]:
    """What a killed write may leave behind."""
    return [path.name for path in home.rglob("*") if path.name.startswith(".hf_prune") or path.name.endswith(".tmp")]


def phases(out: Path, *names: str) -> None:
    """Kill a run once in each phase, resume it, and write what all of them came to."""
    first = ended(forked(attempt, out / "whole"))
    found: dict[str, Any] = {"": {"ended": first, **torch.load(out / "whole" / "result.pt")}}
    found["data"] = known_by(rows(tiny(NAME)))
    for phase in names or PHASES:
        killed, resumed = (ended(forked(attempt, out / phase, die)) for die in (phase, None))
        result = torch.load(out / phase / "result.pt") if not resumed else {}
        found[phase] = {"killed": killed, "ended": resumed, "left": leftovers(out / phase), **result}
    torch.save(found, out / "found.pt")


# --- a save, again and again -----------------------------------------------------------------------------------------


def saver(out: Path) -> Any:
    """A trainer with a pruned model, and a directory of an earlier save with files of other kinds in it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = trainer(out / "run", args={"max_steps": 1}, pruning={"rounds": 1})
    run.train()
    save(run, out / "small", 0)
    (out / "small" / "notes.txt").write_text("mine")
    return run


def save(run: Any, home: Path, version: int) -> None:
    with torch.no_grad():
        run.model.classifier.bias.fill_(version)
    run.save_model(str(home))


def saving(run: Any, home: Path, event: int) -> None:
    """One save, killed at its n-th call of the file system."""
    seen = itertools.count(1)

    def hook(name: str, given: tuple[Any, ...]) -> None:
        if name in EVENTS and (name != "open" or is_write(given)) and next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(run, home, event)


def is_write(given: tuple[Any, ...]) -> bool:
    return isinstance(given[2], int) and bool(given[2] & (os.O_WRONLY | os.O_RDWR))


def forever(run: Any, home: Path) -> None:
    for version in itertools.count(1):
        save(run, home, version)


def wrong(home: Path) -> list[str]:
    """What a user would find amiss in a directory that a save was killed in."""
    found = [] if home.is_dir() else ["missing"]
    opens = AutoModelForSequenceClassification.from_pretrained
    for what, look in (("stale proof", hf_prune.verify), ("unloadable", opens)):
        try:
            look(home)
        except Exception:
            found.append(what)
    return found if (home / "notes.txt").is_file() else [*found, "a note is lost"]


def after(run: Any, out: Path) -> list[str]:
    """What is amiss after a killed save, and after the next one."""
    found = wrong(out / "small")
    save(run, out / "small", -1)
    return [*found, *(["leftovers"] if leftovers(out) else []), *wrong(out / "small")]


def windows(out: Path, stride: str = "1") -> None:
    """Kill a save at each of its calls of the file system."""
    run, table = saver(out), Counter[str]()
    for event in itertools.count(1, int(stride)):
        killed = ended(forked(saving, run, out / "small", event)) == -signal.SIGKILL
        if not killed:
            break
        table.update(["kills", *after(run, out)])
    report(out, table)


def saves(out: Path, kills: str) -> None:
    """Kill saves at random times."""
    run, table = saver(out), Counter[str]()
    begun = time.time()
    save(run, out / "small", 0)
    longest, draw = 2 * (time.time() - begun), random.Random(0)
    for _ in range(int(kills)):
        child = forked(forever, run, out / "small")
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        ended(child)
        table.update(["kills", *after(run, out)])
    report(out, table)


# --- a run, at random times ------------------------------------------------------------------------------------------


def training(out: Path, kills: str) -> None:
    """Kill runs with rounds and a save at random times; each is resumed until it ends as one that nobody killed."""
    for name in ("first", "whole"):  # the first is slow: what it reads is in no cache
        begun = time.time()
        ended(forked(attempt, out / name))
    longest, whole = time.time() - begun, torch.load(out / "whole" / "result.pt")
    table, draw = Counter[str](), random.Random(0)
    for number in itertools.count():
        home = out / str(number)
        while table["kills"] < int(kills) and not killed_once(home, draw.uniform(0.05, longest), table):
            pass
        if not (home / "result.pt").exists() and ended(forked(attempt, home)):
            table["not resumed"] += 1
        else:
            result = torch.load(home / "result.pt")
            table["ended otherwise"] += not same(whole, result)
            table["leftovers"] += bool(leftovers(home))
        table["runs"] += 1
        if table["kills"] >= int(kills):
            break
    report(out, table)


def killed_once(home: Path, delay: float, table: Counter[str]) -> bool:
    """Whether the run had ended before."""
    child = forked(attempt, home)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    if code == 0:
        return True
    table["kills"] += 1
    table["failed by itself"] += code == 1
    for path in checkpoints(home / "run"):
        table["half-written checkpoints, known as such"] += bool(damage(path))
        if not damage(path):
            table["complete checkpoints"] += 1
            with contextlib.suppress(Exception):
                AutoModelForSequenceClassification.from_pretrained(path)
                table["of which open"] += 1
    if (home / "small").exists():
        table.update(set(wrong(home / "small")) - {"a note is lost"})
    return False


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same plan, and every weight bit by bit."""
    ours, theirs = one["weights"], other["weights"]
    return (
        one["plan"] == other["plan"]
        and ours.keys() == theirs.keys()
        and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    )


def report(out: Path, table: Counter[str]) -> None:
    for what in ("missing", "unloadable", "stale proof", "a note is lost", "leftovers"):
        table.setdefault(what, 0)
    (out / "table.json").write_text(json.dumps(table))
    print("\n".join(f"{count:6d}  {what}" for what, count in table.items()))


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    {"phases": phases, "windows": windows, "saves": saves, "training": training}[sys.argv[1]](place, *sys.argv[3:])
