"""What a user decides about pruning: one dataclass, presets by published name, YAML recipes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import yaml

from .files import read_text
from .plan import short

Metric = Literal["macs", "params", "bytes", "latency"]
Scope = Literal["model", "blocks"]
Criterion = Literal[
    "fisher",
    "fisher_model",
    "fisher_block",
    "fisher_obs",
    "fisher_joint",
    "fisher_obs_root",
    "kprune",
    "taylor",
    "magnitude",
    "activation",
    "fluctuation",
    "hessian",
    "reap",
    "frequency",
    "random",
]
Shapes = Literal["stock", "uniform", "per_layer"]
Allocation = Literal["loss", "ratio"]
LayerCriterion = Literal["angular", "block_influence", "sleb", "random"]
Repair = Literal["least_squares", "rescale", "bias", "none"]
Schedule = Literal["constant", "linear", "cubic"]
TeacherDtype = Literal["float32", "bfloat16", "float16"]
TRAINING_FIELDS = ("rounds", "schedule", "recovery", "rewind_to")  # of PruningConfig: nothing to a cut alone
UNIT_CHOICES = ("heads", "kv_groups", "neurons", "channels", "experts", "layers", "tokens", "hidden")
MOST_SEED = 2**32 - 1


def _help(text: str) -> dict[str, str]:
    return {"help": text}


# --- checks: a value -> what is wrong with it, as the end of a sentence that its field begins; "" if nothing is -------

Check = Callable[[Any], str]


def _that(fits: Callable[[Any], bool], means: str) -> Check:
    return lambda value: "" if fits(value) else f"={short(value)}{means}"


def _choice(*allowed: str) -> Check:
    return _that(lambda value: isinstance(value, str) and value in allowed, f" is not one of {', '.join(allowed)}")


def _number(fits: Callable[[Any], bool], means: str) -> Check:
    return _that(lambda value: _is(Real, value) and fits(value), f": {means}")


def _whole(least: int, most: float = math.inf) -> Check:
    bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
    return _that(lambda value: _is(Integral, value) and least <= value <= most, f": must be {bounds}, a whole number")


def _list(each: Check, means: str) -> Check:
    """Of values that all fit; of one that does not, `each` says why."""
    several = _that(lambda values: isinstance(values, list | tuple) and len(values) > 0, f": {means}")
    return lambda values: several(values) or next((problem for problem in map(each, values) if problem), "")


def _optional(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_(config: Any, checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first field whose value is wrong; the rest become plain Python values. In place."""
    for name, check in checks.items():
        value = getattr(config, name)
        problem = check(value)
        if problem:
            raise ValueError(f"{name}{problem}.")
        setattr(config, name, _plain(value))


