"""Every method that is compared: one row each. To add one, add a row."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers import optipfair, torch_pruning
from recovery import longer, masked, trained
from tasks import Prepared, Task

from hf_prune.config import PRESETS

CLASSIFICATION = ("encoder", "imdb")
ALL = (*CLASSIFICATION, "llm")
RECOVERY = ("recovery",)
TRAINED = (*RECOVERY, "llm_recovery")


@dataclass(frozen=True)
class Method:
    """A row: how to score with a task's calibration rows and then cut."""

    name: str
    prepare: Callable[[Task], Prepared]
    tasks: tuple[str, ...] = ALL
    note: str = ""
    keeps: tuple[float, ...] | None = None  # None: those of the task
    needs: str = ""  # a package
    preset: str = ""

    @property
    def missing(self) -> str:
        """Why the row cannot run here, or nothing."""
        if self.preset and self.preset not in PRESETS:
            return f"this hf_prune has no preset {self.preset!r}"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install '.[benchmark]'"
        return ""


def hf_prune(**fields: Any) -> Callable[[Task], Prepared]:
    """A PruningConfig with these fields and the task's own; `analyze` once, then a plan for every keep."""

    def prepare(task: Task) -> Prepared:
        analysis = task.analysis(task.config(**fields))
        plan = functools.cache(analysis.plan)
        return Prepared(
            cut=lambda model, keep: analysis.cut_(model, plan=plan(keep)).model,
            identity=lambda keep: f"{plan(keep).hash} {analysis.config.criterion} {analysis.config.repair}",
        )

    return prepare


def preset(name: str, tasks: tuple[str, ...] = ALL, note: str = "", **changes: Any) -> Method:
    """A published method by its preset, with `changes` on top."""
    return Method(name, hf_prune(**{**PRESETS.get(name, {}), **changes}), tasks=tasks, note=note, preset=name)


def dense(task: Task) -> Prepared:
    return Prepared(lambda model, keep: model)


def shallow(task: Task) -> Prepared:
    return Prepared(lambda model, keep: task.shallow())


def tp(name: str, importance: str) -> Method:
    return Method(f"Torch-Pruning {name}", torch_pruning(importance), needs="torch_pruning")


def opti(name: str, *arguments: Any, tasks: tuple[str, ...] = ("llm",)) -> Method:
    return Method(f"optipfair {name}", optipfair(*arguments), tasks=tasks, needs="optipfair")


LORA = trained("per_layer", lora=True, learning_rate=5e-4)

METHODS: tuple[Method, ...] = (
    Method(
        "dense",
        dense,
        tasks=(*ALL, *TRAINED),
        keeps=(1.0,),
        note="where nothing trains after the cut this is also the control with the same training budget",
    ),
    Method(
        "3 of 6 layers",
        shallow,
        tasks=CLASSIFICATION,
        keeps=(0.5,),
        note="the next-smaller sibling: the lower half of the pretrained MiniLM, fine-tuned in the same way",
    ),
    Method("dense + training", longer, tasks=TRAINED, keeps=(1.0,), note="the same budget for the dense model"),
    Method("hf_prune stock", hf_prune(shapes="stock")),
    Method("hf_prune uniform", hf_prune(shapes="uniform"), tasks=CLASSIFICATION),
    Method("hf_prune per_layer", hf_prune(shapes="per_layer"), tasks=(*ALL, *TRAINED)),
    preset("kwon2022", tasks=CLASSIFICATION),  # both papers are about encoders
    preset("kprune", tasks=CLASSIFICATION, note="scored once, not again before each sublayer"),
    preset("flap", tasks=CLASSIFICATION),
    preset(
        "flap", tasks=("llm",), repair="none", note="without its bias compensation: Llama has no biases to put it in"
    ),
    preset("wanda-sp"),
    preset("llm-pruner"),
    preset("magnitude"),
    Method("random", hf_prune(criterion="random", repair="none", shapes="uniform", allocation="ratio")),
    tp("L2", "GroupMagnitudeImportance"),
    tp("Taylor", "GroupTaylorImportance"),
    opti("PPM", "MAW", tasks=ALL),  # its name for "PPM" where data may be given
    opti("PPM with data", "MAW", True),
    opti("VOW", "VOW"),
    Method("uniform + distillation", trained("uniform"), tasks=RECOVERY),
    Method("per_layer + distillation", trained("per_layer"), tasks=TRAINED),
    Method("per_layer + labels", trained("per_layer", distilled=False), tasks=RECOVERY, keeps=(0.3,)),
    Method("per_layer + distillation + LoRA", LORA, tasks=RECOVERY, keeps=(0.3,)),
    Method("per_layer + distillation + 3 rounds", trained("per_layer", rounds=3), tasks=RECOVERY, keeps=(0.1,)),
    Method(
        "per_layer + PruningCallback", masked("per_layer"), tasks=RECOVERY, keeps=(0.3,), note="masks, stock Trainer"
    ),
    Method("per_layer + text", trained("per_layer", distilled=False), tasks=("llm_recovery",)),
    Method("per_layer + distillation + LoRA", LORA, tasks=("llm_recovery",)),
)


def methods_for(task: str, wanted: tuple[str, ...] = ()) -> list[Method]:
    """The rows of a task (default: all).

    Raises:
        ValueError: a wanted name that is no row of any task.
    """
    names = list(dict.fromkeys(method.name for method in METHODS))
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"No method {unknown}. Known: {', '.join(names)}.")
    return [m for m in METHODS if task in m.tasks and (not wanted or m.name in wanted)]
