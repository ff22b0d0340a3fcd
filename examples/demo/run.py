"""`hf-prune demo`: fine-tune MiniLM on movie reviews, cut it to half in three shapes, reload, measure, one table."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from tqdm.auto import tqdm

from hf_prune import PruningConfig, analyze, save_pretrained
from hf_prune.decide.allocate import SHAPES
from hf_prune.files import write_text
from hf_prune.report.card import write_card
from hf_prune.report.engines import PLAIN, opened_by, opening_lines
from hf_prune.report.evidence import write_evaluation
from hf_prune.report.int8 import BUILDERS, compare_int8, int8_line, int8_rows, write_int8
from hf_prune.report.measure import compare
from hf_prune.report.render import write
from hf_prune.report.table import Row, console, count, markdown, rich_table

from .finetune import finetuned
from .real import minilm_path, reviews, tokenized

RELOAD = Path(__file__).with_name("reload.py")
MAX_LENGTH = 64
LATENCY_SHAPES = ((1, MAX_LENGTH), (32, MAX_LENGTH))
NOT_PRUNED = "dense"
QUANTISED = "uniform"  # the shapes that are compared in INT8 too
BASE = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Settings:
    """What a run depends on; written to table.json."""

    seed: int = 0
    keep: float = 0.5
    train_rows: int | None = None  # None: all
    validation_rows: int | None = None
    calibration_samples: int = 1024
    latency_runs: int = 30

    @property
    def name(self) -> str:
        """Of the fine-tuned model in the cache."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"minilm-rotten-tomatoes{seed}" + (f"-{self.train_rows}rows" if self.train_rows else "")


QUICK = Settings(train_rows=256, validation_rows=64, calibration_samples=64, latency_runs=3)


def run(out: Path, cache: Path, settings: Settings) -> dict[str, Any]:
    """Everything the demo does. Returns what it writes to `out`/table.json."""
    screen = console()
    started = time.perf_counter()
    screen.print("1/5 fine-tuned model: MiniLM-L6 on Rotten Tomatoes (stock Trainer, cached)")
    model, tokenizer, data = _model_and_data(cache, settings)
    screen.print(f"2/5 cut to {settings.keep:.0%} of the MACs in three shapes, no training after the cut")
    models, seconds = _cut(model, tokenizer, data, out, settings)
    screen.print("3/5 reload each in a process of its own and evaluate there")
    found = _reload(out, cache, list(models), data["validation"])
    screen.print("4/5 measure latency, all four in turn")
    saved = {name: out / name for name in models}
    measured = compare(saved, shapes=LATENCY_SHAPES, sequence_length=MAX_LENGTH, runs=settings.latency_runs)
    table = {
        "models": {
            name: {**found[name], **measured[name], "cut_seconds": seconds[name]}
            | {"opened_by": opened_by(out / name), "lines": opening_lines(out / name)}
            for name in models
        },
        "settings": asdict(settings)
        | measured[NOT_PRUNED]["settings"]
        | {"python": sys.version.split()[0], "seconds": time.perf_counter() - started},
    }
    rows = _rows(table["models"])
    write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    write_text(out / "table.md", markdown(rows) + "\n")
    _show(screen, rows, table)
    screen.print("5/5 INT8 too, with the engines that are installed")
    int8 = _int8(screen, models, data["validation"], tokenizer, settings)
    _cards(out, found, measured, int8)
    written = f"{out}/{{{','.join(models)}}}, {out}/table.json; cards: {out}/*/README.md"
    screen.print(f"\nWritten: {written}\n{time.perf_counter() - started:.0f} s in all.", markup=False)
    return table