def _plain(value: Any) -> Any:
    """As JSON and YAML know it: numpy's numbers, paths and tuples are given, too."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    for kind, plain in ((Integral, int), (Real, float), (os.PathLike, os.fspath)):
        if _is(kind, value):
            return plain(value)
    return value


_PATH = _that(
    lambda value: isinstance(value, str | os.PathLike) and bool(os.fspath(value)), ": must be a path or a Hub id"
)
_KEEP = "the fraction that remains must satisfy 0 < keep <= 1"
_RECOVERY = "the share of the steps must satisfy 0 < recovery < 1"
_UNITS = f"name at least one of {', '.join(UNIT_CHOICES)}, as a list, or leave it None"
_LAYERS = "must be a list of the teacher's layers, from 0, one for each layer of the student, or None"
_WEIGHT = _number(lambda weight: 0 <= weight < math.inf, "a weight is a number of at least 0")

PRUNING_CHECKS: Mapping[str, Check] = {
    "keep": _number(lambda keep: 0 < keep <= 1, _KEEP),
    "metric": _choice(*get_args(Metric)),
    "scope": _choice(*get_args(Scope)),
    "units": _optional(_list(_choice(*UNIT_CHOICES), _UNITS)),
    "criterion": _optional(_choice(*get_args(Criterion))),
    "layer_criterion": _choice(*get_args(LayerCriterion)),
    "min_count": _whole(1),
    "max_tokens": _optional(_whole(1)),
    "candidates": _whole(1),
    "shapes": _choice(*get_args(Shapes)),
    "allocation": _choice(*get_args(Allocation)),
    "align": _optional(_whole(1)),
    "repair": _choice(*get_args(Repair)),
    "batch_norm": _that(lambda value: isinstance(value, bool), ": must be True or False"),
    "calibration_samples": _whole(8),
    "calibration_seed": _whole(0, MOST_SEED),
    "sequence_length": _whole(1),
    "latency_batch_size": _whole(1),
    "rounds": _whole(1),
    "schedule": _choice(*get_args(Schedule)),
    "recovery": _number(lambda share: 0 < share < 1, _RECOVERY),
    "rewind_to": _optional(_PATH),
}

DISTILLATION_CHECKS: Mapping[str, Check] = {
    "teacher": _optional(_PATH),
    "teacher_dtype": _optional(_choice(*get_args(TeacherDtype))),
    "task_weight": _WEIGHT,
    "logits_weight": _WEIGHT,
    "temperature": _number(lambda temperature: 0 < temperature < math.inf, "must be a finite number above 0"),
    "hidden_weight": _WEIGHT,
    "attention_weight": _WEIGHT,
    "layer_map": _optional(_list(_whole(0), _LAYERS)),
}


@dataclass
class PruningConfig:
    """How much to remove, from what, by which criterion and in which shapes.

    Raises:
        ValueError: a field is out of its allowed set; the message names the field, the value and the set.
    """

    keep: float = field(default=0.5, metadata=_help("Fraction of the cost (see `metric`) that remains, 0 < keep <= 1."))
    metric: Metric = field(
        default="macs",
        metadata=_help(
            "What `keep` is a fraction of: multiply-adds, parameters, bytes of the saved weights, or the latency of a "
            "forward pass, measured on this device at `latency_batch_size` x `sequence_length`."
        ),
    )
    scope: Scope | None = field(
        default=None,
        metadata=_help(
            "'model' counts everything (default for macs, bytes and latency); 'blocks' counts attention, FFN and their "
            "norms, no embeddings, no convolutions in front of the layers and no head (default for params, unless "
            "tokens are among the units)."
        ),
    )
    units: list[str] | None = field(
        default=None,
        metadata=_help(
            "What may be removed: any of heads, kv_groups, neurons, channels (between two convolutions), experts, "
            "layers, tokens (of the vocabulary), hidden (channels of the whole stream, with heads where a class makes "
            "them as wide together). Default: neurons (of experts too; where parameters or bytes count, whole experts) "
            "or channels, but not those in front of the layers of a speech model, with kv_groups where query heads "
            "share several KV heads, else with heads; without either where `shapes` is stock and the stock class "
            "cannot say it."
        ),
    )
    criterion: Criterion | None = field(
        default=None,
        metadata=_help(
            "Importance score. Default: fisher_obs_root for losses over tokens (language models), fisher_obs for other "
            "losses, hessian without a loss; reap where only experts go. reap and frequency score experts alone."
        ),
    )
    layer_criterion: LayerCriterion = field(
        default="angular",
        metadata=_help(
            "Which layers go: the contiguous block that turns hidden states least ('angular', Gromov et al.), those "
            "that turn them least each ('block_influence', ShortGPT), those without which the loss is least ('sleb'), "
            "or 'random'."
        ),
    )
    min_count: int = field(
        default=1, metadata=_help("A token stays if the texts use it this often; special ones and single bytes do.")
    )
    max_tokens: int | None = field(
        default=None, metadata=_help("Tokens that stay at most, those used most. Default: as many as are used.")
    )
    candidates: int = field(
        default=4,
        metadata=_help(
            "Where layers, tokens or hidden channels are among the units, or `shapes` is per_layer: how many divisions "
            "of the budget are cut, repaired and compared by their loss on held-out rows (of the guard, where given); "
            "1 takes the predicted one."
        ),
    )
    shapes: Shapes = field(
        default="stock",
        metadata=_help(
            "'stock': only what the stock class can express; 'uniform': heads and neurons, the same counts in every "
            "layer of a stack; 'per_layer': each layer its own counts."
        ),
    )
    allocation: Allocation = field(
        default="loss",
        metadata=_help(
            "How much to take from where: 'loss' takes what loses the least score at the cost; 'ratio' takes the same "
            "fraction everywhere, as several published methods do. Which units go is by score in both."
        ),
    )
    align: int | None = field(
        default=None,
        metadata=_help("Round kept FFN widths to this multiple. Default: 32 on CPU, 64 on GPU, less for narrow FFNs."),
    )
    repair: Repair = field(
        default="least_squares",
        metadata=_help(
            "Correction of the kept weights: least squares, one scale a unit (Kwon), bias only (FLAP), or none."
        ),
    )
    batch_norm: bool = field(
        default=True,
        metadata=_help(
            "Re-estimate running statistics of batch norms behind a cut, on the calibration examples, whatever "
            "`repair` is."
        ),
    )
    calibration_samples: int = field(default=1024, metadata=_help("Examples drawn from the data, at least 8."))
    calibration_seed: int = field(default=0, metadata=_help("Seed of the draw (and of criterion random)."))
    sequence_length: int = field(
        default=128,
        metadata=_help(
            "Tokens per example at which MACs are counted and latency is measured; vision models take it from the "
            "image."
        ),
    )
    latency_batch_size: int = field(default=1, metadata=_help("Examples per forward pass whose latency is measured."))
    rounds: int = field(
        default=1,
        metadata=_help("Rounds of cut, repair and training that PruningTrainer takes to reach `keep`."),
    )
    schedule: Schedule = field(
        default="cubic",
        metadata=_help(
            "What remains after each of several rounds: 'constant' takes the same fraction of what is left, 'linear' "
            "the same amount, 'cubic' much at first and little at the end."
        ),
    )
    recovery: float = field(
        default=0.5,
        metadata=_help("Share of the training steps after the last of several rounds, 0 to 1."),
    )
    rewind_to: str | None = field(
        default=None,
        metadata=_help(
            "Checkpoint of an early step of the dense training: after a cut, PruningTrainer puts its weights back into "
            "what was kept, and trains those (lottery ticket rewinding)."
        ),
    )

    def __post_init__(self) -> None:
        if self.scope is None:
            embeddings = isinstance(self.units, list | tuple) and "tokens" in self.units
            self.scope = "blocks" if self.metric == "params" and not embeddings else "model"
        _check_(self, PRUNING_CHECKS)
        if "hidden" in (self.units or ()) and (self.shapes != "stock" or self.metric == "latency"):
            raise ValueError(
                f"units={self.units} with shapes={self.shapes!r} and metric={self.metric!r}: a stream has one width, "
                "which the stock class has a key for, and no table of latencies is measured of other widths. Use "
                "shapes='stock' (with fewer heads where the class couples them) and metric='macs'."
            )
        whole = {"latency": "whole forward passes are timed", "bytes": "a file holds the whole model"}
        if self.metric in whole and self.scope == "blocks":
            raise ValueError(f"scope='blocks' with metric={self.metric!r}: {whole[self.metric]}. Use scope='model'.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PruningConfig:
        """The configuration of a published method (see `PRESETS`), with `changes` on top.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"No preset {name!r}. Known: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Build from a mapping; keys of a newer hf_prune are ignored with a warning.

        Raises:
            ValueError: no mapping, or a field is out of its allowed set.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"PruningConfig is made from a mapping of its fields, got {type(data).__name__}.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown:
            warnings.warn(f"PruningConfig ignores unknown keys {unknown}; known: {sorted(known)}.", stacklevel=2)
        return cls(**{key: value for key, value in data.items() if key in known})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> PruningConfig:
        """Read the `pruning:` section of a recipe, or a file of bare fields.

        Raises:
            FileNotFoundError: no such file. ValueError: no YAML, no mapping, or a field is out of its allowed set.
        """
        data = parse_yaml(read_text(path), str(path))
        if not isinstance(data, Mapping):
            raise ValueError(f"{path}: a recipe is a mapping of fields, found {type(data).__name__}.")
        return cls.from_dict(data.get("pruning", data))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump({"pruning": self.to_dict()}, sort_keys=False)


