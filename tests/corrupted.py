"""Ways to damage a checkpoint: name -> a function of its directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]
HUGE = 10**9
FILES = ("config.json", "model.safetensors", "pruning_plan.json", "pruning_report.json", "verified.json")


def _cut(name: str, share: float) -> Damage:
    def damage(home: Path) -> None:
        raw = (home / name).read_bytes()
        (home / name).write_bytes(raw[: int(share * len(raw))])

    return damage


def _write(name: str, content: bytes) -> Damage:
    return lambda home: (home / name).write_bytes(content) and None


def _edit(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(home: Path) -> None:
        found = json.loads((home / name).read_text())
        changed = change(found)
        (home / name).write_text(json.dumps(found if changed is None else changed))

    return damage


def _set(name: str, *path: str, value: Any) -> Damage:
    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return _edit(name, change)


def _drop(name: str, *path: str) -> Damage:
    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        del found[path[-1]]

    return _edit(name, change)


def _entry(key: str, value: Any) -> Damage:
    return _set("config.json", "hf_prune", key, value=value)


def _layers(value: Any) -> Damage:
    return _set("config.json", "per_layer_config", value=value)


def _flip(home: Path) -> None:
    raw = bytearray((home / "model.safetensors").read_bytes())
    raw[-1] ^= 64
    (home / "model.safetensors").write_bytes(raw)


OF_FILES: dict[str, Damage] = {
    f"{name} {how}": damage(name)
    for name in FILES
    for how, damage in {
        "missing": lambda name: lambda home: (home / name).unlink(),
        "empty": lambda name: _write(name, b""),
        "half": lambda name: _cut(name, 0.5),
        "no text": lambda name: _write(name, b"\xff\xfe\x00garbage"),
        "a list": lambda name: _write(name, b"[1, 2]"),
    }.items()
}
OF_ENTRY: dict[str, Damage] = {
    "entry a number": _set("config.json", "hf_prune", value=3),
    "entry a list": _set("config.json", "hf_prune", value=[1]),
    "entry a word": _set("config.json", "hf_prune", value="pruned"),
    "format of the future": _entry("format", 3),
    "format a word": _entry("format", "1"),
    "no format": _drop("config.json", "hf_prune", "format"),
    "unknown shapes": _entry("shapes", "sparse"),
    "shapes a list": _entry("shapes", ["per_layer"]),
    "no dense": _drop("config.json", "hf_prune", "dense"),
    "empty dense": _entry("dense", {}),
    "dense a list": _entry("dense", [4, 48]),
    "dense a word": _entry("dense", "48"),
    "dense negative": _entry("dense", {"num_attention_heads": 4, "intermediate_size": -48}),
    "dense zero": _entry("dense", {"num_attention_heads": 0, "intermediate_size": 48}),
    "dense a float": _entry("dense", {"num_attention_heads": 4.0, "intermediate_size": 48}),
    "dense a bool": _entry("dense", {"num_attention_heads": True, "intermediate_size": 48}),
    "dense without a key": _entry("dense", {"num_attention_heads": 4}),
    "dense with another key": _entry("dense", {"num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 8}),
    "dense smaller than the weights": _entry("dense", {"num_attention_heads": 2, "intermediate_size": 48}),
    "layers a number": _entry("layers", 3),
    "layers a list": _entry("layers", [1]),
    "layers of numbers": _entry("layers", {"encoder.0.ffn": 3}),
    "plan a number": _entry("plan", 7),
    "plan of another model": _entry("plan", "0" * 64),
    "kept a word": _entry("kept", "all"),
    "kept a list": _entry("kept", ["neurons 48 AAAA"]),
    "kept empty": _entry("kept", {}),
    "kept of bad bits": _entry("kept", {"encoder.0.ffn": "neurons 48 *"}),
    "kept of too few bits": _entry("kept", {"encoder.0.ffn": "neurons 48 AA=="}),
    "kept of a billion": _entry("kept", {"encoder.0.ffn": f"neurons {HUGE} //8="}),
    "kept of no layer": _entry("kept", {"encoder.ffn": "neurons 8 Dw=="}),
    "kept of numbers": _entry("kept", {"encoder.0.ffn": 12}),
}
OF_SIZES: dict[str, Damage] = {
    **{
        f"{key} is {value!r}": _set("config.json", key, value=value)
        for key in ("num_attention_heads", "intermediate_size")
        for value in (HUGE, -1, 0, 12.5, "many", True)
    },
    **{
        f"a layer's width is {value!r}": _set("config.json", "per_layer_config", "0", "intermediate_size", value=value)
        for value in (HUGE, 49, -1, 0, 1.5, "many", True, None, [1])
    },
    "a layer with another width": _set("config.json", "per_layer_config", "0", "intermediate_size", value=7),
    "a layer with other heads": _set("config.json", "per_layer_config", "0", "num_attention_heads", value=1),
    "no layers": _drop("config.json", "per_layer_config"),
    "layers none": _layers(None),
    "layers empty": _layers({}),
    "a layer too many": _set("config.json", "per_layer_config", "7", value={"intermediate_size": 8}),
    "a billionth layer": _set("config.json", "per_layer_config", str(HUGE), value={"intermediate_size": 8}),
    "a negative layer": _set("config.json", "per_layer_config", "-1", value={"intermediate_size": 8}),
    "a layer by name": _set("config.json", "per_layer_config", "first", value={"intermediate_size": 8}),
    "a layer that is a number": _set("config.json", "per_layer_config", "0", value=3),
    "layers are a list": _layers([{"intermediate_size": 8}]),
    "layers are a word": _layers("all"),
}
OF_CLASS: dict[str, Damage] = {
    **{
        f"architectures {value!r}": _set("config.json", "architectures", value=value)
        for value in (["os.system"], [], None, "x", 3, ["pipeline"], [3], [None], {"a": 1}, ["BertConfig"])
    },
    "model_type unknown": _set("config.json", "model_type", value="megatron-xxl"),
    "model_type a number": _set("config.json", "model_type", value=3),
    "no model_type": _drop("config.json", "model_type"),
}
OTHERS: dict[str, Damage] = {
    "a flipped bit": _flip,
    "tokenizer edited": _edit("tokenizer.json", lambda t: t["model"]["vocab"].update(good=6, bad=5)),
    "tokenizer missing": lambda home: (home / "tokenizer.json").unlink(),
    "an adapter beside it": _write("adapter_config.json", b"{}"),
    "a pickle beside it": _write("pytorch_model.bin", b"\x80\x04."),
    "an index beside it": _write("model.safetensors.index.json", b"{}"),
    "plan edited": _set("pruning_plan.json", "kept", 1, "kept", value=[0]),
    "plan of another family": _set("pruning_plan.json", "model_type", value="electra"),
    "plan of the future": _set("pruning_plan.json", "format", value=3),
    "report of another plan": _set("pruning_report.json", "plan", value="0" * 64),
    "report without cuts": _drop("pruning_report.json", "cuts"),
    "report of numbers": _set("pruning_report.json", "cuts", value=[1, 2]),
    "report of empty cuts": _set("pruning_report.json", "cuts", value=[{}]),
    "proof without files": _drop("verified.json", "files"),
    "proof of a list": _set("verified.json", "files", value=["config.json"]),
    "proof of no file": _set("verified.json", "files", value={}),
    "proof with a word": _set("verified.json", "difference", value="small"),
    "proof of a file outside": _set("verified.json", "files", "../secret", value="0" * 64),
    "proof of numbers": _set("verified.json", "files", "config.json", value=3),
}
DAMAGES: dict[str, Damage] = {**OF_FILES, **OF_ENTRY, **OF_SIZES, **OF_CLASS, **OTHERS}