def _model_and_data(cache: Path, settings: Settings) -> tuple[Any, Any, DatasetDict]:
    data = reviews(seed=settings.seed)
    wanted = {"train": settings.train_rows, "validation": settings.validation_rows}
    data = DatasetDict({name: rows.select(range(wanted[name] or len(rows))) for name, rows in data.items()})
    cache.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    tokens = tokenized(data, AutoTokenizer.from_pretrained(minilm_path()), MAX_LENGTH)
    model, tokenizer = finetuned(minilm_path(), tokens, cache / settings.name, settings.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, DatasetDict(train=tokens["train"], validation=data["validation"])


def _cut(
    model: Any, tokenizer: Any, data: DatasetDict, out: Path, settings: Settings
) -> tuple[dict[str, Any], dict[str, float]]:
    """The dense model and one cut per shape, all saved, with the seconds that each cut took. One scoring pass."""
    config = PruningConfig(
        keep=settings.keep, calibration_samples=settings.calibration_samples, sequence_length=MAX_LENGTH
    )
    models, seconds = {NOT_PRUNED: model}, {NOT_PRUNED: 0.0}
    save_pretrained(model, out / NOT_PRUNED, processing_class=tokenizer, overwrite=True)
    analysis = analyze(model, data["train"], config, processing_class=tokenizer)
    for shapes in tqdm(SHAPES, desc="shapes", leave=False):
        small = copy.deepcopy(model)
        result = replace(analysis, config=replace(analysis.config, shapes=shapes)).cut_(small)
        save_pretrained(small, out / shapes, processing_class=tokenizer, overwrite=True)
        models[shapes], seconds[shapes] = small, sum(result.report["seconds"].values())
    return models, seconds


def _reload(out: Path, cache: Path, names: list[str], validation: Any) -> dict[str, dict[str, Any]]:
    """Accuracy of each saved model, found by a process that knows only its directory."""
    data = cache / "validation.json"
    data.write_text(json.dumps({"rows": validation.to_list(), "max_length": MAX_LENGTH}))
    found = {}
    for name in tqdm(names, desc="reload and evaluate", leave=False):
        door = "plain" if opened_by(out / name) == PLAIN else "hf_prune"
        command = [sys.executable, str(RELOAD), str(out / name), str(data), door]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{out / name} does not reload ({door}):\n{done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def _int8(
    screen: Any, models: Mapping[str, Any], validation: Any, tokenizer: Any, settings: Settings
) -> list[dict[str, Any]]:
    """Pruning and INT8 together, with each engine that is installed; shown as they are found."""

    def accuracy(call: Any) -> dict[str, float]:
        right = 0
        for row in tqdm(validation, desc="accuracy", leave=False):
            inputs = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            right += int(call(**inputs).logits.argmax(-1) == row["label"])
        return {"accuracy": right / len(validation)}

    given: Any = {"shapes": LATENCY_SHAPES, "runs": settings.latency_runs}
    found = []
    for engine in BUILDERS:
        try:
            result = compare_int8(models[NOT_PRUNED], models[QUANTISED], accuracy, engine=engine, **given)
        except ImportError as error:
            screen.print(f"{engine}: left out ({error})", markup=False)
            continue
        screen.print(rich_table(int8_rows(result), title=f"Pruned ({QUANTISED}) and INT8, {engine}"))
        screen.print(int8_line(result), markup=False)
        found.append(result)
    return found


def _cards(out: Path, found: Mapping[str, Any], measured: Mapping[str, Any], int8: list[dict[str, Any]]) -> None:
    """A card for each pruned model, from JSON files written beside it."""
    for name in SHAPES:
        home = out / name
        results = {"dense": found[NOT_PRUNED], "pruned": found[name]}
        write_evaluation(
            home,
            {which: {"accuracy": result["accuracy"]} for which, result in results.items()},
            dataset="Rotten Tomatoes",
            split="validation",
            rows=found[name]["rows"],
            command="hf-prune demo",
        )
        write({NOT_PRUNED: measured[NOT_PRUNED], name: measured[name]}, home)
        if int8 and name == QUANTISED:
            write_int8(int8, home)
        write_card(home, name=f"minilm-l6-rotten-tomatoes-{name}", base_model=BASE, license="apache-2.0")


def _rows(models: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The printed table: one row a figure, one column a model."""
    dense = models[NOT_PRUNED]

    def share(key: str) -> dict[str, str]:
        return {name: f"{count(m[key])} ({m[key] / dense[key]:.0%})" for name, m in models.items()}

    def latency(index: int) -> dict[str, str]:
        found = {name: m["latency"][index] for name, m in models.items()}
        return {name: f"{at['median_ms']:.1f} ms ({at['speedup']:.2f}×)" for name, at in found.items()}

    rows = [
        {"": f"accuracy ({dense['rows']:,} rows)"} | {n: f"{m['accuracy']:.4f}" for n, m in models.items()},
        {"": "parameters"} | share("parameters"),
        {"": f"MACs, {MAX_LENGTH} tokens"} | share("macs"),
        {"": "size on disk"} | {name: f"{m['bytes'] / 1e6:.1f} MB" for name, m in models.items()},
    ]
    rows += [{"": f"latency, batch {b} × {t}"} | latency(i) for i, (b, t) in enumerate(LATENCY_SHAPES)]
    return [*rows, {"": "what opens it"} | {name: m["opened_by"].replace(" + ", " +\n") for name, m in models.items()}]


def _show(screen: Any, rows: list[Row], table: Mapping[str, Any]) -> None:
    at = table["settings"]
    screen.print(rich_table(rows, title="MiniLM-L6 on Rotten Tomatoes, no training after the cut"))
    screen.print(
        f"Latency: median of {at['latency_runs']} interleaved runs, unpadded, {at['dtype']}, "
        f"{at['device']}, {at['threads']} threads. Accuracy: measured in a separate process that opened the directory."
    )
    for name, model in table["models"].items():
        screen.print(f"\n# {name}: {model['opened_by']}\n" + "\n".join(model["lines"]), markup=False, soft_wrap=True)