@dataclass
class DistillationConfig:
    """What a pruned model learns from its teacher, beside the task: weights of the terms of the loss.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (logits); Jiao et al. 2020, "TinyBERT" (hidden
    states). A term of weight 0 is not computed.

    Raises:
        ValueError: a field is out of its allowed set.
    """

    teacher: str | None = field(
        default=None,
        metadata=_help("Directory or Hub id of the teacher. Default: the model itself, as it was before the cut."),
    )
    teacher_dtype: TeacherDtype | None = field(
        default=None, metadata=_help("Precision in which the teacher runs. Default: as it is.")
    )
    task_weight: float = field(default=0.5, metadata=_help("Weight of the task loss."))
    logits_weight: float = field(
        default=0.5, metadata=_help("Weight of KL(teacher, student) at `temperature`, times its square.")
    )
    temperature: float = field(default=2.0, metadata=_help("What both sides' logits are divided by."))
    hidden_weight: float = field(
        default=1.0,
        metadata=_help("Weight of the squared error of the hidden states, relative to the teacher's mean square."),
    )
    attention_weight: float = field(
        default=0.0, metadata=_help("Weight of the same for what each attention sublayer adds to the stream.")
    )
    layer_map: list[int] | None = field(
        default=None,
        metadata=_help(
            "The teacher's layer for each layer of the student, from 0. Default: the same, or evenly over a deeper "
            "teacher."
        ),
    )

    def __post_init__(self) -> None:
        _check_(self, DISTILLATION_CHECKS)
        if not (self.logits_weight or self.hidden_weight or self.attention_weight):
            raise ValueError("All distillation weights are 0. Give one, or train with distillation=None.")


