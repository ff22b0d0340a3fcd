"""hf_prune beside published methods and peers: same model, same calibration rows, same evaluation, no training after.

    make benchmark                                                   # everything, hours on two cores
    python examples/benchmark/run.py encoder --methods "hf_prune stock,magnitude" --seeds 0
    python examples/benchmark/run.py --quick                         # a few rows; the figures mean nothing

Parts: encoder, imdb, llm, recovery, llm_recovery, cost, tables (default: all). Every cell (task, seed, method, keep) is
one JSON file under OUT/results, written whole when it is done; what exists is skipped, so that a stopped run goes on
where it was. Delete a file to have it computed again. OUT/benchmark.json, OUT/tables.md and OUT/*.png follow from the
cells alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from methods import Method, methods_for
from plots import plot
from tables import write_tables
from tasks import TASKS, Settings, Task, quick
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_prune.report.measure import compare

PARTS = (*TASKS, "cost", "tables")
COST_TASKS = ("encoder", "llm")
QUICK_METHODS = ("dense", "hf_prune stock", "random", "Torch-Pruning L2", "optipfair PPM")
Cell = dict[str, Any]


# --- one file a cell -------------------------------------------------------------------------------------------------


def path_of(out: Path, cell: Cell) -> Path:
    parts = [cell["part"], cell["task"], f"seed{cell['seed']}", cell["method"], f"{cell['keep']:g}"]
    return out / "results" / (re.sub(r"[^\w.]+", "-", "_".join(parts)) + ".json")


def write(out: Path, cell: Cell) -> None:
    """Whole or not at all."""
    path = path_of(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(cell, indent=1) + "\n")
    temporary.rename(path)


def is_done(out: Path, cell: Cell) -> bool:
    """Whether the cell exists already; refuses to mix figures of different settings."""
    path = path_of(out, cell)
    if not path.exists():
        return False
    found = json.loads(path.read_text())["settings"]
    if found != cell["settings"]:
        raise SystemExit(
            f"{path} was made with {found}, asked for {cell['settings']}: give another --out, or delete it."
        )
    return True


def read(out: Path) -> list[Cell]:
    return [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]


def signature(settings: Settings) -> dict[str, Any]:
    """The settings that change a figure, as JSON gives them back."""
    kept = {k: v for k, v in asdict(settings).items() if k not in ("keeps", "seeds", "cost_keep")}
    if not kept["training_tokens"]:
        del kept["training_tokens"]  # cells from before there was such a setting
    return json.loads(json.dumps(kept))


# --- accuracy, size and latency --------------------------------------------------------------------------------------


def cells_of(name: str, seed: int, method: Method, settings: Settings) -> list[Cell]:
    base = {"part": "quality", "task": name, "seed": seed, "method": method.name, "note": method.note}
    keeps = method.keeps or settings.keeps
    return [{**base, "keep": keep, "settings": signature(settings)} for keep in keeps]


def run_task(task: Task, methods: Sequence[Method], settings: Settings, out: Path) -> None:
    """All missing cells of one task and seed."""
    todo = [(m, [c for c in cells_of(task.name, task.seed, m, settings) if not is_done(out, c)]) for m in methods]
    progress = tqdm(total=sum(len(cells) for _, cells in todo), desc=f"{task.name}, seed {task.seed}")
    dense = task.size(task.model)
    for method, cells in todo:
        if not cells:
            continue
        progress.set_postfix_str(f"{method.name}: score")
        prepared = failed = None
        try:
            prepared = method.prepare(task)
        except Exception as error:  # a row that cannot be is a result, in its own words
            failed = error
        for cell in cells:
            progress.set_postfix_str(f"{method.name} {cell['keep']:g}")
            try:
                if failed:
                    raise failed
                found = _equal_cell(task, prepared, cell, out) or _measured(
                    task, prepared, cell["keep"], settings, dense
                )
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            write(out, {**cell, **found})
            progress.update()
            progress.write(_line({**cell, **found}))
    progress.close()


def _equal_cell(task: Task, prepared: Any, cell: Cell, out: Path) -> Cell | None:
    """The figures of an earlier row that makes the very same model from the same rows (a preset may be our default)."""
    identity = prepared.identity and prepared.identity(cell["keep"])
    if not identity:
        return None
    for other in read(out):
        same = all(other[key] == cell[key] for key in ("part", "task", "seed", "settings"))
        if same and other.get("identity") == identity:
            return {k: v for k, v in other.items() if k not in cell} | {
                "same_as": other.get("same_as", other["method"])
            }
    return None


def _measured(task: Task, prepared: Any, keep: float, settings: Settings, dense: Cell) -> Cell:
    started = time.perf_counter()
    pruned = prepared.cut(copy.deepcopy(task.model), keep)
    cut = time.perf_counter()
    found = task.evaluate(pruned)
    seconds = {"cut": cut - started, "evaluate": time.perf_counter() - cut}
    size = task.size(pruned)
    latency = []
    if task.seed == 0 and settings.latency:
        models = {"dense": task.model, "pruned": pruned}
        length = settings.length
        timed = compare(models, shapes=settings.latency, sequence_length=length, runs=settings.runs, warmup=2)
        latency = timed["pruned"]["latency"]
    return {
        "identity": prepared.identity(keep) if prepared.identity else "",
        "kept": size[task.target] / dense[task.target],
        "size": size,
        "dense_size": dense,
        "latency": latency,
        "seconds": seconds,
        **found,
    }


def _line(cell: Cell) -> str:
    head = f"{cell['task']} seed {cell['seed']} {cell['method']} {cell['keep']:g}: "
    if "error" in cell:
        return head + cell["error"]
    figures = {k: round(v, 4) for k, v in cell.items() if isinstance(v, float) and k != "keep"}
    return head + ", ".join(f"{k} {v}" for k, v in figures.items())


# --- what pruning costs ----------------------------------------------------------------------------------------------


def cost_cell(name: str, method: Method, settings: Settings) -> Cell:
    base = {"part": "cost", "task": name, "seed": 0, "method": method.name, "note": method.note}
    return {**base, "keep": settings.cost_keep, "settings": signature(settings)}


def measure_cost(task: Task, method: Method, settings: Settings, out: Path) -> None:
    """In a process of its own: from model and rows in memory to the pruned model, scores included."""
    from memory import peak_rss

    cell = cost_cell(task.name, method, settings)
    if method.needs:
        __import__(method.needs)  # its import is no part of pruning
    task.model(task.batches()[0].inputs["input_ids"][:2])  # neither is what a first forward pass loads
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    try:
        seconds, growth = peak_rss(lambda: method.prepare(task).cut(task.model, settings.cost_keep))
        found = {"seconds": seconds, "growth_bytes": growth, "model_bytes": weights, "peak": growth / weights}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    write(out, {**cell, **found})


def run_cost(name: str, methods: Sequence[Method], settings: Settings, out: Path, arguments: Sequence[str]) -> None:
    cuts = [m for m in methods if m.keeps is None and not is_done(out, cost_cell(name, m, settings))]
    progress = tqdm(cuts, desc=f"cost, {name}")
    for method in progress:
        progress.set_postfix_str(method.name)
        command = [sys.executable, __file__, "cost", *arguments, "--methods", method.name, "--inside", name]
        done = subprocess.run(command, capture_output=True, text=True)
        cell = cost_cell(name, method, settings)
        if done.returncode:  # killed for memory, say; an ordinary error is already in the cell
            write(out, {**cell, "error": f"exit status {done.returncode}: {done.stderr[-500:]}"})


# --- the command line ------------------------------------------------------------------------------------------------


def parse(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="default: .cache/benchmark, or .cache/benchmark-quick")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="models and texts")
    parser.add_argument("--quick", action="store_true", help="a few rows, keeps and methods")
    parser.add_argument(
        "--methods", type=lambda text: tuple(text.split(",")), default=(), help="names, comma-separated"
    )
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--keeps", type=lambda text: tuple(map(float, text.split(","))))
    for name in ("train-rows", "validation-rows", "calibration", "windows", "items", "runs"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the task that this process measures the cost of
    args = parser.parse_args(line)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown}; known: {', '.join(PARTS)}")
    args.parts = args.parts or PARTS
    args.out = args.out or args.cache / ("benchmark-quick" if args.quick else "benchmark")
    args.methods = args.methods or (QUICK_METHODS if args.quick else ())
    return args


def settings_of(name: str, args: argparse.Namespace) -> Settings:
    at = quick(TASKS[name][1]) if args.quick else TASKS[name][1]
    names = ("seeds", "keeps", "train_rows", "validation_rows", "calibration", "windows", "items", "runs")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    return replace(at, **given)


def main(line: Sequence[str] | None = None) -> None:
    args = parse(line)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.inside:
        settings = settings_of(args.inside, args)
        (method,) = methods_for(args.inside, args.methods)
        return measure_cost(TASKS[args.inside][0](args.inside, settings, args.cache, 0), method, settings, args.out)
    for name in args.parts:
        for task in [name] if name in TASKS else COST_TASKS if name == "cost" else []:
            settings, rows = settings_of(task, args), methods_for(task, args.methods)
            for method in rows:
                if method.missing:
                    print(f"{task}: {method.name} is left out: {method.missing}")
            rows = [method for method in rows if not method.missing]
            if name == "cost":
                given = [a for a in (line or sys.argv[1:]) if a not in PARTS]
                run_cost(task, rows, settings, args.out, given)
            for seed in settings.seeds if name != "cost" else ():
                left = [c for m in rows for c in cells_of(task, seed, m, settings) if not is_done(args.out, c)]
                if left:
                    run_task(TASKS[task][0](task, settings, args.cache, seed), rows, settings, args.out)
    cells = read(args.out)
    (args.out / "benchmark.json").write_text(json.dumps(cells, indent=1) + "\n")
    print(write_tables(cells, args.out / "tables.md"))
    plot(cells, args.out)
    return None


if __name__ == "__main__":
    main()