PRESETS: dict[str, dict[str, Any]] = {
    # weights only, L2 norm of a unit's weights (Han et al. 2015, as structured pruning uses it)
    "magnitude": {"criterion": "magnitude", "repair": "none", "shapes": "uniform", "allocation": "ratio"},
    # Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1: heads by |gate gradient|
    "michel2019": {"criterion": "taylor", "repair": "none", "shapes": "per_layer", "candidates": 1, "units": ["heads"]},
    # Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers": diagonal Fisher for a MAC target,
    # block-diagonal rearrangement, one scale per head and neuron tuned by least squares
    "kwon2022": {"criterion": "fisher_block", "repair": "rescale", "shapes": "per_layer", "candidates": 1},
    # Park et al. 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models" (K-prune)
    "kprune": {"criterion": "kprune", "repair": "least_squares", "shapes": "per_layer", "candidates": 1},
    # An et al. 2024 (FLAP) section 4 calls the structured form of Wanda (Sun et al. 2023) Wanda-sp
    "wanda-sp": {"criterion": "activation", "repair": "none", "shapes": "uniform", "allocation": "ratio"},
    # An et al. 2024, "Fluctuation-based Adaptive Structured Pruning": WIFV score, bias compensation
    "flap": {"criterion": "fluctuation", "repair": "bias", "shapes": "per_layer", "candidates": 1},
    # Ma et al. 2023, "LLM-Pruner", section 3.2: first-order Taylor of the loss
    "llm-pruner": {"criterion": "taylor", "repair": "none", "shapes": "uniform", "allocation": "ratio"},
}


def config_or(config: Any, default: Callable[[], PruningConfig] = PruningConfig) -> PruningConfig:
    """The config, or the default where it is None.

    Raises:
        TypeError: something else was given.
    """
    if config is not None and not isinstance(config, PruningConfig):
        raise TypeError(
            f"config is a PruningConfig, got {short(config)}. PruningConfig.from_dict(...) reads a mapping, "
            "PruningConfig.from_yaml(path) a file, PruningConfig.preset(name) knows published methods."
        )
    return default() if config is None else config


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text holds; `name` says in an error what was read.

    Raises:
        ValueError: no YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as of a date that is none
        raise ValueError(f"{name} is no YAML: {' '.join(str(error).split())}.") from error
